"""A frozen image classifier with all that is needed to use it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from concepts import architectures
from concepts.cut import Cut, CutLayer, layers, logits_of
from concepts.errors import CorruptData, InvalidInput, InvalidModel, UnknownClass
from concepts.onnx_model.file import OnnxFile
from concepts.onnx_model.network import OnnxNetwork
from concepts.preprocessing import Preprocessing

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
"""What models, layers and banks may be called: they become names of folders."""

ONNX = "onnx"
"""Architecture of models that are an ONNX file."""


_BATCH_TOLERANCE = 1e-3
"""How closely an image must get the same logits alone and beside another, relative to the largest of them."""


def check_name(what: str, name: str) -> str:
    """Return the name if it can name a model, layer or bank.

    Raises
    ------
    InvalidInput
        If it is empty, too long, or has characters that a folder's name should not have.
    """
    if NAME.fullmatch(name) is None:
        raise InvalidInput(
            f"{what} {name[:130]!r} must be 1 to 128 letters, digits, '.', '_' or '-', not '.' or '-' at first"
        )
    return name


class Exported(NamedTuple):
    """The ONNX file that was made of a PyTorch model, and checked against it."""

    digest: str
    """sha256 of the file, hexadecimal."""
    values: Mapping[str, str]
    """By layer, the name of its activation in the file."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its weights: what ``model.json`` holds."""

    name: str
    architecture: str
    """``torchvision:NAME``, ``bcos:NAME``, ``package.module:factory`` or ``onnx``."""
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    weights_digest: str
    """sha256 of the weights file, or of the ONNX file of a model that is one; hexadecimal."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the architecture's factory."""
    exported: Exported | None = None

    def __post_init__(self) -> None:
        check_name("model", self.name)
        if not self.class_names or len(set(self.class_names)) != len(self.class_names):
            raise InvalidModel(f"model {self.name!r} needs class names, each different")

    @cached_property
    def digest(self) -> str:
        """sha256 over the whole description, that of the weights included: another one is another model."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def check_class(self, index: int) -> None:
        """Raise UnknownClass where the model has no class of that index."""
        if not 0 <= index < len(self.class_names):
            raise UnknownClass(
                f"model {self.name!r} has classes 0 to {len(self.class_names) - 1}, not {index}", model=self.name
            )

    def class_index(self, name: str) -> int:
        """Return the index of a class.

        Raises
        ------
        UnknownClass
            If the model has no class of that name.
        """
        if name not in self.class_names:
            raise UnknownClass(f"model {self.name!r} has no class {name!r}", model=self.name)
        return self.class_names.index(name)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` takes."""
        return {
            "schema": 1,
            "name": self.name,
            "architecture": self.architecture,
            "options": dict(self.options),
            "preprocessing": self.preprocessing.to_json(),
            "class_names": list(self.class_names),
            "weights_digest": self.weights_digest,
            **({} if self.exported is None else {"exported": self.exported._asdict()}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelSpec:
        """Rebuild from ``to_json``'s object.

        Raises
        ------
        CorruptData
            If something is missing or of another schema.
        """
        try:
            if value["schema"] != 1:
                raise CorruptData(f"model.json has schema {value['schema']!r}; this version reads schema 1")
            return cls(
                name=value["name"],
                architecture=value["architecture"],
                options=value["options"],
                preprocessing=Preprocessing.from_json(value["preprocessing"]),
                class_names=tuple(value["class_names"]),
                weights_digest=value["weights_digest"],
                exported=Exported(**value["exported"]) if "exported" in value else None,
            )
        except (KeyError, TypeError) as error:
            raise CorruptData(f"model.json cannot be read: {error}") from error


@dataclass(frozen=True)
class Model:
    """A model, ready to run on a device."""

    spec: ModelSpec
    module: nn.Module
    """In evaluation mode, parameters frozen."""
    device: torch.device
    onnx: Callable[[], bytes] | None = None
    """Reads its ONNX file, where it has one."""

    def inputs(self, views: NDArray[np.uint8] | Tensor) -> Tensor:
        """Return the module's input on its device for uint8 views ``[B, height, width, 3]``."""
        if isinstance(views, np.ndarray):
            views = torch.from_numpy(np.require(views, requirements="W"))  # PIL gives read-only arrays; torch warns
        return self.spec.preprocessing.normalize(views.to(self.device, non_blocking=True))

    def check(self) -> None:
        """Raise ``InvalidModel`` if the model does not answer each image for itself with one finite logit a class."""
        x = self.example()
        logits = logits_of(self.module, x)
        self._check_classes(logits.shape[1])
        if not logits.isfinite().all():
            raise InvalidModel(f"model {self.spec.name!r} answers an example with NaN or infinity: look at its weights")
        alone = torch.cat([logits_of(self.module, image) for image in x.split(1)])
        if not bool((alone - logits).abs().max() <= _BATCH_TOLERANCE * logits.abs().max()):
            raise InvalidModel(
                f"model {self.spec.name!r} answers two images otherwise than each alone: it must not be random, "
                "and not mix the images of a batch"
            )

    def cut(self, layer: str) -> Cut:
        """Cut the model at a layer; see ``Cut`` for what is checked and raised."""
        cut = Cut(self.module, layer, self.example())
        self._check_classes(cut.n_classes)
        return cut

    def _check_classes(self, outputs: int) -> None:
        if outputs != len(self.spec.class_names):
            raise InvalidModel(
                f"model {self.spec.name!r} has {outputs} outputs but {len(self.spec.class_names)} class names"
            )

    def layers(self) -> list[CutLayer]:
        """Return every layer at which the model can be cut, in running order."""
        return layers(self.module, self.example())

    def example(self) -> Tensor:
        """Return two inputs, always the same: smooth colours with some grain.

        Plain noise is nothing that a network was made for: on it, rounding errors can grow beyond all bounds.
        """
        size = self.spec.preprocessing
        generator = torch.Generator().manual_seed(0)
        coarse = 255 * torch.rand(2, 3, 4, 4, generator=generator)
        smooth = functional.interpolate(coarse, (size.height, size.width), mode="bilinear")
        grain = 16 * torch.randn(smooth.shape, generator=generator)
        return self.inputs((smooth + grain).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))


def build_onnx(
    spec: ModelSpec,
    content: bytes,
    device: torch.device | str = "cpu",
    onnx: Callable[[], bytes] | None = None,
) -> Model:
    """Build a model from its description and its ONNX file.

    Parameters
    ----------
    spec
        The description.
    content
        The file.
    device
        Where to run it.
    onnx
        Reads the file again when it is needed, so that it need not be held.

    Raises
    ------
    InvalidModel
        If the file is no image classifier that is understood here, or its images are not those that the preprocessing
        makes.
    """
    file, view = OnnxFile.parse(content), spec.preprocessing
    sizes = ((file.channels, view.channels), (file.height, view.height), (file.width, view.width))
    if any(wanted not in (None, given) for wanted, given in sizes):
        shape = "×".join("any" if wanted is None else str(wanted) for wanted, _ in sizes)
        raise InvalidModel(
            f"the ONNX file takes images of {shape} (channels × height × width), "
            f"the preprocessing makes {view.channels}×{view.height}×{view.width}",
            model=spec.name,
        )
    module = OnnxNetwork(file, (view.height, view.width)).to(torch.device(device))
    return Model(spec, module, torch.device(device), onnx or (lambda: content))


def build(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    trusted: Sequence[str] = architectures.TRUSTED_PACKAGES,
    onnx: Callable[[], bytes] | None = None,
) -> Model:
    """Build a model from its description and its weights.

    Parameters
    ----------
    spec
        The description.
    weights
        State dictionary; must fit the architecture exactly.
    device
        Where to run it.
    trusted
        Packages whose factories may be called; see ``architectures.build``.
    onnx
        Reads what was exported of it, if it was.

    Raises
    ------
    InvalidModel
        If the architecture cannot be built or the weights do not fit it; the first misfits are named.
    """
    module = architectures.build(spec.architecture, spec.options, trusted)
    expected = module.state_dict()
    # Batch counters of normalisation layers do nothing in evaluation, and many published files lack them.
    weights = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")} | dict(weights)
    misfits = [f"missing {key}" for key in expected if key not in weights]
    misfits += [f"unexpected {key}" for key in weights if key not in expected]
    misfits += [
        f"{key} is {list(weights[key].shape)}, not {list(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise InvalidModel(
            f"the weights do not fit {spec.architecture!r}: {'; '.join(misfits[:3])}{more}", model=spec.name
        )
    expected.update(weights)  # keeps the versions of its layers, which some networks ask for
    module.load_state_dict(expected)
    # Channels last is the layout that convolutions run fastest in, on CPUs (2 × for ResNet-50) and GPUs alike.
    module = module.to(torch.device(device)).to(memory_format=torch.channels_last)
    return Model(spec, module, torch.device(device), onnx)
