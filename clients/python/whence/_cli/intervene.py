"""One image: what the model would answer if concepts were weaker or stronger."""

from __future__ import annotations

from typing import Annotated

import typer

from whence._cli.completion import class_names
from whence._cli.connection import Connection, connecting
from whence._cli.options import Bank, Image, Scope, class_of
from whence._cli.printing import Json, print_json, print_table, say
from whence._errors import InvalidArgument
from whence._words import bank_version, intervention_lines, intervention_table


@connecting
def intervene(
    connection: Connection,
    image: Image,
    bank: Bank,
    scales: Annotated[
        list[str],
        typer.Option("--scale", metavar="ID=FACTOR", help="A concept and its factor: 0 removes; may be repeated."),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Class whose concepts are meant, by index or name; else the predicted.",
            show_default=False,
            autocompletion=class_names,
        ),
    ] = None,
    concepts: Scope = "target",
    json: Json = False,
) -> None:
    """Ask what the model would answer if chosen concepts were weaker or stronger."""
    with connection.client() as client:
        intervention = client.intervene(
            image, bank=bank, scales=_scales(scales), target=class_of(target), concepts=concepts
        )
    if json:
        print_json(intervention)
        return
    verdict, *_ = intervention_lines(intervention)
    say(verdict)
    say(f"what if, by {bank_version(intervention)}:")
    print_table(*intervention_table(intervention))


def _scales(pairs: list[str]) -> dict[int, float]:
    """Read ID=FACTOR."""
    scales: dict[int, float] = {}
    for pair in pairs:
        concept_id, _, factor = pair.partition("=")
        try:
            key, scale = int(concept_id), float(factor)
        except ValueError:
            raise InvalidArgument(f"--scale takes ID=FACTOR, as in 12=0 to remove concept 12; not {pair!r}.") from None
        if key in scales:
            raise InvalidArgument(f"--scale names concept {key} twice.")
        scales[key] = scale
    return scales
