"""What CONTRIBUTING.md asks of whoever adds something: a test here fails until the last file of its list has it."""

import json
import re
import tomllib
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

from architectures import ARCHITECTURES, profile_told, told
from chatmagic import get_template
from chatmagic.course.persona import LANGUAGES
from chatmagic.course.profile import profiles
from chatmagic.data.keys import PARTS
from chatmagic.models import families
from golden import golden
from published import MODELS

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README.en.md"]
FIGURE = re.compile(r"\d+(?:[.,]\d+)*")
FOR_BOTH = {"template-list", "terms"}  # pages that readers of both languages share
TWINS = [path for where in ("docs", "benchmarks") for path in sorted((ROOT / where).glob("*.md"))]
TWINS = sorted({f"{path.parent.name}/{path.name.split('.')[0]}" for path in TWINS if path.stem not in FOR_BOTH})
DOCUMENTS = [
    path for where in ("*.md", "docs/*.md", "benchmarks/*.md", "tests/golden/*.md") for path in ROOT.glob(where)
]
TEMPLATES = {
    name: row
    for file in (ROOT / "chatmagic" / "prompts").glob("*.toml")
    for name, row in tomllib.loads(file.read_text("utf-8")).items()
}
MODULES = {each.name: import_module(f"{families.__name__}.{each.name}") for each in iter_modules(families.__path__)}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def both(page: str) -> list[str]:
    """The page in Chinese and in English."""
    return [text(f"{page}{ending}") for ending in (".md", ".en.md")]


def rows(said: str) -> list[list[str]]:
    """The cells of every row of every table."""
    lines = [line.strip()[1:-1] for line in said.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


@pytest.mark.parametrize("name", [name for name, module in MODULES.items() if hasattr(module, "recognises")])
def test_a_family(name, tiny_models):
    module = MODULES[name]
    assert module in families.FAMILIES.values(), "it has no NAME"
    configs = {model: json.loads((tiny_models / model / "config.json").read_text()) for model in MODELS}
    read = [model for model in MODELS if families.find_family(configs[model], tiny_models / model) is module]
    assert read, "tests/helpers/published.py makes no checkpoint of it"
    assert {MODELS[model].template for model in read} <= TEMPLATES.keys()
    for page in both("docs/families"):
        told = " ".join(cells[0] for cells in rows(page)).lower()
        assert [model for model in read if model not in told] == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template(name):
    expected = golden("fastchat")["templates"].keys() | golden("publishers")["prompts"].keys()
    assert name in expected, "tests/golden has no prompts to compare with"
    listed = {cells[0]: cells[1:4] for cells in rows(text("docs/template-list.md"))}
    if f"`{name}`" not in listed:
        assert all(f"`{name}`" in [cells[1] for cells in rows(page)] for page in both("docs/templates"))
        return
    row = get_template(name)
    texts = [row.user.replace("{}", "Q") + row.prompt + row.answer.replace("{}", "A") + row.end + row.gap]
    texts += [row.end.strip() or row.end, *row.stop_strings]
    one, end, *stops = [f"`{each}`".replace("\n", "↵").replace("|", "\\|") for each in texts]
    stops += map(str, row.stop_ids)
    assert listed[f"`{name}`"] == [one, end if row.end else "eos", ", ".join(stops) or "—"]


@pytest.mark.parametrize("name", profiles())
def test_a_profile(name):
    """docs/models.md has its row, in both languages; where the READMEs name it, they have its size and a licence."""
    profile = profiles()[name]
    assert profile.licence and profile.why.keys() == {*LANGUAGES} and (profile.wheels or profile.huggingface)
    assert all(len(digest) == 64 for digest in [*profile.wheels.values(), *filter(None, [profile.sha256])])
    row = profile_told(profile)
    assert all(row in page.splitlines() for page in both("docs/models")), (
        "python tests/helpers/architectures.py prints it"
    )
    if profile.architecture:
        assert {profile.architecture, profile.architecture.removesuffix("_text")} & ARCHITECTURES.keys()
    for readme in READMES:
        for cells in [cells for cells in rows(text(readme)) if f"`{name}`" in cells[0]]:
            sizes = dict(zip(re.findall("`([^`]+)`", cells[0]), re.findall(r"([\d.]+) GB", cells[1]), strict=True))
            assert float(sizes[name]) == round(profile.bytes / 1e9, len(sizes[name].partition(".")[2])) and cells[2]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture(name):
    row = told(name)
    assert all(row in page.splitlines() for page in both("docs/models")), (
        "python tests/helpers/architectures.py prints it"
    )


@pytest.mark.parametrize("part", PARTS)
def test_a_data_format(part):
    """What a part of a row may be called, in a case and in the docs; tests/data/test_readers.py wants what becomes of
    every case."""
    cases = b"".join(path.read_bytes() for path in (ROOT / "tests/data/cases").iterdir())
    assert any(f'"{name}"'.encode() in cases for name in PARTS[part])
    assert all(any(re.search(f'[`"]{name}[`"]', page) for name in PARTS[part]) for page in both("docs/data"))


@pytest.mark.parametrize("notebook", [path.name for path in NOTEBOOKS])
def test_a_notebook(notebook):
    """In both languages, each in the table of its README."""
    for readme, folder in zip(READMES, ("notebooks", "notebooks/en")):
        assert (ROOT / folder / notebook).is_file()
        told = [cells[0] for cells in rows(text(readme))]
        assert f"[{notebook.removesuffix('.ipynb')}]({folder}/{notebook})" in told
    assert re.search(r"^test:.*\n\t.*--nbval-lax .*\bnotebooks/", text("Makefile"), re.MULTILINE)
    assert "make test" in text(".ci/run"), "CI executes it"
    assert [path.name[:2] for path in NOTEBOOKS].count(notebook[:2]) == 1, "the tutorial goes by the numbers"


def stated(page: str) -> dict[str, object]:
    """What a page says in any language."""
    return {
        "headings": re.findall(r"^#+(?= )", page, re.MULTILINE),
        "items": len(re.findall(r"^ *(?:-|\d+\.) ", page, re.MULTILINE)),
        "blocks": re.findall(r"^ *```\w*", page, re.MULTILINE),
        "rows": [(len(cells), sorted(FIGURE.findall(" ".join(cells)))) for cells in rows(page)],
        "figures": {*FIGURE.findall(page)},
    }


@pytest.mark.parametrize("page", TWINS)
def test_a_page_is_there_in_both_languages(page):
    """Each leads to the other at its top and states what the other does."""
    chinese, english = both(page)
    name = page.partition("/")[2]
    assert f"[English]({name}.en.md)" in chinese.splitlines()[:3]
    assert f"[中文]({name}.md)" in english.splitlines()[:3]
    assert stated(english) == stated(chinese)
    codes, known = (re.findall("`([^`\n]+)`", said) for said in (chinese, english))
    assert [code for code in codes if code.isascii() and code not in known] == []


@pytest.mark.parametrize("page", [*TWINS, "README"])
def test_english_leads_to_english(page):
    """But for the page's own twin, where there is a page in English."""
    english = ROOT / f"{page}.en.md"
    links = {*re.findall(r"\]\((?!http)([^)#]+)", english.read_text("utf-8"))} - {f"{Path(page).name}.md"}
    twins = {link: re.sub("notebooks/(?!en)", "notebooks/en/", link).replace(".md", ".en.md") for link in links}
    assert [link for link, twin in twins.items() if twin != link and (english.parent / twin).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document):
    """Files of this repository in backticks, where no capitals stand for a name; tests, by file or function."""
    said = document.read_text("utf-8")
    paths = re.findall(r"`((?:tests|chatmagic|docs|notebooks|benchmarks|\.ci)/[a-z0-9_./*-]+)`", said)
    assert [path for path in paths if not list(ROOT.glob(path))] == []
    files = {path.name: path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    assert [name for name in re.findall(r"\btest_\w+\.py", said) if name not in files] == []
    functions = set(re.findall(r"def (test_\w+)", "".join(files.values())))
    assert [name for name in re.findall(r"(?:::|`)(test_\w+)(?!\w*\.py)\b", said) if name not in functions] == []
