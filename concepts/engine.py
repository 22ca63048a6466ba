"""One explain function for every kind of bank: trunk, head gradient, codes, contributions, maps, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from concepts import answers, estimators, intervention
from concepts.answers import Findings
from concepts.bank import Bank
from concepts.codec import Codes
from concepts.cut import Cut
from concepts.errors import (
    InvalidInput,
    NotImplementedHere,
    NumericalFailure,
    UnknownClass,
    UnsupportedOption,
    WhenceError,
)
from concepts.explanation import EngineRequest, Estimator, ExplainOptions, Explanation, StageTimes
from concepts.intervention import Intervention, InterventionRequest
from concepts.model import Model
from concepts.runtimes import Runtime, Trunk, open_trunk

Answer = TypeVar("Answer", Explanation, Intervention)


class BatchKey(NamedTuple):
    """What requests must share to be computed together."""

    estimator: Estimator
    substitute: bool


def batch_key(options: ExplainOptions) -> BatchKey:
    """Return the key by which requests for one bank may share a batch."""
    return BatchKey(options.estimator, bool(options.substitute))


class Memory(NamedTuple):
    """Bytes of tensors; engines of one model share the first, those of one layer the second too."""

    model: int
    """The network's weights."""
    trunk: int
    """What the runtime of the trunk holds beside them."""
    bank: int


class _Encoded(NamedTuple):
    """A batch after trunk, head and codes."""

    a: Tensor
    """In the layer's layout."""
    logits: Tensor
    gradient_of: Callable[[Tensor], Tensor]
    targets: Tensor
    errors: list[WhenceError | None]
    """Of the images that cannot be answered."""
    codes: Codes


class Engine:
    """Explains images with one bank, and says what the model would answer if its concepts were weaker or stronger.

    Parameters
    ----------
    model
        The model, on the device to use.
    bank
        A bank of that model.
    cut
        The model cut at the bank's layer, if the caller has it already.
    trunk
        What computes the trunk of that cut; PyTorch in float32 where omitted.

    Raises
    ------
    InvalidInput
        If the bank is another model's or another layer width's.
    UnknownLayer, InvalidCut
        If the model cannot be cut at the bank's layer.
    """

    def __init__(self, model: Model, bank: Bank, cut: Cut | None = None, trunk: Trunk | None = None) -> None:
        if bank.model != model.spec.name or bank.weights_digest != model.spec.weights_digest:
            raise InvalidInput(f"bank {bank.reference} is not a bank of model {model.spec.name!r} with these weights")
        self.model, self.bank = model, bank
        self.cut = cut or model.cut(bank.layer)
        if self.cut.layout.channels != bank.channels:
            raise InvalidInput(
                f"bank {bank.reference} has {bank.channels} channels, its layer has {self.cut.layout.channels}"
            )
        strange = [c.class_index for c in bank.concepts if (c.class_index or 0) >= len(model.spec.class_names)]
        if strange:
            raise InvalidInput(
                f"bank {bank.reference} has concepts of class {strange[0]}, which its model does not have"
            )
        self.codec = bank.codec().to(model.device)
        self.trunk = trunk or open_trunk(Runtime(), model, self.cut)

    @property
    def memory(self) -> Memory:
        """What it holds on its device."""
        network = self.model.module
        model = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        bank = sum(value.nbytes for value in vars(self.codec).values() if isinstance(value, Tensor))
        return Memory(model, self.trunk.bytes, bank)

    def warm_up(self, rows: int = 1) -> None:
        """Explain so many black images, so that the first request finds memory and kernels ready."""
        view, classes = self.model.spec.preprocessing, self.codec.classes()
        request = EngineRequest(None if classes is None else min(classes), ExplainOptions(maps=("activation",)))
        self.explain(np.zeros((rows, view.height, view.width, 3), np.uint8), [request] * rows)

    def check(self, request: EngineRequest) -> None:
        """Raise what ``explain`` would answer to a request, as far as that is known without its image.

        Raises
        ------
        UnknownClass
            If the model has no such class.
        UnsupportedOption
            If the bank cannot do what the options ask.
        NotImplementedHere
            If this version cannot.
        """
        options = request.options
        if "input" in options.maps:
            raise NotImplementedHere(f"input maps are not offered for banks of kind {self.bank.kind} yet")
        if options.estimator == "ablation" and "contribution" in options.maps:
            raise UnsupportedOption(
                "ablation says nothing about positions: contribution maps go with gradient or integrated"
            )
        if not self.codec.reconstructs and (options.substitute or options.estimator == "integrated"):
            raise UnsupportedOption(f"banks of kind {self.bank.kind} do not reconstruct: use gradient or ablation")
        if options.substitute and options.estimator != "gradient":
            raise UnsupportedOption("substitute goes with the gradient estimator")
        if request.target is not None:
            self._check_target(request.target)

    def explain(self, views: NDArray[np.uint8], requests: Sequence[EngineRequest]) -> list[Explanation | WhenceError]:
        """Explain a batch; each image's answer is what it would be alone.

        Parameters
        ----------
        views
            uint8 ``[B, height, width, 3]``: what the model sees of each image, from ``Preprocessing.fit``.
        requests
            One an image, each accepted by ``check``; all with the same ``batch_key``.

        Returns
        -------
        list
            In the order of the images: an explanation, or the error of that image alone.
        """
        if len({batch_key(request.options) for request in requests}) != 1:
            raise ValueError("requests of one batch must have the same batch_key")
        clock = _Stopwatch(self.model.device)
        encoded = self._encode(views, [request.target for request in requests], clock)
        findings = self._findings(encoded, requests[0].options)
        listed = answers.listing(findings, [request.options for request in requests], self.cut.layout, views.shape[1:3])
        explained = [
            error
            or answers.explanation(self.model.spec, self.bank, self.trunk.description, listed, row, request.options)
            for row, (error, request) in enumerate(zip(encoded.errors, requests, strict=True))
        ]
        return _timed(explained, clock)

    def check_intervention(self, request: InterventionRequest) -> None:
        """Raise what ``intervene`` would answer to a request, as far as that is known without its image.

        Raises
        ------
        UnknownClass
            If the model has no such class.
        InvalidInput
            If there are no scales, or one is not finite or too large.
        UnknownConcept
            If the bank has no such concept.
        UnsupportedOption
            If a concept belongs to another class than the target, or the bank has no concepts for the target.
        """
        if request.target is not None:
            self._check_target(request.target)
        intervention.check(self.bank, self.model.spec, request)

    def intervene(
        self, views: NDArray[np.uint8], requests: Sequence[InterventionRequest]
    ) -> list[Intervention | WhenceError]:
        """Scale the codes of chosen concepts of a batch and run the head again; each answer is what it would be alone.

        Parameters
        ----------
        views
            As for ``explain``.
        requests
            One an image, each accepted by ``check_intervention``.

        Returns
        -------
        list
            In the order of the images: the predictions before and after, or the error of that image alone.
        """
        clock = _Stopwatch(self.model.device)
        encoded = self._encode(views, [request.target for request in requests], clock)
        with torch.no_grad():
            weights = intervention.weights(encoded.codes, requests, len(self.bank.concepts))
            change = self.cut.unpositions(self.codec.combine(encoded.codes, weights)).to(encoded.a.dtype)
        # As the head was run before, so that a scale of one changes nothing at all.
        after, _ = self.cut.head_forward(encoded.a + change)
        before, after, targets = encoded.logits.cpu(), after.cpu(), encoded.targets.tolist()
        spec, bank = self.model.spec, self.bank
        answered = [
            error
            or intervention.misplaced(bank, spec, request, targets[row])
            or intervention.answer(spec, bank, self.trunk.description, before[row], after[row], targets[row])
            for row, (error, request) in enumerate(zip(encoded.errors, requests, strict=True))
        ]
        return _timed(answered, clock)

    def _encode(self, views: NDArray[np.uint8], wanted: Sequence[int | None], clock: _Stopwatch) -> _Encoded:
        """Run trunk and head, settle the targets (None: the predicted class), and compute the codes."""
        a = self.trunk(self.model.inputs(views))
        clock.lap("trunk")
        logits, gradient_of = self.cut.head_forward(a)
        targets, errors = self._targets(logits, wanted)
        clock.lap("head")
        with torch.no_grad():
            codes = self.codec.encode(self.cut.positions(a), targets)
        clock.lap("codes")
        return _Encoded(a, logits, gradient_of, targets, errors, codes)

    def _findings(self, encoded: _Encoded, options: ExplainOptions) -> Findings:
        """Compute contributions and the report's numbers."""
        a, logits, gradient_of, targets, _, codes = encoded
        cut, codec = self.cut, self.codec
        substitute = bool(options.substitute)
        reconstruction = cut.unpositions(codec.combine(codes)).to(a.dtype) if codec.reconstructs else None
        explained, reconstructed = logits, None
        if reconstruction is not None and substitute:
            explained, gradient_of = cut.head_forward(reconstruction)
            reconstructed = explained
        elif reconstruction is not None:
            with torch.no_grad():
                reconstructed = cut.head(reconstruction)
        remainder = None if reconstruction is None or substitute else a - reconstruction
        carried = None
        if options.estimator == "integrated" and reconstruction is not None:
            contributions = estimators.integrated(cut, codec, codes, a, reconstruction, targets, logits)
        elif options.estimator == "ablation":
            contributions = estimators.ablation(cut, codec, codes, a, remainder, targets, logits)
        else:
            gradient = cut.positions(gradient_of(targets))
            rest = None if remainder is None else cut.positions(remainder)
            contributions = estimators.from_gradient(codec, codes, gradient, rest)
            if reconstruction is None:
                carried = contributions.total.sum(1) / (gradient * cut.positions(a)).sum((1, 2))
        return Findings(
            logits=logits,
            explained=explained,
            targets=targets,
            codes=codes,
            contributions=contributions,
            constant=cut.facts.constant[targets],
            head_form=cut.facts.form,
            relative_error=None if reconstruction is None else _norm(a - reconstruction) / _norm(a).clamp_min(1e-12),
            kl=None if reconstructed is None else _kl(logits, reconstructed),
            top1_agrees=None if reconstructed is None else logits.argmax(1) == reconstructed.argmax(1),
            carried_share=carried,
        )

    def _targets(self, logits: Tensor, wanted: Sequence[int | None]) -> tuple[Tensor, list[WhenceError | None]]:
        """Return the class to speak of for each image; images that cannot be answered get any class and an error."""
        classes = self.codec.classes()
        spare = 0 if classes is None else min(classes)
        predicted = logits.argmax(1).tolist()
        sound = torch.isfinite(logits).all(1).tolist()
        targets: list[int] = []
        errors: list[WhenceError | None] = []
        for choice, prediction, is_sound in zip(wanted, predicted, sound, strict=True):
            target = prediction if choice is None else choice
            error: WhenceError | None = None
            if not is_sound:
                error = NumericalFailure("the model answered this image with NaN or infinity")
            else:
                try:
                    self._check_target(target)
                except WhenceError as refusal:
                    error = refusal
            targets.append(target if error is None else spare)
            errors.append(error)
        return torch.tensor(targets, device=logits.device), errors

    def _check_target(self, target: int) -> None:
        classes, names = self.codec.classes(), self.model.spec.class_names
        if not 0 <= target < len(names):
            raise UnknownClass(
                f"model {self.model.spec.name!r} has classes 0 to {len(names) - 1}, not {target}",
                model=self.model.spec.name,
            )
        if classes is not None and target not in classes:
            some = ", ".join(repr(names[c]) for c in sorted(classes)[:10])
            raise UnsupportedOption(
                f"bank {self.bank.reference} has no concepts for class {names[target]!r}; it has for {some}"
                f"{', …' if len(classes) > 10 else ''}",
                bank=self.bank.reference,
            )


def _norm(a: Tensor) -> Tensor:
    """Return the Euclidean norm of each image's activation, ``[B]``; flattening would copy channels-last ones."""
    norm: Tensor = torch.linalg.vector_norm(a, dim=tuple(range(1, a.ndim)))
    return norm


def _kl(logits: Tensor, reconstructed: Tensor) -> Tensor:
    """Return ``KL(softmax h(a) ‖ softmax h(â))`` in nats, ``[B]``."""
    p, q = functional.log_softmax(logits.double(), 1), functional.log_softmax(reconstructed.double(), 1)
    divergence: Tensor = (p.exp() * (p - q)).sum(1).clamp_min(0.0)
    return divergence


def _timed(answered: Sequence[Answer | WhenceError], clock: _Stopwatch) -> list[Answer | WhenceError]:
    """Return the answers of a batch with the times of its stages."""
    clock.lap("explain")
    stages = StageTimes(**clock.times_ms, batch_size=len(answered))
    return [each if isinstance(each, WhenceError) else replace(each, stages=stages) for each in answered]


class _Stopwatch:
    """Milliseconds between laps, with the device's queue emptied at each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times_ms: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.times_ms[f"{stage}_ms"] = 1e3 * (now - self._since)
        self._since = now
