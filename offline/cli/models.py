"""Commands about models: add them, list them, see where they can be cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from concepts import devices
from concepts import model as models
from concepts.errors import InvalidInput
from offline import tables
from offline.cli.common import Root, Trust, open_repository, plain_errors, print_table, trusted
from offline.export import Export, export
from offline.registration import Candidate, Request, complete

app = typer.Typer()
model_app = typer.Typer(no_args_is_help=True, help="Bring models into the repository.")
app.add_typer(model_app, name="model")


@model_app.command("add")
def add_model(
    name: str,
    repository: Root,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="torchvision:NAME, bcos:NAME, package.module:factory, or an .onnx file; not needed where --weights "
            "are torchvision's, under the name of their file."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="State dictionary: .safetensors, or .pth of tensors alone; or the name of torchvision's weights, e.g. "
            "IMAGENET1K_V2, which are fetched. Left out, torchvision's default ones are fetched."
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(help="Name of torchvision's weights whose preprocessing and classes a file of your own shares."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Class names in order: a file with one a line, or a comma list; by default the preset's."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Input size in pixels: 224, or HEIGHTxWIDTH; by default the preset's.")
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            help="Shorter side before the centre crop, in pixels; 0 stretches the whole image. By default the "
            "preset's, else 0."
        ),
    ] = None,
    interpolation: Annotated[
        str | None,
        typer.Option(help="nearest, bilinear, bicubic or lanczos; by default the preset's, else bilinear."),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="Subtracted from the channels in [0, 1]: three numbers or one for all, also as fractions "
            "(103.939/255). By default the preset's, else 0."
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(help="Divides the channels; 1/255 makes values of 0 to 255. By default the preset's, else 1."),
    ] = None,
    inverse: Annotated[
        bool | None, typer.Option("--inverse/--no-inverse", help="Append 1 − x as three more channels (B-cos).")
    ] = None,
    bgr: Annotated[
        bool | None,
        typer.Option("--bgr/--rgb", help="Reverse the channels; --mean and --std are in that order then, too."),
    ] = None,
    options: Annotated[str, typer.Option(help="JSON object of arguments of the factory.")] = "{}",
    onnx: Annotated[
        bool,
        typer.Option("--onnx", help="Export it to ONNX, too, and check that: it can be served by ONNX Runtime then."),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(help="Replace a model of that name; banks that were learned from other weights are refused then."),
    ] = False,
    trust: Trust = None,
) -> None:
    """Bring a model into the repository: architecture by name, weights, class names, preprocessing.

    What torchvision and bcos publish of their networks need not be said. Options override it one by one.
    """
    with plain_errors():
        files = open_repository(repository, trust)
        height, width = _size(size) if size is not None else (None, None)
        preprocessing = {
            "height": height,
            "width": width,
            "resize": resize,
            "interpolation": interpolation,
            "mean": None if mean is None else _triple("mean", mean),
            "std": None if std is None else _triple("std", std),
            "inverse": inverse,
            "bgr": bgr,
        }
        given: dict[str, Any] = {field: value for field, value in preprocessing.items() if value is not None}
        if resize == 0:
            given["resize"] = None
        names = None if classes is None else _class_names(classes)
        request = Request(name, architecture, weights, like, names, _json_object(options), given)
        candidate = complete(request)
        exported = _exported(candidate, trust) if onnx else None
        spec = files.publish_model(candidate.spec, candidate.weights, exported=exported, replace=replace)
        print_table(tables.model(spec, candidate.source))
        typer.echo(f"to see where it can be cut: whence-bank layers {spec.name}")


def _exported(candidate: Candidate, trust: list[str] | None) -> Export:
    """Export a model before it is published: what cannot be exported is not."""
    if isinstance(candidate.weights, bytes):
        raise InvalidInput("an ONNX file needs no --onnx: it can be served by either runtime as it is")
    typer.echo("exporting to ONNX, and comparing …", err=True)
    return export(models.build(candidate.spec, candidate.weights, trusted=trusted(trust)))


@app.command("models")
def list_models(repository: Root) -> None:
    """List the models of the repository."""
    with plain_errors():
        files = open_repository(repository)
        print_table(tables.models(files.model_spec(name) for name in files.models()))


@app.command("layers")
def list_layers(model: str, repository: Root, trust: Trust = None) -> None:
    """List where a model can be cut, in running order, and where its activations are non-negative."""
    with plain_errors():
        loaded = open_repository(repository, trust).load_model(model, devices.choose("cpu"))
        print_table(tables.layers(loaded.layers()))


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().replace("×", "x").partition("x")
    try:
        return int(height), int(width or height)
    except ValueError as error:
        raise InvalidInput(f"--size {text!r} is neither a number nor HEIGHTxWIDTH") from error


def _triple(name: str, text: str) -> tuple[float, float, float]:
    parts = text.split(",")
    try:
        first, second, third = map(_fraction, parts * 3 if len(parts) == 1 else parts)
    except (ValueError, ZeroDivisionError) as error:
        raise InvalidInput(f"--{name} {text!r} is neither a number nor three of them, with commas between") from error
    return first, second, third


def _fraction(text: str) -> float:
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def _class_names(text: str) -> tuple[str, ...]:
    if "," in text:
        lines = text.split(",")
    elif Path(text).is_file():
        try:
            lines = Path(text).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"--classes {text!r} is not a text file in UTF-8") from error
    else:
        raise InvalidInput(f"--classes {text[:200]!r} is neither a file nor a list with commas")
    return tuple(line.strip() for line in lines if line.strip())


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"--options is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInput('--options must be a JSON object, e.g. {"num_classes": 10}')
    return value
