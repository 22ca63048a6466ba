"""Commands that learn banks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from concepts import devices
from offline import tables
from offline.cli.common import (
    REQUIRED,
    Bars,
    Root,
    Trust,
    open_repository,
    plain_errors,
    print_table,
    take,
    tell_skipped,
)
from offline.images import open_folder
from offline.options import option_of
from offline.store.harvest import harvest
from offline.store.settings import HarvestSettings
from offline.trainers import Trainer, trainers

app = typer.Typer()
train_app = typer.Typer(no_args_is_help=True, help="Learn a bank from images and publish it.")
app.add_typer(train_app, name="train")


def _add_trainer(trainer: Trainer) -> None:
    """Make a sub-command whose options are the fields of the trainer's configuration."""
    fields = {name: option_of(name, info) for name, info in trainer.config.model_fields.items()}

    def command(**values: Any) -> None:
        root, trust = values.pop("repository"), values.pop("trust")
        with plain_errors():
            config = trainer.config(**{name: fields[name].read(value) for name, value in values.items()})
            repository = open_repository(root, trust)
            with Bars() as bars:
                result = trainer.train(repository, config, bars)
            print_table(tables.outcome(result, repository.model_spec(config.model).class_names))
            tell_skipped(result.skipped_images)

    take(command, {"repository": (Root, REQUIRED), "trust": (Trust, None)}, fields)
    train_app.command(trainer.name, help=trainer.summary)(command)


def _add_harvest() -> None:
    """Make the sub-command whose options are the fields of a harvest's settings."""
    fields = {name: option_of(name, info) for name, info in HarvestSettings.model_fields.items()}

    def command(
        model: str, repository: str, layer: str, images: str, store: Path, device: str, trust: list[str] | None,
        **values: Any,
    ) -> None:  # fmt: skip
        with plain_errors():
            settings = HarvestSettings(**{name: fields[name].read(value) for name, value in values.items()})
            loaded = open_repository(repository, trust).load_model(model, devices.choose(device))
            with Bars() as bars:
                found = harvest(loaded, loaded.cut(layer), open_folder(images), store, settings, bars)
            print_table(tables.store(found))
            tell_skipped(found.skipped)

    own = {
        "model": (Annotated[str, typer.Argument(help="Name of the model in the repository.")], REQUIRED),
        "repository": (Root, REQUIRED),
        "layer": (Annotated[str, typer.Option(help="Layer to harvest; see `whence-bank layers`.")], REQUIRED),
        "images": (
            Annotated[str, typer.Option(help="Folder of images; also s3://bucket/… or gs://bucket/….")],
            REQUIRED,
        ),
        "store": (Annotated[Path, typer.Option(help="Folder for the vectors; work that stopped goes on.")], REQUIRED),
        "device": (Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")], "auto"),
        "trust": (Trust, None),
    }
    take(command, own, fields)
    app.command("harvest", help="Store activation vectors of a layer, to train on them more than once.")(command)


def _register() -> None:
    for trainer in trainers():
        _add_trainer(trainer)
    _add_harvest()


_register()
