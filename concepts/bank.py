"""A concept bank: what it holds, and how that is written as files and read back."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from concepts.codec import Codec
from concepts.errors import CorruptData, UnknownConcept
from concepts.kinds import load_codec
from concepts.model import check_name
from concepts.preprocessing import Box

SCHEMA = 1
MANIFEST = "bank.json"
TENSORS = "tensors.safetensors"
CONCEPTS = "concepts.jsonl"

_PARTS = "parts/"
"""Before the names of the parts' tensors."""
_EMBEDDINGS = "labels/embeddings"
_DIGEST = re.compile("[0-9a-f]{64}")
_LATER: Mapping[str, Any] = {"other_index": None, "named_by_person": False, "naming": None, "counterfactuals": ()}
"""Fields that are stored where they say something alone: files of banks that do without keep the bytes they had."""


@dataclass(frozen=True)
class Exemplar:
    """A stored crop that excites a concept most; or a counterfactual, which is alike but for the concept."""

    file: str
    """Path of the WebP picture within the bank."""
    source: str
    """Key of the image that it was cut from."""
    box: Box
    """Where in that image, in its pixels."""
    activation: float


@dataclass(frozen=True)
class Word:
    """A word or phrase that may name a concept."""

    text: str
    score: float
    """How well it fits, by the rule that named the concept: larger is better. No share, as a naming's score is."""


@dataclass(frozen=True)
class Naming:
    """What was found to say of a concept, by a CLIP from its exemplars and counterfactuals."""

    label: str
    """The best word or phrase."""
    score: float
    """How far the label can be trusted, from 0 to 1."""
    weak: bool
    """Whether the score is below what a label should have, or there were no counterfactuals."""
    words: tuple[Word, ...] = ()
    """Best first."""
    phrases: tuple[Word, ...] = ()
    """Best first."""
    counterfactuals: int = 0
    """How many there were to compare with."""


@dataclass(frozen=True)
class Concept:
    """One element of a bank."""

    id: int
    """Its index in the bank."""
    label: str = ""
    """What it is called: by a person where one named it, else by its ``naming``; empty where it has no name."""
    class_index: int | None = None
    """The class that it belongs to, where the bank holds concepts per class."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    exemplars: tuple[Exemplar, ...] = ()
    parent: int | None = None
    """The concept that this one is a part of."""
    other_index: int | None = None
    """The class that its own is contrasted with, where it is a contrastive prototype."""
    named_by_person: bool = False
    naming: Naming | None = None
    """What a machine says of it; it stays when a person gives another label."""
    counterfactuals: tuple[Exemplar, ...] = ()
    """Crops in which it is silent, and which are else like its exemplars, most similar first."""

    @property
    def weak(self) -> bool:
        """Whether its label is a machine's that cannot be trusted much."""
        return not self.named_by_person and self.naming is not None and self.naming.weak

    @property
    def words(self) -> tuple[str, ...]:
        """The machine's words for it, best first."""
        return () if self.naming is None else tuple(word.text for word in self.naming.words)

    @property
    def pictures(self) -> tuple[Exemplar, ...]:
        """Exemplars and counterfactuals."""
        return self.exemplars + self.counterfactuals


@dataclass(frozen=True)
class Bank:
    """K concepts for one (model, layer), with how they were learned and how good they are."""

    kind: str
    """``sae``, ``nmf``, ``contrast`` or ``subspace``."""
    model: str
    layer: str
    name: str
    weights_digest: str
    """sha256 of the weights of the model that it was trained on."""
    channels: int
    """Width C of the layer."""
    concepts: tuple[Concept, ...]
    tensors: Mapping[str, Tensor]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """On held-out images (methods section 6)."""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """All that decided the training, seed included."""
    data_fingerprint: str = ""
    """sha256 over the keys and contents of the training images."""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """How the model's images were prepared in training (``Preprocessing.to_json``); empty where it is not known."""
    parts: Bank | None = None
    """Sub-concepts of these concepts, at an earlier layer (the recursion of CRAFT); see ``with_parts``. Each names its
    ``parent``. There they count from 0; in the files, and for callers, their ids follow those of the concepts."""
    labelling: Mapping[str, Any] = field(default_factory=dict)
    """How the concepts were named: ``clip`` (``name`` and ``digest``), ``vocabulary`` and settings; empty if they were
    not."""
    embeddings: Tensor | None = None
    """float32 ``[K, D]``, rows of norm 1: how to that CLIP the exemplars of each of ``all_concepts`` differ from its
    counterfactuals and from other crops; zero where it has no exemplars. Texts are compared with them."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every other file of the bank, by its path."""
    digest: str = ""
    """sha256 of ``bank.json``; empty while the bank is not frozen."""

    def __post_init__(self) -> None:
        for what, value in (("model", self.model), ("layer", self.layer), ("bank", self.name)):
            check_name(what, value)

    @property
    def reference(self) -> str:
        """``model/layer/name``."""
        return f"{self.model}/{self.layer}/{self.name}"

    def with_parts(
        self, kind: str, layer: str, channels: int, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]
    ) -> Bank:
        """Return this bank with parts, which have all else in common with it."""
        whole = replace(self, parts=None)
        parts = replace(whole, kind=kind, layer=layer, channels=channels, concepts=concepts, tensors=tensors)
        return replace(whole, parts=parts)

    @property
    def all_concepts(self) -> tuple[Concept, ...]:
        """The concepts, and after them their parts, ids counting on."""
        if self.parts is None:
            return self.concepts
        first = len(self.concepts)
        return self.concepts + tuple(replace(part, id=first + part.id) for part in self.parts.concepts)

    def children(self, concept_id: int) -> list[int]:
        """Return the ids of a concept's parts."""
        parts = () if self.parts is None else self.parts.concepts
        return [len(self.concepts) + part.id for part in parts if part.parent == concept_id]

    def layer_of(self, concept_id: int) -> str:
        """Return the layer of a concept or part."""
        return self.layer if self.parts is None or concept_id < len(self.concepts) else self.parts.layer

    def concept(self, concept_id: int) -> Concept:
        """Return a concept, or a part of one.

        Raises
        ------
        UnknownConcept
            If the bank has none of that id.
        """
        concepts = self.all_concepts
        if not 0 <= concept_id < len(concepts):
            raise UnknownConcept(
                f"bank {self.reference} has concepts 0 to {len(concepts) - 1}, not {concept_id}",
                bank=self.reference,
            )
        return concepts[concept_id]

    def codec(self) -> Codec:
        """Return the codec of the bank's concepts, on the CPU; their parts have their own."""
        return load_codec(self.kind, self.tensors, [concept.class_index for concept in self.concepts])


def freeze(bank: Bank, exemplars: Mapping[str, bytes] | None = None) -> tuple[Bank, dict[str, bytes]]:
    """Turn a bank into its files; equal banks give equal bytes.

    Parameters
    ----------
    bank
        The bank; its ``files`` and ``digest`` are computed anew.
    exemplars
        The pictures named by ``Exemplar.file``.

    Returns
    -------
    bank : Bank
        With ``files`` and ``digest``.
    files : dict
        Contents by path, ``bank.json`` last.

    Raises
    ------
    CorruptData
        If a concept names a picture that is not there, ids do not count up, a number is not finite, a picture's name is
        not that of a file in ``exemplars/``, or parts are not of concepts of this bank.
    """
    exemplars = exemplars or {}
    for name in exemplars:
        if not name.startswith("exemplars/"):
            raise CorruptData(f"the picture {name!r} must lie in exemplars/")
        _check_path(name)
    _check_parts(bank)
    concepts = bank.all_concepts
    _check_concepts(concepts, exemplars)
    parts, tensors = bank.parts, _plain(bank.tensors)
    part_tensors = {} if parts is None else _plain(parts.tensors)
    stored = tensors | {_PARTS + name: tensor for name, tensor in part_tensors.items()}
    if bank.embeddings is not None:
        stored |= _plain({_EMBEDDINGS: bank.embeddings})
    contents = {
        TENSORS: safetensors.torch.save(stored),
        CONCEPTS: "".join(_dumps(_record(concept)) + "\n" for concept in concepts).encode(),
        **{name: exemplars[name] for name in sorted(exemplars)},
    }
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = {
        "schema": SCHEMA,
        "kind": bank.kind,
        "model": bank.model,
        "weights_digest": bank.weights_digest,
        "layer": bank.layer,
        "name": bank.name,
        "channels": bank.channels,
        "concept_count": len(bank.concepts),
        "tensors": {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in stored.items()
        },
        "configuration": bank.configuration,
        "data_fingerprint": bank.data_fingerprint,
        "preprocessing": bank.preprocessing,
        "metrics": bank.metrics,
        "files": files,
    }
    if parts is not None:
        manifest["parts"] = _parts_manifest(parts)
    if bank.labelling:
        manifest["labelling"] = bank.labelling
    contents[MANIFEST] = (_dumps(manifest, indent=1) + "\n").encode()
    digest = hashlib.sha256(contents[MANIFEST]).hexdigest()
    frozen = replace(bank, tensors=tensors, files=files, digest=digest)
    if parts is not None:
        frozen = frozen.with_parts(parts.kind, parts.layer, parts.channels, parts.concepts, part_tensors)
    return frozen, contents


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}


def _parts_manifest(parts: Bank) -> dict[str, Any]:
    return {
        "kind": parts.kind,
        "layer": parts.layer,
        "channels": parts.channels,
        "concept_count": len(parts.concepts),
        "most": max(Counter(part.parent for part in parts.concepts).values()),  # that one concept has
    }


def _check_concepts(concepts: Sequence[Concept], pictures: Mapping[str, bytes]) -> None:
    """Raise CorruptData where ids do not count up or a picture is missing."""
    for index, concept in enumerate(concepts):
        if concept.id != index:
            raise CorruptData(f"concept {index} of the bank has the id {concept.id}")
        for exemplar in concept.pictures:
            if exemplar.file not in pictures:
                raise CorruptData(f"concept {index} names the picture {exemplar.file}, which is not there")


def _check_parts(bank: Bank) -> None:
    """Raise CorruptData where parts are not of concepts of this bank."""
    if bank.parts is None:
        return
    if bank.parts.parts is not None or not bank.parts.concepts:
        raise CorruptData("the parts of a bank are one level of at least one concept")
    for part in bank.parts.concepts:
        if part.parent is None or not 0 <= part.parent < len(bank.concepts):
            raise CorruptData(f"part {part.id} belongs to concept {part.parent}, which the bank does not have")
        if part.class_index != bank.concepts[part.parent].class_index:
            raise CorruptData(f"part {part.id} has another class than its concept {part.parent}")


def read_manifest(content: bytes, digest: str) -> dict[str, Any]:
    """Return the manifest if it is the one of that digest.

    Raises
    ------
    CorruptData
        If it is another, or of a schema that this version cannot read.
    """
    actual = hashlib.sha256(content).hexdigest()
    if actual != digest:
        raise CorruptData(f"{MANIFEST} has digest {actual} where {digest} was published", file=MANIFEST, digest=digest)
    try:
        manifest: dict[str, Any] = json.loads(content)
        schema, files = manifest["schema"], manifest["files"]
        if schema != SCHEMA:
            raise CorruptData(f"{MANIFEST} has schema {schema!r}; this version reads schema {SCHEMA}")
        if not {TENSORS, CONCEPTS} <= files.keys():
            raise CorruptData(f"{MANIFEST} must name {TENSORS} and {CONCEPTS}")
        for name in files:
            _check_path(name)
        _check_labelling(manifest.get("labelling"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(f"{MANIFEST} does not have the form of schema {SCHEMA}: {error}") from error
    return manifest


def _check_labelling(labelling: Any) -> None:
    """Raise CorruptData where a manifest does not say what concepts were named with; None where they were not."""
    if labelling is None:
        return
    clip, captions = labelling["clip"], labelling["vocabulary"]["captions"]
    if not isinstance(clip["name"], str) or not _DIGEST.fullmatch(clip["digest"]) or type(captions) is not int:
        raise CorruptData(f"{MANIFEST} does not say which CLIP and captions its concepts were named with")


def _check_embeddings(embeddings: Tensor | None, concepts: int) -> None:
    """Raise CorruptData where embeddings are not one of each concept."""
    if embeddings is None:
        return
    fitting = embeddings.dtype == torch.float32 and embeddings.ndim == 2 and len(embeddings) == concepts
    if not fitting or not bool(embeddings.isfinite().all()):
        raise CorruptData(f"{_EMBEDDINGS} must be finite, float32, and one row of each of {concepts} concepts")


def _check_path(name: str) -> None:
    """Raise CorruptData where a file's name could lead out of the bank."""
    if "\0" in name or not all(part.strip(".") for part in name.split("/")):
        raise CorruptData(f"{name!r} cannot be a file of the bank")


def check_file(manifest: Mapping[str, Any], name: str, content: bytes) -> bytes:
    """Return the content if it is what the manifest says.

    Raises
    ------
    CorruptData
        If it is not; both digests are named.
    """
    expected = manifest["files"].get(name)
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise CorruptData(f"{name} has digest {actual} where the bank names {expected}", file=name, digest=actual)
    return content


def thaw(manifest: Mapping[str, Any], digest: str, tensors: bytes, concepts: bytes) -> Bank:
    """Rebuild a bank from its checked files; the inverse of ``freeze``."""
    try:
        records = [_concept(json.loads(line)) for line in concepts.splitlines()]
        stored, count = safetensors.torch.load(tensors), manifest["concept_count"]
        _check_embeddings(stored.get(_EMBEDDINGS), len(records))
        bank = Bank(
            kind=manifest["kind"],
            model=manifest["model"],
            layer=manifest["layer"],
            name=manifest["name"],
            weights_digest=manifest["weights_digest"],
            channels=manifest["channels"],
            concepts=tuple(records[:count]),
            tensors={n: tensor for n, tensor in stored.items() if not n.startswith(_PARTS) and n != _EMBEDDINGS},
            metrics=manifest["metrics"],
            configuration=manifest["configuration"],
            data_fingerprint=manifest["data_fingerprint"],
            preprocessing=manifest.get("preprocessing", {}),
            files=manifest["files"],
            digest=digest,
            labelling=manifest.get("labelling", {}),
            embeddings=stored.get(_EMBEDDINGS),
        )
        described = manifest.get("parts")
        if described is None:
            return bank
        return bank.with_parts(
            kind=described["kind"],
            layer=described["layer"],
            channels=described["channels"],
            concepts=tuple(replace(part, id=part.id - count) for part in records[count:]),
            tensors={name.removeprefix(_PARTS): t for name, t in stored.items() if name.startswith(_PARTS)},
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CorruptData(f"the bank's files do not have the form of schema {SCHEMA}: {error}") from error


def _record(concept: Concept) -> dict[str, Any]:
    record = asdict(concept)
    return {name: value for name, value in record.items() if name not in _LATER or value != _LATER[name]}


def _concept(record: dict[str, Any]) -> Concept:
    pictures = {
        name: tuple(Exemplar(**{**e, "box": Box(*e["box"])}) for e in record.get(name, ()))
        for name in ("exemplars", "counterfactuals")
    }
    naming = record.get("naming")
    return Concept(**{**record, **pictures, "naming": None if naming is None else _naming(naming)})


def _naming(record: dict[str, Any]) -> Naming:
    words = {name: tuple(Word(**word) for word in record[name]) for name in ("words", "phrases")}
    return Naming(**{**record, **words})


def _dumps(value: Any, indent: int | None = None) -> str:
    try:
        # Sorted: mappings are equal in any order of their keys.
        return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent, sort_keys=True)
    except ValueError as error:
        raise CorruptData(f"the bank holds a number that is not finite: {error}") from error
