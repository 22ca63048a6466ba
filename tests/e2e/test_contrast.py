"""Contrasts as callers meet them: the demo's convolutional model, over Ray Serve, in both placements."""

from __future__ import annotations

import concurrent.futures
import io
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import json_format
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from concepts.bank import Bank, Concept
from concepts.contrast.engine import ContrastEngine
from concepts.contrast.records import Contrast, ContrastRequest
from concepts.explanation import ExplainOptions
from concepts.kinds.contrast import REPORTED
from concepts.model import Model, ModelSpec
from concepts.repository import Repository
from demo.attributes import CLASS_NAMES
from demo.folder import write_folder
from demo.models import MODELS
from demo.world import World
from tests.e2e.conftest import RunningServer, Start
from tests.e2e.learned import bank_command
from tests.e2e.test_service import APPLICATION, refused
from whence.v1 import bank_pb2, explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as pb

LAYER = "stage3"
PLANES, PLAIN = f"cnn/{LAYER}/contrast", f"cnn/{LAYER}/plain"
CLASSES = ("bricks-cross", "bricks-disc", "bricks-ring", "bricks-triangle")
"""Those that planes are laid between."""
CROSS, DISC, RING, TRIANGLE = map(CLASS_NAMES.index, CLASSES)
HELD_OUT = 210
"""Held-out images."""
MAPS = [explanation_pb2.MAP_KIND_ACTIVATION, explanation_pb2.MAP_KIND_CONTRIBUTION]
OPTIONS = explanation_pb2.ExplainOptions(maps=MAPS, map_encoding=explanation_pb2.MAP_ENCODING_FLOAT32)

Views = NDArray[np.uint8]


@pytest.fixture(scope="module")
def contrasts(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The demo's convolutional model, a contrast bank that the command learns, and an NMF bank of its prototypes."""
    place = tmp_path_factory.mktemp("contrasts")
    demo, repository = MODELS["cnn"], Repository(place / "repository")
    options = {"num_classes": len(CLASS_NAMES)}
    spec = ModelSpec("cnn", demo.architecture, demo.preprocessing, demo.class_names, "", options)
    repository.publish_model(spec, load_file(demo.weights))
    training, held_out = write_folder(place, "train", 300), write_folder(place, "heldout", HELD_OUT)
    small = ("--classes", ",".join(CLASSES), "--test-images", HELD_OUT, "--insertion-images", 0, "--exemplars", 2)
    images = ("--images", training, "--held-out", held_out, "--repository", repository.root)
    done = bank_command("train", "contrast", "--model", "cnn", "--layer", LAYER, *images, *small)
    assert done.exit_code == 0, done.output
    bank = repository.load(repository.resolve(PLANES))
    plain = tuple(map(Concept, range(len(bank.concepts))))
    own = {"dictionary": bank.tensors["dictionary"]}
    repository.publish(Bank("nmf", "cnn", LAYER, "plain", bank.weights_digest, bank.channels, plain, own))
    return repository


@pytest.fixture(scope="module")
def bank(contrasts: Repository) -> Bank:
    return contrasts.load(contrasts.resolve(PLANES))


@pytest.fixture(scope="module")
def model(contrasts: Repository) -> Model:
    return contrasts.load_model("cnn")


@pytest.fixture(scope="module")
def held_out(model: Model) -> Mapping[int, Views]:
    """The held-out images of the bank, by the class that the model predicts."""
    images = World().sample(HELD_OUT, "heldout").images
    with torch.no_grad():
        predicted = model.module(model.inputs(images)).argmax(1).numpy()
    return {one: images[predicted == one] for one in (CROSS, DISC, RING, TRIANGLE)}


@pytest.fixture(scope="module")
def views(held_out: Mapping[int, Views]) -> Views:
    """Rings on bricks."""
    assert len(held_out[RING]) >= 10
    return held_out[RING]


@pytest.fixture(
    scope="module",
    params=[{"placement": "together"}, {"placement": "apart", "ingress_mode": "proxy"}],
    ids=["together", "apart"],
)
def server(request: pytest.FixtureRequest, start: Start, contrasts: Repository) -> RunningServer:
    return start(contrasts.root, **request.param)


@pytest.fixture
def stub(server: RunningServer) -> Iterator[Any]:
    with server.connected() as (stub, _):
        yield stub


def picture(view: Views) -> image_pb2.Image:
    """Write what the model sees without loss."""
    file = io.BytesIO()
    Image.fromarray(view).save(file, "PNG")
    return image_pb2.Image(encoded=file.getvalue())


def why(view: Views, target: int | str | None = RING, other: int | str | None = DISC, **fields: Any) -> Any:
    """Ask why a ring and not a disc, or about other classes by index or name."""
    asked = {"target": target, "other": other}
    classes = {
        field: {"name" if isinstance(choice, str) else "index": choice}
        for field, choice in asked.items()
        if choice is not None
    }
    return pb.ContrastRequest(**{"bank": PLANES, "image": picture(view), "options": OPTIONS, **classes, **fields})


def values(sent: explanation_pb2.Map) -> NDArray[np.float64]:
    return np.frombuffer(sent.data, "<f4").reshape(sent.height, sent.width).astype(np.float64)


def test_answers_are_the_engines_own(stub: Any, bank: Bank, model: Model, views: Views) -> None:
    engine = ContrastEngine(model, bank)
    wanted = ContrastRequest(RING, DISC, ExplainOptions(maps=("activation", "contribution")))
    for view in views[:4]:
        reply = stub.Contrast(why(view, request_id="r-1"), metadata=APPLICATION)
        (expected,) = engine.contrast(view[None], [wanted])
        assert isinstance(expected, Contrast)
        assert (reply.request_id, reply.bank.digest, reply.runtime) == ("r-1", expected.bank_digest, expected.runtime)
        for mine, theirs in ((reply.target, expected.target), (reply.other, expected.other)):
            assert (mine.index, mine.name) == (theirs.index, theirs.name)
            assert mine.logit == pytest.approx(theirs.logit, abs=1e-4)
            assert mine.probability == pytest.approx(theirs.probability, abs=1e-5)
        assert [score.id for score in reply.concepts] == [score.id for score in expected.concepts]
        assert reply.concepts
        for mine, theirs in ((reply, expected), *zip(reply.concepts, expected.concepts, strict=True)):
            assert mine.contribution == pytest.approx(theirs.contribution, abs=1e-4)
            for sent, kind in zip(mine.maps, ("activation", "contribution"), strict=True):
                assert np.allclose(values(sent), theirs.maps[kind].values, atol=1e-4)
        for name in REPORTED:
            assert getattr(reply.plane, name) == pytest.approx(float(bank.tensors[name][RING, DISC]))
        assert [reply.plane.target_images, reply.plane.other_images] == bank.tensors["images"][[RING, DISC]].tolist()
        assert (reply.view.left, reply.view.top, reply.view.right, reply.view.bottom) == (0, 0, 64, 64)
        assert reply.timings.total_ms > reply.timings.trunk_ms > 0


def test_all_that_is_said_to_add_up_does(stub: Any, views: Views) -> None:
    for view in views[:8]:
        reply = stub.Contrast(why(view))
        distances, contributions = map(values, reply.maps)
        assert contributions.sum() == pytest.approx(reply.contribution, rel=1e-4)
        assert contributions.clip(0).sum() == pytest.approx(reply.contribution_for_target, rel=1e-4)
        assert contributions.clip(max=0).sum() == pytest.approx(reply.contribution_for_other, rel=1e-4, abs=1e-5)
        assert distances.max() > 0
        for score in reply.concepts:
            codes, shares = map(values, score.maps)
            assert codes.sum() == pytest.approx(score.activation, rel=1e-4, abs=1e-5)
            assert shares.sum() == pytest.approx(score.contribution, rel=1e-4, abs=1e-5)
            assert (codes[distances <= 0] == 0).all(), "a prototype speaks on the target's side alone"
        report, difference = reply.faithfulness, reply.target.logit - reply.other.logit
        assert report.explained_logit == pytest.approx(difference, abs=1e-4)
        rest = report.constant + reply.contribution + report.completeness_residual
        assert rest == pytest.approx(difference, abs=1e-4)
        # The head is affine: ⟨G, a⟩ is the difference less its constant.
        assert report.exactness == explanation_pb2.EXACTNESS_EXACT
        assert report.carried_share == pytest.approx(reply.contribution / (difference - report.constant), rel=1e-3)


def test_turning_the_pair_round_negates(stub: Any, views: Views) -> None:
    for view in views[:4]:
        there, back = stub.Contrast(why(view)), stub.Contrast(why(view, DISC, RING))
        assert (there.target, there.other) == (back.other, back.target)
        assert there.contribution == -back.contribution
        assert there.contribution_for_target == -back.contribution_for_other
        for one, other in zip(there.maps, back.maps, strict=True):
            assert np.array_equal(values(one), -values(other))
        assert [score.id for score in back.concepts] != [score.id for score in there.concepts]
        assert there.plane.target_images == back.plane.other_images
        assert back.HasField("flip_shift"), "it is a ring as it is"
        assert back.flip_shift == 0.0


@pytest.mark.parametrize("pair", [[RING, DISC], [DISC, RING], [TRIANGLE, RING]])
def test_the_flip_does_flip(
    stub: Any, bank: Bank, model: Model, held_out: Mapping[int, Views], pair: list[int]
) -> None:
    """By hand: the plane in double precision from what the bank stores, and the head on the activation so shifted."""
    cut, flips = model.cut(LAYER), []
    w, k = (bank.tensors[name].double().numpy() for name in ("directions", "products"))
    normal = np.linalg.solve(k[np.ix_(pair, pair)], [1.0, -1.0]) @ w[pair]
    step = float(bank.tensors["unit"]) * torch.from_numpy(normal / np.linalg.norm(normal)).float().view(1, -1, 1, 1)
    for view in held_out[pair[0]]:
        reply, a = stub.Contrast(why(view, *pair)), cut.trunk(model.inputs(view[None]))
        shifts = [point.shift for point in reply.shift_curve]
        with torch.no_grad():
            logits = torch.cat([cut.head((a - shift * step).clamp_min(0)) for shift in shifts])
        probabilities = logits.double().softmax(1)[:, pair].numpy()
        sent = [(point.target_probability, point.other_probability) for point in reply.shift_curve]
        assert np.allclose(sent, probabilities, atol=1e-3)
        assert shifts == sorted(shifts)
        turned = probabilities[:, 1] > 0.5
        assert reply.HasField("flip_shift") == turned.any()
        if turned.any():
            at = shifts.index(reply.flip_shift)
            assert turned[at]
            assert not turned[:at].any()
            assert shifts[at] <= 1.03 * shifts[at - 1]
            flips.append(reply.flip_shift)
    # These are the images that the bank's own report is of.
    assert len(flips) / len(held_out[pair[0]]) == pytest.approx(reply.plane.swap_rate)
    assert reply.plane.HasField("swap_shift") == bool(flips)
    assert not flips or np.median(flips) == pytest.approx(reply.plane.swap_shift, rel=0.05)


def test_without_the_shift_none_is_looked_for(stub: Any, views: Views) -> None:
    reply = stub.Contrast(why(views[0], without_shift=True))
    assert not reply.HasField("flip_shift")
    assert not reply.shift_curve
    assert reply.contribution == pytest.approx(stub.Contrast(why(views[0])).contribution, rel=1e-4)


def test_many_callers_are_answered_together_beside_explanations(server: RunningServer, views: Views) -> None:
    explain = pb.ExplainRequest(bank=PLAIN, image=picture(views[0]))
    with server.connected() as (stub, _), concurrent.futures.ThreadPoolExecutor(16) as pool:
        alone, apart = [stub.Contrast(why(view)) for view in views[:10]], stub.Explain(explain).explanation
        calls = [pool.submit(stub.Contrast, why(view)) for view in views[:10] for _ in range(3)]
        beside = [pool.submit(stub.Explain, explain) for _ in range(10)]
        bad = pool.submit(refused, stub.Contrast, why(views[0], RING, RING))
        together, explained = [call.result() for call in calls], [call.result().explanation for call in beside]
    assert bad.result()[1].reason == "INVALID_INPUT"
    assert max(reply.timings.batch_size for reply in together) > 1
    for n, reply in enumerate(together):
        assert reply.contribution == pytest.approx(alone[n // 3].contribution, rel=1e-3, abs=1e-3)
        assert reply.flip_shift == pytest.approx(alone[n // 3].flip_shift, rel=0.02)
    for reply in explained:
        for mine, theirs in zip(reply.concepts, apart.concepts, strict=True):
            assert (mine.id, mine.contribution) == (theirs.id, pytest.approx(theirs.contribution, abs=1e-3))


def test_refusals_are_typed(stub: Any, views: Views) -> None:
    unread = image_pb2.Image(encoded=b"no picture")
    maps = explanation_pb2.ExplainOptions(maps=[explanation_pb2.MAP_KIND_INPUT])
    cases = (
        (stub.Contrast, why(views[0], RING, RING), "INVALID_INPUT"),
        (stub.Contrast, why(views[0], None, RING), "INVALID_INPUT"),
        (stub.Contrast, why(views[0], RING, "unicorn"), "UNKNOWN_CLASS"),
        (stub.Contrast, why(views[0], RING, "night-ring"), "UNSUPPORTED_OPTION"),
        (stub.Contrast, why(views[0], options=maps), "UNSUPPORTED_OPTION"),
        (stub.Contrast, why(views[0], image=unread, bank=PLAIN), "UNSUPPORTED_OPTION"),
        (stub.Explain, pb.ExplainRequest(image=unread, bank=PLANES), "UNSUPPORTED_OPTION"),
        (stub.Intervene, pb.InterveneRequest(image=unread, bank=PLANES, scales={0: 0.0}), "UNSUPPORTED_OPTION"),
        (stub.Contrast, why(views[0], image=unread), "INVALID_IMAGE"),
    )
    for call, request, reason in cases:
        code, info = refused(call, request)
        assert (code, info.reason) == ("INVALID_ARGUMENT", reason)


def test_the_bank_its_prototypes_and_the_calls_are_described(
    server: RunningServer, stub: Any, bank: Bank, views: Views
) -> None:
    told = stub.GetBank(pb.GetBankRequest(bank=PLANES)).bank
    assert (told.kind, told.concept_count) == (bank_pb2.BANK_KIND_CONTRAST, len(bank.concepts))
    assert json_format.MessageToDict(told.metrics) == bank.metrics
    expected = next(concept for concept in bank.concepts if (concept.class_index, concept.other_index) == (DISC, RING))
    concept = stub.GetConcept(pb.GetConceptRequest(bank=PLANES, concept_id=expected.id)).concept
    assert (concept.class_name, concept.other_index, concept.other_name) == ("bricks-disc", RING, "bricks-ring")
    assert concept.exemplars
    stub.Contrast(why(views[0]))
    until = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as reply:
            text = str(reply.read().decode())
        if re.search(r'whence_requests_total{.*code="OK".*rpc="Contrast"', text):
            break
        assert time.monotonic() < until
        time.sleep(0.2)
    assert re.search(rf'whence_memory_bytes{{.*name="{PLANES}"', text)
