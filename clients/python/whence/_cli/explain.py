"""One image: where its prediction came from."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from whence._cli.connection import Connection, connecting
from whence._cli.options import (
    Bank,
    By,
    How,
    Image,
    InputMaps,
    Save,
    Scope,
    Size,
    Substitute,
    Target,
    TopK,
    Urgency,
    class_of,
)
from whence._cli.printing import Json, print_json, print_table, say, write
from whence._explanation import Explanation, MapKind
from whence._words import all_lines, bank_version, explained_logit, table


@connecting
def explain(
    connection: Connection,
    image: Image,
    bank: Bank,
    target: Target = None,
    top_k: TopK = 10,
    order: By = "contribution",
    estimator: How = "gradient",
    maps: Annotated[
        list[str] | None,
        typer.Option(
            help="activation, contribution or input; may be repeated. Drawn by --save, printed by --json.",
            show_default=False,
        ),
    ] = None,
    map_size: Size = "grid",
    substitute: Substitute = None,
    colours: Annotated[
        bool, typer.Option("--colours", help="Render input maps in the colours that concepts looked for, too.")
    ] = False,
    parts: Annotated[bool, typer.Option("--parts", help="Show the parts of each concept, too.")] = False,
    input_method: InputMaps = "gradient",
    concepts: Scope = "target",
    priority: Urgency = "interactive",
    save: Save = None,
    json: Json = False,
) -> None:
    """Explain one image."""
    kinds = maps or (["activation"] if save else [])
    with connection.client() as client:
        explanation = client.explain(
            image,
            bank=bank,
            target=class_of(target),
            top_k=top_k,
            order=order,
            estimator=estimator,
            maps=cast("list[MapKind]", kinds),  # the client checks them
            map_size=map_size,
            substitute=substitute,
            colours=colours,
            parts=parts,
            input_method=input_method,
            concepts=concepts,
            priority=priority,
        )
    if save is not None:
        write(lambda: explanation.save(save), save)
    if json:
        print_json(explanation)
    else:
        _print_explanation(explanation)


def _print_explanation(explanation: Explanation) -> None:
    for score in explanation.predictions:
        say(f"{score.probability:7.1%}  {score.name or score.index}")
    target = explanation.target
    say(f"why {target.name or target.index}: {explained_logit(explanation)}, by {bank_version(explanation)}")
    print_table(*table(explanation))
    for line in all_lines(explanation):
        say(line)
