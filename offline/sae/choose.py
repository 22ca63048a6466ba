"""Which latents of a vector are active: the only dense product of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from offline.sae.settings import SaeSettings
from offline.sae.sparse import Pairs, make_pairs

_ENTRIES_AT_ONCE = {"cpu": 2**23}
"""Pre-activations computed before the best of them are taken: on a CPU they should not leave its cache."""
_ENTRIES_AT_ONCE_ELSE = 2**28

_MARGIN = 2**-7
"""By how much lower than a threshold bfloat16 may put what is above it."""


class Choice(NamedTuple):
    """Pairs of a vector and a latent whose exact pre-activations matter."""

    pairs: Pairs
    dead_pairs: Pairs | None
    """The best dead latents of each vector, numbered within the dead."""
    dead_values: Tensor | None
    """Their pre-activations, in the order of ``dead_pairs``."""


def encoder_dtype(settings: SaeSettings, device: torch.device) -> torch.dtype:
    """Return the type that latents are chosen in on a device."""
    if settings.encoder_dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.encoder_dtype]
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.no_grad()
def choose(
    vectors: Tensor, parameters: Mapping[str, Tensor], settings: SaeSettings, dead: Tensor, dtype: torch.dtype
) -> Choice:
    """Choose the pairs of a batch, and those of the dead latents that are to learn.

    Parameters
    ----------
    vectors
        ``[n, C]``, the decoder's bias already subtracted.
    parameters
        ``encoder [K, C]``, and ``encoder_bias [K]`` and ``log_threshold [K]`` where there are such.
    settings
        Of the dictionary.
    dead
        int64, ascending: the dead latents.
    dtype
        Of the encoder's product. Latents whose pre-activations differ by less than its precision may be taken for one
        another; no value is kept in it.
    """
    encoder = parameters["encoder"].to(dtype).T
    bias = parameters["encoder_bias"].to(dtype) if "encoder_bias" in parameters else None
    n, latents = len(vectors), encoder.shape[1]
    chooser = _chooser(parameters, settings, n, dtype)
    ranking = _TopK(min(settings.auxk, len(dead))) if len(dead) and settings.auxk_coefficient else None
    at_once = max(_ENTRIES_AT_ONCE.get(vectors.device.type, _ENTRIES_AT_ONCE_ELSE) // latents, 1)
    for first in range(0, n, at_once):
        part = vectors[first : first + at_once].to(dtype)
        pre = part @ encoder if bias is None else torch.addmm(bias, part, encoder)
        chooser.add(pre, first)
        if ranking is not None:
            ranking.add(pre[:, dead], first)
    pairs = make_pairs(*chooser.result(vectors.device)[:2], (n, latents), vectors.dtype)
    if ranking is None:
        return Choice(pairs, None, None)
    rows, ranked, values = ranking.result(vectors.device)
    return Choice(pairs, make_pairs(rows, ranked, (n, len(dead)), dtype), values.to(vectors.dtype))


class _Chooser(Protocol):
    """Sees the pre-activations of a batch part by part."""

    def add(self, pre: Tensor, first: int) -> None:
        """Take note of pre-activations ``[m, K]`` of the vectors from ``first`` on."""

    def result(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return vector, latent and pre-activation of each pair, ascending by vector."""


def _chooser(parameters: Mapping[str, Tensor], settings: SaeSettings, vectors: int, dtype: torch.dtype) -> _Chooser:
    if settings.variant == "topk":
        return _TopK(settings.k)
    if settings.variant == "batchtopk":
        return _BatchTopK(vectors * settings.k)
    floor = parameters["log_threshold"].exp() - settings.bandwidth / 2
    if dtype == torch.bfloat16:
        floor = floor - floor.abs() * _MARGIN
    return _Above(floor)


class _Collected:
    """Pairs gathered part by part."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def result(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if not self._parts:
            none = torch.empty(0, dtype=torch.int64, device=device)
            return none, none, none.float()
        rows, latents, values = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        return rows, latents, values


class _TopK(_Collected):
    """The k largest of every vector."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self._k = k

    def add(self, pre: Tensor, first: int) -> None:
        values, latents = pre.topk(self._k, dim=1, sorted=False)
        rows = torch.arange(first, first + len(pre), device=pre.device).repeat_interleave(self._k)
        self._parts.append((rows, latents.flatten(), values.flatten()))


class _Above(_Collected):
    """All above a floor of each latent."""

    def __init__(self, floor: Tensor) -> None:
        super().__init__()
        self._floor = floor

    def add(self, pre: Tensor, first: int) -> None:
        rows, latents = (pre > self._floor).nonzero(as_tuple=True)
        self._parts.append((rows + first, latents, pre[rows, latents]))


class _BatchTopK(_Collected):
    """The largest of a whole batch, however many a vector; none that a ReLU makes zero."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self._kept = kept
        self._floor: Tensor | float = 0.0

    def add(self, pre: Tensor, first: int) -> None:
        rows, latents = (pre > self._floor).nonzero(as_tuple=True)
        self._parts.append((rows + first, latents, pre[rows, latents]))
        rows, latents, values = self.result(pre.device)
        if len(values) > self._kept:
            best = values.topk(self._kept, sorted=False).indices.sort().values
            rows, latents, values = rows[best], latents[best], values[best]
            # Nothing below can be among the largest any more, whatever follows.
            self._floor = values.min()
        self._parts = [(rows, latents, values)]
