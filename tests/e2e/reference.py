"""ResNet-20 and non-negative dictionaries in float64, by code that shares nothing with ours."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import nnls
from torch import Tensor, nn

from concepts.model import Model

Floats = NDArray[np.float64]


class Reference:
    """The network, run child by child, and codes by SciPy's active-set solver, position by position.

    Parameters
    ----------
    model
        ResNet-20.
    layer
        One of its children.
    dictionary
        ``[K, C]``.
    """

    def __init__(self, model: Model, layer: str, dictionary: Tensor) -> None:
        names, children = zip(*copy.deepcopy(model.module).double().named_children(), strict=True)
        after = names.index(layer) + 1
        self._trunk, self._head = nn.Sequential(*children[:after]), nn.Sequential(*children[after:])
        view = model.spec.preprocessing
        self._mean, self.std = (torch.tensor(value).double().view(3, 1, 1) for value in (view.mean, view.std))
        self.dictionary = dictionary.double().numpy()

    def x(self, path: Path) -> Tensor:
        """Return the model's input, ``[3, H, W]``."""
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).double().permute(2, 0, 1)
        return (pixels / 255 - self._mean) / self.std

    def positions(self, x: Tensor) -> Floats:
        """Return the activation, ``[P, C]``."""
        with torch.no_grad():
            return self._trunk(x[None])[0].flatten(1).T.numpy()

    def codes(self, x: Tensor) -> Floats:
        """Return ``argmin_{z ≥ 0} ‖a − zD‖²``, ``[P, K]``."""
        return np.stack([nnls(self.dictionary.T, position)[0] for position in self.positions(x)])

    def logits(self, positions: Floats) -> Floats:
        """Return the head's answer to an activation ``[P, C]``."""
        with torch.no_grad():
            return self._head(self._laid(positions))[0].numpy()

    def gradient(self, positions: Floats, target: int) -> Floats:
        """Return that of a class's logit at an activation, ``[P, C]``."""
        leaf = self._laid(positions).requires_grad_()
        (found,) = torch.autograd.grad(self._head(leaf)[0, target], leaf)
        return found[0].flatten(1).T.numpy()

    def contributions(self, x: Tensor, target: int) -> Floats:
        """Return ``⟨G, z_k d_k⟩`` of every concept, ``[K]``."""
        slopes = self.gradient(self.positions(x), target) @ self.dictionary.T
        return (slopes * self.codes(x)).sum(0)

    def pixel(self, x: Tensor, points: Sequence[Tensor], row: int, column: int, step: float = 1e-5) -> Floats:
        """Return the mean over points of ``⟨∂(Σ_pos z)/∂x, x⟩`` at one pixel, ``[K]``, by central differences."""
        along = torch.zeros_like(x)
        along[:, row, column] = step * x[:, row, column]
        slopes = [self.codes(point + along) - self.codes(point - along) for point in points]
        return np.mean([slope.sum(0) / (2 * step) for slope in slopes], axis=0)

    def _laid(self, positions: Floats) -> Tensor:
        side = round(len(positions) ** 0.5)
        return torch.from_numpy(positions.T.reshape(1, -1, side, side).copy())
