"""Overlays lie where the concept is, colours are those of the image, and nothing is left behind."""

from __future__ import annotations

import html
import io
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

import whence
from tests.data import real_data
from whence import _images, _overlays, _picture
from whence.testing import make_explanation

GREY = 120


def spot(row: int, column: int, grid: tuple[int, int], kind: str = "activation") -> whence.ConceptScore:
    """A concept that is in one cell alone."""
    values = np.zeros(grid, np.float32)
    values[row, column] = 1
    maps: dict[Any, whence.ConceptMap] = {kind: whence.ConceptMap(values)}
    return whence.ConceptScore(id=1, label="spot", activation=1, peak=1, contribution=1, share=1, maps=maps)


def explain(pixels: NDArray[np.uint8], **changes: Any) -> whence.Explanation:
    return make_explanation(**{"image": _images.read(pixels), **changes})


def drawn(explanation: whence.Explanation, tmp_path: Path, **options: Any) -> NDArray[np.int64]:
    path = tmp_path / "why.png"
    explanation.save(path, **options)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


# Placing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(7, 7), (1, 1), (1, 5), (14, 3)])
@pytest.mark.parametrize("size", [(224, 224), (60, 97), (5, 4)])
def test_placing_is_bilinear_between_cell_centres(grid: tuple[int, int], size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(size=grid).astype(np.float32)
    ours = _overlays.place(values, whence.Box(0, 0, size[1], size[0]), *size)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size, mode="bilinear", align_corners=False
    )
    assert ours.dtype == np.float32
    assert np.allclose(ours, theirs[0, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "view"),
    [
        ((500, 335), whence.Box(20.9, 103.4, 314.1, 396.6)),  # portrait
        ((200, 400), whence.Box(112.5, 12.5, 287.5, 187.5)),  # landscape
        ((64, 64), whence.Box(0, 0, 64, 64)),
    ],
)
@pytest.mark.parametrize("cell", [(1, 5), (3, 3), (5, 2)])
def test_the_hot_spot_is_at_the_cells_centre(size: tuple[int, int], view: whence.Box, cell: tuple[int, int]) -> None:
    values = spot(*cell, (7, 7)).maps["activation"].values
    placed = _overlays.place(values, view, *size)
    rows, columns = np.indices(size) + 0.5
    outside = (rows < view.top) | (rows > view.bottom) | (columns < view.left) | (columns > view.right)
    assert (np.isnan(placed) == outside).all()
    weight = np.nan_to_num(placed)
    centre = (rows * weight).sum() / weight.sum(), (columns * weight).sum() / weight.sum()
    assert centre[0] == pytest.approx(view.top + (cell[0] + 0.5) / 7 * (view.bottom - view.top), abs=0.05)
    assert centre[1] == pytest.approx(view.left + (cell[1] + 0.5) / 7 * (view.right - view.left), abs=0.05)


# Drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "view"),
    [
        ((500, 335), whence.Box(20.9, 103.4, 314.1, 396.6)),
        ((200, 400), whence.Box(112.5, 12.5, 287.5, 187.5)),
        ((32, 32), whence.Box(0, 0, 32, 32)),
        ((1700, 2500), whence.Box(0, 0, 2500, 1700)),
    ],
)
@pytest.mark.parametrize("cell", [(1, 5), (5, 2)])
def test_the_drawn_overlay_is_on_the_right_pixels(
    size: tuple[int, int], view: whence.Box, cell: tuple[int, int], tmp_path: Path
) -> None:
    pixels = np.full((*size, 3), GREY, np.uint8)
    picture = drawn(explain(pixels, view=view, concepts=(spot(*cell, (7, 7)),)), tmp_path)
    tint = picture[..., 0] - picture[..., 1]  # magenta on grey
    # The image stands out from the page; the outline's white line is within it.
    regions, _ = ndimage.label(ndimage.binary_fill_holes(picture.min(axis=2) < 200))
    peak = np.unravel_index(np.argmax(ndimage.uniform_filter(tint.astype(float), 5)), tint.shape)
    rows, columns = ndimage.find_objects((regions == regions[peak]).astype(int))[0]
    top, bottom, left, right = rows.start, rows.stop, columns.start, columns.stop
    assert (bottom - top) / (right - left) == pytest.approx(size[0] / size[1], rel=0.03)  # not stretched
    weight = np.clip(tint[top:bottom, left:right], 20, None) - 20.0
    centre = ndimage.center_of_mass(weight)
    expected = (
        (view.top + (cell[0] + 0.5) / 7 * (view.bottom - view.top)) / size[0],
        (view.left + (cell[1] + 0.5) / 7 * (view.right - view.left)) / size[1],
    )
    assert centre[0] / (bottom - top) == pytest.approx(expected[0], abs=0.012)
    assert centre[1] / (right - left) == pytest.approx(expected[1], abs=0.012)


def test_colours_are_those_of_the_image(tmp_path: Path) -> None:
    halves = np.zeros((100, 100, 3), np.uint8)
    halves[:, :50], halves[:, 50:] = (10, 200, 30), (20, 40, 220)
    picture = drawn(explain(halves, view=whence.Box(0, 0, 100, 100), concepts=()), tmp_path)
    greens, blues = ((picture == colour).all(axis=2) for colour in ((10, 200, 30), (20, 40, 220)))
    assert greens.sum() > 5000
    assert greens.sum() == pytest.approx(blues.sum(), rel=0.05)
    assert np.nonzero(greens)[1].max() <= np.nonzero(blues)[1].min()  # and not mirrored


@pytest.mark.parametrize(("sign", "warm"), [(1, True), (-1, False)])
def test_signed_maps_take_the_colours_of_the_bars(sign: int, warm: bool, tmp_path: Path) -> None:
    concept = spot(3, 3, (7, 7), "contribution")
    negative = whence.ConceptMap(concept.maps["contribution"].values * sign)
    score = whence.ConceptScore(1, "", 1, 1, sign, sign, {"contribution": negative})
    pixels = np.full((64, 64, 3), GREY, np.uint8)
    picture = drawn(explain(pixels, view=whence.Box(0, 0, 64, 64), concepts=(score,)), tmp_path)
    middle = picture[:, 400:1350]  # the overlays' columns
    warmth = middle[..., 0] - middle[..., 2]
    assert (warmth > 60).any() == warm
    assert (warmth < -60).any() == (not warm)


def test_input_maps_are_drawn_on_grey_with_their_sign(tmp_path: Path) -> None:
    values = np.zeros((64, 64), np.float32)
    values[8:24, 8:24], values[40:56, 40:56] = 1, -1
    score = replace(spot(0, 0, (1, 1)), maps={"input": whence.ConceptMap(values)})
    colourful = np.full((64, 64, 3), (250, 30, 40), np.uint8)  # as red as positive values
    picture = drawn(explain(colourful, view=whence.Box(0, 0, 64, 64), concepts=(score,)), tmp_path)
    middle = picture[:, 490:1340]  # the overlays' columns
    warmth = middle[..., 0] - middle[..., 2]
    red, blue = np.argwhere(warmth > 100), np.argwhere(warmth < -100)
    assert len(red) == pytest.approx(len(blue), rel=0.1)  # one scale for both
    assert (red.max(axis=0) < blue.min(axis=0)).all()  # each at its place
    grey = (np.ptp(middle, axis=2) < 5) & (middle.min(axis=2) < 240) & (middle.min(axis=2) > 150)
    assert grey.sum() > 8 * len(red)


def test_colours_are_drawn_over_white_where_they_are(tmp_path: Path) -> None:
    colours = np.zeros((16, 16, 4), np.uint8)
    colours[4:12, 4:12] = (0, 200, 0, 255)
    colours[:4] = (255, 0, 0, 0)  # transparent: not to be seen
    found = whence.ConceptMap(np.ones((16, 16), np.float32), None, colours)
    score = replace(spot(0, 0, (1, 1)), maps={"input": found})
    # The model saw the right half.
    explanation = explain(np.zeros((64, 128, 3), np.uint8), view=whence.Box(64, 0, 128, 64), concepts=(score,))
    picture = drawn(explanation, tmp_path)[:, 490:1340]
    rows, columns = np.nonzero((picture == (0, 200, 0)).all(axis=2))
    height, width = np.ptp(rows), np.ptp(columns)
    assert height == pytest.approx(width, rel=0.1)  # a square, not stretched with the image
    assert len(rows) > 0.8 * height * width
    assert not ((picture[..., 0] > 100) & (picture[..., 1] < 50)).any()


@pytest.mark.parametrize(
    "name",
    ["n01630670_common_newt", "n01614925_bald_eagle", "n02692877_airship", "n01871265_tusker", "n02514041_barracouta"],
)
def test_photos_of_any_shape_and_mode(name: str, tmp_path: Path) -> None:
    source = _images.read(real_data() / "photos" / f"{name}.JPEG")
    picture = drawn(make_explanation(image=source, view=whence.Box(10, 5, 60, 55)), tmp_path, dpi=60)
    assert picture.shape[1] == 13 * 60
    border = np.concatenate([picture[0], picture[-1], picture[:, -1]])
    assert (border == 255).all()  # nothing is cut off at the edge


def test_labels_may_hold_anything(tmp_path: Path) -> None:
    labels = [r"$\frac{1}{$", "<b>bold</b>", "a\nb", "x" * 300, ""]
    concepts = tuple(whence.ConceptScore(index, label, 1, 1, 0.5, 0.1, {}) for index, label in enumerate(labels))
    target = whence.ClassScore(0, "$x_" + "y" * 200, 1.0, 0.5)
    explanation = explain(np.zeros((9, 9, 3), np.uint8), concepts=concepts, target=target, predictions=(target,))
    explanation.save(tmp_path / "why.svg")
    page = explanation._repr_html_()
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page


@pytest.mark.parametrize("suffix", ["png", "jpg", "pdf", "svg", "webp"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"why.{suffix}"
    explain(np.zeros((40, 60, 3), np.uint8)).save(path, dpi=50)
    head = path.read_bytes()[:300]
    magic = {"png": b"\x89PNG", "jpg": b"\xff\xd8", "pdf": b"%PDF", "svg": b"<?xml", "webp": b"RIFF"}[suffix]
    assert head.startswith(magic)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    explanation = explain(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(whence.InvalidArgument, match="png"):
        explanation.save(tmp_path / "why.docx")
    bare = replace(explanation, concepts=(spot(0, 0, (2, 2)),))
    with pytest.raises(whence.InvalidArgument, match=r"maps=\('input',\)"):
        bare.save(tmp_path / "why.png", kind="input")
    with pytest.raises(whence.InvalidArgument, match="no image"):
        make_explanation().save(tmp_path / "why.png")
    with pytest.raises(FileNotFoundError):
        explanation.save(tmp_path / "absent" / "why.png")
    assert list(tmp_path.iterdir()) == []


def test_nothing_global_changes_and_threads_may_draw_at_once(tmp_path: Path) -> None:
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    before = dict(matplotlib.rcParams)
    explanation = explain(np.zeros((30, 40, 3), np.uint8))
    pictures: list[bytes | None] = []
    threads = [threading.Thread(target=lambda: pictures.append(explanation._repr_png_())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pictures)) == 1  # the same bytes, whatever else is being drawn
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_notebooks_get_a_picture_and_a_table() -> None:
    explanation = explain(np.zeros((30, 40, 3), np.uint8))
    png = explanation._repr_png_()
    assert png is not None
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.width == 13 * 80
    page = explanation._repr_html_()
    assert page.count("<img ") == 1
    assert page.count("<tr>") == 1 + 5 + 2
    assert make_explanation()._repr_png_() is None
    assert "<img" not in make_explanation()._repr_html_()


def test_names_say_their_class_where_all_classes_explain() -> None:
    record = make_explanation()
    owned = replace(record, concepts=tuple(replace(c, class_index=3, class_name="lynx") for c in record.concepts))
    everything = replace(owned, scope="all")
    assert "lynx" not in repr(owned)
    assert "lynx: pointed ear" in repr(everything)
    for explanation in (owned, everything):
        page = explanation._repr_html_()
        assert page.count("<td>lynx</td>") == len(record.concepts)
        assert ("Concepts of all classes" in page) is (explanation is everything)
    assert [name for name, _, _ in _picture._bars(everything)][:3] == [
        "lynx: pointed ear (#0)", "lynx: striped fur (#7)", "lynx: concept 14",
    ]  # fmt: skip


def test_the_line_for_a_prompt() -> None:
    line = repr(make_explanation())
    assert "\n" not in line
    assert len(line) < 250
    for part in ("tabby", "p=0.750", "pointed ear", "fake/layer/bank@bbbbbbbbbbbb"):
        assert part in line


def test_the_logit_that_is_explained_is_said_to_be_the_reconstructions() -> None:
    own = make_explanation()
    report = replace(own.faithfulness, explained_logit=3.21)
    target = replace(own.target, logit=3.18)
    substituted = replace(own, substitute=True, target=target, faithfulness=report)
    says = "explained logit 3.21 of the reconstruction (the model's own: 3.18)"
    assert says in repr(substituted)
    assert says in html.unescape(substituted._repr_html_())
    for other in (own, replace(substituted, substitute=False)):
        assert "the reconstruction (" not in repr(other) + other._repr_html_()
    assert "logit 3.18" in repr(replace(substituted, substitute=False))


WITHOUT = """
import sys
for name in ("matplotlib", "PIL"):
    sys.modules[name] = None
import whence
from whence import _images
from whence.testing import make_explanation
import numpy
explanation = make_explanation(image=_images.read(numpy.zeros((4, 4, 3), numpy.uint8)))
assert explanation._repr_png_() is None
assert "<table>" in explanation._repr_html_()
for action in (lambda: explanation.save("why.png"), _images.read(b"file").pixels):
    try:
        action()
    except whence.MissingExtra as error:
        assert "pip install 'whence[pictures]'" in str(error), error
    else:
        raise SystemExit("no error")
"""


def test_without_the_extra_the_error_names_it() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)


def test_the_report_in_words() -> None:
    report = make_explanation().faithfulness
    words = report.describe()
    assert "Exact" in words
    assert "25.0%" in words
    assert "the same class" in words
    assert "Input maps: exact to 0 of the activation (the model" in words
    other = whence.FaithfulnessReport(
        explained_logit=1.25,
        completeness_residual=-0.5,
        constant=0,
        exactness="first_order",
        exactness_reason="the head is not affine",
        top1_agrees=False,
        kl=2,
        carried_share=0.5,
        integration_error=0.005,
        code_tolerance=1e-6,
        input_maps=whence.InputMapReport("first_order", "gradient × input", 2.16),
    )
    words = other.describe()
    for part in (
        "First order",
        "not affine",
        "1.25",
        "-0.5 logits",
        "another class",
        "50.0%",
        "0.50%",
        "1e-06",
        "216%",
    ):
        assert part in words


def test_parts_are_drawn_beneath_their_concept(tmp_path: Path) -> None:
    """Tints appear where the parts are, and nowhere beneath concepts that have none."""
    pixels = np.full((64, 64, 3), GREY, np.uint8)
    view = whence.Box(0, 0, 64, 64)
    plain = drawn(explain(pixels, view=view, concept_count=3), tmp_path)
    parted = explain(pixels, view=view, concept_count=3, part_count=2)
    tree = drawn(parted, tmp_path)
    assert tree.shape[0] > plain.shape[0]

    def blobs(picture: NDArray[np.int64]) -> int:
        grey = np.abs(picture - GREY).max(axis=2) < 3
        return int(sum(size > 400 for size in np.bincount(ndimage.label(grey)[0].ravel())[1:]))

    assert blobs(tree) >= blobs(plain) + 6


def exemplar(colour: int) -> whence.Exemplar:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (colour, 0, 0)).save(file, "WEBP", lossless=True)
    return whence.Exemplar(file.getvalue(), "a.jpg", whence.Box(0, 0, 16, 16), 1.0)


def test_a_concept_is_drawn_with_its_parts(tmp_path: Path) -> None:
    concept = whence.Concept(3, "", 0, "tabby", {}, (exemplar(250), exemplar(240)), None, "m/l/n", "d", "late", (8, 9))
    parts = [replace(concept, id=8, parent=3, exemplars=(exemplar(200),)), replace(concept, id=9, parent=3)]
    for shown, colours in (([], {250, 240}), (parts, {250, 240, 200})):
        concept.save(tmp_path / "tree.png", shown)
        with Image.open(tmp_path / "tree.png") as picture:
            drawn_pixels = np.asarray(picture.convert("RGB")).astype(int)
        reds = drawn_pixels[(drawn_pixels[..., 1:] == 0).all(axis=2)][:, 0]
        assert {colour for colour in (250, 240, 200) if (reds == colour).sum() > 1000} == colours
    with pytest.raises(whence.InvalidArgument, match="no exemplars"):
        replace(concept, exemplars=()).save(tmp_path / "none.png")
    with pytest.raises(whence.InvalidArgument, match="use one of"):
        concept.save(tmp_path / "tree.xyz", parts)
