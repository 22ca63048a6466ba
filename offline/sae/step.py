"""Loss and gradients of one batch, by hand: nothing but the encoder touches a latent that is not active."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from offline.sae.choose import Choice, choose
from offline.sae.settings import SaeSettings
from offline.sae.sparse import Pairs

Parameters = dict[str, Tensor]
"""``encoder`` and ``decoder`` ``[K, C]``; where there are such ``encoder_bias [K]``, ``decoder_bias [C]`` and
``log_threshold [K]``."""

_ROUNDING = 1e-5
"""Share of squares below which a difference of them is rounding."""


class Outcome(NamedTuple):
    """What a batch gave; sums over the vectors at hand, where several devices share a batch."""

    gradients: Parameters
    """Of the loss, to be added up over the devices."""
    squared_error: Tensor
    """``Σ ‖a − â‖²``, float64."""
    active: Tensor
    """Pairs of a vector and a latent that fired."""
    fired: Tensor
    """Vectors that each latent fired on, ``[K]``."""
    auxiliary: Tensor
    """This device's share of the dead latents' loss, before its coefficient."""
    smallest: Tensor
    """The smallest code above zero; infinite where there is none."""


@torch.no_grad()
def gradients(
    vectors: Tensor,
    parameters: Mapping[str, Tensor],
    settings: SaeSettings,
    dead: Tensor,
    *,
    batch_size: int,
    sparsity_coefficient: float = 0.0,
    dtype: torch.dtype = torch.float32,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Outcome:
    """Return the gradients of ``mean ‖a − â‖² + α · auxk + λ · L0`` with respect to all parameters.

    Latents are chosen in ``dtype``; their pre-activations are then computed anew, in the type of the vectors. auxk is
    the squared error with which the best dead latents of each vector reconstruct ``a − â``, divided by the variance
    of ``a − â`` over the batch, as in the code of Gao et al.; ``a − â`` is a constant to it.

    Parameters
    ----------
    vectors
        ``a``, ``[n, C]``.
    parameters
        See ``Parameters``.
    settings
        Of the dictionary.
    dead
        int64, ascending: the dead latents.
    batch_size
        Vectors in the batch, those on other devices too.
    sparsity_coefficient
        λ at this step (jumprelu).
    dtype
        In which latents are chosen, and dead ones computed where that is a dense product.
    total
        Adds a tensor up over the devices that share the batch.
    """
    centred = vectors - parameters["decoder_bias"] if "decoder_bias" in parameters else vectors
    choice = choose(centred, parameters, settings, dead, dtype)
    pairs = choice.pairs
    pre = pairs.dots(centred, parameters["encoder"])
    if "encoder_bias" in parameters:
        pre = pre + parameters["encoder_bias"][pairs.latents]
    threshold = parameters["log_threshold"].exp() if "log_threshold" in parameters else None
    active = pre > (0 if threshold is None else threshold[pairs.latents])
    codes = torch.where(active, pre, 0)

    residual = pairs.decode(codes, parameters["decoder"]).sub_(centred)  # the decoder's bias is in both
    upstream = residual * (2 / batch_size)
    by_code = pairs.dots(upstream, parameters["decoder"])
    by_pre = torch.where(active, by_code, 0)
    found = {
        "encoder": pairs.accumulate(by_pre, centred),
        "decoder": pairs.accumulate(codes, upstream),
        "encoder_bias": pairs.totals(by_pre),
    }
    auxiliary = _learn_from_residual(found, centred, parameters, settings, dead, choice, residual, total)
    if "decoder_bias" in parameters:
        # It is added to the reconstruction and subtracted before the encoder.
        found["decoder_bias"] = upstream.sum(0) - found["encoder_bias"] @ parameters["encoder"]
    if threshold is not None:
        price = sparsity_coefficient / batch_size
        found["log_threshold"] = _by_threshold(pairs, pre, by_code, threshold, settings.bandwidth, price)
    return Outcome(
        {name: found[name] for name in parameters},
        _squares(residual),
        active.sum(),
        pairs.totals(active.to(vectors.dtype)),
        auxiliary,
        torch.where(active, codes, torch.inf).min() if len(codes) else codes.new_tensor(torch.inf),
    )


def _learn_from_residual(
    found: Parameters,
    centred: Tensor,
    parameters: Mapping[str, Tensor],
    settings: SaeSettings,
    dead: Tensor,
    choice: Choice,
    residual: Tensor,
    total: Callable[[Tensor], Tensor],
) -> Tensor:
    """Add the gradients of ``α · auxk`` to those found, and return auxk; ``residual`` is ``â − a``."""
    pairs, values = choice.dead_pairs, choice.dead_values
    if pairs is None or values is None:
        return residual.new_zeros((), dtype=torch.float64)
    variance = _variation(residual, total)
    decoder = parameters["decoder"][dead]
    codes = values.clamp_min(0)
    difference = pairs.decode(codes, decoder) + residual
    auxiliary = _ratio(_squares(difference), variance)
    upstream = difference * _ratio(2 * settings.auxk_coefficient, variance).to(residual.dtype)
    by_pre = torch.where(codes > 0, pairs.dots(upstream, decoder), 0)
    found["decoder"].index_add_(0, dead, pairs.accumulate(codes, upstream))
    found["encoder"].index_add_(0, dead, pairs.accumulate(by_pre, centred))
    found["encoder_bias"].index_add_(0, dead, pairs.totals(by_pre))
    return auxiliary


def _variation(residual: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the squared distances of all rows on all devices from their common mean, added up; float64.

    Zero where it is no more than rounding, as of a single row.
    """
    sums = torch.cat(
        [
            residual.sum(0).double(),
            _squares(residual)[None],
            residual.new_tensor([len(residual)], dtype=torch.float64),
        ]
    )
    sums = total(sums)
    variation = sums[-2] - sums[:-2].square().sum() / sums[-1]
    return torch.where(variation > _ROUNDING * sums[-2], variation, 0)


def _squares(rows: Tensor) -> Tensor:
    """Return the sum of all squares, float64."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return lengths.double().square().sum()


def _ratio(numerator: Tensor | float, denominator: Tensor) -> Tensor:
    """Return a quotient, zero where there is nothing to divide by."""
    return torch.where(denominator > 0, numerator / denominator, 0)


def _by_threshold(
    pairs: Pairs, pre: Tensor, by_code: Tensor, threshold: Tensor, bandwidth: float, price: float
) -> Tensor:
    """Return the pseudo-gradient of log θ (Rajamanoharan et al., arXiv 2407.14435, section 3).

    A step at θ has a derivative of zero almost everywhere; a rectangle of width ε around θ stands in for it.
    """
    own = threshold[pairs.latents]
    near = (pre - own).abs() < bandwidth / 2
    by_theta = torch.where(near, -(own * by_code + price) / bandwidth, 0)
    return pairs.totals(by_theta) * threshold
