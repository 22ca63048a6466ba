"""CRAFT's crops: overlapping squares of the model's view, enlarged to its size (arXiv 2211.10154, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from concepts.errors import InvalidInput
from concepts.preprocessing import Box, Preprocessing


@dataclass(frozen=True)
class CropGrid:
    """Where crops are taken from a view of ``height × width`` pixels."""

    height: int
    width: int
    patch_size: int
    """Side of a crop, in pixels of the view."""
    enlarge: bool = True
    """Whether crops are enlarged to the size of the view, as in CRAFT."""

    @classmethod
    def of(cls, preprocessing: Preprocessing, patch_size: int, enlarge: bool = True) -> CropGrid:
        """Return the grid for a model's view.

        Raises
        ------
        InvalidInput
            If a patch does not fit the view, or is too small to have a stride.
        """
        height, width = preprocessing.height, preprocessing.width
        if not 2 <= patch_size <= min(height, width):
            raise InvalidInput(
                f"a patch of {patch_size} pixels does not fit the model's view of {height}×{width}: "
                f"ask for 2 to {min(height, width)}"
            )
        return cls(height, width, patch_size, enlarge)

    @property
    def stride(self) -> int:
        """Distance of neighbouring crops, in pixels: ``⌊0.8 · patch_size⌋``."""
        return self.patch_size * 4 // 5

    @property
    def rows(self) -> int:
        """Crops from top to bottom; what is left at the border is not covered, as in CRAFT."""
        return (self.height - self.patch_size) // self.stride + 1

    @property
    def columns(self) -> int:
        """Crops from left to right."""
        return (self.width - self.patch_size) // self.stride + 1

    @property
    def count(self) -> int:
        """Crops of an image."""
        return self.rows * self.columns

    def crops(self, inputs: Tensor) -> Tensor:
        """Cut all crops of some images, enlarged bilinearly to the size of the view if ``enlarge``.

        Parameters
        ----------
        inputs
            Normalised model inputs ``[B, C, height, width]``.

        Returns
        -------
        ``[B · count, C, height, width]``, or ``[B · count, C, patch_size, patch_size]``; image by image, each from the
        upper left along rows.
        """
        patches = inputs.unfold(2, self.patch_size, self.stride).unfold(3, self.patch_size, self.stride)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        if not self.enlarge:
            return patches
        return functional.interpolate(patches, size=(self.height, self.width), mode="bilinear", align_corners=False)

    def box(self, index: int, view: Box) -> Box:
        """Return where the crop of an index lies in the original image, in its pixels.

        Parameters
        ----------
        index
            From 0 to ``count − 1``.
        view
            Where the view lies in the original image.
        """
        row, column = divmod(index, self.columns)
        scale_x, scale_y = (view.right - view.left) / self.width, (view.bottom - view.top) / self.height
        left, top = view.left + column * self.stride * scale_x, view.top + row * self.stride * scale_y
        return Box(left, top, left + self.patch_size * scale_x, top + self.patch_size * scale_y)
