"""Maps of concepts on the model's input: which pixels a code comes from, by vector-Jacobian products in batches.

Where the trunk is linear for each input (B-cos in explanation mode), the map of a code that is linear in the activation
adds up to that code exactly: ``Σ_pos z_k = Σ_pixels x ⊙ Jᵀ w_k`` (FaCT, eq. 5). Elsewhere it is gradient × input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from concepts.cut import RELATIVE_TOLERANCE, Cut

ROWS = 8
"""Images of one graph: it keeps every activation of the trunk."""

_PRODUCTS = 64
"""Vector-Jacobian products made at once."""

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
