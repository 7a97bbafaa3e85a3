"""RoTTA's robust batch normalisation: a running mixture that a network is trained by, with gradients through the batch's part of it.

Yuan, Xie and Li, CVPR 2023, arXiv 2303.13899. With the statistics mean', var' that were kept so far and a share alpha for the batch

    mean = (1 - alpha) mean' + alpha mean_batch,    var = (1 - alpha) var' + alpha var_batch

normalise the batch and are kept for the next one. The variance of the batch is the biased one.

The layers themselves normalise, by these statistics as if they were fixed: `forward` stays theirs, also where a library has put an
activation into it. What comes back through a layer is its gradient g with the statistics held fixed; with n values of a channel and the
batch's own mean, what the batch had in them adds

    - alpha / n sum(g)  -  alpha / n (x - mean_batch) / (var + eps) sum(g (x - mean))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from streamcl.nn.norms import FEW, moments

STATISTICS = ("running_mean", "running_var")


def statistics_of(layers: Mapping[str, _BatchNorm]) -> dict[str, Tensor]:
    """The running statistics of the layers themselves, by the model's names. Nothing is copied."""
    return {f"{name}.{which}": layer._buffers[which] for name, layer in layers.items() for which in STATISTICS}


@contextmanager
def robust(layers: Mapping[str, _BatchNorm], values: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """For a while, layers normalise by `values` moved by `share` towards the statistics of the batch, and keep what comes of it there."""
    kept = [{which: layer._buffers[which] for which in STATISTICS} for layer in layers.values()]
    hooks = []
    try:
        for name, layer in layers.items():
            mean, variance = (values[f"{name}.{which}"] for which in STATISTICS)
            hooks.append(layer.register_forward_pre_hook(_mixing(layer, mean, variance, share)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, buffers in zip(layers.values(), kept, strict=True):
            layer._buffers.update(buffers)


def _mixing(layer: _BatchNorm, mean: Tensor, variance: Tensor, share: float) -> Callable[..., Any]:
    def before(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x = given[0]
        middle, spread = moments(x)
        mixed = mean.lerp(middle.to(mean), share), variance.lerp(spread.to(variance), share)
        mean.copy_(mixed[0])
        variance.copy_(mixed[1])
        layer._buffers.update(running_mean=mixed[0], running_var=mixed[1])
        return _ThroughStatistics.apply(x, middle, *mixed, share, layer.eps), *given[1:]

    return before


class _ThroughStatistics(torch.autograd.Function):
    """What goes into a layer, unchanged; to its gradient comes what goes through the batch's part of the statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, middle: Tensor, mean: Tensor, variance: Tensor, share: float, eps: float) -> Tensor:
        ctx.save_for_backward(x, middle, mean, variance)
        ctx.share, ctx.eps = share, eps
        return x.detach()  # of a view of one image that lies channels last, torch takes a wrong gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, middle, mean, variance), eps = gradients, ctx.saved_tensors, ctx.eps
        places, shape = x.numel() // (len(x) * x.shape[1]), [1, -1] + [1] * (x.dim() - 2)
        if places <= FEW and x.is_contiguous():  # torch's kernel is slow along short rows
            flat = gradient.flatten(1).to(middle.dtype)
            pull, lean = (value.sum(dim=0).view(-1, places).sum(dim=1) for value in (flat, flat * x.flatten(1)))
            lean = torch.addcmul(lean, mean, pull, value=-1).div_(variance + eps)
        else:
            frozen = None, mean, variance, None, None, False, eps, [False, True, True]
            _, lean, pull = torch.ops.aten.native_batch_norm_backward(gradient, x, *frozen)
            lean = lean * (variance + eps).rsqrt()
        weight = -ctx.share * x.shape[1] / x.numel()
        steep, level = weight * lean, weight * torch.addcmul(pull, lean, middle, value=-1)
        told = torch.addcmul(gradient, steep.view(shape), x).add_(level.view(shape))
        return told.to(gradient.dtype), None, None, None, None, None
