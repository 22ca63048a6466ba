"""Learned dictionaries, end to end: trained by the command, served by Ray Serve, checked against float64 elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import nnls

import whence
from concepts.bank import Bank
from concepts.model import Model
from concepts.repository import Repository
from tests.e2e.conftest import ROOT, RunningServer, Start
from tests.e2e.learned import CLASSES, TRAININGS, add_exported, learn_banks, make_place
from tests.e2e.reference import Floats, Reference
from tests.offline.worlds import MODEL

CRAFT, PROTOTYPES, FREE = (f"{MODEL}/layer3/{name}" for name in ("craft", "prototypes", "nmf"))
METHODS = ("gradient", "smoothgrad", "integrated")
OTHER = "truck"
"""A class without concepts."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="module")
def files(place: Path) -> Repository:
    """A repository with a bank by each trainer, of three models of the same weights."""
    files = learn_banks(place)
    add_exported(files)
    return files


@pytest.fixture(scope="module")
def server(files: Repository, start: Start) -> RunningServer:
    onnx = {"runtime": "onnx"}
    return start(files.root, models={"exported": onnx, "bare": onnx})


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[whence.Client]:
    with whence.Client(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def model(files: Repository) -> Model:
    return files.load_model(MODEL)


@pytest.fixture(scope="module")
def images(place: Path, model: Model) -> list[Path]:
    """Two held-out images of every class, predicted as it."""
    right: list[Path] = []
    for name in CLASSES:
        paths = sorted((place / "test" / name).iterdir())
        views = np.stack([np.array(Image.open(path).convert("RGB")) for path in paths])
        predicted = model.module(model.inputs(views)).argmax(1) == model.spec.class_index(name)
        right += [path for path, own in zip(paths, predicted.tolist(), strict=True) if own][:2]
    return right


def load(files: Repository, reference: str) -> Bank:
    return files.load(files.resolve(reference))


def explaining(bank: Bank, target: int, concepts: str) -> list[int]:
    """Return the ids of the concepts that explain a class."""
    return [c.id for c in bank.concepts if concepts == "all" or c.class_index in (None, target)]


def reference_of(model: Model, bank: Bank, ids: list[int]) -> Reference:
    return Reference(model, bank.layer, bank.tensors["dictionary"][ids])


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize(("target", "concepts"), [(None, "target"), ("ship", "target"), (OTHER, "all"), (None, "all")])
def test_codes_and_contributions_are_those_of_a_slow_reference(
    client: whence.Client,
    files: Repository,
    model: Model,
    images: list[Path],
    name: str,
    target: str | None,
    concepts: whence.ConceptScope,
) -> None:
    bank = load(files, f"{MODEL}/layer3/{name}")
    asked = {"bank": bank.reference, "target": target, "concepts": concepts, "top_k": 100}
    for path, outcome in zip(images, client.explain_many(images, **asked), strict=True):
        explanation = outcome.result()
        index = explanation.target.index
        ids = explaining(bank, index, concepts)
        reference = reference_of(model, bank, ids)
        x = reference.x(path)
        a, z, contributions = reference.positions(x), reference.codes(x), reference.contributions(x, index)
        rebuilt, logit = z @ reference.dictionary, reference.logits(a)[index]
        report = explanation.faithfulness
        assert explanation.scope == ("target" if name == "nmf" else concepts)
        assert explanation.target.logit == pytest.approx(logit, rel=1e-4, abs=1e-4)
        assert sorted(concept.id for concept in explanation.concepts) == ids
        for concept in explanation.concepts:
            k = ids.index(concept.id)
            assert concept.activation == pytest.approx(z[:, k].sum(), rel=1e-3, abs=1e-4 * z.sum(0).max())
            assert concept.contribution == pytest.approx(contributions[k], abs=1e-4 * abs(contributions).max())
            owner = bank.concepts[concept.id].class_index
            assert concept.class_name == ("" if owner is None else model.spec.class_names[owner])
        constant = reference.logits(np.zeros_like(a))[index]
        assert report.constant == pytest.approx(constant, abs=1e-4)
        assert explanation.contributions_total == pytest.approx(contributions.sum(), rel=1e-3, abs=1e-3)
        assert explanation.unexplained == pytest.approx(logit - constant - contributions.sum(), rel=1e-3, abs=2e-3)
        assert (report.exactness, report.completeness_residual) == ("exact", pytest.approx(0, abs=1e-3))
        error = np.linalg.norm(a - rebuilt) / np.linalg.norm(a)
        assert report.relative_error == pytest.approx(error, rel=1e-4)


def test_classes_without_concepts_are_explained_by_those_of_all(client: whence.Client, images: list[Path]) -> None:
    with pytest.raises(whence.InvalidArgument, match="ask for the concepts of all classes"):
        client.explain(images[0], bank=CRAFT, target=OTHER)
    assert client.explain(images[0], bank=CRAFT, target=OTHER, concepts="all").target.name == OTHER


def points_of(method: whence.InputMethod, x: torch.Tensor, std: torch.Tensor) -> list[torch.Tensor]:
    """Return where a method takes gradients, as the documentation says."""
    if method == "integrated":
        return [(step + 0.5) / 32 * x for step in range(32)]
    if method == "gradient":
        return [x]
    generator = torch.Generator().manual_seed(0)
    return [x + 0.15 * torch.randn(x.shape, generator=generator).double() / std for _ in range(16)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "concepts"), [("craft", "target"), ("prototypes", "all"), ("nmf", "target")])
def test_input_maps_are_slopes_of_the_codes_by_finite_differences(
    client: whence.Client,
    files: Repository,
    model: Model,
    images: list[Path],
    name: str,
    concepts: whence.ConceptScope,
    method: whence.InputMethod,
) -> None:
    bank = load(files, f"{MODEL}/layer3/{name}")
    for path in images[::3]:
        explanation = client.explain(
            path, bank=bank.reference, top_k=2, maps="input", input_method=method, concepts=concepts
        )
        ids = explaining(bank, explanation.target.index, concepts)
        reference = reference_of(model, bank, ids)
        x = reference.x(path)
        points = points_of(method, x, reference.std)
        values = {ids.index(c.id): c.maps["input"].values for c in explanation.concepts}
        largest = [np.unravel_index(abs(each).argmax(), each.shape) for each in values.values()]
        for row, column in (*largest, (16, 16)):
            slopes = reference.pixel(x, points, int(row), int(column))
            for k, each in values.items():
                assert each.shape == (32, 32)
                assert each[row, column] == pytest.approx(slopes[k], abs=5e-3 * float(abs(each).max()))
        check_report(explanation, reference, ids, x, method)


def check_report(
    explanation: whence.Explanation, reference: Reference, ids: list[int], x: torch.Tensor, method: str
) -> None:
    """Compare what the report says of maps with their own sums, and with the codes of nothing."""
    report = explanation.faithfulness.input_maps
    assert report is not None
    assert (report.method, report.exactness) == (method, "first_order")
    sums = {c.id: c.maps["input"].values.sum(dtype=float) for c in explanation.concepts}
    residual = max(abs(c.activation - sums[c.id]) / c.activation for c in explanation.concepts)
    assert report.residual == pytest.approx(residual, rel=1e-3, abs=1e-4)
    if method != "integrated":
        assert report.completeness_residual is None
        return
    nothing = reference.codes(torch.zeros_like(x)).sum(0)
    gaps = [abs(c.activation - nothing[ids.index(c.id)] - sums[c.id]) / c.activation for c in explanation.concepts]
    assert report.completeness_residual == pytest.approx(max(gaps), rel=1e-3, abs=1e-3)


def codes_of_parts(early: Reference, owners: list[int], late: Reference, ids: list[int], x: torch.Tensor) -> Floats:
    """Return codes of parts, ``[P', K']``: of each concept's share of the activation, by the parts of it alone."""
    whole = [Image.fromarray(code.reshape(8, 8).astype(np.float32)) for code in late.codes(x).T]
    enlarged = np.stack([np.array(map_.resize((16, 16), Image.Resampling.BILINEAR)).reshape(-1) for map_ in whole], 1)
    everything = enlarged.sum(1, keepdims=True)
    shares = np.divide(enlarged, everything, out=np.zeros(enlarged.shape), where=everything > 0)
    codes = np.zeros((len(enlarged), len(owners)))
    for column, concept in enumerate(ids):
        family = [k for k, owner in enumerate(owners) if owner == concept]
        for place, position in enumerate(early.positions(x) * shares[:, [column]]):
            codes[place, family] = nnls(early.dictionary[family].T, position)[0]
    return codes


def test_parts_are_those_of_a_slow_reference(
    client: whence.Client, files: Repository, model: Model, images: list[Path]
) -> None:
    bank = load(files, CRAFT)
    assert bank.parts is not None
    first, said = len(bank.concepts), client.bank(CRAFT)
    assert (said.parts_layer, said.part_count, said.concept_count) == ("layer2", len(bank.parts.concepts), first)
    for path in images[::2]:
        explanation = client.explain(path, bank=CRAFT, parts=True, maps="activation", top_k=100)
        index, statement = explanation.target.index, explanation.parts
        assert statement is not None
        ids, concepts = explaining(bank.parts, index, "target"), explaining(bank, index, "target")
        reference, late = reference_of(model, bank.parts, ids), reference_of(model, bank, concepts)
        x = reference.x(path)
        owners = [bank.parts.concepts[part].parent for part in ids]
        z, a = codes_of_parts(reference, owners, late, concepts, x), reference.positions(x)
        gradient, rebuilt = reference.gradient(a, index), z @ reference.dictionary
        contributions = (gradient @ reference.dictionary.T * z).sum(0)
        listed = [(concept.id, part) for concept in explanation.concepts for part in concept.parts]
        assert sorted(part.id - first for _, part in listed) == ids
        for parent, part in listed:
            k = ids.index(part.id - first)
            assert owners[k] == parent
            assert part.contribution == pytest.approx(contributions[k], abs=1e-3 * abs(contributions).max())
            values = part.maps["activation"].values
            assert values.shape == (16, 16)
            np.testing.assert_allclose(values.reshape(-1), z[:, k], atol=2e-3 * z.max())
        report = statement.faithfulness
        assert (statement.layer, report.exactness) == ("layer2", "first_order")
        assert statement.contributions_total == pytest.approx(contributions.sum(), rel=1e-3, abs=1e-3)
        assert statement.unexplained == pytest.approx((gradient * (a - rebuilt)).sum(), rel=1e-3, abs=2e-3)
        assert report.relative_error == pytest.approx(np.linalg.norm(a - rebuilt) / np.linalg.norm(a), rel=1e-4)
        assert report.explained_logit == pytest.approx(explanation.target.logit, abs=1e-4)


def test_a_part_names_its_concept_and_the_concept_its_parts(client: whence.Client, files: Repository) -> None:
    whole = client.concept(CRAFT, 0)
    assert whole.children == tuple(load(files, CRAFT).children(0))
    part = client.concept(CRAFT, whole.children[-1])
    assert (part.parent, part.layer, part.class_name) == (0, "layer2", CLASSES[0])
    assert all(exemplar.picture.startswith(b"RIFF") for exemplar in part.exemplars)


@pytest.mark.parametrize("bank", [PROTOTYPES, FREE])
def test_parts_of_banks_without_any_are_refused_and_the_service_stays_up(
    client: whence.Client, images: list[Path], bank: str
) -> None:
    with pytest.raises(whence.InvalidArgument, match="train one with --parts-layer") as problem:
        client.explain(images[0], bank=bank, parts=True)
    assert problem.value.reason == "UNSUPPORTED_OPTION"
    assert client.explain(images[0], bank=bank).concepts


def test_input_maps_and_parts_where_trunks_are_computed_by_onnx_runtime(
    client: whence.Client, images: list[Path]
) -> None:
    asked = {"parts": True, "maps": ("input", "activation")}
    for path in images[:4]:
        ours = client.explain(path, bank="exported/layer3/craft", **asked)
        theirs = client.explain(path, bank=CRAFT, **asked)
        plain = client.explain(path, bank="exported/layer3/craft")
        assert (plain.runtime, ours.runtime) == ("onnx cpu float32", "torch cpu float32")  # maps need gradients
        for one, other in zip(ours.concepts, theirs.concepts, strict=True):
            assert (one.id, [part.id for part in one.parts]) == (other.id, [part.id for part in other.parts])
            assert one.contribution == pytest.approx(other.contribution, rel=1e-3, abs=1e-3)
            largest = abs(other.maps["input"].values).max()
            np.testing.assert_allclose(one.maps["input"].values, other.maps["input"].values, atol=1e-3 * largest)
            for mine, own in zip(one.parts, other.parts, strict=True):
                assert mine.contribution == pytest.approx(own.contribution, rel=1e-3, abs=1e-3)
                assert mine.maps["activation"].values.shape == (16, 16)
        scores = zip(plain.concepts, theirs.concepts, strict=True)
        assert all(one.contribution == pytest.approx(other.contribution, abs=1e-3) for one, other in scores)


def test_an_onnx_file_without_the_layer_of_parts_costs_the_parts_alone(
    client: whence.Client, images: list[Path]
) -> None:
    bank = "bare/layer3/craft"
    explanation = client.explain(images[0], bank=bank)
    assert explanation.runtime == "onnx cpu float32"
    expected = {concept.id: concept.contribution for concept in client.explain(images[0], bank=CRAFT).concepts}
    for concept in explanation.concepts:
        assert concept.contribution == pytest.approx(expected[concept.id], abs=1e-3)
    for _ in range(2):  # it is not forgotten, nor loaded anew
        with pytest.raises(whence.InvalidArgument, match="use runtime torch, or leave `parts` out") as problem:
            client.explain(images[0], bank=bank, parts=True)
        assert problem.value.reason == "UNSUPPORTED_OPTION"
    assert client.intervene(images[0], bank=bank, scales={explanation.concepts[0].id: 0}).after
    assert client.bank(bank).parts_layer == "layer2"


def ask(server: RunningServer, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``whence explain`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from whence.cli import main; main()", "explain", *map(str, arguments)],
        env={**os.environ, "WHENCE_ADDRESS": server.address, "COLUMNS": "200"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_asks_for_all_of_this(server: RunningServer, images: list[Path]) -> None:
    done = ask(server, images[0], "--bank", CRAFT, "--concepts", "all", "--target", OTHER, "--top-k", 15, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["scope"], answer["target"]["name"]) == ("all", OTHER)
    assert {concept["class_name"] for concept in answer["concepts"]} == set(CLASSES)
    maps = ("--maps", "input", "--input-method")
    done = ask(server, images[0], "--bank", FREE, *maps, "integrated", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["faithfulness"]["input_maps"]
    assert report["method"] == "integrated"
    assert report["completeness_residual"] is not None
    done = ask(server, images[0], "--bank", CRAFT, "--parts", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["parts"]["layer"] == "layer2"
    assert any(concept["parts"] for concept in answer["concepts"])
    done = ask(server, images[0], "--bank", CRAFT, "--parts")
    assert done.returncode == 0, done.stderr
    assert "layer2" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bank", FREE, "--parts"), "--parts-layer"),
        (("--bank", CRAFT, "--parts", "--concepts", "all"), "of one class"),
        (("--bank", CRAFT, "--input-method", "smoothgrad"), "input"),
        (("--bank", CRAFT, "--concepts", "some"), "--concepts"),
    ],
)
def test_the_command_says_what_does_not_go(
    server: RunningServer, images: list[Path], options: tuple[str, ...], words: str
) -> None:
    done = ask(server, images[0], *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
