"""Every runtime computes the same trunk, and explanations through each are the same to the tolerances in the docs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from concepts.engine import Engine
from concepts.errors import InvalidInput, UnsupportedOption
from concepts.explanation import EngineRequest, Estimator, ExplainOptions, Explanation
from concepts.model import Model
from concepts.repository import Repository
from concepts.runtimes import Runtime, open_trunk
from offline.export import export
from tests.concepts.conftest import make_bank
from tests.data import real_data

RUNTIMES = {
    "torch": Runtime(),
    "onnx": Runtime("onnx"),
    "bfloat16": Runtime(precision="bfloat16"),
    "float16": Runtime(precision="float16"),
}
DESCRIPTIONS = {
    "torch": "torch cpu float32",
    "onnx": "onnx cpu float32",
    "bfloat16": "torch cpu bfloat16",
    "float16": "torch cpu float16",
}
TOLERANCES = {
    ("torch", "layer3"): 1e-4,
    ("torch", "layer2"): 1e-4,
    ("onnx", "layer3"): 1e-4,
    ("onnx", "layer2"): 1e-4,
    ("bfloat16", "layer3"): 0.05,
    ("bfloat16", "layer2"): 0.3,
    ("float16", "layer3"): 0.005,
    ("float16", "layer2"): 0.1,
}
"""The table in docs/explanations.md: of contributions, relative to the image's largest, on 95 % of images.

The head of layer3 is affine, that of layer2 is not.
"""
INTEGRATED = 0.01
"""Integrated gradients stop at this relative error, wherever that is."""


@pytest.fixture(scope="module")
def exported(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same network, loaded from a repository that holds its ONNX file too."""
    repository = Repository(tmp_path_factory.mktemp("repository"))
    weights = load_file(real_data() / "cifar10" / "resnet20.safetensors")
    repository.publish_model(model.spec, weights, exported=export(model))
    return repository.load_model(model.spec.name)


@pytest.fixture(scope="module")
def engines(exported: Model, views: NDArray[np.uint8]) -> dict[str, dict[str, Engine]]:
    """By layer and runtime."""
    found = {}
    for layer in ("layer3", "layer2"):
        bank, cut = make_bank(exported, views, layer, per_class=False), exported.cut(layer)
        found[layer] = {
            name: Engine(exported, bank, cut, open_trunk(runtime, exported, cut)) for name, runtime in RUNTIMES.items()
        }
    return found


def explain(engine: Engine, views: NDArray[np.uint8], estimator: Estimator = "gradient") -> list[Explanation]:
    request = EngineRequest(options=ExplainOptions(top_k=100, estimator=estimator))
    answers = engine.explain(views, [request] * len(views))
    assert all(isinstance(answer, Explanation) for answer in answers)
    return answers  # type: ignore[return-value]


def contributions(answer: Explanation) -> NDArray[np.float64]:
    return np.array([c.contribution for c in sorted(answer.concepts, key=lambda c: c.id)])


def differences(some: list[Explanation], others: list[Explanation]) -> tuple[float, float]:
    """Return the share of images on which both predict the same, and how far contributions to that are apart."""
    same = [(a, b) for a, b in zip(some, others, strict=True) if a.target.index == b.target.index]
    apart = [np.abs(contributions(a) - contributions(b)).max() / np.abs(contributions(a)).max() for a, b in same]
    return len(same) / len(some), float(np.quantile(apart, 0.95))


@pytest.mark.parametrize("layer", ["layer3", "layer2"])
@pytest.mark.parametrize("estimator", ["gradient", "integrated", "ablation"])
def test_the_same_answer_by_every_runtime(
    engines: dict[str, dict[str, Engine]], views: NDArray[np.uint8], layer: str, estimator: Estimator
) -> None:
    reference = [
        answer
        for row in range(len(views))
        for answer in explain(engines[layer]["torch"], views[row : row + 1], estimator)
    ]
    for name, engine in engines[layer].items():
        answers = explain(engine, views, estimator)
        assert {answer.runtime for answer in answers} == {DESCRIPTIONS[name]}
        agreement, apart = differences(reference, answers)
        bound = TOLERANCES[name, layer]
        assert agreement == 1 if bound <= 1e-4 else agreement >= 0.95
        assert apart <= (max(bound, INTEGRATED) if (estimator, layer) == ("integrated", "layer2") else bound), name
        assert apart > 0 or name == "torch"  # another runtime did compute


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_same_answer_alone_and_in_any_batch(
    engines: dict[str, dict[str, Engine]], views: NDArray[np.uint8], name: str
) -> None:
    engine = engines["layer3"][name]
    alone = [answer for row in range(7) for answer in explain(engine, views[row : row + 1])]
    for size in (2, 7):
        agreement, apart = differences(alone[:size], explain(engine, views[:size]))
        assert agreement == 1
        assert apart <= TOLERANCES[name, "layer3"]


@pytest.mark.parametrize("name", RUNTIMES)
def test_trunks_answer_in_float32_and_leave_their_input_alone(
    engines: dict[str, dict[str, Engine]], exported: Model, views: NDArray[np.uint8], name: str
) -> None:
    trunk = engines["layer3"][name].trunk
    x = exported.inputs(views[:3])
    before = x.clone()
    one, two = trunk(x), trunk(x)
    assert one.dtype == torch.float32
    assert one.shape == (3, 64, 8, 8)
    assert not one.is_inference()
    assert torch.equal(one, two)
    assert one.data_ptr() != two.data_ptr()
    assert torch.equal(x, before)


def test_memory_counts_what_each_runtime_holds(engines: dict[str, dict[str, Engine]], exported: Model) -> None:
    weights = sum(t.nbytes for t in exported.module.state_dict().values())
    for name, engine in engines["layer3"].items():
        memory = engine.memory
        assert memory.model == weights
        assert memory.bank > sum(t.nbytes for t in engine.bank.tensors.values())
        # Folded convolutions are the trunk's own; half precision halves them.
        low, high = (0.9, 1.5) if engine.trunk.description.endswith("float32") else (0.4, 0.6)
        assert low < memory.trunk / weights < high, name


def test_a_warm_engine_answers_as_before(engines: dict[str, dict[str, Engine]], views: NDArray[np.uint8]) -> None:
    engine = engines["layer3"]["torch"]
    (before,) = explain(engine, views[:1])
    engine.warm_up()
    engine.warm_up(3)
    (after,) = explain(engine, views[:1])
    assert contributions(before).tolist() == contributions(after).tolist()


def test_runtimes_that_cannot_be(model: Model, exported: Model) -> None:
    with pytest.raises(InvalidInput, match="use runtime torch for bfloat16"):
        Runtime("onnx", "bfloat16")
    with pytest.raises(InvalidInput, match="nothing to compile"):
        Runtime("onnx", compile=True)
    with pytest.raises(InvalidInput, match="float64"):
        Runtime(precision="float64")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="none of torch, onnx"):
        Runtime("tflite")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedOption, match="no ONNX file"):
        open_trunk(Runtime("onnx"), model, model.cut("layer3"))
    values = {k: v for k, v in exported.spec.exported.values.items() if k != "layer2"}  # type: ignore[union-attr]
    spec = replace(exported.spec, exported=exported.spec.exported._replace(values=values))  # type: ignore[union-attr]
    with pytest.raises(UnsupportedOption, match="no layer 'layer2'"):
        open_trunk(Runtime("onnx"), replace(exported, spec=spec), exported.cut("layer2"))
