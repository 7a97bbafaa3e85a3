"""RoTTA's robust batch normalisation: a running mixture that a network is trained by, with gradients through the batch's part of it.

Yuan, Xie and Li, CVPR 2023, arXiv 2303.13899. With the statistics mean', var' that were kept so far and a share alpha for the batch

    mean = (1 - alpha) mean' + alpha mean_batch,    var = (1 - alpha) var' + alpha var_batch

normalise the batch and are kept for the next one. The variance of the batch is the biased one.
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
    before = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        mean, variance = (values[f"{name}.{which}"] for which in STATISTICS)
        layer.__dict__["forward"] = _normalising(layer, mean, variance, share)
    try:
        yield
    finally:
        for name, layer in layers.items():
            del layer.__dict__["forward"]
            if before[name] is not None:
                layer.__dict__["forward"] = before[name]


def _normalising(layer: _BatchNorm, mean: Tensor, variance: Tensor, share: float) -> Callable[[Tensor], Any]:
    def forward(x: Tensor) -> Tensor:
        over = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        spread, middle = torch.var_mean(x.float(), dim=over, correction=0)
        spread, middle = (1 - share) * variance + share * spread, (1 - share) * mean + share * middle
        mean.copy_(middle.detach())
        variance.copy_(spread.detach())
        scale = (spread + layer.eps).rsqrt()
        if layer.weight is not None:
            scale = scale * layer.weight
        shift = -middle * scale if layer.bias is None else layer.bias - middle * scale
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

    return forward
