"""What an explanation is made of: plain, frozen records with numpy arrays. They mirror the wire contract."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Order = Literal["contribution", "activation"]
Estimator = Literal["gradient", "integrated", "ablation"]
MapKind = Literal["activation", "contribution", "input"]
MapSize = Literal["grid", "image"]
InputMethod = Literal["gradient", "smoothgrad", "integrated"]
ConceptScope = Literal["target", "all"]
Exactness = Literal["exact", "first_order"]


@dataclass(frozen=True, slots=True)
class ExplainOptions:
    """What to compute for one image."""

    top_k: int = 10
    """How many concepts to list, best first."""
    order: Order = "contribution"
    """Largest absolute contribution, or largest activation, first."""
    estimator: Estimator = "gradient"
    """How contributions are computed."""
    maps: tuple[MapKind, ...] = ()
    """Maps to return for every listed concept."""
    map_size: MapSize = "grid"
    """The layer's own grid, or the model's view of the image (bilinear)."""
    substitute: bool | None = None
    """Run the head on the reconstruction; None: where the bank and the model are made for it."""
    colours: bool = False
    """Render input maps in the colours that the model looked for, too (B-cos models)."""
    parts: bool = False
    """List the parts of every listed concept, too (banks that have parts)."""
    input_method: InputMethod = "gradient"
    """How input maps are computed."""
    concepts: ConceptScope = "target"
    """Which explain: those of the target's class, or those of all classes together; for banks whose concepts belong to
    no class both are the same."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One image's part of a batch."""

    target: int | None = None
    """Index of the class to explain; None: the predicted class."""
    options: ExplainOptions = field(default_factory=ExplainOptions)


@dataclass(frozen=True, slots=True)
class ClassScore:
    index: int
    name: str
    logit: float
    probability: float


@dataclass(frozen=True, slots=True)
class ConceptMap:
    values: NDArray[np.float32]
    """``[height, width]``."""
    class_token: float | None = None
    """For token models: the value at the class token, which has no place in the image."""
    colours: NDArray[np.uint8] | None = None
    """RGBA ``[height, width, 4]``: the colours that the model looked for, opaque where it found them."""


@dataclass(frozen=True, slots=True)
class ConceptScore:
    id: int
    label: str
    activation: float
    """Sum of the code over positions."""
    peak: float
    """Largest code over positions."""
    contribution: float
    """In logits."""
    share: float
    """Contribution / (Σ |contribution| over all concepts + |unexplained|), in [−1, 1]."""
    maps: dict[MapKind, ConceptMap] = field(default_factory=dict)
    class_index: int | None = None
    """The class that it belongs to, where the bank holds concepts per class."""
    class_name: str = ""
    parts: tuple[ConceptScore, ...] = ()
    """Its sub-concepts at an earlier layer, where asked for; their numbers are of that layer, and do not add up to
    these."""
    weak_label: bool = False
    """Whether the label is a machine's that cannot be trusted much."""
    words: tuple[str, ...] = ()
    """The best words for it, best first, where it was named."""


@dataclass(frozen=True, slots=True)
class InputMapReport:
    """How far the maps on the input can be trusted."""

    exactness: Exactness
    reason: str
    residual: float
    """Largest |Σ pixels − activation| / activation of the listed concepts that are active."""
    method: InputMethod = "gradient"
    completeness_residual: float | None = None
    """Of integrated gradients: largest |activation − activation at the input that is zero − Σ pixels| / activation."""


@dataclass(frozen=True, slots=True)
class FaithfulnessReport:
    """How far the explanation can be trusted, measured on this image."""

    explained_logit: float
    """The target's logit that is accounted for: the model's own, or that of the reconstruction where it stands in."""
    completeness_residual: float
    """Explained logit − constant − Σ contributions − unexplained, in logits."""
    constant: float
    """The head's constant, in logits."""
    exactness: Exactness
    exactness_reason: str
    relative_error: float | None = None
    """‖a − â‖ / ‖a‖; None for banks that do not reconstruct, as are the next two."""
    kl: float | None = None
    """KL(softmax h(a) ‖ softmax h(â)), in nats."""
    top1_agrees: bool | None = None
    carried_share: float | None = None
    """Share of ⟨G, a⟩ that the components carry, what subspaces share counted once; None for banks that reconstruct."""
    integration_error: float | None = None
    """|Σ − difference| / |difference| of the integrated estimator."""
    code_tolerance: float | None = None
    """Largest violation of the codes' optimality conditions, relative to the data."""
    input_maps: InputMapReport | None = None
    """Of the listed concepts' input maps, where they were asked for."""


@dataclass(frozen=True, slots=True)
class PartsReport:
    """What the parts of all concepts of the target's class say together: a statement of its own, at another layer."""

    layer: str
    contributions_total: float
    """Over all these parts, listed or not."""
    unexplained: float | None
    """As of ``Explanation``, at the parts' layer; so is the report."""
    faithfulness: FaithfulnessReport


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Milliseconds of each stage of the engine, for the batch as a whole."""

    trunk_ms: float
    head_ms: float
    codes_ms: float
    explain_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer for one image, one target class and one bank."""

    model: str
    model_digest: str
    bank: str
    """``model/layer/name``."""
    bank_digest: str
    predictions: tuple[ClassScore, ...]
    """The most probable classes, best first."""
    target: ClassScore
    concepts: tuple[ConceptScore, ...]
    """The listed concepts, in the requested order."""
    contributions_total: float
    """Over all concepts, listed or not; what subspaces share counts for each."""
    unexplained: float | None
    """Contribution of what no concept stands for: a − â, and the bank's offset where it has one; None for banks that do
    not reconstruct, and where a reconstruction from concepts alone stands in."""
    faithfulness: FaithfulnessReport
    stages: StageTimes
    runtime: str
    """E.g. ``torch cpu float32``."""
    estimator: Estimator
    substitute: bool
    scope: ConceptScope = "target"
    """Whose concepts explained; ``target``, too, where the bank's concepts belong to no class."""
    parts: PartsReport | None = None
    """Where parts were asked for, and the target's class has some."""
