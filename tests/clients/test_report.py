"""The page about a batch: its numbers against a plain recomputation, its examples, and hostile names."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import statistics
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner

import whence
from tests.clients.test_client import BANK, HELD, MODEL
from tests.clients.test_notebook import Page
from tests.offline.buckets import BUCKET, s3
from whence._batch import report, schema, thumbnails
from whence._batch.counting import COLUMNS, EXAMPLES, Counts, Example
from whence._batch.reader import BatchOutput
from whence._cli import app as commands
from whence.testing import FakeServer, make_explanation

IMAGES = 90
CLASSES = ("tabby", "lynx", "")


def answer(seed: int) -> whence.Explanation:
    """An explanation that is another one for every seed, with numbers of all kinds, and sometimes without."""
    rng = np.random.default_rng(seed)
    made = make_explanation()
    picked = rng.choice(12, size=rng.integers(0, 6), replace=False)
    concepts = tuple(
        whence.ConceptScore(
            id=int(number),
            label=f"concept <{number}>" if number % 2 else "",
            weak_label=bool(number % 4 == 1),
            class_index=int(number) % 3 if number > 5 else None,
            activation=float(max(rng.normal(1), 0)),
            peak=1.0,
            contribution=float(rng.normal() * (number != 3)),
            share=float(rng.uniform(-1, 1)),
            maps={"activation": whence.ConceptMap(np.eye(4, dtype=np.float32))},
        )
        for number in picked
    )
    index = int(rng.integers(3))
    best = whence.ClassScore(index, CLASSES[index], 1.0, float(rng.uniform(0.3, 1)))
    trust = replace(
        made.faithfulness,
        exactness="exact" if seed % 3 else "first_order",
        completeness_residual=float(rng.normal() * 1e-3),
        relative_error=float(rng.uniform()) if seed % 2 else None,
        kl=float(rng.uniform()) if seed % 2 else None,
        top1_agrees=bool(rng.integers(2)) if seed % 5 else None,
        carried_share=float(rng.uniform()) if seed % 2 == 0 else None,
    )
    view = whence.Box(10, 0, 30, 20)
    return replace(made, concepts=concepts, predictions=(best,), target=best, faithfulness=trust, view=view)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of images, and the output of a batch over it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out") / "out"
    for number in range(IMAGES):
        image = Image.new("RGB", (40, 20), (number, 100, 50))
        image.save(source / f"<i>{number}.png")
    for number in range(7):
        (source / f"broken {number}.png").write_bytes(b"")

    def explain(request: Any) -> whence.Explanation:
        return answer(zlib.crc32(request.image.encoded))

    with FakeServer(explain, models=(MODEL,), banks=(HELD,)) as server:
        whence.explain_batch(source, output, bank=BANK, maps="activation", address=server.address, chunk_size=13)
    return source, output


@pytest.fixture
def rows(places: tuple[Path, Path]) -> list[dict[str, Any]]:
    return whence.read_batch(places[1]).to_pylist()


@pytest.fixture
def counts(places: tuple[Path, Path]) -> Counts:
    counts = Counts()
    for chunk, table in BatchOutput(places[1]).numbered("results", COLUMNS):
        counts.add(chunk, table)
    return counts


def mean(values: Iterator[float | None]) -> float | None:
    """The mean of those that there are, without rounding on the way."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def same_trust(found: Any, rows: list[dict[str, Any]]) -> None:
    for name in ("top1_agrees", "relative_error", "kl", "carried_share"):
        expected = mean(row["report"][name] for row in rows)
        assert getattr(found, name) == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_totals(counts: Counts, rows: list[dict[str, Any]]) -> None:
    assert counts.images == len(rows) == IMAGES
    assert counts.exactness == Counter(row["report"]["exactness"] for row in rows)
    assert counts.residual == max(abs(row["report"]["completeness_residual"]) for row in rows)
    assert counts.runtimes == {"fake cpu float32": IMAGES}
    times = [row["explained_at"] for row in rows]
    assert (counts.first, counts.last) == (min(times), max(times))
    same_trust(counts.trust(), rows)


def test_classes(counts: Counts, rows: list[dict[str, Any]]) -> None:
    found = counts.classes()
    assert [row.images for row in found] == sorted((row.images for row in found), reverse=True)
    assert len(found) == 3
    for row in found:
        of_it = [each["prediction"] for each in rows if each["prediction"]["index"] == row.index]
        assert (row.name, row.images) == (CLASSES[row.index], len(of_it))
        assert row.confidence == pytest.approx(statistics.fmean(each["probability"] for each in of_it), rel=1e-12)


def test_concepts(counts: Counts, rows: list[dict[str, Any]]) -> None:
    found = counts.concepts()
    assert {row.id for row in found} == {each["id"] for row in rows for each in row["concepts"]}
    assert [row.images for row in found] == sorted((row.images for row in found), reverse=True)
    for concept in found:
        of_it = [(row, each) for row in rows for each in row["concepts"] if each["id"] == concept.id]
        listed = [each for _, each in of_it]
        signs = Counter(math.copysign(1, each["contribution"]) for each in listed if each["contribution"])
        assert concept.label == (f"concept <{concept.id}>" if concept.id % 2 else "")
        assert (concept.weak_label, concept.class_index) == (listed[0]["weak_label"], listed[0]["class_index"])
        assert concept.images == len(listed)
        assert concept.active == sum(each["activation"] != 0 for each in listed)
        assert concept.share == pytest.approx(mean(abs(each["share"]) for each in listed), rel=1e-12)
        contribution = mean(each["contribution"] for each in listed)
        assert concept.contribution == pytest.approx(contribution, rel=1e-12, abs=1e-15)
        consistency = max(signs.values()) / sum(signs.values()) if signs else None
        assert concept.consistency == consistency
        same_trust(concept.trust, [row for row, _ in of_it])
        best = sorted(of_it, key=lambda pair: (-pair[1]["activation"], pair[0]["key"]))
        best = [(row, each) for row, each in best if each["activation"] > 0][:EXAMPLES]
        assert [(example.key, example.etag, example.activation) for example in concept.examples] == [
            (row["key"], row["etag"], each["activation"]) for row, each in best
        ]


def test_the_numbers_do_not_depend_on_the_chunks(places: tuple[Path, Path], counts: Counts) -> None:
    whole = Counts()
    whole.add(0, whence.read_batch(places[1], columns=list(COLUMNS)))
    for one, other in zip(counts.concepts(), whole.concepts(), strict=True):
        assert one.share == pytest.approx(other.share, rel=1e-12)
        assert [replace(example, chunk=0) for example in one.examples] == list(other.examples)
    assert counts.classes() == [
        replace(each, confidence=pytest.approx(each.confidence, rel=1e-12)) for each in whole.classes()
    ]


def test_memory_does_not_grow_with_the_images() -> None:
    counts, sizes = Counts(), []
    table = schema.table("results", [row_of(seed) for seed in range(50)]).select(COLUMNS)
    for chunk in range(40):
        counts.add(chunk, table)
        sizes.append(sum(len(concept.examples) for concept in counts.concepts()))
    assert sizes[0] == sizes[-1]
    assert counts.images == 2000


def row_of(seed: int) -> dict[str, Any]:
    from whence._batch.sources import Listed

    return schema.result(Listed(f"{seed}.png", "e", 1), answer(seed))


def test_nothing_at_all() -> None:
    counts = Counts()
    counts.add(0, pa.Table.from_pylist([], schema=schema.RESULTS).select(COLUMNS))
    assert (counts.images, counts.classes(), counts.concepts(), counts.first) == (0, [], [], None)
    assert counts.trust().kl is None


# The page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(places: tuple[Path, Path], tmp_path: Path) -> Callable[..., tuple[str, report.ReportSummary]]:
    def make(**options: Any) -> tuple[str, report.ReportSummary]:
        written = report.write_report(places[1], tmp_path / "page.html", **options)
        return (tmp_path / "page.html").read_text(), written

    return make


def pictures(page: str) -> list[np.ndarray[Any, Any]]:
    """The pictures of a page, decoded."""
    data = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in data]


def test_the_page_is_whole_and_alone(write: Callable[..., Any], counts: Counts) -> None:
    page, written = write()
    parsed = Page(page)
    assert not parsed.open
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "i"}
    addresses = [value for _, attributes in parsed.tags for name in ("src", "href") if (value := attributes.get(name))]
    assert all(address.startswith(("data:image/webp;base64,", "#concept-")) for address in addresses)
    assert counts.concepts()[0].examples[0].key in parsed.text
    assert "concept <1>? (#1)" in parsed.text
    shown = sum(len(concept.examples) for concept in counts.concepts())
    assert (written.explained, written.failed, written.pictures) == (IMAGES, 7, shown)
    assert len(pictures(page)) == shown


def test_what_the_page_says(write: Callable[..., Any], counts: Counts) -> None:
    text = " ".join(Page(write()[0].replace("<", " <")).text.split())
    trust, first = counts.trust(), counts.concepts()[0]
    numbers = f"{first.images / IMAGES:.1%} {first.contribution:+.3g} {first.share:.1%} {first.consistency:.1%}"
    for part in (
        "90 explained",
        "7 failed",
        f"{trust.top1_agrees:.1%} predicted alike",
        f"@{'e' * 64}",
        f"Exact for {counts.exactness['exact']} images: contributions",
        f"at most {counts.residual:.2g} logits".capitalize(),
        f"{first.images} {numbers}",
        "INVALID_IMAGE: 7",
        "look at the files",
        "broken 0.png",
    ):
        assert part in text
    assert re.findall(r"broken \d", text) == [f"broken {number}" for number in range(report.KEYS)]


def test_maps_lie_over_the_part_that_the_model_saw(write: Callable[..., Any]) -> None:
    for picture in pictures(write()[0]):
        assert picture.shape == (80, 160, 3)  # 40 × 20 pixels, four times as large
        outside, inside = picture[:, :36].astype(int), picture[:, 44:116].astype(int)
        assert np.ptp(outside, axis=(0, 1)).max() < 15  # as it was, but for what WebP changes
        assert inside[8, 8, 0] > outside[0, 0, 0] + 100  # magenta, where the map's diagonal is
        assert abs(inside[70, 4] - outside[0, 0]).max() < 30  # and nothing far from it


def test_remedies_are_for_reasons_that_there_are() -> None:
    documented = re.findall(r"[A-Z]+_[A-Z_]+", (Path(__file__).parents[2] / "docs/batch.md").read_text())
    assert report._REMEDIES.keys() <= set(documented)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation: int) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (640, 320)).save(file, "JPEG", exif=exif)
    pixels, scale = thumbnails._reduced(file.getvalue())
    upright = (80, 160) if orientation < 5 else (160, 80)
    assert pixels.shape[:2] == upright
    assert scale == pytest.approx((0.25, 0.25))


def test_examples_that_cannot_be_shown_say_why(
    places: tuple[Path, Path], write: Callable[..., Any], tmp_path: Path, counts: Counts
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    page, written = write(source=str(moved))
    assert written.pictures == 0
    assert f"none of the images could be read from {moved}" in page
    assert "is gone" in page
    page, written = write(source=str(tmp_path / "nowhere"))
    assert "There are no pictures: There is no folder" in page
    page, written = write(pictures=False)
    assert (written.pictures, pictures(page)) == (0, [])
    first, second, *_ = dict.fromkeys(example.key for row in counts.concepts() for example in row.examples)
    Image.new("RGB", (40, 20), "green").save(moved / first)
    (moved / second).write_bytes(b"no image")
    page, written = write(source=str(moved))
    assert "has changed since" in page
    assert "cannot be decoded here" in page
    greens = [picture for picture in pictures(page) if abs(picture.astype(int) - (0, 128, 0)).max() < 10]
    assert len(greens) == written.pictures > 0  # without the map of what it was before


def test_large_images_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("L", (400, 400)).save(file, "PNG")
    monkeypatch.setattr(thumbnails, "_LARGEST_PIXELS", 400 * 400 - 1)
    wanted = (1, Example(0, "k", None, 1.0, 1.0, "x"))
    assert thumbnails._draw_image(file.getvalue(), [wanted], {}, "")[wanted].note == "cannot be decoded here"


def test_signed_maps_have_two_colours() -> None:
    pixels = np.full((40, 40, 3), 128, np.uint8)
    values = np.array([[1, 1], [-1, -1]], np.float32)
    found = thumbnails.Map("contribution", values, whence.Box(0, 0, 40, 40))
    drawn = thumbnails._overlaid(pixels, (1.0, 1.0), found).astype(int)
    assert drawn[0, 20, 0] > drawn[0, 20, 2] + 50
    assert drawn[-1, 20, 2] > drawn[-1, 20, 0] + 50
    flat = thumbnails.Map("contribution", values * 0, whence.Box(0, 0, 40, 40))
    assert (thumbnails._overlaid(pixels, (1.0, 1.0), flat) == 128).all()


def test_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3(monkeypatch), FakeServer(models=(MODEL,), banks=(HELD,)) as server:
        file = io.BytesIO()
        Image.new("RGB", (300, 200), "green").save(file, "JPEG")
        for key in ("in/a b/é.jpg", "in//twice.jpg"):
            boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=file.getvalue())
        source, output = f"s3://{BUCKET}/in", f"s3://{BUCKET}/out"
        whence.explain_batch(source, output, bank=BANK, maps="contribution", address=server.address)
        written = report.write_report(output, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "a b/é.jpg" in page
    assert (written.explained, written.pictures) == (2, 10)
    assert {picture.shape for picture in pictures(page)} == {(107, 160, 3)}


# The command ------------------------------------------------------------------------------------------------------


def test_the_command(places: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(commands.app, ["batch", "report", str(places[1]), "--to", str(page)])
    assert done.exit_code == 0, done.output
    assert "90 images, 7 failures" in done.output
    assert page.read_text().startswith("<!doctype html>")
    arguments = ["batch", "report", str(places[1]), "--to", str(page), "--no-pictures", "--json"]
    assert json.loads(CliRunner().invoke(commands.app, arguments).stdout)["pictures"] == 0


@pytest.mark.parametrize(
    ("output", "to", "says"),
    [("{source}", "page.html", "no output of a batch"), ("{output}", "/nowhere/page.html", "Cannot write /nowhere")],
)
def test_what_cannot_be(output: str, to: str, says: str, places: tuple[Path, Path]) -> None:
    source, written = places
    with pytest.raises(whence.WhenceError, match=says):
        report.write_report(output.format(source=source, output=written), to)
