"""The metrics that a stream can name, one small class each, on torchmetrics (seconds to import: import this module when scoring begins)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torchmetrics
from torch import Tensor
from torchmetrics import SumMetric

from streamcl.errors import DataError


class Score(NamedTuple):
    """What a metric says: one number (None where there was nothing to score), and one per class where it has that."""

    value: float | None
    per_class: list[float | None] | None = None


class Metric(Protocol):
    """What the evaluation needs of a metric. One instance is made per column of the matrix and one per union of columns.

    A score of -inf is a class that was not offered; a row of nothing but -inf is a sample without an answer.
    """

    def update(self, scores: Tensor, target: Tensor) -> None: ...

    def compute(self) -> Score: ...


class Accuracy(torchmetrics.Metric):
    """The share of samples whose class has the highest score, over all samples and per class.

    The counts are integers, so that the result does not depend on batches or processes.
    """

    counts: Tensor  # (2, classes): samples that were right, and samples

    def __init__(self, classes: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("counts", torch.zeros(2, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor) -> None:
        if target.dim() != 1 or target.is_floating_point():
            raise DataError(f"accuracy needs one class per sample, and the targets are {target.dtype} of shape {tuple(target.shape)}")
        best, label = scores.max(dim=1)
        right = target[(label == target) & best.isfinite()]
        classes = self.counts.shape[1]
        self.counts += torch.stack([right.bincount(minlength=classes), target.bincount(minlength=classes)]).to(self.counts.device)

    def compute(self) -> Score:
        right, samples = self.counts.tolist()
        total = sum(samples)
        per_class = [hits / count if count else None for hits, count in zip(right, samples, strict=True)]
        return Score(sum(right) / total if total else None, per_class)


def total(available: Callable[[], bool], device: torch.device | str) -> SumMetric:
    """A running sum over all processes."""
    metric = SumMetric(distributed_available_fn=available)
    metric.set_dtype(torch.float64).to(device)
    return metric
