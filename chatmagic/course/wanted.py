"""Which model somebody wants, by the name of its profile or its hub id, and where it lies on this machine. Nothing is
asked of a network here."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from ..errors import ChatmagicError
from ..machine import home
from ..models.checkpoint import is_whole
from .hubs import HUBS, Hub
from .profile import Profile, get_profile, profiles


class DownloadError(ChatmagicError):
    """The model is not here and could not be fetched."""


class Wanted(NamedTuple):
    """A model that somebody asks for: which, where it is or will be, and at which revision if one was named."""

    profile: Profile | None
    id: str
    huggingface: str
    folder: Path
    asked: str | None

    @property
    def name(self) -> str:
        """As somebody asks for it."""
        return self.profile.name if self.profile else self.id

    def revision(self, hub: Hub) -> str:
        """The one that was asked for; else the profile's, which is ModelScope's; else the hub's own default."""
        pinned = self.profile.revision if self.profile and hub.name == "modelscope" else hub.default
        return self.asked or pinned

    def id_at(self, hub: Hub) -> str:
        """What the hub calls it."""
        return self.huggingface if hub.name == "huggingface" else self.id


def find(model: str, cache_dir: str | Path | None = None, revision: str | None = None) -> Wanted:
    """What these arguments of `snapshot_download` mean. Raises ProfileError, with the nearest name, for a name that is
    none, and DownloadError for a revision of what is one file with one checksum."""
    root = Path(cache_dir).expanduser().resolve() if cache_dir else home()
    known = next((p for p in profiles().values() if model in (p.name, p.id, p.huggingface)), None)
    if known is None and "/" not in model:
        known = get_profile(model)  # raises, with the nearest name
    if known and known.sha256 and revision not in (None, known.revision, known.sha256):
        raise DownloadError(
            f"{known.name} is one file, the same everywhere, known by its checksum: there is no {revision!r} of it. "
            "Leave the revision out."
        )
    own = revision is None or known is not None and revision in (known.revision, known.sha256)
    folder = root / ((known.name if known else model) + ("" if own else f"@{quote(str(revision), safe='')}"))
    id, huggingface = (known.id, known.huggingface or known.id) if known else (model, model)
    return Wanted(known, id, huggingface, folder, None if known and known.sha256 else revision)


def local(wanted: Wanted, caches: bool = True) -> Path | None:
    """Where the model lies whole on this machine: in its folder, or, with `caches`, where a hub's client put it."""
    places = [wanted.folder]
    if caches and not (wanted.profile and wanted.profile.sha256):
        places += _in_caches(wanted)
    return next(filter(is_whole, places), None)


def _in_caches(wanted: Wanted) -> Iterator[Path]:
    """The folders where the clients of the hubs keep this revision."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    modelscope, huggingface = HUBS
    base = Path(os.environ.get("MODELSCOPE_CACHE") or cache / "modelscope")
    revision, (owner, _, name) = wanted.revision(modelscope), wanted.id.partition("/")
    yield base / "models" / f"{owner}--{name}" / "snapshots" / revision
    if revision == modelscope.default:  # before 1.38 the client kept one revision, and not which
        yield from (base / part / "models" / owner / name.replace(".", "___") for part in ("", "hub"))
    base = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or cache / "huggingface") / "hub")
    repository, revision = base / f"models--{wanted.huggingface.replace('/', '--')}", wanted.revision(huggingface)
    with suppress(OSError):
        yield repository / "snapshots" / (repository / "refs" / revision).read_text().strip()
    yield repository / "snapshots" / revision
