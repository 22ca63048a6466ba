"""From a picture to what the model sees: geometry on uint8 images, arithmetic on tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from concepts.errors import InvalidImage, InvalidModel

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


LARGEST_SIDE = 8192
"""Of a model's input and of images before the crop, in pixels."""

LARGEST_RATIO = 50
"""Of the longer to the shorter side of an image whose shorter side is resized: the longer grows with it."""


class Box(NamedTuple):
    """A rectangle in pixels of an image: left and top inside, right and bottom outside."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a model wants its images, in the order of torchvision's classification transforms.

    The shorter side is resized to ``resize`` (None: the whole image is stretched to ``height × width``), the centre is
    cropped, values are scaled to [0, 1], channels are reversed (``bgr``), ``mean`` is subtracted and ``std`` divides,
    and the inverse is appended as three more channels (``inverse``).

    Other ranges are said by ``mean`` and ``std``: 0.5 and 0.5 make [-1, 1]; a ``std`` of 1/255 makes [0, 255], with the
    mean still in [0, 1]. The Keras models called *caffe* take ``bgr``, a ``std`` of 1/255 and a ``mean`` of
    (103.939/255, 116.779/255, 123.68/255).
    """

    height: int
    """Height of the model's input, in pixels."""
    width: int
    """Width of the model's input, in pixels."""
    resize: int | None = None
    """Length of the shorter side before the crop, in pixels; None: stretch to the input size."""
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from each channel in [0, 1], in the model's order: R, G, B, or B, G, R with ``bgr``."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Divides each channel, in the model's order."""
    inverse: bool = False
    """Append 1 − x as channels 4 to 6, as B-cos networks want."""
    bgr: bool = False
    """Reverse the channels, as models that were trained on OpenCV's images want."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise InvalidModel(f"preprocessing: an input of {self.height}×{self.width} pixels has no pixels")
        if max(self.height, self.width, self.resize or 0) > LARGEST_SIDE:
            raise InvalidModel(f"preprocessing: sides are {LARGEST_SIDE} pixels at most")
        if self.interpolation not in _RESAMPLING:
            raise InvalidModel(f"preprocessing: interpolation must be one of {', '.join(_RESAMPLING)}")
        if self.resize is not None and self.resize < max(self.height, self.width):
            raise InvalidModel(f"preprocessing: resize ({self.resize}) is smaller than the crop")
        if min(self.std) <= 0:
            raise InvalidModel("preprocessing: std must be positive")

    @property
    def channels(self) -> int:
        """Channels of the model's input: 3, or 6 with inverse."""
        return 6 if self.inverse else 3

    def fit(self, image: Image.Image) -> tuple[NDArray[np.uint8], Box]:
        """Return the model's view of an RGB image, and where in that image it lies.

        Parameters
        ----------
        image
            Mode RGB, upright.

        Returns
        -------
        view : uint8 ``[height, width, 3]``
        box : Box
            The region of ``image`` that the view shows, in its pixels; it may leave the image by the rounding of the
            resized size.

        Raises
        ------
        InvalidImage
            If the image is more than 50 times as long as wide, which resizing would blow up.
        """
        resampling = _RESAMPLING[self.interpolation]
        if self.resize is None:
            view = (
                image.resize((self.width, self.height), resampling)
                if image.size != (self.width, self.height)
                else image
            )
            return np.asarray(view), Box(0.0, 0.0, float(image.width), float(image.height))
        # torchvision: shorter side to `resize`, the longer truncated to whole pixels, then a rounded centre crop
        # (torchvision.transforms.functional._compute_resized_output_size, center_crop).
        short, long = sorted(image.size)
        if long > LARGEST_RATIO * short:
            raise InvalidImage(
                f"an image of {image.width}×{image.height} pixels is too narrow: crop it to at most "
                f"{LARGEST_RATIO} times as long as wide"
            )
        resized_long = int(self.resize * long / short)
        size = (self.resize, resized_long) if image.width <= image.height else (resized_long, self.resize)
        resized = image.resize(size, resampling) if image.size != size else image
        left, top = round((size[0] - self.width) / 2.0), round((size[1] - self.height) / 2.0)
        scale_x, scale_y = image.width / size[0], image.height / size[1]
        box = Box(left * scale_x, top * scale_y, (left + self.width) * scale_x, (top + self.height) * scale_y)
        return np.asarray(resized.crop((left, top, left + self.width, top + self.height))), box

    def normalize(self, views: Tensor) -> Tensor:
        """Return the model's input for uint8 views.

        Parameters
        ----------
        views
            uint8 ``[B, height, width, 3]``, on any device.

        Returns
        -------
        float32 ``[B, 3, height, width]``, or ``[B, 6, …]`` with inverse channels; same device, channels-last strides.
        """
        x = views.flip(3) if self.bgr else views
        x = x.permute(0, 3, 1, 2).to(torch.float32).div(255.0)
        if self.mean != (0.0, 0.0, 0.0) or self.std != (1.0, 1.0, 1.0):
            mean = torch.tensor(self.mean, device=x.device).view(1, 3, 1, 1)
            std = torch.tensor(self.std, device=x.device).view(1, 3, 1, 1)
            x = (x - mean) / std
        return torch.cat([x, 1.0 - x], dim=1) if self.inverse else x

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` takes."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Preprocessing:
        """Rebuild from ``to_json``'s object.

        Raises
        ------
        InvalidModel
            If a key is unknown or missing, or a value makes no sense.
        """
        try:
            return cls(
                **{**value, "mean": tuple(value.get("mean", (0.0,) * 3)), "std": tuple(value.get("std", (1.0,) * 3))}
            )
        except TypeError as error:
            raise InvalidModel(f"preprocessing of the model cannot be read: {error}") from error
