"""Parts of concepts on images of the known-concepts world: what is published, what it is made of, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import nnls
from torch.nn import functional

from concepts.engine import Engine
from concepts.errors import NotTrainable, UnknownLayer
from concepts.model import ModelSpec
from concepts.repository import Repository
from demo.attributes import FAMILIES
from demo.folder import write_folder
from demo.models import MODELS
from offline import splits
from offline.images import open_folder
from offline.progress import silent
from offline.task import open_task
from offline.trainers.craft import CraftConfig, train

CLASSES = ("night-ring", "sand-striped")
CONCEPTS, PARTS = 3, 5
COLOURS = FAMILIES["colour"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    write_folder(root / "images", "train", 600)
    write_folder(root / "images", "heldout", 450)
    cnn = MODELS["cnn"]
    spec = ModelSpec("cnn", cnn.architecture, cnn.preprocessing, cnn.class_names, "", {"num_classes": 15})
    Repository(root / "repository").publish_model(spec, load_file(cnn.weights))
    return root


def config(place, **changes) -> CraftConfig:
    base = {
        "model": "cnn",
        "layer": "stage3",
        "images": place / "images" / "train",
        "held_out": place / "images" / "heldout",
        "classes": CLASSES,
        "concepts": CONCEPTS,
        "patch_size": 24,
        "random_starts": 0,
        "stability_folds": 0,
        "importance_images": 4,
        "truth_images": 20,
        "exemplars": 3,
        "min_images": 5,
        "device": "cpu",
        "parts_layer": "stage1",
        "parts": PARTS,
        "parts_crops": 40,
    }
    return CraftConfig(**(base | changes))


@pytest.fixture(scope="module")
def trained(place):
    files = Repository(place / "repository")
    bank = train(files, config(place), silent).bank
    return files, files.load(files.resolve(bank.reference))


def test_every_concept_has_its_parts(trained):
    files, bank = trained
    assert len(bank.concepts) == len(CLASSES) * CONCEPTS
    assert (bank.parts.layer, bank.parts.channels, bank.parts.kind) == ("stage1", 32, "nmf")
    for concept in bank.concepts:
        children = [bank.concept(child) for child in bank.children(concept.id)]
        assert len(children) == PARTS
        for child in children:
            assert child.class_index == concept.class_index
            assert "contribution" in child.statistics
            assert 0 < len(child.exemplars) <= 3
            for exemplar in child.exemplars:
                assert files.picture(files.resolve(bank.reference), exemplar).startswith(b"RIFF")
    assert bank.configuration["parts_layer"] == "stage1"


def test_concepts_are_those_of_a_bank_without_parts(place, trained):
    files, bank = trained
    plain = train(files, config(place, parts_layer=None, name="plain"), silent).bank
    assert plain.parts is None
    assert torch.equal(plain.tensors["dictionary"], bank.tensors["dictionary"])
    assert plain.concepts == bank.concepts
    assert plain.metrics == {name: value for name, value in bank.metrics.items() if name != "parts"}


def test_exemplars_of_a_part_are_crops_in_which_its_concept_is_active_and_made_of_it(place, trained):
    files, bank = trained
    model = files.load_model("cnn")
    late, early = model.cut("stage3"), model.cut("stage1")
    folder = open_folder(place / "images" / "train")
    concepts, parts = (each.tensors["dictionary"].double().numpy() for each in (bank, bank.parts))
    for part in bank.parts.concepts:
        family = [c.id for c in bank.concepts if c.class_index == part.class_index]
        siblings = [p.id for p in bank.parts.concepts if p.parent == part.parent]
        activations = []
        for exemplar in part.exemplars:
            view = np.asarray(folder.open(exemplar.source))
            box = [round(side) for side in exemplar.box]
            crop = model.inputs(view[None])[:, :, box[1] : box[3], box[0] : box[2]]
            with torch.no_grad():
                ours, theirs = (cut.positions(cut.trunk(crop))[0].double().numpy() for cut in (late, early))
            codes = torch.tensor(np.array([nnls(concepts[family].T, row)[0] for row in ours])).T.unflatten(1, (6, 6))
            placed = functional.interpolate(codes[None], size=(12, 12), mode="bilinear")[0].flatten(1).numpy()
            share = placed[family.index(part.parent)] / np.maximum(placed.sum(0), 1e-30)
            mean = share @ theirs / share.sum()
            assert nnls(concepts[family].T, ours.mean(0))[0][family.index(part.parent)] > 0
            code = nnls(parts[siblings].T, mean)[0][siblings.index(part.id)]
            assert code == pytest.approx(exemplar.activation, rel=1e-2, abs=1e-3)
            activations.append(exemplar.activation)
        assert activations == sorted(activations, reverse=True)


def test_parts_tell_apart_colours_that_their_concepts_mix(trained):
    """Held-out images of the known-concepts world; neither the concept nor random directions could pass."""
    _, bank = trained
    measured = bank.metrics["parts"]
    assert (measured["layer"], measured["count"]) == ("stage1", len(bank.parts.concepts))
    records = [measured["attributes"]["attributes"][colour] for colour in COLOURS]
    ours, concept, drawn = (
        float(np.mean([record[name] for record in records])) for name in ("auroc", "auroc_concept", "auroc_random")
    )
    assert ours > 0.95
    assert 1 - ours < (1 - drawn) / 4
    assert ours > concept + 0.3


def test_the_measure_fails_for_parts_that_are_not(place, trained):
    """Parts with their channels shuffled are worth what random directions are."""
    files, bank = trained
    task = open_task(files, config(place), silent)
    order = torch.randperm(bank.parts.channels, generator=torch.Generator().manual_seed(1))
    shuffled = {"dictionary": bank.parts.tensors["dictionary"][:, order]}
    broken = replace(bank, parts=replace(bank.parts, tensors=shuffled))
    found = splits.measure(task, broken, lambda of: Engine(task.model, of), 300)
    ours = bank.metrics["parts"]["attributes"]["attributes"]
    assert found.attributes["images"] == bank.metrics["parts"]["attributes"]["images"]
    values = [found.attributes["attributes"][colour]["auroc"] for colour in COLOURS]
    assert np.mean(values) < np.mean([ours[colour]["auroc"] for colour in COLOURS]) - 0.05
    for colour in COLOURS:  # what is not of the parts stays as it is
        for name in ("auroc_concept", "auroc_random", "concepts"):
            assert found.attributes["attributes"][colour][name] == pytest.approx(ours[colour][name])


@pytest.mark.parametrize(
    ("layer", "error", "says"),
    [
        ("stage3", NotTrainable, "before 'stage3', which 'stage3' is not; layers that would do: .*stage2"),
        ("stage3.1.0", NotTrainable, "can be negative"),
        ("pool", NotTrainable, "before .stage3., which .pool. is not"),
        ("stage1.0", NotTrainable, "can be negative.*layers that would do: .*stage2"),
        ("stage9", UnknownLayer, "nearest names"),
    ],
)
def test_layers_that_will_not_do_are_refused_before_any_work(place, layer, error, says):
    def no_work(stage: str, done: int, total: int, note: str = "") -> None:
        raise AssertionError(stage)

    with pytest.raises(error, match=says):
        train(Repository(place / "repository"), config(place, parts_layer=layer), no_work)
