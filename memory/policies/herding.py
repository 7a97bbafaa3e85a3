"""Herding: the samples whose running mean stays nearest to the class mean, in that order (iCaRL, CVPR 2017).

Features are L2-normalised; p_k = argmin over the samples not yet chosen of || mean - (f + sum of the chosen) / k ||; of equal ones
the first. The mean is not normalised again, as in the code of iCaRL and of PyCIL. The first k of the list are the best k by this rule,
so a smaller budget keeps a prefix.

The distances are those of float64. On the CPU a product in float32 finds the few samples that can be the nearest, given how far it can
be wrong, and only theirs are computed; elsewhere all are, where the features lie and without waiting for the device (this has not been
run on a GPU). Devices without float64 hand over to the CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from streamcl.contracts import SelectionPolicy

ROWS = 512  # normalised at a time: in float64 they stay in the cache
TINY = 1e-12  # vectors shorter than this are as good as zero, and stay so


class Herding(SelectionPolicy):
    needs = ("features",)

    def rank(self, features: Tensor, scores: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        features = features.detach().cpu() if features.device.type == "mps" else features.detach()
        return (_screened if features.device.type == "cpu" else _plain)(features, min(count, len(features))).cpu()


def _plain(features: Tensor, count: int) -> Tensor:
    unit = _unit(features)
    mean, total = unit.mean(dim=0), torch.zeros_like(unit[0])
    taken = unit.new_zeros(len(unit))
    chosen = torch.empty(count, dtype=torch.int64, device=unit.device)
    for k in range(1, count + 1):
        pick = ((mean - (unit + total) / k).square_().sum(dim=1) + taken).argmin()
        chosen[k - 1] = pick
        total += unit[pick]
        taken[pick] = torch.inf
    return chosen


def _screened(features: Tensor, count: int) -> Tensor:
    """|| mean - (f + sum) / k ||^2 = (2 f . (sum - k mean) + ||f||^2 + what is the same for all) / k^2: one product tells who is near."""
    narrow = torch.empty(features.shape, dtype=torch.float32)
    mean, squares = torch.zeros(features.shape[1], dtype=torch.float64), torch.empty(len(features), dtype=torch.float64)
    buffer = torch.empty(ROWS, features.shape[1], dtype=torch.float64)
    for start in range(0, len(features), ROWS):
        part = features[start : start + ROWS]
        unit = buffer[: len(part)].copy_(part)
        lengths = torch.linalg.vector_norm(unit, dim=1)
        scale = lengths.clamp(min=TINY).reciprocal_()
        mean += scale @ unit
        narrow[start : start + ROWS] = unit.mul_(scale[:, None])
        squares[start : start + ROWS] = (lengths * scale).square_()
    # Of a product of d terms no rounding in float32 is worse than d units in the last place, and the factors are rounded before.
    worst = 1.01 * (features.shape[1] + 4) * 2.0**-24
    middle, total, own = mean.numpy() / len(features), np.zeros(features.shape[1]), squares.numpy()
    product = torch.empty(len(features))
    chosen = []
    for k in range(1, count + 1):  # in NumPy, where what is small costs a third
        towards = total - k * middle
        torch.mv(narrow, torch.from_numpy(towards.astype(np.float32)), out=product)
        nearly = product.numpy() * np.float64(2) + own
        near = np.flatnonzero(nearly <= nearly.min() + 4 * worst * np.linalg.norm(towards))
        unit = _unit(features[torch.from_numpy(near)]).numpy()
        pick = int(np.square(middle - (unit + total) / k).sum(axis=1).argmin()) if len(near) > 1 else 0
        chosen.append(int(near[pick]))
        total += unit[pick]
        own[chosen[-1]] = np.inf
    return torch.tensor(chosen, dtype=torch.int64)


def _unit(features: Tensor) -> Tensor:
    return normalize(features.double(), dim=1, eps=TINY)
