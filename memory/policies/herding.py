"""Herding: the samples whose running mean stays nearest to the class mean, in that order (iCaRL, CVPR 2017).

Features are L2-normalised; p_k = argmin over the samples not yet chosen of || mean - (f + sum of the chosen) / k ||.
The first k of the list are the best k by this rule, so a smaller budget keeps a prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from streamcl.contracts import SelectionPolicy


class Herding(SelectionPolicy):
    needs_features = True

    def rank(self, features: Tensor, count: int, generator: torch.Generator) -> Tensor:
        features = normalize(features.double(), dim=1)
        mean = features.mean(dim=0)
        # ||k mean - sum - f||^2 is, up to what is the same for all f, 2 (sum - k mean) . f + ||f||^2: one product per step.
        squares = (features * features).sum(dim=1)
        towards_mean = features @ mean
        towards_sum = torch.zeros_like(towards_mean)
        chosen = torch.empty(count, dtype=torch.int64)
        for k in range(1, count + 1):
            pick = torch.argmin(2 * (towards_sum - k * towards_mean) + squares)
            chosen[k - 1] = pick
            towards_sum += features @ features[pick]
            squares[pick] = float("inf")
        return chosen
