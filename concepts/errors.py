"""Every failure a caller can meet, in one tree.

::

    WhenceError
    ├── InvalidInput               what the caller sent cannot be used
    │   ├── InvalidImage
    │   ├── UnknownClass
    │   └── UnsupportedOption      valid in itself, but not for this bank or model
    ├── NotFound
    │   ├── UnknownModel
    │   ├── UnknownBank
    │   ├── UnknownLayer
    │   └── UnknownConcept
    ├── InvalidCut                 the layer cannot be cut out of the model
    ├── InvalidModel               the model cannot be built, or is not a classifier
    ├── NotTrainable               these activations cannot make such a bank
    ├── CorruptData                a stored file is not what was written
    ├── WeightsMismatch            the bank was trained on other weights
    ├── AlreadyExists
    ├── NumericalFailure           the model answered with NaN or infinity
    ├── Overloaded                 try again after ``retry_after_s``
    ├── Unavailable                starting or stopping; try again after ``retry_after_s``
    └── DeadlineExceeded

Errors of the domain know nothing of transport: ``service.errors`` maps each class to a gRPC code in one table, and a
test proves that none is left out.
"""

from __future__ import annotations

from typing import ClassVar


class WhenceError(Exception):
    """Root of all failures that are somebody's to mend.

    Parameters
    ----------
    message
        One sentence or two that say what is wrong and what to do about it. It reaches callers: no paths, addresses or
        internals.
    **metadata
        Facts for programs, e.g. ``bank="m/l/n"``; values are turned into text.

    Attributes
    ----------
    reason : str
        Upper snake case name of the class of failure, stable across versions.
    """

    reason: ClassVar[str] = "ERROR"

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries; the default would lose the keyword arguments.
        return (_rebuild, (type(self), self.__dict__))


def _rebuild(cls: type[WhenceError], state: dict[str, object]) -> WhenceError:
    error = cls.__new__(cls)
    error.__dict__.update(state)
    error.args = (state["message"],)
    return error


class InvalidInput(WhenceError):
    reason = "INVALID_INPUT"


class InvalidImage(InvalidInput):
    reason = "INVALID_IMAGE"


class UnknownClass(InvalidInput):
    reason = "UNKNOWN_CLASS"


class UnsupportedOption(InvalidInput):
    reason = "UNSUPPORTED_OPTION"


class NotFound(WhenceError):
    reason = "NOT_FOUND"


class UnknownModel(NotFound):
    reason = "UNKNOWN_MODEL"


class UnknownBank(NotFound):
    reason = "UNKNOWN_BANK"


class UnknownLayer(NotFound):
    reason = "UNKNOWN_LAYER"


class UnknownConcept(NotFound):
    reason = "UNKNOWN_CONCEPT"


class InvalidCut(WhenceError):
    reason = "INVALID_CUT"


class InvalidModel(WhenceError):
    reason = "INVALID_MODEL"


class NotTrainable(WhenceError):
    reason = "NOT_TRAINABLE"


class CorruptData(WhenceError):
    reason = "CORRUPT_DATA"


class WeightsMismatch(WhenceError):
    reason = "WEIGHTS_MISMATCH"


class AlreadyExists(WhenceError):
    reason = "ALREADY_EXISTS"


class NumericalFailure(WhenceError):
    reason = "NUMERICAL_FAILURE"


class Overloaded(WhenceError):
    reason = "OVERLOADED"

    def __init__(self, message: str, *, retry_after_s: float, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after_s = retry_after_s


class Unavailable(WhenceError):
    reason = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_after_s: float, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(WhenceError):
    reason = "DEADLINE_EXCEEDED"
