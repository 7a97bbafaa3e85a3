"""Any number of labels per sample: average precision and F1, over all classes and over those that one task brought.

Scores are logits. What is not annotated (-1) is left out of every count.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from streamcl.errors import DataError
from streamcl.metrics import Answer, Room, Score


def _checked(answer: Answer, name: str) -> tuple[Tensor, Tensor]:
    """Scores and targets of equal width; a class that the strategy has no score for ranks last."""
    scores, target = answer.scores, answer.target
    assert scores is not None
    if target.dim() != 2 or target.is_floating_point():
        raise DataError(f"{name} needs a matrix of labels, and the targets are {target.dtype} of shape {tuple(target.shape)}")
    short = target.shape[1] - scores.shape[1]
    if short > 0:
        scores = torch.cat([scores, scores.new_full((len(scores), short), -math.inf)], dim=1)
    return scores[:, : target.shape[1]], target


class MeanAveragePrecision(torchmetrics.Metric):
    """The mean over the classes of AP: the sum over the thresholds of precision times the gain in recall.

    Without ties this is the mean of the precision at the rank of each positive, as the multi-label streams are published; equal
    scores share a threshold, so that the order of the samples says nothing. A class without a positive is left out.
    """

    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self, room: Room, **settings: Any) -> None:
        super().__init__(**settings)
        self.room = room
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, answer: Answer) -> None:
        scores, target = _checked(answer, "map")
        width = self.room.classes
        missing = width - target.shape[1]
        self.scores.append(torch.nn.functional.pad(scores.float(), (0, missing), value=-math.inf).cpu())
        self.targets.append(torch.nn.functional.pad(target, (0, missing), value=-1).to(torch.int8).cpu())

    def compute(self) -> Score:
        if not len(self.scores):
            return Score(None, [None] * self.room.classes)
        scores, targets = (torch.cat(part) if isinstance(part, list) else part for part in (self.scores, self.targets))
        per_class = [average_precision(scores[:, c], targets[:, c]) for c in range(self.room.classes)]

        def of(classes: Sequence[int]) -> float | None:
            known = [value for c in classes if c < len(per_class) and (value := per_class[c]) is not None]
            return math.fsum(known) / len(known) if known else None

        return Score(of(range(self.room.classes)), per_class, {task: of(classes) for task, classes in self.room.arrived.items()})


def average_precision(scores: Tensor, target: Tensor) -> float | None:
    """The area under precision and recall by steps, as scikit-learn defines it; None without a positive."""
    known = target >= 0
    scores, positive = scores[known], target[known] == 1
    count = int(positive.sum())
    if count == 0:
        return None
    order = scores.argsort(descending=True, stable=True)
    ranked = scores[order]
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])  # of the samples that share a score
    hits = positive[order].double().cumsum(0)[last]
    taken = torch.arange(1, len(ranked) + 1, dtype=torch.float64)[last]
    return float((hits / taken * hits.diff(prepend=hits.new_zeros(1))).sum() / count)


class _F1(torchmetrics.Metric):
    """Counts of labels that were given rightly, given, true, and annotated, by class.

    A label is given above the prediction's threshold, or above `room.threshold` where it names none.
    """

    counts: Tensor  # (4, classes)

    def __init__(self, room: Room, **settings: Any) -> None:
        super().__init__(**settings)
        self.room = room
        self.add_state("counts", torch.zeros(4, room.classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, answer: Answer) -> None:
        scores, target = _checked(answer, "F1")
        above = _logit(self.room.threshold if answer.threshold is None else answer.threshold)
        given, true, known = scores > above, target == 1, target >= 0
        counted = torch.stack([(given & true).sum(0), (given & known).sum(0), true.sum(0), known.sum(0)])
        self.counts[:, : counted.shape[1]] += counted.to(self.counts.device)

    def compute(self) -> Score:
        rows = self.counts.T.tolist()
        per_class: list[float | None] = [2 * right / (given + true) if given + true else None for right, given, true, _ in rows]
        per_task = {task: self.of(classes) for task, classes in self.room.arrived.items()}
        return Score(self.of(range(self.room.classes)), per_class, per_task)

    @abstractmethod
    def of(self, classes: Sequence[int]) -> float | None:
        """The figure over these classes."""

    def _parts(self, classes: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """The counts of the classes that are annotated anywhere."""
        rows = self.counts.T.tolist()
        return [tuple(rows[c]) for c in classes if c < len(rows) and rows[c][3]]


def _logit(threshold: float) -> float:
    if threshold <= 0:
        return -math.inf
    return math.log(threshold / (1 - threshold)) if threshold < 1 else math.inf


class ClassF1(_F1):
    """CF1: the F1 of the mean precision and the mean recall over the classes that have a positive."""

    def of(self, classes: Sequence[int]) -> float | None:
        parts = [part for part in self._parts(classes) if part[2]]
        if not parts:
            return None
        precision = math.fsum(right / given if given else 0.0 for right, given, _, _ in parts) / len(parts)
        recall = math.fsum(right / true for right, _, true, _ in parts) / len(parts)
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class MacroF1(_F1):
    """The mean over the classes of their F1, 0 for a class without a label given rightly: what KRT and its successors report as CF1."""

    def of(self, classes: Sequence[int]) -> float | None:
        parts = self._parts(classes)
        return math.fsum(2 * right / max(given + true, 1) for right, given, true, _ in parts) / len(parts) if parts else None


class OverallF1(_F1):
    """OF1: the F1 of all labels of all classes together."""

    def of(self, classes: Sequence[int]) -> float | None:
        parts = self._parts(classes)
        right, given, true = (sum(part[place] for part in parts) for place in range(3))
        return 2 * right / (given + true) if true else None
