"""Windows of the size of exemplars over images: what a layer sees in each, with where it lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

from concepts.layout import Layout
from concepts.preprocessing import Box, Preprocessing

_ACROSS = 5
"""Most windows along each side of an image."""


@dataclass(frozen=True)
class WindowGrid:
    """Where windows lie on a layer's grid; half of each is shared with the next where there are not too many."""

    layout: Layout
    view: Preprocessing
    side: float
    """Of a window, as a share of the shorter side of the view."""

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a window, in cells."""
        pixels = self.side * min(self.view.height, self.view.width)
        (rows, columns), (height, width) = self.layout.grid, (self.view.height, self.view.width)
        return _cells(pixels / height, rows), _cells(pixels / width, columns)

    @property
    def stride(self) -> tuple[int, int]:
        """Rows and columns from one window to the next."""
        return tuple(  # type: ignore[return-value]
            max(size // 2, -(-(cells - size) // (_ACROSS - 1)), 1)
            for size, cells in zip(self.size, self.layout.grid, strict=True)
        )

    def means(self, positions: Tensor) -> Tensor:
        """Return the mean activation of every window, ``[B, P, C]`` to ``[B, V, C]``; tokens are left out."""
        pooled: Tensor = functional.avg_pool2d(self._grid(positions), self.size, self.stride)
        return pooled.flatten(2).mT

    def mean_within(self, positions: Tensor, box: Box, view: Box) -> Tensor:
        """Return the mean activation within a box of one image, ``[P, C]`` to ``[C]``.

        Parameters
        ----------
        positions
            Activations of the image.
        box, view
            The box, and what the model sees, in the image's pixels.
        """
        rows, columns = self.layout.grid
        height, width = view.bottom - view.top, view.right - view.left
        top, bottom = _span((box.top - view.top) / height, (box.bottom - view.top) / height, rows)
        left, right = _span((box.left - view.left) / width, (box.right - view.left) / width, columns)
        inside: Tensor = self._grid(positions.unsqueeze(0))[0, :, top:bottom, left:right].mean((1, 2))
        return inside

    def box(self, window: int, view: Box) -> Box:
        """Return where a window lies in its image, in that image's pixels."""
        (rows, columns), (height, width), (down, along) = self.layout.grid, self.size, self.stride
        row, column = divmod(window, (columns - width) // along + 1)
        y, x = (view.bottom - view.top) / rows, (view.right - view.left) / columns
        left, top = view.left + column * along * x, view.top + row * down * y
        return Box(left, top, left + width * x, top + height * y)

    def _grid(self, positions: Tensor) -> Tensor:
        """Return activations by place, ``[B, P, C]`` to ``[B, C, rows, columns]``."""
        placed: Tensor = positions[:, self.layout.tokens :].unflatten(1, self.layout.grid)
        return placed.permute(0, 3, 1, 2)


@dataclass
class Seen:
    """Windows of images, and the mean activations within chosen boxes."""

    grid: WindowGrid
    keys: list[str] = field(default_factory=list)
    views: list[Box] = field(default_factory=list)
    windows: list[Tensor] = field(default_factory=list)
    """Of each batch, ``[B, V, C]``."""
    within: dict[tuple[str, Box], Tensor] = field(default_factory=dict)
    """``[C]``, by image and box."""

    def add(
        self,
        keys: Sequence[str],
        views: Sequence[Box],
        positions: Tensor,
        boxes: Mapping[str, Iterable[Box]],
        probes: frozenset[str],
    ) -> None:
        """Take in a batch: windows of those that are probes, and means within boxes, by image."""
        for key, view, own in zip(keys, views, positions, strict=True):
            for box in boxes.get(key, ()):
                self.within[key, box] = self.grid.mean_within(own, box, view).cpu()
        chosen = [row for row, key in enumerate(keys) if key in probes]
        if chosen:
            self.keys += [keys[row] for row in chosen]
            self.views += [views[row] for row in chosen]
            self.windows.append(self.grid.means(positions[chosen]).float().cpu())


def _cells(share: float, cells: int) -> int:
    return min(max(round(share * cells), 1), cells)


def _span(first: float, last: float, cells: int) -> tuple[int, int]:
    """Return the cells that a stretch covers, at least one."""
    start = min(max(round(first * cells), 0), cells - 1)
    return start, min(max(round(last * cells), start + 1), cells)
