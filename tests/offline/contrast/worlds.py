"""What tests of contrast banks learn from: real images, few of each class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from concepts.repository import Repository
from offline.contrast.config import ContrastConfig
from offline.progress import silent
from offline.task import Task, open_task
from tests.offline.worlds import MODEL, add_bcos, repository, some_images

CLASSES = ("frog", "ship", "truck")


def place(root: Path) -> Path:
    """Write training and held-out images of a few classes, and a repository with their models."""
    some_images(root / "train", "train", {"frog": 12, "ship": 14, "truck": 16, "cat": 2})
    some_images(root / "test", "test", {"frog": 6, "ship": 6, "truck": 6})
    (root / "train" / "ship" / "broken.jpg").write_bytes(b"no picture")
    add_bcos(repository(root / "repository"))
    return root


def config(root: Path, **changes: object) -> ContrastConfig:
    base: dict[str, object] = {
        "model": MODEL,
        "layer": "layer2",
        "images": root / "train",
        "held_out": root / "test",
        "classes": CLASSES,
        "device": "cpu",
    }
    return ContrastConfig(**(base | changes))


def task(root: Path, **changes: object) -> Task[ContrastConfig]:
    return open_task(Repository(root / "repository"), config(root, **changes), silent)


def unanswered(task: Task[ContrastConfig], largest: float) -> Callable[[Tensor], Tensor]:
    """Return a head that answers with NaN where activations add up to more than so much."""
    head = task.cut.head
    return lambda a: head(a).masked_fill(a.flatten(1).sum(1, keepdim=True) > largest, torch.nan)
