"""Pictures of contrasts: each class has its colour, evidence lies where it is, and what is missing leaves no hole."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

import whence
from tests.data import real_data
from whence import _drawing, _images
from whence.testing import make_contrast

GREY = 120
DPI = 150
PANEL = 13 * DPI // 4
"""Width of a panel of the upper row, in pixels."""


def contrast(pixels: NDArray[np.uint8] | None = None, **changes: Any) -> whence.Contrast:
    """A contrast about an image, all of which the model saw."""
    pixels = np.full((96, 96, 3), GREY, np.uint8) if pixels is None else pixels
    view = whence.Box(0, 0, pixels.shape[1], pixels.shape[0])
    return make_contrast(**{"image": _images.read(pixels), "view": view, **changes})


def drawn(record: whence.Contrast, tmp_path: Path, **options: Any) -> NDArray[np.int64]:
    path = tmp_path / "why.png"
    record.save(path, **{"dpi": DPI, **options})
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def images(picture: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The square images in a picture, without their margins; the upper row first, from left to right."""
    regions, _ = ndimage.label(ndimage.binary_fill_holes(picture.min(axis=2) < 245))
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(regions), start=1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        solid = (regions[rows, columns] == number).mean() > 0.95
        if solid and height > 100 and height == pytest.approx(width, rel=0.03):
            found.append((rows.start > picture.shape[0] // 3, columns.start, picture[rows, columns]))
    return [image for *_, image in sorted(found, key=lambda item: item[:2])]


def centre(weight: NDArray[Any]) -> tuple[float, float]:
    """Centre of mass, as shares of height and width."""
    row, column = ndimage.center_of_mass(weight)
    return row / weight.shape[0], column / weight.shape[1]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("cells", [((1, 5), (5, 1)), ((2, 1), (2, 5))])
def test_each_class_is_in_its_colour_where_it_has_its_evidence(
    cells: tuple[tuple[int, int], tuple[int, int]], turned: bool, tmp_path: Path
) -> None:
    values = np.zeros((7, 7), np.float32)
    values[cells[0]], values[cells[1]] = (-1, 1) if turned else (1, -1)
    found = whence.ConceptMap(values)
    itself, *maps = images(drawn(contrast(maps={"activation": found, "contribution": found}, concepts=()), tmp_path))
    assert len(maps) == 2
    assert (itself == GREY).mean() > 0.95
    for shown in maps:
        warmth = shown[..., 0] - shown[..., 2]
        red, blue = np.clip(warmth, 20, None) - 20, np.clip(-warmth, 20, None) - 20
        assert red.max() == pytest.approx(blue.max(), rel=0.25)  # one scale for both
        for weight, cell in zip((red, blue), cells[::-1] if turned else cells, strict=True):
            assert centre(weight) == pytest.approx([(place + 0.5) / 7 for place in cell], abs=0.015)


def test_zero_leaves_the_image_as_it_is(tmp_path: Path) -> None:
    nothing = whence.ConceptMap(np.zeros((7, 7), np.float32))
    _, shown = images(drawn(contrast(maps={"activation": nothing}, concepts=()), tmp_path))
    assert np.ptp(shown[2:-2, 2:-2]) == 0


def test_the_curve_has_the_colours_of_the_classes_and_marks_the_flip(tmp_path: Path) -> None:
    picture = drawn(contrast(), tmp_path)
    part = picture[: picture.shape[0] // 2, 3 * PANEL :]
    top = {}
    for name, colour in (("target", (200, 68, 45)), ("other", (47, 111, 181))):
        rows, columns = np.nonzero((np.abs(part - colour) < 12).all(axis=2))
        assert len(rows) > 300
        low, high = np.quantile(columns, [0.05, 0.95])
        top[name] = rows[columns < low].mean() - rows[columns > high].mean()
    assert top["target"] < 0 < top["other"]  # rows count downwards: one falls, the other rises
    dark = (part.max(axis=2) < 60).sum(axis=0)
    # The axis and, in the middle of it as the curve ends at twice the flip, the dashed line.
    left, middle = np.flatnonzero(dark > 0.5 * dark.max())[[0, -1]]
    reach = np.nonzero((np.abs(part - (200, 68, 45)) < 12).all(axis=2))[1].max()
    assert (middle - left) / (reach - left) == pytest.approx(0.5, abs=0.03)


def test_what_was_not_asked_for_leaves_no_hole(tmp_path: Path) -> None:
    whole = contrast()
    full = drawn(whole, tmp_path)
    assert len(images(full)) == 3 + 3
    assert len(images(drawn(whole, tmp_path, max_overlays=2))) == 3 + 2
    no_curve = drawn(replace(whole, flip_shift=None, shift_curve=()), tmp_path)
    assert (no_curve[: full.shape[0] // 3, 3 * PANEL + 20 :] == 255).all()
    no_maps = drawn(replace(whole, maps={}), tmp_path)
    assert len(images(no_maps)) == 1 + 3
    assert (no_maps[100 : full.shape[0] // 3, 2 * PANEL + 20 :] == 255).all()  # the curve is beside the image
    no_prototypes = drawn(replace(whole, concepts=()), tmp_path)
    assert no_prototypes.shape[0] < full.shape[0] - 1.5 * DPI
    assert len(images(no_prototypes)) == 3
    bare = tuple(replace(concept, maps={}) for concept in whole.concepts)
    assert len(images(drawn(replace(whole, concepts=bare), tmp_path))) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"flip_shift": None},
        {"flip_shift": 0.0},
        {"flip_shift": 8.0},
        {"shift_curve": (whence.ShiftPoint(0.0, 0.5, 0.25),), "flip_shift": None},
        {"plane": whence.PlaneReport(3, 2)},
        {"prototype_count": 13},
        {"target": whence.ClassScore(0, "y" * 200, 1.0, 0.5), "other": whence.ClassScore(1, r"$\frac{1}{$", 0.0, 0.5)},
    ],
    ids=["no flip", "at once", "at the end", "one point", "unmeasured", "many prototypes", "names"],
)
def test_anything_that_may_come_is_drawn(changes: dict[str, Any], tmp_path: Path) -> None:
    whole_on_the_page(contrast(**changes), tmp_path)


@pytest.mark.parametrize("shape", [(9, 9), (30, 200, 3), (200, 30, 3)])
def test_images_of_any_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    whole_on_the_page(contrast(np.zeros(shape, np.uint8)), tmp_path)


def whole_on_the_page(record: whence.Contrast, tmp_path: Path) -> None:
    picture = drawn(record, tmp_path, dpi=60, max_overlays=13)
    assert picture.shape[1] == 13 * 60
    border = np.concatenate([picture[0], picture[-1], picture[:, -1]])
    assert (border == 255).all()  # nothing is cut off at the edge


def test_a_photo_of_which_the_model_saw_a_part(tmp_path: Path) -> None:
    source = _images.read(real_data() / "photos" / "n01614925_bald_eagle.JPEG")
    make_contrast(image=source, view=whence.Box(10, 5, 160, 155)).save(tmp_path / "why.svg")
    assert "what the model saw" in (tmp_path / "why.svg").read_text()


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"why.{suffix}"
    contrast().save(path, dpi=50)
    assert path.read_bytes().startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(whence.InvalidArgument, match="png"):
        contrast().save(tmp_path / "why.docx")
    with pytest.raises(whence.InvalidArgument, match="no image"):
        make_contrast().save(tmp_path / "why.png")
    with pytest.raises(FileNotFoundError):
        contrast().save(tmp_path / "absent" / "why.png")
    assert list(tmp_path.iterdir()) == []


def test_notebooks_get_a_picture_and_a_table() -> None:
    record = contrast(target=whence.ClassScore(0, "<b>tabby</b>", 4.0, 0.75))
    png = record._repr_png_()
    assert png is not None
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.width == 13 * 80
    page = record._repr_html_()
    assert page.count("<img ") == 1
    assert page.count("<tr>") == 1 + 3
    assert page.count("<li>") == len(record.describe().splitlines())
    assert "&lt;b&gt;tabby&lt;/b&gt; rather than tiger cat" in page
    assert "<b>tabby" not in page
    assert make_contrast()._repr_png_() is None
    assert "<img" not in make_contrast()._repr_html_()


# Machado, Oliveira and Fernandes (2009): what people without cones for red, green or blue see, in linear RGB.
SEEN_WITHOUT = {
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB of a colour in linear sRGB, under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear.clip(0, 1) / (0.9505, 1, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cones", SEEN_WITHOUT)
def test_all_eyes_tell_the_two_colours_apart(cones: str) -> None:
    def seen(colour: str) -> NDArray[np.float64]:
        srgb = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        return lab(np.array(SEEN_WITHOUT[cones]) @ ((srgb + 0.055) / 1.055) ** 2.4)

    one, other = seen(_drawing.POSITIVE), seen(_drawing.NEGATIVE)
    assert np.linalg.norm(one - other) > 50  # 2.3 is the least that anybody notices


WITHOUT = """
import sys
for name in ("matplotlib", "PIL"):
    sys.modules[name] = None
import numpy
from whence import MissingExtra, _images
from whence.testing import make_contrast
contrast = make_contrast(image=_images.read(numpy.zeros((4, 4, 3), numpy.uint8)))
assert contrast._repr_png_() is None
assert "<table>" in contrast._repr_html_()
try:
    contrast.save("why.png")
except MissingExtra as error:
    assert "pip install 'whence[pictures]'" in str(error), error
else:
    raise SystemExit("no error")
"""


def test_without_the_extra_the_error_names_it() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)
