"""LAME: the answers of a batch are corrected so that neighbours in feature space agree; no weight ever changes.

Boudiaf et al., CVPR 2022, arXiv 2201.05718. For logits z and features f of a batch, q = softmax(z), U = -log q, and W_ij says how alike
the unit vectors of f_i and f_j are. The answers Y (a distribution per sample) minimise the Laplacian objective

    E(Y) = sum_i y_i . U_i  -  lam * sum_ij W_ij y_i . y_j  +  sum_i y_i . log y_i

by the fixed point  Y <- softmax(-U + lam W Y),  row by row, from Y = q.

    rbf     W_ij = exp(-d_ij^2 / 2 s^2), s the mean distance to the k-th neighbour     (the default of the released code)
    knn     W_ij = 1 for the k nearest of i, itself excluded
    linear  W_ij = cosine similarity

As in the released code W is not made symmetric, the diagonal of rbf and linear stays, and rbf counts a sample as the first of its own k.
Its energy is looked at after every fifth step instead of each, so that a device is not waited for a hundred times per batch. With lam
other than 1 the released energy has lam twice, which only moves the step at which it stops: here it has it once. The network answers
with its own running statistics in batch normalisation, untouched, as the paper says.

The scores are log Y: softmax of them gives Y, and whoever expects logits may go on with them. A batch of one has no neighbours: its
answer is the network's own. This helps where neighbours in time share classes, and harms where classes are shuffled and the features are
bad; where the network is near chance there is nothing to agree upon.

Evidence: small real data
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from streamcl.adapting import AdaptingStrategy
from streamcl.options import NonNegativeFloat, PositiveInt
from streamcl.stream import Batch

EPSILON = 1e-10  # keeps the logarithm of a probability that is 0 finite
STEPS, LOOKS, TOLERANCE = 100, 5, 1e-8  # at most; how many between two looks at the energy; its relative change that is none


class Lame(AdaptingStrategy):
    """`affinity` says how alike two samples are, over `k` neighbours; `lam` weighs agreement against the network's own answer (0: none)."""

    batch_statistics: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    reads_batch: ClassVar[bool] = True

    def __init__(self, *, affinity: Literal["rbf", "knn", "linear"] = "rbf", k: PositiveInt = 5, lam: NonNegativeFloat = 1.0) -> None:
        super().__init__()
        self.affinity, self.k, self.lam = affinity, k, lam

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def update(self, batch: Batch) -> Tensor:
        return self.forward(batch)

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            logits, features = self.model.both(batch)
            if len(batch) < 2:
                return logits
            return assigned(logits.float(), self.alike(features.float().flatten(1)), self.lam)

    def alike(self, features: Tensor) -> Tensor:
        """W  # (batch, batch)"""
        unit = normalize(features, dim=1)
        if self.affinity == "linear":
            return unit @ unit.mT
        squared = (2 - 2 * unit @ unit.mT).clamp_(min=0).fill_diagonal_(0)  # squared distances of unit vectors
        if self.affinity == "rbf":
            reach = squared.kthvalue(min(max(self.k, 2), len(unit)), dim=1).values.sqrt().mean()
            return (-0.5 * squared / reach.square().clamp(min=torch.finfo(unit.dtype).tiny)).exp()
        nearest = squared.fill_diagonal_(torch.inf).topk(min(self.k, len(unit) - 1), dim=1, largest=False).indices
        return torch.zeros_like(squared).scatter_(1, nearest, 1.0)


def assigned(logits: Tensor, alike: Tensor, lam: float) -> Tensor:
    """log Y at the fixed point  # (batch, classes)"""
    log_q = (logits.softmax(dim=1) + EPSILON).log()  # -U
    log_y, before = log_q.log_softmax(dim=1), torch.nan
    for step in range(1, STEPS + 1):
        y = log_y.exp()
        pull = lam * (alike @ y)
        if step % LOOKS == 0:
            now = energy(y, log_y, log_q, pull)
            if abs(now - before) <= TOLERANCE * abs(before):
                break
            before = now
        log_y = (log_q + pull).log_softmax(dim=1)
    return log_y


def energy(y: Tensor, log_y: Tensor, log_q: Tensor, pull: Tensor) -> float:
    """E(Y), where `pull` is lam W Y"""
    return float((y * (log_y - log_q - pull)).sum(dtype=torch.float64))
