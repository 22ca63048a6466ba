"""An ONNX classifier as a torch network, each value of floating-point numbers a layer of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from onnx import NodeProto
from torch import Tensor, nn

from concepts.errors import InvalidModel, UnknownLayer
from concepts.onnx_model.file import OnnxFile
from concepts.onnx_model.numbers import Operator
from concepts.onnx_model.operators import attributes, operator
from concepts.onnx_model.shapes import to_tensor

RELATIVE_TOLERANCE = 1e-3
"""How closely two images must get the same logits alone and together, relative to the largest of them."""

_LONGEST_NAME = 128
_RESERVED = frozenset(dir(nn.Module()))
"""What a module has already and torch therefore refuses as the name of a child."""

_READ_AS_NUMBERS = ("Clip", "Resize", "Upsample")
"""Operators whose inputs but the first are read as numbers, and so stay on the CPU."""


class Operation(nn.Module):
    """One node of the graph: an operator with its attributes and those of its inputs that never change.

    Parameters
    ----------
    run
        From all inputs of the node to its output, or to a tuple of several.
    given
        For each input, whether it is given to ``forward``.
    constants
        By position, the inputs that never change. An input that is neither given nor constant is left out.
    """

    def __init__(self, run: Operator, given: Sequence[bool], constants: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._run, self._given, self._constants = run, tuple(given), dict(constants)

    def own(self, weights: Mapping[int, nn.Parameter]) -> None:
        """Make parameters of some constants, so that they go where the module goes."""
        for position, weight in weights.items():
            del self._constants[position]
            self.register_parameter(f"input_{position}", weight)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what the operator makes of the given inputs and the constants."""
        rest = iter(inputs)
        return self._run(*(next(rest) if given else self._constant(i) for i, given in enumerate(self._given)))

    def _constant(self, position: int) -> Tensor | None:
        weight = self._parameters.get(f"input_{position}")
        return weight if weight is not None else self._constants.get(position)


@dataclass(frozen=True)
class _Step:
    """One node to run."""

    node: NodeProto
    operation: Operation
    inputs: tuple[str, ...]
    """Names of the values that it is given."""
    dropped: tuple[str, ...]
    """Names of the values that nothing needs any more."""

    @property
    def name(self) -> str:
        """The first value that comes out."""
        return next(name for name in self.node.output if name)

    def run(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the inputs from among the values and put the outputs there; return the outputs."""
        result = self.operation(*(values[name] for name in self.inputs))
        results = (result,) if isinstance(result, Tensor) else result
        outputs = {name: value for name, value in zip(self.node.output, results, strict=False) if name}
        values |= outputs
        for name in self.dropped:
            values.pop(name, None)
        return outputs


class OnnxNetwork(nn.Module):
    """An ONNX classifier as a torch network, frozen and in evaluation mode.

    Every node that answers with floating-point numbers is a module; `value_name` translates its name. Shapes and
    other whole numbers are computed anew in every pass, outside any module: they depend on how many images there are.

    Parameters
    ----------
    file
        The file.
    open_size
        Height and width in pixels of the images that the network is tried with, where the file leaves them open.

    Raises
    ------
    InvalidModel
        If an operator is used in a way that is not known here, what comes out are no logits, or an image's logits
        depend on what else is in its batch.
    """

    def __init__(self, file: OnnxFile, open_size: tuple[int, int] = (224, 224)) -> None:
        super().__init__()
        self._input, self._output, self._layout = file.input_name, file.output_name, file.layout
        nodes, constants = _fold(file)
        self._beginnings: dict[str, list[_Step]] = {}
        self._steps = self._wanted = _steps(nodes, constants, self._output, file.opset)
        image = torch.empty(2, file.channels, file.height or open_size[0], file.width or open_size[1])
        image.normal_(generator=torch.Generator().manual_seed(0))
        floating = self._try(image) - _arithmetic(nodes, constants)
        layers = [step for step in self._steps if step.name in floating]
        names = _layer_names(step.name for step in layers)
        self._values = dict(zip(names, (step.name for step in layers), strict=True))
        weights: dict[str, nn.Parameter] = {}
        for name, step in zip(names, layers, strict=True):
            step.operation.own(_weights(step.node, constants, weights))
            self.add_module(name, step.operation)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, n_classes]`` of images ``[B, C, H, W]``, whatever the file's own layout."""
        values = {self._input: self._arranged(x)}
        for step in self._wanted:
            step.run(values)
        return values[self._output]

    @contextmanager
    def beginning_at(self, layer: str) -> Iterator[None]:
        """Run only what the logits need of the network once the layer has answered, the layer included.

        What the layer is computed from is left out: it must answer of its own.
        """
        if layer not in self._beginnings:
            self._beginnings[layer] = self._from(layer)
        everything, self._wanted = self._wanted, self._beginnings[layer]
        try:
            yield
        finally:
            self._wanted = everything

    def _from(self, layer: str) -> list[_Step]:
        first, needed = self.value_name(layer), {self._output}
        steps = []
        for step in reversed(self._steps):
            if needed.intersection(step.node.output):
                steps.append(replace(step, inputs=()) if step.name == first else step)
                needed.update(steps[-1].inputs)
        return steps[::-1]

    def value_name(self, layer: str) -> str:
        """Return the ONNX name of the value that a layer answers with, the first where it has several.

        Raises
        ------
        UnknownLayer
            If the network has no such layer.
        """
        if layer not in self._values:
            raise UnknownLayer(f"the ONNX file has no layer {layer!r}", layer=layer)
        return self._values[layer]

    def _arranged(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) if self._layout == "nhwc" else x

    @torch.no_grad()
    def _try(self, images: Tensor) -> set[str]:
        """Try the network on one image and on two; return the names of values of floating-point numbers."""
        values, floating = {self._input: self._arranged(images[:1])}, set[str]()
        for step in self._steps:
            try:
                outputs = step.run(values)
            except InvalidModel as error:
                raise InvalidModel(f"value {step.name!r}: {error.message}") from error
            except Exception as error:
                raise InvalidModel(
                    f"operator {step.node.op_type} fails to compute value {step.name!r} for an image of "
                    f"{images.shape[2]}×{images.shape[3]} pixels ({type(error).__name__})"
                ) from error
            floating.update(name for name, value in outputs.items() if value.is_floating_point())
        alone = values.get(self._output)
        if alone is None or alone.ndim != 2 or alone.shape[0] != 1:
            shape = "a constant" if alone is None else list(alone.shape)
            raise InvalidModel(f"the ONNX file answers one image with {shape} where logits [1, n_classes] are needed")
        self._check_batch(images, alone)
        return floating

    def _check_batch(self, images: Tensor, alone: Tensor) -> None:
        each = torch.cat([alone, self(images[1:])])
        try:
            error = (self(images) - each).abs().max()
        except Exception:  # noqa: BLE001 - any failure means the same
            error = torch.tensor(torch.inf)
        if not error <= RELATIVE_TOLERANCE * each.abs().max():
            raise InvalidModel(
                "the ONNX file answers two images otherwise than each alone; export it with a dynamic batch axis"
            )


def _fold(file: OnnxFile) -> tuple[list[NodeProto], dict[str, Tensor]]:
    """Return the nodes that depend on the images, and all constants by name: weights, and what follows from them."""
    constants = {tensor.name: to_tensor(tensor) for tensor in file.model.graph.initializer}
    nodes = []
    for node in file.model.graph.node:
        if all(name in constants or not name for name in node.input):
            given = [constants.get(name) for name in node.input]
            try:
                result = operator(node.op_type, file.opset)(*given, **attributes(node))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise InvalidModel(
                    f"operator {node.op_type} fails to compute value {node.output[0]!r} ({type(error).__name__})"
                ) from error
            results = (result,) if isinstance(result, Tensor) else result
            constants.update(zip(node.output, results, strict=False))
        else:
            nodes.append(node)
    return nodes, constants


def _steps(nodes: Sequence[NodeProto], constants: Mapping[str, Tensor], output: str, opset: int) -> list[_Step]:
    """Return what is to be run, in order."""
    last_use = {name: index for index, node in enumerate(nodes) for name in (*node.output, *node.input)}
    last_use.pop(output, None)  # to be kept
    steps = []
    for index, node in enumerate(nodes):
        unknown = [name for name in node.output[1:] if last_use.get(name, index) > index]
        if unknown and node.op_type != "Split":
            raise InvalidModel(f"output {unknown[0]!r} of operator {node.op_type} is not known here; export without it")
        given = [bool(name) and name not in constants for name in node.input]
        fixed = {i: constants[name] for i, name in enumerate(node.input) if name in constants}
        run = partial(operator(node.op_type, opset), **attributes(node))
        inputs = tuple(name for name, is_given in zip(node.input, given, strict=True) if is_given)
        dropped = {name for name in (*node.input, *node.output) if last_use.get(name) == index}
        steps.append(_Step(node, Operation(run, given, fixed), inputs, tuple(dropped)))
    return steps


def _arithmetic(nodes: Sequence[NodeProto], constants: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the values that depend on the images' shape alone, and are no arrays of weights."""
    names: set[str] = set()
    for node in nodes:
        fixed = [constants[name] for name in node.input if name in constants]
        arrays = any(value.is_floating_point() and value.ndim > 1 for value in fixed)
        if node.op_type in ("Shape", "Size") or (
            not arrays and all(name in names or name in constants for name in node.input if name)
        ):
            names.update(node.output)
    return names


def _weights(
    node: NodeProto, constants: Mapping[str, Tensor], shared: dict[str, nn.Parameter]
) -> dict[int, nn.Parameter]:
    """Return a node's constants that belong on the device, by position; nodes share those that have the same name."""
    weights = {}
    for position, name in enumerate(node.input):
        value = constants.get(name)
        if value is None or not value.is_floating_point() or value.ndim == 0:
            continue
        if position == 0 or node.op_type not in _READ_AS_NUMBERS:
            weights[position] = shared.setdefault(name, nn.Parameter(value, requires_grad=False))
    return weights


def _layer_names(values: Iterable[str]) -> list[str]:
    """Return names that layers may have and torch's modules too, each different, like those of the values."""
    names: list[str] = []
    taken = set(_RESERVED)
    for value in values:
        base = re.sub("[^A-Za-z0-9_-]", "_", value).lstrip("_-") or "value"
        name, count = base[:_LONGEST_NAME], 1
        while name in taken:
            count += 1
            suffix = f"_{count}"
            name = base[: _LONGEST_NAME - len(suffix)] + suffix
        taken.add(name)
        names.append(name)
    return names
