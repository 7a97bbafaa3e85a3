"""What a stream can be scored by: each metric's name, the targets that it scores, and the class that counts it.

This table imports nothing heavy; the classes stand on torchmetrics, which takes seconds to import, and are loaded when scoring begins.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from streamcl.stream import Batch

Reads = Literal["scores", "texts", "embeddings", "images"]


class Score(NamedTuple):
    """What a metric says: one number (None where there was nothing to score), one per class where it has that, and one for the classes
    that each task brought where it counts by class."""

    value: float | None
    per_class: list[float | None] | None = None
    per_task: dict[int, float | None] | None = None


@dataclass(frozen=True)
class Room:
    """What a metric is told of the stream before it counts: how many classes there are, which ones each task brought, and from which
    probability a label counts as given."""

    classes: int
    arrived: Mapping[int, Sequence[int]] = field(default_factory=dict)  # task -> its new classes
    threshold: float = 0.5
    judge: Any = None  # streamcl.judging.Judge, where pictures are scored


@dataclass(frozen=True)
class Answer:
    """What was predicted for a batch: `scores` as the protocol offers them, `texts`, or `embeddings` by modality.

    A score of -inf is a class that was not offered; a row of nothing but -inf is a sample without an answer.
    """

    batch: Batch
    scores: Tensor | None = None
    texts: Sequence[str] | Sequence[Sequence[str]] | None = None  # of a head, several for each sample
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    threshold: float | None = None  # of this prediction, where it is not the stream's

    @property
    def target(self) -> Tensor:
        assert self.batch.target is not None
        return self.batch.target.to(self.scores.device) if self.scores is not None else self.batch.target


class Metric(Protocol):
    """What the evaluation needs of a metric: one instance counts one column of the matrix, or one union of columns.

    Where `by_class` is set, a column of the matrix is not a set of samples but the classes that a task brought, on everything that is
    scored: `Score.per_task` of the union.
    """

    def update(self, answer: Answer) -> None: ...

    def compute(self) -> Score: ...


class Entry(NamedTuple):
    module: str
    kind: str  # the class in that module
    targets: tuple[str, ...]
    reads: Reads = "scores"
    by_class: bool = False
    lower: bool = False  # less is better

    def load(self) -> Any:
        return getattr(importlib.import_module(f"streamcl.metrics.{self.module}"), self.kind)


METRICS: dict[str, Entry] = {
    "accuracy": Entry("classes", "Accuracy", ("class",)),
    "base_accuracy": Entry("classes", "BaseAccuracy", ("class",)),
    "new_accuracy": Entry("classes", "NewAccuracy", ("class",)),
    "harmonic_mean": Entry("classes", "HarmonicMean", ("class",)),
    "base_as_new": Entry("classes", "BaseAsNew", ("class",), lower=True),
    "new_as_base": Entry("classes", "NewAsBase", ("class",), lower=True),
    "map": Entry("labels", "MeanAveragePrecision", ("labels",), by_class=True),
    "cf1": Entry("labels", "ClassF1", ("labels",), by_class=True),
    "macro_f1": Entry("labels", "MacroF1", ("labels",), by_class=True),
    "of1": Entry("labels", "OverallF1", ("labels",), by_class=True),
    "mae": Entry("values", "MeanAbsoluteError", ("value",), lower=True),
    "rmse": Entry("values", "RootMeanSquaredError", ("value",), lower=True),
    "correlation": Entry("values", "Correlation", ("value",)),
    "acc_2": Entry("values", "SignAccuracy", ("value",)),
    "acc_7": Entry("values", "SevenClassAccuracy", ("value",)),
    "miou": Entry("masks", "MeanIoU", ("mask",)),
    "pixel_accuracy": Entry("masks", "PixelAccuracy", ("mask",)),
    "verified": Entry("texts", "Verified", ("text",), reads="texts"),
    "recall_1": Entry("retrieval", "RecallAt1", ("text",), reads="embeddings"),
    "recall_5": Entry("retrieval", "RecallAt5", ("text",), reads="embeddings"),
    "recall_10": Entry("retrieval", "RecallAt10", ("text",), reads="embeddings"),
    "image_alignment": Entry("pictures", "ImageAlignment", ("image",), reads="images"),
    "text_alignment": Entry("pictures", "TextAlignment", ("image",), reads="images"),
    "recognised": Entry("pictures", "Recognised", ("image",), reads="images"),
    "confusion": Entry("pictures", "Confusion", ("image",), reads="images", lower=True),
    "joint_image_alignment": Entry("pictures", "JointImageAlignment", ("image",), reads="images"),
    "joint_text_alignment": Entry("pictures", "JointTextAlignment", ("image",), reads="images"),
}
