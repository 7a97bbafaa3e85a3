"""FeCAM: the Mahalanobis distance to each class's mean under its own covariance, on frozen features (Goswami et al., NeurIPS 2023).

Classes that the backbone was not trained on spread unevenly, so the Euclidean distance to their means misleads. For each class c:

    t = f^beta (log f for beta 0)                       Tukey's transform, which needs features of at least 0
    S = cov(t)                                          over the class's samples
    S <- S + alpha1 V1 I + alpha2 V2 (1 - I)            V1 the mean variance, V2 the mean of the covariances that are not 0
    N[i, j] = S[i, j] / sqrt(S[i, i] S[j, j])           so that classes of different spread can be compared
    u = t/|t| - m/|m|,  m = (mean of the raw f)^beta    D_c = u' pinv(N) u        the smallest decides

`covariance: diagonal` keeps the variances alone (shrunk, and divided by their length, as the released code does); `common` one matrix for
all, S <- (C_old/C) S + (C_new/C) S_new with the shrunk covariance of all samples of a task, not divided by deviations. `tukey: null` is
the form for a frozen ViT: f is divided by its length, m is the plain mean of that, and u = f - m (with alpha2 = 0 in the paper).

Choices. The released code classifies after the first task by the Euclidean distance to the rows of the head that it trained there; with a
backbone that was trained before there is no such head, and the rule above holds from the start. It shrinks each covariance of the ResNet
form twice (`shrinkages: 2`), the paper and the default once. A class without any spread (one sample) is measured with the covariance
pooled over all. Sums and scatters are kept in float64. Train the backbone by `model.pretrain`, or take one that is.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from streamcl.errors import ConfigError
from streamcl.options import NonNegativeFloat, PositiveFloat, PositiveInt
from streamcl.stream import Batch, Task

from .simplecil import SimpleCIL


class FeCAM(SimpleCIL):
    predicts_with = ("centres", "precisions")

    def __init__(
        self,
        *,
        tukey: NonNegativeFloat | None = 0.5,
        alpha1: PositiveFloat = 1.0,
        alpha2: NonNegativeFloat = 1.0,
        shrinkages: PositiveInt = 1,
        covariance: Literal["full", "diagonal", "common"] = "full",
        batch: PositiveInt = 128,
    ) -> None:
        super().__init__(batch=batch)
        self.tukey, self.alpha1, self.alpha2, self.shrinkages, self.covariance = tukey, alpha1, alpha2, shrinkages, covariance
        self.sums = torch.empty(0, 0, dtype=torch.float64)  # of raw features, by class
        self.common: dict[str, Tensor] = {}  # of the common covariance: it, and what the task at hand has summed for the next

    def configure(self) -> None:
        self.memory.prototypes.configure("none" if self.covariance == "common" else self.covariance, dtype=torch.float64)
        self.sums = self.sums.to(self.context.device)

    def learn(self, task: Task) -> None:
        super().learn(task)
        if self.covariance == "common":
            self.blend(len(task.classes) / len(task.seen))
            self.changed()

    # -- statistics -------------------------------------------------------------------------------------------------------------

    def transform(self, features: Tensor) -> Tensor:
        """What covariances are of: f^beta, or the directions of f."""
        if self.tukey is None:
            return normalize(features, dim=1)
        least = float(features.min())
        if least < 0 or (least == 0 and self.tukey == 0):
            wants = (
                "the logarithm of features, which must be above 0" if self.tukey == 0 else "a root of features, which must be at least 0"
            )
            raise ConfigError(
                f"fecam takes {wants}, and the backbone gives {least:.3g}: set strategy.tukey=null, the form for frozen transformers, or "
                "take a backbone that ends in a ReLU" + (" and a tukey above 0" if self.tukey == 0 else "")
            )
        return self.power(features)

    def power(self, values: Tensor) -> Tensor:
        return values if self.tukey is None else values.log() if self.tukey == 0 else values**self.tukey

    def take_in(self, features: Tensor, labels: Tensor) -> None:
        transformed = self.transform(features)
        self.memory.prototypes.update(transformed, labels)
        self.add_up(features, labels, 1.0)
        if self.covariance == "common":
            sums = {"count": len(labels), "sum": transformed.sum(dim=0), "squares": transformed.T @ transformed}
            self.common |= {name: self.common.get(name, 0) + torch.as_tensor(value) for name, value in sums.items()}
        self.changed()

    def give_back(self, features: Tensor, labels: Tensor) -> None:
        self.memory.prototypes.remove(self.transform(features), labels)
        self.add_up(features, labels, -1.0)
        self.changed()

    def add_up(self, features: Tensor, labels: Tensor, times: float) -> None:
        if self.tukey is None:  # the mean of the directions is the memory's own
            return
        more = max(0, int(labels.max()) + 1 - len(self.sums))
        self.sums = pad(self.sums, (0, features.shape[1] - self.sums.shape[1], 0, more))
        self.sums.index_add_(0, labels, features, alpha=times)

    def blend(self, share: float) -> None:
        """The common covariance after a task, of whose classes this share of all is new."""
        if "count" not in self.common:
            return
        count, total, squares = (self.common.pop(name) for name in ("count", "sum", "squares"))
        new = self.shrink((squares - total[:, None] * total / count) / (count - 1).clamp(min=1))
        old = self.common.get("covariance", new)
        self.common["covariance"] = (1 - share) * old + share * new

    # -- the rule ---------------------------------------------------------------------------------------------------------------

    def shrink(self, covariance: Tensor) -> Tensor:
        """S + alpha1 V1 I + alpha2 V2 (1 - I), as often as asked for  # (..., dim, dim)"""
        identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        for _ in range(self.shrinkages):
            apart = covariance * (1 - identity)
            v1 = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
            v2 = apart.sum(dim=(-2, -1), keepdim=True) / (apart != 0).sum(dim=(-2, -1), keepdim=True).clamp(min=1)
            covariance = covariance + self.alpha1 * v1 * identity + self.alpha2 * v2 * (1 - identity)
        return covariance

    @cached_property
    def precisions(self) -> Tensor:
        """The inverse of each N  # (prototypes, dim, dim), (prototypes, dim) where diagonal, (1, dim, dim) where common"""
        prototypes = self.memory.prototypes
        means = prototypes.means()
        if self.covariance == "common":
            return inverse(self.common["covariance"][None]) if "covariance" in self.common else torch.eye(means.shape[1]).to(means)[None]
        full = self.covariance == "full"
        covariances, freedom = prototypes.covariances(), (prototypes.counts() - 1).to(means)
        variances = covariances.diagonal(dim1=-2, dim2=-1) if full else covariances
        flat = variances.mean(dim=1) <= 1e-28 * means.square().mean(dim=1)  # no more than rounding leaves
        if bool(flat.any()):
            pooled = torch.tensordot(freedom, covariances, dims=1) / freedom.sum().clamp(min=1)
            if not bool(pooled.any()):
                pooled = torch.eye(means.shape[1]).to(means) if full else torch.ones_like(pooled)
            covariances = torch.where(flat.view(-1, *[1] * pooled.dim()), pooled, covariances)
        if not full:
            for _ in range(self.shrinkages):
                covariances = covariances + self.alpha1 * covariances.mean(dim=1, keepdim=True)
            return 1 / normalize(covariances, dim=1)
        shrunk = self.shrink(covariances)
        deviations = shrunk.diagonal(dim1=-2, dim2=-1).sqrt()
        return inverse(shrunk / deviations[:, :, None] / deviations[:, None, :])

    @cached_property
    def centres(self) -> Tensor:
        """What u is measured from  # (prototypes, dim)"""
        prototypes = self.memory.prototypes
        if self.tukey is None:
            return prototypes.means()
        means = self.sums[prototypes.labels()] / prototypes.counts()[:, None]
        return normalize(self.power(means.clamp(min=0)), dim=1)

    def changed(self) -> None:
        self.__dict__.pop("precisions", None)
        self.__dict__.pop("centres", None)

    def score(self, features: Tensor) -> Tensor:
        x, common = normalize(self.transform(features), dim=1), len(self.precisions) == 1
        distances = []
        for row, centre in enumerate(self.centres):  # a class at a time: (batch, classes, dim) would be large
            u, precision = x - centre, self.precisions[0 if common else row]
            distances.append(((u @ precision if precision.dim() == 2 else u * precision) * u).sum(dim=1))
        return -torch.stack(distances, dim=1)

    # -- what is kept -----------------------------------------------------------------------------------------------------------

    def erase(self, samples: Batch) -> tuple[str, ...]:
        """Exact, but for the common covariance: those of its tasks are not kept apart, so nothing is erased there."""
        return () if self.covariance == "common" else (*super().erase(samples), "sums")

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "common": self.common}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.sums = state["sums"].to(self.context.device)
        self.common = {name: value.to(self.context.device) for name, value in state["common"].items()}
        self.changed()


def inverse(matrices: Tensor) -> Tensor:
    """The inverse of each symmetric matrix; the pseudo-inverse of those that are not positive definite  # (matrices, dim, dim)"""
    factors, failed = torch.linalg.cholesky_ex(matrices)
    out = torch.cholesky_inverse(factors).contiguous()  # in the layout of an exported copy, whose products are then the same bit for bit
    bad = failed > 0
    if bool(bad.any()):
        out[bad] = torch.linalg.pinv(matrices[bad], hermitian=True)
    return out
