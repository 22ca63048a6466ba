"""Parts of concepts on images of the known-concepts world: what is published, what it is made of, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from concepts.engine import Engine
from concepts.errors import NotTrainable, UnknownLayer
from concepts.explanation import EngineRequest, ExplainOptions, Explanation
from concepts.kinds.nmf import NmfCodec
from concepts.model import ModelSpec
from concepts.repository import Repository
from demo.folder import write_folder
from demo.models import MODELS
from offline.images import open_folder
from offline.progress import silent
from offline.trainers.craft import CraftConfig, train

CLASSES = ("waves-red", "sand-striped")
CONCEPTS, PARTS = 4, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    write_folder(root / "images", "train", 300)
    write_folder(root / "images", "heldout", 60)
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
        "parts_layer": "stage2",
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
    assert (bank.parts.layer, bank.parts.channels, bank.parts.kind) == ("stage2", 64, "nmf")
    for concept in bank.concepts:
        children = [bank.concept(child) for child in bank.children(concept.id)]
        assert len(children) == PARTS
        for child in children:
            assert child.class_index == concept.class_index
            assert "contribution" in child.statistics
            assert 0 < len(child.exemplars) <= 3
            for exemplar in child.exemplars:
                assert files.picture(files.resolve(bank.reference), exemplar).startswith(b"RIFF")
    assert bank.configuration["parts_layer"] == "stage2"


def test_concepts_are_those_of_a_bank_without_parts(place, trained):
    files, bank = trained
    plain = train(files, config(place, parts_layer=None, name="plain"), silent).bank
    assert plain.parts is None
    assert torch.equal(plain.tensors["dictionary"], bank.tensors["dictionary"])
    assert plain.concepts == bank.concepts
    assert plain.metrics == {name: value for name, value in bank.metrics.items() if name != "parts"}


def test_exemplars_of_a_part_are_crops_that_excite_its_concept_and_the_part(place, trained):
    files, bank = trained
    model = files.load_model("cnn")
    late, early = model.cut("stage3"), model.cut("stage2")
    folder = open_folder(place / "images" / "train")
    whole, parts = (NmfCodec(b.tensors["dictionary"], [None] * len(b.concepts)) for b in (bank, bank.parts))
    for part in bank.parts.concepts:
        activations = []
        for exemplar in part.exemplars:
            view = np.asarray(folder.open(exemplar.source))
            box = [round(side) for side in exemplar.box]
            crop = model.inputs(view[None])[:, :, box[1] : box[3], box[0] : box[2]]
            with torch.no_grad():
                ours = late.positions(late.trunk(crop)).mean(1, keepdim=True)
                theirs = early.positions(early.trunk(crop)).mean(1, keepdim=True)
            family = [c.id for c in bank.concepts if c.class_index == part.class_index]
            own = NmfCodec(whole._dictionaries[0][family], [None] * len(family))
            assert own.encode(ours, torch.zeros(1).long()).values[0, 0, family.index(part.parent)] > 0
            siblings = [p.id for p in bank.parts.concepts if p.parent == part.parent]
            codes = NmfCodec(parts._dictionaries[0][siblings], [None] * len(siblings))
            code = float(codes.encode(theirs, torch.zeros(1).long()).values[0, 0, siblings.index(part.id)])
            assert code == pytest.approx(exemplar.activation, rel=0.05)
            activations.append(exemplar.activation)
        assert activations == sorted(activations, reverse=True)


def test_parts_rebuild_their_layer_and_random_ones_do_not(place, trained):
    """As many directions drawn at random, or the same parts shuffled among channels, would fail this."""
    files, bank = trained
    model = files.load_model("cnn")
    folder = open_folder(place / "images" / "heldout")
    keys = [key for key in folder.keys if key.startswith(CLASSES[0])]
    views = np.stack([np.asarray(Image.open(place / "images" / "heldout" / key).convert("RGB")) for key in keys])
    target = model.spec.class_index(CLASSES[0])
    generator = torch.Generator().manual_seed(0)
    learned = bank.parts.tensors["dictionary"]
    drawn = torch.rand(learned.shape, generator=generator)
    shuffled = learned[:, torch.randperm(learned.shape[1], generator=generator)]

    def missed(dictionary: torch.Tensor) -> float:
        tree = replace(bank, parts=replace(bank.parts, tensors={"dictionary": dictionary}))
        request = EngineRequest(target, ExplainOptions(parts=True))
        answers = Engine(model, tree).explain(views, [request] * len(views))
        assert all(isinstance(answer, Explanation) for answer in answers)
        return float(np.mean([answer.parts.faithfulness.relative_error for answer in answers]))

    ours = missed(learned)
    assert ours < 0.8 * missed(drawn)
    assert ours < 0.8 * missed(shuffled)


def test_metrics_say_where_parts_look(trained):
    _, bank = trained
    measured = bank.metrics["parts"]
    assert (measured["layer"], measured["count"]) == ("stage2", len(bank.parts.concepts))
    assert measured["localisation"]["images"] == bank.metrics["localisation"]["images"] == 20
    assert {record["concept"] for record in measured["localisation"]["attributes"].values()} <= set(
        range(len(bank.parts.concepts))
    )


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
