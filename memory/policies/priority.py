"""Priority: of each class, the samples of the highest score (importance, difficulty, loss); of equal ones those that came first.

The score is one number for each sample and comes with it (`add(..., scores=...)`). What is held and what is offered are ranked
together, so a sample that was kept gives way to a later one of a higher score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy


class Priority(SelectionPolicy):
    needs = ("scores",)
    merges = True

    def rank(self, features: Tensor, scores: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        assert scores is not None
        return scores.sort(descending=True, stable=True).indices[:count].cpu()
