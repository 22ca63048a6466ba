"""What contrastive prototypes contribute to the difference of two logits, on held-out images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from concepts.contrast.engine import ContrastEngine
from concepts.contrast.records import Contrast, ContrastRequest
from concepts.explanation import ExplainOptions
from offline import passes
from offline.contrast.config import ContrastConfig
from offline.contrast.pairs import by_target
from offline.task import Task


def measure(
    task: Task[ContrastConfig], engine: ContrastEngine, members: Mapping[int, Sequence[str]]
) -> dict[int, dict[str, float]]:
    """Contrast held-out images of every class with all classes that it has prototypes against.

    Parameters
    ----------
    task
        Whose held-out images serve, at most ``test_images`` of a class.
    engine
        Of the bank.
    members
        Keys of the held-out images that are predicted as each class.

    Returns
    -------
    dict
        By prototype, as far as there are images of its class: ``contribution``, the mean of what it contributes to
        ``y_i − y_j``, and ``importance``, the mean of its size; in logits.
    """
    concepts = engine.bank.concepts
    owners = ((concept.class_index, concept.other_index) for concept in concepts)
    pairs = by_target(sorted({(i, j) for i, j in owners if i is not None and j is not None}))
    options = ExplainOptions(top_k=max(len(concepts), 1))
    found: dict[int, list[float]] = defaultdict(list)
    for step, (target, others) in enumerate(pairs.items()):
        task.report("measuring prototypes", step, len(pairs))
        keys = list(members.get(target, ()))[: task.config.test_images]
        for batch, a in passes.activations(task.model, task.cut, task.stream(task.held_out, keys)):
            for other in others:
                request = ContrastRequest(target, other, options, shift=False)
                for answer in engine.contrast_activations(a, [request] * len(batch.keys)):
                    for concept in answer.concepts if isinstance(answer, Contrast) else ():
                        found[concept.id].append(concept.contribution)
    task.report("measuring prototypes", len(pairs), len(pairs))
    return {
        concept: {"contribution": sum(seen) / len(seen), "importance": sum(map(abs, seen)) / len(seen)}
        for concept, seen in found.items()
    }
