"""The one way in which anything here takes the place of something of others': for a while, and given back; and how it
is told that it may."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes of objects or Python modules, (owner, name, value) each. At the end every owner has again what it
    had itself; an attribute that it had by its class alone is deleted."""
    changes = list(changes)
    before = [(owner, name, name in vars(owner), vars(owner).get(name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, its_own, value in before:
            if its_own:
                setattr(owner, name, value)
            else:
                vars(owner).pop(name, None)


def same_code(function: Callable[..., Any] | None, other: Callable[..., Any]) -> bool:
    """Whether two functions are compiled of the same lines: transformers copies its layers from model to model, and
    some that are called alike compute something else."""
    code, others = getattr(function, "__code__", None), other.__code__
    return code is not None and (code.co_code, code.co_names) == (others.co_code, others.co_names)
