"""Trunks computed by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from concepts.cut import Cut
from concepts.errors import InvalidModel, UnsupportedOption
from concepts.model import Model
from concepts.onnx_model.file import OnnxFile
from concepts.onnx_model.network import OnnxNetwork
from concepts.runtimes import Precision

_QUIET = 3
"""Severity from which ONNX Runtime logs: errors."""


class OnnxTrunk:
    """The part of a model's ONNX file up to the value of a layer; reads and writes tensors where they are.

    Parameters
    ----------
    model
        A model with an ONNX file.
    cut
        Of that model.

    Raises
    ------
    UnsupportedOption
        If the model has no ONNX file, or one without the layer.
    InvalidModel
        If ONNX Runtime cannot load it.
    """

    def __init__(self, model: Model, cut: Cut) -> None:
        if model.onnx is None:
            raise UnsupportedOption(
                f"model {model.spec.name!r} has no ONNX file: add it again with --onnx, or use runtime torch",
                model=model.spec.name,
            )
        file = OnnxFile.parse(model.onnx())
        if isinstance(model.module, OnnxNetwork):
            value = model.module.value_name(cut.layer)
        elif model.spec.exported is not None and cut.layer in model.spec.exported.values:
            value = model.spec.exported.values[cut.layer]
        else:
            raise UnsupportedOption(
                f"the ONNX file of model {model.spec.name!r} has no layer {cut.layer!r}: use runtime torch",
                model=model.spec.name,
                layer=cut.layer,
            )
        self._channels_last = file.layout == "nhwc"
        self._input, self._output, self._shape = file.input_name, value, cut.shape
        self._device = model.device
        self.description = f"onnx {model.device.type} float32"
        self.precision: Precision = "float32"
        content = file.truncated([value])
        self.bytes = len(content)
        try:
            self._session = onnxruntime.InferenceSession(content, _options(), providers=_providers(model.device))
        except Exception as error:  # ONNX Runtime has no class of its own for all that may be wrong with a file
            raise InvalidModel(
                f"ONNX Runtime cannot run model {model.spec.name!r} up to layer {cut.layer!r}: use runtime torch",
                model=model.spec.name,
            ) from error
        if model.device.type == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise InvalidModel("ONNX Runtime finds no CUDA of its version here: use runtime torch")

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Trunk``."""
        x = (x.permute(0, 2, 3, 1) if self._channels_last else x).contiguous()
        a = torch.empty((len(x), *self._shape), device=self._device)
        binding = self._session.io_binding()
        place = (self._device.type, self._device.index or 0, np.float32)
        binding.bind_input(self._input, *place, tuple(x.shape), x.data_ptr())
        binding.bind_output(self._output, *place, tuple(a.shape), a.data_ptr())
        if self._device.type == "cuda":  # ONNX Runtime has a stream of its own
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return a


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin while they wait would take the cores from the head and from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _QUIET
    return options


def _providers(device: torch.device) -> list[str | tuple[str, dict[str, str]]]:
    if device.type != "cuda":
        return ["CPUExecutionProvider"]
    onnxruntime.preload_dlls()  # finds the CUDA libraries that PyTorch brought
    # TF32 off, as for PyTorch: float32 is float32.
    return [("CUDAExecutionProvider", {"device_id": str(device.index or 0), "use_tf32": "0"}), "CPUExecutionProvider"]
