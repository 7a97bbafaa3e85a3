"""One class per sample: accuracy, and how it is shared between the classes of the first task and those that came later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torchmetrics import SumMetric

from streamcl.errors import DataError
from streamcl.metrics import Answer, Room, Score


class Accuracy(torchmetrics.Metric):
    """The share of samples whose class has the highest score, over all samples and per class.

    The counts are integers, so that the result does not depend on batches or processes.
    """

    counts: Tensor  # (2, classes): samples that were right, and samples

    def __init__(self, room: Room, **settings: Any) -> None:
        super().__init__(**settings)
        self.room = room
        self.add_state("counts", torch.zeros(2, room.classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, answer: Answer) -> None:
        scores, target = answer.scores, answer.target
        assert scores is not None
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

    def _base_and_new(self) -> tuple[float | None, float | None]:
        first = min(self.room.arrived, default=0)
        base = {c for c in self.room.arrived.get(first, ()) if c < self.room.classes}
        parts = (sorted(base), [c for c in range(self.room.classes) if c not in base])
        counted = [self.counts[:, part].sum(dim=1).tolist() for part in parts]
        return tuple(right / samples if samples else None for right, samples in counted)  # type: ignore[return-value]


class BaseAccuracy(Accuracy):
    """The accuracy on the classes of the first task, among all classes seen."""

    def compute(self) -> Score:
        return Score(self._base_and_new()[0])


class NewAccuracy(Accuracy):
    """The accuracy on the classes that came after the first task, among all classes seen; nothing before there are any."""

    def compute(self) -> Score:
        return Score(self._base_and_new()[1])


class HarmonicMean(Accuracy):
    """2 a b / (a + b) of the accuracies on the first task's classes and on later ones; nothing where one of them is not scored."""

    def compute(self) -> Score:
        base, new = self._base_and_new()
        if base is None or new is None:
            return Score(None)
        return Score(2 * base * new / (base + new) if base + new else 0.0)


class _Confusion(Accuracy):
    """The share of some classes' samples that are taken for others: `counts` are samples of base and new classes, by what they were
    taken for."""

    row = 0

    def __init__(self, room: Room, **settings: Any) -> None:
        super().__init__(Room(2, room.arrived, room.threshold), **settings)
        first = room.arrived.get(min(room.arrived, default=0), ())
        self.new = torch.ones(max(room.classes, 1), dtype=torch.bool)
        self.new[[c for c in first if c < len(self.new)]] = False

    def update(self, answer: Answer) -> None:
        scores, target = answer.scores, answer.target
        assert scores is not None
        best, label = scores.max(dim=1)
        known = best.isfinite()
        new = torch.cat([self.new, self.new.new_ones(max(0, scores.shape[1] - len(self.new)))]).to(scores.device)  # predicted, never tested
        pairs = new[target[known]].long() * 2 + new[label[known]].long()
        self.counts += pairs.bincount(minlength=4).reshape(2, 2).to(self.counts.device)

    def compute(self) -> Score:
        taken, samples = int(self.counts[self.row, 1 - self.row]), int(self.counts[self.row].sum())
        return Score(taken / samples if samples else None)


class BaseAsNew(_Confusion):
    """The share of the first task's classes' samples that are taken for later classes."""


class NewAsBase(_Confusion):
    """The share of later classes' samples that are taken for classes of the first task."""

    row = 1


def total(available: Callable[[], bool], device: torch.device | str) -> SumMetric:
    """A running sum over all processes."""
    metric = SumMetric(distributed_available_fn=available)
    metric.set_dtype(torch.float64).to(device)
    return metric
