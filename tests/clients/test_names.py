"""Names of concepts as users see them: found by words, weak where they are weak, and whose they are."""

from __future__ import annotations

import html
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

import whence
from whence import _contrast_words, _images, _labels, _requests, _search_words, _tree, _words
from whence._cli import app as commands
from whence.testing import FakeServer, make_concept, make_contrast, make_explanation, make_search
from whence.v1 import explanation_service_pb2 as service_pb2

BANK = "fake/layer/bank"
PIXELS = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture
def run(server: FakeServer) -> Callable[..., Result]:
    """Run a command against the fake service."""
    server.concepts = {(BANK, concept.id): concept for concept in (make_concept(0), make_concept(3))}
    environment = {"WHENCE_ADDRESS": server.address, "COLUMNS": "160"}
    return lambda *arguments: CliRunner().invoke(commands.app, arguments, env=environment)


# Searching -------------------------------------------------------------------------------------------------------


def test_what_is_found_is_a_sequence(client: whence.Client) -> None:
    results = client.search("  ear ")
    made = make_search()
    assert (results.text, results.by, len(results)) == ("ear", "meaning", 4)
    assert [found.concept.label for found in results] == ["pointed ear", "striped fur", "", "whiskers"]
    assert results[0] == results.found[0]
    assert results[1:] == results.found[1:]
    assert results[-1].bank == BANK
    assert [found.score for found in results] == pytest.approx([found.score for found in made])
    assert results.unsearched == made.unsearched
    assert results[0].concept == replace(made[0].concept, exemplars=())
    assert pickle.loads(pickle.dumps(results)) == results
    assert results != client.search("fur")
    with pytest.raises(AttributeError):
        results.text = "other"  # type: ignore[misc]


def test_what_the_server_is_asked(server: FakeServer, client: whence.Client) -> None:
    few = client.search("ear", by="label", model="m", bank="m/l/n@12345678", limit=2, max_exemplars=1, timeout_s=12)
    assert [len(found.concept.exemplars) for found in few] == [1, 1]
    client.search("ear")
    first, second = server.calls
    assert first.method == "SearchConcepts"
    asked = first.request
    assert {field.name for field, _ in asked.ListFields()} == {field.name for field in asked.DESCRIPTOR.fields}
    assert (asked.text, asked.by, asked.model, asked.bank) == (
        "ear",
        service_pb2.SEARCH_BY_LABEL,
        "m",
        "m/l/n@12345678",
    )
    assert (asked.limit, asked.max_exemplars) == (2, 1)
    assert 0 < (first.time_remaining_s or 0) <= 12.5
    assert first.metadata["request_id"]
    assert second.request == service_pb2.SearchConceptsRequest(text="ear", by=service_pb2.SEARCH_BY_MEANING, limit=10)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"text": ""}, "words to look for"),
        ({"text": " \n"}, "words to look for"),
        ({"text": "x" * 1001}, "1000"),
        ({"text": 7}, "words to look for"),
        ({"text": "ear\udcff"}, "not UTF-8"),
        ({"by": "smell"}, "'label'"),
        ({"bank": " "}, "model/layer/name"),
        ({"limit": -1}, "limit"),
        ({"limit": 2.5}, "limit"),
        ({"max_exemplars": -1}, "max_exemplars"),
    ],
)
def test_bad_searches_are_refused_before_they_are_sent(
    options: dict[str, Any], says: str, server: FakeServer, client: whence.Client
) -> None:
    with pytest.raises(whence.InvalidArgument, match=re.escape(says)):
        client.search(**{"text": "ear", **options})
    assert not server.calls


def test_every_way_to_search_has_a_name() -> None:
    assert set(_requests.SEARCHES.values()) == set(service_pb2.SearchBy.values()) - {0}


def test_failures_of_a_search_are_typed(server: FakeServer, client: whence.Client) -> None:
    server.fail_next(whence.NotFound("no such bank", reason="UNKNOWN_BANK"))
    with pytest.raises(whence.NotFound, match="no such bank"):
        client.search("ear", bank="m/l/none")


def test_what_is_found_in_a_line() -> None:
    assert repr(make_search()) == (
        "SearchResults('ear' by meaning: pointed ear 0.5, striped fur 0.25, concept 14 0.167, …; 1 bank not searched)"
    )
    assert repr(make_search(found_count=0, unsearched=())) == "SearchResults('ear' by meaning: nothing found)"


def test_notebooks_get_a_table_with_exemplars() -> None:
    text = make_search(text="<ear>")._repr_html_()
    for part in ("&lt;ear&gt;", "whiskers?", "tabby", BANK, "0.500", "fake/layer/plain was not searched"):
        assert part in text
    assert text.count('src="data:image/webp;base64,UklG') == 8
    assert text.count("<td>") == 4 * 6
    bare = make_search(found=tuple(replace(each, concept=make_concept(exemplars=())) for each in make_search()))
    assert "<img" not in bare._repr_html_()
    assert "exemplars" not in bare._repr_html_()
    assert ": 4 concepts<" in text
    assert ": 1 concept<" in make_search(found=make_search().found[:1])._repr_html_()


def test_the_command_prints_a_table(run: Callable[..., Result], server: FakeServer) -> None:
    done = run("search", "an ear", "--by", "label", "--model", "fake", "--bank", BANK, "--limit", "4")
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if BANK in line]
    assert len(rows) == 4
    for part in ("0.500", "pointed ear", "tabby"):
        assert part in rows[0]
    assert "whiskers?" in rows[3]
    assert "fake/layer/plain was not searched. Its concepts have no names yet." in done.output
    (call,) = server.calls
    asked = call.request
    assert (asked.text, asked.by, asked.model, asked.bank, asked.limit) == ("an ear", 2, "fake", BANK, 4)
    answer = json.loads(run("search", "an ear", "--json").stdout)
    assert set(answer) == set(whence.SearchResults.__slots__)
    assert [each["concept"]["label"] for each in answer["found"]][:2] == ["pointed ear", "striped fur"]
    assert answer["found"][0]["concept"]["naming"]["words"][0] == {"text": "pointed ear", "score": 0.5}


def test_a_prototype_is_found_with_the_class_it_is_against() -> None:
    concept = make_concept(other_index=5, other_name="lynx")
    assert _search_words.class_of(concept) == "tabby, against lynx"
    assert _search_words.class_of(replace(concept, other_name="")) == "tabby, against 5"
    assert _search_words.class_of(replace(concept, class_name="", other_index=None)) == "281"
    assert _search_words.class_of(replace(concept, class_index=None)) == ""


# Names -----------------------------------------------------------------------------------------------------------


def test_a_name_is_weak_unless_a_person_gave_it() -> None:
    strong, weak, bare = make_concept(0), make_concept(3), make_concept(2)
    assert [concept.weak_label for concept in (strong, weak, bare)] == [False, True, False]
    assert [concept.name for concept in (strong, weak, bare)] == ["pointed ear", "whiskers?", "concept 14"]
    given = replace(weak, label="beard", named_by_person=True)
    assert (given.weak_label, given.name) == (False, "beard")
    assert given.naming is not None
    assert given.naming.label == "whiskers"
    assert weak.words == ("hair", "line", "wire")
    assert bare.words == ()


def test_an_explanation_carries_names(client: whence.Client, image: NDArray[np.uint8]) -> None:
    concepts = client.explain(image, bank=BANK).concepts
    assert [concept.weak_label for concept in concepts] == [False, False, False, True, False]
    assert concepts[3].name == "whiskers?"
    assert concepts[3].label == "whiskers"
    assert concepts[1].words == ("stripe", "fur", "tiger")
    assert [c.weak_label for c in client.contrast(image, bank=BANK).concepts] == [False] * 3


def test_a_concept_comes_with_its_counterfactuals(server: FakeServer, client: whence.Client) -> None:
    concept = make_concept()
    server.concepts = {(BANK, 0): concept}
    assert client.concept(BANK, 0) == concept
    bare = client.concept(BANK, 0, max_exemplars=0)
    assert (bare.exemplars, bare.counterfactuals, bare.naming) == ((), (), concept.naming)


def texts_of(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], object]) -> str:
    """All that is written in a picture, as far as matplotlib is given it."""
    from matplotlib.text import Text

    written: list[str] = []
    real = Text.set_text

    def noting(self: Text, text: Any) -> None:
        written.append(str(text))
        real(self, text)

    monkeypatch.setattr(Text, "set_text", noting)
    draw()
    return "\n".join(written)


def test_weak_names_are_shown_as_weak_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the label is shown, it has its question mark; nowhere without."""
    image, weak = _images.read(PIXELS), make_concept(3)
    explanation, contrast = make_explanation(image=image), make_contrast(image=image, prototype_count=4)
    parts = tuple(
        replace(part, label="hair", weak_label=True) for part in make_explanation(part_count=2).concepts[0].parts
    )
    tree = replace(explanation, concepts=(replace(explanation.concepts[3], parts=parts),))
    shown = {
        "line": repr(explanation).replace("…", "") + repr(replace(explanation, concepts=explanation.concepts[3:])),
        "table": str(_words.table(tree)),
        "html": html.unescape(replace(explanation, image=None)._repr_html_()),
        "contrast table": str(_contrast_words.table(contrast)),
        "contrast html": html.unescape(replace(contrast, image=None)._repr_html_()),
        "found": repr(make_search(found=make_search().found[3:])),
        "found html": html.unescape(make_search()._repr_html_()),
        "title": _tree._title(weak),
        "picture": texts_of(monkeypatch, lambda: explanation.save(tmp_path / "a.png")),
        "tree picture": texts_of(monkeypatch, lambda: tree.save(tmp_path / "b.png")),
        "contrast picture": texts_of(monkeypatch, lambda: contrast.save(tmp_path / "c.png")),
        "concept picture": texts_of(
            monkeypatch, lambda: weak.save(tmp_path / "d.png", [replace(weak, id=5, parent=21)])
        ),
    }
    for where, text in shown.items():
        assert "whiskers?" in text, where
        assert not re.search(r"whiskers(?!\?)", text), where
        assert not re.search(r"(pointed ear|striped fur)\?", text), where
    for where in ("html", "contrast html", "found html", "picture", "tree picture", "contrast picture"):
        assert "A name with a question mark" in shown[where], where
    assert "question mark" not in str(_words.all_lines(make_explanation(concept_count=3)))
    for where in ("table", "tree picture"):
        assert "hair?" in shown[where], where


def test_tables_show_the_words_beside_the_label() -> None:
    heads, rows = _words.table(make_explanation(part_count=1))
    assert heads[-1] == "words"
    assert {len(row) for row in rows} == {len(heads)}
    cells = {row[0]: row[-1] for row in rows}
    assert cells["pointed ear"] == "ear, tip", "without the label itself"
    assert cells["whiskers?"] == "hair, line, wire"
    assert (cells["concept 14"], cells["all other concepts"]) == ("", "")
    rest = next(row for row in rows if row[0] == "all other concepts")
    assert rest[heads.index("contribution")] == "+0.75"
    explanation = make_explanation()
    bare = replace(explanation, concepts=tuple(replace(c, words=()) for c in explanation.concepts))
    assert "words" not in _words.table(bare)[0]
    heads, rows = _contrast_words.table(make_contrast())
    assert (heads[-1], {len(row) for row in rows}) == ("words", {len(heads)})
    assert _labels.gloss("a", tuple("abcdefgh")) == "b, c, d, e"


def test_the_command_shows_what_was_found_to_say(
    run: Callable[..., Result], server: FakeServer, tmp_path: Path
) -> None:
    done = run("concept", BANK, "0", "--save", str(tmp_path / "crops"))
    assert done.exit_code == 0, done.output
    for part in (
        "pointed ear #0",
        "named by a machine: “pointed ear” with a score of 0.75, compared with 1 counterfactual\n",
    ):
        assert part in done.output
    for part in ("a photo of pointed ear", "phrase", "tip", "0.250", "counterfactual", "image9.jpg"):
        assert part in done.output
    names = sorted(path.name for path in (tmp_path / "crops").iterdir())
    assert names == ["0-000-counterfactual.webp", "0-000.webp", "0-001.webp"]
    weak = run("concept", BANK, "21").output
    assert "whiskers? #21" in weak
    assert "score of 0.12, which is weak" in weak
    server.concepts = {(BANK, 0): make_concept(label="my own", named_by_person=True)}
    assert "named by a person; a machine found “pointed ear”" in run("concept", BANK, "0").output
    server.concepts = {(BANK, 0): make_concept(naming=None, counterfactuals=())}
    bare = run("concept", BANK, "0").output
    assert "named by" not in bare
    assert "counterfactual" not in bare
