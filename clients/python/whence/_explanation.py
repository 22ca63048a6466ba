"""What comes back for one image: plain, frozen records with numpy maps. They mirror the wire contract."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from whence import _labels
from whence._errors import MissingExtra

if TYPE_CHECKING:
    from whence._images import Source

Order = Literal["contribution", "activation"]
Estimator = Literal["gradient", "integrated", "ablation"]
MapKind = Literal["activation", "contribution", "input"]
MapSize = Literal["grid", "image"]
InputMethod = Literal["gradient", "smoothgrad", "integrated"]
ConceptScope = Literal["target", "all"]
Priority = Literal["interactive", "background"]
Exactness = Literal["exact", "first_order"]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the caller's image, after EXIF orientation."""

    left: float
    """Inside, as is ``top``."""
    top: float
    right: float
    """Outside, as is ``bottom``."""
    bottom: float


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class of the model, and what the model thinks of it."""

    index: int
    name: str
    logit: float
    probability: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ConceptMap:
    """Where a concept is."""

    values: NDArray[np.float32]
    """``[height, width]``, read-only; spans the explanation's ``view``."""
    class_token: float | None = None
    """For token models: the value at the class token, which has no place in the image."""
    colours: NDArray[np.uint8] | None = None
    """RGBA ``[height, width, 4]``, read-only: the colours that the concept looked for, opaque where they count. None
    but for input maps, where asked for."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ConceptMap):
            return NotImplemented
        return (
            self.class_token == other.class_token
            and np.array_equal(self.values, other.values)
            and np.array_equal(self.colours, other.colours)  # type: ignore[arg-type]  # None equals None
        )

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash

    def __repr__(self) -> str:
        from whence._inventory_words import map_line

        return map_line(self)


@dataclass(frozen=True, slots=True, repr=False)
class ConceptScore:
    """One concept's part in the prediction."""

    id: int
    label: str
    """Empty where the concept has no label."""
    activation: float
    """Sum of the concept's code over positions."""
    peak: float
    """Largest code over positions."""
    contribution: float
    """To the target's logit, in logits."""
    share: float
    """Contribution / (Σ |contribution| over all concepts + |unexplained|), in [−1, 1]."""
    maps: Mapping[MapKind, ConceptMap] = field(default_factory=dict)
    class_index: int | None = None
    """The class that the concept belongs to, where the bank holds concepts per class."""
    class_name: str = ""
    parts: tuple[ConceptScore, ...] = ()
    """Its sub-concepts at an earlier layer, where asked for, in the requested order. Their numbers are of that layer:
    they do not add up to this concept's."""
    weak_label: bool = False
    """Whether the label is a machine's that cannot be trusted much."""
    words: tuple[str, ...] = ()
    """The best words for the concept, best first, where it was named; the label need not be among them."""

    def __hash__(self) -> int:
        # Maps have no hash; without them scores still serve as keys, as of Client.intervene.
        return hash((self.id, self.label, self.contribution))

    def __repr__(self) -> str:
        from whence._inventory_words import score_line

        return score_line(self)

    @property
    def name(self) -> str:
        """The label, with a question mark where it is weak; or the id where there is none."""
        return _labels.name(self)


@dataclass(frozen=True, slots=True)
class InputMapReport:
    """How far the maps on the input can be trusted."""

    exactness: Exactness
    """Whether the pixels add up to the activation; else a first-order statement."""
    reason: str
    residual: float
    """Largest |Σ pixels − activation| / activation of the listed concepts that are active."""
    method: InputMethod = "gradient"
    """How they were computed."""
    completeness_residual: float | None = None
    """Of integrated gradients: largest |activation − activation at the input that is zero − Σ pixels| / activation;
    None for the others."""


@dataclass(frozen=True, slots=True)
class FaithfulnessReport:
    """How far the explanation can be trusted, measured on this image."""

    explained_logit: float
    """The target's logit that is accounted for: the model's own, or that of the reconstruction where it is
    substituted."""
    completeness_residual: float
    """Explained logit − constant − Σ contributions − unexplained, in logits."""
    constant: float
    """What the logit is with nothing at the layer; zero where the head has no such constant."""
    exactness: Exactness
    """Whether contributions, remainder and constant are the logit, or a first-order statement about this image."""
    exactness_reason: str
    relative_error: float | None = None
    """‖a − â‖ / ‖a‖; None for banks that do not reconstruct, as are the next two."""
    kl: float | None = None
    """KL(softmax h(a) ‖ softmax h(â)), in nats."""
    top1_agrees: bool | None = None
    """Whether h(â) predicts the same class as h(a)."""
    carried_share: float | None = None
    """Share of ⟨G, a⟩ that the bank's components carry; None for banks that reconstruct."""
    integration_error: float | None = None
    """|Σ − difference| / |difference| of the integrated estimator; None for the others."""
    code_tolerance: float | None = None
    """Largest violation of the codes' optimality conditions, relative to the data; None but for NMF banks."""
    input_maps: InputMapReport | None = None
    """Of the listed concepts' input maps; None where they were not asked for."""

    def describe(self) -> str:
        """The report in words, one statement a line."""
        from whence._words import report_lines

        return "\n".join(report_lines(self))


@dataclass(frozen=True, slots=True)
class PartsReport:
    """What the parts of all concepts of the target's class say together.

    It is a statement of its own about the same logit, at another layer; it shares no sum with that of the concepts.
    """

    layer: str
    contributions_total: float
    """Sum of the contributions of all these parts, in logits."""
    unexplained: float | None
    """As of `Explanation`, at the parts' layer; so is the report."""
    faithfulness: FaithfulnessReport


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds that the service spent in each stage of answering."""

    decode_ms: float
    queue_ms: float
    """Waiting for a replica."""
    trunk_ms: float
    head_ms: float
    codes_ms: float
    explain_ms: float
    """Contributions, maps and report."""
    encode_ms: float
    """Writing maps and the answer."""
    total_ms: float
    batch_size: int
    """Images that were computed together with this one, itself included."""


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """The answer for one image, one target class and one bank."""

    request_id: str
    model: str
    model_digest: str
    """sha256 of the weights, hexadecimal."""
    bank: str
    """``model/layer/name``."""
    bank_digest: str
    """sha256 of the bank's ``bank.json``, hexadecimal."""
    predictions: tuple[ClassScore, ...]
    """The most probable classes, best first."""
    target: ClassScore
    """The class that is explained."""
    concepts: tuple[ConceptScore, ...]
    """The listed concepts, in the requested order."""
    unexplained: float | None
    """Contribution of what no concept stands for, in logits: activation less reconstruction, and the bank's offset. It
    is None for banks that do not reconstruct, and where a reconstruction from concepts alone is substituted."""
    contributions_total: float
    """Sum of the contributions of all the bank's concepts, listed or not, in logits."""
    faithfulness: FaithfulnessReport
    timings: Timings
    view: Box
    """The part of the caller's image that the model saw; maps span it."""
    runtime: str
    """What computed this, e.g. ``torch cpu float32``."""
    estimator: Estimator
    """How the contributions were computed."""
    substitute: bool
    """Whether the head ran on the bank's reconstruction in place of the activation."""
    scope: ConceptScope = "target"
    """Whose concepts explain: the target's class's, or those of all classes together. ``target``, too, where the bank's
    concepts belong to no class."""
    image: Source | None = field(default=None, compare=False)
    """The image as it was sent, for pictures."""
    parts: PartsReport | None = None
    """None where parts were not asked for, or the target's class has none."""

    @property
    def unlisted(self) -> float:
        """Contribution of all concepts that are not listed, in logits."""
        return self.contributions_total - sum(concept.contribution for concept in self.concepts)

    def save(
        self, path: str | os.PathLike[str], *, kind: MapKind | None = None, max_overlays: int = 6, dpi: int = 150
    ) -> None:
        """Draw one picture: the image, its top concepts as overlays, contribution bars, and the report in words.

        Parts are small overlays beneath their concept.

        Parameters
        ----------
        path
            Where to write; the suffix chooses the format (``.png``, ``.jpg``, ``.pdf``, ``.svg``, …).
        kind
            Which maps to lay over the image. Default: the first kind that the explanation has.
        max_overlays
            How many concepts to show on the image.
        dpi
            Pixels per inch; the picture is about 13 inches wide.

        Raises
        ------
        MissingExtra
            If matplotlib or Pillow is not installed.
        InvalidArgument
            If the suffix is no picture format, the explanation has no maps of this kind, or it keeps no image.
        OSError
            If the file cannot be written.
        """
        from whence._picture import save

        save(self, path, kind=kind, max_overlays=max_overlays, dpi=dpi)

    def __repr__(self) -> str:
        from whence._words import one_line

        return one_line(self)

    def _repr_png_(self) -> bytes | None:
        """The picture, for notebooks; None without the extra or without an image."""
        if self.image is None:
            return None
        try:
            from whence._picture import png
        except MissingExtra:
            return None
        return png(self, kind=None, max_overlays=6, dpi=80)

    def _repr_html_(self) -> str:
        """The picture and a table, for notebooks."""
        from whence._html import render

        return render(self, self._repr_png_())
