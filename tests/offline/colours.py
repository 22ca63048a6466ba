"""A world in which every answer is known: images of one colour or two, and a model that tells the larger part's."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import nn

from concepts.model import Model, ModelSpec
from concepts.preprocessing import Preprocessing
from offline.config import TrainingConfig
from offline.images import open_folder
from offline.progress import silent
from offline.task import Task

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SIDE = 32


def picture(ground: str, patch: str | None = None, corner: tuple[int, int] = (0, 0)) -> Image.Image:
    """Return a picture of one colour with a patch of another, a quarter of it, at a corner from the upper left."""
    image = Image.new("RGB", (SIDE, SIDE), COLOURS[ground])
    if patch is not None:
        image.paste(COLOURS[patch], (*corner, corner[0] + SIDE // 2, corner[1] + SIDE // 2))
    return image


def model(weight: float = 10.0) -> Model:
    """Return the model: layer ``relu`` holds the colours of 8×8 cells, logits are their means times the weight."""
    network = nn.Sequential()
    network.add_module("cells", nn.AvgPool2d(4))
    network.add_module("relu", nn.ReLU())
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("head", nn.Linear(3, 3, bias=False))
    network.head.weight.data = weight * torch.eye(3)
    spec = ModelSpec("colours", "tests:colours", Preprocessing(SIDE, SIDE), tuple(COLOURS), "0" * 64)
    return Model(spec, network.eval().requires_grad_(False), torch.device("cpu"))


def task(folder: Path, config: TrainingConfig, *, layer: str = "relu", weight: float = 10.0) -> Task:
    """Return a task on the images of a folder."""
    colours, images = model(weight), open_folder(folder)
    return Task(colours, colours.cut(layer), images, images, config, silent)
