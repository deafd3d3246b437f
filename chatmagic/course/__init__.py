"""The course: models, persona and questions, downloads, the thread through the notebooks, and the whole as a script.

What notebooks import from here is loaded on first use, as in `chatmagic` itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..backends.gguf import open_gguf
    from ..machine import GB, home, report, share_cores, short
    from .check import examine, find_answer
    from .comparison import before_after
    from .evaluate import ask
    from .export import export_model
    from .own import held_out_loss, known, make_own_data, role_play, used
    from .persona import Persona, make_conversations
    from .profile import get_profile, profiles
    from .replies import own_replies
    from .thread import Course, fetch, resume, start

_HOME = {
    "GB": "machine",
    "home": "machine",
    "report": "machine",
    "share_cores": "machine",
    "short": "machine",
    "get_profile": "course.profile",
    "profiles": "course.profile",
    "Persona": "course.persona",
    "make_conversations": "course.persona",
    "Course": "course.thread",
    "before_after": "course.comparison",
    "examine": "course.check",
    "find_answer": "course.check",
    "fetch": "course.thread",
    "resume": "course.thread",
    "start": "course.thread",
    "ask": "course.evaluate",
    "export_model": "course.export",
    "open_gguf": "backends.gguf",
    "known": "course.own",
    "held_out_loss": "course.own",
    "make_own_data": "course.own",
    "used": "course.own",
    "role_play": "course.own",
    "own_replies": "course.replies",
}
__all__ = [
    "Course",
    "GB",
    "Persona",
    "ask",
    "before_after",
    "examine",
    "export_model",
    "fetch",
    "find_answer",
    "get_profile",
    "held_out_loss",
    "home",
    "known",
    "make_conversations",
    "make_own_data",
    "open_gguf",
    "own_replies",
    "profiles",
    "report",
    "resume",
    "role_play",
    "share_cores",
    "short",
    "start",
    "used",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"..{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
