"""The sub-commands of ``whence``: ask, then print a table or JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from whence import _contrast_words, _json, _labels, _search_words
from whence._channel import TLS
from whence._client import Client
from whence._contrast import Contrast
from whence._errors import InvalidArgument
from whence._explanation import ConceptScope, Estimator, Explanation, InputMethod, MapKind, MapSize, Order
from whence._inventory import Concept, Naming
from whence._search import SearchBy
from whence._words import all_lines, bank_version, class_name, explained_logit, intervention_lines, table

app = typer.Typer(
    help="Where a vision model's prediction came from, in concepts.",
    epilog=(
        "Exit codes: 0 done; 1 a fault; 2 wrong command line or request; 3 no such bank, model or concept; "
        "4 not now (unreachable, busy, over a limit, too slow); 5 not allowed; 6 not offered here."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


_Address = Annotated[str, typer.Option(envvar="WHENCE_ADDRESS", help="host:port of the service.")]
_Token = Annotated[str | None, typer.Option(envvar="WHENCE_TOKEN", help="Bearer token.", show_default=False)]
_Tls = Annotated[bool, typer.Option("--tls", help="Encrypt the connection.")]
_Authorities = Annotated[
    Path | None, typer.Option("--ca", envvar="WHENCE_CA", help="Authorities to trust (PEM); implies --tls.")
]
_Timeout = Annotated[float, typer.Option("--timeout", help="Seconds to wait, retries included.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
_LOCAL = "localhost:9000"


@app.command()
def explain(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    bank: Annotated[str, typer.Option(help="model/layer/name, or model/layer/name@digest.")],
    target: Annotated[
        str | None, typer.Option(help="Class to explain, by index or name; else the predicted.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many concepts to list.")] = 10,
    order: Annotated[Order, typer.Option(help="What makes a concept first.")] = "contribution",
    estimator: Annotated[Estimator, typer.Option(help="How contributions are computed.")] = "gradient",
    maps: Annotated[
        list[str] | None,
        typer.Option(
            help="activation, contribution or input; may be repeated. Drawn by --save, printed by --json.",
            show_default=False,
        ),
    ] = None,
    map_size: Annotated[MapSize, typer.Option(help="Size of the maps.")] = "grid",
    substitute: Annotated[
        bool | None,
        typer.Option("--substitute/--no-substitute", help="Run the head on the reconstruction.", show_default=False),
    ] = None,
    colours: Annotated[
        bool, typer.Option("--colours", help="Render input maps in the colours that concepts looked for, too.")
    ] = False,
    parts: Annotated[bool, typer.Option("--parts", help="Show the parts of each concept, too.")] = False,
    input_method: Annotated[InputMethod, typer.Option(help="How input maps are computed.")] = "gradient",
    concepts: Annotated[
        ConceptScope, typer.Option(help="Of the target's class, or of all classes (banks with concepts per class).")
    ] = "target",
    save: Annotated[Path | None, typer.Option(help="Write a picture to this file.", show_default=False)] = None,
    address: _Address = _LOCAL,
    token: _Token = None,
    tls: _Tls = False,
    ca: _Authorities = None,
    timeout: _Timeout = 30.0,
    json: _Json = False,
) -> None:
    """Explain one image."""
    kinds = maps or (["activation"] if save else [])
    with _client(address, token, tls, ca, timeout) as client:
        explanation = client.explain(
            image,
            bank=bank,
            target=_class(target),
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
        )
    if save is not None:
        _write(lambda: explanation.save(save), save)
    if json:
        typer.echo(_json.dumps(explanation))
    else:
        _print_explanation(explanation)


@app.command()
def contrast(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    bank: Annotated[str, typer.Option(help="A bank of kind contrast: model/layer/name, or model/layer/name@digest.")],
    classes: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="I J", help="Why class I and not J, by index or name.", show_default=False),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Class I alone, by index or name; else the predicted.", show_default=False)
    ] = None,
    other: Annotated[
        str | None, typer.Option(help="Class J alone, by index or name; else the runner-up.", show_default=False)
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
    map_size: Annotated[MapSize, typer.Option(help="Size of the maps.")] = "grid",
    shift: Annotated[
        bool, typer.Option("--shift/--no-shift", help="Look for the shift at which the image turns into class J.")
    ] = True,
    save: Annotated[Path | None, typer.Option(help="Write a picture to this file.", show_default=False)] = None,
    address: _Address = _LOCAL,
    token: _Token = None,
    tls: _Tls = False,
    ca: _Authorities = None,
    timeout: _Timeout = 30.0,
    json: _Json = False,
) -> None:
    """Ask why one class and not another."""
    if classes is not None:
        if target is not None or other is not None:
            raise InvalidArgument("--classes names both classes: leave --target and --other out.")
        target, other = classes
    kinds = maps or (["activation", "contribution"] if save else [])
    with _client(address, token, tls, ca, timeout) as client:
        answer = client.contrast(
            image,
            _class(target),
            _class(other),
            bank=bank,
            top_k=top_k,
            order=order,
            maps=cast("list[MapKind]", kinds),  # the client checks them
            map_size=map_size,
            shift=shift,
        )
    if save is not None:
        _write(lambda: answer.save(save), save)
    if json:
        typer.echo(_json.dumps(answer))
    else:
        _print_contrast(answer)


@app.command()
def intervene(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    bank: Annotated[str, typer.Option(help="model/layer/name, or model/layer/name@digest.")],
    scales: Annotated[
        list[str],
        typer.Option("--scale", metavar="ID=FACTOR", help="A concept and its factor: 0 removes; may be repeated."),
    ],
    target: Annotated[
        str | None,
        typer.Option(help="Class whose concepts are meant, by index or name; else the predicted.", show_default=False),
    ] = None,
    concepts: Annotated[
        ConceptScope, typer.Option(help="Of the target's class, or of all classes (banks with concepts per class).")
    ] = "target",
    address: _Address = _LOCAL,
    token: _Token = None,
    tls: _Tls = False,
    ca: _Authorities = None,
    timeout: _Timeout = 30.0,
    json: _Json = False,
) -> None:
    """Ask what the model would answer if chosen concepts were weaker or stronger."""
    with _client(address, token, tls, ca, timeout) as client:
        intervention = client.intervene(
            image, bank=bank, scales=_scales(scales), target=_class(target), concepts=concepts
        )
    if json:
        typer.echo(_json.dumps(intervention))
        return
    verdict, *_ = intervention_lines(intervention)
    _say(verdict)
    after = {score.index: score for score in intervention.after}
    _print_table(
        ("class", "before", "after", "logit before", "logit after"),
        [
            (
                class_name(was),
                f"{was.probability:.1%}",
                f"{after[was.index].probability:.1%}",
                f"{was.logit:.4g}",
                f"{after[was.index].logit:.4g}",
            )
            for was in intervention.before
        ],
        title=f"what if, by {bank_version(intervention)}",
    )


@app.command()
def models(
    address: _Address = _LOCAL,
    token: _Token = None,
    tls: _Tls = False,
    ca: _Authorities = None,
    timeout: _Timeout = 30.0,
    json: _Json = False,
) -> None:
    """List the models that the service explains."""
    with _client(address, token, tls, ca, timeout) as client:
        records = client.models()
    if json:
        typer.echo(_json.dumps(records))
        return
    _print_table(
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


@app.command()
def banks(
    model: Annotated[str | None, typer.Option(help="Only banks of this model.", show_default=False)] = None,
    address: _Address = _LOCAL,
    token: _Token = None,
    tls: _Tls = False,
    ca: _Authorities = None,
    timeout: _Timeout = 30.0,
    json: _Json = False,
) -> None:
    """List the banks that the service holds."""
    with _client(address, token, tls, ca, timeout) as client:
        records = client.banks(model)
    if json:
        typer.echo(_json.dumps(records))
        return
    _print_table(
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


@app.command()
def concept(
    bank: Annotated[str, typer.Argument(help="model/layer/name, or model/layer/name@digest.")],
    concept_id: Annotated[int, typer.Argument(help="Id of the concept.", metavar="ID")],
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture of the exemplars and those of its parts (FILE.png), or exemplars and counterfactuals "
            "into a folder.",
            show_default=False,
        ),
    ] = None,
    address: _Address = _LOCAL,
    token: _Token = None,
    tls: _Tls = False,
    ca: _Authorities = None,
    timeout: _Timeout = 30.0,
    json: _Json = False,
) -> None:
    """Show one concept of a bank: names, statistics, exemplars, counterfactuals and parts."""
    with _client(address, token, tls, ca, timeout) as client:
        record = client.concept(bank, concept_id)
        parts = [client.concept(bank, child) for child in record.children]
    if save is not None:
        _write(lambda: record.save(save, parts) if save.suffix else _save_exemplars(record, save), save)
    if json:
        typer.echo(_json.dumps(record))
        return
    _say(f"{_labels.shown(record) or 'concept'} #{record.id} of {record.bank}@{record.bank_digest[:12]}")
    if record.parent is not None:
        _say(f"part of concept #{record.parent}, at {record.layer}")
    if record.class_index is not None:
        _say(f"class {_search_words.class_of(record)}")
    if record.naming is not None:
        _print_naming(record, record.naming)
    _print_table(("statistic", "value"), [(name, f"{value:.4g}") for name, value in sorted(record.statistics.items())])
    for what, crops in (("exemplar", record.exemplars), ("counterfactual", record.counterfactuals)):
        if crops or what == "exemplar":
            _print_table((what, "activation"), [(item.source, f"{item.activation:.4g}") for item in crops])
    if parts:
        names = sorted({name for part in parts for name in part.statistics})
        _print_table(
            ("part", "id", "layer", *names),
            [
                (_labels.shown(part), part.id, part.layer, *(_cell(part.statistics.get(name)) for name in names))
                for part in parts
            ],
        )


@app.command()
def search(
    text: Annotated[str, typer.Argument(help="Words, a phrase or a sentence.")],
    by: Annotated[
        SearchBy, typer.Option(help="By what concepts look like, or by the words that they have.")
    ] = "meaning",
    model: Annotated[str | None, typer.Option(help="Only concepts of this model.", show_default=False)] = None,
    bank: Annotated[
        str | None,
        typer.Option(help="Only of this bank: model/layer/name, or model/layer/name@digest.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many concepts to list.")] = 10,
    address: _Address = _LOCAL,
    token: _Token = None,
    tls: _Tls = False,
    ca: _Authorities = None,
    timeout: _Timeout = 30.0,
    json: _Json = False,
) -> None:
    """Find concepts by words."""
    with _client(address, token, tls, ca, timeout) as client:
        results = client.search(text, by, model=model, bank=bank, limit=limit)
    if json:
        typer.echo(_json.dumps(results))
        return
    _print_table(*_search_words.table(results))
    for line in _search_words.lines(results):
        _say(line)


def _client(address: str, token: str | None, tls: bool, ca: Path | None, timeout_s: float) -> Client:
    return Client(address, token=token, tls=TLS(authorities=ca) if ca else tls, timeout_s=timeout_s)


def _class(target: str | None) -> int | str | None:
    """A class by index, where it is a number, or by name."""
    return int(target) if target is not None and target.isdecimal() else target


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


def _write(action: Callable[[], None], path: Path) -> None:
    """Do something that writes a file; what the system refuses is the caller's to mend."""
    try:
        action()
    except OSError as exc:
        raise InvalidArgument(f"Cannot write {path}: {exc.strerror or exc}.", reason="UNWRITABLE_FILE") from exc


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
    _say(f"named by a person; a machine found {found}" if record.named_by_person else f"named by a machine: {found}")
    words = [("word", word) for word in naming.words] + [("phrase", phrase) for phrase in naming.phrases]
    _print_table(("words", "kind", "score"), [(word.text, kind, f"{word.score:.3f}") for kind, word in words])


def _print_explanation(explanation: Explanation) -> None:
    for score in explanation.predictions:
        _say(f"{score.probability:7.1%}  {score.name or score.index}")
    target = explanation.target
    _say(f"why {target.name or target.index}: {explained_logit(explanation)}, by {bank_version(explanation)}")
    _print_table(*table(explanation))
    for line in all_lines(explanation):
        _say(line)


def _print_contrast(answer: Contrast) -> None:
    _say(f"why {_contrast_words.title(answer)}, by {bank_version(answer)}")
    sides = ((answer.target, answer.contribution_for_target), (answer.other, answer.contribution_for_other))
    _print_table(
        ("class", "probability", "logit", "evidence"),
        [(class_name(c), f"{c.probability:.1%}", f"{c.logit:.4g}", f"{evidence:+.4g}") for c, evidence in sides],
    )
    if answer.concepts:
        _print_table(*_contrast_words.table(answer))
    for line in _contrast_words.lines(answer):
        _say(line)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _print_table(heads: tuple[str, ...], rows: Sequence[tuple[Any, ...]], title: str = "") -> None:
    """A table; cells are plain text, whatever brackets a label may hold."""
    table = Table(title=Text(title) if title else None, title_justify="left")
    for place, head in enumerate(heads):
        numeric = all(_is_number(row[place]) for row in rows)
        table.add_column(head, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)


def _is_number(cell: object) -> bool:
    return re.fullmatch(r"[+-]?[\d.]*(e[+-]?\d+)?%?", str(cell)) is not None


def _say(line: str) -> None:
    Console().print(Text(line), soft_wrap=True)
