"""Looking through images for the counterfactuals of a bank's concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from pydantic import Field
from torch import Tensor

from concepts import kinds, parts
from concepts.bank import Bank, Concept
from concepts.codec import Codec
from concepts.errors import InvalidImage, InvalidInput
from concepts.model import Model
from concepts.preprocessing import Box
from offline import exemplars, passes
from offline.images import ImageFolder, Stream, shuffled
from offline.naming import presence
from offline.naming.counterfactuals import Sought, nearest_without
from offline.naming.settings import NamingSettings
from offline.naming.windows import Seen, WindowGrid
from offline.progress import Reporter

_SIZED = 16
"""Images whose exemplars are measured."""


class CounterfactualSettings(NamingSettings):
    """What decides how counterfactuals are found."""

    counterfactuals: int = Field(10, ge=0, description="Most counterfactuals of a concept; 0: name without.")
    counterfactual_similarity: float = Field(
        0.3, ge=-1, le=1, description="Least cosine with what exemplars show beside the concept."
    )
    probe_images: int = Field(2000, ge=1, description="Most images to look for counterfactuals in.")
    batch_size: int = Field(128, ge=1, description="Images a forward pass.")
    seed: int = Field(0, ge=0, description="Decides which images are looked through.")


@dataclass
class Search:
    """Looks for counterfactuals of one layer's concepts.

    Parameters
    ----------
    model
        Of the bank.
    folder
        The images that the bank was trained on: exemplars are looked up there.
    settings
        How to look.
    report
        Hears of progress.
    """

    model: Model
    folder: ImageFolder
    settings: CounterfactualSettings
    report: Reporter
    skipped: dict[str, str] = field(default_factory=dict)
    """Why an image was left out, by key."""

    def add_to(self, bank: Bank) -> tuple[Bank, dict[str, bytes]]:
        """Give a bank's concepts and parts counterfactuals.

        Returns
        -------
        bank : Bank
            With counterfactuals in place of those that it had.
        pictures : dict
            Of these, by file.

        Raises
        ------
        InvalidInput
            If the folder has less than half of the images that the exemplars were cut from.
        """
        concepts, pictures = self._found(bank, kinds.concept_codec(bank), first=0)
        bank = replace(bank, concepts=concepts)
        if bank.parts is None:
            return bank, pictures
        whole = bank.parts
        own, more = self._found(whole, parts.codec(whole), first=len(bank.concepts))
        return bank.with_parts(whole.kind, whole.layer, whole.channels, own, whole.tensors), pictures | more

    def _found(self, bank: Bank, codec: Codec | None, first: int) -> tuple[tuple[Concept, ...], dict[str, bytes]]:
        if codec is None:
            return bank.concepts, {}
        boxes = self._boxes(bank.concepts)
        seen, present = self._look(bank, codec.to(self.model.device), boxes)
        references = [
            [seen.within[each.source, each.box] for each in concept.exemplars if (each.source, each.box) in seen.within]
            for concept in bank.concepts
        ]
        sought = Sought(kinds.directions(bank), present, references)
        chosen = nearest_without(seen, sought, self.settings.counterfactuals, self.settings.counterfactual_similarity)
        drawn = exemplars.draw(self.folder, chosen, first, "counterfactual")
        concepts = [replace(c, counterfactuals=own) for c, own in zip(bank.concepts, drawn.exemplars, strict=True)]
        return tuple(concepts), drawn.pictures

    def _boxes(self, concepts: Sequence[Concept]) -> dict[str, set[Box]]:
        """Return where exemplars were cut from, by image of the folder."""
        keys, known = set(self.folder.keys), [each for concept in concepts for each in concept.exemplars]
        boxes: dict[str, set[Box]] = {}
        for exemplar in known:
            if exemplar.source in keys:
                boxes.setdefault(exemplar.source, set()).add(exemplar.box)
        sources = {exemplar.source for exemplar in known}
        if 2 * len(boxes) < len(sources):  # a few names may be those of other images
            raise InvalidInput(
                f"the folder has {len(boxes):,} of the {len(sources):,} images that the exemplars were cut from: give "
                "the folder that the bank was trained on, or --counterfactuals 0"
            )
        return boxes

    def _look(self, bank: Bank, codec: Codec, boxes: dict[str, set[Box]]) -> tuple[Seen, Tensor]:
        """Run the model over probes and the images of exemplars; return how much of each concept is in a probe, too."""
        settings, cut, count = self.settings, self.model.cut(bank.layer), len(bank.concepts)
        probes = frozenset(shuffled(self.folder.keys, settings.seed)[: settings.probe_images])
        seen = Seen(WindowGrid(cut.layout, self.model.spec.preprocessing, self._side(boxes)))
        keys = sorted(probes | boxes.keys())
        stream = Stream(self.folder, keys, self.model.spec.preprocessing, settings.batch_size, self.skipped)
        totals: list[Tensor] = []
        done = 0
        for batch, a in passes.activations(self.model, cut, stream):
            positions = cut.positions(a)
            rows = [row for row, key in enumerate(batch.keys) if key in probes]
            seen.add(batch.keys, batch.boxes, positions, boxes, probes)
            if rows and not codec.per_class:
                totals.append(presence.of_positions(codec, positions[rows], count))
            done += len(batch.keys)
            self.report(f"looking through images at {bank.layer}", min(done, len(keys) - 1), len(keys))
        self.report(f"looking through images at {bank.layer}", len(keys), len(keys))
        if not seen.keys:
            raise InvalidInput("no image of the folder can be used to look for counterfactuals in: all were skipped")
        if codec.per_class:
            return seen, presence.of_windows(codec, torch.cat(seen.windows), count, self.model.device)
        return seen, torch.cat(totals)

    def _side(self, boxes: dict[str, set[Box]]) -> float:
        """Return the usual side of exemplars, as a share of the shorter side of what the model sees of an image."""
        shares = []
        for key in sorted(boxes)[:_SIZED]:
            try:
                _, view = self.model.spec.preprocessing.fit(self.folder.open(key))
            except InvalidImage:
                continue  # it is skipped, and that is told, when all images are looked through
            shorter = min(view.right - view.left, view.bottom - view.top)
            shares += [min(box.right - box.left, box.bottom - box.top) / shorter for box in boxes[key]]
        return min(median(shares), 1.0) if shares else 1.0
