"""The error tree: drawn as it is, told apart by reasons, and whole after a trip between processes."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from concepts import errors
from concepts.errors import Overloaded, UnknownBank, WhenceError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, WhenceError)]


def drawn() -> dict[str, str | None]:
    """Return each class in the module's drawing with its parent."""
    parents: dict[str, str | None] = {"WhenceError": None}
    path: list[str] = ["WhenceError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ((?:│   )*)(?:├──|└──) (\w+)", line)
        if match:
            depth = len(match[1]) // 4 + 1
            parents[match[2]] = path[depth - 1]
            path[depth:] = [match[2]]
    return parents


def test_the_drawing_is_the_tree() -> None:
    assert drawn() == {c.__name__: None if c is WhenceError else c.__bases__[0].__name__ for c in CLASSES}


def test_reasons_are_upper_snake_case_and_unique() -> None:
    reasons = [c.reason for c in CLASSES]
    assert len(set(reasons)) == len(reasons)
    assert all(re.fullmatch("[A-Z]+(_[A-Z]+)*", reason) for reason in reasons)
    assert all("reason" in vars(c) for c in CLASSES)


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda c: c.__name__)
def test_errors_survive_pickling(error_class: type[WhenceError]) -> None:
    extra = {"retry_after_s": 1.5} if hasattr(error_class("x", retry_after_s=0.0), "retry_after_s") else {}
    error = error_class("Something is wrong; mend it.", bank="m/l/n", count=3, **extra)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is error_class
    assert str(again) == again.message == "Something is wrong; mend it."
    assert again.metadata == {"bank": "m/l/n", "count": "3"}
    assert again.reason == error_class.reason
    assert vars(again) == vars(error)


def test_errors_can_be_raised_and_caught_by_their_family() -> None:
    with pytest.raises(errors.NotFound, match="no bank"):
        raise UnknownBank("there is no bank", bank="x")
    assert Overloaded("busy", retry_after_s=2.0).retry_after_s == 2.0
