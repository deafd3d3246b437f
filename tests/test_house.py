"""The house stands as docs/architecture.md draws it: one room a concern, imports downstairs, one format."""

import ast
import inspect
import json
import re
import socket
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import chatmagic.course

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "chatmagic"
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
DOCS = [(ROOT / "docs" / name).read_text("utf-8") for name in ("architecture.md", "architecture.en.md")]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


@pytest.mark.parametrize(
    "command", [("-c", LINT_IMPORTS), ("-m", "ruff", "check"), ("-m", "ruff", "format", "--check"), ("-m", "mypy")]
)
def test_the_linters_are_content(command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# What needs torch, or brings tensors of its own.
HEAVY = set(
    """torch transformers peft accelerate bitsandbytes torchkeras triton numpy pandas matplotlib gguf safetensors
    tokenizers""".split()
)


def test_mypy_reads_what_needs_no_torch():
    read = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]["files"]
    files = {file for each in read for file in [ROOT / each, *(ROOT / each).rglob("*.py")]}
    free = {file for file in TREES if not HEAVY & {module.split(".")[0] for module in imports(file)}}
    assert {str(file.relative_to(PACKAGE)) for file in free - files} == set()


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from running(node)


def imports(file: Path) -> list[str]:
    """The modules that a file imports from anywhere in it, absolute; not for the sake of types alone."""
    package, found = ["chatmagic", *file.relative_to(PACKAGE).parts[:-1]], []
    for node in running(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            found.append(".".join([*above, *filter(None, [node.module])]))
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def drawn(doc: str, arrow: str) -> set[tuple[str, str]]:
    """The arrows of that kind in the picture."""
    lines = re.findall(rf"^ +(\w+) {re.escape(arrow)} (.+)$", doc, re.MULTILINE)
    return {(start, end) for start, ends in lines for end in ends.split(" & ")}


def test_the_picture_is_of_the_real_imports():
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]
    rooms = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in files}
    pairs = [
        (file.relative_to(PACKAGE).parts[0].removesuffix(".py"), room(module))
        for file in files
        for module in imports(file)
        if module.startswith("chatmagic.")
    ]
    real = {(start, end) for start, end in pairs if start != end and end not in ("errors", "files", "text", "progress")}
    upward = {tuple(map(room, each.split(" -> "))) for each in CONTRACTS[0]["ignore_imports"]}
    for doc in DOCS:
        assert set(re.findall(r"^\| `(\w+)` \|", doc, re.MULTILINE)) == rooms
        assert drawn(doc, "-->") == real - upward
        assert drawn(doc, "-.->") == upward


@pytest.mark.parametrize("room", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_who_lives_in_a_room_is_told(room):
    lives = {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
    for doc in DOCS:
        (told,) = re.findall(rf"^\| `{room}` \|.*", doc, re.MULTILINE)
        assert set(re.findall(r"`(\w+\.py)`", told)) == lives, "docs/architecture.md names each module of a room"


def test_the_contracts_name_every_package_that_is_not_pythons_own():
    """Or one that is new could be imported where none may be."""
    found = {module.split(".")[0] for file in PACKAGE.rglob("*.py") for module in imports(file)}
    others = found - sys.stdlib_module_names - {"chatmagic"}
    assert set(CONTRACTS[1]["forbidden_modules"]) == others
    assert others - set(CONTRACTS[2]["forbidden_modules"]) == {"IPython", "markdown_it", "traitlets"}


@pytest.mark.parametrize("address", [("192.0.2.1", 9), ("pypi.example", 443)])
def test_a_test_that_is_not_marked_network_stays_inside(address):
    with pytest.raises(OSError, match=f"not marked `network` would reach {address[0]}"):
        socket.create_connection(address, timeout=5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


@pytest.mark.parametrize("package", [chatmagic, chatmagic.course])
def test_editors_see_what_is_imported_on_first_use(package):
    """The imports that are for types alone name what `__all__` names, from where `__getattr__` takes it."""
    (block,) = [node for node in ast.parse(Path(package.__file__).read_text("utf-8")).body if isinstance(node, ast.If)]
    start = package.__name__.split(".")
    seen = {
        alias.name: ".".join([*start[: len(start) + 1 - node.level], node.module])
        for node in block.body
        for alias in node.names
        if node.level
    }
    assert seen == {name: f"chatmagic.{home}" for name, home in package._HOME.items()}
    assert package.__all__ == sorted(seen)


def test_the_notebooks_import_from_two_places():
    cells = [cell for path in NOTEBOOKS for cell in json.loads(path.read_text("utf-8"))["cells"]]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = re.findall(r"^\s*(?:from|import) (chatmagic[\w.]*)", code, re.MULTILINE)
    assert set(found) == {"chatmagic", "chatmagic.course"}


# What writes, by the name of the call.
WRITES = set(
    """open fdopen write_text write_bytes touch mkdir makedirs rename renames unlink rmdir rmtree removedirs symlink_to
    link_to copyfile copyfileobj copy copy2 copytree move mkstemp mkdtemp NamedTemporaryFile extractall urlretrieve dump
    save savez tofile to_csv to_json to_pickle save_file save_model save_pretrained savefig imsave""".split()
)
# These may: into a folder or a file that `files` made and will put into its place.
MAY_WRITE = {
    ("models/merge.py", "save_pretrained"),
    ("models/merge.py", "copyfile"),
    ("models/plain_lora.py", "save_pretrained"),
    ("models/plain_lora.py", "save_file"),
    ("models/plain_lora.py", "copyfile"),
    ("models/shard.py", "open"),
    ("models/unpack.py", "save_pretrained"),
    ("course/classroom.py", "copytree"),
    ("course/download.py", "copyfileobj"),
    ("course/hubs.py", "open"),
    ("training/plots.py", "savefig"),
    ("training/record.py", "to_csv"),  # this and the next: to memory
    ("training/states.py", "save"),
    ("notebook/magic.py", "save"),  # this and the next: ChatLLM's
    ("notebook/keeping.py", "save"),
}


def may_write(call: ast.Call) -> str | None:
    """The name of the called function, if it may write."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    module = getattr(getattr(call.func, "value", None), "id", "")
    if name == "open":
        words = [
            each.value
            for each in [*call.args, *(word.value for word in call.keywords)]
            if isinstance(each, ast.Constant)
        ]
        modes = [word for word in words if isinstance(word, str) and re.fullmatch("[rwaxbt+]+", word)]
        return name if any(set(mode) & set("wax+") for mode in modes) else None
    if name == "replace":  # pathlib's and os's, not str's nor dataclasses'
        return name if isinstance(call.func, ast.Attribute) and (module == "os" or len(call.args) == 1) else None
    in_memory = module in ("copy", "json") or isinstance(call.func, ast.Name) and name in ("copy", "save")
    return name if name in WRITES and not in_memory else None


def test_nothing_but_files_writes():
    """A kill, a full disk or a closed folder would leave half of what another wrote: tests/test_files.py."""
    found = {
        (str(file.relative_to(PACKAGE)), name)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and (name := may_write(node)) and file != PACKAGE / "files.py"
    }
    assert found == MAY_WRITE


def public(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The classes, functions and methods that others may call, not what is defined inside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def defined(tree: ast.Module) -> set[str]:
    """The public names that a module itself gives to something."""
    found = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = (each.id for target in targets if target for each in ast.walk(target) if isinstance(each, ast.Name))
        found |= {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else {*names}
    return {name for name in found if not name.startswith("_")}


# In several modules: a type variable, IPython's two, and one layer by torch and by Triton.
OFTEN = {"T", "load_ipython_extension", "unload_ipython_extension", "normalise"}


def test_one_word_for_one_thing():
    """But the families each have what `families` asks of them, and a command is called as what it runs."""
    files = [file for file in TREES if file.parent.name != "families" and file != PACKAGE / "cli.py"]
    times = Counter(name for file in files for name in defined(TREES[file]))
    assert {name for name, count in times.items() if count > 1} == OFTEN


def raised(function: ast.FunctionDef) -> set[str]:
    """The package's errors that a function raises itself."""
    names = [
        ast.unparse(node.exc.func)
        for node in ast.walk(function)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]
    return {name for name in names if name.endswith("Error") and name in ERRORS}


TREES = {file: ast.parse(file.read_text("utf-8")) for file in PACKAGE.rglob("*.py")}
ERRORS = {"ChatmagicError"} | {
    node.name
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Error") for base in node.bases)
}


def test_every_public_name_tells_what_it_is_and_what_it_raises():
    undocumented, untold = [], []
    for file, tree in TREES.items():
        for node in public(tree):
            told, name = ast.get_docstring(node) or "", f"{file.relative_to(PACKAGE)}: {node.name}"
            if not told:
                undocumented.append(name)
            if isinstance(node, ast.FunctionDef):
                untold += [f"{name} raises {error}" for error in raised(node) if error not in told]
    assert (sorted(undocumented), sorted(untold)) == ([], [])


TOLD: dict[str, str] = {}
for node in (node for tree in TREES.values() for node in public(tree)):
    TOLD[node.name] = f"{TOLD.get(node.name, '')}\n{ast.get_docstring(node)}"
BY_THEIR_TYPE = {"self", "args", "kwargs", "model", "tokenizer", "persona", "course"}


def told_with_references(text: str) -> str:
    """A docstring, with those of the functions that it refers to in backticks, and so on."""
    seen = set()
    while new := TOLD.keys() & {*re.findall(r"`(?:\w+\.)*(\w+)`", text)} - seen:
        seen |= new
        text += "\n".join(TOLD[name] for name in new)
    return text


@pytest.mark.parametrize("package", [chatmagic, chatmagic.course])
def test_every_argument_of_a_public_name_is_told(package):
    untold = []
    for name in package.__all__:
        thing = getattr(package, name)
        functions = {name: thing} if inspect.isfunction(thing) else {}
        if inspect.isclass(thing) and not is_dataclass(thing):
            functions |= {f"{name}.{key}": each for key, each in vars(thing).items() if inspect.isfunction(each)}
        for where, function in functions.items():
            if re.search(r"\._(?!_init__|_call__)", where):
                continue
            told = told_with_references(f"{inspect.getdoc(function)}\n{inspect.getdoc(thing)}")
            arguments = set(inspect.signature(function).parameters) - BY_THEIR_TYPE
            untold += [f"{where}({each})" for each in arguments if not re.search(rf"\b{each}\b", told)]
    assert untold == []


def test_what_a_text_tells_to_run_as_a_module_is_one():
    """`python -m` and `accelerate launch -m`, in messages and in documents."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *PACKAGE.rglob("*.py"), *NOTEBOOKS]
    found = {path.name: re.findall(r"-m (chatmagic[\w.]*\w)", path.read_text("utf-8")) for path in texts}
    told = {(name, file) for file, names in found.items() for name in names}
    assert {name for name, _ in told} >= {"chatmagic.cli", "chatmagic.course.replies"}
    for name, file in told:
        module = find_spec(name)
        assert module and not module.submodule_search_locations, f"{file} tells to run {name}, which is no module"
        assert '__name__ == "__main__"' in Path(module.origin).read_text("utf-8"), f"{name}, of {file}, does nothing"
