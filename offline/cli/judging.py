"""Commands that measure banks and compare them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from concepts.errors import InvalidInput
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
from offline.compare import compare_on, compare_stored
from offline.evaluate import EvaluationSettings, evaluate_bank
from offline.options import option_of

app = typer.Typer()

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of a table.")]


def _add_evaluate() -> None:
    """Make the command whose options are the fields of the settings."""
    fields = {name: option_of(name, info) for name, info in EvaluationSettings.model_fields.items()}

    def command(bank: str, repository: str, trust: list[str] | None, as_json: bool, **values: Any) -> None:
        with plain_errors():
            settings = EvaluationSettings(**{name: fields[name].read(value) for name, value in values.items()})
            with Bars() as bars:
                found = evaluate_bank(open_repository(repository, trust), bank, settings, bars)
            if as_json:
                typer.echo(json.dumps(found.to_json()))
            else:
                print_table(tables.evaluated(found))
                if "classes" in found.metrics:
                    print_table(tables.evaluated_classes(found))
            for name in found.unseen:
                typer.echo(f"no image is predicted as {name}, a class of the bank: nothing is said of it", err=True)
            tell_skipped(found.skipped_images)

    own = {
        "bank": (Annotated[str, typer.Argument(help="model/layer/name, or model/layer/name@digest.")], REQUIRED),
        "repository": (Root, REQUIRED),
        "trust": (Trust, None),
        "as_json": (_AsJson, False),
    }
    take(command, own, fields)
    app.command("evaluate", help="Measure a bank on any images.")(command)


def _add_compare() -> None:
    """Make the command whose options are the fields that can be the same for all banks; images need not be given."""
    infos = {n: info for n, info in EvaluationSettings.model_fields.items() if n not in ("images", "held_out_alone")}
    fields = {name: option_of(name, info) for name, info in infos.items()}

    def command(
        banks: list[str], repository: str, images: str | None, trust: list[str] | None, as_json: bool, **values: Any
    ) -> None:
        with plain_errors():
            files = open_repository(repository, trust)
            given = {name: fields[name].read(value) for name, value in values.items()}
            idle = [name for name, info in infos.items() if given[name] != info.default]
            if images is not None:
                settings = EvaluationSettings(images=images, **given)
                with Bars() as bars:
                    found = compare_on(files, banks, settings, bars)
            elif idle:
                raise InvalidInput(f"--{idle[0].replace('_', '-')} says how to measure, which needs --images")
            else:
                found = compare_stored(files, banks)
            if as_json:
                typer.echo(json.dumps(found.to_json()))
            else:
                print_table(tables.compared(found), whole=True)

    own = {
        "banks": (Annotated[list[str], typer.Argument(help="model/layer/name, or model/layer/name@digest.")], REQUIRED),
        "repository": (Root, REQUIRED),
        "images": (
            Annotated[str | None, typer.Option(help="Folder of images to measure all banks on, as `evaluate` does.")],
            None,
        ),
        "trust": (Trust, None),
        "as_json": (_AsJson, False),
    }
    take(command, own, fields)
    app.command("compare", help="Show banks side by side, by the metrics that all of them have.")(command)


_add_evaluate()
_add_compare()
