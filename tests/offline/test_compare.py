"""Banks side by side: what is put in one table, what is marked, and what is said of the numbers."""

from __future__ import annotations

import json
import re

import pytest

from concepts.bank import Bank, Concept
from concepts.errors import InvalidInput
from offline.compare import COLUMNS, Row, compare_on, compare_stored, side_by_side
from offline.evaluate import evaluate_bank
from offline.progress import silent
from tests.offline.test_cli import refused, run
from tests.offline.test_evaluate import CRAFT, FRACTION, FREE, SAE, files, place, settings

__all__ = ["files", "place"]


def row(owners: list[int | None], held_out: str | None = "h", layer: str = "l", model: str = "m", **metrics) -> Row:
    concepts = tuple(Concept(k, class_index=owner) for k, owner in enumerate(owners))
    bank = Bank(
        kind="nmf", model=model, layer=layer, name="b", weights_digest="", channels=1, concepts=concepts, tensors={}
    )
    return Row(bank, metrics, held_out)


def test_columns_are_those_that_all_have_in_order_and_the_best_are_marked():
    found = side_by_side(
        [
            row([None, None], kl=0.2, top1_agreement=0.9, gini=0.5, accuracy=0.7),
            row([None, None], kl=0.1, top1_agreement=0.9, gini=0.6, accuracy=0.8, mse=1.0),
            row([None, None], kl=0.1, top1_agreement=0.8, gini=0.1, accuracy=0.8, mse=1.0),
        ]
    )
    assert found.columns == ("accuracy", "top1_agreement", "kl", "gini")
    # A model's own accuracy is no merit of a bank.
    assert found.best == {"top1_agreement": (0, 1), "kl": (1, 2), "gini": (1,)}
    assert found.notes == ()


def test_values_of_different_rules_are_not_ranked():
    values = {"deletion_aopc": 0.1, "insertion_auc": 0.5, "gini": 0.3, "kl": 0.1, "mse": 0.1, "stability": 0.2}
    more = {name: 2 * value for name, value in values.items()}
    five, three, free = row([0] * 5, **values), row([0] * 3, **more), row([None] * 5, **more)
    assert set(side_by_side([five, row([0] * 5, **more)]).best) == set(values)
    found = side_by_side([five, three])
    assert set(found.best) == {"kl", "mse", "stability"}
    assert any("b K = 5 by the importance to the class, b K = 3" in note for note in found.notes)
    found = side_by_side([five, free])
    assert set(found.best) == {"kl", "mse"}
    assert any("means are over classes" in note for note in found.notes)
    assert any("folds" in note for note in found.notes)
    assert set(side_by_side([five, row([0] * 5, layer="k", **more)]).best) == set(values) - {"mse"}


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"held_out": "other"}, "not all measured on the same images"),
        ({"held_out": None}, "not all measured on the same images"),
        ({"layer": "k"}, "the layers differ"),
        ({"model": "n"}, "different models"),
        ({}, None),
    ],
)
def test_what_differs_is_said(others, words):
    notes = side_by_side([row([None], kl=0.1), row([None], kl=0.1, **others)]).notes
    assert any(words in note for note in notes) if words else not notes


def test_banks_without_a_common_metric_are_refused():
    with pytest.raises(InvalidInput, match="no metric in common"):
        side_by_side([row([None], kl=0.1), row([None], mse=0.1)])


def test_stored_metrics_are_put_side_by_side(files):
    found = compare_stored(files, [CRAFT, SAE, FREE])
    for one in found.rows:
        mean = one.bank.metrics["mean"]
        assert one.metrics == {name: mean[name] for name in COLUMNS if name in mean}
    # All were judged on the same images, whatever they are.
    assert not any("same images" in note for note in found.notes)
    assert "stability" not in found.columns
    found = compare_stored(files, [SAE, FRACTION])
    assert any("same images" in note for note in found.notes)


def test_all_are_measured_alike_on_images_of_classes_that_all_have(place, files):
    found = compare_on(files, [CRAFT, SAE, FRACTION, FREE], settings(place, held_out_per_class=6), silent)
    assert len({one.held_out for one in found.rows}) == 1
    assert not any("same images" in note for note in found.notes)
    assert {"accuracy", "kl", "deletion_aopc_25"} <= set(found.columns)
    assert "stability" not in found.columns
    classes = ("ship", "truck")
    alone = evaluate_bank(files, FRACTION, settings(place, held_out_per_class=6, seed=0, classes=classes), silent)
    assert found.rows[2].metrics.items() <= alone.metrics["mean"].items()
    with pytest.raises(InvalidInput, match="'frog' is not one"):
        compare_on(files, [CRAFT, SAE], settings(place, classes=("frog",)), silent)
    ships = compare_on(files, [CRAFT, SAE], settings(place, classes=("ship",)), silent)
    assert {one.held_out for one in ships.rows}.isdisjoint(one.held_out for one in found.rows)


def test_the_command_prints_one_table_or_one_json_object(place):
    at = ("--repository", place / "repository")
    code, out, _ = run("compare", CRAFT, SAE, FREE, *at)
    assert code == 0
    for reference in (CRAFT, SAE, FREE):
        assert len(re.findall(rf"│ {reference} ", out)) == 1
    assert re.search(r"\d\.\d{3}\*", out)
    assert "…" not in out
    assert "C-Del 25" in out
    assert "Σ (acc_0 − acc_i) / 27" in out
    code, out, _ = run("compare", CRAFT, SAE, "--images", place / "test", "--json", "--device", "cpu", *at)
    assert code == 0
    found = json.loads(out)
    assert [one["bank"] for one in found["banks"]] == [CRAFT, SAE]
    assert [one["method"] for one in found["banks"]] == ["craft", "sae"]
    assert all(one["metrics"].keys() == set(found["columns"]) for one in found["banks"])
    assert "--encoder says how to measure" in refused("compare", SAE, "--encoder", "x/y", *at)
