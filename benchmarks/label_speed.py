"""Naming 1,000 concepts of 16 exemplars and 10 counterfactuals each, by a vocabulary of 100,000 captions.

The whole of what `whence-bank label` does, on the processor, with the demo's small CLIP: of a larger one, embedding
crops takes longer in proportion. The concepts are latents of a dictionary of the demo's convolutional model; the
captions are the world's, and made-up sentences. Building the vocabulary, which is done once, is timed apart.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import measure
from concepts.bank import Bank
from concepts.clip import open_clip_model
from concepts.repository import Repository
from demo.captions import captions
from demo.folder import write_folder
from demo.models import WEIGHTS
from demo.run import publish_models
from offline.naming import label
from offline.naming.searching import Search
from offline.progress import silent
from offline.trainers.sae import SaeConfig, train
from offline.vocabulary import Texts, Vocabulary, build

CONCEPTS, EXEMPLARS, COUNTERFACTUALS, CAPTIONS = 1000, 16, 10, 100_000
IMAGES, LATENTS = 1400, "2048/32"
ALLOWED_S = 300.0
CLIP = WEIGHTS / "clip"
STAGES: dict[str, tuple[object, str]] = {
    "looking at images": (Search, "add_to"),
    "embedding crops": (label, "evidence_of"),
    "searching the vocabulary": (Vocabulary, "nearest"),
    "words and scores": (label, "name_concepts"),
    "publishing": (label, "_publish"),
}
"""The functions that are timed; what one spends in another counts as the other's."""

_SYLLABLES = [a + b for a in ("b", "ch", "d", "f", "gr", "k", "l", "m", "p", "st", "t", "w") for b in "aeiou"]
_ENDINGS = ("ck", "d", "g", "ll", "m", "n", "r", "t")


def main() -> None:
    """Name the concepts, and say where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = write_folder(root / "images", "train", IMAGES)
        publish_models(root / "repository")
        repository = Repository(root / "repository")
        bank = thousand(repository, images)
        lines = sentences(CAPTIONS)
        (root / "captions.txt").write_text("".join(f"{line}\n" for line in lines))
        clip, start = open_clip_model(str(CLIP)), time.perf_counter()
        build(Texts(root / "captions.txt", clip), clip, root / "vocabulary")
        building_s = time.perf_counter() - start
        config = label.LabelConfig(
            clip=str(CLIP),
            vocabulary=root / "vocabulary",
            images=images,
            counterfactuals=COUNTERFACTUALS,
            device="cpu",
        )
        with Stages() as stages:
            named = label.label(repository, bank.reference, config, silent).bank
    crops = [len(concept.exemplars) + len(concept.counterfactuals) for concept in named.concepts]
    value = measure.row(
        f"label_speed: {CONCEPTS:,} concepts of {EXEMPLARS} exemplars and {COUNTERFACTUALS} counterfactuals, "
        f"{CAPTIONS:,} captions",
        stages.all_s,
        "s",
        baseline="allowed",
        baseline_value=ALLOWED_S,
        higher_is_better=False,
        target=1.0,
    )
    measure.publish(
        "label_speed",
        [value],
        stages_s={name: round(seconds, 2) for name, seconds in stages.seconds.items()},
        crops=sum(crops),
        named=sum(concept.naming is not None for concept in named.concepts),
        building_the_vocabulary_s=round(building_s, 2),
    )


def thousand(repository: Repository, images: Path) -> Bank:
    """Publish a bank of those latents of a dictionary that have all their exemplars, as many as are named."""
    config = SaeConfig(
        model="cnn",
        layer="stage3",
        images=images,
        sizes=(LATENTS,),
        sampling="uniform",
        epochs=1,
        exemplars=EXEMPLARS,
        device="cpu",
    )
    bank = train(repository, config, silent).bank
    kept = [concept.id for concept in bank.concepts if len(concept.exemplars) == EXEMPLARS][:CONCEPTS]
    if len(kept) < CONCEPTS:
        raise RuntimeError(f"only {len(kept)} latents have {EXEMPLARS} exemplars")
    concepts = tuple(replace(bank.concepts[number], id=place) for place, number in enumerate(kept))
    tensors = {name: tensor[kept] if tensor.ndim else tensor for name, tensor in bank.tensors.items()}
    pictures = repository.pictures(
        repository.resolve(bank.reference), [each for concept in concepts for each in concept.exemplars]
    )
    return repository.publish(replace(bank, name="thousand", concepts=concepts, tensors=tensors), pictures)


def sentences(count: int) -> list[str]:
    """Return the world's captions, and after them made-up sentences: as many different ones as are wanted."""
    dice = random.Random(0)
    words = ["".join(dice.choices(_SYLLABLES, k=dice.randint(1, 3))) + dice.choice(_ENDINGS) for _ in range(20_000)]
    found = dict.fromkeys(captions())
    while len(found) < count:
        one, two, three, four = dice.choices(words, k=4)
        found[f"a {one} {two} {three}s near the {four}"] = None
    return list(found)[:count]


class Stages:
    """How long each of the stages takes while this is open, in seconds."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.all_s = 0.0
        self._open = ExitStack()
        self._inner = 0.0

    def __enter__(self) -> Stages:
        for name, (owner, function) in STAGES.items():
            self._open.enter_context(patch.object(owner, function, self._timed(name, getattr(owner, function))))
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_error: object) -> None:
        self.all_s = time.perf_counter() - self._start
        self.seconds["opening, and the rest"] = self.all_s - sum(self.seconds.values())
        self._open.close()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            with self._counted(name):
                return function(*arguments, **named)

        return run

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        outer, self._inner, start = self._inner, 0.0, time.perf_counter()
        yield
        took = time.perf_counter() - start
        self.seconds[name] += took - self._inner
        self._inner = outer + took


if __name__ == "__main__":
    main()
