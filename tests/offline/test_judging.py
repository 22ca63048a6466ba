"""Judging banks without classes, against sums done by hand in float64, image by image."""

from __future__ import annotations

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from concepts.codec import EMPTY, Codes, SparseCodes
from concepts.kinds.sae import SaeCodec
from concepts.layout import Layout
from concepts.model import Model, ModelSpec
from concepts.preprocessing import Preprocessing
from offline import passes
from offline.encoders import Encoder
from offline.images import Stream, open_folder
from offline.judging import CURVE, Consistency, Judgement, judge
from offline.passes import Explained
from offline.sae.dictionary import Dictionary
from tests.offline.sae.memory import dense_codes

SIDE, CHANNELS, CLASSES, IMAGES = 16, 10, 5, 30
BLACK = "07.png"
"""An image that excites nothing."""


class _Net(nn.Module):
    """Sixteen positions, and a head that bends."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, CHANNELS, 4, 4, bias=False), nn.ReLU())
        self.bend = nn.Sequential(nn.Conv2d(CHANNELS, 12, 1), nn.Tanh())
        self.linear = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.linear(self.bend(self.layer(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    module = _Net().eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter *= 4
    names = tuple("abcde")
    return Model(ModelSpec("m", "demo.none:none", Preprocessing(SIDE, SIDE), names, ""), module, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("judging")
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        # Some are plain in most places, and excite few concepts.
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        pixels[: int(random.integers(0, SIDE))] = 0
        name = f"{number:02d}.png"
        Image.fromarray(pixels * (name != BLACK)).save(root / name)
    return open_folder(root)


def dictionary(latents: int, k: int) -> Dictionary:
    generator = torch.Generator().manual_seed(latents)
    encoder, decoder = (torch.randn(latents, CHANNELS, generator=generator) for _ in range(2))
    return Dictionary(encoder, functional.normalize(decoder, dim=1), k=k)


def explained(model, folder, bank: Dictionary, batch_size: int, quota: dict[int, int] | None = None):
    codec = SaeCodec(bank.encoder, bank.decoder, bank.k)
    stream = Stream(folder, folder.keys, model.spec.preprocessing, batch_size)
    everything = dict.fromkeys(range(CLASSES), IMAGES)
    return codec, passes.explain(model, model.cut("layer"), codec, stream, quota or everything)


def seen(model, folder, bank: Dictionary, batch_size: int) -> Judgement:
    codec, images = explained(model, folder, bank, batch_size)
    return judge(model.cut("layer"), codec, len(bank.encoder), images)


def by_hand(model, folder, bank: Dictionary) -> dict[str, np.ndarray]:
    """Return what is to be summed, image by image, from the whole network in float64 and dense codes."""
    net = copy.deepcopy(model.module).double()
    bank = Dictionary(bank.encoder.double(), bank.decoder.double(), k=bank.k)
    rows: dict[str, list[np.ndarray]] = {}

    def head(positions: torch.Tensor) -> torch.Tensor:
        return net.linear(net.bend(positions.T.view(1, CHANNELS, 4, 4)).mean((2, 3)))[0]

    for key in folder.keys:
        x = torch.from_numpy(np.asarray(folder.open(key)).copy()).permute(2, 0, 1)[None].double() / 255
        a = net.layer(x)[0].flatten(1).T.clone().requires_grad_()
        logits = head(a)
        target = int(logits.argmax())
        logits[target].backward()
        a, gradient = a.detach(), a.grad
        codes = dense_codes(bank, a)
        reconstruction = codes @ bank.decoder
        contributions = (codes * (gradient @ bank.decoder.T)).sum(0)
        active = (codes > 0).sum(0)
        order = [k for k in contributions.argsort(descending=True, stable=True).tolist() if active[k]]
        kept = []
        for chosen in (
            *(set(order[i:]) for i in range(CURVE + 1)),
            *(set(order[:i]) for i in range(CURVE + 1)),
        ):
            mask = torch.tensor([k in chosen for k in range(len(bank.encoder))])
            kept.append(int(head((codes * mask) @ bank.decoder).argmax()) == target)
        positive, needed = sorted((c for c in contributions.tolist() if c > 0), reverse=True), 0
        while sum(positive[:needed]) < 0.8 * sum(positive) - 1e-12:
            needed += 1
        found = {
            "a": a,
            "reconstruction": reconstruction,
            "logits": logits.detach(),
            "reconstructed": head(reconstruction),
            "contributions": contributions,
            "active": active,
            "kept": np.array(kept, float),
            "largest": np.array(order[0] if order else EMPTY),
            "needed": np.array(needed),
        }
        for name, value in found.items():
            rows.setdefault(name, []).append(np.asarray(value))
    return {name: np.stack(values) for name, values in rows.items()}


def gini(values: np.ndarray) -> float:
    """Return the mean absolute difference of pairs, over twice the mean."""
    return float(np.abs(values[:, None] - values[None]).mean() / (2 * values.mean()))


SIZES = [(120, 8), (12, 2), (3, 1)]
"""More concepts an image than are taken away, about as many, and fewer."""
LABELS = torch.from_numpy(np.random.default_rng(1).integers(0, CLASSES, IMAGES))


@pytest.mark.parametrize(("latents", "k"), SIZES)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_metric_is_what_a_plain_reference_finds(model, folder, latents, k, batch_size):
    bank = dictionary(latents, k)
    found = seen(model, folder, bank, batch_size).metrics(bank.decoder, LABELS)
    r = by_hand(model, folder, bank)
    a, error = r["a"].reshape(-1, CHANNELS), (r["a"] - r["reconstruction"]).reshape(-1, CHANNELS)
    p, q = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (r["logits"], r["reconstructed"]))
    predicted, reconstructed = r["logits"].argmax(1), r["reconstructed"].argmax(1)
    curve, positions = r["kept"].mean(0), 16
    deletion, insertion = curve[: CURVE + 1], curve[CURVE + 1 :]
    share = (r["active"] > 0).mean(0)
    whole = {}
    if latents < CURVE:  # all of them, one by one
        deletion_, insertion_ = deletion[: latents + 1], insertion[: latents + 1]
        whole["deletion_aopc"] = (deletion_[0] - deletion_).sum() / (latents + 2)
        whole["insertion_auc"] = ((insertion_[1:] + insertion_[:-1]) / 2).sum() / latents
    d = bank.decoder.double().numpy()
    cosines = d @ d.T - 2 * np.eye(latents)
    expected = {
        "images": IMAGES,
        "relative_error": math.sqrt((error**2).sum() / (a**2).sum()),
        "mse": (error**2).mean(),
        "variance_explained": 1 - (error**2).sum() / ((a - a.mean(0)) ** 2).sum(),
        "kl": (p * np.log(p / q)).sum(1).mean(),
        "top1_agreement": (predicted == reconstructed).mean(),
        "accuracy": (predicted == LABELS.numpy()).mean(),
        "accuracy_reconstructed": (reconstructed == LABELS.numpy()).mean(),
        "deletion_aopc_25": (deletion[0] - deletion).sum() / 27,
        "insertion_auc_25": ((insertion[1:] + insertion[:-1]) / 2).sum() / 25,
        **whole,
        "gini": gini(np.abs(r["contributions"]).sum(0)),
        "code_density": r["active"].sum() / (IMAGES * positions * latents),
        "l0_position": r["active"].sum() / (IMAGES * positions),
        "l0_image": (r["active"] > 0).sum(1).mean(),
        "concepts_for_80": r["needed"].mean(),
        "alive_share": (share > 0).mean(),
        "dead_share": (share == 0).mean(),
        "always_on_share": (share > 0.85).mean(),
        "hoyer": ((CHANNELS**0.5 - np.abs(d).sum(1) / np.linalg.norm(d, axis=1)) / (CHANNELS**0.5 - 1)).mean(),
        "largest_cosine": cosines.max(),
    }
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_sizes_are_what_they_are_there_for(model, folder):
    """Images of one batch have more, and fewer, concepts than are taken away, and some speak against their class."""
    slots = [(by_hand(model, folder, dictionary(*size))["active"] > 0).sum(1) for size in SIZES]
    assert slots[0].max() > CURVE
    assert 0 == slots[0].min() < slots[0].max()
    assert slots[1].max() <= 12
    assert (by_hand(model, folder, dictionary(*SIZES[1]))["contributions"] < 0).any()


@pytest.mark.parametrize(("latents", "k"), SIZES)
def test_statistics_of_concepts_are_what_a_plain_reference_finds(model, folder, latents, k):
    bank = dictionary(latents, k)
    judgement = seen(model, folder, bank, 7)
    found, unlabelled, r = judgement.statistics(LABELS), judgement.statistics(None), by_hand(model, folder, bank)
    right = r["logits"].argmax(1) == LABELS.numpy()
    for concept in range(latents):
        decided = r["largest"] == concept
        expected = {
            "active_share": (r["active"][:, concept] > 0).mean(),
            "contribution": r["contributions"][:, concept].mean(),
            "importance": np.abs(r["contributions"][:, concept]).mean(),
            "prevalence": decided.mean(),
        }
        assert unlabelled[concept] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        if decided.any():
            expected["reliability"] = right[decided].mean()
        assert found[concept] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # The black image is decided by none.
    assert sum(row["prevalence"] for row in found) == pytest.approx(1 - (r["largest"] == EMPTY).mean())
    assert (r["largest"] == EMPTY).sum() >= 1
    assert all(0 <= row["reliability"] <= 1 for row in found if "reliability" in row)


def test_without_labels_nothing_is_said_of_accuracy(model, folder):
    bank = dictionary(12, 2)
    judgement = seen(model, folder, bank, 7)
    with_labels, without = judgement.metrics(bank.decoder, LABELS), judgement.metrics(bank.decoder, None)
    assert with_labels.keys() - without.keys() == {"accuracy", "accuracy_reconstructed"}
    assert without.items() <= with_labels.items()


def test_images_that_excite_nothing_can_be_judged_alone(model, folder):
    alone = open_folder(folder.root)
    alone = type(alone)(alone.root, (BLACK,))
    bank = dictionary(12, 2)
    judgement = seen(model, alone, bank, 7)
    found = judgement.metrics(bank.decoder, None)
    # Without any activation there is no relative error, and no variance to explain.
    assert {"relative_error", "variance_explained"}.isdisjoint(found)
    assert found["dead_share"] == found["top1_agreement"] == 1
    assert found["l0_image"] == found["concepts_for_80"] == found["gini"] == 0
    assert all(map(math.isfinite, found.values()))
    nothing = dict.fromkeys(("active_share", "contribution", "importance", "prevalence"), 0)
    assert judgement.statistics(torch.zeros(1, dtype=torch.int64)) == [nothing] * 12


def test_each_class_has_its_share_of_images(model, folder):
    bank = dictionary(12, 2)
    codec, images = explained(model, folder, bank, 7)
    predictions = Counter(torch.cat([batch.targets for batch in images]).tolist())
    quota = {target: 1 + place for place, target in enumerate(predictions)}
    codec, images = explained(model, folder, bank, 7, quota)
    judgement = judge(model.cut("layer"), codec, 12, images)
    assert Counter(torch.cat(judgement.predicted).tolist()) == Counter(
        {target: min(count, predictions[target]) for target, count in quota.items()}
    )


# Consistency


GRID = Layout("btc", 4, (2, 2), 1)
"""A token without a place, and four cells."""


def batch(values: torch.Tensor, ids: torch.Tensor, views: np.ndarray) -> Explained:
    """Return images of which only codes and views matter."""
    nothing = torch.zeros(len(values), 1)
    codes: Codes = SparseCodes.of(values, ids)
    keys = [str(row) for row in range(len(values))]
    return Explained(keys, views, nothing, nothing, nothing, nothing[:, 0].long(), codes, nothing)


def pixels() -> Encoder:
    """Return an encoder that sees colours: each pixel of a view of 2×2 is a feature."""
    return Encoder("pixels", Preprocessing(2, 2), lambda x: x, torch.device("cpu"))


def test_scores_are_those_of_a_case_done_by_hand():
    random = np.random.default_rng(0)
    count, k, concepts, cap = 9, 2, 3, 8
    views = random.integers(0, 256, (count, 2, 2, 3), np.uint8)
    values = torch.from_numpy(random.random((count, GRID.positions, k)).astype(np.float32))
    ids = torch.from_numpy(random.permuted(np.tile(np.arange(concepts), (count, GRID.positions, 1)), axis=2)[..., :k])
    values[1:, :, :][ids[1:] == 2] = 0  # concept 2 is active in one image alone
    looks = Consistency(pixels(), GRID, cap)
    for rows in (slice(0, 5), slice(5, count)):
        looks.add(batch(values[rows], ids[rows], views[rows]))
    found = looks.scores([0, 1, 2], seed=5)
    assert set(found) == {0, 1}
    assert looks.scores([]) == looks.scores([2, 77]) == {}

    features = views[:cap].reshape(cap, 4, 3) / 255.0
    mean = features.mean((0, 1))
    generator = torch.Generator().manual_seed(5)
    for concept in (0, 1):
        maps = (values * (ids == concept)).sum(2).double().numpy()[:cap, 1:]  # the token has no place
        weights, order = maps.sum(1), np.argsort(-maps.sum(1), kind="stable")
        order = [row for row in order if weights[row] > 0]
        elsewhere = torch.randperm(cap, generator=generator)[: 4 * len(order)].tolist()
        scores = []
        for places in (order, elsewhere):
            laid = [order[place % len(order)] for place in range(len(places))]
            regions = [
                sum(maps[row, cell] * features[place, cell] for cell in range(4)) / weights[row] - mean
                for row, place in zip(laid, places, strict=True)
            ]
            above = below = 0.0
            for i in range(len(laid)):
                for j in range(i):
                    weight = weights[laid[i]] * weights[laid[j]]
                    cosine = regions[i] @ regions[j] / np.linalg.norm(regions[i]) / np.linalg.norm(regions[j])
                    above, below = above + weight * cosine, below + weight
            scores.append(above / below)
        assert found[concept] == pytest.approx(scores[0] - scores[1], abs=1e-5)


def test_a_concept_that_sees_one_thing_scores_above_one_that_sees_anything():
    random = np.random.default_rng(1)
    count = 60
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)
    shown = random.permuted(np.tile(np.arange(4), (count, 1)), axis=1)  # four colours in each view, anywhere
    views = colours[shown].reshape(count, 2, 2, 3)
    values = torch.zeros(count, GRID.positions, 2)
    for row in range(count):
        values[row, 1 + int((shown[row] == 0).argmax()), 0] = 1 + float(random.random())  # red, wherever it is
        values[row, 1 + int(random.integers(4)), 1] = 1 + float(random.random())  # anything
    looks = Consistency(pixels(), GRID, 1000)
    looks.add(batch(values, torch.tensor([0, 1]).expand(count, GRID.positions, 2), views))
    found = looks.scores([0, 1])
    assert found[0] > 0.8
    assert abs(found[1]) < 0.15


def test_what_looks_alike_everywhere_is_no_merit_of_a_concept():
    """In a folder of two kinds of images alone, the baseline is as high for a concept that sees anything."""
    views = np.tile(np.array([200, 10, 10], np.uint8), (12, 2, 2, 1))
    views[:6] = [10, 10, 200]
    looks = Consistency(pixels(), GRID, 1000)
    looks.add(batch(torch.ones(12, GRID.positions, 1), torch.zeros(12, GRID.positions, 1, dtype=torch.int64), views))
    # All twelve images are its own, and drawn at random: their order alone may differ.
    assert looks.scores([0])[0] == pytest.approx(0, abs=1e-6)
