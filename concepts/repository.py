"""The repository: models and banks under one root, every byte checked (design section 5).

::

    models/<model>/model.json, weights-<digest>.safetensors, model-<digest>.onnx
    banks/<model>/<layer>/<name>/<digest>/bank.json, tensors.safetensors, concepts.jsonl, exemplars/*.webp
    banks/<model>/<layer>/<name>/CURRENT
    clips/<digest>/clip.json, weights.safetensors, merges.txt.gz

Weights and ONNX files carry their digest in their name, so that replacing a model is one atomic write of
``model.json``. A bank's ``bank.json`` is written after everything it names, and ``CURRENT`` after that: a crash at any
instant leaves the old bank served and nothing half-visible.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from concepts import bank as bank_files
from concepts import kinds
from concepts import model as models
from concepts.architectures import TRUSTED_PACKAGES
from concepts.bank import Bank, Exemplar
from concepts.errors import (
    AlreadyExists,
    CorruptData,
    InvalidInput,
    InvalidModel,
    UnknownBank,
    UnknownModel,
    WeightsMismatch,
)
from concepts.model import ONNX, Exported, Model, ModelSpec, check_name
from concepts.storage import LocalStorage

if TYPE_CHECKING:
    from concepts.clip import Clip

_DIGEST = re.compile("[0-9a-f]{64}")


class BankVersion(NamedTuple):
    """One version of a bank."""

    model: str
    layer: str
    name: str
    digest: str

    @property
    def reference(self) -> str:
        """``model/layer/name``."""
        return f"{self.model}/{self.layer}/{self.name}"


@dataclass(frozen=True)
class BankSummary:
    """What can be said of a bank without loading it."""

    version: BankVersion
    manifest: Mapping[str, Any]
    """``bank.json``."""
    published: float
    """Seconds since the epoch."""


class Repository:
    """Models and banks under one root.

    Parameters
    ----------
    root
        A folder; made when something is first published.
    trusted
        Packages whose factories a stored model may name; see ``architectures.build``.
    """

    def __init__(self, root: str | Path, trusted: Sequence[str] = TRUSTED_PACKAGES) -> None:
        self.root = Path(root)
        self._files = LocalStorage(root)
        self._trusted = tuple(trusted)

    # Models

    def models(self) -> list[str]:
        """Return the names of the models, sorted."""
        return [name for name in self._files.folders("models") if self._files.exists(f"models/{name}/model.json")]

    def model_spec(self, name: str) -> ModelSpec:
        """Return a model's description.

        Raises
        ------
        UnknownModel
            If there is none of that name.
        CorruptData
            If it cannot be read.
        """
        check_name("model", name)
        try:
            content = self._files.read(f"models/{name}/model.json")
        except FileNotFoundError as error:
            raise UnknownModel(
                f"there is no model {name!r}; models: {', '.join(self.models()) or 'none'}", model=name
            ) from error
        try:
            value = json.loads(content)
            intact = _model_json(value) == content
        except (ValueError, AttributeError) as error:
            raise CorruptData(f"model.json of model {name!r} is not JSON", model=name, file="model.json") from error
        if not intact:
            raise CorruptData(
                f"model.json of model {name!r} is not what was published: publish it anew, replacing it",
                model=name,
                file="model.json",
            )
        return ModelSpec.from_json(value)

    def publish_model(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor] | bytes,
        *,
        exported: tuple[bytes, Mapping[str, str]] | None = None,
        replace: bool = False,
    ) -> ModelSpec:
        """Store a model; publishing the same one again changes nothing.

        Parameters
        ----------
        spec
            Its description; digests are computed here.
        weights
            State dictionary, or the ONNX file of a model of architecture ``onnx``. The model is built and tried first.
        exported
            The ONNX file that was made of it, with the values of its layers.
        replace
            Allow other weights or another description under a name that is taken.

        Returns
        -------
        ModelSpec
            With the digest.

        Raises
        ------
        AlreadyExists
            If the name is taken by another model.
        InvalidModel
            If the weights do not fit, or the model does not answer with one logit a class.
        """
        content = weights if isinstance(weights, bytes) else _safetensors(weights)
        files = {_weights_file(spec.architecture, _sha256(content)): content}
        spec = dataclasses.replace(spec, weights_digest=_sha256(content), exported=None)
        if exported is not None:
            spec = dataclasses.replace(spec, exported=Exported(_sha256(exported[0]), dict(exported[1])))
            files[f"model-{_sha256(exported[0])}.onnx"] = exported[0]
        if spec.name in self.models() and not replace:
            present = self.model_spec(spec.name)
            if present not in (spec, dataclasses.replace(spec, exported=None)):  # an export may be added
                raise AlreadyExists(
                    f"model {spec.name!r} exists with another description or other weights "
                    f"({present.weights_digest[:12]}, not {spec.weights_digest[:12]}); "
                    "choose another name or replace it",
                    model=spec.name,
                )
        self._build(spec, content, "cpu").check()
        for file, bytes_ in files.items():
            self._files.write(f"models/{spec.name}/{file}", bytes_)
        self._files.write(f"models/{spec.name}/model.json", _model_json(spec.to_json()))
        return spec

    def load_model(self, name: str, device: torch.device | str = "cpu") -> Model:
        """Load a model, its weights checked.

        Raises
        ------
        UnknownModel, CorruptData, InvalidModel
            If there is none, a byte of its weights changed, or it cannot be built.
        """
        spec = self.model_spec(name)
        return self._build(spec, self._model_file(name, _weights_file(spec.architecture, spec.weights_digest)), device)

    def _build(self, spec: ModelSpec, content: bytes, device: torch.device | str) -> Model:
        if spec.architecture == ONNX:
            file = _weights_file(spec.architecture, spec.weights_digest)
            return models.build_onnx(spec, content, device, lambda: self._model_file(spec.name, file))
        try:
            weights = safetensors.torch.load(content)
        except SafetensorError as error:
            raise CorruptData(
                f"the weights of model {spec.name!r} are not in safetensors format", model=spec.name
            ) from error
        exported = spec.exported
        read = None if exported is None else lambda: self._model_file(spec.name, f"model-{exported.digest}.onnx")
        return models.build(spec, weights, device, self._trusted, read)

    def _model_file(self, name: str, file: str) -> bytes:
        """Read a file of a model that carries its digest in its name."""
        try:
            content = self._files.read(f"models/{name}/{file}")
        except FileNotFoundError as error:
            raise CorruptData(f"model {name!r}: {file} is missing", model=name, file=file) from error
        if _sha256(content) not in file:
            raise CorruptData(
                f"model {name!r}: {file} has digest {_sha256(content)}", model=name, file=file, digest=_sha256(content)
            )
        return content

    # Banks

    def publish(self, bank: Bank, exemplars: Mapping[str, bytes] | None = None) -> Bank:
        """Freeze a bank, store it and serve it from now on.

        Returns
        -------
        Bank
            With its digest.

        Raises
        ------
        UnknownModel
            If its model is not in the repository.
        WeightsMismatch
            If its model has other weights than it was trained on.
        """
        self._check_model(bank.model, bank.reference, bank.weights_digest, bank.preprocessing)
        frozen, contents = bank_files.freeze(bank, exemplars)
        kinds.check(frozen)  # what cannot be loaded is not published
        version = BankVersion(bank.model, bank.layer, bank.name, frozen.digest)
        for file, content in contents.items():  # bank.json is the last
            self._files.write(f"{_folder(version)}/{file}", content)
        self._point(version)
        return frozen

    def resolve(self, reference: str) -> BankVersion:
        """Return the version that ``model/layer/name`` or ``model/layer/name@digest`` means now.

        At least eight digits of a digest are enough where they are unique.

        Raises
        ------
        InvalidInput
            If the reference is malformed.
        UnknownBank
            If there is no such bank or version.
        CorruptData
            If what says which version is served is damaged.
        """
        asked = _parse(reference)
        place, path, digest = _folder(asked).rpartition("/")[0], asked.reference, asked.digest
        if not digest:
            return asked._replace(digest=self._current(place, path))
        found = [d for d in self._versions(place) if d.startswith(digest)]
        if len(found) != 1:
            problem = "has no version" if not found else f"has {len(found)} versions that begin with"
            raise UnknownBank(f"bank {path} {problem} {digest}", bank=path)
        return asked._replace(digest=found[0])

    def banks(self, model: str | None = None) -> list[BankVersion]:
        """Return the served version of every bank, sorted, optionally of one model.

        Damaged banks are included: what is wrong shows when they are read. Where it is damaged which version is served,
        the digest is empty.
        """
        found = []
        for owner in [model] if model is not None else self._files.folders("banks"):
            for layer in self._files.folders(f"banks/{check_name('model', owner)}"):
                for name in self._files.folders(f"banks/{owner}/{layer}"):
                    try:
                        found.append(self.resolve(f"{owner}/{layer}/{name}"))
                    except UnknownBank:
                        continue  # being published for the first time
                    except CorruptData:
                        found.append(BankVersion(owner, layer, name, ""))
        return found

    def versions(self, reference: str) -> list[BankSummary]:
        """Return all versions of ``model/layer/name``, newest first; damaged ones are left out."""
        version = _parse(reference)
        place = _folder(version).rpartition("/")[0]
        summaries = []
        for digest in self._versions(place):
            try:
                summaries.append(self.summary(version._replace(digest=digest)))
            except CorruptData:
                continue
        if not summaries:
            self.resolve(version.reference)  # says what is wrong
        return sorted(summaries, key=lambda summary: summary.published, reverse=True)

    def summary(self, version: BankVersion) -> BankSummary:
        """Return a version's manifest, checked.

        Raises
        ------
        CorruptData
            If the manifest is not the one that was published.
        """
        content = self._read(version, bank_files.MANIFEST)
        with _naming(version):
            manifest = bank_files.read_manifest(content, version.digest)
            held = "/".join(str(manifest.get(key)) for key in ("model", "layer", "name"))
            if held != version.reference:
                raise CorruptData(f"{bank_files.MANIFEST} is that of bank {held}", file=bank_files.MANIFEST)
        return BankSummary(version, manifest, self._files.modified(f"{_folder(version)}/{bank_files.MANIFEST}"))

    def load(self, version: BankVersion) -> Bank:
        """Load a bank, every file of it checked, for the weights its model has now.

        Raises
        ------
        CorruptData
            If any byte changed or a file is missing; the file is named.
        WeightsMismatch
            If the model's weights, or how it prepares images, are not those that the bank was trained on; both are
            named.
        """
        manifest = self.summary(version).manifest
        trained_for = manifest["weights_digest"], manifest.get("preprocessing", {})
        self._check_model(version.model, version.reference, *trained_for)
        kept = {}
        for file in manifest["files"]:
            content = self._checked(version, manifest, file)
            if file in (bank_files.TENSORS, bank_files.CONCEPTS):
                kept[file] = content
        with _naming(version):
            return bank_files.thaw(manifest, version.digest, kept[bank_files.TENSORS], kept[bank_files.CONCEPTS])

    def named(self, version: BankVersion) -> Bank:
        """Load what can be said of a bank's concepts in words: the bank without tensors but its embeddings.

        Its pictures are left unread, so this is much faster than ``load``; what it raises is the same.
        """
        manifest = self.summary(version).manifest
        trained_for = manifest["weights_digest"], manifest.get("preprocessing", {})
        self._check_model(version.model, version.reference, *trained_for)
        tensors, concepts = (
            self._checked(version, manifest, file) for file in (bank_files.TENSORS, bank_files.CONCEPTS)
        )
        with _naming(version):
            bank = bank_files.thaw(manifest, version.digest, tensors, concepts)
        bare = dataclasses.replace(bank, tensors={}, parts=None)
        if bank.parts is None:
            return bare
        return bare.with_parts(bank.parts.kind, bank.parts.layer, bank.parts.channels, bank.parts.concepts, {})

    def picture(self, version: BankVersion, exemplar: Exemplar) -> bytes:
        """Return an exemplar's WebP file, checked."""
        return self._checked(version, self.summary(version).manifest, exemplar.file)

    def pictures(self, version: BankVersion, exemplars: Iterable[Exemplar]) -> dict[str, bytes]:
        """Return the WebP files of many exemplars, checked, by file; the manifest is read once for all."""
        manifest = self.summary(version).manifest
        return {exemplar.file: self._checked(version, manifest, exemplar.file) for exemplar in exemplars}

    def roll_back(self, reference: str) -> BankVersion:
        """Serve the version that ``model/layer/name@digest`` names from now on, once it is known to load.

        Raises
        ------
        InvalidInput
            If the reference names no digest.
        """
        if "@" not in reference:
            raise InvalidInput("name the version to serve: model/layer/name@digest")
        version = self.resolve(reference)
        self.load(version)
        self._point(version)
        return version

    # CLIPs

    def publish_clip(self, files: Mapping[str, bytes]) -> str:
        """Store a CLIP (``Clip.files``, ``clip.json`` last) if it is not there, and return its digest."""
        digest = _sha256(files["clip.json"])
        if not self.has_clip(digest):
            for file, content in files.items():
                self._files.write(f"clips/{digest}/{file}", content)
        return digest

    def has_clip(self, digest: str) -> bool:
        """Whether the CLIP of a digest is stored."""
        return self._files.exists(f"clips/{digest}/clip.json")

    def load_clip(self, digest: str, device: torch.device | str = "cpu") -> Clip:
        """Load a CLIP, every file of it checked.

        Raises
        ------
        CorruptData
            If it is not there, or any byte changed.
        """
        from concepts.clip import from_files  # takes a second to import, and few need it

        def read(file: str) -> bytes:
            try:
                return self._files.read(f"clips/{digest}/{file}")
            except FileNotFoundError as error:
                raise CorruptData(f"CLIP {digest[:12]}: {file} is missing", file=file) from error

        if _DIGEST.fullmatch(digest) is None:
            raise CorruptData("a bank was named with a CLIP whose digest is none")
        return from_files(read("clip.json"), digest, read, device)

    # Within

    def _current(self, place: str, path: str) -> str:
        try:
            content = self._files.read(f"{place}/CURRENT").decode("ascii", "replace")
        except FileNotFoundError as error:
            raise UnknownBank(f"there is no bank {path}", bank=path) from error
        digest = content.removesuffix("\n")
        if _DIGEST.fullmatch(digest) is None:
            raise CorruptData(f"bank {path}: CURRENT does not hold a digest", bank=path, file="CURRENT")
        if digest not in self._files.folders(place):
            raise CorruptData(
                f"bank {path}: CURRENT names the version {digest}, which is not there: roll back to one that is",
                bank=path,
                file="CURRENT",
            )
        return digest

    def _versions(self, place: str) -> list[str]:
        return [d for d in self._files.folders(place) if self._files.exists(f"{place}/{d}/{bank_files.MANIFEST}")]

    def _point(self, version: BankVersion) -> None:
        self._files.write(f"{_folder(version).rpartition('/')[0]}/CURRENT", f"{version.digest}\n".encode())

    def _read(self, version: BankVersion, file: str) -> bytes:
        try:
            return self._files.read(f"{_folder(version)}/{file}")
        except FileNotFoundError as error:
            raise CorruptData(
                f"bank {version.reference}@{version.digest[:12]}: {file} is missing", file=file
            ) from error

    def _checked(self, version: BankVersion, manifest: Mapping[str, Any], file: str) -> bytes:
        content = self._read(version, file)
        with _naming(version):
            return bank_files.check_file(manifest, file, content)

    def _check_model(self, model: str, reference: str, digest: str, preprocessing: Mapping[str, Any]) -> None:
        """Raise WeightsMismatch where a bank was trained on other weights, or on images prepared in another way."""
        spec = self.model_spec(model)
        if spec.weights_digest != digest:
            raise WeightsMismatch(
                f"bank {reference} was trained on weights {digest}; model {model!r} has weights {spec.weights_digest}: "
                "train it anew",
                bank=reference,
                trained_on=digest,
                present=spec.weights_digest,
            )
        now = spec.preprocessing.to_json()
        changed = [name for name, value in preprocessing.items() if now.get(name) != value]
        if changed:
            said = ", ".join(f"{name} {preprocessing[name]} (now {now.get(name)})" for name in sorted(changed))
            raise WeightsMismatch(
                f"bank {reference} was trained on images prepared with {said}; give model {model!r} that preprocessing "
                "again, or train it anew",
                bank=reference,
            )

    def workspace(self, model: str, layer: str, name: str) -> Path:
        """Return the folder for unfinished work on a bank; nothing in it is served, and it need not exist."""
        for what, value in (("model", model), ("layer", layer), ("bank", name)):
            check_name(what, value)
        return self.root / "work" / model / layer / name


@contextmanager
def _naming(version: BankVersion) -> Iterator[None]:
    """Name the bank in what goes wrong with its files."""
    try:
        yield
    except CorruptData as error:
        bank = f"{version.reference}@{version.digest[:12]}"
        raise CorruptData(f"bank {bank}: {error.message}", **{**error.metadata, "bank": bank}) from error


def _model_json(value: Mapping[str, Any]) -> bytes:
    """Return the one form in which a description is stored; its digest, kept within, shows any change of it."""
    described = {key: item for key, item in value.items() if key != "sha256"}
    digest = _sha256(json.dumps(described, sort_keys=True).encode())
    return (json.dumps({**described, "sha256": digest}, indent=1) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _safetensors(weights: Mapping[str, Tensor]) -> bytes:
    strange = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if strange:
        raise InvalidModel(f"the state dictionary holds more than tensors: {', '.join(strange[:3])}")
    # Cloned: tied weights share memory, which the format does not have.
    return safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in sorted(weights.items())})


def _weights_file(architecture: str, digest: str) -> str:
    return f"model-{digest}.onnx" if architecture == ONNX else f"weights-{digest}.safetensors"


def _parse(reference: str) -> BankVersion:
    """Take a reference apart; the digest is as given: whole, its beginning, or empty."""
    path, at, digest = reference.partition("@")
    parts = path.split("/")
    if len(parts) != 3 or (at and re.fullmatch("[0-9a-f]{8,64}", digest) is None):
        raise InvalidInput(
            f"bank reference {reference[:400]!r} is not of the form model/layer/name or model/layer/name@digest"
        )
    model, layer, name = (check_name(what, part) for what, part in zip(("model", "layer", "bank"), parts, strict=True))
    return BankVersion(model, layer, name, digest)


def _folder(version: BankVersion) -> str:
    return f"banks/{version.model}/{version.layer}/{version.name}/{version.digest}"
