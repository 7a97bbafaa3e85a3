"""TEEN: prototypes of new classes are drawn towards the base classes that they resemble, without training (Wang et al., NeurIPS 2023).

A prototype of a few samples is a bad mean, and most errors take a new class for a base class. With directions c' = c/|c|:

    w_nb = softmax over the base classes b of (tau x cos(p_n, p_b))
    d_n  = normalise(sum over b of w_nb p_b')
    p_n <- (1 - alpha) p_n' + alpha d_n                       for every class n that is not of the base session

Everything else is `proto`: base session, means, cosines. Classes of earlier sessions are not calibrated towards, base prototypes stay as
they are. alpha is 0.5 (CUB-200, miniImageNet; 0.1 for CIFAR-100) and tau 16 by default; scale 32 on those two data sets, 16 on CIFAR-100.
The memory holds the plain means; the calibrated ones follow from them, so a class that comes back, or a sample that is erased, is exact.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from streamcl.options import Fraction, NonNegativeFloat
from streamcl.stream import Task

from .proto import Proto


class TEEN(Proto):
    def __init__(self, *, alpha: Fraction = 0.5, tau: NonNegativeFloat = 16.0, **options: Any) -> None:
        super().__init__(**options)
        self.alpha, self.tau = alpha, tau
        self.base = torch.empty(0, dtype=torch.int64)  # the classes of the first session

    def enter_task(self, task: Task) -> None:
        if task.index == 0:
            self.base = torch.tensor(task.classes, dtype=torch.int64)

    @cached_property
    def prototypes(self) -> Tensor:
        means, labels = normalize(self.memory.prototypes.means(), dim=1), self.memory.prototypes.labels()
        of_base = torch.isin(labels, self.base.to(labels.device))
        return torch.where(of_base[:, None], means, calibrated(means, means[of_base], self.alpha, self.tau))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "base": self.base}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore({key: value for key, value in state.items() if key != "base"})
        self.base = state["base"].cpu()


def calibrated(new: Tensor, base: Tensor, alpha: float, tau: float) -> Tensor:
    """(1 - alpha) new + alpha x the direction that the base prototypes have, weighted by resemblance  # (new, dim)

    All are of length one.
    """
    weights = torch.softmax(tau * linear(new, base), dim=1)  # (new, base)
    return (1 - alpha) * new + alpha * normalize(weights @ base, dim=1)
