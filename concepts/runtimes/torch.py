"""Trunks computed by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from concepts.cut import RELATIVE_TOLERANCE, Cut
from concepts.errors import InvalidModel
from concepts.runtimes import Precision
from concepts.runtimes.lowering import fold, round_weights, shared_copy
from concepts.trace import outputs, run_until


class TorchTrunk:
    """The trunk of a cut, in inference mode, channels last, convolutions and normalisation made one.

    Parameters
    ----------
    cut
        Its network is shared, not changed.
    precision
        Below float32: of what autocast lowers.
    compiled
        Compile it.

    Raises
    ------
    InvalidModel
        If it cannot be compiled.
    """

    def __init__(self, cut: Cut, precision: Precision = "float32", *, compiled: bool = False) -> None:
        self._layer, self.precision = cut.layer, precision
        device = cut.example.device.type
        self.description = f"torch {device} {precision}{' compiled' if compiled else ''}"
        dtype = getattr(torch, precision)
        self._autocast = torch.autocast(device, dtype=dtype, enabled=precision != "float32")
        self._module = _folded(cut)
        if precision != "float32":
            self._module = self._rounded(self._module, cut, dtype)
        own = {id(t): t.nbytes for t in _tensors(self._module)}
        self.bytes = sum(own.values()) - sum(own.get(id(t), 0) for t in _tensors(cut.module))
        self._target = self._module.get_submodule(cut.layer)
        self._run: Callable[[Tensor], Tensor] = self._compiled(cut.example) if compiled else self._eager

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Trunk``."""
        with torch.inference_mode(), self._autocast:
            a = self._run(x)
        # A copy made outside: tensors of inference mode cannot take part in gradients.
        return a.to(torch.float32, copy=True)

    def _rounded(self, module: nn.Module, cut: Cut, dtype: torch.dtype) -> nn.Module:
        """Return a copy with weights rounded once, where that computes what autocast alone does."""
        if module is cut.module:  # what cannot be copied stays as it is
            return module
        rounded = shared_copy(module)
        round_weights(rounded, dtype)
        try:
            with torch.no_grad(), self._autocast:
                found = run_until(rounded, rounded.get_submodule(cut.layer), cut.example)
                expected = run_until(module, module.get_submodule(cut.layer), cut.example)
        except Exception:  # noqa: BLE001 - parts that leave autocast do not take rounded weights
            return module
        return rounded if bool(torch.equal(found, expected)) else module

    def _eager(self, x: Tensor) -> Tensor:
        return cast(Tensor, run_until(self._module, self._target, x))

    def _compiled(self, example: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the trunk as one compiled graph for batches of any size."""
        two = example.expand(2, *example.shape[1:]).contiguous(memory_format=torch.channels_last)
        try:
            with torch.no_grad(), self._autocast:
                program = torch.export.export(
                    _UpTo(self._module, self._layer), (two,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
                )
            # Frozen weights are constants of the graph: laid out and rounded once, when it is compiled.
            run = torch.compile(program.module(), dynamic=True, options={"freezing": True})
            with torch.no_grad(), self._autocast:
                for x in (two, two[:1]):  # a lone image has a graph of its own
                    run(x)
        except Exception as error:
            raise InvalidModel(
                f"the trunk up to layer {self._layer!r} cannot be compiled: set compile to false"
            ) from error
        return run


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class _UpTo(nn.Module):
    """A network that answers what one of its layers answers; what comes after is dropped when it is compiled."""

    def __init__(self, module: nn.Module, layer: str) -> None:
        super().__init__()
        self.module, self._layer = module, layer

    def forward(self, x: Tensor) -> Tensor:
        return outputs(self.module, [self._layer], x)[1][self._layer]


def _folded(cut: Cut) -> nn.Module:
    """Return a copy of the network with its normalisation folded, where that does not change the activation.

    Without a copy, where there can be none, the network itself is returned.
    """
    try:
        plain, module = shared_copy(cut.module), shared_copy(cut.module)
        fold(module, cut.layer, cut.example)
        with torch.no_grad():
            found = run_until(module, module.get_submodule(cut.layer), cut.example)
            again = run_until(plain, plain.get_submodule(cut.layer), cut.example)
    except Exception:  # noqa: BLE001 - locks, closures and other things that cannot be copied
        return cut.module
    if not isinstance(again, Tensor) or not isinstance(found, Tensor):  # the copy runs what it was copied from
        return cut.module
    expected = cut.trunk(cut.example)
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    return module if bool(error <= RELATIVE_TOLERANCE) else plain
