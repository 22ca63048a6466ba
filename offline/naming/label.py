"""New versions of banks: with names found by a CLIP, or given by a person."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from concepts import devices
from concepts.bank import Bank, Concept, Exemplar
from concepts.errors import InvalidInput
from concepts.repository import Repository
from offline.exclusive import alone_in
from offline.images import open_folder
from offline.locations import Location
from offline.naming.naming import labelled, name_concepts
from offline.naming.scores import Evidence
from offline.naming.searching import CounterfactualSettings, Search
from offline.progress import Reporter
from offline.vocabulary import open_vocabulary

if TYPE_CHECKING:  # importing it takes seconds
    from concepts.clip import Clip

_PICTURES = 1024
"""How many are decoded at a time."""

_NO_TEXT = ("Cc", "Cs")
"""Unicode's categories of control characters and surrogates."""


class LabelConfig(CounterfactualSettings):
    """All that decides the names of a bank's concepts."""

    clip: str = Field(
        description="CLIP of the vocabulary: a folder as open_clip saves it, ARCHITECTURE@FILE, or ARCHITECTURE@TAG "
        "where a hub can be reached."
    )
    vocabulary: Path = Field(description="Folder of captions that `whence-bank vocabulary` made.")
    images: Location | None = Field(
        None,
        description="Images that the bank was trained on, to look for counterfactuals in; default: those that are "
        "stored in the bank.",
    )
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda or cuda:N.")


@dataclass(frozen=True)
class Labelled:
    """What naming came to."""

    bank: Bank
    """As published."""
    skipped_images: Mapping[str, str] = field(default_factory=dict)
    """Why an image was left out, by key."""


def label(repository: Repository, reference: str, config: LabelConfig, report: Reporter) -> Labelled:
    """Name the concepts of a bank, and publish it as a new version.

    Labels that people gave stay. The CLIP goes into the repository: with it the service compares texts with concepts.

    Raises
    ------
    UnknownBank, CorruptData, WeightsMismatch
        If the bank cannot be read.
    InvalidInput
        If there is nothing to name by, or the CLIP or the vocabulary cannot be used.
    AlreadyExists
        If another command is changing the bank.
    """
    with _alone(repository, reference):
        return _label(repository, reference, config, report)


def _label(repository: Repository, reference: str, config: LabelConfig, report: Reporter) -> Labelled:
    from concepts.clip import open_clip_model  # takes seconds

    version = repository.resolve(reference)
    bank = repository.load(version)
    if not any(concept.exemplars for concept in bank.all_concepts):
        raise InvalidInput(f"bank {bank.reference} has no exemplars to name concepts by: train it with --exemplars")
    device = devices.choose(config.device)
    clip = open_clip_model(config.clip, device)
    vocabulary = open_vocabulary(config.vocabulary, clip)
    pictures = repository.pictures(version, [each for concept in bank.all_concepts for each in concept.pictures])
    skipped: dict[str, str] = {}
    if config.counterfactuals and config.images is not None:
        model = repository.load_model(bank.model, device)
        search = Search(model, open_folder(config.images), config, report, skipped)
        bank, more = search.add_to(bank)
        pictures |= more
    elif config.counterfactuals and not any(concept.counterfactuals for concept in bank.all_concepts):
        raise InvalidInput(
            f"bank {bank.reference} has no counterfactuals, without which a label may name what only accompanies a "
            "concept: give --images, those that it was trained on, or --counterfactuals 0"
        )
    evidence = evidence_of(clip, bank.all_concepts, pictures, config.counterfactuals, report)
    names = name_concepts(clip, vocabulary, evidence, config, report)
    if not any(names.namings):
        raise InvalidInput("the vocabulary has no word for any concept: give captions that say what images show")
    bank = labelled(bank, names, clip, vocabulary, {"settings": _record(config), "named": version.digest})
    if clip.portable:
        repository.publish_clip(clip.files)
    return Labelled(_publish(repository, bank, pictures), skipped)


def rename(repository: Repository, reference: str, concept_id: int, name: str | None) -> Bank:
    """Give a concept a person's label, and publish the bank as a new version.

    Parameters
    ----------
    repository, reference
        Where the bank is.
    concept_id
        Of a concept or part.
    name
        The label; None: the machine's again, or none.

    Raises
    ------
    UnknownBank, UnknownConcept, CorruptData, WeightsMismatch
        If there is no such concept, or the bank cannot be read.
    InvalidInput
        If the label is empty, or holds what is no text.
    AlreadyExists
        If another command is changing the bank.
    """
    if name is not None and not name.strip():
        raise InvalidInput("the label is empty: give one, or --clear to have the machine's again")
    if name is not None and any(unicodedata.category(character) in _NO_TEXT for character in " ".join(name.split())):
        raise InvalidInput("the label holds control characters, or is not in UTF-8: give plain text")
    with _alone(repository, reference):
        version = repository.resolve(reference)
        bank = repository.load(version)
        concept = bank.concept(concept_id)
        machine = "" if concept.naming is None else concept.naming.label
        chosen = machine if name is None else " ".join(name.split())
        renamed = replace(concept, label=chosen, named_by_person=name is not None)
        pictures = repository.pictures(version, [each for other in bank.all_concepts for each in other.pictures])
        return _publish(repository, _with_concept(bank, renamed), pictures)


def _alone(repository: Repository, reference: str) -> AbstractContextManager[None]:
    """Keep others from changing a bank between reading it and publishing it anew: one of both would be lost."""
    version = repository.resolve(reference)
    return alone_in(
        repository.workspace(version.model, version.layer, version.name),
        f"another command is training, naming or renaming bank {version.reference}: wait for it",
    )


def evidence_of(
    clip: Clip, concepts: Sequence[Concept], pictures: Mapping[str, bytes], counterfactuals: int, report: Reporter
) -> list[Evidence]:
    """Embed the crops of concepts, each picture once.

    Parameters
    ----------
    clip
        Embeds them.
    concepts
        With exemplars and counterfactuals.
    pictures
        WebP files, by name.
    counterfactuals
        Most to use of a concept.
    report
        Hears of progress.
    """
    used = [(concept.exemplars, concept.counterfactuals[:counterfactuals]) for concept in concepts]
    contents = list(dict.fromkeys(pictures[each.file] for parts in used for own in parts for each in own))
    rows = {content: row for row, content in enumerate(contents)}
    found = [torch.zeros(0, clip.width)]
    for first in range(0, len(contents), _PICTURES):
        some = contents[first : first + _PICTURES]
        found.append(clip.embed_pictures([Image.open(io.BytesIO(content)).convert("RGB") for content in some]))
        report("embedding crops", first + len(some), len(contents))
    embeddings = torch.cat(found)

    def of(own: Sequence[Exemplar]) -> Tensor:
        return embeddings[[rows[pictures[each.file]] for each in own]]

    return [Evidence(of(exemplars), of(without)) for exemplars, without in used]


def _with_concept(bank: Bank, concept: Concept) -> Bank:
    """Return a bank with another record of one concept or part."""
    first = len(bank.concepts)
    if concept.id < first:
        return replace(bank, concepts=(*bank.concepts[: concept.id], concept, *bank.concepts[concept.id + 1 :]))
    parts = bank.parts
    if parts is None:
        raise ValueError("a bank without parts has no concept of that id")
    place = concept.id - first
    own = (*parts.concepts[:place], replace(concept, id=place), *parts.concepts[place + 1 :])
    return bank.with_parts(parts.kind, parts.layer, parts.channels, own, parts.tensors)


def _publish(repository: Repository, bank: Bank, pictures: Mapping[str, bytes]) -> Bank:
    """Publish a bank with those of the pictures that it shows."""
    shown = {each.file: pictures[each.file] for concept in bank.all_concepts for each in concept.pictures}
    return repository.publish(bank, shown)


def _record(config: LabelConfig) -> dict[str, Any]:
    """Return the settings as a bank stores them: folders by name alone, since banks travel."""
    values = config.model_dump(mode="json", exclude={"clip", "device", "batch_size"})
    for name in ("vocabulary", "images"):
        location = getattr(config, name)
        values[name] = None if location is None else location.name
    return values
