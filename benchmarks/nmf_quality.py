"""Quality of concepts of each class: plain NMF, CRAFT, FACE and prototypes, on CIFAR-10 (ResNet-20, layer3, rank 10).

The images are those that the model is right about, as in FACE's own protocol, which all columns of the published code
were measured with: crops of 16 pixels as they are, their mean activations for the train columns, the mean activation of
each whole held-out image for the test columns. ``pooled`` columns follow it, but for the codes: non-negative least
squares where theirs are pseudo-inverse. ``served`` columns are of the codes that the service gives, at every position.
``python -m benchmarks.nmf_quality cat ship truck`` measures some classes alone.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import measure
from concepts import nnls
from concepts.bank import Bank
from concepts.cut import Cut
from concepts.model import Model, ModelSpec
from concepts.repository import Repository
from demo.cifar import CLASS_NAMES, PREPROCESSING
from offline import passes, sobol
from offline.crops import CropGrid
from offline.images import Stream, open_folder
from offline.metrics import curves, fidelity, sparsity
from offline.progress import silent
from offline.trainers import trainers
from tests.data import real_data

MODEL, LAYER, RANK, PATCH = "cifar-resnet20", "layer3", 10, 16


class Way(NamedTuple):
    """A way to learn concepts."""

    trainer: str
    settings: dict[str, Any]


FREE = "FACE, free codes"
"""FACE's own problem, in which codes know the prediction; its ``fitted`` columns are of these codes."""

WAYS = {
    "plain NMF": Way("face", {"patch_size": PREPROCESSING.width, "variant": "spatial", "lambda_": 0}),
    "CRAFT": Way("craft", {"patch_size": PATCH}),
    "FACE": Way("face", {"patch_size": PATCH, "max_error_increase": 0.07}),
    "FACE, pooled": Way("face", {"patch_size": PATCH, "max_error_increase": 0.07, "variant": "pooled"}),
    FREE: Way(
        "face",
        {"patch_size": PATCH, "max_error_increase": 0.07, "variant": "pooled", "codes": "free", "focus": 0}
        | {"fit_crops": 10**6, "stability_folds": 0},
    ),
    "prototypes": Way("prototypes", {}),
}
"""``plain NMF`` is of all positions of whole images: FACE that gives predictions no weight."""

PUBLISHED = {
    "cat": (0.221, 0.814, 0.0669, 0.0747, 0.722, 1.000, 0.891),
    "ship": (0.176, 0.614, 0.0534, 0.0138, 0.832, 0.950, 0.895),
    "truck": (0.210, 0.709, 0.0586, 0.0103, 0.820, 0.950, 0.892),
}
"""What the code of FACE's authors gives with its own settings, by ``COLUMNS``; the last by Jansen's estimator."""
COLUMNS = ("train mse", "train kl", "test mse", "test kl", "deletion aopc", "insertion auc", "gini")
HIGHER = {"deletion aopc", "insertion auc", "gini", "stability"}
SERVED = dict(zip(COLUMNS[2:], ("mse", "kl", "deletion_aopc", "insertion_auc", "gini"), strict=True))
KEPT = ("error_increase", "training_mse", "training_kl", "plain_mse", "plain_kl", "lambda")


def main(classes: Sequence[str]) -> None:
    """Learn every bank and measure it."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        repository = Repository(root / "repository")
        spec = ModelSpec(MODEL, "demo.cifar:resnet20", PREPROCESSING, CLASS_NAMES, "")
        repository.publish_model(spec, load_file(real_data() / "cifar10" / "resnet20.safetensors"))
        model = repository.load_model(MODEL)
        for split in ("train", "test"):
            copy_right(model, split, root / split, classes)
        ways = {trainer.name: trainer for trainer in trainers()}
        for label, way in WAYS.items():
            settings = {"model": MODEL, "layer": LAYER, "images": root / "train", "held_out": root / "test"}
            settings |= {
                "classes": tuple(classes),
                "concepts": RANK,
                "exemplars": 0,
                "device": "cpu",
                **way.settings,
            }
            settings["name"] = label.replace(",", "").replace(" ", "-")
            trainer = ways[way.trainer]
            bank = trainer.train(repository, trainer.config(**settings), silent).bank
            found[label] = columns(model, bank, root, classes)
            print(label, {name: values["served test kl"] for name, values in found[label].items()}, flush=True)
    publish(found, classes)


def copy_right(model: Model, split: str, target: Path, classes: Sequence[str]) -> None:
    """Copy the images that the model is right about."""
    folder = open_folder(real_data() / "cifar10" / split)
    keys = [key for key in folder.keys if folder.label(key) in classes]
    for name in classes:
        (target / name).mkdir(parents=True)
    for batch in Stream(folder, keys, model.spec.preprocessing, 256, {}):
        for key, predicted in zip(batch.keys, passes.predictions(model, batch), strict=True):
            if folder.label(key) == CLASS_NAMES[predicted]:
                shutil.copy(real_data() / "cifar10" / split / key, target / key)


def columns(model: Model, bank: Bank, root: Path, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return all columns of each class's concepts."""
    cut, result = model.cut(LAYER), {}
    for name in classes:
        target = CLASS_NAMES.index(name)
        mine = [concept.id for concept in bank.concepts if concept.class_index == target]
        dictionary, known = bank.tensors["dictionary"][mine].double(), bank.metrics["classes"][name]
        crops, images = (pooled(model, cut, root / split, name, split == "train") for split in ("train", "test"))
        train = of_codes(cut, crops, dictionary, target)
        values = {f"pooled {column}": train[column.replace("train", "test")] for column in COLUMNS[:2]}
        test = of_codes(cut, images, dictionary, target)
        values |= {f"pooled {column}": test[column] for column in COLUMNS[2:]}
        values |= {f"served {column}": known[key] for column, key in SERVED.items()}
        values |= {key.replace("_", " "): known[key] for key in ("stability", *KEPT) if key in known}
        if bank.configuration.get("codes") == "free":
            values |= {"fitted train mse": known["training_mse"], "fitted train kl": known["training_kl"]}
        result[name] = values
    return result


def pooled(model: Model, cut: Cut, folder: Path, name: str, in_crops: bool) -> Tensor:
    """Return mean activations ``[N, C]`` of a class's images, or of their crops."""
    images, grid = open_folder(folder), CropGrid.of(model.spec.preprocessing, PATCH, enlarge=False)
    keys, found = [key for key in images.keys if images.label(key) == name], []
    for batch in Stream(images, keys, model.spec.preprocessing, 256, {}):
        inputs = model.inputs(batch.views)
        found.append(cut.positions(cut.trunk(grid.crops(inputs) if in_crops else inputs)).mean(1).double())
    return torch.cat(found)


def of_codes(cut: Cut, vectors: Tensor, dictionary: Tensor, target: int) -> dict[str, float]:
    """Return the columns by least-squares codes of vectors ``[N, C]``, each laid at every position."""
    codes = nnls.codes(vectors.unsqueeze(0), dictionary.unsqueeze(0))[0]

    def head(rows: Tensor) -> Tensor:
        return cut.head(cut.unpositions(rows.float().unsqueeze(1).expand(-1, cut.layout.positions, -1)))

    gradient = cut.positions(cut.affine_gradient(torch.tensor([target])))[0].sum(0).double()
    importance = sobol.closed_form(codes * (dictionary @ gradient)).mean(0)
    with torch.no_grad():
        kl = fidelity.kl_divergence(head(vectors), head(codes @ dictionary)).mean()
        kept = []
        deletion = curves.deletion_masks(importance.unsqueeze(0), len(dictionary))[0]
        for masks in (deletion, 1 - deletion):
            right = [(head((codes * mask) @ dictionary).argmax(1) == target).double().mean() for mask in masks]
            kept.append(torch.stack(right))
    return {
        "test mse": float((vectors - codes @ dictionary).square().mean()),
        "test kl": float(kl),
        "deletion aopc": curves.deletion_aopc(kept[0]),
        "insertion auc": curves.insertion_auc(kept[1]),
        "gini": sparsity.gini(importance),
    }


def publish(found: dict[str, dict[str, dict[str, float]]], classes: Sequence[str]) -> None:
    """Compare every number with the published code's, and record the means over classes."""
    rows = []
    for label, by_class in found.items():
        for name in set(classes) & set(PUBLISHED):
            for codes in ("pooled", "served", "fitted"):
                for column, theirs in zip(COLUMNS, PUBLISHED[name], strict=True):
                    value = by_class[name].get(f"{codes} {column}")
                    if value is not None:
                        title = f"nmf_quality: {label}, {name}, {codes} {column}"
                        better = column in HIGHER
                        kind = "nat" if column.endswith("kl") else ""
                        rows.append(
                            measure.row(
                                title, value, kind, baseline="FACE's authors' code", baseline_value=theirs,
                                higher_is_better=better, target=1.0,
                            )
                        )  # fmt: skip
    mean = {label: averaged(list(by_class.values())) for label, by_class in found.items()}
    measure.publish("nmf_quality", sorted(rows, key=lambda row: row.name), classes=found, mean=mean)


def averaged(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of every column that all rows have."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if all(name in row for row in rows)}


if __name__ == "__main__":
    main(sys.argv[1:] or CLASS_NAMES)
