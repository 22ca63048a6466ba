"""One explain function for every kind of bank: trunk, head gradient, codes, contributions, maps, report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from concepts import answers, estimators, input_maps, intervention, parts
from concepts.answers import Findings
from concepts.bank import Bank
from concepts.codec import EMPTY, Codec, Codes
from concepts.cut import Cut, GradientOf
from concepts.errors import (
    InvalidInput,
    NumericalFailure,
    UnsupportedOption,
    WhenceError,
)
from concepts.explanation import (
    ConceptMap,
    ConceptScope,
    EngineRequest,
    Estimator,
    ExplainOptions,
    Explanation,
    InputMapReport,
    InputMethod,
)
from concepts.input_maps import InputMaps, Rooted
from concepts.intervention import Intervention, InterventionRequest
from concepts.model import Model
from concepts.parts import PartsCodec, Whole
from concepts.runtimes import Runtime, Trunk, open_trunk
from concepts.timing import Stopwatch, timed

AT_ONCE = 1024
"""Most concepts of all classes that are solved for together."""


class BatchKey(NamedTuple):
    """What requests must share to be computed together."""

    estimator: Estimator
    substitute: bool
    input_method: InputMethod | None
    """None: no input maps."""
    concepts: ConceptScope
    """Normal form: ``target`` where both are the same."""
    parts: bool


class Memory(NamedTuple):
    """Bytes of tensors; engines of one model share the first, those of one layer the second too."""

    model: int
    """The network's weights."""
    trunk: int
    """What the runtime of the trunk holds beside them."""
    bank: int


def check_bank(model: Model, bank: Bank, cut: Cut) -> None:
    """Raise InvalidInput where a bank is not one of a model with these weights, cut at a layer of that width."""
    if bank.model != model.spec.name or bank.weights_digest != model.spec.weights_digest:
        raise InvalidInput(f"bank {bank.reference} is not a bank of model {model.spec.name!r} with these weights")
    if cut.layout.channels != bank.channels:
        raise InvalidInput(f"bank {bank.reference} has {bank.channels} channels, its layer has {cut.layout.channels}")
    strange = [c.class_index for c in bank.concepts if (c.class_index or 0) >= len(model.spec.class_names)]
    if strange:
        raise InvalidInput(f"bank {bank.reference} has concepts of class {strange[0]}, which its model does not have")


class _Encoded(NamedTuple):
    """A batch after trunk, head and codes."""

    codec: Codec
    x: Tensor
    """What the model takes."""
    rooted: Rooted | None
    """The activation with its way back to the input, where gradients there are wanted."""
    a: Tensor
    """In the layer's layout."""
    logits: Tensor
    gradient_of: GradientOf
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
    of_parts
        Engine of the bank's parts, if the caller has it already.
    without_parts
        Why the bank's parts cannot be computed here: its concepts are explained all the same. None: they can.

    Raises
    ------
    InvalidInput
        If the bank is another model's or another layer width's.
    UnknownLayer, InvalidCut
        If the model cannot be cut at the bank's layer.
    """

    def __init__(
        self,
        model: Model,
        bank: Bank,
        cut: Cut | None = None,
        trunk: Trunk | None = None,
        of_parts: Engine | None = None,
        without_parts: str | None = None,
    ) -> None:
        self.model, self.bank = model, bank
        self.cut = cut or model.cut(bank.layer)
        check_bank(model, bank, self.cut)
        self.trunk = trunk or open_trunk(Runtime(), model, self.cut)
        self.codec = parts.codec(bank).to(model.device, screening=self.trunk.precision != "float32")
        # Made now, so that what a loaded bank holds does not depend on what it is asked.
        self._together = self.codec.together() if len(bank.concepts) <= AT_ONCE else None
        self._substitutes = self.codec.substitutes and self.cut.dynamic
        if bank.parts is not None and of_parts is None and without_parts is None:
            of_parts = Engine(model, bank.parts)
        self.of_parts, self._without_parts = of_parts, without_parts

    @property
    def memory(self) -> Memory:
        """What it holds on its device, its parts not counted."""
        network = self.model.module
        model = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        codecs = {self.codec, self._together or self.codec}
        bank = sum(value.nbytes for codec in codecs for value in vars(codec).values() if isinstance(value, Tensor))
        return Memory(model, self.trunk.bytes, bank)

    def warm_up(self, rows: int = 1) -> None:
        """Explain so many black images, so that the first request finds memory and kernels ready."""
        view, classes = self.model.spec.preprocessing, self.codec.classes()
        request = EngineRequest(None if classes is None else min(classes), ExplainOptions(maps=("activation",)))
        self.explain(np.zeros((rows, view.height, view.width, 3), np.uint8), [request] * rows)
        if self.of_parts is not None:
            self.of_parts.warm_up(rows)

    @cached_property
    def _linear_trunk(self) -> bool:
        return input_maps.is_linear(self.cut)

    def _codec(self, concepts: ConceptScope) -> Codec:
        """Return what solves for the codes of a scope; raise where that are too many concepts."""
        codec = self._together if concepts == "all" else self.codec
        if codec is None:
            raise UnsupportedOption(
                f"bank {self.bank.reference} has {len(self.bank.concepts)} concepts, and codes can be solved for "
                f"{AT_ONCE} at once: ask for those of the target's class",
                bank=self.bank.reference,
            )
        return codec

    def batch_key(self, options: ExplainOptions) -> BatchKey:
        """Return the key by which requests may share a batch."""
        method = options.input_method if "input" in options.maps else None
        scope = self.scope(options.concepts)
        return BatchKey(options.estimator, self._substitute(options), method, scope, options.parts)

    def scope(self, concepts: ConceptScope) -> ConceptScope:
        """Return whose concepts explain: where they belong to no class there is no choice, and it is ``target``."""
        return concepts if self.codec.per_class else "target"

    def _substitute(self, options: ExplainOptions) -> bool:
        if options.substitute is not None:
            return options.substitute
        return self._substitutes and options.estimator == "gradient"

    def check(self, request: EngineRequest) -> None:
        """Raise what ``explain`` would answer to a request, as far as that is known without its image.

        Raises
        ------
        UnknownClass
            If the model has no such class.
        UnsupportedOption
            If the bank cannot do what the options ask.
        """
        options = request.options
        if options.parts:
            parts.check(self.bank, self.scope(options.concepts), self._without_parts)
        self._codec(self.scope(options.concepts))
        colourful = self.cut.dynamic and self.model.spec.preprocessing.inverse
        input_maps.check(options, self.bank.kind, differentiable=self.codec.differentiable, colourful=colourful)
        if options.estimator == "ablation" and "contribution" in options.maps:
            raise UnsupportedOption(
                "ablation says nothing about positions: contribution maps go with gradient or integrated"
            )
        if not self.codec.reconstructs and (options.substitute or options.estimator == "integrated"):
            raise UnsupportedOption(f"banks of kind {self.bank.kind} do not reconstruct: use gradient or ablation")
        if options.substitute and options.estimator != "gradient":
            raise UnsupportedOption("substitute goes with the gradient estimator")
        if request.target is not None:
            self._check_target(request.target, options.concepts)

    def explain(
        self, views: NDArray[np.uint8], requests: Sequence[EngineRequest], whole: Whole | None = None
    ) -> list[Explanation | WhenceError]:
        """Explain a batch; each image's answer is what it would be alone.

        Parameters
        ----------
        views
            uint8 ``[B, height, width, 3]``: what the model sees of each image, from ``Preprocessing.fit``.
        requests
            One an image, each accepted by ``check``; all with the same ``batch_key``.
        whole
            Of an engine of parts: what their concepts say of these images. Where omitted, each concept has all.

        Returns
        -------
        list
            In the order of the images: an explanation, or the error of that image alone.
        """
        keys = {self.batch_key(request.options) for request in requests}
        if len(keys) != 1:
            raise ValueError("requests of one batch must have the same batch_key")
        (key,) = keys
        if key.input_method is not None and len(requests) > input_maps.ROWS:  # graphs of the trunk take much memory
            first = self.explain(views[: input_maps.ROWS], requests[: input_maps.ROWS])
            return first + self.explain(views[input_maps.ROWS :], requests[input_maps.ROWS :])
        clock = Stopwatch(self.model.device)
        options = [request.options for request in requests]
        targets = [request.target for request in requests]
        encoded = self._encode(views, targets, clock, key.concepts, key.input_method, whole)
        findings = self._findings(encoded, key)
        slots = answers.chosen_slots(findings.codes, findings.contributions.total, options)
        maps = answers.layer_maps(findings, slots, options, self.cut.layout, views.shape[1:3])
        reports: Sequence[InputMapReport | None] = [None] * len(requests)
        if key.input_method is not None:
            more, reports = self._input_maps(encoded, key.input_method, slots, options)
            maps |= more
        listed = answers.listed(findings, slots, maps, reports)
        runtime = self.trunk.description if key.input_method is None else f"torch {self.model.device.type} float32"
        explained = [
            error or answers.explanation(self.model.spec, self.bank, runtime, listed, row, request.options)
            for row, (error, request) in enumerate(zip(encoded.errors, requests, strict=True))
        ]
        if key.parts:
            explained = self._with_parts(views, explained, options, encoded.codes)
        return timed(explained, clock)

    def _with_parts(
        self,
        views: NDArray[np.uint8],
        explained: Sequence[Explanation | WhenceError],
        options: Sequence[ExplainOptions],
        codes: Codes,
    ) -> list[Explanation | WhenceError]:
        """Explain the images by the parts of the concepts, too, and join the answers."""
        engine, result = self.of_parts, list(explained)
        if engine is None:
            return result
        asked = {
            row: request
            for row, answer in enumerate(explained)
            if isinstance(answer, Explanation)
            and (request := parts.request(engine.bank, answer, options[row], engine.codec.classes())) is not None
        }
        if asked:
            rows, whole = list(asked), Whole(codes, self.cut.layout)
            found = engine.explain(views[rows], list(asked.values()), whole.rows(rows))
            for row, more in zip(asked, found, strict=True):
                answer = explained[row]
                if isinstance(answer, Explanation):
                    result[row] = parts.joined(self.bank, answer, more) if isinstance(more, Explanation) else more
        return result

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
        self._codec(self.scope(request.concepts))
        if request.target is not None:
            self._check_target(request.target, request.concepts)
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
            One an image, each accepted by ``check_intervention``; all of the same ``scope``.

        Returns
        -------
        list
            In the order of the images: the predictions before and after, or the error of that image alone.
        """
        clock = Stopwatch(self.model.device)
        scopes = {self.scope(request.concepts) for request in requests}
        if len(scopes) != 1:
            raise ValueError("requests of one batch must have the same scope")
        (scope,) = scopes
        encoded = self._encode(views, [request.target for request in requests], clock, scope)
        with torch.no_grad():
            weights = intervention.weights(encoded.codes, requests, len(self.bank.concepts))
            change = self.cut.unpositions(encoded.codec.combine(encoded.codes, weights)).to(encoded.a.dtype)
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
        return timed(answered, clock)

    def _encode(
        self,
        views: NDArray[np.uint8],
        wanted: Sequence[int | None],
        clock: Stopwatch,
        concepts: ConceptScope,
        method: InputMethod | None = None,
        whole: Whole | None = None,
    ) -> _Encoded:
        """Run trunk and head, settle the targets (None: the predicted class), and compute the codes."""
        x, codec = self.model.inputs(views), self._codec(concepts)
        root = input_maps.root(self.cut, x) if method == "gradient" else None
        # Maps on the input need PyTorch; the activations that they are compared with are its, too.
        trunk = self.trunk if method is None else self.cut.trunk
        a = trunk(x) if root is None else root.a
        clock.lap("trunk")
        logits, gradient_of = self.cut.head_forward(a)
        targets, errors = self._targets(logits, wanted, concepts)
        clock.lap("head")
        with torch.no_grad():
            if whole is not None and isinstance(codec, PartsCodec):
                codes: Codes = codec.encode_within(self.cut.positions(a), targets, self.cut.layout, whole)
            else:
                codes = codec.encode(self.cut.positions(a), targets)
        clock.lap("codes")
        return _Encoded(codec, x, root, a, logits, gradient_of, targets, errors, codes)

    def _findings(self, encoded: _Encoded, key: BatchKey) -> Findings:
        """Compute contributions and the report's numbers."""
        a, logits, targets, codes = encoded.a, encoded.logits, encoded.targets, encoded.codes
        gradient_of = encoded.gradient_of
        cut, codec = self.cut, encoded.codec
        components, reconstruction = self._reconstruct(encoded)
        explained, reconstructed, remainder = logits, None, None
        if reconstruction is not None and key.substitute:
            explained, gradient_of = cut.head_forward(reconstruction)
            reconstructed = explained
            remainder = None if codec.offset is None else reconstruction - components
        elif reconstruction is not None:
            with torch.no_grad():
                reconstructed = cut.head(reconstruction)
            remainder = a - components
        carried = None
        if key.estimator == "integrated" and reconstruction is not None:
            contributions = estimators.integrated(cut, codec, codes, a, components, targets, logits)
        elif key.estimator == "ablation":
            contributions = estimators.ablation(cut, codec, codes, a, remainder, targets, logits)
        else:
            gradient = cut.positions(gradient_of(targets))
            rest = None if remainder is None else cut.positions(remainder)
            contributions = estimators.from_gradient(codec, codes, gradient, rest)
            if reconstruction is None:
                components = codec.combine(codes)  # together: components that share something carry it once
                carried = (gradient * components).sum((1, 2)) / (gradient * cut.positions(a)).sum((1, 2))
        return Findings(
            logits=logits,
            explained=explained,
            targets=targets,
            codes=codes,
            contributions=contributions,
            constant=cut.facts.constant[targets],
            head_form=cut.facts.form,
            substitute=key.substitute,
            scope=key.concepts,
            relative_error=None if reconstruction is None else _norm(a - reconstruction) / _norm(a).clamp_min(1e-12),
            kl=None if reconstructed is None else _kl(logits, reconstructed),
            top1_agrees=None if reconstructed is None else logits.argmax(1) == reconstructed.argmax(1),
            carried_share=carried,
        )

    def _reconstruct(self, encoded: _Encoded) -> tuple[Tensor, Tensor | None]:
        """Return the sum of the components, and the reconstruction: it with the offset; None where there is none."""
        a, codec = encoded.a, encoded.codec
        if not codec.reconstructs:
            return torch.zeros_like(a), None
        summed = codec.combine(encoded.codes)
        components = self.cut.unpositions(summed).to(a.dtype)
        if codec.offset is None:
            return components, components
        return components, self.cut.unpositions(summed + codec.offset).to(a.dtype)

    def _input_maps(
        self, encoded: _Encoded, method: InputMethod, slots: Tensor, options: Sequence[ExplainOptions]
    ) -> tuple[answers.Maps, list[InputMapReport | None]]:
        """Return the maps of the chosen slots ``[B, L]`` on the input, and how far to trust them."""
        found = self._pixels(encoded, method, slots, coloured=any(option.colours for option in options))
        values = found.values.cpu().numpy()
        maps: answers.Maps = {}
        for row, option in enumerate(options):
            for place, slot in enumerate(slots[row, : option.top_k].tolist()):
                rendered = None
                if option.colours and found.gradients is not None:
                    rendered = input_maps.colours(encoded.x[row], found.gradients[row, place])
                maps["input", row, slot] = ConceptMap(values[row, place], None, rendered)
        return maps, self._input_reports(encoded, method, slots, options, found.values.sum((2, 3)))

    def _pixels(self, encoded: _Encoded, method: InputMethod, slots: Tensor, *, coloured: bool) -> InputMaps:
        cut, codec, x = self.cut, encoded.codec, encoded.x
        if encoded.rooted is not None:
            gradients_of = partial(codec.gradients, encoded.codes)
            return input_maps.input_maps(cut, encoded.rooted, x, slots, gradients_of, keep_gradients=coloured)
        smooth = method == "smoothgrad"
        points = input_maps.smooth_points(x, self.model.spec.preprocessing) if smooth else input_maps.path_points(x)
        ids = encoded.codes.ids.gather(1, slots)
        return InputMaps(input_maps.mean_maps(cut, codec, x, encoded.targets, ids, points), None)

    def _input_reports(
        self,
        encoded: _Encoded,
        method: InputMethod,
        slots: Tensor,
        options: Sequence[ExplainOptions],
        sums: Tensor,
    ) -> list[InputMapReport | None]:
        """Compare the sums of maps ``[B, L]`` with the activations."""
        ids, activations = encoded.codes.ids.gather(1, slots), encoded.codes.total().gather(1, slots)

        # Of nothing there is no share: concepts that are silent in the image may be active around it.
        silent = (ids == EMPTY) | (activations == 0)

        def largest(gaps: Tensor) -> list[float]:
            relative = (gaps.abs() / activations.abs()).masked_fill(silent, 0.0).cpu()
            return [float(relative[row, : option.top_k].max()) for row, option in enumerate(options)]

        residuals = largest(activations - sums)
        completeness: Sequence[float | None] = [None] * len(options)
        if method == "integrated":
            at_zero = input_maps.activations_at_zero(self.cut, encoded.codec, encoded.x, encoded.targets, ids)
            completeness = largest(activations - at_zero - sums)
        homogeneous = encoded.codec.homogeneous
        exactness, reason = input_maps.exactness(
            method, homogeneous=homogeneous, linear=homogeneous and method == "gradient" and self._linear_trunk
        )
        return [
            InputMapReport(exactness, reason, residual, method, complete)
            for residual, complete in zip(residuals, completeness, strict=True)
        ]

    def _targets(
        self, logits: Tensor, wanted: Sequence[int | None], concepts: ConceptScope
    ) -> tuple[Tensor, list[WhenceError | None]]:
        """Return the class to speak of for each image; images that cannot be answered get any class and an error."""
        classes = self._codec(concepts).classes()
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
                    self._check_target(target, concepts)
                except WhenceError as refusal:
                    error = refusal
            targets.append(target if error is None else spare)
            errors.append(error)
        return torch.tensor(targets, device=logits.device), errors

    def _check_target(self, target: int, concepts: ConceptScope) -> None:
        classes = None if concepts == "all" else self.codec.classes()
        names = self.model.spec.class_names
        self.model.spec.check_class(target)
        if classes is not None and target not in classes:
            some = ", ".join(repr(names[c]) for c in sorted(classes)[:10])
            raise UnsupportedOption(
                f"bank {self.bank.reference} has no concepts for class {names[target]!r}; it has for {some}"
                f"{', …' if len(classes) > 10 else ''}; or ask for the concepts of all classes",
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
