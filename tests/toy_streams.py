"""Samples that can be told apart in every modality, and the promises that every kind of stream makes: for the tests of the scenarios."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streamcl.data import ArrayDataset, FileDataset
from streamcl.stream import Batch, Column, Dataset, Grouping, Modality, Scenario, Source, SourceData

MODALITIES = {
    "image": Modality("image", (1, 4, 4), 255),
    "sound": Modality("audio", (6,)),
    "text": Modality("text"),
    "vector": Modality("vector", (1,)),
}
DTYPES = {"class": torch.int64, "labels": torch.int8, "value": torch.float32, "mask": torch.uint8, "text": torch.int64}


def columns(ids: Tensor, modalities: Sequence[str]) -> dict[str, Column]:
    """What the samples with these ids hold: a function of the id alone, and in no place NaN, 0 or empty."""
    every: dict[str, Column] = {
        "image": ((ids[:, None] * 37 + torch.arange(16) * 11) % 251 + 1).to(torch.uint8).view(-1, 1, 4, 4),
        "sound": ids[:, None].float() + torch.arange(1, 7) / 8,
        "text": [f"sample {number}" for number in ids.tolist()],
        "vector": ids[:, None].float() + 1,
    }
    return {name: every[name] for name in modalities}


class Decode:
    """Makes the samples of a part when they are read."""

    def __init__(self, first: int, modalities: Sequence[str]) -> None:
        self.first, self.modalities = first, modalities

    def __call__(self, rows: list[int]) -> dict[str, Column]:
        return columns(torch.tensor(rows, dtype=torch.int64) + self.first, self.modalities)


class Toy(Source):
    """Training samples numbered from 0 and test samples after them; in memory, or (`workers`) made when they are read."""

    def __init__(
        self,
        train: Any,
        test: Any = None,
        names: list[str] | None = None,
        target: str = "class",
        modalities: Sequence[str] = ("vector",),
        groupings: dict[str, Grouping] | None = None,
        workers: int | None = None,
        present: dict[str, Tensor] | None = None,
        problems: dict[str, int] | None = None,
        extra: Callable[[Tensor], dict[str, Column]] | None = None,
    ) -> None:
        self.train = torch.as_tensor(train, dtype=DTYPES[target])
        self.tested = self.train if test is None else torch.as_tensor(test, dtype=DTYPES[target])
        count = self.train.shape[-1] if target == "labels" else int(self.train.max()) + 1 if target == "class" else 1
        self.names = names or [f"c{number}" for number in range(count)]
        self.target, self.modalities, self.groupings, self.workers = target, modalities, groupings or {}, workers
        self.present, self.problems = present, problems or {}
        self.extra = extra or (lambda ids: {})  # what the source says of the samples with these ids

    def load(self) -> SourceData:
        return SourceData(
            self._part(self.train, 0, self.present),
            self._part(self.tested, len(self.train), None) if len(self.tested) else None,
            self.names,
            {name: MODALITIES[name] for name in self.modalities},
            target=self.target,
            licence="CC0",
            problems=self.problems,
            groupings=self.groupings,
        )

    def _part(self, targets: Tensor, first: int, present: dict[str, Tensor] | None) -> Dataset:
        ids = torch.arange(len(targets)) + first
        if self.workers is None:
            return ArrayDataset(columns(ids, self.modalities), targets, ids, present, self.extra(ids))
        return FileDataset(Decode(first, self.modalities), targets, ids, self.workers, self.extra(ids), present)


def opened(kind: Callable[..., Scenario], source: Source, seed: int = 0, **options: Any) -> Scenario:
    scenario = kind(data=source, **options)
    scenario.open(seed)
    return scenario


def read(dataset: Dataset | None, size: int = 7) -> Batch:
    """A data set as one batch, by way of small ones."""
    assert dataset is not None
    return Batch.cat(list(dataset.batches(size)))


def ids(*datasets: Dataset | None) -> list[int]:
    return [number for dataset in datasets if dataset is not None for number in dataset.ids.tolist()]


def content(dataset: Dataset | None) -> Any:
    """Everything that can be read of a data set, bit for bit (NaN equals NaN)."""
    if dataset is None or not len(dataset):
        return None if dataset is None else 0
    batch = read(dataset)

    def exact(column: Any) -> Any:
        return (str(column.dtype), tuple(column.shape), column.numpy().tobytes()) if isinstance(column, Tensor) else column

    parts = (batch.inputs, {"target": batch.target, "ids": batch.ids, "task": batch.task}, batch.present or {}, batch.extra)
    return [{name: exact(column) for name, column in part.items()} for part in parts]


def emitted(scenario: Scenario, tested: bool = True) -> list[Any]:
    """What is left of a stream, as values that can be compared."""
    stream, past = [], scenario.past()
    for task in scenario:
        past.append(task)
        facts = (task.index, task.name, task.classes, task.seen, task.labels, dict(task.names), json.dumps(task.about, sort_keys=True))
        tests = [content(scenario.test(earlier, task)) for earlier in past] if tested else []
        stream.append((facts, content(task.train), content(task.validation), tests))
    return stream


def assert_repeatable(make: Callable[[int, int | None], Scenario]) -> None:
    """`make(seed, workers)` opens a stream: the same in every run and from every position, with any number of workers."""
    first = emitted(make(3, None))
    assert emitted(make(3, None)) == first
    assert emitted(make(4, None)) != first
    for position in range(len(first) + 1):
        whole = make(3, None)
        for _ in zip(range(position), whole, strict=False):
            pass
        resumed = make(3, None)
        resumed.restore(json.loads(json.dumps(whole.state())))
        assert [task.index for task in resumed.past()] == list(range(position))
        assert emitted(resumed) == first[position:]
    alone, together = emitted(make(3, 0), tested=False), emitted(make(3, 2), tested=False)
    assert alone == together == [(facts, train, validation, []) for facts, train, validation, _ in first]
