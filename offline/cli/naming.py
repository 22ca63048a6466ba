"""Commands that name concepts."""

from __future__ import annotations

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
from offline.naming.label import LabelConfig, label, rename
from offline.options import option_of

app = typer.Typer()

_REFERENCE = "model/layer/name, or model/layer/name@digest."
Reference = Annotated[str, typer.Argument(help=_REFERENCE)]
References = Annotated[list[str], typer.Argument(metavar="BANK...", help=_REFERENCE)]


def _add_label() -> None:
    """Make the command whose options are the fields of the configuration."""
    fields = {name: option_of(name, info) for name, info in LabelConfig.model_fields.items()}

    def command(banks: list[str], repository: str, trust: list[str] | None, **values: Any) -> None:
        with plain_errors():
            config = LabelConfig(**{name: fields[name].read(value) for name, value in values.items()})
            for bank in banks:
                with Bars() as bars:
                    done = label(open_repository(repository, trust), bank, config, bars)
                print_table(tables.named(done.bank))
                tell_skipped(done.skipped_images)

    own = {"banks": (References, REQUIRED), "repository": (Root, REQUIRED), "trust": (Trust, None)}
    take(command, own, fields)
    app.command("label", help="Name the concepts of banks by a CLIP, and serve that as new versions.")(command)


_add_label()


@app.command("rename")
def rename_concept(
    bank: Reference,
    concept: Annotated[int, typer.Argument(help="Id of the concept.")],
    repository: Root,
    label: Annotated[str | None, typer.Argument(help="What to call it.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Go back to the machine's label.")] = False,
    trust: Trust = None,
) -> None:
    """Give a concept a label of your own, and serve that as a new version of the bank."""
    with plain_errors():
        if (label is None) != clear:
            raise InvalidInput("give a label, or --clear to go back to the machine's")
        renamed = rename(open_repository(repository, trust), bank, concept, label)
        shown = renamed.concept(concept).label or "nothing"
        typer.echo(f"concept {concept} of {renamed.reference}@{renamed.digest[:12]} is called {shown}")
