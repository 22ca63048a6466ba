"""One image: why one class and not another."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from whence import _contrast_words
from whence._cli.completion import bank_names, class_names
from whence._cli.connection import Connection, connecting
from whence._cli.options import Image, Save, Size, class_of
from whence._cli.printing import Json, print_json, print_table, say, write
from whence._contrast import Contrast
from whence._errors import InvalidArgument
from whence._explanation import MapKind, Order
from whence._words import bank_version, class_name


@connecting
def contrast(
    connection: Connection,
    image: Image,
    bank: Annotated[
        str,
        typer.Option(
            help="A bank of kind contrast: model/layer/name, or model/layer/name@digest.", autocompletion=bank_names
        ),
    ],
    classes: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="I J",
            help="Why class I and not J, by index or name.",
            show_default=False,
            autocompletion=class_names,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Class I alone, by index or name; else the predicted.", show_default=False, autocompletion=class_names
        ),
    ] = None,
    other: Annotated[
        str | None,
        typer.Option(
            help="Class J alone, by index or name; else the runner-up.", show_default=False, autocompletion=class_names
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many prototypes to list.")] = 10,
    order: Annotated[Order, typer.Option(help="What makes a prototype first.")] = "contribution",
    maps: Annotated[
        list[str] | None,
        typer.Option(
            help="activation (signed distance) or contribution; may be repeated. Drawn by --save, printed by --json.",
            show_default=False,
        ),
    ] = None,
    map_size: Size = "grid",
    shift: Annotated[
        bool, typer.Option("--shift/--no-shift", help="Look for the shift at which the image turns into class J.")
    ] = True,
    save: Save = None,
    json: Json = False,
) -> None:
    """Ask why one class and not another."""
    if classes is not None:
        if target is not None or other is not None:
            raise InvalidArgument("--classes names both classes: leave --target and --other out.")
        target, other = classes
    kinds = maps or (["activation", "contribution"] if save else [])
    with connection.client() as client:
        answer = client.contrast(
            image,
            class_of(target),
            class_of(other),
            bank=bank,
            top_k=top_k,
            order=order,
            maps=cast("list[MapKind]", kinds),  # the client checks them
            map_size=map_size,
            shift=shift,
        )
    if save is not None:
        write(lambda: answer.save(save), save)
    if json:
        print_json(answer)
    else:
        _print_contrast(answer)


def _print_contrast(answer: Contrast) -> None:
    say(f"why {_contrast_words.title(answer)}, by {bank_version(answer)}")
    sides = ((answer.target, answer.contribution_for_target), (answer.other, answer.contribution_for_other))
    print_table(
        ("class", "probability", "logit", "evidence"),
        [(class_name(c), f"{c.probability:.1%}", f"{c.logit:.4g}", f"{evidence:+.4g}") for c, evidence in sides],
    )
    if answer.concepts:
        print_table(*_contrast_words.table(answer))
    for line in _contrast_words.lines(answer):
        say(line)
