"""The head on many mixtures of a few activations: what is affine in it need not run once for each mixture.

``h = back ∘ middle ∘ front``. An affine front (pooling, a first linear layer, taking the class token) answers to the
activations that are mixed, and its answers are mixed: ``front(Σ m_k a_k) = front(0) + Σ m_k (front(a_k) − front(0))``.
An affine back (a last linear layer) is one product where one logit is wanted. Only the middle runs for each mixture.
"""

from __future__ import annotations

from itertools import takewhile
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from concepts.cut import RELATIVE_TOLERANCE, Cut, cuts_after
from concepts.errors import InvalidCut


class _Parts(NamedTuple):
    """Where a head comes apart; these cuts hold the model, but not the cut they are parts of."""

    read: Tensor | None
    """The only positions that the logits depend on, int64; None: all."""
    front: Cut | None
    """At the last layer that is affine in the activation; None: there is none."""
    back: Cut | None
    """At the first layer after the front in which the logits are affine; None: there is none."""


_KNOWN: WeakKeyDictionary[Cut, _Parts] = WeakKeyDictionary()
"""Found once for each cut, by asking its head."""


class MixtureHead:
    """A cut's head in parts; the whole head where it has none. See ``mixture_head``.

    What the front answers, *values*, may be mixed with weights that add up to one. Activations and values are rows of
    channels, as ``Cut.positions`` gives them.
    """

    def __init__(self, cut: Cut, parts: _Parts) -> None:
        self._cut = cut
        self._read, self._front, self._back = parts
        self._rest = self._front or cut

    def front(self, positions: Tensor) -> Tensor:
        """Return the values of activations: ``[N, P, C]`` to ``[N, P', C']``."""
        if self._read is not None:
            positions = positions[:, self._read]
        if self._front is None:
            return positions
        return self._front.positions(self._cut.head_until(self._cut.unpositions(positions), self._front.layer))

    def logits(self, values: Tensor) -> Tensor:
        """Return the logits, ``[N, n_classes]``, of values."""
        return self._rest.head(self._rest.unpositions(values))

    def target_logits(self, values: Tensor, targets: Tensor) -> Tensor:
        """Return one logit a row, ``[N]``, of values and classes, int64 ``[N]``."""
        if self._back is None:
            return self.logits(values).gather(1, targets.unsqueeze(1)).squeeze(1)
        reached = self._rest.head_until(self._rest.unpositions(values), self._back.layer)
        classes, place = targets.unique(return_inverse=True)
        gradient = self._back.affine_gradient(classes)
        if gradient.shape[1:] != reached.shape[1:] and self._read is not None:
            gradient = gradient[:, self._read]
        products = reached.flatten(1) @ gradient.flatten(1).T
        return products.gather(1, place.unsqueeze(1)).squeeze(1) + self._back.facts.constant[targets]

    def reproduces(self, a: Tensor) -> bool:
        """Whether the parts answer activations, ``[N, …]``, as the whole head does."""
        expected, values = self._cut.head(a), self.front(self._cut.positions(a))
        targets = expected.argmax(1)
        one = expected.gather(1, targets.unsqueeze(1))
        scale = expected.abs()
        return _close(self.logits(values), expected, scale) and _close(
            self.target_logits(values, targets).unsqueeze(1), one, scale
        )


@torch.no_grad()
def mixture_head(cut: Cut) -> MixtureHead:
    """Return a cut's head in the parts that it is found to have, by asking it: any model will do."""
    if cut not in _KNOWN:
        a = cut.trunk(cut.examples)
        noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0)).to(a) * a.std()
        probes = torch.cat([a, noise])
        parts = _parts(cut, probes)
        _KNOWN[cut] = parts if MixtureHead(cut, parts).reproduces(probes) else _Parts(None, None, None)
    return MixtureHead(cut, _KNOWN[cut])


def _parts(cut: Cut, probes: Tensor) -> _Parts:
    """Find out where a head comes apart, on activations ``[N, …]``."""
    read = _read(cut, probes)
    if read is not None:
        probes = probes[:, read]
    later = cuts_after(cut)
    affine = list(takewhile(lambda found: _affine(cut, probes, found.layer), later))
    back = next((found for found in later[len(affine) :] if found.facts.form == "affine"), None)
    return _Parts(read, affine[-1] if affine else None, back)


def _read(cut: Cut, probes: Tensor) -> Tensor | None:
    """Return the tokens that the logits depend on, if the head answers the same without the others; else None."""
    if cut.layout.order != "btc":
        return None
    logits = cut.head(probes)
    gradient = cut.head_gradient(probes, logits.argmax(1))[1]
    read = (gradient != 0).any(2).any(0).nonzero().squeeze(1)
    if not 0 < len(read) < probes.shape[1]:
        return None
    try:
        without = cut.head(probes[:, read])
    except Exception:  # noqa: BLE001 - models count their tokens in many ways
        return None
    same = without.shape == logits.shape and _close(without, logits, logits.abs())
    return read if same else None


def _affine(cut: Cut, probes: Tensor, layer: str) -> bool:
    """Whether what a layer answers is affine in the activation: mixtures of probes get mixtures of their answers."""
    weights = torch.randn(6, len(probes), generator=torch.Generator().manual_seed(0)).to(probes)
    weights[3:] *= 100  # what saturates or bends may show only there
    mixtures = (weights @ probes.flatten(1)).view(-1, *probes.shape[1:])
    try:
        values = cut.head_until(torch.cat([torch.zeros_like(probes[:1]), probes, mixtures]), layer).flatten(1)
    except InvalidCut:
        return False
    nothing, each, mixed = values.split([1, len(probes), len(mixtures)])
    expected = nothing + weights @ (each - nothing)
    return _close(mixed, expected, nothing.abs() + weights.abs() @ (each - nothing).abs())


def _close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Whether every row is as expected, to within rounding errors of its largest terms."""
    return bool(((found - expected).abs().amax(1) <= RELATIVE_TOLERANCE * scale.amax(1)).all())
