"""Cutting a classifier ``f = h ∘ g`` at a named layer, with nothing but its modules.

The trunk ``g`` runs the model and stops at the layer. The head ``h`` runs the model with every module that is done
before the layer replaced by its recorded answer to one image, and the layer itself by the given activation: it costs
what comes after the layer, for any number of activations. No tracing is needed, so control flow is allowed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from concepts.errors import InvalidCut, InvalidModel, UnknownLayer

RELATIVE_TOLERANCE = 1e-4
"""How closely logits must be reproduced for a cut to be accepted, relative to the largest of them."""


class Layout(NamedTuple):
    """Where things are in an activation."""

    order: Literal["bchw", "bhwc", "btc", "bc"]
    channels: int
    grid: tuple[int, int]
    """Rows and columns of the spatial positions."""
    tokens: int
    """Positions before the spatial ones that have no place in the image (class token)."""

    @property
    def positions(self) -> int:
        """Number of positions P, tokens included."""
        return self.tokens + self.grid[0] * self.grid[1]


class HeadFacts(NamedTuple):
    """What was found out about a head."""

    form: Literal["affine", "dynamic_linear", "general"]
    """Affine: the gradient is constant. Dynamic linear: logit − constant = ⟨G(a), a⟩. General: neither."""
    constant: Tensor
    """h(0), float32 ``[n_classes]``."""


class _Reached(Exception):
    """The layer has answered; the rest of the model need not run."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Cut:
    """A classifier cut at one layer, validated.

    Parameters
    ----------
    module
        The classifier, in evaluation mode; its parameters should not require gradients. It is never changed, but for
        the time of a call: one call at a time.
    layer
        Name of a module as in ``named_modules()``.
    example
        Any two different inputs of the model, ``[2, C, H, W]``, used to record and to check. Never images that
        matter: noise will do.

    Attributes
    ----------
    layout : Layout
    facts : HeadFacts
    n_classes : int
    non_negative : bool
        Whether the activation of the examples is nowhere negative.

    Raises
    ------
    UnknownLayer
        If there is no such layer; the nearest names are offered.
    InvalidCut
        If the layer runs more than once or never, does not answer with one tensor, or another path bypasses it; the
        nearest layers that can be cut are named.
    InvalidModel
        If the model does not map a batch to ``[B, n_classes]``.
    """

    _widened = False
    """Whether the head sees as many copies of the example as it has rows, for models that count images at the start."""

    def __init__(self, module: nn.Module, layer: str, example: Tensor) -> None:
        self._module, self._layer = module, layer
        self._target = _find(module, layer)
        self._example = example[:1]
        logits = _logits(module, example)
        self.n_classes = logits.shape[1]
        trace = _trace(module, self._example)
        problem = _problem(self, trace, example, logits)
        if problem is not None:
            valid = _nearest_valid(module, layer, trace, example, logits)
            remedy = f"; nearest layers that can be cut: {', '.join(valid)}" if valid else ""
            raise InvalidCut(f"layer {layer!r} {problem}{remedy}", layer=layer)
        activation = self.trunk(example)
        self.layout = _layout(activation, example.shape[-2:], layer)
        self.non_negative = bool((activation >= 0).all())
        self.facts = _head_facts(self, activation)

    @property
    def layer(self) -> str:
        """Name of the layer."""
        return self._layer

    def trunk(self, x: Tensor) -> Tensor:
        """Return g(x), the activation at the layer, without gradients.

        Parameters
        ----------
        x
            Model input ``[B, C, H, W]``.
        """
        with torch.no_grad():
            return self.trunk_with_gradients(x)

    def trunk_with_gradients(self, x: Tensor) -> Tensor:
        """Return g(x) as a node of the autograd graph, for maps on the input; see ``trunk``."""

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Reached(output)

        handle = self._target.register_forward_hook(stop)
        try:
            self._module(x)
        except _Reached as reached:
            output = reached.output
        else:
            raise InvalidCut(f"layer {self._layer!r} did not run for this input", layer=self._layer)
        finally:
            handle.remove()
        if not isinstance(output, Tensor):
            raise InvalidCut(
                f"layer {self._layer!r} answers with a {type(output).__name__}, not one tensor", layer=self._layer
            )
        return output

    def head(self, a: Tensor) -> Tensor:
        """Return h(a), the logits ``[N, n_classes]`` of N activations.

        Parameters
        ----------
        a
            Activations ``[N, …]`` as ``trunk`` gives them; N is free. Never edited. Gradients flow where enabled.
        """
        rows = len(a) if self._widened else 1
        with ExitStack() as patches:
            for module, answer in self._answers.items():
                patches.enter_context(_answering(module, partial(_widen, answer, rows)))
            # The clone keeps in-place operations of the head away from the caller's tensor.
            patches.enter_context(_answering(self._target, a.clone))
            logits: Tensor = self._module(_widen(self._example, rows))
        return logits

    def linearised(self) -> AbstractContextManager[Any]:
        """Return a context in which gradients are those of the dynamic linear map (explanation mode of B-cos)."""
        mode: Callable[[], AbstractContextManager[Any]] | None = getattr(self._module, "explanation_mode", None)
        return mode() if mode is not None else nullcontext()

    def head_gradient(self, a: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and ``G = ∂y_t/∂a`` for one target class a row, by one backward pass through the head.

        Parameters
        ----------
        a
            Activations ``[N, …]``.
        targets
            Class indices, int64 ``[N]``.

        Returns
        -------
        logits : ``[N, n_classes]``
        gradient : same shape as ``a``
        """
        logits, gradient_of = self.head_forward(a)
        return logits, gradient_of(targets)

    def head_forward(self, a: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the logits now, and a function that returns the gradient for targets chosen after seeing them."""
        with torch.enable_grad(), self.linearised():
            leaf = a.detach().requires_grad_()
            logits = self.head(leaf)
        if not logits.requires_grad:
            raise InvalidCut(f"no gradient flows from the logits back to layer {self._layer!r}", layer=self._layer)

        def gradient_of(targets: Tensor) -> Tensor:
            chosen = logits.gather(1, targets.view(-1, 1)).sum()
            return torch.autograd.grad(chosen, leaf)[0]

        return logits.detach(), gradient_of

    def positions(self, a: Tensor) -> Tensor:
        """Return activations (or gradients) as rows of channels, ``[B, P, C]``; a view where strides allow."""
        if self.layout.order == "bchw":
            return a.flatten(2).transpose(1, 2)
        if self.layout.order == "bhwc":
            return a.flatten(1, 2)
        return a if self.layout.order == "btc" else a.unsqueeze(1)

    def unpositions(self, p: Tensor) -> Tensor:
        """Return ``[B, P, C]`` in the layer's own layout; the inverse of ``positions``."""
        if self.layout.order == "bchw":
            return p.transpose(1, 2).reshape(len(p), -1, *self.layout.grid)
        if self.layout.order == "bhwc":
            return p.reshape(len(p), *self.layout.grid, -1)
        return p if self.layout.order == "btc" else p.squeeze(1)

    def _record(self, trace: _Trace) -> None:
        self._answers = trace.answers_before(self._layer)


class _Call(NamedTuple):
    name: str
    module: nn.Module
    output: Any


class _Trace(NamedTuple):
    """The calls of one forward pass, in the order in which they ended."""

    calls: list[_Call]

    def count(self, layer: str) -> int:
        return sum(call.name == layer for call in self.calls)

    def answers_before(self, layer: str) -> dict[nn.Module, Any]:
        """Return the outermost modules that ran once and ended before the layer did, with their answers."""
        end = next(i for i, call in enumerate(self.calls) if call.name == layer)
        done = {call.name: call for call in self.calls[:end]}
        return {
            call.module: call.output
            for name, call in done.items()
            if self.count(name) == 1 and not name.startswith(layer + ".") and not _inside_any(name, done)
        }


def _widen(value: Any, rows: int) -> Any:
    """Let one image's tensor stand for that many rows, without a copy."""
    one = isinstance(value, Tensor) and value.ndim > 0 and len(value) == 1
    return value.expand(rows, *value.shape[1:]) if one and rows > 1 else value


def _inside_any(name: str, others: dict[str, Any]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(1, len(parts)))


def _trace(module: nn.Module, x: Tensor) -> _Trace:
    calls: list[_Call] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda child, _inputs, output: calls.append(_Call(name, child, output))

    with ExitStack() as hooks, torch.no_grad():
        for name, child in module.named_modules():
            if name:
                hooks.callback(child.register_forward_hook(hook(name)).remove)
        module(x)
    return _Trace(calls)


@contextmanager
def _answering(module: nn.Module, answer: Callable[[], Any]) -> Iterator[None]:
    """Let a module give a ready answer instead of running."""
    own = vars(module).get("forward")  # an instance may carry one of its own already
    module.forward = lambda *_inputs, **_options: answer()
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _find(module: nn.Module, layer: str) -> nn.Module:
    names: dict[str, nn.Module] = dict(module.named_modules())
    if layer and layer in names:
        return names[layer]
    near = difflib.get_close_matches(layer, [name for name in names if name], n=5, cutoff=0.3)
    near = near or [name for name, _ in module.named_children()]
    raise UnknownLayer(f"the model has no layer {layer!r}; nearest names: {', '.join(near)}", layer=layer)


def _logits(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        try:
            logits = module(x)
        except Exception as error:
            raise InvalidModel(
                f"the model fails on an input of shape {list(x.shape)} ({type(error).__name__})"
            ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidModel(f"the model answers {shape} where logits of shape [{x.shape[0]}, n_classes] are needed")
    return logits


def _problem(cut: Cut, trace: _Trace, example: Tensor, logits: Tensor) -> str | None:
    """Say why the layer cannot be cut, or None; leaves ``cut`` able to run its head."""
    times = trace.count(cut.layer)
    if times != 1:
        return "never runs" if times == 0 else f"runs {times} times in one forward pass"
    call = next(call for call in trace.calls if call.name == cut.layer)
    if not isinstance(call.output, Tensor) or not 2 <= call.output.ndim <= 4 or call.output.shape[0] != 1:
        return "does not answer with one tensor of activations"
    cut._record(trace)
    activation = cut.trunk(example)
    # The answers come from the first example, the activation from the second: whatever else reaches the head shows.
    if not _reproduces(cut, activation[1:], logits[1:]):
        return "is bypassed by another path to the logits"
    cut._widened = not _reproduces(cut, activation, logits)
    if cut._widened and not _reproduces(cut, activation, logits):
        return "is followed by code that takes the number of images from before it, and not from its output"
    return None


def _reproduces(cut: Cut, activation: Tensor, logits: Tensor) -> bool:
    try:
        with torch.no_grad():
            reproduced = cut.head(activation)
    except RuntimeError:
        return False
    error = (reproduced - logits).abs().max() if reproduced.shape == logits.shape else math.inf
    return bool(error <= RELATIVE_TOLERANCE * logits.abs().max().clamp_min(1e-6))


def _nearest_valid(
    module: nn.Module, layer: str, trace: _Trace, example: Tensor, logits: Tensor, wanted: int = 2
) -> list[str]:
    """Return the layers nearest in running order that can be cut: up to ``wanted`` before and after."""
    order = list(dict.fromkeys(call.name for call in trace.calls))
    if layer not in order:
        return []
    at = order.index(layer)
    found: list[str] = []
    for candidates in (reversed(order[:at]), iter(order[at + 1 :])):
        side = (name for name in candidates if _is_valid(module, name, trace, example, logits))
        found += [name for name, _ in zip(side, range(wanted), strict=False)]
    return sorted(found, key=order.index)


def _is_valid(module: nn.Module, layer: str, trace: _Trace, example: Tensor, logits: Tensor) -> bool:
    return _problem(_probe(module, layer, example), trace, example, logits) is None


def _probe(module: nn.Module, layer: str, example: Tensor) -> Cut:
    """Return a cut that is not validated yet."""
    probe = Cut.__new__(Cut)
    probe._module, probe._layer, probe._target, probe._example = module, layer, _find(module, layer), example[:1]
    return probe


def _layout(a: Tensor, input_size: torch.Size, layer: str) -> Layout:
    height, width = input_size
    if a.ndim == 2:
        return Layout("bc", a.shape[1], (1, 1), 0)
    if a.ndim == 3:
        tokens, grid = _token_grid(a.shape[1], height, width)
        return Layout("btc", a.shape[2], grid, tokens)
    _, d1, d2, d3 = a.shape
    # Swin-like networks keep channels last: then the first two axes, and not the last two, have the image's shape.
    if d1 * width == d2 * height and d2 * width != d3 * height:
        return Layout("bhwc", d3, (d1, d2), 0)
    return Layout("bchw", d1, (d2, d3), 0)


def _token_grid(length: int, height: int, width: int) -> tuple[int, tuple[int, int]]:
    """Split a token sequence into tokens without a place and a grid of the image's shape."""
    for tokens in range(min(length, 9)):
        side = math.isqrt(max((length - tokens) * height // width, 1))
        for rows in (side, side + 1):
            columns = (length - tokens) // rows
            if rows * columns == length - tokens and abs(rows * width - columns * height) < max(height, width):
                return tokens, (rows, columns)
    return 0, (1, length)


def _head_facts(cut: Cut, activation: Tensor) -> HeadFacts:
    """Find out whether the head is affine or dynamic linear, by asking it."""
    with torch.no_grad():
        constant = cut.head(torch.zeros_like(activation[:1]))[0].float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(activation.shape, generator=generator).to(activation) * activation.std()
    probes = torch.cat([activation, -activation, 2 * activation + noise, noise])
    targets = torch.randint(cut.n_classes, (1,), generator=generator).expand(len(probes)).to(probes.device)
    logits, gradient = cut.head_gradient(probes, targets)
    linear = (gradient * probes).flatten(1).sum(1)
    chosen = logits.gather(1, targets.view(-1, 1)).squeeze(1)
    scale = torch.maximum(chosen.abs(), (gradient * probes).flatten(1).abs().sum(1)).clamp_min(1e-6)
    if not bool(((chosen - constant[targets] - linear).abs() <= RELATIVE_TOLERANCE * scale).all()):
        return HeadFacts("general", constant)
    spread = (gradient - gradient[:1]).abs().max()
    constant_gradient = bool(spread <= RELATIVE_TOLERANCE * gradient.abs().max())
    return HeadFacts("affine" if constant_gradient else "dynamic_linear", constant)


class CutLayer(NamedTuple):
    """A layer at which a model can be cut."""

    name: str
    layout: Layout
    non_negative: bool
    """Whether the activation of the examples is nowhere negative."""


def layers(module: nn.Module, example: Tensor) -> Iterator[CutLayer]:
    """Yield every layer at which a classifier can be cut, in running order; parameters as of ``Cut``."""
    logits, trace = _logits(module, example), _trace(module, example[:1])
    for name in dict.fromkeys(call.name for call in trace.calls):
        probe = _probe(module, name, example)
        if _problem(probe, trace, example, logits) is None:
            activation = probe.trunk(example)
            yield CutLayer(name, _layout(activation, example.shape[-2:], name), bool((activation >= 0).all()))
