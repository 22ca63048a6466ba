"""What records look like where they are printed, and in notebooks."""

from __future__ import annotations

import html
import pickle
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import whence
from tests.clients.test_client import BANK, HELD, MODEL
from whence.testing import make_concept, make_contrast, make_explanation, make_intervention, make_search

NAMED = replace(HELD, parts_layer="earlier", part_count=1, labelling=whence.Labelling("clip-b", "c" * 64, 1200))


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (MODEL, "Model('fake', torchvision:resnet50, 160×224 px, 2 classes)"),
        (HELD, "Bank('fake/layer/bank@eeeeeeeeeeee', nmf, 20 concepts)"),
        (NAMED, "Bank('fake/layer/bank@eeeeeeeeeeee', nmf, 20 concepts, 1 part at earlier, named by clip-b)"),
        (make_concept(0), f"Concept(pointed ear (#0) of {BANK}@bbbbbbbbbbbb, class tabby, 2 exemplars)"),
        (
            make_concept(3, children=(8, 9), other_index=3, exemplars=()),
            f"Concept(whiskers? (#21) of {BANK}@bbbbbbbbbbbb, class tabby, against 3, 2 parts, 0 exemplars)",
        ),
        (
            make_concept(2, class_index=None, parent=4),
            f"Concept(concept 14 of {BANK}@bbbbbbbbbbbb, part of 4, 2 exemplars)",
        ),
        (
            make_explanation(part_count=2).concepts[0],
            "ConceptScore(pointed ear (#0), contribution +3.14, share +50.0%, activation 6.28, "
            "maps activation+contribution+input, 2 parts)",
        ),
        (whence.ConceptMap(np.array([[0.5, -2, 1]], np.float32)), "ConceptMap(1×3, -2 to 1)"),
        (
            whence.ConceptMap(np.ones((2, 2), np.float32), colours=np.zeros((2, 2, 4), np.uint8)),
            "ConceptMap(2×2, 1 to 1, in colours)",
        ),
        (whence.ConceptMap(np.zeros((0, 0), np.float32)), "ConceptMap(0×0, 0 to 0)"),
    ],
)
def test_records_in_a_line(record: Any, line: str) -> None:
    assert repr(record) == line


def test_what_holds_other_records_reads_well_too() -> None:
    large = replace(MODEL, class_names=tuple(f"class {n}" for n in range(1000)))
    for record in ((large, large), make_search().found, whence.Outcome(0, make_explanation()), [make_concept()] * 2):
        assert len(repr(record)) < 600
        assert "array" not in repr(record)


def test_a_repr_of_its_own_changes_nothing_else() -> None:
    for record in (MODEL, NAMED, make_concept(), *make_explanation().concepts):
        assert pickle.loads(pickle.dumps(record)) == record
        assert replace(record) == record


class Page(HTMLParser):
    """Tags that are open and not closed, all tags, and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


TAGS = {"div", "p", "b", "img", "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "pre"}
HOSTILE = """<script>alert(1)</script>"><img src=x onerror=alert(2)>'&"""


def hostile_records() -> dict[str, Any]:
    """Every record that notebooks show, with hostile text wherever there is text."""
    word = whence.Word(HOSTILE, 0.5)
    naming = whence.Naming(HOSTILE, 0.5, False, (word,), (word,), 1)
    crop = replace(make_concept().exemplars[0], source=HOSTILE)
    concept = make_concept(
        label=HOSTILE, class_name=HOSTILE, bank=HOSTILE, bank_digest=HOSTILE, layer=HOSTILE, naming=naming,
        statistics={HOSTILE: 1.0}, exemplars=(crop,), counterfactuals=(crop,), other_index=1, other_name=HOSTILE,
    )  # fmt: skip
    score = whence.ClassScore(1, HOSTILE, 1.0, 0.5)
    explanation = make_explanation()
    scores = tuple(
        replace(each, label=HOSTILE, words=(HOSTILE,), class_index=1, class_name=HOSTILE)
        for each in explanation.concepts
    )
    intervention = make_intervention()
    labelling = whence.Labelling(HOSTILE, HOSTILE, 3)
    return {
        "explanation": replace(explanation, target=score, concepts=scores, bank=HOSTILE, scope="all"),
        "contrast": make_contrast(target=score, other=score, concepts=scores, bank=HOSTILE),
        "intervention": replace(intervention, before=(score,), after=(score,), bank=HOSTILE),
        "search": make_search(
            text=HOSTILE,
            found=(whence.FoundConcept(concept, 0.5),),
            unsearched=(whence.UnsearchedBank(HOSTILE, HOSTILE),),
        ),
        "concept": concept,
        "bank": whence.Bank(
            HOSTILE, HOSTILE, "nmf", HOSTILE, HOSTILE, HOSTILE, 1, 1, HOSTILE, HOSTILE,
            {HOSTILE: HOSTILE}, {HOSTILE: [HOSTILE]}, HOSTILE, 1, labelling,
        ),
        "model": whence.Model(HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), 1, 1),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(hostile_records()))
def test_pages_are_whole_safe_and_alone(name: str) -> None:
    page = Page(hostile_records()[name]._repr_html_())
    assert not page.open
    assert {tag for tag, _ in page.tags} <= TAGS
    assert all(attributes.keys() <= {"src", "alt", "title", "height", "open"} for _, attributes in page.tags)
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert all(source.startswith("data:image/") for source in sources)
    assert HOSTILE.split('"')[0] in page.text


def say_model() -> str:
    return replace(MODEL, class_names=tuple(f"class {n}" for n in range(101)))._repr_html_()


@pytest.mark.parametrize(
    ("page", "parts"),
    [
        (say_model, ["torchvision:resnet50", "160×224 px", "101 classes", "class 99, … and 1 more"]),
        (NAMED._repr_html_, [BANK, "nmf", "512 channels", "1 at earlier", "clip-b, of 1,200 captions", '"rank": 10']),
        (
            make_concept(3)._repr_html_,
            [f"whiskers? (#21), {BANK}@bbbbbbbbbbbb", "counterfactuals", "cannot be trusted", "importance", "0.12"],
        ),
        (
            make_intervention()._repr_html_,
            ["tabby → tiger cat", "predicts tiger cat in place of tabby", "75.0%", "logit after"],
        ),
    ],
)
def test_what_notebooks_show(page: Callable[[], str], parts: list[str]) -> None:
    text = html.unescape(Page(page()).text)
    for part in parts:
        assert part in text


def test_a_concept_shows_its_exemplars_in_a_strip() -> None:
    page = Page(make_concept()._repr_html_())
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [picture["alt"] for picture in pictures] == [
        "image0.jpg, activation 0.5",
        "image1.jpg, activation 0.375",
        "image9.jpg, activation 0",
    ]
    assert not Page(make_concept(exemplars=(), counterfactuals=())._repr_html_()).tags.count(("img", {}))
