"""The form of a result: ratios that grow when things get better, and one JSON object as the last line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import measure

KEYS = {"name", "value", "unit", "higher_is_better", "baseline", "baseline_value", "ratio", "target", "machine"}


def test_the_ratio_is_larger_where_better() -> None:
    faster = measure.row("speed", 30.0, "images/s", baseline="plain", baseline_value=20.0)
    assert faster.ratio == pytest.approx(1.5)
    sooner = measure.row("wait", 2.0, "ms", baseline="no-op", baseline_value=1.0, higher_is_better=False)
    assert sooner.ratio == pytest.approx(0.5)


def test_work_is_timed_in_turn_and_warmed_up() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    seconds = measure.interleaved({"slow": slow, "quick": lambda: order.append("quick")}, repeats=3)
    assert order == ["slow", "quick"] * 4
    assert seconds["slow"] > seconds["quick"]


def test_a_result_is_printed_as_one_object_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    row = measure.row("speed", 30.0, "images/s", baseline="plain", baseline_value=20.0, target=1.2)
    measure.publish("alone", [row], note="here")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(printed) == KEYS | {"note"}
    assert json.loads((tmp_path / "alone.json").read_text()) == printed
    measure.publish("several", [row, row])
    several = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [set(one) for one in several["rows"]] == [KEYS, KEYS]
