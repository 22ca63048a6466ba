"""Banks whose concepts have names, counterfactuals and embeddings: of the small repository's bank, by a tiny CLIP."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from concepts.bank import Bank, Concept, Exemplar, Naming, Word
from concepts.clip import Clip
from concepts.preprocessing import Box
from concepts.repository import Repository
from tests.e2e.repository import BANK, LAYER, MODEL

NAMED = f"{MODEL}/{LAYER}/named"
LABELS = ("stripes", "Red Ring", "red ringlet", "pointed ear", "", "coloured rings")
"""Of the first concepts; the third one's is weak, the fourth one's is by a person, the fifth has none."""
SILENT = 5
"""The concept whose embedding is zero: it has no exemplars."""
PART = "fur"
"""Label of the one part of a bank with parts."""


def picture(seed: int) -> bytes:
    """A WebP file of random pixels."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(file, "WEBP")
    return file.getvalue()


def naming(label: str, weak: bool = False) -> Naming:
    """What a machine says of a concept."""
    words = (Word(label, 0.5), Word(f"{label}s", 0.25))
    return Naming(label, 0.125 if weak else 0.75, weak, words, (Word(f"a photo of {label}", 0.375),), counterfactuals=2)


def concept(bare: Concept) -> Concept:
    """Give a concept of the plain bank a name, three exemplars and two counterfactuals."""
    label = LABELS[bare.id] if bare.id < len(LABELS) else ""
    named = replace(bare, label=label, naming=naming(label, weak=bare.id == 2) if label else None)
    if bare.id == 3:
        named = replace(named, named_by_person=True, naming=naming("cat ear", weak=True))
    if bare.id == SILENT:
        return named
    files = [Exemplar(f"exemplars/{bare.id}-{n}.webp", f"{n}.jpg", Box(0, 1, 2, 3), 0.5 - n / 8) for n in range(5)]
    return replace(named, exemplars=tuple(files[:3]), counterfactuals=tuple(files[3:]))


def embeddings(count: int, width: int, seed: int) -> Tensor:
    """Random rows of norm 1, and one of zeros."""
    rows = functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)
    rows[SILENT] = 0
    return rows


def publish_named(
    repository: Repository, clip: Clip, name: str = "named", seed: int = 0, parts: Sequence[str] = ()
) -> Bank:
    """Store the plain bank again under another name, its concepts named by a CLIP, with parts of these labels."""
    repository.publish_clip(clip.files)
    plain = repository.load(repository.resolve(BANK))
    bank = replace(
        plain,
        name=name,
        concepts=tuple(concept(bare) for bare in plain.concepts),
        labelling={
            "clip": {"name": clip.name, "digest": clip.digest},
            "vocabulary": {"captions": 1234, "digest": "0" * 64},
            "settings": {},
        },
        embeddings=embeddings(len(plain.concepts) + len(parts), clip.width, seed),
        files={},
        digest="",
    )
    if parts:
        found = tuple(
            Concept(index, label, plain.concepts[0].class_index, parent=0) for index, label in enumerate(parts)
        )
        bank = bank.with_parts("nmf", "layer2", 32, found, {"dictionary": torch.rand(len(parts), 32)})
    pictures = {
        exemplar.file: picture(index)
        for index, exemplar in enumerate(exemplar for each in bank.concepts for exemplar in each.pictures)
    }
    return repository.publish(bank, pictures)


def nearest(banks: Sequence[Bank], clip: Clip, text: str) -> list[tuple[float, str, int]]:
    """Cosine, bank and id of every concept that has an embedding, best first, in double precision."""
    query = clip.embed_texts([text])[0].double()
    found = [
        (float(row.double() @ query), bank.reference, index)
        for bank in banks
        if bank.embeddings is not None
        for index, row in enumerate(bank.embeddings)
        if row.any()
    ]
    return sorted(found, key=lambda each: (-each[0], *each[1:]))
