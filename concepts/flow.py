"""Which way data takes through a network, read off autograd's graph of one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Flow:
    """The graph from a network's input to its output, with the place of each layer in it.

    Parameters
    ----------
    module
        The network; it is not changed.
    example
        An input.

    Raises
    ------
    RuntimeError
        If the network cannot be differentiated.

    Notes
    -----
    Paths that carry no gradient (shapes, detached tensors) do not show: that no path goes around a layer is necessary
    for a clean cut, not sufficient.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self._layers: dict[str, Any] = {}
        # Leaves of our own: the network's parameters stay as they are. Some networks want leaves untouched, so the
        # input is not one.
        parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters() if _real(p)}
        self._sizes = {id(p): p.numel() for p in parameters.values()}
        with torch.enable_grad(), warnings.catch_warnings(), ExitStack() as hooks:
            warnings.simplefilter("ignore")  # networks that look at values are warned of the gradients these carry here
            for name, child in module.named_modules():
                if name:
                    hooks.callback(child.register_forward_hook(self._note(name)).remove)
            x = example.detach().requires_grad_().clone()
            self._input = x.grad_fn
            self._output = functional_call(module, parameters, (x,)).grad_fn
        self._parameters = parameters
        """Held, so that ids stay theirs."""

    def passes(self, layer: str) -> bool:
        """Whether every path from the input to the output goes through the layer's output."""
        place = self._layers.get(layer)
        return place is not None and all(node is not self._input for node in self._behind(place))

    def parameters_after(self, layer: str) -> int:
        """Return how many parameters act after the layer."""
        used = {id(node.variable) for node in self._behind(self._layers[layer]) if hasattr(node, "variable")}
        return sum(self._sizes.get(key, 0) for key in used)

    @property
    def parameters(self) -> int:
        """How many parameters act at all."""
        used = {id(node.variable) for node in self._behind(None) if hasattr(node, "variable")}
        return sum(self._sizes.get(key, 0) for key in used)

    def _note(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._layers[name] = output.grad_fn

        return hook

    def _behind(self, place: Any) -> Iterator[Any]:
        """Yield every node from which the output is reached without passing a place."""
        seen, waiting = {place, None}, [self._output]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]


def _real(parameter: Tensor) -> bool:
    return parameter.is_floating_point()
