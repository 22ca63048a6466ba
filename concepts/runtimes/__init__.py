"""What computes the trunk of a model: PyTorch or ONNX Runtime, in a precision, behind one small interface.

Heads, codes and contributions are always computed by PyTorch in float32, so that explanations differ between runtimes
by what the activations differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from concepts.cut import Cut
from concepts.errors import InvalidInput
from concepts.model import Model

RuntimeName = Literal["torch", "onnx"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Runtime:
    """What is to compute a model's trunk."""

    name: RuntimeName = "torch"
    precision: Precision = "float32"
    """Of the trunk; codes, head, contributions and report are always float32."""
    compile: bool = False
    """Have PyTorch compile the trunk: faster, after a minute or so when a model is loaded. Needs a C++ compiler."""

    def __post_init__(self) -> None:
        if self.name not in get_args(RuntimeName):
            raise InvalidInput(f"runtime {self.name!r} is none of {', '.join(get_args(RuntimeName))}")
        if self.precision not in get_args(Precision):
            raise InvalidInput(f"precision {self.precision!r} is none of {', '.join(get_args(Precision))}")
        if self.name == "onnx" and self.precision != "float32":
            raise InvalidInput(f"runtime onnx computes in float32: use runtime torch for {self.precision}")
        if self.name == "onnx" and self.compile:
            raise InvalidInput("runtime onnx has nothing to compile: leave compile out, or use runtime torch")


class Trunk(Protocol):
    """Computes g(x)."""

    @property
    def description(self) -> str:
        """What computes: runtime, device and precision, e.g. ``torch cpu bfloat16``."""
        ...

    @property
    def precision(self) -> Precision:
        """Of its arithmetic."""
        ...

    @property
    def bytes(self) -> int:
        """Memory that it holds beside the model's own weights."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Return the activation of model inputs ``[B, C, H, W]`` on their device: float32, without gradients."""
        ...


def open_trunk(runtime: Runtime, model: Model, cut: Cut) -> Trunk:
    """Return what computes the trunk of a cut of a model.

    Raises
    ------
    UnsupportedOption
        If the model has no ONNX file, or one without that layer.
    InvalidModel
        If the trunk cannot be compiled or loaded.
    """
    # Each runtime is imported where it is chosen: they are large.
    if runtime.name == "onnx":
        from concepts.runtimes.onnx import OnnxTrunk

        return OnnxTrunk(model, cut)
    from concepts.runtimes.torch import TorchTrunk

    return TorchTrunk(cut, runtime.precision, compiled=runtime.compile)
