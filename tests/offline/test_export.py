"""Exporting to ONNX: the same model, at the logits and at every layer, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from concepts import model as models
from concepts.errors import InvalidModel
from concepts.model import Model, ModelSpec
from concepts.onnx_model.file import OnnxFile
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository
from concepts.runtimes import Runtime, open_trunk
from offline.export import export
from tests.concepts import networks

TRUSTED = ("tests.concepts",)
SPEC = ModelSpec("net", "tests.concepts.networks:tiny", Preprocessing(8, 8), ("cat", "dog"), "", {"width": 6})


def tiny() -> Model:
    torch.manual_seed(0)
    return models.build(SPEC, networks.tiny(6).state_dict(), trusted=TRUSTED)


def of(module: nn.Module) -> Model:
    return Model(SPEC, module.eval().requires_grad_(False), torch.device("cpu"))


def test_the_file_is_a_classifier_whose_values_are_the_layers() -> None:
    model = tiny()
    content, values = export(model)
    assert set(values) == {layer.name for layer in model.layers()} == {"layer3.0", "layer3.1", "layer3", "head"}
    assert values["layer3"] == values["layer3.1"] != values["layer3.0"]
    assert [output.name for output in onnx.load_model_from_string(content).graph.output] == ["logits"]
    x = torch.rand(5, 3, 8, 8)
    for layer, value in values.items():
        session = onnxruntime.InferenceSession(
            OnnxFile.parse(content).truncated([value]), providers=["CPUExecutionProvider"]
        )
        (found,) = session.run(None, {"images": x.numpy()})
        np.testing.assert_allclose(found, model.cut(layer).trunk(x).numpy(), rtol=1e-5, atol=1e-6)


def test_a_published_export_computes_the_trunk(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TRUSTED)
    model = tiny()
    spec = repository.publish_model(SPEC, model.module.state_dict(), exported=export(model))
    assert repository.model_spec("net") == spec
    loaded = repository.load_model("net")
    cut = loaded.cut("layer3")
    trunk, x = open_trunk(Runtime("onnx"), loaded, cut), torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(trunk(x), cut.trunk(x), rtol=1e-5, atol=1e-6)
    assert trunk.description == "onnx cpu float32"


def test_a_model_that_depends_on_its_input_in_python_is_refused() -> None:
    class Branching(networks.Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.detach().mean()) > 0 else -x)

    with pytest.raises(InvalidModel, match="add it without --onnx"):
        export(of(Branching(6)))


def test_a_file_that_computes_something_else_is_refused() -> None:
    class Chameleon(networks.Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.compiler.is_exporting())

    with pytest.raises(InvalidModel, match=r"'(logits|layer3\.0)' of model 'net' otherwise than PyTorch"):
        export(of(Chameleon(6)))
