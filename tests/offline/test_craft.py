"""CRAFT banks on real images: what is published, what is skipped, what is refused."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from concepts.cut import Cut
from concepts.engine import Engine
from concepts.errors import InvalidInput, NotTrainable, UnknownClass
from concepts.explanation import EngineRequest
from concepts.kinds.nmf import NmfCodec
from offline import sobol
from offline.images import open_folder
from offline.importance import total_indices
from offline.passes import Explained, masked_targets
from offline.progress import silent
from offline.trainers.craft import CraftConfig, train
from tests.offline.worlds import MODEL, add_bcos, repository, some_images

COUNTS = {"ship": 60, "truck": 60, "frog": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images, some of them broken, and held-out ones."""
    root = tmp_path_factory.mktemp("craft")
    training = some_images(root / "train", "train", COUNTS)
    some_images(root / "test", "test", {"ship": 30, "truck": 30})
    (training / "ship" / "broken.jpg").write_bytes(b"no picture")
    (training / "truck" / "cut.jpg").write_bytes((training / "truck" / "0000.jpg").read_bytes()[:300])
    return root


def config(place, **changes) -> CraftConfig:
    base = {
        "model": MODEL,
        "layer": "layer3",
        "images": place / "train",
        "held_out": place / "test",
        "classes": ("truck", "ship", "frog"),
        "concepts": 6,
        "stability_folds": 3,
        "exemplars": 3,
        "device": "cpu",
    }
    return CraftConfig(**(base | changes))


@pytest.fixture(scope="module")
def trained(place):
    files = repository(place / "repository")
    return files, train(files, config(place), silent)


def test_bank_holds_the_concepts_of_all_classes_that_could_be_learned(trained):
    files, outcome = trained
    bank = files.load(files.resolve(f"{MODEL}/layer3/craft"))
    assert bank.digest == outcome.bank.digest
    assert [concept.class_index for concept in bank.concepts] == [8] * 6 + [9] * 6
    assert bank.tensors["dictionary"].shape == (12, 64)
    assert list(outcome.skipped_classes) == ["frog"]
    assert "of 10 needed" in outcome.skipped_classes["frog"]
    assert set(outcome.skipped_images) == {"ship/broken.jpg", "truck/cut.jpg"}


def test_concepts_come_in_order_of_importance_and_it_adds_up(trained):
    _, outcome = trained
    for first in (0, 6):
        importance = [concept.statistics["importance"] for concept in outcome.bank.concepts[first : first + 6]]
        assert importance == sorted(importance, reverse=True)
        assert sum(importance) == pytest.approx(1, abs=1e-6)  # the head is affine: closed form


def test_metrics_are_of_held_out_images_and_sane(trained):
    _, outcome = trained
    for name in ("ship", "truck"):
        metrics = outcome.bank.metrics["classes"][name]
        assert 15 <= metrics["images"] <= 35
        assert metrics["top1_agreement"] > 0.9
        assert 0 < metrics["relative_error"] < 0.7
        assert 0 < metrics["stability"] <= 1
        assert metrics["projected_gradient"] <= 1e-4
        assert metrics["insertion_auc"] > 0.7
        assert metrics["deletion_aopc"] > 0.3
    json.dumps(outcome.bank.metrics, allow_nan=False)


def test_exemplars_are_the_pixels_of_their_boxes(trained, place):
    files, outcome = trained
    folder = open_folder(place / "train")
    version = files.resolve(outcome.bank.reference)
    for concept in outcome.bank.concepts:
        sources = [exemplar.source for exemplar in concept.exemplars]
        assert len(set(sources)) == len(sources) == 3
        activations = [exemplar.activation for exemplar in concept.exemplars]
        assert activations == sorted(activations, reverse=True)
        exemplar = concept.exemplars[0]
        left, top, right, bottom = (int(edge) for edge in exemplar.box)
        expected = np.asarray(folder.open(exemplar.source))[top:bottom, left:right]
        picture = Image.open(io.BytesIO(files.picture(version, exemplar)))
        assert picture.format == "WEBP"
        assert np.array_equal(np.asarray(picture.convert("RGB")), expected)


def test_exemplar_activation_is_what_the_bank_gives_its_crop(trained, place):
    files, outcome = trained
    model = files.load_model(MODEL)
    cut = model.cut("layer3")
    concept = outcome.bank.concepts[6]
    exemplar = concept.exemplars[0]
    left, top, right, bottom = (int(edge) for edge in exemplar.box)
    view = np.asarray(open_folder(place / "train").open(exemplar.source))[top:bottom, left:right]
    pooled = cut.positions(cut.trunk(model.inputs(view[None].copy()))).mean(1, keepdim=True)
    codes = outcome.bank.codec().encode(pooled, torch.tensor([concept.class_index]))
    # The factorisation's own codes are those of least squares, as far as it converged.
    assert float(codes.values[0, 0, 0]) == pytest.approx(exemplar.activation, rel=1e-2)


def test_the_engine_explains_with_the_bank(trained, place):
    files, outcome = trained
    folder = open_folder(place / "test")
    engine = Engine(files.load_model(MODEL), outcome.bank)
    views = np.stack([np.asarray(folder.open(key)) for key in folder.keys[:4]])
    for explanation in engine.explain(views, [EngineRequest(target=8)] * 4):
        assert abs(explanation.faithfulness.completeness_residual) < 1e-3


def test_same_seed_same_digest_wherever_the_images_lie(place, trained, tmp_path):
    _, outcome = trained
    some_images(tmp_path / "elsewhere" / "train", "train", COUNTS)
    some_images(tmp_path / "elsewhere" / "test", "test", {"ship": 30, "truck": 30})
    again = train(repository(tmp_path / "r"), config(tmp_path / "elsewhere"), silent)
    assert again.bank.digest == outcome.bank.digest
    other = train(repository(tmp_path / "r"), config(tmp_path / "elsewhere", seed=1), silent)
    assert other.bank.digest != outcome.bank.digest
    assert str(tmp_path) not in json.dumps(dict(again.bank.configuration))


def test_nothing_is_published_when_no_class_can_be_learned(place, tmp_path):
    files = repository(tmp_path)
    with pytest.raises(NotTrainable, match=r"frog: only \d training images"):
        train(files, config(place, classes=("frog",)), silent)
    assert files.banks() == []


def test_negative_activations_are_refused_with_what_is_possible(place, tmp_path):
    files = repository(tmp_path)
    name = add_bcos(files)
    with pytest.raises(NotTrainable, match=r"can be negative.*sae"):
        train(files, config(place, model=name), silent)
    with pytest.raises(NotTrainable, match=r"non-negative layers: .*layer3"):
        train(files, config(place, layer="bn1"), silent)
    assert files.banks() == []


def test_requests_that_do_not_fit_are_refused(place, trained):
    files, _ = trained
    with pytest.raises(UnknownClass):
        train(files, config(place, classes=("zebra",)), silent)
    with pytest.raises(InvalidInput, match="patch of 33"):
        train(files, config(place, patch_size=33), silent)
    with pytest.raises(NotTrainable, match="65 concepts do not fit"):
        train(files, config(place, concepts=65), silent)


def test_crops_can_be_enlarged_and_a_general_head_be_measured(place, trained):
    files, _ = trained
    outcome = train(
        files, config(place, name="early", layer="layer2", enlarge=True, classes=("ship",), importance_images=5), silent
    )
    assert outcome.bank.configuration["enlarge"] is True
    importance = [concept.statistics["importance"] for concept in outcome.bank.concepts]
    assert all(index >= 0 for index in importance)
    assert importance[0] > 0


class _Square(nn.Module):
    """A head whose logit is the square of a linear one: not affine."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.linear = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.linear(self.relu(x).mean((2, 3))).square()


def test_general_head_uses_jansen_on_masked_codes():
    torch.manual_seed(0)
    module = _Square().eval().requires_grad_(False)
    cut = Cut(module, "relu", torch.rand(2, 3, 4, 4))
    assert cut.facts.form == "general"
    codec = NmfCodec(torch.rand(3, 3), [0, 0, 0])
    a = torch.rand(2, 3, 4, 4)
    targets = torch.zeros(2, dtype=torch.int64)
    codes = codec.encode(cut.positions(a), targets)
    views = np.zeros((2, 4, 4, 3), np.uint8)
    batch = Explained(["x", "y"], views, a, a, cut.head(a), targets, codes, torch.zeros(2, 3))
    found = total_indices(cut, codec, batch, 16)
    designs = sobol.designs(3, 16)
    for image in range(2):
        outputs = torch.empty(4, 16, dtype=torch.float64)
        for row in range(4):
            for design in range(16):
                decoded = codec.combine(codes, designs[row, design].expand(2, -1).float())[image]
                outputs[row, design] = module.linear(decoded.mean(0))[0].square()
        torch.testing.assert_close(found[image], sobol.jansen(outputs), rtol=1e-3, atol=1e-5)


def test_masked_targets_without_masks_is_the_reconstruction():
    torch.manual_seed(1)
    module = _Square().eval().requires_grad_(False)
    cut = Cut(module, "relu", torch.rand(2, 3, 4, 4))
    codec = NmfCodec(torch.rand(2, 3), [0, 0])
    a, targets = torch.rand(3, 3, 4, 4), torch.zeros(3, dtype=torch.int64)
    codes = codec.encode(cut.positions(a), targets)
    masks = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).expand(3, -1, -1)
    logits, _ = masked_targets(cut, codec, codes, masks, targets)
    expected = cut.head(cut.unpositions(codec.combine(codes)))[:, 0].double()
    torch.testing.assert_close(logits[:, 0], expected)
    assert not logits[:, 1].any()
