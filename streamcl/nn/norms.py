"""Normalisation layers: where they are, and by which statistics batch normalisation normalises.

A network is adapted while it is in evaluation mode, so that dropout and stochastic depth stay off. What makes batch normalisation use the
batch at hand is that its running statistics are out of sight for a while: they are never written to, so that a batch of bad numbers cannot
spoil them, and they are there again when the context ends, whatever happened in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

KINDS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.RMSNorm)
LOOKED_FOR = "BatchNorm, LayerNorm, GroupNorm, InstanceNorm and RMSNorm"
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layers that have a weight, by name. Libraries that write their own call them ...LayerNorm or ...RMSNorm too."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, KINDS) or type(module).__name__.endswith(("LayerNorm", "RMSNorm", "LayerNorm2d")))
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def affine(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weight and bias of every normalisation layer, by the name that the model gives them."""
    return {
        f"{name}.{which}" if name else which: value
        for name, module in norms(model).items()
        for which, value in module.named_parameters(recurse=False)
    }


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers of batch normalisation that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module._buffers.get("running_mean") is not None
    }


@contextmanager
def by_batch(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """For a while, layers in evaluation mode normalise by the mean and the (biased) variance of the batch."""
    kept = [(layer._buffers["running_mean"], layer._buffers["running_var"]) for layer in layers]
    for layer in layers:
        layer._buffers["running_mean"] = layer._buffers["running_var"] = None
    try:
        yield
    finally:
        for layer, (mean, variance) in zip(layers, kept, strict=True):
            layer._buffers["running_mean"], layer._buffers["running_var"] = mean, variance


class Gathered:
    """Statistics of the batches that went by, kept beside the source's: what a network that adapted normalises by when it is to answer for
    each sample alone. They begin as the source's, and `momentum` is the weight of the newest batch, as it is in the layers themselves."""

    def __init__(self, layers: Mapping[str, _BatchNorm], momentum: float = 0.1) -> None:
        self.layers, self.momentum = dict(layers), momentum
        self.values = {
            f"{name}.{which}": layer._buffers[which].detach().clone()  # type: ignore[union-attr]
            for name, layer in self.layers.items()
            for which in _BUFFERS[:2]
        }

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """For a while, the layers normalise by the batch and take its statistics in."""
        kept = [(layer, dict(layer._buffers), layer.momentum, layer.training) for layer in self.layers.values()]
        for name, layer in self.layers.items():
            layer._buffers.update({which: self.values[f"{name}.{which}"] for which in _BUFFERS[:2]}, num_batches_tracked=None)
            layer.momentum, layer.training = self.momentum, True
        try:
            yield
        finally:
            for layer, buffers, momentum, training in kept:
                layer._buffers.update(buffers)
                layer.momentum, layer.training = momentum, training

    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])


@torch.no_grad()
def exchanged(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put these tensors in the place of the model's own (parameters or buffers) and give back what was there. Nothing is copied."""
    before: dict[str, Tensor] = {}
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        module: Any = model.get_submodule(path)
        parameter = module._parameters.get(last)
        if parameter is not None:
            before[name] = parameter.data
            parameter.data = value
        else:
            before[name] = module._buffers[last]
            module._buffers[last] = value
    return before


@contextmanager
def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """For a while, the model has these tensors instead of its own."""
    before = exchanged(model, values)
    try:
        yield
    finally:
        exchanged(model, before)
