"""Labels that are wrong unless counterfactuals tell a concept from what accompanies it.

Four latents of a bank, of known meaning: probes of one attribute at a layer of the demo's model. The images that are
their exemplars have something else in common, too, which is nothing to the latents.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from concepts.bank import Bank, Concept
from concepts.preprocessing import Box
from concepts.repository import Repository
from demo.attributes import SPURIOUS, index_of
from demo.folder import read_truth
from offline.exemplars import Excerpt, draw
from offline.images import open_folder
from offline.naming.label import LabelConfig, label
from offline.progress import silent
from tests.offline.naming.conftest import CLIP

LAYER, GRID, EXEMPLARS = "stage1", (32, 32), 6
PLANTED = (("red", "bricks"), ("red", "night"), ("red", "sand"), ("bricks", "blue"))
"""What each latent means, and what its exemplars have in common beside that."""


def probe(a: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """Return weights and bias of the ridge regression that tells which positions ``[n, P, C]`` show an attribute."""
    x = a.flatten(0, 1).double()
    y = (functional.adaptive_avg_pool2d(mask.float(), GRID).flatten() > 0.5).double()
    mean = x.mean(0)
    gram = (x - mean).T @ (x - mean) / len(x) + 1e-3 * torch.eye(x.shape[1])
    w = torch.linalg.solve(gram, (x - mean).T @ (y - y.mean()) / len(x))
    return w.float(), float(y.mean() - mean @ w)


@pytest.fixture(scope="module")
def planted(place: Path) -> Bank:
    files, folder = Repository(place / "repository"), open_folder(place / "images" / "train")
    truth, model = read_truth(place / "images" / "train"), files.load_model("cnn")
    cut = model.cut(LAYER)
    views = np.stack([np.asarray(folder.open(key)) for key in truth.files])
    a = torch.cat([cut.positions(cut.trunk(model.inputs(some))) for some in np.array_split(views, 4)])
    probes = [probe(a, torch.from_numpy(truth.masks[:, index_of(meaning)])) for meaning, _ in PLANTED]
    encoder = torch.stack([w for w, _ in probes])
    tensors = {
        "encoder": encoder,
        "decoder": encoder.clone(),
        "encoder_bias": torch.tensor([bias for _, bias in probes]),
        "threshold": torch.full((len(PLANTED),), 0.5),
    }
    shown, hidden = truth.attributes, truth.attributes[:, index_of(SPURIOUS)]
    chosen = []
    for both in PLANTED:
        images = np.flatnonzero(shown[:, [index_of(name) for name in both]].all(1) & ~hidden)[:EXEMPLARS]
        chosen.append([Excerpt(truth.files[image], Box(12, 12, 52, 52), 1.0) for image in images])
    drawn = draw(folder, chosen)
    concepts = tuple(Concept(index, exemplars=own) for index, own in enumerate(drawn.exemplars))
    bank = Bank("sae", "cnn", LAYER, "planted", model.spec.weights_digest, a.shape[2], concepts, tensors)
    return files.publish(bank, drawn.pictures)


def labels(place: Path, bank: Bank, **changes: object) -> Bank:
    config = {"clip": CLIP, "vocabulary": place / "vocabulary", "device": "cpu"} | changes
    return label(
        Repository(place / "repository"), f"{bank.reference}@{bank.digest}", LabelConfig(**config), silent
    ).bank


def test_exemplars_alone_name_what_accompanies_concepts_and_the_labels_are_weak(place: Path, planted: Bank) -> None:
    bank = labels(place, planted, counterfactuals=0)
    assert [concept.label for concept in bank.concepts] == [companion for _, companion in PLANTED]
    assert all(concept.weak for concept in bank.concepts)


@pytest.mark.parametrize("seed", [0, 1])
def test_counterfactuals_name_the_concepts(place: Path, planted: Bank, seed: int) -> None:
    images = place / "images" / "train"
    bank, truth = labels(place, planted, images=images, probe_images=300, seed=seed), read_truth(images)
    assert [concept.label for concept in bank.concepts] == [meaning for meaning, _ in PLANTED]
    assert not any(concept.weak for concept in bank.concepts)
    rows = {key: row for row, key in enumerate(truth.files)}
    for concept, (meaning, companion) in zip(bank.concepts, PLANTED, strict=True):
        shown = truth.attributes[[rows[each.source] for each in concept.counterfactuals]]
        assert len(shown) == 10
        assert not shown[:, index_of(meaning)].any()
        assert shown[:, index_of(companion)].mean() >= 0.7


def test_captions_are_misled_and_then_not_as_well(place: Path, planted: Bank) -> None:
    """The published scores, which go by captions, see both; counterfactuals take the companion away."""
    without = labels(place, planted, counterfactuals=0, scoring="captions")
    with_ = labels(place, planted, images=place / "images" / "train", scoring="captions")
    for concept, other, (meaning, companion) in zip(without.concepts, with_.concepts, PLANTED, strict=True):
        assert companion in concept.words
        assert meaning in other.words
        assert companion not in other.words
