"""From what a user says of a model to what is published of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from concepts.errors import InvalidInput
from concepts.model import ONNX, ModelSpec
from concepts.onnx_model.file import OnnxFile
from concepts.preprocessing import Preprocessing
from offline import presets
from offline.presets import Preset
from offline.weights import fetch_weights, read_weights


@dataclass(frozen=True)
class Request:
    """What a user says of a model; what is left out is taken from a preset where there is one."""

    name: str
    architecture: str | None = None
    weights: str | None = None
    """A file, or the name of torchvision's weights."""
    like: str | None = None
    """Name of torchvision's weights whose preset is to be taken."""
    class_names: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``Preprocessing``."""


class Candidate(NamedTuple):
    """A model that is ready to be published."""

    spec: ModelSpec
    weights: dict[str, Tensor] | bytes
    """State dictionary, or an ONNX file."""
    source: str
    """Where its preset comes from, for people; empty without one."""


def complete(request: Request) -> Candidate:
    """Fill in what the request leaves out, and read the weights.

    Raises
    ------
    InvalidInput
        If something is missing that no preset knows, all of it named; or the weights cannot be had.
    InvalidModel
        If the architecture is unknown, or the preprocessing makes no sense.
    """
    if (file := _onnx_file(request)) is not None:
        return _of_onnx(request, file)
    architecture = request.architecture or presets.architecture_of(request.weights or "") or ""
    preset = presets.find(architecture, request.weights, request.like)
    options, class_names = _outputs(request, preset)
    _require(
        architecture=architecture,
        weights=request.weights or preset.version,
        classes=class_names,
        size=preset.preprocessing or "height" in request.preprocessing,
    )
    spec = ModelSpec(request.name, architecture, _preprocessing(request, preset), class_names, "", options)
    return Candidate(spec, _weights(request.weights, architecture, preset), _source(request, preset))


def _onnx_file(request: Request) -> Path | None:
    """Return the ONNX file that is the model, whichever option names it."""
    given = [text for text in (request.architecture, request.weights) if text]
    named = [text for text in given if text.lower().endswith(".onnx")]
    if named and len(set(given)) > 1:
        raise InvalidInput("an ONNX file is architecture and weights in one: give it as --architecture alone")
    return Path(named[0]) if named else None


def _of_onnx(request: Request, path: Path) -> Candidate:
    """Complete a model that is an ONNX file: it tells its input's size and layout, but not its range of values."""
    if request.options or request.like is not None:
        raise InvalidInput("an ONNX file takes no --options and no --like")
    if not path.is_file():
        raise InvalidInput(f"there is no ONNX file {path}")
    content = path.read_bytes()
    file = OnnxFile.parse(content)
    known = {"height": file.height, "width": file.width, "inverse": file.channels == 6}
    given = {**{name: value for name, value in known.items() if value is not None}, **request.preprocessing}
    _require(architecture="an ONNX file", classes=request.class_names, size="height" in given and "width" in given)
    ending = f", its {file.stripped} taken off" if file.stripped else ""
    source = f"the file: {file.layout.upper()} input, opset {file.opset}{ending}"
    spec = ModelSpec(request.name, ONNX, Preprocessing(**given), request.class_names or (), "")
    return Candidate(spec, content, source)


def _require(**found: Any) -> None:
    missing = [f"--{name}" for name, value in found.items() if not value]
    if missing:
        raise InvalidInput(
            f"give {', '.join(missing)}: no preset has that for {found['architecture'] or 'an unknown architecture'}"
        )


def _outputs(request: Request, preset: Preset) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the factory's options and the class names; without class names where neither side has them."""
    options = {**preset.options, **request.options}
    known = len(preset.class_names)
    if request.class_names is not None:
        if known and len(request.class_names) != known:
            options.setdefault("num_classes", len(request.class_names))
        return options, request.class_names
    return options, preset.class_names if options.get("num_classes", known) == known else ()


def _preprocessing(request: Request, preset: Preset) -> Preprocessing:
    given = dict(request.preprocessing)
    known = preset.preprocessing
    if known is None:
        return Preprocessing(**given)
    size = (given.get("height", known.height), given.get("width", known.width))
    if known.resize is not None and "resize" not in given and size != (known.height, known.width):
        raise InvalidInput(
            f"give --resize with --size: the preset's ({known.resize}) is for {known.height}×{known.width} pixels; 0 "
            "stretches the whole image"
        )
    return replace(known, **given)


def _source(request: Request, preset: Preset) -> str:
    if not preset.source or not request.preprocessing:
        return preset.source
    return f"{preset.source}; not its {', '.join(request.preprocessing)}"


def _weights(asked: str | None, architecture: str, preset: Preset) -> dict[str, Tensor]:
    version = preset.version if asked is None else presets.published(architecture, asked)
    if version is not None:
        return fetch_weights(version, architecture)
    return read_weights(Path(asked or ""), architecture)
