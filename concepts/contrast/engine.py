"""Answers why one class and not another: trunk, head gradient, distances to the plane, prototypes, shift, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.answers import UNTIMED, chosen_slots, class_score, concept_maps, exactness_of
from concepts.bank import Bank
from concepts.codec import EMPTY, Codes, DenseCodes
from concepts.contrast import shift
from concepts.contrast.records import Contrast, ContrastRequest, ShiftPoint
from concepts.contrast.shift import Shifted
from concepts.cut import Cut
from concepts.engine import Memory, check_bank
from concepts.errors import InvalidInput, NumericalFailure, UnsupportedOption, WhenceError
from concepts.explanation import ConceptMap, ConceptScore, ExplainOptions, FaithfulnessReport, MapKind
from concepts.kinds.contrast import tables
from concepts.model import Model
from concepts.runtimes import Runtime, Trunk, open_trunk
from concepts.timing import Stopwatch, timed

Maps = dict[tuple[MapKind, int, int | None], ConceptMap]
"""By kind, image and slot of a prototype; None in place of the slot: of the plane."""


class _Measured(NamedTuple):
    """What was computed for a batch of B images, on the device; P positions, S slots of prototypes."""

    normals: Tensor
    """Unit normals towards the target, ``[B, C]``."""
    distances: Tensor
    """Signed, ``[B, P]``; zero where a position has no place in the image."""
    contributions: Tensor
    """Of the plane's component at each position, ``[B, P]``."""
    carried: Tensor
    """The component's share of ``⟨G_i − G_j, a⟩``, ``[B]``."""
    codes: Codes
    """Of the prototypes on the target's side, ``[B, P, S]``."""
    shares: Codes
    """What they contribute."""


@dataclass(frozen=True)
class _Listed:
    """What answers are made of, on the CPU; lists by image."""

    logits: Tensor
    probabilities: NDArray[np.float64]
    """``[B, n_classes]``, as are the logits."""
    targets: list[int]
    others: list[int]
    contributions: Tensor
    """``[B, P]``."""
    constants: list[float]
    """Of the head: the target's less the other's."""
    carried: list[float]
    ids: list[list[int]]
    """By slot, as are the next three."""
    totals: list[list[float]]
    peaks: list[list[float]]
    shares: list[list[float]]
    tolerance: list[float] | None
    """Of the codes."""
    slots: list[list[int]]
    """That are listed, best first."""
    maps: Maps
    shifted: Shifted | None


class ContrastEngine:
    """Answers contrasts with one bank of kind ``contrast``.

    Parameters
    ----------
    model
        The model, on the device to use.
    bank
        A contrast bank of that model.
    cut, trunk
        As of ``Engine``.

    Raises
    ------
    InvalidInput
        If the bank is another model's or another layer width's.
    CorruptData
        If it does not hold what a contrast bank must.
    UnknownLayer, InvalidCut
        If the model cannot be cut at the bank's layer.
    """

    def __init__(self, model: Model, bank: Bank, cut: Cut | None = None, trunk: Trunk | None = None) -> None:
        self.model, self.bank = model, bank
        self.cut = cut or model.cut(bank.layer)
        check_bank(model, bank, self.cut)
        self.trunk = trunk or open_trunk(Runtime(), model, self.cut)
        self._tables = tables(bank)
        if len(self._tables.images) != len(model.spec.class_names):
            raise InvalidInput(
                f"bank {bank.reference} has planes for {len(self._tables.images)} classes, not its model's"
            )
        self._planes = self._tables.planes.to(model.device)
        self._exists = self._planes.weights.exists.cpu()
        if self._tables.prototypes is not None:
            self._tables.prototypes.to(model.device)

    @property
    def memory(self) -> Memory:
        """What it holds on its device."""
        network = self.model.module
        model = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        prototypes = self._tables.prototypes
        held = () if prototypes is None else vars(prototypes).values()
        bank = self._planes.bytes + sum(value.nbytes for value in held if isinstance(value, Tensor))
        return Memory(model, self.trunk.bytes, bank)

    def warm_up(self, rows: int = 1) -> None:
        """Answer so many black images, so that the first request finds memory and kernels ready."""
        pair = self._exists.nonzero()
        if len(pair):
            view = self.model.spec.preprocessing
            target, other = pair[0].tolist()
            request = ContrastRequest(target, other, ExplainOptions(maps=("activation",)))
            self.contrast(np.zeros((rows, view.height, view.width, 3), np.uint8), [request] * rows)

    def batch_key(self, request: ContrastRequest) -> bool:
        """Return what requests of one batch must share."""
        return request.shift

    def check(self, request: ContrastRequest) -> None:
        """Raise what ``contrast`` would answer to a request, as far as that is known without its image.

        Raises
        ------
        UnknownClass
            If the model has no such class.
        InvalidInput
            If both classes are the same.
        UnsupportedOption
            If the bank has no plane between the classes, or an option does not apply.
        """
        o = request.options
        # Each with what it would have to be.
        idle = {
            "substitute": not o.substitute,
            "parts": not o.parts,
            "colours": not o.colours,
            "concepts of all classes": o.concepts == "target",
            "maps of kind input": "input" not in o.maps,
            f"estimator {o.estimator}": o.estimator == "gradient",
            f"input method {o.input_method}": o.input_method == "gradient",
        }
        refused = [name for name, fine in idle.items() if not fine]
        if refused:
            raise UnsupportedOption(
                f"a contrast has no {refused[0]}: it takes top_k, order, maps (activation, contribution) and map_size"
            )
        for choice in (request.target, request.other):
            if choice is not None:
                self.model.spec.check_class(choice)
        if request.target is not None and request.other is not None:
            self._check_pair(request.target, request.other)
        elif (one := request.other if request.target is None else request.target) is not None:
            self._check_known(one)

    def contrast(self, views: NDArray[np.uint8], requests: Sequence[ContrastRequest]) -> list[Contrast | WhenceError]:
        """Answer a batch; each image's answer is what it would be alone.

        Parameters
        ----------
        views
            uint8 ``[B, height, width, 3]``: what the model sees of each image, from ``Preprocessing.fit``.
        requests
            One an image, each accepted by ``check``; all with the same ``batch_key``.

        Returns
        -------
        list
            In the order of the images: a contrast, or the error of that image alone.
        """
        clock = Stopwatch(self.model.device)
        a = self.trunk(self.model.inputs(views))
        clock.lap("trunk")
        return timed(self._contrast(a, requests, views.shape[1:3], clock), clock)

    def contrast_activations(self, a: Tensor, requests: Sequence[ContrastRequest]) -> list[Contrast | WhenceError]:
        """Answer for activations ``[B, …]`` that are there already, as ``contrast`` does but untimed."""
        view = self.model.spec.preprocessing
        return self._contrast(a, requests, (view.height, view.width), Stopwatch(self.model.device))

    def _contrast(
        self, a: Tensor, requests: Sequence[ContrastRequest], view_size: tuple[int, int], clock: Stopwatch
    ) -> list[Contrast | WhenceError]:
        if len({self.batch_key(request) for request in requests}) != 1:
            raise ValueError("requests of one batch must have the same batch_key")
        logits, gradient_of = self.cut.head_forward(a)
        targets, others, errors = self._classes(logits, requests)
        gradient = self.cut.positions(gradient_of(targets, others))
        clock.lap("head")
        with torch.no_grad():
            found = self._measure(a, gradient, targets, others)
        clock.lap("codes")
        shifted = None
        if requests[0].shift:
            shifted = shift.search(self.cut, a, found.normals, targets, others, self._tables.unit)
        listed = self._listed(found, logits, targets, others, shifted, requests, view_size)
        return [
            error or self._answer(listed, row, request.options)
            for row, (error, request) in enumerate(zip(errors, requests, strict=True))
        ]

    def _classes(
        self, logits: Tensor, requests: Sequence[ContrastRequest]
    ) -> tuple[Tensor, Tensor, list[WhenceError | None]]:
        """Settle both classes of each image; images that cannot be answered get any pair and an error."""
        order = logits.argsort(dim=1, descending=True, stable=True).tolist()
        sound = torch.isfinite(logits).all(1).tolist()
        spare = self._exists.nonzero()[0].tolist() if bool(self._exists.any()) else [0, min(1, logits.shape[1] - 1)]
        pairs, errors = [], []
        for request, ranked, is_sound in zip(requests, order, sound, strict=True):
            pair, error = spare, None
            try:
                if not is_sound:
                    raise NumericalFailure("the model answered this image with NaN or infinity")
                pair = self._pair(request, ranked)
            except WhenceError as refusal:
                error = refusal
            pairs.append(pair)
            errors.append(error)
        targets, others = torch.tensor(pairs, device=logits.device).unbind(1)
        return targets, others, errors

    def _pair(self, request: ContrastRequest, ranked: Sequence[int]) -> list[int]:
        """Return both classes, given the model's, most probable first."""
        target = ranked[0] if request.target is None else request.target
        if request.other == target:
            raise InvalidInput(
                f"the model predicts {self._name(target)}, the class to contrast with: name the target class, too, or "
                "contrast with another"
            )
        self._check_known(target)
        other = request.other
        if other is None:
            other = next((c for c in ranked if bool(self._exists[target, c])), target)
        self._check_pair(target, other)
        return [target, other]

    def _check_pair(self, target: int, other: int) -> None:
        if target == other:
            raise InvalidInput(f"a contrast needs two different classes, not {self._name(target)} twice")
        for one in (target, other):
            self._check_known(one)
        if not bool(self._exists[target, other]):
            raise UnsupportedOption(
                f"bank {self.bank.reference} has no plane between {self._name(target)} and {self._name(other)}: at "
                "this layer the model does not tell them apart",
                bank=self.bank.reference,
            )

    def _check_known(self, one: int) -> None:
        if not bool(self._exists[one].any()):
            known = [self._name(c) for c in self._exists.any(1).nonzero().squeeze(1).tolist()]
            rest = f"it has for {', '.join(known[:10])}{', …' if len(known) > 10 else ''}" if known else "it has none"
            raise UnsupportedOption(
                f"bank {self.bank.reference} has no planes for class {self._name(one)}, which too few training images "
                f"were predicted as; {rest}",
                bank=self.bank.reference,
            )

    def _name(self, index: int) -> str:
        return repr(self.model.spec.class_names[index])

    def _measure(self, a: Tensor, gradient: Tensor, targets: Tensor, others: Tensor) -> _Measured:
        """Compute distances, contributions and prototypes; the gradient is that of ``y_i − y_j``, ``[B, P, C]``."""
        positions, tokens = self.cut.positions(a), self.cut.layout.tokens
        normals, offsets = self._planes.between(targets, others)
        distances = (positions @ normals.unsqueeze(2)).squeeze(2) + offsets.unsqueeze(1)
        # The planes are of positions with a place: of the others nothing is said.
        distances[:, :tokens] = 0.0
        contributions = distances * (gradient @ normals.unsqueeze(2)).squeeze(2)
        codes, shares = self._prototypes(positions, gradient, distances, targets, others)
        whole = (gradient * positions).sum((1, 2))
        return _Measured(normals, distances, contributions, contributions.sum(1) / whole, codes, shares)

    def _prototypes(
        self, positions: Tensor, gradient: Tensor, distances: Tensor, targets: Tensor, others: Tensor
    ) -> tuple[Codes, Codes]:
        """Return codes on the target's side, and what they contribute; of pairs without prototypes empty slots."""
        prototypes = self._tables.prototypes
        pairs = [self._tables.pairs.get(pair, EMPTY) for pair in zip(targets.tolist(), others.tolist(), strict=True)]
        known = torch.tensor(pairs, device=positions.device)
        if prototypes is None:
            nothing = DenseCodes(
                positions.new_zeros(*positions.shape[:2], 1), torch.full_like(known, EMPTY).unsqueeze(1)
            )
            return nothing, nothing
        codes = prototypes.encode(positions, known.clamp_min(0))
        mine = (distances > 0).unsqueeze(2) & (known != EMPTY).view(-1, 1, 1)
        ids = codes.ids.masked_fill((known == EMPTY).unsqueeze(1), EMPTY)
        codes = replace(codes, values=codes.values * mine, ids=ids)
        return codes, prototypes.contributions(codes, gradient)

    def _listed(
        self,
        found: _Measured,
        logits: Tensor,
        targets: Tensor,
        others: Tensor,
        shifted: Shifted | None,
        requests: Sequence[ContrastRequest],
        view_size: tuple[int, int],
    ) -> _Listed:
        """Bring what answers list to the CPU, in few transfers."""
        options = [request.options for request in requests]
        layout, plane = self.cut.layout, torch.zeros_like(targets).unsqueeze(1)
        slots = _chosen(found, options)
        maps: Maps = {}
        sources: dict[MapKind, tuple[Tensor, Codes]] = {
            "activation": (found.distances, found.codes),
            "contribution": (found.contributions, found.shares),
        }
        for kind, (own, of_prototypes) in sources.items():
            rows = [row for row, o in enumerate(options) if kind in o.maps]
            wanted = [(row, slot, options[row].map_size) for row in rows for slot in slots[row]]
            mine = DenseCodes(own.unsqueeze(2), plane)
            placed = concept_maps(mine, [(row, 0, options[row].map_size) for row in rows], layout, view_size)
            maps |= {(kind, row, None): found_map for (row, _), found_map in placed.items()}
            maps |= {(kind, *key): m for key, m in concept_maps(of_prototypes, wanted, layout, view_size).items()}
        constants = self.cut.facts.constant
        return _Listed(
            logits=logits.cpu(),
            probabilities=torch.softmax(logits.double(), 1).cpu().numpy(),
            targets=targets.tolist(),
            others=others.tolist(),
            contributions=found.contributions.cpu(),
            constants=(constants[targets] - constants[others]).tolist(),
            carried=found.carried.tolist(),
            ids=found.codes.ids.tolist(),
            totals=found.codes.total().tolist(),
            peaks=found.codes.peak().tolist(),
            shares=found.shares.total().tolist(),
            tolerance=None if found.codes.tolerance is None else found.codes.tolerance.tolist(),
            slots=slots,
            maps=maps,
            shifted=None if shifted is None else Shifted(*(tensor.cpu() for tensor in shifted)),
        )

    def _answer(self, listed: _Listed, row: int, options: ExplainOptions) -> Contrast:
        """Return one image's contrast, untimed."""
        spec, bank = self.model.spec, self.bank
        target, other = listed.targets[row], listed.others[row]
        each = listed.contributions[row].double()
        flip, curve = _shift(listed.shifted, row)
        scores = [class_score(spec, listed.logits[row], listed.probabilities[row], c) for c in (target, other)]
        return Contrast(
            model=spec.name,
            model_digest=spec.weights_digest,
            bank=bank.reference,
            bank_digest=bank.digest,
            target=scores[0],
            other=scores[1],
            contribution=float(each.sum()),
            contribution_for_target=float(each.clamp_min(0).sum()),
            contribution_for_other=float(each.clamp_max(0).sum()),
            maps={kind: listed.maps[kind, row, None] for kind in options.maps},
            concepts=self._scores(listed, row, options),
            faithfulness=self._report(listed, row, scores[0].logit - scores[1].logit, float(each.sum())),
            plane=self._tables.report(target, other),
            flip_shift=flip,
            shift_curve=curve,
            stages=UNTIMED,
            runtime=self.trunk.description,
        )

    def _scores(self, listed: _Listed, row: int, options: ExplainOptions) -> tuple[ConceptScore, ...]:
        shares, names = listed.shares[row], self.model.spec.class_names
        whole = sum(map(abs, shares))
        return tuple(
            ConceptScore(
                id=(concept := self.bank.concepts[listed.ids[row][slot]]).id,
                label=concept.label,
                activation=listed.totals[row][slot],
                peak=listed.peaks[row][slot],
                contribution=shares[slot],
                share=shares[slot] / whole if whole > 0 else 0.0,
                maps={kind: listed.maps[kind, row, slot] for kind in options.maps},
                class_index=listed.targets[row],
                class_name=names[listed.targets[row]],
                weak_label=concept.weak,
                words=concept.words,
            )
            for slot in listed.slots[row]
        )

    def _report(self, listed: _Listed, row: int, difference: float, contribution: float) -> FaithfulnessReport:
        """Report on ``y_i − y_j``, of which the component carries a part and nothing stands for the rest."""
        exactness, reason = exactness_of(self.cut.facts.form, "gradient")
        constant = listed.constants[row]
        return FaithfulnessReport(
            explained_logit=difference,
            completeness_residual=difference - constant - contribution,
            constant=constant,
            exactness=exactness,
            exactness_reason=reason,
            carried_share=listed.carried[row],
            code_tolerance=None if listed.tolerance is None else listed.tolerance[row],
        )


def _chosen(found: _Measured, options: Sequence[ExplainOptions]) -> list[list[int]]:
    """Return the slots of the prototypes that each answer lists, best first."""
    slots = chosen_slots(found.codes, found.shares.total(), options)
    there = found.codes.ids.gather(1, slots) != EMPTY
    return [
        [slot for slot, is_there in zip(*rows, strict=True) if is_there][: o.top_k]
        for *rows, o in zip(slots.tolist(), there.tolist(), options, strict=True)
    ]


def _shift(shifted: Shifted | None, row: int) -> tuple[float | None, tuple[ShiftPoint, ...]]:
    """Return where an image flips, and its curve."""
    if shifted is None:
        return None, ()
    flip = float(shifted.flip[row])
    points = zip(shifted.shifts[row].tolist(), shifted.probabilities[row].tolist(), strict=True)
    curve = tuple(ShiftPoint(at, *values) for at, values in points if math.isfinite(at))
    return (flip if math.isfinite(flip) else None), curve
