"""Options that several commands have, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence._cli.completion import bank_names, class_names
from whence._explanation import ConceptScope, Estimator, InputMethod, MapSize, Order, Priority

_BANK = "model/layer/name, or model/layer/name@digest."

Image = Annotated[Path, typer.Argument(help="An image file.")]
Bank = Annotated[str, typer.Option(help=_BANK, autocompletion=bank_names)]
BankArgument = Annotated[str, typer.Argument(help=_BANK, autocompletion=bank_names)]
Target = Annotated[
    str | None,
    typer.Option(
        help="Class to explain, by index or name; else the predicted.", show_default=False, autocompletion=class_names
    ),
]
TopK = Annotated[int, typer.Option(help="How many concepts to list.")]
By = Annotated[Order, typer.Option(help="What makes a concept first.")]
How = Annotated[Estimator, typer.Option(help="How contributions are computed.")]
Size = Annotated[MapSize, typer.Option(help="Size of the maps.")]
Substitute = Annotated[
    bool | None,
    typer.Option("--substitute/--no-substitute", help="Run the head on the reconstruction.", show_default=False),
]
InputMaps = Annotated[InputMethod, typer.Option(help="How input maps are computed.")]
Scope = Annotated[
    ConceptScope, typer.Option(help="Of the target's class, or of all classes (banks with concepts per class).")
]
Urgency = Annotated[Priority, typer.Option(help="Background requests wait for all interactive ones.")]
Save = Annotated[Path | None, typer.Option(help="Write a picture to this file.", show_default=False)]


def class_of(target: str | None) -> int | str | None:
    """A class by index, where it is a number, or by name."""
    return int(target) if target is not None and target.isdecimal() else target
