"""Herding: the samples whose running mean stays nearest to the class mean, in that order (iCaRL, CVPR 2017).

Features are L2-normalised; p_k = argmin over the samples not yet chosen of || mean - (f + sum of the chosen) / k ||, and of those that
are equally near, up to rounding, the first: ties are common, the last two samples of a class are always one. The mean is not normalised
again, as in the code of iCaRL and of PyCIL. The first k of the list are the best k by this rule, so a smaller budget keeps a prefix.

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
TIE = 1e-12  # distances, times k, that differ by less are equal: so much can rounding do to them


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
        distances = torch.linalg.vector_norm(unit + (total - k * mean), dim=1) + taken
        pick = (distances <= distances.min() + TIE).to(torch.uint8).argmax()
        chosen[k - 1] = pick
        total += unit[pick]
        taken[pick] = torch.inf
    return chosen


def _screened(features: Tensor, count: int) -> Tensor:
    """|| f + sum - k mean ||^2 = 2 f . (sum - k mean) + ||f||^2 + what is the same for all: one product tells who is near."""
    lengths, mean = torch.empty(len(features), dtype=torch.float64), torch.zeros(features.shape[1], dtype=torch.float64)
    buffer = torch.empty(ROWS, features.shape[1], dtype=torch.float64)
    for start in range(0, len(features), ROWS):
        part = features[start : start + ROWS]
        rows = buffer[: len(part)].copy_(part)
        length = lengths[start : start + ROWS] = torch.linalg.vector_norm(rows, dim=1)
        mean += length.clamp(min=TINY).reciprocal_() @ rows
    if float(lengths.max()) > 1e30:  # float32 could overflow
        return _plain(features, count)
    table = features.float().contiguous().numpy()
    scale = 1 / lengths.numpy().clip(min=TINY)
    own = (lengths.numpy() * scale) ** 2
    scale *= 2
    # A product of d terms is off by d units in the last place at most, and its factors are rounded; 2 f . w is twice that, for the
    # nearest and for whom it is compared with. The lengths are right to float64, and squares of distances up to 1 + |w| may tie.
    worst = 4.1 * (features.shape[1] + 4)
    # In NumPy, where what is small costs a third, and a product half on some processors.
    middle, total = mean.numpy() / len(features), np.zeros(features.shape[1])
    chosen: list[int] = []
    for k in range(1, count + 1):
        towards = total - k * middle
        nearly = (table @ towards.astype(np.float32)) * scale + own
        far = np.linalg.norm(towards)
        near = np.flatnonzero(nearly <= nearly.min() + worst * (2.0**-24 * far + 2.0**-53) + 2 * TIE * (1 + far))
        rows = _unit(features[torch.from_numpy(near)])
        distances = np.linalg.norm(rows.numpy() + towards, axis=1)
        pick = int((distances <= distances.min() + TIE).argmax())
        chosen.append(int(near[pick]))
        total += rows[pick].numpy()
        own[chosen[-1]] = np.inf
    return torch.tensor(chosen, dtype=torch.int64)


def _unit(features: Tensor) -> Tensor:
    return normalize(features.double(), dim=1, eps=TINY)
