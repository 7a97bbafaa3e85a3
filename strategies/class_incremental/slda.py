"""SLDA: deep streaming linear discriminant analysis on frozen features (Hayes and Kanan, CVPR workshops 2020).

Per class a running mean mu_c, and one covariance S of samples about their own class's mean, for all classes. With n samples so far,

    L = pinv((1 - epsilon) S + epsilon I)        score_c = mu_c' L x - mu_c' L mu_c / 2

Classes without a sample are masked: the released code scores them 0, which wins wherever the others are negative.

The released code updates S sample by sample with e = x - mu_y before the update, S <- (n S + n/(n+1) e e') / (n+1), where n counts all
samples and the mean of a class that was not seen is 0. That depends on the order, and the first sample of each class enters whole, about
the origin. With n_y/(n_y+1) in the place of n/(n+1) it is the scatter within classes, divided by n: `scatter: exact`, the default here,
which equals batch LDA on everything seen, for every order, and of which samples can be taken back. `scatter: released` is the other.
`base: oas` is the released base initialisation: the covariance of the first task, shrunk by oracle-approximating shrinkage, counts as
that of its samples when the stream goes on. Without it the code's first S, all ones, is erased by the first sample, and is left out.

Defaults are the released ones, but for the scatter. Means and scatter are kept in float64.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import PositiveFloat, PositiveInt
from streamcl.stream import Batch, Task

from .simplecil import SimpleCIL


class SLDA(SimpleCIL):
    predicts_with = ("classifier",)

    def __init__(
        self,
        *,
        epsilon: PositiveFloat = 1e-4,
        scatter: Literal["exact", "released"] = "exact",
        base: Literal["stream", "oas"] = "stream",
        batch: PositiveInt = 128,
    ) -> None:
        super().__init__(batch=batch)
        if epsilon > 1:
            raise ConfigError(f"epsilon is the share of the identity in the covariance, above 0 and at most 1: it is {epsilon:g}")
        self.epsilon, self.exact, self.base, self.starting = epsilon, scatter == "exact", base, False
        self.added: Tensor | None = None  # scatter beside the memory's: all of the released form, what OAS made of the first task

    def configure(self) -> None:
        self.memory.prototypes.configure("shared" if self.exact else "none", dtype=torch.float64)

    def learn(self, task: Task) -> None:
        self.starting = self.base == "oas" and task.index == 0
        super().learn(task)
        if self.starting:
            count, covariance = self.covariance()
            shrunk = count * (shrunk_by_oas(covariance, count) - covariance)
            self.added = shrunk if self.added is None else self.added + shrunk
            self.changed()

    def take_in(self, features: Tensor, labels: Tensor) -> None:
        if not self.exact:
            self.stream(features, labels)
        super().take_in(features, labels)
        self.changed()

    def stream(self, x: Tensor, y: Tensor) -> None:
        """The sum of w e e' over a batch, as if its samples came one by one: w is n/(n+1), and n_y/(n_y+1) within a base task."""
        known, counts = self.memory.prototypes.labels(), self.memory.prototypes.counts()
        order = y.argsort(stable=True)
        x, y, n = x[order], y[order], (counts.sum() + order).double()
        classes, sizes = y.unique_consecutive(return_counts=True)
        had, sums = sizes.new_zeros(len(classes)), x.new_zeros(len(classes), x.shape[1])
        if len(known):
            match = classes[:, None] == known  # (classes of the batch, prototypes)
            had = (match * counts).sum(dim=1)
            sums = (match * counts).to(x) @ self.memory.prototypes.means()
        first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # where the class of each sample begins
        before = (torch.arange(len(y), device=y.device) - first + had.repeat_interleave(sizes)).double()  # n_y
        running = x.cumsum(dim=0) - x
        running += sums.repeat_interleave(sizes, dim=0) - running[first]
        e = x - running / before.clamp(min=1)[:, None]
        weight = before / (before + 1) if self.starting else n / (n + 1)
        update = (e * weight[:, None]).T @ e
        self.added = update if self.added is None else self.added + update

    def covariance(self) -> tuple[int, Tensor]:
        """n and S  # (dim, dim)"""
        prototypes = self.memory.prototypes
        counts = prototypes.counts()
        n = int(counts.sum())
        dim = prototypes.means().shape[1]
        scatter = prototypes.means().new_zeros(dim, dim)
        if self.exact:
            scatter += prototypes.covariances() * (n - len(counts))  # what the memory divides by is one less for each class
        if self.added is not None:
            scatter += self.added
        return n, scatter / n

    @cached_property
    def classifier(self) -> Tensor:
        """L mu of each prototype, and -mu' L mu / 2 in the last row  # (dim + 1, prototypes)"""
        _, covariance = self.covariance()
        means = self.memory.prototypes.means()
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        weights = torch.linalg.pinv((1 - self.epsilon) * covariance + self.epsilon * identity, hermitian=True) @ means.T
        return torch.cat([weights, -0.5 * (means.T * weights).sum(dim=0, keepdim=True)])

    def changed(self) -> None:
        self.__dict__.pop("classifier", None)

    def score(self, features: Tensor) -> Tensor:
        return features @ self.classifier[:-1] + self.classifier[-1]

    def erase(self, samples: Batch) -> tuple[str, ...]:
        """Exact in the exact form. The released one goes by the order in which all came, and OAS by its first task: nothing is erased."""
        if not self.exact or self.base == "oas":
            return ()
        self.changed()
        return super().erase(samples)

    def state(self) -> dict[str, Any]:
        return {"added": self.added}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.added = None if state["added"] is None else state["added"].to(self.context.device)
        self.changed()


def shrunk_by_oas(covariance: Tensor, count: int) -> Tensor:
    """The covariance of `count` samples about a known mean, shrunk towards a multiple of the identity (Chen et al., 2010)."""
    dim = len(covariance)
    mean, square = covariance.diagonal().mean(), covariance.square().mean()
    spread = float((count + 1) * (square - mean**2 / dim))
    shrinkage = min(1.0, float(square + mean**2) / spread) if spread > 0 else 1.0
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * mean)
    return shrunk
