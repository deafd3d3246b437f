"""The course: models, persona and questions, downloads, the thread through the notebooks, and the whole as a script.

What notebooks import from here is loaded on first use, as in `chatmagic` itself.
"""

from importlib import import_module

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
    "before_after": "course.thread",
    "fetch": "course.thread",
    "resume": "course.thread",
    "start": "course.thread",
    "ask": "course.evaluate",
    "known": "course.own",
    "held_out_loss": "course.own",
    "make_own_data": "course.own",
    "used": "course.own",
    "role_play": "course.own",
    "own_replies": "course.replies",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"..{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
