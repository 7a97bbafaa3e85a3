"""Values instead of classes (regression): errors, correlation, and the accuracies that sentiment scores from -3 to 3 are reported by.

All sums are in float64. With several values per sample each figure is the mean over them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from streamcl.errors import DataError, PluginError
from streamcl.metrics import Answer, Room, Score


class _Sums(torchmetrics.Metric):
    """Sums over the samples, one row of figures per value."""

    sums: Tensor  # (figures, values)
    samples: Tensor
    figures = 1

    def __init__(self, room: Room, **settings: Any) -> None:
        super().__init__(**settings)
        self.set_dtype(torch.float64)
        self.add_state("sums", torch.zeros(self.figures, max(room.classes, 1), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, answer: Answer) -> None:
        assert answer.scores is not None
        target = answer.target.double().reshape(len(answer.batch), -1)
        predicted = answer.scores.double().reshape(len(answer.batch), -1)
        if predicted.shape != target.shape:
            raise PluginError(f"the strategy predicts {predicted.shape[1]} values and the targets have {target.shape[1]}")
        if not bool(target.isfinite().all()):
            raise DataError("a sample that is scored has a target that is NaN or infinite")
        self.sums += self.terms(predicted.to(self.sums.device), target.to(self.sums.device))
        self.samples += len(answer.batch)

    @abstractmethod
    def terms(self, predicted: Tensor, target: Tensor) -> Tensor:
        """What a batch adds to the sums  # (figures, values)"""

    def compute(self) -> Score:
        return Score(self.value(self.sums, int(self.samples)) if int(self.samples) else None)

    def value(self, sums: Tensor, samples: int) -> float | None:
        return float(sums[0].mean() / samples)


class MeanAbsoluteError(_Sums):
    """The mean of |prediction - target|."""

    def terms(self, predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted - target).abs().sum(0, keepdim=True)


class RootMeanSquaredError(_Sums):
    """The root of the mean squared error."""

    def terms(self, predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted - target).square().sum(0, keepdim=True)

    def value(self, sums: Tensor, samples: int) -> float | None:
        return float((sums[0] / samples).sqrt().mean())


class Correlation(_Sums):
    """Pearson's correlation of predictions and targets; nothing where either does not vary."""

    figures = 5

    def terms(self, predicted: Tensor, target: Tensor) -> Tensor:
        return torch.stack([part.sum(0) for part in (predicted, target, predicted.square(), target.square(), predicted * target)])

    def value(self, sums: Tensor, samples: int) -> float | None:
        p, t, pp, tt, pt = sums / samples
        spread = ((pp - p * p).clamp(min=0) * (tt - t * t).clamp(min=0)).sqrt()
        return float(((pt - p * t) / spread).mean()) if bool((spread > 0).all()) else None


class SignAccuracy(_Sums):
    """Acc-2 of CMU-MOSI: whether the sign is right, over the samples whose target is not zero."""

    figures = 2

    def terms(self, predicted: Tensor, target: Tensor) -> Tensor:
        told = target != 0
        return torch.stack([(((predicted > 0) == (target > 0)) & told).sum(0), told.sum(0)]).double()

    def value(self, sums: Tensor, samples: int) -> float | None:
        return float((sums[0] / sums[1]).mean()) if bool((sums[1] > 0).all()) else None


class SevenClassAccuracy(_Sums):
    """Acc-7 of CMU-MOSI: whether prediction and target, held to -3 to 3, round to the same whole number."""

    def terms(self, predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted.clamp(-3, 3).round() == target.clamp(-3, 3).round()).double().sum(0, keepdim=True)
