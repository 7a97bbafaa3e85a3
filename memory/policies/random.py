"""Random selection: of each class, samples drawn without replacement; the baseline of every other policy."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy


class Random(SelectionPolicy):
    def rank(self, features: Tensor, scores: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(features), generator=generator)[:count]
