"""The demo's ONNX file must be the demo's network."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch

from concepts.cut import Cut, Layout
from concepts.onnx_model.file import OnnxFile
from concepts.onnx_model.network import OnnxNetwork
from demo.models import MODELS
from demo.onnx_classifier import keras_style
from demo.world import World


def test_probabilities_and_logits_are_those_of_the_network() -> None:
    model, content = MODELS["cnn"], keras_style(MODELS["cnn"].load())
    x = model.preprocessing.normalize(torch.from_numpy(World(0).sample(16, "heldout").images))
    with torch.inference_mode():
        logits = model.load()(x)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {"image": x.permute(0, 2, 3, 1).numpy()})
    np.testing.assert_allclose(probabilities, logits.softmax(1).numpy(), rtol=1e-3, atol=1e-5)
    file = OnnxFile.parse(content)
    assert (file.layout, file.channels, file.height, file.width, file.stripped) == ("nhwc", 3, 64, 64, "Softmax")
    torch.testing.assert_close(OnnxNetwork(file)(x), logits, rtol=1e-4, atol=1e-4)


def test_the_best_layer_is_found_again() -> None:
    model = MODELS["cnn"]
    network = OnnxNetwork(OnnxFile.parse(keras_style(model.load())))
    x = model.preprocessing.normalize(torch.from_numpy(World(0).sample(2, "heldout").images))
    ours, theirs = Cut(network, "cnn_stage3_1_Relu_0", x), Cut(model.load().requires_grad_(False), "stage3", x)
    assert ours.layout == theirs.layout == Layout("bchw", 96, (16, 16), 0)
    assert ours.facts.form == "affine"
    torch.testing.assert_close(ours.trunk(x), theirs.trunk(x), rtol=1e-4, atol=1e-4)
    last = Cut(network, "cnn_pool_Mean__28_0", x)
    assert last.layout == Layout("bhwc", 96, (16, 16), 0)
