"""`chatmagic doctor | download | tutorial | train | merge`: the course without a browser."""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unicodedata import east_asian_width

from .errors import ChatmagicError


def doctor(args) -> None:
    from .download import home
    from .machine import report
    from .profiles import check_machine, get_profile

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
                    notebook, kernel_name="python3", resources=where, config=config, coalesce_streams=True
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

    from .course import resume

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


def train(args) -> None:
    import runpy

    sys.argv = ["chatmagic.train", *args.arguments]
    runpy.run_module("chatmagic.train", run_name="__main__")


def merge(args) -> None:
    from .merge import merge_adapter

    print(merge_adapter(args.base, args.adapter, args.output))


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
    added = command("train", train, "the notebooks' run as a script: chatmagic train PROFILE; --help after it says more")
    added.add_argument("arguments", nargs=argparse.REMAINDER)
    added = command("merge", merge, "write an adapter into its 16-bit base")
    for name in ("base", "adapter", "output"):
        added.add_argument(name, type=Path)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except ChatmagicError as error:
        print(f"\nchatmagic: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
