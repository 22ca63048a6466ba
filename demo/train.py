"""Train one of the demo's networks: ``python -m demo.train cnn|bcos|vit``.

Training draws a fresh stretch of the world at every step, so no image is seen twice and there is nothing to overfit to.
Weights and a report with the accuracy on held-out images go to `demo/weights`. Seeds are fixed; on another machine, or
on a GPU, other kernels round differently and the weights differ while the accuracy does not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from concepts.architectures import build
from demo.attributes import CLASS_NAMES
from demo.models import MODELS, DemoModel, predict
from demo.world import World

BATCH = 128
"""Images per training step."""
HELDOUT = 4096
"""Held-out images, from index 0 on, that the stated accuracy is measured on."""
SEED = 0


@dataclass(frozen=True)
class Recipe:
    """How one network is trained."""

    steps: int
    """Training steps of `BATCH` images."""
    learning_rate: float
    """Highest learning rate of AdamW; it rises over the first 5 % of the steps and falls to zero by a cosine."""
    weight_decay: float
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of logits [B, classes] and labels [B]."""
    bfloat16: bool
    """Whether convolutions and matrix products are done in bfloat16, where that is faster; parameters stay float32."""


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss B-cos networks are trained with: each class against the rest, summed over classes."""
    targets = functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()


RECIPES = MappingProxyType(
    {
        "cnn": Recipe(2000, 4e-3, 1e-3, functional.cross_entropy, bfloat16=True),
        "bcos": Recipe(1200, 4e-3, 0.0, binary_cross_entropy, bfloat16=True),
        "vit": Recipe(1300, 1.5e-3, 0.05, functional.cross_entropy, bfloat16=False),
    }
)


def train(name: str, steps: int | None = None) -> tuple[nn.Module, float]:
    """Train a network from scratch.

    Parameters
    ----------
    name
        One of `RECIPES`.
    steps
        Instead of the recipe's.

    Returns
    -------
    network : in evaluation mode
    seconds : wall time
    """
    recipe, model = RECIPES[name], MODELS[name]
    steps = steps or recipe.steps
    torch.manual_seed(SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = (
        build(model.architecture, {"num_classes": len(CLASS_NAMES)}).to(device).to(memory_format=torch.channels_last)
    )
    network.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    begin = time.monotonic()
    for step, batch in enumerate(World(SEED).batches(steps * BATCH, "train", BATCH), 1):
        images, labels = torch.from_numpy(batch.images).to(device), torch.from_numpy(batch.labels).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            logits = network(model.preprocessing.normalize(images))
        loss = recipe.loss(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{name}: step {step}/{steps}, loss {loss.item():.4f}, {time.monotonic() - begin:.0f} s", flush=True)
    return network.eval().requires_grad_(False), time.monotonic() - begin


def heldout_accuracy(model: DemoModel, network: nn.Module, n: int = HELDOUT, start: int = 0) -> float:
    """Return the share of held-out images, `start` to `start + n - 1`, that the network classifies right."""
    right = sum(
        int((predict(model, network, batch.images).argmax(1) == batch.labels).sum())
        for batch in World(SEED).batches(n, "heldout", 256, start)
    )
    return right / n


def main() -> None:
    """Train, measure and write one network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=sorted(RECIPES))
    parser.add_argument("--steps", type=int, help="training steps, instead of the recipe's")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network, seconds = train(options.network, options.steps)
    accuracy = heldout_accuracy(MODELS[options.network], network)
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous().cpu() for key, value in network.state_dict().items()}
    save_file(weights, options.out / f"{options.network}.safetensors")
    report = {
        "architecture": MODELS[options.network].architecture,
        "heldout_accuracy": accuracy,
        "heldout_images": HELDOUT,
        "steps": options.steps or RECIPES[options.network].steps,
        "batch": BATCH,
        "seed": SEED,
        "training_seconds": round(seconds),
        "device": "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
    }
    (options.out / f"{options.network}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
