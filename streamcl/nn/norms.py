"""Normalisation layers: where they are, and by which statistics batch normalisation normalises.

A network is adapted while it is in evaluation mode, so that dropout and stochastic depth stay off. What makes batch normalisation use the
batch at hand is that its running statistics are out of sight for a while: they are never written to, so that a batch of bad numbers cannot
spoil them, and they are there again when the context ends, whatever happened in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from streamcl.errors import DataError

KINDS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.RMSNorm)
LOOKED_FOR = "BatchNorm, LayerNorm, GroupNorm, InstanceNorm and RMSNorm"
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
DIGITS = 1e-3  # a variance below this share of the squared mean is not taken from sums of squares: too few digits would be left
FEW = 16  # places of a channel up to which each is better taken for a channel of its own


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
        with _enough_values():
            yield
    finally:
        for layer, (mean, variance) in zip(layers, kept, strict=True):
            layer._buffers["running_mean"], layer._buffers["running_var"] = mean, variance


@contextmanager
def by_mixture(layers: Mapping[str, _BatchNorm], share: Callable[[int], float], gathered: Gathered | None = None) -> Iterator[None]:
    """For a while, layers in evaluation mode normalise by a mixture of the source's statistics and the (biased) ones of the batch.

    `share` is the batch's, given how many samples the layer sees. No gradient goes through these statistics. What they are is taken in by
    `gathered`, where it is given.
    """
    kept = [dict(layer._buffers) for layer in layers.values()]

    def before(name: str, layer: _BatchNorm, source: dict[str, Tensor | None], values: Tensor) -> None:
        mean, variance = moments(values.detach())
        weight = share(len(values))
        if weight < 1:
            mean, variance = (
                own.lerp(new.to(own), weight)  # type: ignore[union-attr]
                for own, new in zip((source[which] for which in _BUFFERS[:2]), (mean, variance), strict=True)
            )
        layer._buffers["running_mean"], layer._buffers["running_var"] = mean, variance
        if gathered is not None:
            gathered.take_in(name, mean, variance)

    hooks = [
        layer.register_forward_pre_hook(lambda layer, given, name=name, source=source: before(name, layer, source, given[0]))
        for (name, layer), source in zip(layers.items(), kept, strict=True)
    ]
    try:
        yield
    finally:
        for hook, layer, buffers in zip(hooks, layers.values(), kept, strict=True):
            hook.remove()
            layer._buffers.update(buffers)


@torch.no_grad()
def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, in 32 bits or more  # (channels,), (channels,)

    Without an accelerator torch's own kernels take as long for them as a small convolution, but where channels lie last. So few places are
    taken for channels, and put together; for many, sums and sums of squares along each row are several times faster, and where the mean is
    so large that these would cancel, it is taken off before.
    """
    values = values if values.dtype == torch.float64 else values.float()
    last = values.movedim(1, -1)
    rows = last.flatten(0, -2)[:, :, None] if last.is_contiguous() or last.dim() == 2 else values.flatten(2)  # (batch, channels, places)
    if values.device.type != "cpu":
        variance, mean = torch.var_mean(rows, dim=(0, 2), correction=0)
        return mean, variance
    if rows.shape[2] <= FEW:
        mean, variance = torch.batch_norm_update_stats(rows.flatten(1), None, None, 0.0)
        return (mean, variance) if rows.shape[2] == 1 else _together(mean.view(rows.shape[1:]), variance.view(rows.shape[1:]))
    mean, variance = _sums(rows)
    if bool((variance < mean.square() * DIGITS).any()):
        rest, variance = _sums(rows - mean[:, None])
        mean = mean + rest
    return mean, variance


def _together(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, given those of each of its places  # (channels,), (channels,) of (channels, places)"""
    mean = means.mean(dim=1, keepdim=True)
    off = means - mean
    return mean.squeeze(1), torch.addcmul(variances, off, off).mean(dim=1)


def _sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from the sums of values and of their squares."""
    mean = rows.mean(dim=2).mean(dim=0)
    squares = torch.linalg.vector_norm(rows, dim=2).square_().mean(dim=0).div_(rows.shape[2])
    return mean, squares.sub_(mean.square()).clamp_(min=0)


@contextmanager
def _enough_values() -> Iterator[None]:
    """torch's complaint about a variance of one value, said to whoever serves the batch."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            "batch normalisation by the statistics of the batch needs more than one value per channel, and a layer of this model has one "
            "for this batch: serve more samples at once, or let the loop keep a window of the last ones (window=...); bn_adapt with a "
            "weight below 1 does with one sample"
        ) from None


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
            with _enough_values():
                yield
        finally:
            for layer, buffers, momentum, training in kept:
                layer._buffers.update(buffers)
                layer.momentum, layer.training = momentum, training

    @contextmanager
    def answering(self) -> Iterator[None]:
        """For a while, layers in evaluation mode normalise by what was gathered."""
        kept = [(layer, dict(layer._buffers)) for layer in self.layers.values()]
        for name, layer in self.layers.items():
            layer._buffers.update({which: self.values[f"{name}.{which}"] for which in _BUFFERS[:2]})
        try:
            yield
        finally:
            for layer, buffers in kept:
                layer._buffers.update(buffers)

    def take_in(self, name: str, mean: Tensor, variance: Tensor) -> None:
        """One layer's statistics of the newest batch."""
        for which, value in zip(_BUFFERS[:2], (mean, variance), strict=True):
            held = self.values[f"{name}.{which}"]
            held.lerp_(torch.where(value.isfinite(), value, held).to(held.dtype), self.momentum)  # one such batch would stay for ever

    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])


@torch.no_grad()
def exchanged(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put these tensors in the place of the model's own (parameters or buffers) and give back what was there. Nothing is copied."""
    before: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {}  # finding one takes longer than the exchange
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        module: Any = modules.get(path)
        if module is None:
            module = modules[path] = model.get_submodule(path)
        parameter = module._parameters.get(last)
        if parameter is not None:
            before[name] = parameter.data
            parameter.data = value
        else:
            before[name] = module._buffers[last]
            module._buffers[last] = value
    torch.clear_autocast_cache()  # it holds casts of what was there
    return before


@contextmanager
def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """For a while, the model has these tensors instead of its own."""
    before = exchanged(model, values)
    try:
        yield
    finally:
        exchanged(model, dict(reversed(before.items())))
