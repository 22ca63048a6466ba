"""Concepts by words."""

from __future__ import annotations

from typing import Annotated

import typer

from whence import _search_words
from whence._cli.completion import bank_names, model_names
from whence._cli.connection import Connection, connecting
from whence._cli.printing import Json, print_json, print_table, say
from whence._search import SearchBy


@connecting
def search(
    connection: Connection,
    text: Annotated[str, typer.Argument(help="Words, a phrase or a sentence.")],
    by: Annotated[
        SearchBy, typer.Option(help="By what concepts look like, or by the words that they have.")
    ] = "meaning",
    model: Annotated[
        str | None, typer.Option(help="Only concepts of this model.", show_default=False, autocompletion=model_names)
    ] = None,
    bank: Annotated[
        str | None,
        typer.Option(
            help="Only of this bank: model/layer/name, or model/layer/name@digest.",
            show_default=False,
            autocompletion=bank_names,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many concepts to list.")] = 10,
    json: Json = False,
) -> None:
    """Find concepts by words."""
    with connection.client() as client:
        results = client.search(text, by, model=model, bank=bank, limit=limit)
    if json:
        print_json(results)
        return
    print_table(*_search_words.table(results))
    for line in _search_words.lines(results):
        say(line)
