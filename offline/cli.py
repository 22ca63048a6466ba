"""The ``whence-bank`` command: add models, learn banks, look after the repository."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from concepts import devices
from concepts import model as models
from concepts.architectures import TRUSTED_PACKAGES
from concepts.errors import CorruptData, InvalidInput, InvalidModel, WhenceError
from concepts.repository import Repository
from offline import tables
from offline.export import Export, export
from offline.images import open_folder
from offline.options import Option, option_of
from offline.registration import Candidate, Request, complete
from offline.store.harvest import harvest
from offline.store.settings import HarvestSettings
from offline.trainers import Trainer, trainers

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
train_app = typer.Typer(no_args_is_help=True, help="Learn a bank from images and publish it.")
model_app = typer.Typer(no_args_is_help=True, help="Bring models into the repository.")
app.add_typer(train_app, name="train")
app.add_typer(model_app, name="model")

Root = Annotated[str, typer.Option("--repository", envvar="WHENCE_REPOSITORY", help="Folder of models and banks.")]
Trust = Annotated[
    list[str] | None, typer.Option("--trust", help="Package whose factories a model may name; may be repeated.")
]


_REQUIRED = inspect.Parameter.empty

_PIPE_WIDTH = 200
"""Characters a line where there is no terminal."""


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn what is the user's to mend into one line and exit code 2."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "configuration"
        _fail(f"{name}: {first['msg']}", error)
    except InvalidModel as error:
        _fail(f"{error.message}: {error.__cause__}" if error.__cause__ else error.message, error)
    except WhenceError as error:
        _fail(error.message, error)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", error)


def _fail(message: str, cause: Exception) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(2) from cause


def _open(root: str, trust: list[str] | None = None) -> Repository:
    if "://" in root:
        raise InvalidInput(f"--repository {root!r} must be a folder: this version reads and writes no other storage")
    return Repository(root, trusted=_trusted(trust))


def _trusted(trust: list[str] | None) -> tuple[str, ...]:
    return (*TRUSTED_PACKAGES, *(trust or ()))


def _add_trainer(trainer: Trainer) -> None:
    """Make a sub-command whose options are the fields of the trainer's configuration."""
    fields = {name: option_of(name, info) for name, info in trainer.config.model_fields.items()}

    def command(**values: Any) -> None:
        root, trust = values.pop("repository"), values.pop("trust")
        with _plain_errors():
            config = trainer.config(**{name: fields[name].read(value) for name, value in values.items()})
            repository = _open(root, trust)
            with _Bars() as bars:
                result = trainer.train(repository, config, bars)
            _print(tables.outcome(result, repository.model_spec(config.model).class_names))
            _tell_skipped(result.skipped_images)

    _take(command, {"repository": (Root, _REQUIRED), "trust": (Trust, None)}, fields)
    train_app.command(trainer.name, help=trainer.summary)(command)


def _take(command: Callable[..., None], own: Mapping[str, tuple[Any, Any]], fields: Mapping[str, Option]) -> None:
    """Let typer see options of a command's own, by annotation and default, and those of a configuration's fields."""
    options = {**own, **{name: (field.annotation, field.default) for name, field in fields.items()}}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in options.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {name: annotation for name, (annotation, _) in options.items()}


def _add_harvest() -> None:
    """Make the sub-command whose options are the fields of a harvest's settings."""
    fields = {name: option_of(name, info) for name, info in HarvestSettings.model_fields.items()}

    def command(
        model: str, repository: str, layer: str, images: str, store: Path, device: str, trust: list[str] | None,
        **values: Any,
    ) -> None:  # fmt: skip
        with _plain_errors():
            settings = HarvestSettings(**{name: fields[name].read(value) for name, value in values.items()})
            loaded = _open(repository, trust).load_model(model, devices.choose(device))
            with _Bars() as bars:
                found = harvest(loaded, loaded.cut(layer), open_folder(images), store, settings, bars)
            _print(tables.store(found))
            _tell_skipped(found.skipped)

    own = {
        "model": (Annotated[str, typer.Argument(help="Name of the model in the repository.")], _REQUIRED),
        "repository": (Root, _REQUIRED),
        "layer": (Annotated[str, typer.Option(help="Layer to harvest; see `whence-bank layers`.")], _REQUIRED),
        "images": (
            Annotated[str, typer.Option(help="Folder of images; also s3://bucket/… or gs://bucket/….")],
            _REQUIRED,
        ),
        "store": (Annotated[Path, typer.Option(help="Folder for the vectors; work that stopped goes on.")], _REQUIRED),
        "device": (Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")], "auto"),
        "trust": (Trust, None),
    }
    _take(command, own, fields)
    app.command("harvest", help="Store activation vectors of a layer, to train on them more than once.")(command)


def _tell_skipped(images: Mapping[str, str]) -> None:
    for key, reason in list(images.items())[:10]:
        typer.echo(f"skipped image {key}: {reason}", err=True)
    if images:
        typer.echo(f"{len(images)} images were skipped", err=True)


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
    with _plain_errors():
        files = _open(repository, trust)
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
        _print(tables.model(spec, candidate.source))
        typer.echo(f"to see where it can be cut: whence-bank layers {spec.name}")


def _exported(candidate: Candidate, trust: list[str] | None) -> Export:
    """Export a model before it is published: what cannot be exported is not."""
    if isinstance(candidate.weights, bytes):
        raise InvalidInput("an ONNX file needs no --onnx: it can be served by either runtime as it is")
    typer.echo("exporting to ONNX, and comparing …", err=True)
    return export(models.build(candidate.spec, candidate.weights, trusted=_trusted(trust)))


@app.command("models")
def list_models(repository: Root) -> None:
    """List the models of the repository."""
    with _plain_errors():
        files = _open(repository)
        _print(tables.models(files.model_spec(name) for name in files.models()))


@app.command("layers")
def list_layers(model: str, repository: Root, trust: Trust = None) -> None:
    """List where a model can be cut, in running order, and where its activations are non-negative."""
    with _plain_errors():
        loaded = _open(repository, trust).load_model(model, devices.choose("cpu"))
        _print(tables.layers(loaded.layers()))


@app.command("list")
def list_banks(repository: Root) -> None:
    """List the banks that are served."""
    with _plain_errors():
        files = _open(repository)
        found, damaged = [], []
        for version in files.banks():
            try:
                found.append(files.summary(version))
            except CorruptData as error:
                damaged.append(f"damaged: {version.reference}: {error.message}")
        _print(tables.banks(found))
        typer.echo("".join(f"{line}\n" for line in damaged), err=True, nl=False)


@app.command("show")
def show_bank(reference: str, repository: Root) -> None:
    """Show a bank's configuration, metrics and concepts."""
    with _plain_errors():
        files = _open(repository)
        version = files.resolve(reference)
        bank = files.load(version)
        _print(tables.facts(bank, files.summary(version).published))
        _print(tables.concepts(bank, files.model_spec(bank.model).class_names))


@app.command("verify")
def verify_bank(reference: str, repository: Root) -> None:
    """Check every byte of a bank, and that its model has the weights it was trained on."""
    with _plain_errors():
        files = _open(repository)
        bank = files.load(files.resolve(reference))
        typer.echo(f"{bank.reference} @ {bank.digest}: {len(bank.files) + 1} files, all as published")


@app.command("rollback")
def roll_back(reference: str, digest: str, repository: Root) -> None:
    """Serve an older version of a bank again."""
    with _plain_errors():
        version = _open(repository).roll_back(f"{reference.partition('@')[0]}@{digest}")
        typer.echo(f"{version.reference} @ {version.digest} is served")


class _Bars:
    """Progress on stderr: one bar a stage."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, note="")
        self._progress.update(self._tasks[stage], completed=done, total=total)
        if note:
            self._progress.update(self._tasks[stage], note=note)


def _print(table: Any) -> None:
    # Files and pipes have no width: they get whole lines.
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


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


def _register() -> None:
    for trainer in trainers():
        _add_trainer(trainer)
    _add_harvest()


_register()
