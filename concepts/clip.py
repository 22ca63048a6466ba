"""A CLIP: pictures and texts in one space (Radford et al., 2021), of any architecture that open_clip builds.

Its files, as the repository stores them, are ``clip.json`` (open_clip's model and preprocessing configuration, and the
sha256 of the others), ``weights.safetensors``, and ``merges.txt.gz`` where its tokenizer has byte-pair merges of its
own. Its digest is the sha256 of ``clip.json``: the same for the same weights, whatever file they were read from.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from concepts.errors import CorruptData, InvalidInput, UnsupportedOption

MANIFEST = "clip.json"
WEIGHTS = "weights.safetensors"
MERGES = "merges.txt.gz"

_SCHEMA = 1
_CONFIG = "open_clip_config.json"
_CHECKPOINTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
_PICTURES = 128
_TEXTS = 512
"""How many go through the network at a time."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Embeds pictures and texts; opened with ``open_clip_model`` or ``from_files``."""

    name: str
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    module: nn.Module = field(repr=False)
    tokenize: Callable[[list[str]], Tensor] = field(repr=False)
    merges: bytes | None = field(default=None, repr=False)
    """Of the tokenizer, where they are not open_clip's own."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def width(self) -> int:
        """Dimensions D of an embedding."""
        return int(self.model_cfg["embed_dim"])

    @cached_property
    def digest(self) -> str:
        """sha256 of its ``clip.json``."""
        return hashlib.sha256(self.files[MANIFEST]).hexdigest()

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Its files, ``clip.json`` last; see ``from_files``."""
        contents = {WEIGHTS: _weights_of(self.module)}
        if self.merges is not None:
            contents[MERGES] = self.merges
        manifest = {
            "schema": _SCHEMA,
            "model_cfg": self.model_cfg,
            "preprocess_cfg": self.preprocess_cfg,
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        }
        contents[MANIFEST] = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
        return contents

    @property
    def portable(self) -> bool:
        """Whether the files are all that is needed: a tokenizer or tower from elsewhere is not among them."""
        return _is_portable(self.model_cfg)

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return embeddings of RGB pictures of any size, float32 ``[n, D]`` of norm 1, on the CPU."""
        transform = image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=False)
        found = []
        for first in range(0, len(pictures), _PICTURES):
            x = torch.stack([transform(picture) for picture in pictures[first : first + _PICTURES]])
            found.append(self._unit(self._network.encode_image(x.to(self.device))))
        return torch.cat(found) if found else torch.zeros(0, self.width)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings of texts, float32 ``[n, D]`` of norm 1, on the CPU; what is too long for it is cut."""
        found = []
        for first in range(0, len(texts), _TEXTS):
            tokens = self.tokenize(list(texts[first : first + _TEXTS]))
            found.append(self._unit(self._network.encode_text(tokens.to(self.device))))
        return torch.cat(found) if found else torch.zeros(0, self.width)

    @property
    def _network(self) -> Any:
        """The module, of which open_clip says no more than that it is one."""
        return self.module

    @staticmethod
    def _unit(embeddings: Tensor) -> Tensor:
        return functional.normalize(embeddings.float(), dim=1).cpu()


def open_clip_model(reference: str, device: torch.device | str = "cpu") -> Clip:
    """Open a CLIP.

    Parameters
    ----------
    reference
        A folder as open_clip saves models (``open_clip_config.json`` and weights; ``merges.txt.gz`` for a tokenizer of
        its own); ``ARCHITECTURE@FILE`` for one of open_clip's architectures with a checkpoint, e.g.
        ``ViT-B-32-quickgelu@clip.safetensors``; or, where the hub can be reached, ``ARCHITECTURE@TAG`` with one of
        open_clip's pretrained tags, or ``hf-hub:OWNER/NAME``.
    device
        Where to compute.

    Raises
    ------
    InvalidInput
        If there is no such CLIP, the weights do not fit, or the hub cannot be reached.
    """
    architecture, at, weights = reference.partition("@")
    if not at and Path(reference).is_dir():
        return _from_folder(Path(reference), torch.device(device))
    if at and open_clip.get_model_config(architecture) is not None and Path(weights).is_file():
        config = open_clip.get_model_config(architecture)
        return _with_checkpoint(architecture, config, {}, Path(weights), None, torch.device(device))
    if reference.startswith("hf-hub:") or (at and weights in open_clip.list_pretrained_tags_by_model(architecture)):
        return _from_hub(reference, torch.device(device))
    raise InvalidInput(
        f"there is no CLIP {reference!r}: give a folder with {_CONFIG} and weights, or ARCHITECTURE@FILE with one of "
        "open_clip's architectures, e.g. ViT-B-32-quickgelu@clip.safetensors"
    )


def from_files(manifest: bytes, digest: str, read: Callable[[str], bytes], device: torch.device | str = "cpu") -> Clip:
    """Rebuild a CLIP from its files; the inverse of ``Clip.files``.

    Parameters
    ----------
    manifest
        Content of its ``clip.json``.
    digest
        That it should have.
    read
        Returns the content of another of its files.
    device
        Where to compute.

    Raises
    ------
    CorruptData
        If a byte changed.
    """
    if hashlib.sha256(manifest).hexdigest() != digest:
        raise CorruptData(f"{MANIFEST} has another digest than {digest}", file=MANIFEST)
    try:
        stored = json.loads(manifest)
        if stored["schema"] != _SCHEMA:
            raise CorruptData(f"{MANIFEST} has schema {stored['schema']!r}; this version reads schema {_SCHEMA}")
        if not _is_portable(stored["model_cfg"]):
            raise CorruptData(f"{MANIFEST} names parts that are not in the repository", file=MANIFEST)
        contents = {name: read(name) for name in stored["files"]}
        for name, expected in stored["files"].items():
            if hashlib.sha256(contents[name]).hexdigest() != expected:
                raise CorruptData(f"{name} of the CLIP is not what was stored", file=name)
        module = _build(stored["model_cfg"])
        module.load_state_dict(safetensors.torch.load(contents[WEIGHTS]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CorruptData(f"the files of the CLIP do not have the form of schema {_SCHEMA}") from error
    return _clip(
        digest[:12], stored["model_cfg"], stored["preprocess_cfg"], module, contents.get(MERGES), torch.device(device)
    )


def _from_folder(folder: Path, device: torch.device) -> Clip:
    try:
        stored = json.loads((folder / _CONFIG).read_text())
        config, view = stored["model_cfg"], dict(stored.get("preprocess_cfg") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{folder.name} is not a CLIP: it must hold {_CONFIG} with a model_cfg") from error
    weights = next((folder / name for name in _CHECKPOINTS if (folder / name).is_file()), None)
    if weights is None:
        raise InvalidInput(f"{folder.name} holds no weights: {', '.join(_CHECKPOINTS)}")
    merges = (folder / MERGES).read_bytes() if (folder / MERGES).is_file() else None
    return _with_checkpoint(folder.name, config, view, weights, merges, device)


def _with_checkpoint(
    name: str,
    config: Mapping[str, Any],
    view: Mapping[str, Any],
    weights: Path,
    merges: bytes | None,
    device: torch.device,
) -> Clip:
    try:
        module = _build(config)
        open_clip.load_checkpoint(module, str(weights), strict=True, weights_only=True)
    except Exception as error:  # whatever a strange configuration or file makes open_clip raise
        raise InvalidInput(f"the weights {weights.name} do not fit the architecture of CLIP {name!r}") from error
    return _clip(name, config, view, module, merges, device)


def _from_hub(reference: str, device: torch.device) -> Clip:
    architecture, _, tag = reference.partition("@")
    try:
        module = open_clip.create_model(architecture, tag or None, weights_only=True)
        _, hub, name = architecture.rpartition("hf-hub:")
        config = open_clip.factory._get_hf_config(name)["model_cfg"] if hub else open_clip.get_model_config(name)
        view = open_clip.get_model_preprocess_cfg(module)
    except Exception as error:
        raise InvalidInput(
            f"CLIP {reference!r} cannot be fetched from the hub: without network, give a folder or ARCHITECTURE@FILE"
        ) from error
    return _clip(architecture, config, view, module, None, device)


def _clip(
    name: str,
    config: Mapping[str, Any],
    view: Mapping[str, Any],
    module: nn.Module,
    merges: bytes | None,
    device: torch.device,
) -> Clip:
    described = _preprocessing(name, view, getattr(module.visual, "image_size", None))
    module = module.eval().requires_grad_(False).to(device)
    return Clip(name, config, described, module, _tokenizer(name, config, merges), merges, device)


def _preprocessing(name: str, view: Mapping[str, Any], size: Any) -> dict[str, Any]:
    """Return the whole of a preprocessing configuration, for what the network takes, once a picture went through it."""
    known = asdict(PreprocessCfg())
    strange = view.keys() - known.keys()
    if strange:
        raise InvalidInput(f"the preprocessing of CLIP {name!r} has the unknown key {min(strange)!r}")
    whole = {**known, **view, "size": size or view.get("size") or known["size"]}
    described: dict[str, Any] = json.loads(json.dumps(whole))
    try:
        image_transform_v2(PreprocessCfg(**described), is_train=False)(Image.new("RGB", (2, 2)))
    except Exception as error:  # whatever a strange configuration makes open_clip raise
        raise InvalidInput(f"the preprocess_cfg of CLIP {name!r} is not one that open_clip knows") from error
    return described


def _is_portable(config: Mapping[str, Any]) -> bool:
    text, timm = config["text_cfg"], config["vision_cfg"].get("timm_model_name") or ""
    return not {"hf_tokenizer_name", "hf_model_name"} & text.keys() and ":" not in timm


def _build(described: Mapping[str, Any]) -> nn.Module:
    """Build the network that a configuration of open_clip describes, without weights of any part of it."""
    config: dict[str, Any] = deepcopy(dict(described))
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    config["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    config["text_cfg"] = {**config["text_cfg"], "hf_model_pretrained": False}
    kind: Any = open_clip.CoCa if "multimodal_cfg" in config else CustomTextCLIP if custom else CLIP
    module: nn.Module = kind(**config)
    return module


def _tokenizer(name: str, config: Mapping[str, Any], merges: bytes | None) -> Callable[[list[str]], Tensor]:
    text = config["text_cfg"]
    length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    tokenizer: Callable[[list[str]], Tensor]
    if "hf_tokenizer_name" in text:
        try:
            tokenizer = open_clip.tokenizer.HFTokenizer(text["hf_tokenizer_name"], context_length=length)
        except Exception as error:
            raise UnsupportedOption(
                f"CLIP {name!r} has a tokenizer of the package transformers, which is not installed or cannot reach "
                "the hub: take a CLIP with open_clip's own tokenizer"
            ) from error
    elif merges is None:
        tokenizer = SimpleTokenizer(context_length=length)
    else:
        with tempfile.NamedTemporaryFile(suffix=".gz") as file:
            file.write(merges)
            file.flush()
            try:
                tokenizer = SimpleTokenizer(file.name, context_length=length)
            except Exception as error:  # whatever bytes that are no merges make open_clip raise
                raise InvalidInput(f"{MERGES} of CLIP {name!r} does not hold the merges of a tokenizer") from error
    return tokenizer


def _weights_of(module: nn.Module) -> bytes:
    """Return the weights as a safetensors file; in half precision where that loses nothing."""
    weights = {}
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        half = tensor.half() if tensor.is_floating_point() else tensor
        weights[name] = (half if torch.equal(half.to(tensor.dtype), tensor) else tensor).clone()
    return safetensors.torch.save(weights)
