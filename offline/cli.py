"""The ``whence-bank`` command: add models, learn banks, look after the repository."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from concepts import devices
from concepts.architectures import TRUSTED_PACKAGES
from concepts.errors import CorruptData, InvalidInput, InvalidModel, WhenceError
from concepts.model import ModelSpec
from concepts.preprocessing import Interpolation, Preprocessing
from concepts.repository import Repository
from offline import tables
from offline.options import option_of
from offline.trainers import Trainer, trainers
from offline.weights import read_weights

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
train_app = typer.Typer(no_args_is_help=True, help="Learn a bank from images and publish it.")
model_app = typer.Typer(no_args_is_help=True, help="Bring models into the repository.")
app.add_typer(train_app, name="train")
app.add_typer(model_app, name="model")

Root = Annotated[str, typer.Option("--repository", envvar="WHENCE_REPOSITORY", help="Folder of models and banks.")]
Trust = Annotated[
    list[str] | None, typer.Option("--trust", help="Package whose factories a model may name; may be repeated.")
]


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
    return Repository(root, trusted=(*TRUSTED_PACKAGES, *(trust or ())))


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
            for key, reason in list(result.skipped_images.items())[:10]:
                typer.echo(f"skipped image {key}: {reason}", err=True)
            if result.skipped_images:
                typer.echo(f"{len(result.skipped_images)} images were skipped", err=True)

    annotations = {"repository": Root, "trust": Trust, **{name: field.annotation for name, field in fields.items()}}
    defaults = {"trust": None, **{name: field.default for name, field in fields.items()}}
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(name, inspect.Parameter.empty),
            annotation=annotation,
        )
        for name, annotation in annotations.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = annotations
    train_app.command(trainer.name, help=trainer.summary)(command)


@model_app.command("add")
def add_model(
    name: str,
    architecture: Annotated[str, typer.Option(help="torchvision:NAME, bcos:NAME or package.module:factory.")],
    weights: Annotated[Path, typer.Option(help="State dictionary: .safetensors, or .pth of tensors alone.")],
    classes: Annotated[str, typer.Option(help="Class names in order: a file with one a line, or a comma list.")],
    size: Annotated[str, typer.Option(help="Input size in pixels: 224, or HEIGHTxWIDTH.")],
    repository: Root,
    resize: Annotated[int | None, typer.Option(help="Shorter side before the centre crop, in pixels.")] = None,
    interpolation: Annotated[str, typer.Option(help="nearest, bilinear, bicubic or lanczos.")] = "bilinear",
    mean: Annotated[str, typer.Option(help="Subtracted from R,G,B in [0, 1].")] = "0,0,0",
    std: Annotated[str, typer.Option(help="Divides R,G,B.")] = "1,1,1",
    inverse: Annotated[bool, typer.Option(help="Append 1 − RGB as three more channels (B-cos).")] = False,
    options: Annotated[str, typer.Option(help="JSON object of arguments of the factory.")] = "{}",
    replace: Annotated[bool, typer.Option(help="Replace a model of that name; its banks are refused then.")] = False,
    trust: Trust = None,
) -> None:
    """Bring a model into the repository: architecture by name, weights, class names, preprocessing."""
    with _plain_errors():
        height, width = _size(size)
        preprocessing = Preprocessing(
            height,
            width,
            resize,
            cast(Interpolation, interpolation),
            _triple("mean", mean),
            _triple("std", std),
            inverse,
        )
        spec = ModelSpec(name, architecture, preprocessing, _class_names(classes), "", _json_object(options))
        spec = _open(repository, trust).publish_model(spec, read_weights(weights), replace=replace)
        typer.echo(f"{spec.name} @ {spec.weights_digest[:12]}, {len(spec.class_names)} classes")


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
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)


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
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInput(f"--{name} {text!r} is not three numbers R,G,B") from error
    return red, green, blue


def _class_names(text: str) -> tuple[str, ...]:
    lines = Path(text).read_text().splitlines() if Path(text).is_file() else text.split(",")
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


_register()
