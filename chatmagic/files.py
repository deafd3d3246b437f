"""The one place that writes: every file and folder that the package leaves is whole, or as it was before.

What is made goes under a name of its own beside its place, `.NAME.0123abcd.part`, and takes the place in one step. A
process that was killed leaves such a part; the next write to that folder clears it: its lock went with the process.
"""

import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import ChatmagicError

try:
    import fcntl
except ImportError:  # Windows: what a kill leaves there stays
    fcntl = None  # type: ignore[assignment]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


class WriteError(ChatmagicError):
    """Nothing could be written there; what was there is as it was."""


class BusyError(WriteError):
    """Another process writes there."""


def write(path: str | Path, content: str | bytes | memoryview, hint: str = "") -> None:
    """Let the file be `content`, text in UTF-8; as `writing`."""
    with writing(path, hint) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: str | Path, hint: str = "") -> Iterator[BinaryIO]:
    """A file, open for bytes, that is `path` once the block has ended well: safe on the disk, in the place of what was
    there, with its permissions. A link stays one.

    Raises WriteError, with `hint` for what to do about it, where the disk is full, where there is no such folder, or
    where it or a file in its stead cannot be written; an error of the block's own goes through.
    """
    path = Path(path).expanduser().resolve()
    with in_words(path, hint), _part(path) as part:
        with open(part, "r+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)


def write_together(folder: str | Path, files: dict[str, bytes], hint: str = "") -> None:
    """Files of a folder that belong together. All of them are safe on the disk before the first takes its place; the
    last one, without which the others are nothing, goes before they come and comes after them, so that a kill in
    between leaves no set of which half is older. Raises WriteError as `writing` does."""
    folder, last = Path(folder).expanduser(), [*files][-1]
    make_folder(folder)
    with in_words(folder / last, hint), _part(folder / last, folder=True) as part:
        for name, content in files.items():
            write(part / name, content)
        (folder / last).unlink(missing_ok=True)
        for name in files:
            os.replace(part / name, folder / name)


@contextmanager
def new_folder(folder: str | Path, needed: int = 0, hint: str = "", over: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which is `folder` once the block has ended well and vanishes when it does not.

    `over`: in the place of the folder that is there, which goes. Raises WriteError where something is there already,
    where the disk has less than `needed` bytes, and as `writing` does.
    """
    folder = Path(folder).expanduser().absolute()
    if os.path.lexists(folder) and not over:
        raise WriteError(f"{folder} exists, and nothing is written over it. Name another folder, or: rm -r {folder}")
    make_folder(folder.parent)
    with in_words(folder, hint), _part(folder, folder=True) as part:
        parts = folder.parent.glob(f"{glob.escape(_stem(folder))}*.part")
        if others := [left.name for left in parts if left != part and _held(left)]:
            raise WriteError(
                f"Another process is making {folder}: {others[0]} is what it has so far. Wait for its end, or name "
                "another folder."
            )
        if (free := shutil.disk_usage(part).free) < needed:
            raise WriteError(
                f"{folder} needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free. "
                f"{hint or 'Make room, or name a folder on another disk.'}"
            )
        yield part
        settle(part, folder, over)


def settle(part: Path, folder: Path, over: bool = False) -> None:
    """Let a folder that was filled, or a file, be `folder`, with all in it safe on the disk; `over` as for
    `new_folder`. Raises WriteError as `writing` does."""
    with in_words(folder, ""):
        for file in filter(Path.is_file, (part, *part.rglob("*"))):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if over and folder.exists():
            _exchange(part, folder)
        else:
            os.rename(part, folder)


@contextmanager
def alone_in(folder: str | Path, patience: float = 10.0) -> Iterator[None]:
    """Have the folder, made if it is not there, to oneself among all that ask so; raises BusyError where somebody has
    it for longer than `patience` seconds, in which the helpers of a process that was killed end."""
    folder, until = Path(folder).expanduser(), time.monotonic() + patience
    make_folder(folder)
    with ExitStack() as held:
        while fcntl and not _is_ours(folder, held):
            if time.monotonic() > until:
                raise BusyError(
                    f"Another process writes to {folder.absolute()}, and two would spoil each other's: wait for its "
                    "end, or name another folder. Nothing was changed."
                )
            time.sleep(0.2)
            make_folder(folder)
        yield


def _is_ours(folder: Path, held: ExitStack) -> bool:
    """Whether nobody has the folder of that name now but us, until `held` is closed."""
    with ExitStack() as opened, suppress(FileNotFoundError):  # whoever had it has put it elsewhere
        fd = os.open(folder, os.O_RDONLY)
        opened.callback(os.close, fd)
        try:
            locked = _lock(fd)
        except OSError:  # a disk without locks
            locked = True
        if locked and os.path.samestat(os.fstat(fd), os.stat(folder)):
            held.push(opened.pop_all())
            return True
    return False


def _lock(fd: int) -> bool:
    """Whether the lock of an open file or folder is ours now; an OSError where there are none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_folder(folder: str | Path) -> None:
    """The folder, and those above it, if they are not there. Raises WriteError where that cannot be."""
    folder = Path(folder).expanduser()
    with in_words(folder / "_", ""):
        folder.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """The file or folder, with all in it and in one step, goes, if it is there. Raises WriteError where it cannot."""
    with in_words(path, ""), suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            path = path.rename(_part_name(path))
        _remove(path)


def nearest_existing(folder: Path) -> Path:
    """The folder, or the first of its parents that exists: what a question about its disk must ask."""
    return next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))


@contextmanager
def in_words(path: Path, hint: str) -> Iterator[None]:
    """Say what kept the block, or a library in it, from writing to `path`: raises WriteError, with `hint` for what to
    do about a full disk; an error of another kind goes through."""
    try:
        yield
    except Exception as error:
        # Of something in a folder that is being made: the outermost has the name that was asked for, and the hint.
        inner = isinstance(error, WriteError) and error.__cause__ is not None
        said = _said(error.__cause__ if inner else error, path.absolute(), hint)
        if said is None:
            raise
        raise WriteError(said) from (error.__cause__ if inner else error)


def _said(error: BaseException | None, path: Path, hint: str) -> str | None:
    """What was found and what to type, where it is the disk or the folder of `path` that failed."""
    number = _errno(error)
    folder, found = path.parent, nearest_existing(path.parent)
    mine = str(getattr(error, "filename", None) or path).startswith((str(path), str(folder / _stem(path))))
    if number in FULL:
        free = shutil.disk_usage(found).free / 1e6
        said = f"The disk of {folder} is full: {free:.0f} MB are free, and {path.name} does not fit."
        advice = hint or "Make room there, or name a folder on another disk."
    elif not isinstance(error, OSError):
        return None
    elif not found.is_dir():
        said, advice = f"{found} is a file, where a folder must be.", "Name another, or move it away."
    elif number in CLOSED and (mine or found != folder):
        said = f"{path if found == folder else folder} cannot be written: {found} is closed to you, or read-only."
        advice = "Name another folder, or let its owner open it: chmod u+w"
    elif found != folder:
        said, advice = f"There is no folder {folder}.", f"Make it: mkdir -p {folder}"
    elif path.is_dir() and number in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
        said, advice = f"{path} is a folder that is there already.", f"Name another, or: rm -r {path}"
    else:
        return None
    return f"{said} What was there is as it was. {advice}"


def _errno(error: BaseException | None) -> int | None:
    """What the system answered: Rust's libraries (tokenizers, safetensors) tell it in their text."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(told[1]) if told else None)


def _part_name(path: Path) -> Path:
    return path.with_name(f"{_stem(path)}{secrets.token_hex(4)}.part")


def _stem(path: Path) -> str:
    """How the names of the parts of a path begin; a name has 255 bytes at most."""
    return f".{path.name[:40]}."


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


@contextmanager
def _part(path: Path, folder: bool = False) -> Iterator[Path]:
    """A file or folder of a new name beside `path`, locked, and gone when the block ends unless it was moved."""
    _clear(path.parent)
    part = _part_name(path)
    part.mkdir() if folder else part.touch(exist_ok=False)
    with ExitStack() as held:
        held.callback(_remove, part)
        if fcntl:
            fd = os.open(part, os.O_RDONLY)
            held.callback(os.close, fd)
            with suppress(OSError):  # a disk without locks
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield part


def _held(part: Path) -> bool:
    """Whether somebody is at work on a part."""
    if not fcntl:
        return False
    with suppress(OSError):
        fd = os.open(part, os.O_RDONLY)
        try:
            return not _lock(fd)
        finally:
            os.close(fd)
    return False


def _clear(folder: Path) -> None:
    """Remove the parts in a folder that nobody holds. One younger than a second may be about to be locked."""
    for left in folder.iterdir() if fcntl else ():
        with suppress(OSError):
            if re.fullmatch(r"\..+\.[0-9a-f]{8}\.part", left.name) and time.time() - left.stat().st_mtime > 1:
                fd = os.open(left, os.O_RDONLY)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(left)
                finally:
                    os.close(fd)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change places: in one step, where the system has one."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux's renameat2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None or rename(here, os.fsencode(one), here, os.fsencode(other), exchange):
        remove(other)
        os.rename(one, other)
