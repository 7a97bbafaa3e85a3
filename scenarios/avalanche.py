"""A benchmark of Avalanche as it is: one task per experience.

`avalanche:SplitMNIST` names one of its classic benchmarks, with `arguments` for its function (`{n_experiences: 5, return_task_id: true}`);
`benchmark: my_file.py:function` names a function that returns one. What is left to chance there is decided by the run's seed, unless
`arguments` holds a `seed`. How the samples are read is told at the source of the same name (`streamcl show avalanche --kind source`),
whose options these are.

Classes are numbered in order of arrival, those of one experience in the order in which the benchmark numbers them. A task's test set is
the experience at its place in the test stream where the two streams are equally long; else it is the test samples of the classes that the
task brings, so that every test sample belongs to one task. Classes that have not arrived are not tested. Where the benchmark tells task
labels, they are told with every batch (`task_ids`). Where all classes come with the first experience, the experiences are the domains by
which the report scores. `online` allows a single pass over each experience, which may be as small as a batch.

Avalanche: Lomonaco et al., "Avalanche: an End-to-End Library for Continual Learning", CLVision 2021; Carta et al., JMLR 2023 (MIT licence).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.data import MapDataset, SinglePass, Subset, Told
from streamcl.options import NonNegativeInt, PositiveInt
from streamcl.stream import Dataset, Scenario, StreamInfo, Task

from ._division import by_task, dealt, listing
from .sources.avalanche import Avalanche as _Source


class Avalanche(Scenario):
    """The experiences of a benchmark, in its order."""

    def __init__(
        self,
        *,
        benchmark: str | Any,
        arguments: dict[str, Any] | None = None,
        train: str = "train",
        test: str | None = "test",
        online: bool = False,
        transform_group: Literal["raw", "eval"] | None = None,
        size: PositiveInt | None = None,
        decode: Literal["eager", "lazy", "auto"] = "auto",
        workers: NonNegativeInt = 2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.source = _Source(
            benchmark=benchmark,
            arguments=arguments,
            train=train,
            test=test,
            transform_group=transform_group,
            size=size,
            decode=decode,
            workers=workers,
        )
        self.online = online

    def open(self, seed: int) -> StreamInfo:
        loaded = self.source.read(seed)
        self.problems, self._train, self._test = loaded.problems, loaded.train, loaded.test
        experience = loaded.groupings["experience"]
        self._count = int(experience.train.max()) + 1
        targets = loaded.train.targets
        first = torch.full((len(loaded.class_names),), self._count).scatter_reduce(0, targets, experience.train, "amin")
        arrival = first.argsort(stable=True)
        self._arrives = first[arrival]  # the task that brings each class, in order of arrival
        self._names = [loaded.class_names[number] for number in arrival.tolist()]
        self._relabel = torch.empty_like(arrival).scatter_(0, arrival, torch.arange(len(arrival)))
        self._bounds = [0, *torch.bincount(first, minlength=self._count).cumsum(0).tolist()]
        self._labels = loaded.groupings.get("task_label")

        group = experience.train * len(first) + targets
        self._train_of, self._validation_of = dealt(experience.train, self._count, group, self.validation, seed)
        self._test_of = by_task(experience.test, self._count) if experience.test is not None else ()
        self.info = StreamInfo(
            modalities=loaded.modalities,
            classes=len(first),
            tasks=self._count,
            passes=1 if self.online else None,
            task_ids=self._labels is not None,
            licence=loaded.licence,
            class_names=tuple(self._names),
        )
        return self.info

    def __len__(self) -> int:
        return self._count

    def task(self, index: int) -> Task:
        known, reached = self._bounds[index : index + 2]
        train = self._view(self._train, self._train_of[index], "train")
        validation = self._view(self._train, self._validation_of[index], "train") if self.validation else None
        labels = {number for part in (train, validation) if part is not None for number in part.targets.unique().tolist()}
        about: dict[str, Any] = {"experience": index}
        if self._count > 1 and self._bounds[1] == len(self._names):
            about["domain"] = f"experience {index}"
        brings = f": classes {listing(self._names[known:reached])}" if reached > known else ""
        return Task(
            index=index,
            name=f"experience {index}{brings}",
            train=SinglePass(train) if self.online else train,
            classes=tuple(range(known, reached)),
            seen=tuple(range(reached)),
            labels=tuple(sorted(labels)),
            validation=validation,
            names=dict(enumerate(self._names[:reached])),
            about=about,
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        if self._test is None:
            return None
        rows = self._test_of[task.index]
        arrived = self._arrives[self._relabel[self._test.targets[rows]]] <= after.index
        rows = rows[arrived]
        return self._view(self._test, rows, "test") if len(rows) else None

    def files(self) -> list[str]:
        return self.source.files()

    def _view(self, dataset: Dataset, rows: Tensor, part: Literal["train", "test"]) -> MapDataset:
        view = Subset(dataset, rows, self._relabel)
        told = getattr(self._labels, part, None)
        if told is None or self._labels is None:
            return view
        numbers = torch.tensor([int(name) for name in self._labels.names])
        return Told(view, numbers[told[rows]])  # they may differ within an experience
