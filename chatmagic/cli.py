"""`chatmagic doctor | download | tutorial | train | evaluate | merge`: the course without a browser."""

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from unicodedata import east_asian_width

from .course import Course, CourseError, resume
from .errors import ChatmagicError
from .machine import short
from .persona import Persona
from .profiles import get_profile


def doctor(args) -> None:
    from .download import home
    from .machine import report
    from .profiles import check_machine

    for what, found in report(home()):
        print(f"{what:13}{found}")
    profile = get_profile(args.profile)
    check_machine(profile, home() / profile.name)
    print(f"{'profile':13}{profile.name}: fits this machine")


def download(args) -> None:
    from .download import snapshot_download

    print(snapshot_download(args.model, revision=args.revision, source=args.source))


def tutorial(args) -> None:
    """Execute the notebooks in order, each in a fresh kernel, from the one that failed last time."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from traitlets.config import Config

    notebooks = sorted(args.notebooks.glob("0*.ipynb"))
    if not notebooks:
        raise ChatmagicError(f"There are no notebooks in {args.notebooks}. Run this from the repository's folder.")
    executed = args.executed
    executed.mkdir(parents=True, exist_ok=True)
    if all((executed / path.name).exists() for path in notebooks):  # the last run went through: a new one
        shutil.rmtree(executed)
        executed.mkdir()
    began = time.monotonic()
    for number, path in enumerate(notebooks, 1):
        label = f"[{number}/{len(notebooks)}] {path.stem:20}"
        if (executed / path.name).exists():
            print(label, "done before", flush=True)
            continue
        print(label, end=" ", flush=True)
        start, failed = time.monotonic(), executed / f"{path.stem}.failed.ipynb"
        notebook = nbformat.read(path, as_version=4)
        try:
            with tempfile.TemporaryDirectory() as sockets:  # over TCP anybody on a shared machine reaches the kernel
                config = Config(AsyncKernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
                where = {"metadata": {"path": str(path.parent)}}
                client = NotebookClient(
                    notebook,
                    kernel_name="python3",
                    resources=where,
                    config=config,
                    coalesce_streams=True,
                    record_timing=False,
                )
                client.execute()
        except CellExecutionError as error:
            nbformat.write(notebook, failed)
            raise ChatmagicError(
                f"{path.name} failed: {error.ename}: {error.evalue}\nThe executed part is {failed}. Mend the cause, "
                "then run the same command: it goes on from this notebook."
            ) from None
        failed.unlink(missing_ok=True)
        nbformat.write(notebook, executed / path.name)
        print(f"{time.monotonic() - start:6.0f} s", flush=True)
        if args.in_place:
            shutil.copy(executed / path.name, path)
    print(f"{len(notebooks)} notebooks in {time.monotonic() - began:.0f} s; executed copies in {executed}\n")
    _print_before_after()


def _print_before_after() -> None:
    import json

    course = resume("before", "merged")
    before, after = (
        json.loads((course.folder / name).read_text(encoding="utf-8")) for name in ("before.json", "after.json")
    )
    rows = [("question", "before", "after"), *((question, before[question], after[question]) for question in before)]
    for row in rows:
        print(" | ".join(fit(text, columns) for text, columns in zip(row, (40, 48, 60))).rstrip())


def fit(text: str, columns: int) -> str:
    """The text in one line of so many columns of a terminal, where a Chinese character takes two."""
    line = ""
    for char in " ".join(text.split()):
        if _columns(line + char) > columns:
            line = line[:-1] + "…"
            break
        line += char
    return line + " " * (columns - _columns(line))


def _columns(text: str) -> int:
    return sum(2 if east_asian_width(char) in "WF" else 1 for char in text)


def chosen(args) -> Course:
    """The course that the arguments choose; what they leave out is as in the one started last."""
    try:
        last = resume()
    except CourseError:
        last = Course(get_profile(), Persona())
    said = {field.name: getattr(args, field.name) for field in fields(Persona) if field.name in args}
    profile = get_profile(args.profile) if args.profile else last.profile
    return Course(profile, replace(last.persona, **said))


def train(args) -> None:
    course = chosen(args)
    from .train.script import run

    run(course, args.resume, args.save_every)


def evaluate(args) -> None:
    course = chosen(args)
    from .evaluate import before_and_after

    table = before_and_after(course)
    print(f"\n{'':16}{'before':>10}{'after':>10}")
    for name in table["before"]:
        cells = [table[when][name] for when in ("before", "after")]
        cells = [f"{cell:.1f}" if isinstance(cell, float) else "{}/{}".format(*cell) for cell in cells]
        print(f"{name:16}{cells[0]:>10}{cells[1]:>10}")
    print(f"Every reply is in {short(course.folder)}/evaluation.json.")


def merge(args) -> None:
    from .merge import merge_adapter

    print(merge_adapter(args.base, args.adapter, args.output))


TRAIN = """the notebooks' run as a script; over several GPUs: accelerate launch -m chatmagic.train, over several nodes
with CHATMAGIC_HOME on a disk that they share"""
EVALUATE = "a table of what the model knew before and after: who it is, and what it could answer; and evaluation.json"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="chatmagic", description=__doc__.split(":")[1].strip())
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    added = command("doctor", doctor, "what this machine has, and whether a profile fits it")
    added.add_argument("--profile", default="auto")
    added = command("download", download, "fetch a model and print its folder")
    added.add_argument("model", help="a profile's name or a hub id")
    added.add_argument("--revision")
    added.add_argument("--source", default="auto", choices=("auto", "modelscope", "huggingface"))
    added = command("tutorial", tutorial, "execute the notebooks in order, from the one that failed last time")
    added.add_argument("--notebooks", type=Path, default=Path("notebooks"))
    added.add_argument("--executed", type=Path, default=Path("work/executed"))
    added.add_argument("--in-place", action="store_true", help="also keep the outputs in the notebooks themselves")
    training, evaluation = command("train", train, TRAIN), command("evaluate", evaluate, EVALUATE)
    training.add_argument("--resume", action="store_true", help="go on from the newest state of a broken-off run")
    training.add_argument("--save-every", type=int, metavar="STEPS", help="how often to save a state, beside every epoch")
    for added in (training, evaluation):
        added.add_argument("profile", nargs="?", help="of profiles.toml; default: that of the course started last")
        who = added.add_argument_group("who the model becomes", "what is left out is as in the course started last")
        for field in fields(Persona):
            languages = ("zh", "en") if field.name == "language" else None
            flag = f"--{field.name.replace('_', '-')}"
            who.add_argument(flag, default=argparse.SUPPRESS, choices=languages)
    added = command("merge", merge, "write an adapter into its 16-bit base")
    for name in ("base", "adapter", "output"):
        added.add_argument(name, type=Path)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    warnings.filterwarnings("ignore", module="peft|transformers")  # what they tell their own developers
    try:
        args.run(args)
    except ChatmagicError as error:
        print(f"\nchatmagic: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nchatmagic: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
