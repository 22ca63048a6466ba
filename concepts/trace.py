"""Watching a network run, stopping it at a layer, and answering in place of its layers; nothing of it lasts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """One call of a layer."""

    name: str
    module: nn.Module
    output: Any


class Trace(NamedTuple):
    """The calls of one forward pass, in the order in which they ended."""

    calls: list[Call]

    @property
    def order(self) -> list[str]:
        """Names of the layers, in running order."""
        return list(dict.fromkeys(call.name for call in self.calls))

    def count(self, layer: str) -> int:
        """Return how many times the layer ran."""
        return sum(call.name == layer for call in self.calls)

    def output(self, layer: str) -> Any:
        """Return the layer's first answer; later layers may have edited it."""
        return next(call.output for call in self.calls if call.name == layer)

    def answers_before(self, layer: str) -> dict[nn.Module, Any]:
        """Return the outermost modules that ran once and ended before the layer did, with their answers."""
        end = next(i for i, call in enumerate(self.calls) if call.name == layer)
        done = {call.name: call for call in self.calls[:end]}
        times: dict[str, int] = {}
        for call in self.calls:
            times[call.name] = times.get(call.name, 0) + 1
        return {
            call.module: call.output
            for name, call in done.items()
            if times[name] == 1 and not name.startswith(layer + ".") and not _inside_any(name, done)
        }


def trace(module: nn.Module, x: Tensor) -> Trace:
    """Run a network on an input and note every call of its layers."""
    calls: list[Call] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda child, _inputs, output: calls.append(Call(name, child, output))

    with ExitStack() as hooks, torch.no_grad():
        for name, child in module.named_modules():
            if name:
                hooks.callback(child.register_forward_hook(hook(name)).remove)
        module(x)
    return Trace(calls)


def outputs(module: nn.Module, layers: Collection[str], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a network's answer and copies of what some of its layers answered on the way, each a tensor."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        # Copied at once: what follows may edit the tensor.
        return lambda _child, _inputs, output: found.update({name: output.clone()})

    with ExitStack() as hooks:
        for name, child in module.named_modules():
            if name in layers:
                hooks.callback(child.register_forward_hook(keep(name)).remove)
        answer = module(x)
    return answer, found


class _Reached(Exception):
    """The layer has answered; the rest of the network need not run."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def run_until(module: nn.Module, layer: nn.Module, x: Tensor) -> Any:
    """Run a network until a layer has answered, and return the answer; None where the layer does not run."""

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        raise _Reached(output)

    handle = layer.register_forward_hook(stop)
    try:
        module(x)
    except _Reached as reached:
        return reached.output
    finally:
        handle.remove()
    return None


@contextmanager
def answering(answers: Mapping[nn.Module, Callable[[], Any]]) -> Iterator[None]:
    """Let modules give ready answers instead of running."""
    # Written straight into the instances: torch's own way to set an attribute takes longer than many a head.
    own = {module: vars(module).get("forward") for module in answers}  # an instance may carry one of its own already
    for module, answer in answers.items():
        vars(module)["forward"] = _ignoring_inputs(answer)
    try:
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


def _ignoring_inputs(answer: Callable[[], Any]) -> Callable[..., Any]:
    return lambda *_inputs, **_options: answer()


def _inside_any(name: str, others: dict[str, Call]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(1, len(parts)))
