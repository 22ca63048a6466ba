"""A network that computes the same with less work: normalisation folded into convolutions, weights rounded once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from concepts.trace import run_until

_LOWERED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""What autocast computes in low precision. Exactly these: classes made from them may do more with their weights."""


def shared_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a network that shares its parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def fold(module: nn.Module, layer: str, example: Tensor) -> int:
    """Fold normalisation into the convolutions and linear layers before it, up to a layer; return how often.

    ``BN(Wx + b)`` is affine in x in evaluation, so one convolution does it. That nothing else reads what was
    normalised is for the caller to check, by comparing what the layer answers before and after.

    Parameters
    ----------
    module
        The network, changed in place; its parameters are not.
    layer
        What comes after it stays as it is.
    example
        An input, to see what feeds what.
    """
    answered: dict[int, tuple[str, nn.Module, Tensor, int]] = {}
    pairs: list[tuple[str, nn.Module, str, nn.Module]] = []

    def note(name: str, child: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        feeder = answered.pop(id(inputs[0]), None) if inputs else None
        if type(child) in (nn.Conv2d, nn.Linear):
            # Held, so that the id stays its own; the version tells whether it is edited before it is normalised.
            answered[id(output)] = (name, child, output, output._version)
        elif feeder is not None and feeder[2]._version == feeder[3] and _folds(feeder[1], child):
            pairs.append((feeder[0], feeder[1], name, child))

    hooks = [
        child.register_forward_hook(lambda child, inputs, output, name=name: note(name, child, inputs, output))
        for name, child in module.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            run_until(module, module.get_submodule(layer), example)
    finally:
        for hook in hooks:
            hook.remove()
    for name, feeder, normal_name, normal in pairs:
        fuse: Any = fuse_linear_bn_eval if isinstance(feeder, nn.Linear) else fuse_conv_bn_eval
        _replace(module, name, fuse(feeder, normal).requires_grad_(False))
        _replace(module, normal_name, nn.Identity())
    return len(pairs)


def _folds(feeder: nn.Module, normal: nn.Module) -> bool:
    """Whether normalisation is by stored statistics of just the channels that the feeder answers with."""
    kind, width = (
        (nn.BatchNorm1d, "out_features") if isinstance(feeder, nn.Linear) else (nn.BatchNorm2d, "out_channels")
    )
    return type(normal) is kind and normal.running_mean is not None and normal.num_features == getattr(feeder, width)


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights that autocast would round anew in every pass; other networks that share them keep theirs."""
    for child in module.modules():
        if type(child) in _LOWERED:
            for name, parameter in child.named_parameters(recurse=False):
                setattr(child, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def _replace(module: nn.Module, name: str, other: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, other)
