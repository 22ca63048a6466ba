"""The kinds of bank. Each is a module here with functions ``load`` and ``directions``; nothing else knows its name."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from concepts.codec import Codec
from concepts.errors import CorruptData

if TYPE_CHECKING:
    from concepts.bank import Bank


def load_codec(kind: str, tensors: Mapping[str, Tensor], concept_classes: Sequence[int | None]) -> Codec:
    """Rebuild a bank's codec from what the bank stores.

    Parameters
    ----------
    kind
        ``nmf``, ``sae``, ``contrast`` or ``subspace``.
    tensors
        The bank's tensors by name.
    concept_classes
        For each concept the class that it belongs to, or None.

    Raises
    ------
    CorruptData
        If this version does not know the kind, or a tensor is missing or has the wrong shape.
    """
    codec: Codec = _module(kind).load(tensors, concept_classes)
    return codec


def check(bank: Bank) -> None:
    """Check that a bank holds what its kind needs: what ``check`` of its module says, or that its codec can be rebuilt.

    Raises
    ------
    CorruptData
        If it does not.
    """
    own = getattr(_module(bank.kind), "check", None)
    if own is None:
        bank.codec()
    else:
        own(bank)


def concept_codec(bank: Bank) -> Codec | None:
    """Return what codes a bank's concepts one by one: ``concept_codec`` of its module, or its codec.

    What stands for their class there, where codes depend on one, is the codec's own matter: it may be any of its
    ``classes``. None where the bank has no concepts.
    """
    own = getattr(_module(bank.kind), "concept_codec", None)
    if own is None:
        return bank.codec() if bank.concepts else None
    codec: Codec | None = own(bank)
    return codec


def directions(bank: Bank) -> Tensor:
    """Return what the components of a bank's concepts point along: float32 ``[K, C]``, of any length."""
    found: Tensor = _module(bank.kind).directions(bank.tensors, bank.channels)
    return found.float()


def _module(kind: str) -> ModuleType:
    if not re.fullmatch("[a-z]+", kind) or importlib.util.find_spec(f"{__name__}.{kind}") is None:
        raise CorruptData(f"this version cannot read banks of kind {kind!r}", kind=kind)
    return importlib.import_module(f"{__name__}.{kind}")
