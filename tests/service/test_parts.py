"""Parts over the wire: what the engine says of them, what banks and concepts say, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import torch
from PIL import Image

from concepts.bank import Concept
from concepts.engine import Engine
from concepts.explanation import EngineRequest, ExplainOptions, Explanation
from concepts.repository import Repository
from tests.e2e.repository import BANK, LAYER, MODEL, held_out, publish_bank, publish_model
from tests.service.conftest import Serve
from tests.service.test_ingress import ask, refusal
from whence.v1 import explanation_pb2
from whence.v1 import explanation_service_pb2 as pb

TREE = f"{MODEL}/{LAYER}/tree"


def publish_tree(root: Path) -> None:
    """Store ResNet-20, a bank, and one whose concepts have a part each at ``layer2``."""
    publish_model(root)
    bank = publish_bank(root)
    width = Repository(root).load_model(MODEL).cut("layer2").layout.channels
    parts = tuple(Concept(c.id, f"less of {c.label}", c.class_index, parent=c.id) for c in bank.concepts)
    dictionary = torch.rand(len(parts), width, generator=torch.Generator().manual_seed(0))
    tree = replace(bank, name="tree", files={}, digest="")
    Repository(root).publish(tree.with_parts("nmf", "layer2", width, parts, {"dictionary": dictionary}))


async def test_parts_are_the_engines_own(tmp_path: Path, serve: Serve) -> None:
    publish_tree(tmp_path)
    path = held_out()[0]
    wanted = explanation_pb2.ExplainOptions(top_k=2, maps=[explanation_pb2.MAP_KIND_ACTIVATION], parts=True)
    async with serve(tmp_path) as server:
        got = (await server.stub.Explain(ask(path, bank=TREE, options=wanted))).explanation
        refused = await refusal(server.stub.Explain(ask(path, bank=BANK, options=wanted)))
        bank = (await server.stub.GetBank(pb.GetBankRequest(bank=TREE))).bank
        count = bank.concept_count
        part = (await server.stub.GetConcept(pb.GetConceptRequest(bank=TREE, concept_id=count + 3))).concept
        whole = (await server.stub.GetConcept(pb.GetConceptRequest(bank=TREE, concept_id=3))).concept
        memory, repository = server.counts.memory, server.repository
    engine = Engine(repository.load_model(MODEL), repository.load(repository.resolve(TREE)))
    view, _ = engine.model.spec.preprocessing.fit(Image.open(path))
    options = ExplainOptions(top_k=2, maps=("activation",), parts=True)
    (expected,) = engine.explain(np.stack([view]), [EngineRequest(None, options)])
    assert isinstance(expected, Explanation)
    assert expected.parts is not None
    assert (got.parts.layer, got.parts.HasField("faithfulness")) == ("layer2", True)
    assert np.isclose(got.parts.contributions_total, expected.parts.contributions_total, atol=1e-3)
    for mine, theirs in zip(got.concepts, expected.concepts, strict=True):
        assert [p.id for p in mine.parts] == [p.id for p in theirs.parts] == [count + mine.id]
        assert np.isclose(mine.parts[0].contribution, theirs.parts[0].contribution, atol=1e-3)
        assert (mine.parts[0].maps[0].height, mine.maps[0].height) == (16, 8)
    assert (refused[0], refused[2].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_OPTION")
    assert "--parts-layer" in refused[1]
    assert (bank.parts_layer, bank.part_count, bank.layer) == ("layer2", count, LAYER)
    assert (part.parent, part.layer, whole.layer, list(whole.children)) == (3, "layer2", LAYER, [count + 3])
    assert {TREE, f"{MODEL}/layer2/tree:parts"} <= memory.keys()
    assert memory[TREE].model == memory[f"{MODEL}/layer2/tree:parts"].model > 0
