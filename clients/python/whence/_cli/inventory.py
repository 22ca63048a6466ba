"""What the service holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence import _labels, _search_words
from whence._cli.completion import model_names
from whence._cli.connection import Connection, connecting
from whence._cli.options import BankArgument
from whence._cli.printing import Json, number, print_json, print_table, say, write
from whence._inventory import Concept, Naming


@connecting
def info(connection: Connection, json: Json = False) -> None:
    """Show the service's version and limits."""
    with connection.client() as client:
        record = client.server_info()
    if json:
        print_json(record)
        return
    limits = record.limits
    say(f"version {record.version}, contract revision {record.contract_revision}")
    print_table(
        ("limit", "value"),
        [
            ("largest request", f"{limits.request_bytes:,} bytes"),
            ("largest answer", f"{limits.reply_bytes:,} bytes"),
            ("largest image", f"{limits.pixels:,} pixels"),
            ("encodings of images", ", ".join(limits.image_formats)),
            ("concepts in one answer", limits.top_k),
            ("concepts scaled in one intervention", limits.scales),
            ("images of one stream worked on at a time", limits.stream_in_flight),
            ("longest that an answer may take", f"{limits.deadline_s:g} s"),
            ("how long it may take where nothing is said", f"{limits.default_deadline_s:g} s"),
        ],
    )


@connecting
def models(
    connection: Connection,
    json: Json = False,
) -> None:
    """List the models that the service explains."""
    with connection.client() as client:
        records = client.models()
    if json:
        print_json(records)
        return
    print_table(
        ("model", "architecture", "input", "classes", "digest"),
        [
            (
                record.name,
                record.architecture,
                f"{record.input_height}×{record.input_width}",
                len(record.class_names),
                record.digest[:12],
            )
            for record in records
        ],
    )


@connecting
def banks(
    connection: Connection,
    model: Annotated[
        str | None, typer.Option(help="Only banks of this model.", show_default=False, autocompletion=model_names)
    ] = None,
    json: Json = False,
) -> None:
    """List the banks that the service holds."""
    with connection.client() as client:
        records = client.banks(model)
    if json:
        print_json(records)
        return
    print_table(
        ("bank", "kind", "concepts", "parts", "created", "digest"),
        [
            (
                record.reference,
                record.kind,
                record.concept_count,
                f"{record.part_count} at {record.parts_layer}" if record.parts_layer else "",
                record.created,
                record.digest[:12],
            )
            for record in records
        ],
    )


@connecting
def concept(
    connection: Connection,
    bank: BankArgument,
    concept_id: Annotated[int, typer.Argument(help="Id of the concept.", metavar="ID")],
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture of the exemplars and those of its parts (FILE.png), or exemplars and counterfactuals "
            "into a folder.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show one concept of a bank: names, statistics, exemplars, counterfactuals and parts."""
    with connection.client() as client:
        record = client.concept(bank, concept_id)
        parts = [client.concept(bank, child) for child in record.children]
    if save is not None:
        write(lambda: record.save(save, parts) if save.suffix else _save_exemplars(record, save), save)
    if json:
        print_json(record)
        return
    say(f"{_labels.shown(record) or 'concept'} #{record.id} of {record.bank}@{record.bank_digest[:12]}")
    if record.parent is not None:
        say(f"part of concept #{record.parent}, at {record.layer}")
    if record.class_index is not None:
        say(f"class {_search_words.class_of(record)}")
    if record.naming is not None:
        _print_naming(record, record.naming)
    print_table(("statistic", "value"), [(name, f"{value:.4g}") for name, value in sorted(record.statistics.items())])
    for what, crops in (("exemplar", record.exemplars), ("counterfactual", record.counterfactuals)):
        if crops or what == "exemplar":
            print_table((what, "activation"), [(item.source, f"{item.activation:.4g}") for item in crops])
    if parts:
        names = sorted({name for part in parts for name in part.statistics})
        print_table(
            ("part", "id", "layer", *names),
            [
                (_labels.shown(part), part.id, part.layer, *(number(part.statistics.get(name)) for name in names))
                for part in parts
            ],
        )


def _save_exemplars(record: Concept, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, crops in (("", record.exemplars), ("-counterfactual", record.counterfactuals)):
        for place, crop in enumerate(crops):
            (folder / f"{record.id}-{place:03d}{suffix}.webp").write_bytes(crop.picture)


def _print_naming(record: Concept, naming: Naming) -> None:
    """Say who named a concept, and what the machine found."""
    weak = ", which is weak" if naming.weak else ""
    crops = "1 counterfactual" if naming.counterfactuals == 1 else f"{naming.counterfactuals} counterfactuals"
    found = f"“{naming.label}” with a score of {naming.score:.2f}{weak}, compared with {crops}"
    say(f"named by a person; a machine found {found}" if record.named_by_person else f"named by a machine: {found}")
    words = [("word", word) for word in naming.words] + [("phrase", phrase) for phrase in naming.phrases]
    print_table(("words", "kind", "score"), [(word.text, kind, f"{word.score:.3f}") for kind, word in words])
