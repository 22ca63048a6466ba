"""FACE (Bhusal et al., NeurIPS 2025, arXiv 2510.11675): dictionaries that keep what the model predicts.

FACE minimises ``½‖A − UW‖² + λ · KL(softmax h(A) ‖ softmax h(UW))`` over ``U, W ≥ 0``. There the codes U know the
prediction; those of a bank in service do not: they are non-negative least squares. What a free U repairs is lost then,
so here U is not free. It *is* the least-squares codes of A on W, and the objective is one of W alone:

    ``E(W) / E(W₀) + λ · (KL(W) + φ · S(W))``

W₀ is the plain factorisation, E the mean squared error by entry, and KL the mean by crop, in nats. So λ is a pure
number: at 1, a nat weighs as much as the whole error of the plain factorisation. S is the share of a crop's Sobol
indices that the leading concept does not have, by contributions ``c_k = Σ_pos z_k ⟨∂y_t/∂a, d_k⟩`` (their closed form).
A factorisation may spread the evidence for a class over all concepts or gather it in one at nearly the same error; φ
says how much gathering it is worth. With φ = 0 the terms are FACE's; with free codes, to compare, so is the problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from concepts import nnls
from offline import sobol

_ELEMENTS = 2**22
"""Most numbers of activations that go through the head at a time."""
_SEARCHES = 8
"""Most weights that are tried to use up a budget."""
_USED = 0.9
"""Share of the budget that is enough to stop the search."""
_FIRST = 8.0
"""Weight that is tried first: coming down from above the budget ends in better places than coming up."""
_STEP = 4.0
"""Factor between weights while only one side of the budget is known."""
_MEMORY = 20
"""Steps that the quasi-Newton method remembers."""
_FREE_ROUNDS = 10
"""Times as many iterations with free codes."""

Codes = Literal["served", "free"]

_TINY = 1e-30
"""Stands for an error of zero, in which nothing can be measured."""


@dataclass(frozen=True)
class Material:
    """What the concepts of a class are learned from: M crops of P positions."""

    crops: Tensor
    """Activations ≥ 0, ``[M, P, C]``."""
    gradient: Tensor
    """``∂y_t/∂a`` there, ``[M, P, C]``."""
    head: Callable[[Tensor], Tensor]
    """From ``[m, P, C]``, of the crops' type, to logits ``[m, n_classes]``; gradients flow."""

    def rows(self, chosen: Tensor | slice) -> Material:
        """Return some of the crops."""
        return Material(self.crops[chosen], self.gradient[chosen], self.head)

    def chunks(self) -> Iterator[tuple[slice, Material]]:
        """Yield the crops, and which they are, in parts that bound the memory of the head and of the codes."""
        size = max(_ELEMENTS // self.crops[0].numel(), 1)
        for first in range(0, len(self.crops), size):
            part = slice(first, min(first + size, len(self.crops)))
            yield part, self.rows(part)


@dataclass(frozen=True)
class Settings:
    """What is wanted of a dictionary."""

    weight: float | None = None
    """λ; None: as large as the error allows."""
    max_error_increase: float = 0.05
    """Largest error above the plain factorisation's, as a share of it; where λ is given, it does not matter."""
    focus: float = 0.3
    """φ."""
    tolerance: float = 1e-6
    """Relative decrease of the objective at which a descent is done."""
    max_iterations: int = 200
    """Of one descent; free codes are many more numbers, and get ten times as many."""
    codes: Codes = "served"
    """What the codes of the crops are: served, those that a bank gives; free, whatever serves the objective best."""


class Losses(NamedTuple):
    """Means over crops."""

    error: float
    """``‖A − UW‖² / (M·P·C)``."""
    kl: float
    """``KL(softmax h(A) ‖ softmax h(UW))``, in nats."""
    spread: float
    """Share of the Sobol indices that the leading concept does not have."""


class Fit(NamedTuple):
    """A dictionary and what became of it."""

    dictionary: Tensor
    """``W``, float64 ``[K, C]``, ≥ 0; rows have unit length, or are zero."""
    codes: Tensor | None
    """``U``, float64 ``[M, P, K]``, ≥ 0, where they are free."""
    losses: Losses
    """With its codes."""
    plain: Losses
    """Of the start."""
    weight: float
    """λ; zero where the start was kept."""
    evaluations: int

    @property
    def increase(self) -> float:
        """Error above the start's, as a share of it."""
        return self.losses.error / max(self.plain.error, _TINY) - 1


def fit(material: Material, start: Tensor, settings: Settings) -> Fit:
    """Improve a dictionary until its least-squares codes keep the model's predictions.

    Parameters
    ----------
    material
        The crops of a class.
    start
        The dictionary of a plain factorisation of these crops, float64 ``[K, C]``, ≥ 0.
    settings
        With a weight, the objective is minimised as it is. Without, its part in the brackets is minimised within the
        budget of error: every candidate is measured, and none above the budget is returned.
    """
    start = functional.normalize(start, dim=1)
    descent = _Descent(material, leading(material, start), settings, start)
    best = Fit(start, None, descent.plain, descent.plain, 0.0, 0)
    if settings.weight is not None:
        return descent.run(best, settings.weight)
    limit = descent.plain.error * (1 + settings.max_error_increase)
    following, weight, below, above = best, _FIRST, None, None
    for _ in range(_SEARCHES):
        following = found = descent.run(following, weight)
        increase = found.increase
        if found.losses.error > limit:
            above = (weight, increase)
        else:
            below = (weight, increase)
            best = min(best, found, key=descent.wanted)
            if increase >= _USED * settings.max_error_increase:
                break
        weight = _next_weight(below, above, settings.max_error_increase)
    return best._replace(evaluations=descent.evaluations)


def measure(material: Material, dictionary: Tensor, lead: int) -> Losses:
    """Return the losses of a dictionary ``[K, C]`` whose leading concept is known, with the codes that are served."""
    return _accumulate(material, dictionary, None, lead, None)


def leading(material: Material, dictionary: Tensor) -> int:
    """Return the concept with the largest mean Sobol index over crops."""
    with torch.no_grad():
        parts = [_indices(part, _codes(part, dictionary), dictionary).sum(0) for _, part in material.chunks()]
    return int(torch.stack(parts).sum(0).argmax())


class _Descent:
    """Descents of one objective with several weights."""

    def __init__(self, material: Material, lead: int, settings: Settings, start: Tensor) -> None:
        self._material, self._lead, self._settings = material, lead, settings
        self.plain = measure(material, start, lead)
        self.evaluations = 0

    def wanted(self, found: Fit) -> float:
        """Return what is minimised within a budget."""
        return found.losses.kl + self._settings.focus * found.losses.spread

    def run(self, start: Fit, weight: float) -> Fit:
        """Descend from a fit by a quasi-Newton method with bounds (L-BFGS-B, Byrd et al. 1995)."""
        scale = Losses(1 / max(self.plain.error, _TINY), weight, weight * self._settings.focus)
        place, rounds = [start.dictionary], self._settings.max_iterations
        if self._settings.codes == "free":
            place.append(self._all_codes(start.dictionary) if start.codes is None else start.codes)
            rounds *= _FREE_ROUNDS
        sizes, device = [factor.numel() for factor in place], start.dictionary.device

        def factors(flat: NDArray[np.float64]) -> list[Tensor]:
            parts = torch.from_numpy(flat).to(device).split(sizes)
            return [part.view_as(like).clone() for part, like in zip(parts, place, strict=True)]

        def value_and_slope(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            leaves = [factor.requires_grad_() for factor in factors(flat)]
            found = _accumulate(self._material, leaves[0], leaves[1] if len(leaves) > 1 else None, self._lead, scale)
            self.evaluations += 1
            slopes = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            return float(np.dot(scale, found)), torch.cat([slope.flatten() for slope in slopes]).cpu().numpy()

        options = {"maxiter": rounds, "maxfun": 2 * rounds, "maxcor": _MEMORY, "ftol": self._settings.tolerance}
        flat = torch.cat([factor.flatten() for factor in place]).cpu().numpy()
        bounds = [(0.0, None)] * len(flat)
        ended = minimize(value_and_slope, flat, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        reached = factors(ended.x)
        # Codes take up what rows are scaled by: nothing changes.
        length = reached[0].norm(dim=1)
        dictionary = functional.normalize(reached[0], dim=1)
        codes = reached[1] * length if len(reached) > 1 else None
        losses = _accumulate(self._material, dictionary, codes, self._lead, None)
        return Fit(dictionary, codes, losses, self.plain, weight, self.evaluations)

    def _all_codes(self, dictionary: Tensor) -> Tensor:
        """Return the codes of all crops, where free ones begin."""
        with torch.no_grad():
            return torch.cat([_codes(part, dictionary) for _, part in self._material.chunks()])


def _accumulate(
    material: Material, dictionary: Tensor, codes: Tensor | None, lead: int, scale: Losses | None
) -> Losses:
    """Return the losses, part by part; with a scale, add the gradient of their weighted sum to the factors'.

    Codes ``[M, P, K]``; None: those that are served.
    """
    total = torch.zeros(3, dtype=torch.float64)
    with torch.set_grad_enabled(scale is not None):
        for place, part in material.chunks():
            own = _codes(part, dictionary) if codes is None else codes[place]
            losses = _losses(part, dictionary, own, lead) * (len(part.crops) / len(material.crops))
            if scale is not None:
                (losses * losses.new_tensor(scale)).sum().backward()
            total += losses.detach().cpu()
    return Losses(*total.tolist())


def _losses(part: Material, dictionary: Tensor, codes: Tensor, lead: int) -> Tensor:
    """Return the means of the three losses over the crops, float64 ``[3]``."""
    a, reconstruction = part.crops, codes @ dictionary
    with torch.no_grad():
        p = functional.log_softmax(part.head(a).double(), 1)
    q = functional.log_softmax(part.head(reconstruction.to(a.dtype)).double(), 1)
    kl = functional.kl_div(q, p, reduction="batchmean", log_target=True)
    spread = 1 - _indices(part, codes, dictionary)[:, lead].mean()
    return torch.stack([(a.double() - reconstruction).square().mean(), kl, spread])


def _codes(part: Material, dictionary: Tensor) -> Tensor:
    """Return the least-squares codes, float64 ``[m, P, K]``, as a bank in service gives them."""
    rows = part.crops.flatten(0, 1).double()
    return nnls.codes(rows.unsqueeze(0), dictionary.unsqueeze(0))[0].view(*part.crops.shape[:2], -1)


def _indices(part: Material, codes: Tensor, dictionary: Tensor) -> Tensor:
    """Return total Sobol indices of concepts by their contributions, ``[m, K]``; see ``sobol.closed_form``."""
    return sobol.closed_form((codes * (part.gradient.double() @ dictionary.mT)).sum(1))


def _next_weight(below: tuple[float, float] | None, above: tuple[float, float] | None, budget: float) -> float:
    """Return the weight to try, between those known to be below and above the budget: (weight, increase) each."""
    if above is None:
        return below[0] * _STEP if below is not None else _FIRST
    if below is None:
        return above[0] / _STEP
    share = (budget - below[1]) / max(above[1] - below[1], 1e-12)
    inner = min(max(share, 0.2), 0.8)
    return float(below[0] * (above[0] / below[0]) ** inner)
