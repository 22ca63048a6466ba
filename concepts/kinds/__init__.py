"""The kinds of bank. Each kind is one module here that ends with a ``load`` function; nothing else knows it by name."""

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


def _module(kind: str) -> ModuleType:
    if not re.fullmatch("[a-z]+", kind) or importlib.util.find_spec(f"{__name__}.{kind}") is None:
        raise CorruptData(f"this version cannot read banks of kind {kind!r}", kind=kind)
    return importlib.import_module(f"{__name__}.{kind}")
