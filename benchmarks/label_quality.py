"""Whether the words that concepts get are right, in a world where the truth is known.

Banks are trained on images of the known-concepts world and named by the demo's CLIP from 16 exemplars and 10
counterfactuals a concept; the vocabulary is all that can be said of the world. A concept is *matched* with the
attribute that its codes tell best on held-out images, where their AUROC is 0.9 or more: codes summed over positions, or
the largest (*peak*), which is what exemplars are chosen by. Of matched concepts the shares are

- ``named``: whose best word names that attribute;
- ``named_or_depends``: that attribute, or another that the code depends on: AUROC of 0.8 or more among the images that
  show the matched one. A latent for red on waves is matched with one of the two;
- ``true``: whose best word names what 80 % of the 20 held-out images show that excite the concept most;
- ``weak``: whose label is said to be weak; ``…_not_weak`` are shares of the others.

Groups of features (*subspace*) are what they are active in: they are matched with the attributes, one or more, that
90 % of the held-out images show in which a group is active, where these are ten or more. Summed codes are the means of
their features, whether or not these are highly active. They are interpretable at a mean cosine of 0.7, about half way
between what the CLIP makes of crops of the same things (0.94) and of others (0.48); published is 0.8, of another CLIP.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from concepts.bank import Bank
from concepts.clip import Clip, open_clip_model
from concepts.codec import EMPTY
from concepts.kinds.subspace import representations
from concepts.model import Model
from concepts.repository import Repository
from demo.attributes import ATTRIBUTES
from demo.captions import captions, says
from demo.folder import write_folder
from demo.models import WEIGHTS
from demo.run import publish_models
from demo.world import Batch, World
from offline.images import open_folder
from offline.metrics.localisation import auroc
from offline.naming import Evidence, NamingSettings, name_concepts
from offline.naming.label import evidence_of
from offline.naming.searching import CounterfactualSettings, Search
from offline.naming.words import candidates
from offline.progress import silent
from offline.trainers import trainers
from offline.vocabulary import Texts, Vocabulary, build

CLIP = WEIGHTS / "clip"
TRAINING_IMAGES, FIRST, IMAGES = 1400, 300_000, 1500
EXEMPLARS, COUNTERFACTUALS, CAPTIONS = 16, 10, 5
MATCHED_FROM, DEPENDS_FROM = 0.9, 0.8
MOST_EXCITED, SHOWN_FROM = 20, 0.8
FEWEST_ACTIVE, IMPLIED_FROM = 10, 0.9
SUMS, ACTIVE = "by summed codes", "by active images"
SEEDS = (0, 1, 2)
GROUPS = {"deviations": 2.5, "cohesion": 0.7, "exemplars": 32}
"""All crops of a group are its exemplars, as when a group is named in training."""


class Way(NamedTuple):
    """A way to learn banks, and what is to be reached."""

    model: str
    layer: str
    trainer: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    reach: float

    @property
    def title(self) -> str:
        """What it is called in the result."""
        return f"{self.model} {self.layer} {self.trainer}"


WAYS = (
    Way("bcos", "stage3", "sae", {"sizes": ("128/4",), "epochs": 8}, SEEDS, 0.8),
    Way("cnn", "stage3", "sae", {"sizes": ("128/4",), "epochs": 8}, SEEDS, 0.8),
    Way("cnn", "stage3", "nmf", {"ranks": (32,)}, SEEDS, 0.8),
    Way("cnn", "stage3", "subspace", GROUPS, (0,), 0.9),
    Way("vit", "encoder.layers.relu", "subspace", GROUPS, (0,), 0.9),
)

OURS, PUBLISHED, PLAIN = "direct", "captions, as published", "mean cosine, without counterfactuals"


@dataclass(frozen=True)
class Known:
    """What is true of K concepts, by one measure of how much of each is in an image."""

    matched: list[set[int]]
    """The attributes that the best word of each may name; none where the truth does not say."""
    depends: Tensor
    """Which attributes each depends on, the matched one among them, bool ``[K, A]``."""
    shown: Tensor
    """Which attributes the images show that excite each most, bool ``[K, A]``."""

    @classmethod
    def by(cls, codes: Tensor, present: Tensor) -> Known:
        """Compare codes ``[N, K]`` with attributes ``[N, A]``."""
        best = auroc(codes, present).max(1)
        given = torch.stack([auroc(codes[rows], present[rows]) for rows in present.T])  # [A, K, A]
        depends = given[best.indices, torch.arange(codes.shape[1])].nan_to_num(0) >= DEPENDS_FROM
        depends[torch.arange(codes.shape[1]), best.indices] = True
        excited = codes.topk(MOST_EXCITED, dim=0).indices
        shown = present[excited].double().mean(0) >= SHOWN_FROM
        matched = [
            {attribute} if value >= MATCHED_FROM else set()
            for value, attribute in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return cls(matched, depends, shown)

    @classmethod
    def by_activity(cls, active: Tensor, present: Tensor) -> Known:
        """Look at the images in which each concept is active, 0 or 1, ``[N, K]``."""
        images = active.sum(0)
        shares = active.T.double() @ present.double() / images.clamp_min(1).unsqueeze(1)
        implied = (shares >= IMPLIED_FROM) & (images >= FEWEST_ACTIVE).unsqueeze(1)
        return cls([set(own.nonzero().flatten().tolist()) for own in implied], implied, shares >= SHOWN_FROM)


class Label(NamedTuple):
    """What a concept is called."""

    text: str
    weak: bool


class Judged(NamedTuple):
    """What there is to say of one label of a matched concept."""

    named: bool
    named_or_depends: bool
    true: bool
    weak: bool


def main() -> None:
    """Learn every bank and name it in every way."""
    rows: list[measure.Row] = []
    notes: dict[str, Any] = {}
    clip = open_clip_model(str(CLIP))
    held_out = World(0).sample(IMAGES, "heldout", FIRST)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = write_folder(root / "images", "train", TRAINING_IMAGES)
        publish_models(root / "repository")
        (root / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions()))
        vocabulary = build(Texts(root / "captions.txt", clip), clip, root / "vocabulary")
        for way in WAYS:
            found = of_way(way, Repository(root / "repository"), images, clip, vocabulary, held_out)
            notes[way.title] = found
            rows += compared(way, found[ACTIVE if way.trainer == "subspace" else SUMS])
            print(way.title, found, flush=True)
    measure.publish("label_quality", rows, **notes)


def compared(way: Way, found: Mapping[str, Any]) -> Iterator[measure.Row]:
    """Yield the share of right names beside what is to be reached, and beside the published rule."""
    name = f"label_quality: share of concepts whose best word names the matched attribute, {way.title}"
    value = found[OURS]["named"]
    yield measure.row(name, value, "", baseline="to reach", baseline_value=way.reach, target=1.0)
    yield measure.row(name, value, "", baseline=PUBLISHED, baseline_value=found[PUBLISHED]["named"])


def of_way(
    way: Way, repository: Repository, images: Path, clip: Clip, vocabulary: Vocabulary, held_out: Batch
) -> dict[str, Any]:
    """Return the shares of each way to name, by each measure, over the banks of all seeds."""
    present = torch.from_numpy(held_out.attributes)
    judged: dict[str, dict[str, list[Judged]]] = {}
    concepts = 0
    for seed in way.seeds:
        bank = learn(way, seed, repository, images)
        model = repository.load_model(way.model)
        evidence = evidence_for(bank, model, repository, images, clip)
        labels = dict(named(clip, vocabulary, evidence))
        concepts += len(bank.concepts)
        for measured, codes in codes_of(bank, model, held_out).items():
            known = (Known.by_activity if measured == ACTIVE else Known.by)(codes, present)
            for name, own in labels.items():
                judged.setdefault(measured, {}).setdefault(name, []).extend(judge(known, evidence, own))
    return {
        "concepts": concepts,
        **{
            measured: {"matched": len(names[OURS]), **{name: shares(own) for name, own in names.items()}}
            for measured, names in judged.items()
        },
    }


def learn(way: Way, seed: int, repository: Repository, images: Path) -> Bank:
    """Learn a bank."""
    trainer = {each.name: each for each in trainers()}[way.trainer]
    settings: dict[str, Any] = {
        "model": way.model,
        "layer": way.layer,
        "images": images,
        "name": f"{way.trainer}-{seed}",
    }
    settings |= {"exemplars": EXEMPLARS, "seed": seed, "device": "cpu", **way.settings}
    if way.trainer == "subspace":
        settings["clip"] = str(CLIP)
    config = trainer.config(**settings)
    return trainer.train(repository, config, silent).bank


def evidence_for(bank: Bank, model: Model, repository: Repository, images: Path, clip: Clip) -> list[Evidence]:
    """Embed exemplars and counterfactuals; groups have theirs, for other banks they are looked for."""
    version = repository.resolve(bank.reference)
    pictures = repository.pictures(version, [each for concept in bank.concepts for each in concept.pictures])
    if bank.kind != "subspace":
        search = Search(model, open_folder(images), CounterfactualSettings(counterfactuals=COUNTERFACTUALS), silent)
        bank, more = search.add_to(bank)
        pictures |= more
    return evidence_of(clip, bank.concepts, pictures, COUNTERFACTUALS, silent)


@torch.no_grad()
def codes_of(bank: Bank, model: Model, held_out: Batch) -> dict[str, Tensor]:
    """Return how much of each concept is in held-out images, ``[N, K]``, by both measures where there are two."""
    cut, codec, count = model.cut(bank.layer), bank.codec(), len(bank.concepts)
    found: dict[str, list[Tensor]] = {}
    for views in np.array_split(held_out.images, len(held_out.images) // 100):
        positions = cut.positions(cut.trunk(model.inputs(views)))
        if bank.kind == "subspace":
            features, offsets = bank.tensors["features"], bank.tensors["offsets"].diff().tolist()
            means = [r.mean(1) for r in representations(positions)[:, features].split(offsets, dim=1)]
            found.setdefault(SUMS, []).append(torch.stack(means, dim=1))
        codes = codec.encode(positions, torch.zeros(len(views), dtype=torch.int64))
        slots = codes.ids.masked_fill(codes.ids == EMPTY, count)
        measures = {SUMS: codes.total(), "by peak codes": codes.peak()}
        if bank.kind == "subspace":
            measures = {ACTIVE: torch.ones_like(codes.total())}
        for name, values in measures.items():
            spread = values.new_zeros(len(views), count + 1).scatter_(1, slots, values)[:, :count]
            found.setdefault(name, []).append(spread)
    return {name: torch.cat(parts) for name, parts in found.items()}


def named(clip: Clip, vocabulary: Vocabulary, evidence: Sequence[Evidence]) -> Iterator[tuple[str, list[Label | None]]]:
    """Yield the labels of all concepts, by way to name."""
    without = [Evidence(own.exemplars, own.counterfactuals[:0]) for own in evidence]
    for name, scoring in ((OURS, "direct"), (PUBLISHED, "captions")):
        settings = NamingSettings.model_validate({"captions": CAPTIONS, "scoring": scoring})
        for more, shown in (("", evidence), (", without counterfactuals", without)):
            namings = name_concepts(clip, vocabulary, shown, settings, silent).namings
            yield name + more, [None if n is None else Label(n.label, n.weak) for n in namings]
    yield PLAIN, [plain(clip, vocabulary, own.exemplars) for own in evidence]


def plain(clip: Clip, vocabulary: Vocabulary, exemplars: Tensor) -> Label | None:
    """Return the word that is nearest to the exemplars, in the mean."""
    if not len(exemplars):
        return None
    nearest = vocabulary.nearest(exemplars, CAPTIONS).captions.unique().tolist()
    words = candidates(vocabulary.texts(nearest)).words
    return Label(words[int((clip.embed_texts(words) @ exemplars.mean(0)).argmax())], True)


def judge(known: Known, evidence: Sequence[Evidence], labels: Sequence[Label | None]) -> Iterator[Judged]:
    """Yield what there is to say of the labels of matched concepts that have exemplars; none is a wrong one."""
    for concept, (matched, own, label) in enumerate(zip(known.matched, evidence, labels, strict=True)):
        if not matched or not len(own.exemplars):
            continue
        said = [] if label is None else [ATTRIBUTES.index(name) for name in says(label.text) if name in ATTRIBUTES]
        depends, true = (bool(said and table[concept, said].all()) for table in (known.depends, known.shown))
        yield Judged(len(said) == 1 and said[0] in matched, depends, true, label is None or label.weak)


def shares(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the shares by name; of labels that are not weak, where there are any."""
    strong = [each for each in judged if not each.weak]
    found = {name: fmean(getattr(each, name) for each in judged) for name in Judged._fields}
    if strong:
        right = (name for name in Judged._fields if name != "weak")
        found |= {f"{name}_not_weak": fmean(getattr(each, name) for each in strong) for name in right}
    return {name: round(share, 3) for name, share in found.items()}


if __name__ == "__main__":
    main()
