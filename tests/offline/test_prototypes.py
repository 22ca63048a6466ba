"""Banks of prototypes on real images: what is published, what is skipped, what is refused."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from concepts.engine import Engine
from concepts.errors import NotTrainable, UnsupportedOption
from concepts.explanation import EngineRequest
from concepts.kinds.nmf import NmfCodec
from offline.images import open_folder
from offline.progress import silent
from offline.task import open_task
from offline.trainers.prototypes import Prototypes, PrototypesConfig, train
from tests.offline import colours
from tests.offline.worlds import MODEL, add_bcos, repository, some_images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("prototypes")
    training = some_images(root / "train", "train", {"ship": 30, "truck": 30, "frog": 3})
    some_images(root / "test", "test", {"ship": 10, "truck": 10})
    (training / "ship" / "broken.jpg").write_bytes(b"no picture")
    return root


def config(place, **changes) -> PrototypesConfig:
    base = {
        "model": MODEL,
        "layer": "layer3",
        "images": place / "train",
        "held_out": place / "test",
        "classes": ("ship", "truck", "frog"),
        "noise_samples": 2,
        "random_starts": 0,
        "stability_folds": 0,
        "exemplars": 3,
        "device": "cpu",
    }
    return PrototypesConfig(**(base | changes))


@pytest.fixture(scope="module")
def trained(place):
    files = repository(place / "repository")
    return files, train(files, config(place), silent)


def test_bank_holds_six_prototypes_a_class_and_how_they_were_attributed(trained):
    _, outcome = trained
    assert [concept.class_index for concept in outcome.bank.concepts] == [8] * 6 + [9] * 6
    assert outcome.bank.kind == "nmf"
    assert outcome.bank.configuration["method"] == "prototypes"
    assert outcome.bank.configuration["attribution"] == "deeplift"  # the head is affine
    assert "of 10 needed" in outcome.skipped_classes["frog"]
    assert set(outcome.skipped_images) == {"ship/broken.jpg"}


def test_dictionary_is_of_activations_weighed_by_what_speaks_for_the_class(place, trained):
    """The error on them, computed by hand for this affine head, is what the learning says, and least for them."""
    files, _ = trained
    task = open_task(files, config(place, noise_samples=0), silent)
    keys = [key for key in task.training.keys if key.startswith("truck/")]
    lesson = Prototypes(task).learn(9, keys)
    views = np.stack([np.asarray(task.training.open(key)) for key in keys])
    a = task.cut.trunk(task.model.inputs(views)).double()
    spoken = (a * task.model.module.linear.weight[9].double().view(1, -1, 1, 1) / 64).relu().mean(1, keepdim=True)
    rows = (a * spoken).flatten(2).transpose(1, 2)
    codes = NmfCodec(lesson.dictionary, [9] * 6).encode(rows, torch.full((len(rows),), 9)).values
    error = float((rows - codes @ lesson.dictionary.double()).norm() / rows.norm())
    assert error == pytest.approx(lesson.metrics["training_relative_error"], rel=1e-3)
    assert lesson.metrics["training_images"] == len(keys)


def test_the_pictures_are_the_nearest_places_in_any_image(trained, place):
    files, outcome = trained
    folder, model = open_folder(place / "train"), files.load_model(MODEL)
    cut, version = model.cut("layer3"), files.resolve(outcome.bank.reference)
    keys = [key for key in folder.keys if "broken" not in key]
    a = cut.trunk(model.inputs(np.stack([np.asarray(folder.open(key)) for key in keys])))
    pooled = functional.avg_pool2d(a, 2, stride=1).double()
    for concept in outcome.bank.concepts:
        direction = outcome.bank.tensors["dictionary"][concept.id].double()
        cosine = (torch.einsum("bchw,c->bhw", pooled, direction) / pooled.norm(dim=1) / direction.norm()).flatten(1)
        best = cosine.max(1)
        order = best.values.argsort(descending=True)[:3].tolist()
        assert [exemplar.source for exemplar in concept.exemplars] == [keys[image] for image in order]
        for exemplar, image in zip(concept.exemplars, order, strict=True):
            assert exemplar.activation == pytest.approx(float(best.values[image]), abs=1e-5)
            row, column = divmod(int(best.indices[image]), 7)
            top, left = (min(max(4 * (place + 1) - 8, 0), 16) for place in (row, column))
            assert exemplar.box == (left, top, left + 16, top + 16)
            picture = Image.open(io.BytesIO(files.picture(version, exemplar))).convert("RGB")
            shown = np.asarray(folder.open(exemplar.source))[top : top + 16, left : left + 16]
            assert np.array_equal(np.asarray(picture), shown)


def test_collages_of_the_first_pictures_are_asked_for(trained, place):
    files, outcome = trained
    folder, model = open_folder(place / "train"), files.load_model(MODEL)
    metrics = outcome.bank.metrics["classes"]["truck"]
    pictures = []
    for concept in outcome.bank.concepts[6:10]:
        left, top, right, bottom = (int(edge) for edge in concept.exemplars[0].box)
        pictures.append(np.asarray(folder.open(concept.exemplars[0].source))[top:bottom, left:right])
    collage = np.vstack([np.hstack(pictures[:2]), np.hstack(pictures[2:])])
    share = model.module(model.inputs(collage[None])).softmax(1)[0]
    assert metrics["collage_4_probability"] == pytest.approx(float(share[9]), abs=1e-5)
    assert metrics["collage_4"] == float(share.argmax() == 9)
    for name in ("collage_4", "collage_6", "collage_4_excluded", "collage_6_excluded"):
        values = [found[name] for found in outcome.bank.metrics["classes"].values()]
        assert set(values) <= {0.0, 1.0}
        assert outcome.bank.metrics["mean"][name] == pytest.approx(np.mean(values))
    json.dumps(outcome.bank.metrics, allow_nan=False)


def test_the_engine_explains_with_the_bank(trained, place):
    files, outcome = trained
    folder = open_folder(place / "test")
    engine = Engine(files.load_model(MODEL), outcome.bank)
    views = np.stack([np.asarray(folder.open(key)) for key in folder.keys[:4]])
    for explanation in engine.explain(views, [EngineRequest(target=9)] * 4):
        assert abs(explanation.faithfulness.completeness_residual) < 1e-3


def test_same_seed_same_bank(place, trained, tmp_path):
    _, outcome = trained
    assert train(repository(tmp_path), config(place), silent).bank.digest == outcome.bank.digest
    assert train(repository(tmp_path), config(place, seed=1), silent).bank.digest != outcome.bank.digest


def test_heads_that_deeplift_cannot_follow_are_learned_by_gradients(place, tmp_path):
    files = repository(tmp_path)
    changes = {"layer": "layer2", "classes": ("truck",), "noise_at": "layer", "importance_images": 5, "designs": 4}
    outcome = train(files, config(place, **changes), silent)
    assert outcome.bank.configuration["attribution"] == "gradient"
    with pytest.raises(UnsupportedOption, match="ask for gradient"):
        train(files, config(place, attribution="deeplift", **changes), silent)


def test_a_grid_of_one_position_shows_whole_images(place, tmp_path):
    outcome = train(repository(tmp_path), config(place, layer="pool", classes=("truck",)), silent)
    assert all(exemplar.box == (0, 0, 32, 32) for c in outcome.bank.concepts for exemplar in c.exemplars)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": "flatten"}, "has no positions"),
        ({"layer": "bn1"}, "can be negative"),
        ({"classes": ("frog",)}, "of 10 needed"),
        ({"classes": ("cat",)}, "predict"),
        ({"classes": ("ship",), "layer": "pool", "images_per_class": 5, "min_images": 1}, "6 concepts do not fit 5"),
    ],
)
def test_what_cannot_be_learned_is_refused(place, tmp_path, changes, words):
    files = repository(tmp_path)
    with pytest.raises(NotTrainable, match=words):
        train(files, config(place, **changes), silent)
    assert files.banks() == []


def test_signed_activations_are_refused(place, tmp_path):
    files = repository(tmp_path)
    with pytest.raises(NotTrainable, match="can be negative"):
        train(files, config(place, model=add_bcos(files)), silent)


def test_a_class_that_nothing_speaks_for_says_so(tmp_path):
    for index in range(3):
        colours.picture("red").save(tmp_path / f"{index}.png")
    base = {"model": "colours", "layer": "relu", "images": tmp_path, "device": "cpu", "concepts": 1}
    task = colours.task(tmp_path, PrototypesConfig(**base), weight=-10.0)
    with pytest.raises(NotTrainable, match="nowhere positive"):
        Prototypes(task).learn(0, task.training.keys)
