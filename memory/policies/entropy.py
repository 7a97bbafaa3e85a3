"""Entropy: of each class, the samples that the model was least sure of when they were offered (`keep: highest`), or surest of (`lowest`).

The model's logits or probabilities come with the samples, as their scores  # (batch, classes). Of each row -sum p ln p is kept: rows
that are distributions (nothing below 0, a sum of 1) are taken as they are, others through a softmax. A score that is one number
already is the entropy itself. Of equal ones those stay that came first. What is held keeps the entropy that it came with and is
ranked together with what is offered. RWalk (ECCV 2018) draws samples by their entropy, the higher the likelier; here the order is strict.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy


class Entropy(SelectionPolicy):
    needs = ("logits",)
    merges = True

    def __init__(self, *, keep: Literal["highest", "lowest"] = "highest") -> None:
        self.keep = keep

    def score(self, scores: Tensor) -> Tensor:
        if scores.dim() == 1:
            return scores
        rows = scores.double()
        distributions = (rows >= 0).all(dim=1) & ((rows.sum(dim=1) - 1).abs() < 1e-3)
        return torch.special.entr(torch.where(distributions[:, None], rows, rows.softmax(dim=1))).sum(dim=1)

    def rank(self, features: Tensor, scores: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        assert scores is not None
        return self.score(scores).sort(descending=self.keep == "highest", stable=True).indices[:count].cpu()
