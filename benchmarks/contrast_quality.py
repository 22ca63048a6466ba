"""Quality of planes between classes: CIFAR-10 beside the published separators, and a world where the truth is known.

CIFAR-10, ResNet-20, 60 training images a class; held-out positions and images are those of the test images. The
separators are 100 steps of SGD at 0.01 for each pair, as published, fitted to the same vectors. *Strict* vectors are
ours: positions with more than half of the image's largest evidence for the class's log-odds. *Published* ones have more
than a quarter of the largest attribution to the class's logit; there what classes share counts, too.

Known concepts: for pairs of classes that differ in one attribute, how much of the positive part of a map lies inside
the mask of that attribute, dilated by one cell, on held-out images without the sticker; mean over images, then over
pairs. Pairs with the class that the sticker went with in training are apart: there the sticker is the evidence.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from benchmarks import measure
from benchmarks.contrast_fit import separators
from concepts.bank import Bank
from concepts.contrast import shift
from concepts.contrast.engine import ContrastEngine
from concepts.contrast.records import Contrast, ContrastRequest
from concepts.cut import Cut
from concepts.explanation import ExplainOptions, MapKind
from concepts.kinds.contrast import tables
from concepts.model import Model, ModelSpec
from concepts.repository import Repository
from demo.attributes import CLASS_NAMES, PAIRS, SPURIOUS, SPURIOUS_CLASS, index_of
from demo.cifar import CLASS_NAMES as CIFAR_CLASSES
from demo.cifar import PREPROCESSING
from demo.folder import write_folder
from demo.run import publish_models
from demo.world import World
from offline import passes
from offline.contrast.config import ContrastConfig
from offline.contrast.evidence import evidence
from offline.images import Stream, open_folder, shuffled
from offline.progress import silent
from offline.trainers.contrast import train
from tests.data import real_data

LAYERS = ("layer3", "layer2")
WORLD = (("cnn", "stage3"), ("cnn", "stage2"), ("bcos", "stage3"), ("bcos", "stage2"), ("vit", "encoder.layers.relu"))
TRAINING_IMAGES, FIRST, IMAGES = 1400, 300_000, 1500
IMAGES_A_CLASS, SHIFTED = 60, 20
PUBLISHED = 0.25
KINDS: tuple[MapKind, ...] = ("activation", "contribution")


class Vectors(NamedTuple):
    """Of each class, by index."""

    strict: list[Tensor]
    published: list[Tensor]
    activations: list[Tensor]
    """Of the first images, as the layer has them."""


def main() -> None:
    """Learn every bank and measure it."""
    rows: list[measure.Row] = []
    notes: dict[str, Any] = {"cifar10": {}, "known concepts": {}}
    with tempfile.TemporaryDirectory() as folder:
        repository = Repository(Path(folder) / "cifar")
        spec = ModelSpec("resnet20", "demo.cifar:resnet20", PREPROCESSING, CIFAR_CLASSES, "")
        repository.publish_model(spec, load_file(real_data() / "cifar10" / "resnet20.safetensors"))
        for layer in LAYERS:
            on_cifar = cifar(repository, layer)
            notes["cifar10"][layer] = on_cifar
            rows += compared(layer, on_cifar)
            print(layer, on_cifar, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        images, root = write_folder(Path(folder) / "images", "train", TRAINING_IMAGES), Path(folder) / "world"
        publish_models(root)
        for name, layer in WORLD:
            bank = learn(Repository(root), name, layer, images, 0.2)
            found: dict[str, Any] = {**bank.metrics["mean"], **localised(Repository(root).load_model(name), bank)}
            notes["known concepts"][f"{name}/{layer}"] = found
            rows.append(
                measure.row(
                    f"contrast_quality: share of positive contribution inside the dilated mask, {name} {layer}",
                    found["contribution"]["mean"],
                    "",
                    baseline="share of the image that the dilated mask is",
                    baseline_value=found["chance"],
                )
            )
            print(name, layer, found, flush=True)
    measure.publish("contrast_quality", rows, **notes)


def learn(repository: Repository, model: str, layer: str, images: Path, held_out: Path | float) -> Bank:
    """Learn a bank with the defaults, without prototypes."""
    config = ContrastConfig(
        model=model, layer=layer, images=images, held_out=held_out, exemplars=0, concepts=1, device="cpu"
    )
    return train(repository, config, silent).bank


def cifar(repository: Repository, layer: str) -> dict[str, dict[str, float]]:
    """Return what planes and separators reach on CIFAR-10 at a layer."""
    data = real_data() / "cifar10"
    bank = learn(repository, "resnet20", layer, data / "train", data / "test")
    model = repository.load_model("resnet20")
    cut, held = model.cut(layer), tables(bank)
    training, fresh = vectors(model, cut, data / "train", IMAGES_A_CLASS), vectors(model, cut, data / "test", 1000)
    pairs = [(i, j) for i in range(cut.n_classes) for j in range(i + 1, cut.n_classes)]
    first, second = torch.tensor(pairs).unbind(1)
    ours = list(zip(*held.planes.between(first, second), strict=True))
    torch.manual_seed(0)
    ways = {
        "planes": ours,
        "separators": separators(training.strict, pairs),
        "separators, published vectors": separators(training.published, pairs),
    }
    return {
        "bank": dict(bank.metrics["mean"]),
        **{
            name: {
                "accuracy": accuracy(fresh.strict, pairs, planes),
                "accuracy, published vectors": accuracy(fresh.published, pairs, planes),
                "training accuracy, published vectors": accuracy(training.published, pairs, planes),
                **swaps(cut, fresh.activations, pairs, planes, held.unit),
            }
            for name, planes in ways.items()
        },
    }


def compared(layer: str, found: dict[str, dict[str, float]]) -> Iterator[measure.Row]:
    """Yield ours beside the separators of the same vectors, and of the published ones."""
    for column, higher in (("accuracy", True), ("swap rate", True), ("median shift", False)):
        for way in ("separators", "separators, published vectors"):
            yield measure.row(
                f"contrast_quality: CIFAR-10 {layer}, held-out {column}",
                found["planes"][column],
                "" if higher else "mean norms",
                higher_is_better=higher,
                baseline=f"100 SGD steps a pair: {way}",
                baseline_value=found[way][column],
                target=1.0,
            )


@torch.no_grad()
def vectors(model: Model, cut: Cut, folder: Path, count: int) -> Vectors:
    """Return the vectors of images that are predicted as each class, at most ``count`` of them."""
    images, left = open_folder(folder), dict.fromkeys(range(cut.n_classes), count)
    found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for _, a in passes.activations(model, cut, Stream(images, shuffled(images.keys, 0), PREPROCESSING, 256, {})):
        targets = cut.head(a).argmax(1)
        spoken = evidence(cut, a, targets)
        parts = (cut.positions(a) * cut.positions(cut.head_gradient(a, targets)[1])).sum(2)
        loud = parts > PUBLISHED * parts.amax(1, keepdim=True)
        strict = spoken.speaking(ContrastConfig.model_fields["evidence"].default)
        for row in passes.take(targets.tolist(), left):
            mine = spoken.vectors[row]
            found[int(targets[row])].append((mine[strict[row]], mine[loud[row]], a[row : row + 1]))
    every = [list(zip(*found[target], strict=True)) for target in range(cut.n_classes)]
    return Vectors(
        [torch.cat(of[0]) for of in every],
        [torch.cat(of[1]) for of in every],
        [torch.cat(of[2][:SHIFTED]) for of in every],
    )


def accuracy(of: Sequence[Tensor], pairs: Sequence[tuple[int, int]], planes: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the share of vectors on their own side, mean over both sides and all pairs."""
    right = [
        ((sign * (of[side] @ normal + offset)) > 0).double().mean()
        for pair, (normal, offset) in zip(pairs, planes, strict=True)
        for side, sign in zip(pair, (1, -1), strict=True)
    ]
    return float(torch.stack(right).mean())


def swaps(
    cut: Cut,
    activations: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    planes: Sequence[tuple[Tensor, Tensor]],
    unit: float,
) -> dict[str, float]:
    """Shift images of both classes of every pair over the plane."""
    flips = []
    for pair, (normal, _) in zip(pairs, planes, strict=True):
        for (mine, other), sign in zip((pair, pair[::-1]), (1, -1), strict=True):
            a = activations[mine]
            towards = (sign * normal / normal.norm()).expand(len(a), -1)
            targets, others = (torch.full((len(a),), c) for c in (mine, other))
            flips.append(shift.search(cut, a, towards, targets, others, unit).flip)
    every = torch.cat(flips)
    turned = every[every.isfinite()]
    return {"swap rate": len(turned) / len(every), "median shift": float(turned.median())}


@torch.no_grad()
def localised(model: Model, bank: Bank) -> dict[str, Any]:
    """Return how much of the positive part of both maps lies where the attribute is that pairs differ in."""
    engine = ContrastEngine(model, bank)
    grid, options = engine.cut.layout.grid, ExplainOptions(maps=KINDS)
    found: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in KINDS}
    chance = []
    batch = World(0).sample(IMAGES, "heldout", FIRST)
    logits = torch.cat([model.module(model.inputs(views)) for views in np.array_split(batch.images, IMAGES // 100)])
    predicted, plain = logits.argmax(1).numpy(), ~batch.attributes[:, index_of(SPURIOUS)]
    for pair in PAIRS:
        sides = ((pair.first, pair.second, pair.first_attribute), (pair.second, pair.first, pair.second_attribute))
        for mine, other, attribute in sides:
            target, against = CLASS_NAMES.index(mine), CLASS_NAMES.index(other)
            present = batch.attributes[:, index_of(attribute)]
            rows = np.flatnonzero((predicted == target) & plain & present)
            answers = engine.contrast(
                batch.images[rows], [ContrastRequest(target, against, options, False)] * len(rows)
            )
            masks = dilated(batch.masks[rows, index_of(attribute)], grid)
            chance.append(float(masks.double().mean()))
            family = "with the spurious class" if SPURIOUS_CLASS in (mine, other) else pair.family
            for kind in KINDS:
                maps = np.stack([a.maps[kind].values for a in answers if isinstance(a, Contrast)]).clip(0)
                inside = (maps * masks.numpy()).sum((1, 2)) / maps.sum((1, 2)).clip(1e-12)
                found[kind][family].append(float(inside.mean()))
    result: dict[str, Any] = {"chance": float(np.mean(chance))}
    for name, families in found.items():
        every = [share for family, shares in families.items() if "spurious" not in family for share in shares]
        means = {family: float(np.mean(shares)) for family, shares in families.items()}
        result[name] = {"mean": float(np.mean(every)), **means}
    return result


def dilated(masks: np.ndarray[Any, np.dtype[np.bool_]], grid: tuple[int, int]) -> Tensor:
    """Return which cells hold a pixel of the masks ``[N, height, width]``, or lie beside one that does."""
    cells = functional.adaptive_max_pool2d(torch.from_numpy(masks).float().unsqueeze(1), grid)
    return functional.max_pool2d(cells, 3, 1, 1).squeeze(1) > 0


if __name__ == "__main__":
    main()
