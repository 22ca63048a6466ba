"""Maps of concepts on the model's input: which pixels a code comes from, by vector-Jacobian products in batches.

Where the trunk is linear for each input (B-cos in explanation mode), the map of a code that grows in proportion to the
activation adds up to that code exactly: ``Σ_pos z_k = Σ_pixels x ⊙ Jᵀ w_k`` (FaCT, eq. 5). Elsewhere it is a gradient ×
input: that at the image, or the mean of those at some points around it (SmoothGrad, arXiv 1706.03825) or on the way to
it (integrated gradients, arXiv 1703.01365).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from concepts.codec import EMPTY, Codec, Codes
from concepts.cut import RELATIVE_TOLERANCE, Cut
from concepts.errors import UnsupportedOption
from concepts.explanation import Exactness, ExplainOptions, InputMethod
from concepts.preprocessing import Preprocessing

ROWS = 8
"""Images of one graph: it keeps every activation of the trunk."""

_PRODUCTS = 64
"""Vector-Jacobian products made at once."""

SAMPLES = 16
"""Noisy copies of an image (SmoothGrad)."""

NOISE = 0.15
"""Standard deviation of the noise, relative to the range of the model's input from black to white."""

STEPS = 32
"""Midpoints of equal steps from the input that is zero to the image (integrated gradients)."""

_SMOOTHING = 15
"""Side of the square over which opacity is averaged, in pixels (B-cos, Böhle et al. 2022)."""


_Vjp = tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]


class Rooted(NamedTuple):
    """A batch's activation that knows where it comes from."""

    a: Tensor
    """In the layer's layout, ``[B, …]``."""
    pull: Callable[[Tensor], Tensor]
    """From L gradients at the layer ``[L, B, …]`` to those at the input, ``[L, B, C, H, W]``, all L at once."""


class InputMaps(NamedTuple):
    """Of B images, L concepts each."""

    values: Tensor
    """Gradient × input, summed over channels, ``[B, L, H, W]``."""
    gradients: Tensor | None
    """``[B, L, C, H, W]``, where they are kept."""


def check(options: ExplainOptions, kind: str, *, differentiable: bool, colourful: bool) -> None:
    """Refuse what cannot be mapped on the input.

    Parameters
    ----------
    options
        What is asked for.
    kind
        Of the bank.
    differentiable
        Whether its codes are.
    colourful
        Whether the model sees each colour beside its inverse, and is linear for each input.

    Raises
    ------
    UnsupportedOption
        If that is asked for.
    """
    if "input" in options.maps and not differentiable:
        raise UnsupportedOption(
            f"input maps are not offered for banks of kind {kind}: ask for activation maps, or use an SAE or NMF bank"
        )
    if options.colours and not colourful:
        raise UnsupportedOption("only B-cos models, which see each colour beside its inverse, can be rendered so")
    if options.colours and "input" not in options.maps:
        raise UnsupportedOption("colours are those of input maps: ask for these, too")
    if options.input_method != "gradient" and "input" not in options.maps:
        raise UnsupportedOption("input_method is that of input maps: ask for these, too")
    if options.colours and options.input_method != "gradient":
        raise UnsupportedOption(
            "colours are those of a single gradient: leave input_method at gradient, or colours out"
        )


def root(cut: Cut, x: Tensor) -> Rooted:
    """Run the trunk in PyTorch so that gradients find their way back to the input.

    Parameters
    ----------
    cut
        Where the model is cut.
    x
        Model inputs ``[B, C, H, W]``.
    """
    batched = True
    # Fused attention cannot be differentiated for many outputs at once.
    with cut.linearised(), sdpa_kernel(SDPBackend.MATH):
        try:
            a, pull = cast(_Vjp, torch.func.vjp(cut.trunk_with_gradients, x))
        except RuntimeError:  # gradients written in the older of torch's two ways
            a, pull = _recorded(cut, x)
            batched = False

    def pulled(gradients: Tensor) -> Tensor:
        nonlocal batched
        if batched:
            try:
                back: Tensor = torch.vmap(pull)(gradients)[0]
                return back.detach()
            except RuntimeError:  # operations that know no batches of gradients
                batched = False
        return torch.stack([pull(gradient)[0] for gradient in gradients]).detach()

    return Rooted(a.detach(), pulled)


def _recorded(cut: Cut, x: Tensor) -> _Vjp:
    """Return the activation, and its vector-Jacobian product one at a time, by a graph that is kept."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        a = cut.trunk_with_gradients(leaf)
    return a, lambda gradient: torch.autograd.grad(a, leaf, gradient, retain_graph=True)


def input_maps(
    cut: Cut,
    rooted: Rooted,
    x: Tensor,
    slots: Tensor,
    gradients_of: Callable[[Tensor], Tensor],
    *,
    keep_gradients: bool = False,
) -> InputMaps:
    """Return where the codes of some concepts come from.

    Parameters
    ----------
    cut, rooted, x
        From ``root``.
    slots
        Of the concepts, int64 ``[B, L]``.
    gradients_of
        From some of them, ``[B, l]``, to the gradients of their codes at the activation, ``[B, l, P, C]``.
    keep_gradients
        Return the gradients at the input, too: they take as much memory as all maps of every channel.
    """
    values, kept = [], []
    for part in slots.split(max(1, _PRODUCTS // len(x)), dim=1):
        found = rooted.pull(torch.stack([cut.unpositions(gradient) for gradient in gradients_of(part).unbind(1)]))
        values.append((found * x).sum(2))
        if keep_gradients:
            kept.append(found)
    return InputMaps(torch.cat(values).transpose(0, 1), torch.cat(kept).transpose(0, 1) if kept else None)


def smooth_points(x: Tensor, preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Yield the noisy copies of model inputs ``[B, C, H, W]`` for SmoothGrad; every image gets the same noise."""
    generator = torch.Generator().manual_seed(0)
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    for _ in range(SAMPLES):
        noise = NOISE * torch.randn((3, *x.shape[2:]), generator=generator) / std
        yield x + (torch.cat([noise, -noise]) if preprocessing.inverse else noise).to(x)


def path_points(x: Tensor) -> Iterator[Tensor]:
    """Yield what lies between nothing and model inputs ``[B, C, H, W]``, for integrated gradients."""
    yield from ((step + 0.5) / STEPS * x for step in range(STEPS))


def mean_maps(cut: Cut, codec: Codec, x: Tensor, targets: Tensor, ids: Tensor, points: Iterator[Tensor]) -> Tensor:
    """Return the mean of gradients at some points, times the input: ``[B, L, H, W]``.

    Parameters
    ----------
    cut, codec
        Of the bank.
    x
        Model inputs ``[B, C, H, W]``.
    targets
        int64 ``[B]``.
    ids
        Of the concepts, int64 ``[B, L]``.
    points
        Model inputs like ``x``; one is held at a time, with its graph.
    """
    total, count = x.new_zeros(*ids.shape, *x.shape[2:]), 0
    for point in points:
        rooted = root(cut, point)
        with torch.no_grad():
            codes = codec.encode(cut.positions(rooted.a), targets)
        total += input_maps(cut, rooted, x, codes.slots_of(ids), partial(gradients, codec, codes)).values
        count += 1
    return total / count


def gradients(codec: Codec, codes: Codes, slots: Tensor) -> Tensor:
    """Return ``Codec.gradients``, ``[B, L, P, C]``; zero where a slot is ``EMPTY``."""
    found = codec.gradients(codes, slots.clamp_min(0))
    return found.masked_fill((slots == EMPTY).view(*slots.shape, 1, 1), 0.0)


def activations_at_zero(cut: Cut, codec: Codec, x: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
    """Return the activations of concepts where the input is zero, ``[B, L]``: what integrated gradients leave out."""
    with torch.no_grad():
        a = cut.positions(cut.trunk(torch.zeros_like(x[:1])))
        codes = codec.encode(a.expand(len(x), *a.shape[1:]), targets)
    slots = codes.slots_of(ids)
    return codes.total().gather(1, slots.clamp_min(0)).masked_fill(slots == EMPTY, 0.0)


def exactness(method: InputMethod, *, homogeneous: bool, linear: bool) -> tuple[Exactness, str]:
    """Say whether maps add up to their activations, and why.

    Parameters
    ----------
    method
        Of the maps.
    homogeneous
        Whether codes grow in proportion to the activation.
    linear
        Whether the trunk is linear for each input.
    """
    if method == "smoothgrad":
        return "first_order", (
            f"SmoothGrad: mean gradient at {SAMPLES} copies of the image with noise of {NOISE:.0%} of the range from "
            "black to white, × input"
        )
    if method == "integrated":
        return "first_order", (
            f"integrated gradients in {STEPS} steps: the pixels add up to the activation less that at the input that "
            "is zero, up to the completeness residual"
        )
    if not homogeneous:
        return "first_order", "the bank's codes have biases, which come from no pixel: gradient × input"
    if not linear:
        return "first_order", (
            "codes add up over the activation, but the model up to the layer is not linear for each input: "
            "gradient × input"
        )
    return "exact", "the model up to the layer is linear for each input: the pixels add up to the activation"


def is_linear(cut: Cut) -> bool:
    """Find out whether the trunk is linear for each input: ``⟨c, a⟩ = ⟨Jᵀc, x⟩``, asked with random c."""
    x = cut.example
    rooted = root(cut, x)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn((4, *rooted.a.shape), generator=generator).to(rooted.a)
    at_input = (rooted.pull(probes) * x).flatten(1).sum(1)
    at_layer = (probes * rooted.a).flatten(1)
    return bool(((at_input - at_layer.sum(1)).abs() <= RELATIVE_TOLERANCE * at_layer.abs().sum(1)).all())


def colours(x: Tensor, gradient: Tensor) -> NDArray[np.uint8]:
    """Render the linear map from a B-cos input to a code in the colours that it looks for, as its authors do.

    Parameters
    ----------
    x, gradient
        Of one image, ``[6, H, W]``: colours and their inverse.

    Returns
    -------
    uint8 ``[H, W, 4]``, RGBA; transparent where nothing was found.
    """
    from bcos.common import gradient_to_image  # brings half of torchvision along

    rendered = gradient_to_image(x.cpu(), gradient.cpu(), smooth=_SMOOTHING)
    rgba: NDArray[np.uint8] = np.nan_to_num(255 * rendered).clip(0, 255).round().astype(np.uint8)
    return rgba
