"""A class for every pixel: intersection over union, and the share of pixels that are right. 255 marks what is not annotated."""

from __future__ import annotations

import math
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from streamcl.errors import PluginError
from streamcl.metrics import Answer, Room, Score

NOT_ANNOTATED = 255


class MeanIoU(torchmetrics.Metric):
    """The mean of intersection over union over the classes that occur in the truth or in the prediction, from all pixels of all samples."""

    counts: Tensor  # (classes, classes): pixels by their class and by the one predicted

    def __init__(self, room: Room, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("counts", torch.zeros(room.classes, room.classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, answer: Answer) -> None:
        scores, target = answer.scores, answer.target
        assert scores is not None
        if scores.dim() != 4 or scores.shape[2:] != target.shape[1:]:
            raise PluginError(
                f"masks of shape {tuple(target.shape[1:])} need scores of shape (batch, classes, height, width), got {tuple(scores.shape)}"
            )
        classes = len(self.counts)
        known = target != NOT_ANNOTATED
        pairs = target[known].long() * classes + scores.argmax(dim=1)[known].clamp(max=classes - 1)
        self.counts += pairs.bincount(minlength=classes * classes).reshape(classes, classes).to(self.counts.device)

    def compute(self) -> Score:
        right = self.counts.diagonal()
        union = (self.counts.sum(0) + self.counts.sum(1) - right).tolist()
        per_class = [hits / all_ if all_ else None for hits, all_ in zip(right.tolist(), union, strict=True)]
        known = [value for value in per_class if value is not None]
        return Score(math.fsum(known) / len(known) if known else None, per_class)


class PixelAccuracy(MeanIoU):
    """The share of annotated pixels whose class has the highest score."""

    def compute(self) -> Score:
        right, pixels = self.counts.diagonal().tolist(), self.counts.sum(1).tolist()
        total = sum(pixels)
        return Score(sum(right) / total if total else None, [r / n if n else None for r, n in zip(right, pixels, strict=True)])
