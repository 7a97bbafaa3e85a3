"""Painted pictures: how well they fit the prompt, how much they look like the concept, and which concept they are taken for.

What counts is one picture for each prompt; the features are the judge's (streamcl/judging.py), of length 1. Prompts that name two concepts
are counted apart, by the metrics whose names begin with joint. What names a concept that the judge cannot read is not counted as text.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from streamcl.errors import DataError
from streamcl.metrics import Answer, Room, Score


class _OfPictures(torchmetrics.Metric):
    sums: Tensor  # (2, concepts): what was given, and how many pictures, of each concept that was named
    whole: Tensor  # (2,): the same over all pictures
    named = 1  # how many concepts a prompt names that is counted

    def __init__(self, room: Room, **settings: Any) -> None:
        super().__init__(**settings)
        self.set_dtype(torch.float64)
        self.add_state("sums", torch.zeros(2, max(room.judge.concepts, 1), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("whole", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self._judge = room.judge
        self._learned = sorted({label for labels in room.arrived.values() for label in labels})

    def update(self, answer: Answer) -> None:
        named = answer.batch.extra.get("named")
        if not isinstance(named, Tensor):
            raise DataError("a prompt of this stream does not say which concepts it names (extra['named'])")
        rows = self.counted(named == 1)
        if not bool(rows.any()):
            return
        which = (named[rows] == 1).double().cpu()  # (pictures, concepts)
        values = self.value(answer.embeddings["image"][rows], answer.embeddings["text"][rows], which).double()
        self.sums += torch.stack([values @ which, which.sum(dim=0)]).to(self.sums.device)
        self.whole += torch.stack([values.sum(), torch.tensor(float(len(values)), dtype=torch.float64)]).to(self.whole.device)

    def counted(self, named: Tensor) -> Tensor:
        """Which prompts, by the concepts that each names  # (prompts,)"""
        return named.sum(dim=1) == self.named

    @abstractmethod
    def value(self, pictures: Tensor, texts: Tensor, which: Tensor) -> Tensor:
        """One number for each picture."""

    def compute(self) -> Score:
        total, count = self.whole.tolist()
        each = [value / pictures if pictures else None for value, pictures in zip(*self.sums.tolist(), strict=True)]
        return Score(total / count if count else None, each)


class ImageAlignment(_OfPictures):
    """The mean cosine with every real picture of the concept."""

    def value(self, pictures: Tensor, texts: Tensor, which: Tensor) -> Tensor:
        return (pictures * self._judge.means[which.argmax(dim=1)]).sum(dim=1).double()


class TextAlignment(_OfPictures):
    """CLIPScore: 2.5 max(cosine with the prompt, 0), the placeholder being said in words that the judge knows."""

    def counted(self, named: Tensor) -> Tensor:
        return super().counted(named) & ~(named & ~self._judge.read.to(named.device)).any(dim=1)

    def value(self, pictures: Tensor, texts: Tensor, which: Tensor) -> Tensor:
        return 2.5 * (pictures * texts).sum(dim=1).clamp(min=0)


class Recognised(_OfPictures):
    """The share of pictures whose nearest class, among all that the judge had real pictures of when the concept came, is the concept."""

    def value(self, pictures: Tensor, texts: Tensor, which: Tensor) -> Tensor:
        concept = which.argmax(dim=1)
        near = (pictures @ self._judge.prototypes.T).masked_fill(~self._judge.rivals[concept], -torch.inf)
        return (near.argmax(dim=1) == concept).double()


class Confusion(_OfPictures):
    """The share of pictures whose nearest concept, among those learned so far, is another one."""

    def value(self, pictures: Tensor, texts: Tensor, which: Tensor) -> Tensor:
        learned = torch.tensor(self._learned)
        nearest = learned[(pictures @ self._judge.prototypes[learned].T).argmax(dim=1)]
        return (nearest != which.argmax(dim=1)).double()


class JointImageAlignment(_OfPictures):
    """Of prompts that name two concepts: the mean cosine with real pictures of both, side by side."""

    named = 2

    def value(self, pictures: Tensor, texts: Tensor, which: Tensor) -> Tensor:
        pairs = which.nonzero()[:, 1].view(-1, 2).tolist()
        return (pictures * torch.stack([self._judge.joint(*pair) for pair in pairs])).sum(dim=1).double()


class JointTextAlignment(TextAlignment):
    """Of prompts that name two concepts."""

    named = 2
