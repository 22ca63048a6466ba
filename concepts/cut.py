"""Cutting a classifier ``f = h ∘ g`` at a named layer, with nothing but its modules.

The trunk ``g`` runs the model and stops at the layer. The head ``h`` runs the model with every module that is done
before the layer replaced by its recorded answer to one image, and the layer itself by the given activation: it costs
what comes after the layer, for any number of activations. No tracing is needed, so control flow is allowed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from concepts.errors import InvalidCut, InvalidModel, UnknownLayer
from concepts.flow import Flow
from concepts.layout import Layout, layout_of
from concepts.trace import Trace, answering, outputs, run_until, trace

RELATIVE_TOLERANCE = 1e-4
"""How closely logits must be reproduced for a cut to be accepted, relative to the largest of them."""

HeadForm = Literal["affine", "dynamic_linear", "general"]
"""Affine: the gradient is constant. Dynamic linear: logit − constant = ⟨G(a), a⟩. General: neither."""

_GRADIENTS_KEPT = 64
"""Classes whose gradient is remembered, where the head is affine."""


class HeadFacts(NamedTuple):
    """What was found out about a head."""

    form: HeadForm
    constant: Tensor
    """h(0), float32 ``[n_classes]``."""


class GradientOf(Protocol):
    """Answers with ``∂y_t/∂a`` of each row's target, or ``∂(y_t − y_other)/∂a``; classes are int64 ``[N]``."""

    def __call__(self, targets: Tensor, others: Tensor | None = None) -> Tensor: ...


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
        Any two different inputs of the model, ``[2, C, H, W]``, used to record and to check; they should be such as
        the model was made for, but need not matter.

    Attributes
    ----------
    layout : Layout
    shape : tuple of int
        Of one image's activation.
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

    facts: HeadFacts

    _widened = False
    """Whether the head sees as many copies of the example as it has rows, for models that count images at the start."""

    def __init__(self, module: nn.Module, layer: str, example: Tensor) -> None:
        self._bind(module, layer, example)
        survey = _Survey(module, example)
        problem = _problem(self, survey)
        if problem is not None:
            valid = _nearest_valid(survey, layer)
            remedy = f"; nearest layers that can be cut: {', '.join(valid)}" if valid else ""
            raise InvalidCut(f"layer {layer!r} {problem}{remedy}", layer=layer)
        self._look(self.trunk(example))

    def _bind(self, module: nn.Module, layer: str, example: Tensor) -> None:
        self._module, self._layer, self._target = module, layer, _find(module, layer)
        self._examples = example
        self._answers: dict[nn.Module, Any] = {}
        self._gradients: dict[int, Tensor] = {}

    def _look(self, activation: Tensor, form: HeadForm | None = None) -> None:
        """Note what the activations ``[2, …]`` of the examples tell; the head's form is found out unless given."""
        self.layout = layout_of(activation, *self._examples.shape[-2:])
        self.shape = tuple(activation.shape[1:])
        self.non_negative = bool((activation >= 0).all())
        self._nothing = torch.zeros_like(activation[:1])
        constant = _constant(self, self._nothing)
        self.n_classes = len(constant)
        self.facts = HeadFacts(form or _head_form(self, activation, constant), constant)

    @property
    def module(self) -> nn.Module:
        """The whole classifier."""
        return self._module

    @property
    def layer(self) -> str:
        """Name of the layer."""
        return self._layer

    @property
    def example(self) -> Tensor:
        """One input of the model, ``[1, C, H, W]``."""
        return self._examples[:1]

    @property
    def examples(self) -> Tensor:
        """Both inputs that the cut was checked with, ``[2, C, H, W]``."""
        return self._examples

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
        return _one_tensor(run_until(self._module, self._target, x), self._layer)

    def head(self, a: Tensor) -> Tensor:
        """Return h(a), the logits ``[N, n_classes]`` of N activations.

        Parameters
        ----------
        a
            Activations ``[N, …]`` as ``trunk`` gives them; N is free. Never edited. Gradients flow where enabled.
        """
        answers, x = self._begin(a)
        with answering(answers), self._shortened():
            logits: Tensor = self._module(x)
        return logits

    def head_until(self, a: Tensor, layer: str) -> Tensor:
        """Return what a layer after this one answers, ``[N, …]``, and run no further; see ``head``."""
        answers, x = self._begin(a)
        with answering(answers), self._shortened():
            output = run_until(self._module, _find(self._module, layer), x)
        return _one_tensor(output, layer)

    def _begin(self, a: Tensor) -> tuple[dict[nn.Module, Callable[[], Any]], Tensor]:
        """Return what stands in for all up to the layer: ready answers, and an input that does not matter."""
        rows = len(a) if self._widened else 1
        answers: dict[nn.Module, Callable[[], Any]] = {
            module: partial(_widen, answer, rows) for module, answer in self._answers.items()
        }
        # The clones keep in-place operations away from the caller's tensor, and from the example.
        return {**answers, self._target: a.clone}, _widen(self.example, rows).clone()

    def _shortened(self) -> AbstractContextManager[Any]:
        """Return a context in which the model leaves out what the layer is computed from, if it knows how to."""
        begin: Callable[[str], AbstractContextManager[Any]] | None = getattr(self._module, "beginning_at", None)
        return begin(self._layer) if begin is not None else nullcontext()

    @property
    def dynamic(self) -> bool:
        """Whether the model is made to be linear for each input (B-cos): it has an explanation mode."""
        return getattr(self._module, "explanation_mode", None) is not None

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

    def head_forward(self, a: Tensor) -> tuple[Tensor, GradientOf]:
        """Return the logits now, and a function that returns the gradient for targets chosen after seeing them.

        Given other classes, too, it returns the gradient of the difference ``∂(y_t − y_other)/∂a``.
        """
        if self.facts.form == "affine":
            with torch.no_grad():
                return self.head(a), self._affine_difference
        logits, product = self.head_product(a)

        def gradient_of(targets: Tensor, others: Tensor | None = None) -> Tensor:
            weights = torch.zeros_like(logits).scatter_(1, targets.view(-1, 1), 1.0)
            if others is not None:
                weights.scatter_(1, others.view(-1, 1), -1.0)
            return product(weights)

        return logits, gradient_of

    def _affine_difference(self, targets: Tensor, others: Tensor | None = None) -> Tensor:
        gradient = self.affine_gradient(targets)
        return gradient if others is None else gradient - self.affine_gradient(others)

    def affine_gradient(self, targets: Tensor) -> Tensor:
        """Return the gradient of an affine head, which depends on the class alone: each is computed once.

        Parameters
        ----------
        targets
            Class indices, int64 ``[N]``.

        Returns
        -------
        ``[N, …]``, as one image's activation each.
        """
        wanted = targets.tolist()
        missing = [target for target in dict.fromkeys(wanted) if target not in self._gradients]
        if len(self._gradients) + len(missing) > _GRADIENTS_KEPT:
            self._gradients.clear()
            missing = list(dict.fromkeys(wanted))
        if missing:
            nothing = self._nothing.expand(len(missing), *self._nothing.shape[1:])
            logits, product = self.head_product(nothing)
            found = product(functional.one_hot(torch.tensor(missing), self.n_classes).to(logits))
            if found.ndim == 4:  # as activations lie: products of tensors that lie alike are several times faster
                found = found.contiguous(memory_format=torch.channels_last)
            self._gradients |= zip(missing, found.split(1), strict=True)
        return torch.cat([self._gradients[target] for target in wanted])

    def without_gradient(self) -> InvalidCut:
        """Return the error of a head that cannot be differentiated."""
        return InvalidCut(f"no gradient flows from the logits back to layer {self._layer!r}", layer=self._layer)

    def positions(self, a: Tensor) -> Tensor:
        """Return activations (or gradients) as rows of channels, ``[B, P, C]``; a view where strides allow."""
        return self.layout.flatten(a)

    def unpositions(self, p: Tensor) -> Tensor:
        """Return ``[B, P, C]`` in the layer's own layout; the inverse of ``positions``."""
        return self.layout.unflatten(p)

    def head_product(self, a: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the logits now, and a function for the gradient of any weighted sum of them, by one backward pass.

        It takes weights ``[N, n_classes]``, which may depend on the logits, and returns ``∂(Σ_c w_c y_c)/∂a``. Call
        it once.
        """
        with torch.enable_grad(), self.linearised():
            leaf = a.detach().requires_grad_()
            logits = self.head(leaf)
        if not logits.requires_grad:
            raise self.without_gradient()

        def product(weights: Tensor) -> Tensor:
            with torch.enable_grad():
                return torch.autograd.grad(logits, leaf, weights)[0]

        return logits.detach(), product


class CutLayer(NamedTuple):
    """A layer at which a model can be cut."""

    name: str
    layout: Layout
    shape: tuple[int, ...]
    """Of one image's activation."""
    non_negative: bool
    """Whether the activation of the examples is nowhere negative."""
    head: HeadForm
    parameters_before: int
    """Parameters that act up to the layer."""
    parameters_after: int


def layers(module: nn.Module, example: Tensor) -> list[CutLayer]:
    """Return every layer at which a classifier can be cut, in running order; parameters as of ``Cut``."""
    survey = _Survey(module, example)
    total = survey.flow.parameters if survey.flow is not None else sum(p.numel() for p in module.parameters())
    found: list[CutLayer] = []
    for cut, a, form in _valid(survey, survey.trace.order):
        after = survey.flow.parameters_after(cut.layer) if survey.flow is not None else 0
        layout = layout_of(a, *example.shape[-2:])
        found.append(CutLayer(cut.layer, layout, tuple(a.shape[1:]), bool((a >= 0).all()), form, total - after, after))
    return found[::-1]


def cuts_after(cut: Cut) -> list[Cut]:
    """Return the cuts of the same classifier at all layers that end after a cut's layer, in running order."""
    survey = _Survey(cut.module, cut.examples)
    order = survey.trace.order
    found: list[Cut] = []
    for later, a, form in _valid(survey, order[order.index(cut.layer) + 1 :]):
        later._look(a, form)
        found.append(later)
    return found[::-1]


def _valid(survey: _Survey, names: Sequence[str]) -> Iterator[tuple[Cut, Tensor, HeadForm]]:
    """Yield the cuts that are possible, the last first, with the activations of the examples and the head's form."""
    candidates = [name for name in names if _obstacle(survey, name) is None]
    with torch.no_grad():
        _, activations = outputs(survey.module, candidates, survey.example.clone())
    form: HeadForm = "affine"
    for name in reversed(candidates):
        cut, a = _probe(survey, name), activations[name]
        if _leak(cut, survey, a) is not None:
            continue
        if form != "general":  # what comes before a general head is general
            try:
                form = _head_form(cut, a, _constant(cut, torch.zeros_like(a[:1])))
            except InvalidCut:
                continue
        yield cut, a, form


class _Survey:
    """What a look at a classifier on two examples tells about all of its layers."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module, self.example = module, example
        self.logits = logits_of(module, example)
        self.trace: Trace = trace(module, example[:1].clone())  # some models edit their input
        self.flow: Flow | None
        try:
            self.flow = Flow(module, example[:1])
        except RuntimeError:  # a part that cannot be differentiated: the numbers alone decide
            self.flow = None


def _widen(value: Any, rows: int) -> Any:
    """Let one image's tensor stand for that many rows, without a copy."""
    one = isinstance(value, Tensor) and value.ndim > 0 and len(value) == 1
    return value.expand(rows, *value.shape[1:]) if one and rows > 1 else value


def _one_tensor(output: Any, layer: str) -> Tensor:
    """Return a layer's answer, if it is one."""
    if output is None:
        raise InvalidCut(f"layer {layer!r} did not run for this input", layer=layer)
    if not isinstance(output, Tensor):
        raise InvalidCut(f"layer {layer!r} answers with a {type(output).__name__}, not one tensor", layer=layer)
    return output


def _find(module: nn.Module, layer: str) -> nn.Module:
    names: dict[str, nn.Module] = dict(module.named_modules())
    if layer and layer in names:
        return names[layer]
    near = difflib.get_close_matches(layer, [name for name in names if name], n=5, cutoff=0.3)
    near = near or [name for name, _ in module.named_children()]
    raise UnknownLayer(f"the model has no layer {layer!r}; nearest names: {', '.join(near)}", layer=layer)


def logits_of(module: nn.Module, x: Tensor) -> Tensor:
    """Return a classifier's logits; raise ``InvalidModel`` if it fails or answers anything but ``[B, n_classes]``."""
    with torch.no_grad():
        try:
            logits = module(x.clone())
        except Exception as error:
            raise InvalidModel(
                f"the model fails on an input of shape {list(x.shape)} ({type(error).__name__})"
            ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidModel(f"the model answers {shape} where logits of shape [{x.shape[0]}, n_classes] are needed")
    return logits


def _problem(cut: Cut, survey: _Survey) -> str | None:
    """Say why the layer cannot be cut, or None; leaves ``cut`` able to run its head."""
    obstacle = _obstacle(survey, cut.layer)
    if obstacle is not None:
        return obstacle
    activation = cut.trunk(survey.example)
    return _leak(cut, survey, activation)


def _obstacle(survey: _Survey, layer: str) -> str | None:
    """Say what speaks against the layer before any number is compared, or None."""
    times = survey.trace.count(layer)
    if times != 1:
        return "never runs" if times == 0 else f"runs {times} times in one forward pass"
    output = survey.trace.output(layer)
    if not isinstance(output, Tensor) or not 2 <= output.ndim <= 4 or output.shape[0] != 1:
        return "does not answer with one tensor of activations"
    if output.dtype != survey.example.dtype:
        return f"answers in {output.dtype}, not in {survey.example.dtype}".replace("torch.", "")
    if survey.flow is not None and not survey.flow.passes(layer):
        return "is bypassed by another path to the logits"
    return None


def _leak(cut: Cut, survey: _Survey, activation: Tensor) -> str | None:
    """Say how the logits depend on anything but the activations ``[2, …]`` of the examples, or None."""
    cut._answers = survey.trace.answers_before(cut.layer)
    # The answers come from the first example, the activation from the second: whatever else reaches the head shows.
    if not _reproduces(cut, activation[1:], survey.logits[1:]):
        return "is bypassed by another path to the logits"
    cut._widened = not _reproduces(cut, activation, survey.logits)
    if cut._widened and not _reproduces(cut, activation, survey.logits):
        return "is followed by code that takes the number of images from before it, and not from its output"
    return None


def _reproduces(cut: Cut, activation: Tensor, logits: Tensor) -> bool:
    try:
        with torch.no_grad():
            reproduced = cut.head(activation)
    except Exception:  # noqa: BLE001 - models check shapes in many ways
        return False
    error = (reproduced - logits).abs().max() if reproduced.shape == logits.shape else math.inf
    return bool(error <= RELATIVE_TOLERANCE * logits.abs().max().clamp_min(1e-6))


def _nearest_valid(survey: _Survey, layer: str, wanted: int = 2) -> list[str]:
    """Return the layers nearest in running order that can be cut: up to ``wanted`` before and after."""
    order = survey.trace.order
    if layer not in order:
        return []
    at = order.index(layer)
    found: list[str] = []
    for candidates in (reversed(order[:at]), iter(order[at + 1 :])):
        side = (name for name in candidates if _problem(_probe(survey, name), survey) is None)
        found += [name for name, _ in zip(side, range(wanted), strict=False)]
    return sorted(found, key=order.index)


def _probe(survey: _Survey, layer: str) -> Cut:
    """Return a cut that is not validated yet."""
    probe = Cut.__new__(Cut)
    probe._bind(survey.module, layer, survey.example)
    return probe


@torch.no_grad()
def _constant(cut: Cut, nothing: Tensor) -> Tensor:
    """Return h(0); zero where the head has no finite answer to nothing, as those that divide by a norm may not."""
    return cut.head(nothing)[0].float().nan_to_num(0.0, 0.0, 0.0)


def _head_form(cut: Cut, activation: Tensor, constant: Tensor) -> HeadForm:
    """Find out whether the head is affine or dynamic linear, by asking it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(activation.shape, generator=generator).to(activation) * activation.std()
    # Large ones, too: what saturates or bends shows only there.
    probes = torch.cat([activation, -activation, 100 * activation + noise, noise])
    # All classes at once, by a random sum of their logits: any one of them may be constant, and say nothing.
    mixture = torch.randn(len(constant), generator=generator).to(constant)
    with torch.enable_grad(), cut.linearised():
        leaf = probes.detach().requires_grad_()
        mixed = cut.head(leaf).to(constant.dtype) @ mixture
        if not mixed.requires_grad:
            raise cut.without_gradient()
        (gradient,) = torch.autograd.grad(mixed.sum(), leaf)
    linear = (gradient * probes).flatten(1).sum(1)
    mixed = mixed.detach()
    scale = torch.maximum(mixed.abs(), (gradient * probes).flatten(1).abs().sum(1)).clamp_min(1e-6)
    if not bool(((mixed - constant @ mixture - linear).abs() <= RELATIVE_TOLERANCE * scale).all()):
        return "general"
    spread = (gradient - gradient[:1]).abs().max()
    return "affine" if bool(spread <= RELATIVE_TOLERANCE * gradient.abs().max()) else "dynamic_linear"
