"""Every writer of the package, on a disk that fills up, that nobody may write to, and under a kill: what was there is
whole, as it was or as it should become, and nothing else lies there afterwards."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from chatmagic.errors import ChatmagicError
from chatmagic.files import BusyError, WriteError, alone_in, new_folder, remove, settle, write, write_together, writing
from disk import contents, small_disk
from quick import first
from writers import COVERED, NEW, WRITERS

ROOT = os.geteuid() == 0
PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")
RESUMED = re.compile(r"(^|/)\.[^/]+\.download/")  # what a broken-off download keeps for the next
CONFIG = "adapter_config.json"
# An adapter that is being written over is none, and a notebook that runs again has no executed copy, until it is there.
MAY_GO = {CONFIG, "00.ipynb", "01.ipynb"}
MAY_BE = {"own.jsonl"}  # what was read of the reader's file, until the course's data are made of it
KILLS = int(os.environ.get("CHATMAGIC_KILLS", 3))  # of each writer; once in a while: CHATMAGIC_KILLS=20


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, where root may mount one; else a folder."""
    where = Path(tempfile.mkdtemp())
    where.chmod(0o755)
    with small_disk(where, "4m"):
        yield where
    where.chmod(0o755)
    subprocess.run(["rm", "-r", where], check=True)


@pytest.fixture(params=first(6, WRITERS))
def act(request, tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    made = WRITERS[request.param](tmp_path / "source", monkeypatch)
    made.new = request.param in NEW
    return made


def left_in(folder: Path) -> dict[str, bytes]:
    """What is in a folder but for what the next call goes on with."""
    return {name: content for name, content in contents(folder).items() if not RESUMED.search(name)}


def before_and_after(act, where: Path, tmp_path: Path) -> tuple[dict, dict]:
    """What is in `where` before the writer's second version is written, which it leaves there, and after."""
    where.mkdir(exist_ok=True)
    (tmp_path / "after").mkdir()
    if not act.new:
        act(where, 1)
        act(tmp_path / "after", 1)
    before = left_in(where)
    act(tmp_path / "after", 2)
    return before, left_in(tmp_path / "after")


def assert_whole(found: dict, before: dict, after: dict, new: bool) -> None:
    """Each file is as it was or as it becomes; a new folder is there with all in it or not at all."""
    if new:
        assert found.keys() in (before.keys(), after.keys())
    for name in found.keys() | before.keys():
        lost = Path(name).name in (MAY_BE if name in found else MAY_GO)
        assert lost or found.get(name) in (before.get(name), after.get(name, before.get(name))), name
    if CONFIG in {Path(name).name for name in found}:
        assert any(all(found.get(name) == one.get(name) for name in found) for one in (before, after))


@contextmanager
def free(where: Path, size: int):
    """So many bytes are free there and no more; where there is no disk of its own, so many in a file."""
    if os.path.ismount(where):
        with open(where / "filler", "wb") as filler, suppress(OSError):
            os.posix_fallocate(filler.fileno(), 0, os.statvfs(where).f_bavail * 4096 - size)
        yield
        (where / "filler").unlink()
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 8192])
def test_a_full_disk(act, disk, tmp_path, size):
    before, after = before_and_after(act, disk, tmp_path)
    with free(disk, size):
        try:
            act(disk, 2)
        except WriteError as error:
            assert re.search(rf"{disk}.* (is full: \d+ MB are free, and|needs \S+ GB).* [Mm]ake room", str(error))
        else:
            assert size, "nothing fits on a disk without a byte"
    found = left_in(disk)
    assert not [name for name in found if PART.search(name)]
    assert_whole(found, before, after, act.new)
    act(disk, 2)
    assert_same(left_in(disk), after)


def assert_same(found: dict, after: dict) -> None:
    """But for what holds the path of its folder, or the time."""
    assert found.keys() == after.keys()
    assert [name for name in found if found[name] != after[name]] in ([], ["lora/adapter_config.json"])


def test_a_folder_that_is_closed(act, disk, tmp_path):
    before, _ = before_and_after(act, disk, tmp_path)
    if os.path.ismount(disk):
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    else:
        for folder, _, _ in os.walk(disk):
            Path(folder).chmod(0o555)
    with pytest.raises(
        WriteError, match=rf"{disk}.* cannot be written: {disk}.* is closed to you, or read-only"
    ) as told:
        act(disk, 2)
    assert "chmod" in str(told.value) and "room" not in str(told.value)  # which would be for a full one
    assert left_in(disk) == before


def events(where: Path, fatal: int) -> list[str]:
    """Kill this process at the `fatal`-th time that it touches what lies below `where`; the list grows with each."""
    seen = []

    def hook(event: str, args: tuple) -> None:
        touches = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "open") and args
        if touches and isinstance(args[0], (str, bytes, os.PathLike)) and str(args[0]).startswith(str(where)):
            seen.append(event)
            if len(seen) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def in_a_child(run) -> int:
    """The exit status of a fork of this process that runs this; minus the signal that ended it."""
    if not (child := os.fork()):
        status = 99
        try:
            status = run() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill(act, tmp_path):
    before, after = before_and_after(act, tmp_path / "before", tmp_path)
    copies = [tmp_path / f"copy{number}" for number in range(KILLS + 1)]
    for copy in copies:
        shutil.copytree(tmp_path / "before", copy)

    def counted() -> int:
        seen = events(copies[-1], 0)
        act(copies[-1], 2)
        return min(len(seen), 90)

    total = in_a_child(counted)
    assert 4 <= total <= 90
    for number, copy in enumerate(copies[:-1]):

        def killed(where=copy, fatal=1 + (2 * number + 1) * total // (2 * KILLS)) -> None:
            events(where, fatal)
            act(where, 2)

        assert in_a_child(killed) == -signal.SIGKILL
        found = {name: content for name, content in left_in(copy).items() if not PART.search(name)}
        assert_whole(found, before, after, act.new)
        for part in copy.rglob(".*.part"):
            os.utime(part, (time.time() - 60,) * 2)
        if not (act.new and found):
            act(copy, 2)
            assert_same(left_in(copy), after)


# --- the helper itself


def test_what_stands_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").touch()
    for path, said in {
        "file/x": f"{tmp_path}/file is a file, where a folder must be.*move it away",
        "none/x": f"There is no folder {tmp_path}/none.*mkdir -p {tmp_path}/none",
        "folder": f"{tmp_path}/folder is a folder that is there already.*rm -r",
    }.items():
        with pytest.raises(WriteError, match=said):
            write(tmp_path / path, "new")
    with pytest.raises(WriteError, match="is a file, where a folder must be"), new_folder(tmp_path / "file/x"):
        pass
    with pytest.raises(WriteError, match="exists, and nothing is written over it"), new_folder(tmp_path / "folder"):
        pass
    assert left_in(tmp_path) == {"file": b"mine", "folder/mine": b""}


@pytest.mark.skipif(not ROOT, reason="becoming somebody else wants root")
def test_a_folder_of_somebody_else(disk):
    write(disk / "file", "mine")
    os.seteuid(65534)
    try:
        for attempt in (lambda: write(disk / "file", "new"), lambda: remove(disk / "file")):
            with pytest.raises(WriteError, match=f"{disk}/file cannot be written: {disk} is closed to you"):
                attempt()
        with pytest.raises(WriteError, match=f"{disk}/a cannot be written: {disk} is closed"), new_folder(disk / "a/b"):
            pass
    finally:
        os.seteuid(0)
    assert left_in(disk) == {"file": b"mine"}


def test_a_link_stays_one_and_permissions_stay(tmp_path):
    write(tmp_path / "file", "1")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    write(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "2"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_an_error_of_the_writers_own_goes_through(tmp_path):
    write(tmp_path / "file", "before")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "file") as file:
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "folder") as part:
        (part / "x").touch()
        open(tmp_path / "other")
    with pytest.raises(ChatmagicError, match="another"), new_folder(tmp_path / "folder"):
        raise ChatmagicError("another")
    assert left_in(tmp_path) == {"file": b"before"} and [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_a_folder_in_the_place_of_another(tmp_path, monkeypatch):
    for _system in range(2):
        for content in ("old", "new"):
            with new_folder(tmp_path / "folder", over=True) as part:
                write(part / content, content)
        assert left_in(tmp_path) == {"folder/new": b"new"}
        monkeypatch.setattr("ctypes.CDLL", lambda name: None)  # a system that cannot


def test_who_waits_for_a_folder_gets_the_one_that_has_its_name_by_then(tmp_path):
    """Whoever had it may have put it elsewhere, as a download does that has ended, or removed it."""

    def waits():
        with alone_in(tmp_path / "folder"):
            (tmp_path / "folder" / "mine").touch()

    waiting = threading.Thread(target=waits)
    with alone_in(tmp_path / "folder"):
        with pytest.raises(BusyError, match="Another process writes to"), alone_in(tmp_path / "folder", patience=0):
            pass
        waiting.start()
        time.sleep(0.5)
        (tmp_path / "folder").rename(tmp_path / "elsewhere")
    waiting.join()
    assert left_in(tmp_path) == {"folder/mine": b""}


def test_what_settles_is_safe_on_the_disk(tmp_path, monkeypatch):
    """A folder with all in it, and a file alone."""
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd)))
    (tmp_path / "part").mkdir()
    for path in (tmp_path / "part" / "file", tmp_path / "alone"):
        path.write_text(path.name)
    settle(tmp_path / "part", tmp_path / "folder")
    settle(tmp_path / "alone", tmp_path / "folder" / "other")
    assert left_in(tmp_path) == {"folder/file": b"file", "folder/other": b"alone"}
    assert synced == [(tmp_path / "folder" / name).stat().st_ino for name in ("file", "other")]


def test_a_part_that_is_being_written_is_not_cleared(tmp_path):
    with writing(tmp_path / "first") as file, new_folder(tmp_path / "folder") as part:
        file.write(b"1")
        for path in (file.name, part):
            os.utime(path, (0, 0))
        write_together(tmp_path, {"second": b"2", "third": b"3"})
    (tmp_path / ".first.0123abcd.part").write_text("of a process that was killed")
    os.utime(tmp_path / ".first.0123abcd.part", (0, 0))
    (tmp_path / ".mine.part").write_text("no part of ours")
    write(tmp_path / "fourth", "4")
    assert left_in(tmp_path) == {
        "first": b"1", "second": b"2", "third": b"3", "fourth": b"4", ".mine.part": b"no part of ours",
    }  # fmt: skip


def test_every_module_that_writes_is_walked():
    package = Path(__file__).resolve().parents[1] / "chatmagic"
    writes = re.compile(
        r"^from \.+files import (?:\([^)]*|.*)\b(new_folder|write|write_together|writing)\b", re.MULTILINE
    )
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if writes.search(path.read_text("utf-8"))}
    assert found <= COVERED, "add what they write to tests/helpers/writers.py"
