"""Train one of the demo's networks: ``python -m demo.train cnn|bcos|vit``.

Training draws a fresh stretch of the world at every step, so no image is seen twice and there is nothing to overfit to.
Weights and a report with the accuracy on held-out images go to `demo/weights`. Seeds are fixed; on another machine, or
on a GPU, other kernels round differently and the weights differ while the accuracy does not.

Processor time on one core with AVX-512: cnn 8 minutes, bcos 11, vit 20. A second core helps little, since the networks
are small; it serves better to train another one meanwhile. The reports state the wall time that the committed weights
took, on two cores busy with other work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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

HELDOUT = 4096
"""Held-out images, from index 0 on, that the stated accuracy is measured on."""
SEED = 0


@dataclass(frozen=True)
class Recipe:
    """How one network is trained."""

    cycles: int
    """How often the learning rate rises and falls; each time the optimiser starts afresh."""
    steps: int
    """Training steps in a cycle."""
    batch: int
    """Images per step."""
    learning_rate: float
    """Highest learning rate of AdamW; it rises over the first 5 % of a cycle and falls to zero by a cosine."""
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
        "cnn": Recipe(1, 2000, 128, 4e-3, 1e-3, functional.cross_entropy, bfloat16=True),
        "bcos": Recipe(1, 4000, 64, 3e-3, 0.0, binary_cross_entropy, bfloat16=True),
        "vit": Recipe(2, 1300, 128, 1.5e-3, 0.05, functional.cross_entropy, bfloat16=False),
    }
)


def train(name: str, steps: int | None = None) -> nn.Module:
    """Train a network from scratch.

    Parameters
    ----------
    name
        One of `RECIPES`.
    steps
        In each cycle, instead of the recipe's.

    Returns
    -------
    The network, in evaluation mode.
    """
    recipe = RECIPES[name]
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    torch.manual_seed(SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build(MODELS[name].architecture, {"num_classes": len(CLASS_NAMES)})
    network = network.to(device).to(memory_format=torch.channels_last).train().requires_grad_(True)
    for cycle in range(recipe.cycles):
        train_cycle(name, network, recipe, cycle)
    return network.eval().requires_grad_(False)


def train_cycle(name: str, network: nn.Module, recipe: Recipe, cycle: int) -> None:
    """Train a network for one more cycle, on images no other cycle has seen."""
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.05, cycle_momentum=False
    )
    begin, images_each = time.monotonic(), recipe.steps * recipe.batch
    batches = World(SEED).batches(images_each, "train", recipe.batch, start=cycle * images_each)
    for step, batch in enumerate(batches, 1):
        images, labels = torch.from_numpy(batch.images).to(device), torch.from_numpy(batch.labels).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            logits = network(MODELS[name].preprocessing.normalize(images))
        loss = recipe.loss(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.monotonic() - begin
            progress = f"{name}: cycle {cycle + 1}/{recipe.cycles}, step {step}/{recipe.steps}"
            print(f"{progress}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)


def heldout_accuracy(model: DemoModel, network: nn.Module, n: int = HELDOUT, start: int = 0) -> float:
    """Return the share of held-out images, `start` to `start + n - 1`, that the network classifies right."""
    right = sum(
        int((predict(model, network, batch.images).argmax(1) == batch.labels).sum())
        for batch in World(SEED).batches(n, "heldout", 256, start)
    )
    return right / n


def write(name: str, network: nn.Module, folder: Path, seconds: int) -> None:
    """Measure a network on held-out images and write its weights and report."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous().cpu() for key, value in network.state_dict().items()}
    save_file(weights, folder / f"{name}.safetensors")
    recipe = RECIPES[name]
    report = {
        "architecture": MODELS[name].architecture,
        "heldout_accuracy": heldout_accuracy(MODELS[name], network),
        "heldout_images": HELDOUT,
        "cycles": recipe.cycles,
        "steps": recipe.steps,
        "batch": recipe.batch,
        "seed": SEED,
        "training_seconds": seconds,
        "device": "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
    }
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def main() -> None:
    """Train, measure and write one network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=sorted(RECIPES))
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begin = time.monotonic()
    network = train(options.network)
    write(options.network, network, options.out, round(time.monotonic() - begin))


if __name__ == "__main__":
    main()
