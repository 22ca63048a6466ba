"""How much of a class's logit each number of an activation carries, smoothed by noise (SmoothGrad, arXiv 1706.03825).

Two rules. ``gradient``: gradient × activation, which any head has; on B-cos models the gradient is that of the dynamic
linear map, so that the parts add up. ``deeplift``: DeepLIFT's rescale rule (arXiv 1704.02685) by captum, against the
activation that is zero everywhere; the parts add up to ``h(a)_t − h(0)_t``. Captum follows non-linearities that are
modules of their own, each run once: where they are not, it answers with numbers that do not add up, or fails. Whether
they do is found out by asking it. For an affine head the rules are one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from concepts.cut import Cut
from concepts.errors import UnsupportedOption
from concepts.trace import trace

Rule = Literal["gradient", "deeplift"]
Place = Literal["input", "layer"]

TOLERANCE = 1e-3
"""How closely DeepLIFT's parts must add up, relative to the sum of their sizes."""


@dataclass(frozen=True)
class Smoothing:
    """Attributions are means over noisy copies, those of an image the same whatever its batch."""

    samples: int = 20
    """Copies; 0: the image as it is."""
    noise: float = 0.25
    """Standard deviation of the noise, relative to that of the values it is added to: of each image by itself."""
    place: Place = "input"
    """Where noise is added: at the layer, the model up to it runs once."""
    seed: int = 0


class Attribution:
    """Attributes the logits of a model to the activation at which it is cut.

    Parameters
    ----------
    cut
        Where.
    rule
        None: ``deeplift`` where it works, ``gradient`` elsewhere.
    smoothing
        How much noise is averaged over.

    Attributes
    ----------
    rule : Rule
        The one that is followed.

    Raises
    ------
    UnsupportedOption
        If DeepLIFT is demanded and does not work for the model from this layer on.
    """

    def __init__(self, cut: Cut, rule: Rule | None = None, smoothing: Smoothing | None = None) -> None:
        self._cut, self._smoothing = cut, smoothing or Smoothing()
        self._head = _Head(cut)
        works = rule != "gradient" and self._adds_up()
        if rule == "deeplift" and not works:
            raise UnsupportedOption(
                f"DeepLIFT does not add up to the logits after layer {cut.layer!r}, where not every non-linearity "
                "is a module of its own that runs once: ask for gradient, or a later layer",
                layer=cut.layer,
            )
        self.rule: Rule = "deeplift" if works else "gradient"

    def __call__(self, x: Tensor, a: Tensor, targets: Tensor) -> Tensor:
        """Return what each number of an activation carries of the logit of the image's class.

        Parameters
        ----------
        x
            Model inputs ``[B, C, H, W]``.
        a
            Their activations at the layer, ``[B, …]``.
        targets
            Class indices, int64 ``[B]``.

        Returns
        -------
        In logits, shaped as ``a``.
        """
        parts_of = self._deeplift if self.rule == "deeplift" else self._gradient
        smoothing = self._smoothing
        if not smoothing.samples:
            return parts_of(a, targets)
        total = torch.zeros_like(a)
        for noisy in self._copies(x if smoothing.place == "input" else a):
            total += parts_of(self._cut.trunk(noisy) if smoothing.place == "input" else noisy, targets)
        return total / smoothing.samples

    def _copies(self, values: Tensor) -> Iterator[Tensor]:
        """Yield noisy copies of ``[B, …]``."""
        generator = torch.Generator().manual_seed(self._smoothing.seed)
        spread = values.flatten(1).std(1).view(-1, *[1] * (values.ndim - 1))
        for _ in range(self._smoothing.samples):
            # The same noise for all images, so that their number does not matter.
            noise = torch.randn(values.shape[1:], generator=generator).to(values)
            yield values + self._smoothing.noise * spread * noise

    def _gradient(self, a: Tensor, targets: Tensor) -> Tensor:
        return a * self._cut.head_gradient(a, targets)[1]

    def _deeplift(self, a: Tensor, targets: Tensor) -> Tensor:
        from captum.attr import DeepLift  # brings matplotlib along

        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")  # captum announces its hooks
                parts: Tensor = DeepLift(self._head).attribute(a.detach().requires_grad_(), target=targets)
        finally:
            for leaf in self._head.leaves:  # where captum fails, what it noted there stays
                vars(leaf).pop("input", None)
                vars(leaf).pop("output", None)
        return parts.detach()

    def _adds_up(self) -> bool:
        """Find out whether DeepLIFT's parts sum to what they should, on activations such as the model has."""
        a = self._cut.trunk(self._cut.examples)
        generator = torch.Generator().manual_seed(0)
        a = torch.cat([a, a + a.std() * torch.randn(a.shape, generator=generator).to(a).abs()])
        targets = torch.arange(len(a), device=a.device) % self._cut.n_classes
        try:
            parts = self._deeplift(a, targets).flatten(1)
        except Exception:  # noqa: BLE001 - captum and torch refuse what they cannot follow in many ways
            return False
        with torch.no_grad():
            change = (self._cut.head(a) - self._cut.facts.constant).gather(1, targets.unsqueeze(1)).squeeze(1)
        return bool(((parts.sum(1) - change).abs() <= TOLERANCE * parts.abs().sum(1)).all())


class _Head(nn.Module):
    """The head as a module, of which captum finds what runs in it and nothing else of the model."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._cut = cut
        calls = trace(cut.module, cut.example.clone()).calls
        layer = next(index for index, call in enumerate(calls) if call.name == cut.layer)
        leaves = (call.module for call in calls[layer + 1 :] if next(call.module.children(), None) is None)
        self.leaves = nn.ModuleList(dict.fromkeys(leaves))

    def forward(self, a: Tensor) -> Tensor:
        return self._cut.head(a)
