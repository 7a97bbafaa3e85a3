"""RoTTA's robust batch normalisation: a running mixture that a network is trained by, with gradients through the batch's part of it.

Yuan, Xie and Li, CVPR 2023, arXiv 2303.13899. With the statistics mean', var' that were kept so far and a share alpha for the batch

    mean = (1 - alpha) mean' + alpha mean_batch,    var = (1 - alpha) var' + alpha var_batch

normalise the batch and are kept for the next one. The variance of the batch is the biased one.

What a layer is given is normalised before it gets there, and its own statistics are 0 and 1 meanwhile: its `forward` stays its own, also
where a library has put an activation into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

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
            hooks.append(layer.register_forward_pre_hook(_normalising(layer, mean, variance, share)))
            layer._buffers.update(running_mean=torch.zeros_like(mean), running_var=torch.full_like(variance, 1 - layer.eps))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, buffers in zip(layers.values(), kept, strict=True):
            layer._buffers.update(buffers)


def _normalising(layer: _BatchNorm, mean: Tensor, variance: Tensor, share: float) -> Callable[..., Any]:
    def before(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x = given[0]
        over = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        spread, middle = torch.var_mean(x.float(), dim=over, correction=0)
        spread, middle = (1 - share) * variance + share * spread, (1 - share) * mean + share * middle
        mean.copy_(middle.detach())
        variance.copy_(spread.detach())
        return ((x - middle.view(shape)) * (spread + layer.eps).rsqrt().view(shape)).to(x.dtype), *given[1:]

    return before
