"""The two hubs, each through its own client: what a model consists of there, one file of it, and a folder put there.

What a client does badly is done here: huggingface_hub keeps no half of a file for the next process (its 2.x names each
after a number of its own), and neither tries again where a server that has answered fails once.
"""

import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from ..files import FULL, WriteError

T = TypeVar("T")
PATIENCE = 5  # seconds that a hub may take to answer at all
TRIES = 3  # in a row, in which not a byte comes
LONGEST_PAUSE = 120  # seconds that a server may ask to wait
REFUSED = {400, 401, 403, 404, 410, 416, 451}  # asking again would be answered the same


class Remote(NamedTuple):
    """A file as a hub lists it: its bytes, and its SHA-256 or, for small files on Hugging Face, git's SHA-1."""

    bytes: int
    digest: str

    @property
    def sha256(self) -> str:
        """The first of the two; "" where the hub does not say it."""
        return self.digest if len(self.digest) == 64 else ""

    def differs(self, file: Path) -> str:
        """In what the file is another; "" if it is this one. One without a digest is known by its size alone."""
        if not file.is_file():
            return "is missing"
        size = file.stat().st_size
        if size != self.bytes:
            return f"has {size:,} bytes, not {self.bytes:,}"
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % size)
        with file.open("rb") as stream:
            while self.digest and (block := stream.read(2**20)):
                digest.update(block)
        found = digest.hexdigest()
        same = found == self.digest or not self.digest
        return "" if same else f"has the checksum {found[:12]}..., not {self.digest[:12]}..."


class Listing(NamedTuple):
    """What a revision consists of; the commit that it names, "" where the hub does not say."""

    commit: str
    files: dict[str, Remote]


class Hub(Protocol):
    """One of the two."""

    name: str
    default: str  # revision
    login: str  # what to type

    def address(self) -> str:
        """Where its client asks: its mirror, where one is set."""

    def listing(self, id: str, revision: str) -> Listing:
        """The files of a model at a revision."""

    def fetch(self, id: str, revision: str, name: str, remote: Remote, folder: Path) -> None:
        """Bring `folder`/`name`, going on with the part of it that is there."""

    def push(self, id: str, folder: Path) -> str:
        """Put all that is in the folder into the model of that id, which is made, private, if it is not there; returns
        its address. Whoever is logged in by the client's own command does it."""


class ModelScope:
    """Through modelscope_hub, which goes on with a part itself."""

    name, default, login = "modelscope", "master", "modelscope login"

    def address(self) -> str:
        """As for Hub."""
        named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        return named if "://" in named else f"https://{named}"

    def listing(self, id: str, revision: str) -> Listing:
        """As for Hub."""
        from modelscope_hub import HubApi

        files = HubApi().list_repo_files(id, "model", revision=revision)
        return Listing("", {each.path: Remote(each.size, each.sha256 or "") for each in files if each.type != "tree"})

    def fetch(self, id: str, revision: str, name: str, remote: Remote, folder: Path) -> None:
        """As for Hub."""
        from modelscope_hub import HubApi

        with _without_bars():
            HubApi().download_file(
                id,
                "model",
                name,
                revision=revision,
                local_dir=folder,
                cache_dir=folder / ".modelscope",  # for its locks
                file_size=remote.bytes,
            )

    def push(self, id: str, folder: Path) -> str:
        """As for Hub."""
        from modelscope_hub import HubApi

        api = HubApi()
        if not api.repo_exists(id, "model"):
            api.create_repo(id, "model", visibility="private")
        api.upload_folder(id, "model", folder)
        return f"{self.address()}/models/{id}"


class HuggingFace:
    """Through huggingface_hub: its listing, and its transfer of one file, which can begin in the middle."""

    name, default, login = "huggingface", "main", "hf auth login"

    def address(self) -> str:
        """As for Hub."""
        from huggingface_hub import constants

        return str(constants.ENDPOINT)

    def listing(self, id: str, revision: str) -> Listing:
        """As for Hub."""
        from huggingface_hub import HfApi

        found = HfApi().model_info(id, revision=revision, files_metadata=True)
        files = {
            each.rfilename: Remote(each.size or 0, each.lfs.sha256 if each.lfs else each.blob_id or "")
            for each in found.siblings or []
        }
        return Listing(found.sha or "", files)

    def fetch(self, id: str, revision: str, name: str, remote: Remote, folder: Path) -> None:
        """As for Hub."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars, enable_progress_bars

        with (folder / name).open("ab") as file:
            if file.tell() >= remote.bytes:  # of another file
                file.truncate(0)
                file.seek(0)
            disable_progress_bars()
            try:
                url = hf_hub_url(id, name, revision=revision)
                http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=remote.bytes)
            finally:
                enable_progress_bars()

    def push(self, id: str, folder: Path) -> str:
        """As for Hub."""
        from huggingface_hub import HfApi

        api = HfApi()
        address = api.create_repo(id, private=True, exist_ok=True)
        api.upload_folder(repo_id=id, folder_path=folder)
        return str(address)


HUBS: tuple[Hub, ...] = (ModelScope(), HuggingFace())


@contextmanager
def _without_bars() -> Iterator[None]:
    """modelscope_hub draws one a file and has no switch: ours is over all files."""
    from modelscope_hub import _download

    drawn = _download.tqdm
    _download.tqdm = lambda **options: drawn(**options | {"disable": True})
    try:
        yield
    finally:
        _download.tqdm = drawn


def persist(work: Callable[[], T], fetched: Callable[[], int] = lambda: 0, tries: int = TRIES) -> T:
    """What `work` returns, done again after an error that may pass, as long as more bytes come: so many tries in a row
    without one are the end. `fetched` counts them. A server that says when to come back is listened to."""
    vain = 0
    while True:
        before = fetched()
        try:
            return work()
        except Exception as error:  # both clients raise their HTTP library's, their own and OSError
            vain = 0 if fetched() > before else vain + 1
            pause = _asked_to_wait(error) or 2.0**vain / 2
            if vain >= tries or _is_final(error) or pause > LONGEST_PAUSE:
                raise
        time.sleep(pause)


def _is_final(error: Exception) -> bool:
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    return status in REFUSED or isinstance(error, WriteError) or getattr(error, "errno", None) in FULL


def _asked_to_wait(error: Exception) -> float:
    """The seconds of a Retry-After; 0 without one."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    said = getattr(error, "retry_after", None) or headers.get("Retry-After") or 0
    return float(said) if str(said).replace(".", "", 1).isdigit() else 0


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


def route(address: str) -> str:
    """The address, and the proxy on the way to it, as they may be shown: without user and password."""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(address, get_environ_proxies(address))
    return without_password(address) + (f" through the proxy {without_password(proxy)}" if proxy else "")


def without_password(text: str) -> str:
    """An address, or a text with addresses in it, with what stands before an @ of theirs left out."""
    return re.sub(r"(^|//)[^/\s]+@", r"\1", text)
