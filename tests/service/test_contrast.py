"""Contrasts, through a real gRPC server in this process."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from concepts.bank import Bank
from concepts.contrast.engine import ContrastEngine
from concepts.contrast.records import Contrast, ContrastRequest
from concepts.errors import UnsupportedOption
from concepts.explanation import EngineRequest, ExplainOptions
from concepts.repository import Repository
from service.explainer import EngineKey, Explainer, Job
from tests.concepts.contrast.conftest import make_bank
from tests.e2e.repository import BANK, LAYER, MODEL, held_out, publish_bank, publish_model
from tests.service.conftest import Serve
from tests.service.test_ingress import Slow, ask, refusal
from whence.v1 import bank_pb2, explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as pb

PLANES = f"{MODEL}/{LAYER}/planes"
WITHOUT = f"{MODEL}/{LAYER}/without"
"""A bank without any plane."""
CAT, DOG, FROG = 3, 5, 6
ALIKE = (1, 9)
"""Two classes of the same direction: no plane lies between them."""
ACTIVATION, CONTRIBUTION = explanation_pb2.MAP_KIND_ACTIVATION, explanation_pb2.MAP_KIND_CONTRIBUTION
UNSEEN = 7
"""A class that has no planes."""


def publish_planes(root: Path) -> Bank:
    """Store contrast banks of the stored ResNet-20: one of real activations, and one that no class has planes in."""
    repository = Repository(root)
    model = repository.load_model(MODEL)
    fit = model.spec.preprocessing.fit
    bank = make_bank(model, np.stack([fit(Image.open(path).convert("RGB"))[0] for path in held_out(2)]), LAYER)
    tensors = {name: tensor.clone() for name, tensor in bank.tensors.items()}
    tensors["images"][:] = 60
    tensors["images"][UNSEEN] = 0
    first, second = ALIKE
    tensors["directions"][second] = tensors["directions"][first]
    for rows in (tensors["products"], tensors["products"].T):
        rows[second] = rows[first]
    metrics = {"accuracy": 0.75, "classes": {"cat": {"images": 60}}}
    bank = replace(bank, name="planes", tensors=tensors, metrics=metrics, configuration={"shrinkage": 0.5})
    tensors = {**tensors, "images": torch.zeros(10, dtype=torch.int64)}
    nothing = replace(bank, name="without", concepts=(), tensors=tensors)
    repository.publish(nothing)
    return repository.publish(bank)


@pytest.fixture(scope="session")
def contrast_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a contrast bank, one without planes and an NMF bank, not to be changed."""
    root = tmp_path_factory.mktemp("contrasts")
    publish_model(root)
    publish_bank(root)
    publish_planes(root)
    return root


def why(path: Path, target: int | str | None = None, other: int | str | None = None, **fields: Any) -> Any:
    """Ask why one class and not another, by index or name."""
    image = image_pb2.Image(encoded=path.read_bytes())
    wanted = {"bank": PLANES, "image": image, "target": named(target), "other": named(other), **fields}
    return pb.ContrastRequest(**wanted)


def named(choice: int | str | None) -> explanation_pb2.Target | None:
    if choice is None:
        return None
    return explanation_pb2.Target(**{"name" if isinstance(choice, str) else "index": choice})


def asking(**fields: Any) -> dict[str, explanation_pb2.ExplainOptions]:
    return {"options": explanation_pb2.ExplainOptions(**fields)}


def numbers(reply: pb.ContrastResponse) -> list[float]:
    """Return what must be alike wherever it was computed; the shifts that are tried may not be, to the last digit."""
    found = [reply.contribution, reply.contribution_for_target, reply.contribution_for_other]
    found += [score.logit for score in (reply.target, reply.other)]
    found += [score.contribution for score in reply.concepts] + [reply.faithfulness.carried_share]
    return found + [value for sent in reply.maps for value in np.frombuffer(sent.data, "<f2").tolist()]


async def test_a_contrast_is_the_engines_own(contrast_repository: Path, serve: Serve) -> None:
    path = held_out()[CAT]
    options = asking(top_k=1, maps=[ACTIVATION, CONTRIBUTION], map_encoding=explanation_pb2.MAP_ENCODING_FLOAT32)
    async with serve(contrast_repository) as server:
        reply = await server.stub.Contrast(why(path, CAT, DOG, request_id="mine", **options))
        repository, counts = server.repository, server.counts
    engine = ContrastEngine(repository.load_model(MODEL), repository.load(repository.resolve(PLANES)))
    view, box = engine.model.spec.preprocessing.fit(Image.open(path))
    wanted = ContrastRequest(CAT, DOG, ExplainOptions(top_k=1, maps=("activation", "contribution")))
    (expected,) = engine.contrast(np.stack([view]), [wanted])
    assert isinstance(expected, Contrast)
    assert reply.request_id == "mine"
    assert (reply.model.name, reply.bank.digest, reply.runtime) == (MODEL, expected.bank_digest, expected.runtime)
    assert (reply.target.index, reply.target.name, reply.other.name) == (CAT, "cat", "dog")
    assert reply.contribution == pytest.approx(expected.contribution, rel=1e-4)
    assert reply.contribution == pytest.approx(reply.contribution_for_target + reply.contribution_for_other, rel=1e-4)
    assert reply.contribution_for_target > 0 > reply.contribution_for_other
    assert [score.id for score in reply.concepts] == [score.id for score in expected.concepts]
    for mine, theirs in ((reply, expected), *zip(reply.concepts, expected.concepts, strict=True)):
        assert mine.contribution == pytest.approx(theirs.contribution, rel=1e-4)
        for sent, kind in zip(mine.maps, ("activation", "contribution"), strict=True):
            values = np.frombuffer(sent.data, "<f4").reshape(sent.height, sent.width)
            assert np.allclose(values, theirs.maps[kind].values, atol=1e-4)
        assert values.sum() == pytest.approx(mine.contribution, rel=1e-4)
    report = reply.faithfulness
    assert report.explained_logit == pytest.approx(reply.target.logit - reply.other.logit, abs=1e-4)
    assert report.carried_share == pytest.approx(expected.faithfulness.carried_share, rel=1e-4)
    assert (reply.plane.accuracy, reply.plane.swap_shift, reply.plane.target_images) == (0.75, 0.5, 60)
    assert not reply.plane.HasField("margin")
    assert reply.flip_shift == pytest.approx(expected.flip_shift, rel=1e-4)
    assert [point.shift for point in reply.shift_curve] == pytest.approx([p.shift for p in expected.shift_curve])
    assert (reply.view.right, reply.view.bottom) == (box.right, box.bottom)
    timings = reply.timings
    assert timings.batch_size == 1
    assert timings.total_ms >= timings.decode_ms + timings.trunk_ms + timings.explain_ms > 0
    assert counts.requests == {("Contrast", "OK"): 1}
    assert [each.total_ms for each in counts.timings] == [timings.total_ms]


async def test_classes_by_index_by_name_and_left_out(contrast_repository: Path, serve: Serve) -> None:
    path = held_out()[CAT]
    async with serve(contrast_repository) as server:
        by_index = await server.stub.Contrast(why(path, CAT, FROG))
        by_name = await server.stub.Contrast(why(path, "cat", "frog"))
        predicted = (await server.stub.Explain(ask(path))).explanation.predictions
        left_out = await server.stub.Contrast(why(path))
        silent = await server.stub.Contrast(why(path, without_shift=True))
    assert numbers(by_index) == numbers(by_name)
    others = [score.index for score in predicted if score.index not in (predicted[0].index, UNSEEN)]
    assert (left_out.target.index, left_out.other.index) == (predicted[0].index, others[0])
    assert left_out.shift_curve
    assert not left_out.maps
    assert numbers(silent) == pytest.approx(numbers(left_out), rel=1e-4)
    assert not silent.HasField("flip_shift")
    assert not silent.shift_curve


async def test_maps_of_the_images_size_and_pictures(contrast_repository: Path, serve: Serve) -> None:
    path, two = held_out()[CAT], {"top_k": 2, "maps": [ACTIVATION, CONTRIBUTION]}
    large, drawn = asking(map_size="MAP_SIZE_IMAGE", **two), asking(map_encoding="MAP_ENCODING_PNG_OVERLAY", **two)
    # Two maps of the plane and of each prototype, in half precision; pictures may take more.
    async with serve(contrast_repository, limits={"reply_bytes": 2 * 3 * 32 * 32 * 2}) as server:
        reply = await server.stub.Contrast(why(path, CAT, DOG, **large))
        code, message, info = await refusal(server.stub.Contrast(why(path, CAT, DOG, **drawn)))
    assert {(sent.height, sent.width) for each in (reply, *reply.concepts) for sent in each.maps} == {(32, 32)}
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_OPTION")
    assert "2 concepts and the plane" in message
    async with serve(contrast_repository) as server:
        reply = await server.stub.Contrast(why(path, CAT, DOG, **drawn))
    assert len(reply.concepts) == 2
    assert all(sent.data.startswith(b"\x89PNG") for each in (reply, *reply.concepts) for sent in each.maps)


@pytest.mark.parametrize(
    ("fields", "code", "reason", "words"),
    [
        ({"other": CAT}, "INVALID_ARGUMENT", "INVALID_INPUT", "two different classes, not 'cat' twice"),
        ({"target": None, "other": CAT}, "INVALID_ARGUMENT", "INVALID_INPUT", "predicts 'cat'"),
        ({"target": "unicorn"}, "INVALID_ARGUMENT", "UNKNOWN_CLASS", "unicorn"),
        ({"target": 10}, "INVALID_ARGUMENT", "UNKNOWN_CLASS", "10"),
        ({"other": "unicorn"}, "INVALID_ARGUMENT", "UNKNOWN_CLASS", "unicorn"),
        ({"other": 2**32 - 1}, "INVALID_ARGUMENT", "UNKNOWN_CLASS", str(2**32 - 1)),
        ({"other": UNSEEN}, "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "no planes for class 'horse'"),
        ({"target": UNSEEN, "other": None}, "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "'horse'"),
        (
            {"target": ALIKE[0], "other": ALIKE[1]},
            "INVALID_ARGUMENT",
            "UNSUPPORTED_OPTION",
            "no plane between 'automobile' and 'truck'",
        ),
        (asking(maps=["MAP_KIND_INPUT"]), "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "maps of kind input"),
        (asking(substitute=True), "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "substitute"),
        (asking(parts=True), "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "parts"),
        (asking(colours=True), "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "colours"),
        (asking(estimator="ESTIMATOR_INTEGRATED"), "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "integrated"),
        (asking(input_method="INPUT_METHOD_SMOOTHGRAD"), "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "smoothgrad"),
        (asking(concepts="CONCEPT_SCOPE_ALL"), "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "concepts of all"),
        (asking(top_k=0), "INVALID_ARGUMENT", "INVALID_INPUT", "top_k"),
        (asking(map_encoding=99), "INVALID_ARGUMENT", "INVALID_INPUT", "map_encoding"),
        ({"bank": WITHOUT}, "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "no planes for class 'cat'"),
        ({"bank": WITHOUT, "target": None, "other": None}, "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "no planes"),
        ({"bank": "m/l/none"}, "NOT_FOUND", "UNKNOWN_BANK", "m/l/none"),
        ({"image": image_pb2.Image()}, "INVALID_ARGUMENT", "INVALID_IMAGE", "no image"),
        ({"image": image_pb2.Image(encoded=b"\0" * 5000)}, "INVALID_ARGUMENT", "INVALID_INPUT", "4096 bytes"),
        ({"request_id": "é"}, "INVALID_ARGUMENT", "INVALID_INPUT", "request_id"),
        ({"deadline": {"seconds": 0}}, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "0 s"),
    ],
)
async def test_bad_input_gets_a_typed_answer(
    contrast_repository: Path, serve: Serve, fields: dict[str, Any], code: str, reason: str, words: str
) -> None:
    async with serve(contrast_repository, limits={"request_bytes": 4096}) as server:
        request = {"target": CAT, "other": DOG, "request_id": "r-1", **fields}
        got, message, info = await refusal(server.stub.Contrast(why(held_out()[CAT], **request)))
        assert (got.name, info.reason) == (code, reason), message
        assert words in message
        if "request_id" not in fields:
            assert info.metadata["request_id"] == "r-1"
        assert server.counts.requests == {("Contrast", code): 1}


async def test_what_another_kind_of_bank_answers_is_refused_before_the_image_is_read(
    contrast_repository: Path, serve: Serve
) -> None:
    broken = image_pb2.Image(encoded=b"no picture")
    path = held_out()[0]
    explain = ask(path, bank=PLANES, image=broken, request_id="r-1")
    scale = pb.InterveneRequest(bank=PLANES, image=broken, scales={0: 0.0})
    async with serve(contrast_repository) as server:
        for call, right in (
            (server.stub.Explain(explain), "ask Contrast"),
            (server.stub.Intervene(scale), "ask Contrast"),
            (server.stub.Contrast(why(path, bank=BANK, image=broken)), "ask Explain or Intervene"),
        ):
            code, message, info = await refusal(call)
            assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_OPTION")
            assert right in message
        stream = server.stub.ExplainStream(iter([pb.ExplainStreamRequest(request=explain)]))
        (reply,) = [reply async for reply in stream]
        assert (reply.request_id, reply.error.reason) == ("r-1", "UNSUPPORTED_OPTION")
        assert not server.counts.memory, "no bank was loaded for that"


async def test_an_explainer_refuses_what_its_engine_does_not_answer(contrast_repository: Path) -> None:
    """As a replica that computes does, whoever calls it."""
    repository = Repository(contrast_repository)
    explainer = Explainer(repository, device=torch.device("cpu"), threads=1, batch_limit=2, queue_limit=2, engines=4)
    view, digest = np.zeros((32, 32, 3), np.uint8), repository.model_spec(MODEL).digest
    keys = {name: EngineKey(repository.resolve(name), digest) for name in (PLANES, BANK)}
    with pytest.raises(UnsupportedOption, match="ask Contrast"):
        await explainer.explain(Job(keys[PLANES], view, EngineRequest()), 60)
    with pytest.raises(UnsupportedOption, match="ask Explain or Intervene"):
        await explainer.contrast(Job(keys[BANK], view, ContrastRequest()), 60)
    await explainer.close()


async def test_each_answer_is_what_it_is_alone(contrast_repository: Path, serve: Serve) -> None:
    """Whoever is in the batch, explanations beside it; what is refused takes nobody along."""
    pairs: list[tuple[int | None, int | None]] = [(CAT, DOG), (DOG, CAT), (0, 8), (None, 2), (None, None), (FROG, None)]
    options = asking(maps=[ACTIVATION, CONTRIBUTION])
    requests = [why(path, *pairs[n % 6], **options) for n, path in enumerate(held_out(2))]
    for n in (3, 4):
        requests[n].without_shift = True
    requests[15] = why(held_out(2)[15], FROG, DOG, **options)  # a horse, which has no planes
    requests[8] = why(held_out(2)[8], None, 4, **options)  # a deer rather than a deer
    async with serve(contrast_repository, batch_limit=8) as server:
        predicted = (await server.stub.Explain(ask(held_out(2)[8]))).explanation.target.index
        assert predicted == 4
        before = list(server.counts.batches)
        calls = [server.stub.Contrast(request) for request in requests]
        explained = [server.stub.Explain(ask(path)) for path in held_out()]
        together = await asyncio.gather(*calls, return_exceptions=True)
        beside = await asyncio.gather(*explained)
        batches = server.counts.batches[len(before) :]
        alone = [await server.stub.Contrast(request) for n, request in enumerate(requests) if n != 8]
        apart = [await server.stub.Explain(ask(path)) for path in held_out()]
    refused = together.pop(8)
    assert isinstance(refused, grpc.aio.AioRpcError)
    assert (refused.code(), "'deer'" in str(refused.details())) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert max(reply.timings.batch_size for reply in together) > 1
    assert sum(batches) == len(requests) + len(explained)
    for reply, single in zip(together, alone, strict=True):
        assert single.timings.batch_size == 1
        assert (reply.target.index, reply.other.index) == (single.target.index, single.other.index)
        assert numbers(reply) == pytest.approx(numbers(single), rel=1e-3, abs=1e-2)
        assert reply.HasField("flip_shift") == single.HasField("flip_shift")
        assert reply.flip_shift == pytest.approx(single.flip_shift, rel=0.02)
        assert bool(reply.shift_curve) == bool(single.shift_curve)
    for reply, single in zip(beside, apart, strict=True):
        for mine, theirs in zip(reply.explanation.concepts, single.explanation.concepts, strict=True):
            assert (mine.id, mine.contribution) == (theirs.id, pytest.approx(theirs.contribution, abs=1e-3))


async def test_banks_and_prototypes_are_described(contrast_repository: Path, serve: Serve) -> None:
    async with serve(contrast_repository) as server:
        listed = {bank.reference: bank for bank in (await server.stub.ListBanks(pb.ListBanksRequest())).banks}
        bank = (await server.stub.GetBank(pb.GetBankRequest(bank=PLANES))).bank
        concept = (await server.stub.GetConcept(pb.GetConceptRequest(bank=PLANES, concept_id=2))).concept
        code, _, _ = await refusal(server.stub.GetConcept(pb.GetConceptRequest(bank=WITHOUT, concept_id=0)))
    assert listed[PLANES] == bank
    assert (bank.kind, bank.concept_count, listed[WITHOUT].concept_count) == (bank_pb2.BANK_KIND_CONTRAST, 6, 0)
    assert (bank.metrics["accuracy"], bank.metrics["classes"]["cat"]["images"]) == (0.75, 60)
    assert bank.configuration["shrinkage"] == 0.5
    assert (concept.class_index, concept.class_name) == (DOG, "dog")
    assert (concept.other_index, concept.other_name) == (CAT, "cat")
    assert code == grpc.StatusCode.NOT_FOUND


async def test_contrast_banks_are_loaded_before_they_are_asked_for(
    contrast_repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one without planes, too, which has nothing to warm up with."""
    explainer = Explainer(
        Repository(contrast_repository),
        device=torch.device("cpu"),
        threads=1,
        batch_limit=2,
        queue_limit=2,
        engines=4,
    )
    await explainer.preload()
    assert "is not served" not in caplog.text
    assert len(explainer._engines._entries) == 3
    await explainer.close()


async def test_deadlines_and_overload_are_as_for_explanations(contrast_repository: Path, serve: Serve) -> None:
    slow, request = Slow(), why(held_out()[0])
    limits = {"queued_images": 1}
    async with serve(contrast_repository, explainer=slow, default_deadline_s=0.05, limits=limits) as server:
        code, message, _ = await refusal(server.stub.Contrast(request))
        assert (code, "0.05 s" in message) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
        request.deadline.FromSeconds(60)
        held = server.stub.Contrast(request)
        while slow.started < 2:
            await asyncio.sleep(0.01)
        for call in (server.stub.Contrast(request), server.stub.Explain(ask(held_out()[0]))):
            code, _, info = await refusal(call)
            assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        held.cancel()
        while slow.cancelled < 2:
            await asyncio.sleep(0.01)
