"""A layer's channels as a bank: nothing is learned, and nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concepts.codec import decode
from concepts.engine import Engine
from concepts.explanation import EngineRequest, ExplainOptions, Explanation
from concepts.repository import Repository
from offline.images import open_folder
from offline.progress import silent
from offline.trainers import Outcome
from offline.trainers.channels import ChannelsConfig, train
from tests.offline.worlds import MODEL, add_bcos, repository, some_images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("channels")
    some_images(root / "train", "train", {"ship": 12, "truck": 12})
    some_images(root / "test", "test", {"ship": 6, "truck": 6})
    add_bcos(repository(root / "repository"))
    return root


def published(place, model: str, layer: str) -> tuple[Repository, Outcome]:
    files = Repository(place / "repository")
    config = ChannelsConfig(
        model=model, layer=layer, images=place / "train", held_out=place / "test", exemplars=2, device="cpu"
    )
    return files, train(files, config, silent)


@pytest.mark.parametrize(
    ("model", "layer", "signed"), [(MODEL, "layer3", False), (MODEL, "bn1", True), ("bcos", "layer3", True)]
)
def test_the_reconstruction_is_the_activation(place, model, layer, signed):
    files, outcome = published(place, model, layer)
    bank = files.load(files.resolve(f"{model}/{layer}/channels"))
    assert bank.digest == outcome.bank.digest
    assert len(bank.concepts) == bank.channels * (1 + signed)
    loaded, folder = files.load_model(model), open_folder(place / "test")
    cut, codec = loaded.cut(layer), bank.codec()
    assert bool((cut.trunk(loaded.example()) < 0).any()) == signed
    views = np.stack([np.asarray(folder.open(key)) for key in folder.keys])
    a = cut.trunk(loaded.inputs(views))
    codes = codec.encode(cut.positions(a), torch.zeros(len(a), dtype=torch.int64))
    assert torch.equal(cut.unpositions(decode(codec, codes)), a)
    mean = bank.metrics["mean"]
    assert mean["relative_error"] == mean["kl"] == mean["largest_cosine"] == 0
    assert mean["top1_agreement"] == mean["variance_explained"] == mean["hoyer"] == 1
    assert mean["accuracy"] == mean["accuracy_reconstructed"]
    for one in Engine(loaded, bank).explain(views, [EngineRequest(options=ExplainOptions(top_k=3))] * len(views)):
        assert isinstance(one, Explanation)
        assert one.faithfulness.relative_error == 0
        assert one.faithfulness.top1_agrees


def test_a_channel_has_a_concept_a_sign(place):
    _, outcome = published(place, MODEL, "bn1")
    labels = [concept.label for concept in outcome.bank.concepts]
    assert labels[0] == "channel 0, positive"
    assert labels[15:17] == ["channel 15, positive", "channel 0, negative"]
    assert len(set(labels)) == 32
    encoder = outcome.bank.tensors["encoder"]
    assert torch.equal(encoder[16:], -encoder[:16])
    assert torch.equal(encoder[3], torch.eye(16)[3])
    _, outcome = published(place, MODEL, "layer3")
    assert [concept.label for concept in outcome.bank.concepts] == [f"channel {index}" for index in range(64)]


def test_exemplars_of_a_channel_are_where_it_is_largest(place):
    files, outcome = published(place, MODEL, "layer3")
    model, folder = files.load_model(MODEL), open_folder(place / "train")
    cut = model.cut("layer3")
    views = np.stack([np.asarray(folder.open(key)) for key in folder.keys])
    peaks = cut.trunk(model.inputs(views)).flatten(2).amax(2)
    for concept in outcome.bank.concepts:
        best = peaks[:, concept.id].sort(descending=True).values[:2].tolist()
        if concept.exemplars:
            assert [exemplar.activation for exemplar in concept.exemplars] == pytest.approx(best, rel=1e-5)
        else:
            assert concept.statistics["active_share"] == 0 or best[0] == 0
