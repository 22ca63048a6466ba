"""The images that excite each concept most, kept while any number of them passes by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from concepts.codec import EMPTY, Codes
from concepts.layout import Layout
from concepts.preprocessing import Box, Preprocessing
from offline.exemplars import Excerpt


class Gallery:
    """The best images of K concepts, each with the position that excites it most.

    Parameters
    ----------
    concepts
        K.
    count
        Most images of a concept.
    layout
        Of the layer.
    preprocessing
        Of the model: how large its views are.
    side
        Of the square that is shown around a position, in pixels of the view; at most as large as the view.
    """

    def __init__(self, concepts: int, count: int, layout: Layout, preprocessing: Preprocessing, side: int) -> None:
        self._concepts, self._count, self._layout = concepts, count, layout
        self._height, self._width = preprocessing.height, preprocessing.width
        self._side = side
        self._keys: list[str] = []
        self._boxes: list[Box] = []
        self._peaks = torch.zeros(count, concepts)
        self._places = torch.zeros(2, count, concepts, dtype=torch.int64)  # image and position

    def add(self, keys: Sequence[str], boxes: Sequence[Box], codes: Codes) -> None:
        """Take in images: their keys, where in each its view lies, and their codes."""
        codes = codes.to("cpu")
        ids = codes.ids.masked_fill(codes.ids == EMPTY, self._concepts)
        peaks = torch.zeros(len(keys), self._concepts + 1).scatter_(1, ids, codes.peak())[:, :-1]
        positions = torch.zeros(len(keys), self._concepts + 1, dtype=torch.int64)
        positions = positions.scatter_(1, ids, codes.peak_position())[:, :-1]
        images = torch.arange(len(keys)).unsqueeze(1).expand_as(positions) + len(self._keys)
        places = torch.cat([self._places, torch.stack([images, positions])], dim=1)
        # Sorted stably, so that of equals the first image stays.
        best = torch.cat([self._peaks, peaks]).sort(dim=0, descending=True, stable=True)
        order = best.indices[: self._count]
        self._peaks, self._places = best.values[: self._count], places.gather(1, order.expand(2, -1, -1))
        self._keys += keys
        self._boxes += boxes

    def excerpts(self, wanted: Sequence[int]) -> list[list[Excerpt]]:
        """Return the excerpts of every concept, best first; none but for the wanted concepts."""
        chosen: list[list[Excerpt]] = [[] for _ in range(self._concepts)]
        for concept in wanted:
            for place in (self._peaks[:, concept] > 0).nonzero().squeeze(1).tolist():
                image, position = self._places[:, place, concept].tolist()
                box = self._box(position, self._boxes[image])
                chosen[concept].append(Excerpt(self._keys[image], box, float(self._peaks[place, concept])))
        return chosen

    def _box(self, position: int, view: Box) -> Box:
        """Return the square around a position in the original image; the whole view for tokens without a place."""
        cell = position - self._layout.tokens
        if cell < 0:
            return view
        (rows, columns), width = self._layout.grid, min(self._side, self._width)
        height = min(self._side, self._height)
        top = _clipped((cell // columns + 0.5) * self._height / rows - height / 2, self._height - height)
        left = _clipped((cell % columns + 0.5) * self._width / columns - width / 2, self._width - width)
        scale_x, scale_y = (view.right - view.left) / self._width, (view.bottom - view.top) / self._height
        left, top = view.left + left * scale_x, view.top + top * scale_y
        return Box(left, top, left + width * scale_x, top + height * scale_y)


def _clipped(value: float, limit: float) -> float:
    return min(max(value, 0.0), limit)


def most_active(active_images: Tensor, count: int) -> list[int]:
    """Return the concepts that are active on most images, at most ``count`` of them and none that never is."""
    order = active_images.argsort(descending=True, stable=True)[:count]
    return sorted(order[active_images[order] > 0].tolist())
