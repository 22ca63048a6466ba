"""The ``whence-bank`` command: add models, learn banks, measure them, look after the repository."""

from __future__ import annotations

import typer

from offline.cli import banks, contrast, judging, models, naming, training, vocabulary

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for part in (models, training, judging, contrast, naming, banks, vocabulary):
    app.add_typer(part.app)
