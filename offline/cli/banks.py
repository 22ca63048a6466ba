"""Commands that look after banks: list, show, verify, roll back."""

from __future__ import annotations

import typer

from concepts.errors import CorruptData
from offline import tables
from offline.cli.common import Root, open_repository, plain_errors, print_table

app = typer.Typer()


@app.command("list")
def list_banks(repository: Root) -> None:
    """List the banks that are served."""
    with plain_errors():
        files = open_repository(repository)
        found, damaged = [], []
        for version in files.banks():
            try:
                found.append(files.summary(version))
            except CorruptData as error:
                damaged.append(f"damaged: {version.reference}: {error.message}")
        print_table(tables.banks(found))
        typer.echo("".join(f"{line}\n" for line in damaged), err=True, nl=False)


@app.command("show")
def show_bank(reference: str, repository: Root) -> None:
    """Show a bank's configuration, metrics and concepts."""
    with plain_errors():
        files = open_repository(repository)
        version = files.resolve(reference)
        bank = files.load(version)
        print_table(tables.facts(bank, files.summary(version).published))
        print_table(tables.concepts(bank, files.model_spec(bank.model).class_names))


@app.command("verify")
def verify_bank(reference: str, repository: Root) -> None:
    """Check every byte of a bank, and that its model has the weights it was trained on."""
    with plain_errors():
        files = open_repository(repository)
        bank = files.load(files.resolve(reference))
        typer.echo(f"{bank.reference} @ {bank.digest}: {len(bank.files) + 1} files, all as published")


@app.command("rollback")
def roll_back(reference: str, digest: str, repository: Root) -> None:
    """Serve an older version of a bank again."""
    with plain_errors():
        version = open_repository(repository).roll_back(f"{reference.partition('@')[0]}@{digest}")
        typer.echo(f"{version.reference} @ {version.digest} is served")
