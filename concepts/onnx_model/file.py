"""An ONNX file of an image classifier: what is asked of it, and what is made of it before it is run.

What comes out has one input of images, one output of logits, a batch axis of any length, and nothing that the output
does not need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, inliner
from onnx.helper import make_graph, make_model, make_tensor_value_info

from concepts.errors import InvalidModel
from concepts.onnx_model.batch import free_batch_axis
from concepts.onnx_model.inference import value_infos
from concepts.onnx_model.operators import OPERATORS

OPSETS = range(9, 27)
"""Versions of ONNX's operators that are understood."""

_DAMAGED = "this is not an ONNX file, or it is damaged; export or copy it again"

_CHANNELS = (1, 3, 6)
"""How many channels images may have: grey, RGB, RGB with its inverse."""

_AFTER_SOFTMAX = ("Identity", "Cast", "Flatten", "Squeeze", "Reshape")
"""What may stand between a softmax and the output."""


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX classifier that passed every check."""

    model: ModelProto
    """From images to logits, with a free batch axis. Not to be changed."""
    input_name: str
    """Of the images' value."""
    output_name: str
    """Of the logits' value."""
    layout: Literal["nchw", "nhwc"]
    channels: int
    height: int | None
    """In pixels; None where the file leaves it open."""
    width: int | None
    stripped: str | None
    """``Softmax`` or ``LogSoftmax`` if one was taken off the end, so that logits come out."""

    @property
    def opset(self) -> int:
        """Version of ONNX's operators that the file is written in."""
        return _opset(self.model)

    @classmethod
    def parse(cls, content: bytes) -> OnnxFile:
        """Read a file's bytes, check them, and make logits and a free batch axis of what they hold.

        Raises
        ------
        InvalidModel
            If this is no sound ONNX file, needs other files or unknown operators, or is no classifier of images.
        """
        model = _read(content)
        image = _image_input(model.graph)
        layout, channels, height, width = _image_axes(image)
        model = _extract(model, image, [_output_info(model.graph)])
        _check_operators(model)
        stripped = _strip_softmax(model)
        if stripped is not None:
            model = _extract(model, image, model.graph.output)
        if image.type.tensor_type.shape.dim[0].dim_value == 1:
            free_batch_axis(model)
        return cls(model, image.name, model.graph.output[0].name, layout, channels, height, width, stripped)

    def truncated(self, values: Sequence[str]) -> bytes:
        """Return a model from the images to some of the values, with only what they need, for ONNX Runtime.

        Parameters
        ----------
        values
            ONNX names of values, in the order in which the model shall give them.

        Raises
        ------
        InvalidModel
            If the file has no such value.
        """
        known = {name for node in self.model.graph.node for name in node.output if name}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise InvalidModel(f"the ONNX file has no values {', '.join(map(repr, unknown))}")
        infos = value_infos(self.model)
        # A value whose shape nobody can tell is taken for one of floating-point numbers: ONNX Runtime finds out.
        outputs = [infos.get(name) or make_tensor_value_info(name, TensorProto.FLOAT, None) for name in values]
        return _extract(self.model, self.model.graph.input[0], outputs).SerializeToString()


def _read(content: bytes) -> ModelProto:
    """Return the bytes as a model that ONNX itself finds nothing wrong with, its own functions written out."""
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # of protobuf, which is ONNX's affair
        raise InvalidModel(_DAMAGED) from error
    if not model.graph.output:
        raise InvalidModel(_DAMAGED)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in _tensors(model.graph)):
        raise InvalidModel(
            "the ONNX file keeps weights in other files; export it with its weights inside "
            "(external_data=False in torch.onnx.export)"
        )
    opset = _opset(model)
    if opset not in OPSETS:
        raise InvalidModel(
            f"the ONNX file has opset {opset}; export it with one from {OPSETS[0]} to {OPSETS[-1]}, such as 18"
        )
    try:
        onnx.checker.check_model(content)
        model = inliner.inline_local_functions(model) if model.functions else model
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidModel(f"the ONNX file is not sound ({lines[0][:200]}); export it again") from error
    if model.graph.sparse_initializer:
        raise InvalidModel("the ONNX file has sparse weights; export it with dense ones")
    return model


def _opset(model: ModelProto) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return versions[0] if versions else 0


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield all tensors that a graph holds, those of its nodes and inner graphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _tensors(inner)


def _image_input(graph: GraphProto) -> ValueInfoProto:
    initialized = {tensor.name for tensor in graph.initializer}  # old exporters list weights among the inputs
    inputs = [value for value in graph.input if value.name not in initialized]
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs) or "none"
        raise InvalidModel(f"an ONNX classifier needs one input, its images; this one has {names}")
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT or len(tensor.shape.dim) != 4:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise InvalidModel(
            f"input {inputs[0].name!r} is {len(tensor.shape.dim)}-D {kind}; "
            "export the model with float32 images [N, C, H, W] or [N, H, W, C]"
        )
    return inputs[0]


def _image_axes(image: ValueInfoProto) -> tuple[Literal["nchw", "nhwc"], int, int | None, int | None]:
    """Return layout, channels, height and width, and refuse a batch axis of a fixed length other than one."""
    batch, *sizes = (axis.dim_value if axis.dim_value > 0 else None for axis in image.type.tensor_type.shape.dim)
    if batch is not None and batch != 1:
        raise InvalidModel(f"the ONNX file takes batches of {batch} alone; export it with a dynamic batch axis")
    first, second, third = sizes
    if first in _CHANNELS:
        return "nchw", first, second, third
    if third in _CHANNELS:
        return "nhwc", third, first, second
    shape = ", ".join("?" if size is None else str(size) for size in (batch, *sizes))
    raise InvalidModel(
        f"input {image.name!r} has shape [{shape}]: neither the second nor the last axis is one of 1, 3 or 6 channels; "
        "export the model with a fixed number of channels"
    )


def _output_info(graph: GraphProto) -> ValueInfoProto:
    """Return the first output, refused where the file itself says that it holds no logits."""
    output = graph.output[0]
    tensor = output.type.tensor_type
    rank = len(tensor.shape.dim) if tensor.HasField("shape") else 2
    if rank != 2 or tensor.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise InvalidModel(
            f"output {output.name!r} is {rank}-D {kind} where logits [N, n_classes] are needed; "
            "export the model so that its first output is that, e.g. flattened"
        )
    return output


def _extract(model: ModelProto, image: ValueInfoProto, outputs: Iterable[ValueInfoProto]) -> ModelProto:
    """Return a new model with the nodes and weights that the outputs need, and no others."""
    outputs = list(outputs)
    needed = {output.name for output in outputs}
    nodes: list[NodeProto] = []
    for node in reversed(model.graph.node):  # a sound file has its nodes in running order
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    graph = make_graph(
        nodes[::-1],
        model.graph.name or "classifier",
        [image],
        outputs,
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
        value_info=[
            value for value in model.graph.value_info if value.name in needed.difference(o.name for o in outputs)
        ],
    )
    # Since version 4 of the format, weights need not be inputs as well.
    opsets = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return make_model(graph, opset_imports=opsets, ir_version=max(model.ir_version, 4))


def _check_operators(model: ModelProto) -> None:
    names = {
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        for node in model.graph.node
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS
    }
    if names:
        raise InvalidModel(
            f"the ONNX file uses operators that are not known here: {', '.join(sorted(names))}; export it in "
            "evaluation mode, with standard operators and without an optimiser's fusions"
        )


def _strip_softmax(model: ModelProto) -> str | None:
    """Take a softmax over the classes off the end; return its name, or None if there is none."""
    makers = {name: node for node in model.graph.node for name in node.output}
    after: list[NodeProto] = []
    node = makers.get(model.graph.output[0].name)
    while node is not None and node.op_type in _AFTER_SOFTMAX:
        after.append(node)
        node = makers.get(node.input[0])
    if node is None or node.op_type not in ("Softmax", "LogSoftmax"):
        return None
    reshaped = any(other.op_type not in ("Identity", "Cast") for other in after)
    if not _over_classes(node, _shape(model, node.output[0]) if reshaped else [0, 0], _opset(model)):
        return None
    if after:
        after[-1].input[0] = node.input[0]
    else:
        model.graph.output[0].name = node.input[0]
    return node.op_type


def _over_classes(softmax: NodeProto, shape: Sequence[int], opset: int) -> bool:
    """Whether a softmax runs over the one axis that is neither the batch nor of length 1."""
    axes = [attribute.i for attribute in softmax.attribute if attribute.name == "axis"]
    axis = axes[0] if axes else (1 if opset < 13 else -1)
    if not shape:
        return False
    others = [size for i, size in enumerate(shape) if i not in (0, axis % len(shape))]
    return axis % len(shape) > 0 and all(size == 1 for size in others)


def _shape(model: ModelProto, name: str) -> list[int]:
    """Return a value's shape with zeros where it is open, or nothing if it cannot be told."""
    info = value_infos(model).get(name)
    return [] if info is None else [axis.dim_value for axis in info.type.tensor_type.shape.dim]
