"""What is written is what was answered, under the documented schema; and reading says what is wrong."""

from __future__ import annotations

import asyncio
import json
import struct
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import whence
from tests.clients.batch.worlds import ANSWER, BANK, WITH_MAPS, FakeService, a_job, do, fill
from whence._batch import commits, plan, schema
from whence._batch.reader import BatchOutput
from whence._batch.sources import Listed
from whence.testing import FakeServer
from whence.v1 import explanation_service_pb2 as service_pb2


def half(value: float) -> float:
    """A number in half precision, by another way."""
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def single(value: float | None) -> float | None:
    """A number in single precision, by another way."""
    return None if value is None else float(struct.unpack("<f", struct.pack("<f", value))[0])


def same(row: dict[str, Any], record: Any) -> None:
    """Check that a struct is a record, field by field."""
    for name, value in row.items():
        expected = getattr(record, name)
        assert value == (single(expected) if isinstance(expected, float) else expected), name


def test_a_row_is_an_answer(tmp_path: Path) -> None:
    fill(tmp_path / "in", 1)
    report = replace(ANSWER.faithfulness, kl=None, carried_share=0.1)
    concepts = (replace(ANSWER.concepts[0], class_index=3, weak_label=True, share=-0.3), *ANSWER.concepts[1:])
    answer = replace(ANSWER, faithfulness=report, concepts=concepts, unexplained=None, model="m")
    do(a_job(tmp_path / "in", tmp_path / "out"), FakeService(explanation=answer))
    (row,) = whence.read_batch(tmp_path / "out").to_pylist()
    assert (row["key"], row["size"], row["runtime"]) == ("a/000.jpg", 7, "image 0")
    for name in ("model", "model_digest", "bank", "bank_digest", "unexplained"):
        assert row[name] == getattr(answer, name)
    same(row["prediction"], answer.predictions[0])
    same(row["target"], answer.target)
    same(row["report"], report)
    for listed, concept in zip(row["concepts"], concepts, strict=True):
        same(listed, concept)
    assert row["contributions_total"] == 7.0
    assert row["explained_at"].tzinfo is not None
    # Every field of the report is a column, but the one of maps on the input.
    assert {field.name for field in fields(report)} - set(row["report"]) == {"input_maps"}


def test_maps_are_written_in_half_precision(tmp_path: Path) -> None:
    fill(tmp_path / "in", 2)
    do(a_job(tmp_path / "in", tmp_path / "out"), FakeService(explanation=WITH_MAPS))
    table = whence.read_batch(tmp_path / "out", "maps")
    assert table.schema.field("values").type == pa.list_(pa.float16())
    found = {(row["key"], row["concept_id"], row["kind"]): row for row in table.to_pylist()}
    assert len(found) == table.num_rows == 2 * 5 * 3
    for concept in WITH_MAPS.concepts:
        for kind, expected in concept.maps.items():
            row = found["b/001.jpg", concept.id, kind]
            assert (row["height"], row["width"]) == expected.values.shape
            assert row["view"] == {"left": 0.0, "top": 0.0, "right": 224.0, "bottom": 224.0}
            np.testing.assert_array_equal(row["values"], [half(float(value)) for value in expected.values.flat])


def test_files_are_as_their_commits_say(tmp_path: Path) -> None:
    import hashlib

    fill(tmp_path / "in")
    do(a_job(tmp_path / "in", tmp_path / "out"), FakeService(explanation=WITH_MAPS))
    for path in (tmp_path / "out/done").iterdir():
        commit = commits.decode(path.read_bytes())
        assert commit.explained == commit.files["results"].rows
        for table, file in commit.files.items():
            content = (tmp_path / "out" / file.name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file.byte_count, file.sha256)
            written = pq.read_table(tmp_path / "out" / file.name)
            assert written.schema.equals(schema.SCHEMAS[table])
            assert written.num_rows == file.rows


def test_maps_do_not_pile_up(tmp_path: Path) -> None:
    """Row groups are written as they fill, so memory holds a few megabytes of maps, however large the chunk."""
    fill(tmp_path / "in", 40)
    wide = replace(WITH_MAPS.concepts[0], maps={"activation": whence.ConceptMap(np.zeros((512, 512), np.float32))})
    job = a_job(tmp_path / "in", tmp_path / "out", chunk_size=40)
    do(job, FakeService(explanation=replace(ANSWER, concepts=(wide,))))
    (path,) = (tmp_path / "out/maps").iterdir()
    metadata = pq.ParquetFile(path).metadata
    assert metadata.num_rows == 40
    assert metadata.num_row_groups == 5  # 8 maps of half a megabyte each


def test_reading_some_columns_and_chunks(tmp_path: Path) -> None:
    fill(tmp_path / "in", 30)
    do(a_job(tmp_path / "in", tmp_path / "out"))
    table = whence.read_batch(tmp_path / "out", columns=["size", "key"])
    assert table.column_names == ["size", "key"]
    output = BatchOutput(tmp_path / "out")
    tables = list(output.tables(columns=["key"]))
    assert [each.num_rows for each in tables] == [3] * 10
    assert sum(commit.explained for commit in output.finished()) == output.planned() == 30
    assert output.manifest["options"]["top_k"] == 10
    for name in ("failures", "maps"):
        empty = whence.read_batch(tmp_path / "out", name)  # type: ignore[arg-type]
        assert (empty.num_rows, empty.schema) == (0, schema.SCHEMAS[name])
    with pytest.raises(whence.InvalidArgument, match="no column 'none'; it has key, etag"):
        whence.read_batch(tmp_path / "out", columns=["none"])
    with pytest.raises(whence.InvalidArgument, match="'results', 'failures', 'maps'"):
        whence.read_batch(tmp_path / "out", "other")  # type: ignore[arg-type]


def test_what_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(whence.NotFound):
        whence.read_batch(tmp_path / "none")
    with pytest.raises(whence.FailedPrecondition) as caught:
        whence.read_batch(tmp_path)
    assert caught.value.reason == "NO_BATCH_OUTPUT"
    (tmp_path / "manifest.json").write_text('{"schema_version": 2}')
    with pytest.raises(whence.FailedPrecondition, match="use the version") as caught:
        whence.read_batch(tmp_path)
    assert caught.value.reason == "OTHER_SCHEMA_VERSION"


def test_an_output_that_was_changed_by_hand(tmp_path: Path) -> None:
    fill(tmp_path / "in", 3)
    do(a_job(tmp_path / "in", tmp_path / "out"))
    (file,) = (tmp_path / "out/results").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(whence.DataLoss):
        whence.read_batch(tmp_path / "out")
    file.unlink()
    with pytest.raises(whence.DataLoss):
        whence.read_batch(tmp_path / "out")
    (commit,) = (tmp_path / "out/done").iterdir()
    commit.write_text("{}")
    with pytest.raises(whence.DataLoss):
        whence.read_batch(tmp_path / "out")


@pytest.mark.parametrize("numbers", [[0, 0, 1], [2], [0, 3, 3, 7], []])
@pytest.mark.parametrize("per_block", [1, 2, 100])
def test_plans_keep_their_keys(
    tmp_path: Path, numbers: list[int], per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_KEYS_PER_BLOCK", per_block)
    rows = [(chunk, Listed(f"{place}", None if place else "e", place, False)) for place, chunk in enumerate(numbers)]
    sizes, in_block = plan.write_keys(tmp_path / "keys", rows, 8, 1)
    assert (sizes, in_block) == ([numbers.count(chunk) for chunk in range(8)], per_block)
    whole = plan.Plan(1, "keys", 0, 1, in_block, sizes, [1] * 8)
    assert list(plan.planned(tmp_path / "keys", whole)) == rows
    assert plan.decode(whole.encode()) == whole


def test_chunk_sizes() -> None:
    counts = (1, 5000, 100_000, 10**7)
    assert [plan.default_chunk_size(count, maps=False) for count in counts] == [16, 19, 390, 1000]
    assert [plan.default_chunk_size(count, maps=True) for count in counts] == [16, 19, 100, 100]


def test_the_whole_way_with_a_service(tmp_path: Path) -> None:
    objects = fill(tmp_path / "in", 20)
    with FakeServer(banks=[BANK]) as server:
        options: dict[str, Any] = {
            "bank": "fake/layer/bank",
            "address": server.address,
            "top_k": 2,
            "maps": "activation",
        }
        summary = whence.explain_batch(tmp_path / "in", tmp_path / "out", **options)
        requests = [call.request for call in server.calls if call.method == "Explain"]

        async def within_a_loop() -> whence.BatchSummary:  # as in notebooks
            return whence.explain_batch(tmp_path / "in", tmp_path / "out2", **options)

        asyncio.run(within_a_loop())
    assert (summary.explained, summary.failed, summary.complete) == (20, 0, True)
    assert {request.bank for request in requests} == {"fake/layer/bank@" + "b" * 64}
    assert {request.priority for request in requests} == {service_pb2.PRIORITY_BACKGROUND}
    assert {request.image.encoded for request in requests} == set(objects.values())
    assert {len(row["concepts"]) for row in whence.read_batch(tmp_path / "out").to_pylist()} == {2}
    assert whence.read_batch(tmp_path / "out", "maps").num_rows == 40
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["bank"], manifest["bank_digest"]) == ("fake/layer/bank", "b" * 64)


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": -1},
        {"maps": "none"},
        {"bank": ""},
        {"shard": (0, 2)},
        {"shard": (3, 2)},
        {"chunk_size": 0},
        {"patience_s": 0.0},
        {"timeout_s": -1.0},
        {"order": "size"},
    ],
)
def test_what_cannot_be_right_is_refused_at_once(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(whence.InvalidArgument):
        whence.explain_batch(tmp_path, "/elsewhere", **{"bank": "m/l/n", "address": "nowhere:1", **wrong})
