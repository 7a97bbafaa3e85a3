"""Class-incremental learning without sharp borders: classes that come back, in proportions that are not known in advance.

`disjoint` is the share of the classes that occur in one task only. The others are blurry: each has a task of its own, and `blurry` is
the share of their samples that leave it and are dealt out, shuffled, over all tasks: of T tasks, about one in T of these samples is
dealt back to where it came from, as in the released samplers. Every sample appears exactly once.

- i-Blurry (Koh et al., ICLR 2022), `sizes: equal`: every task gives this share of its blurry samples and gets as many back.
  i-Blurry-50-10 is `disjoint: 0.5, blurry: 0.1`.
- blurry-K (Bang et al., CVPR 2021) is `disjoint: 0, blurry: 0.1` for K = 10, with equal sizes.
- Si-Blurry (Moon et al., ICCV 2023), which G-ACIL is published on, `sizes: random`: how many disjoint classes a task brings and
  how many samples it gives and gets are drawn at random, so that a task may bring anything from nothing but old classes up. Where a
  task is to give more than it has, the others give the rest.

Where the released samplers drop the classes that do not divide evenly, here the first tasks get one more. Classes are numbered as they
first appear, and `task.classes` are those: in a blurry stream most appear early, before the bulk of their samples. A task's
test set is that of the classes that it brought; a task that brought none has none.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data import SinglePass, Subset
from streamcl.errors import ConfigError
from streamcl.options import Fraction, PositiveInt
from streamcl.seeding import generator
from streamcl.stream import Dataset, Scenario, Source, StreamInfo, Task

from ._division import arranged, by_task, dealt, listing, need_target, need_test, need_training_samples

KIND = "blurry"


class Blurry(Scenario):
    """Classes with a task of their own, of which a part strays into the others."""

    bounded_by_classes = ("tasks",)

    def __init__(
        self,
        *,
        data: Source,
        tasks: PositiveInt,
        disjoint: Fraction = 0.5,
        blurry: Fraction = 0.1,
        sizes: Literal["equal", "random"] = "random",
        order: Literal["seed", "given", "alphabetical"] | list[str | int] = "seed",
        online: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.data, self.tasks, self.disjoint, self.blurry, self.sizes = data, tasks, disjoint, blurry, sizes
        self.order, self.online = order, online

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_target(loaded, ("class",), KIND, "one class per sample")
        need_test(loaded, KIND)
        assert loaded.test is not None
        self.problems = loaded.problems
        names = loaded.class_names
        if self.tasks > len(names):
            raise ConfigError(f"{KIND}: tasks is {self.tasks} and there are only {len(names)} classes")
        counts = torch.bincount(loaded.train.targets, minlength=len(names))
        need_training_samples(counts, names, KIND, "leave the class out of the source")
        order = arranged(names, self.order, seed, KIND)
        task, self.own = self._deal(loaded.train.targets, order, seed)
        empty = (torch.bincount(task, minlength=self.tasks) == 0).nonzero().squeeze(1)
        if len(empty):
            raise ConfigError(f"{KIND}: with this seed task {empty[0] + 1} would have no sample: take fewer tasks, or sizes: equal")
        first = torch.full((len(names),), self.tasks).scatter_reduce(0, loaded.train.targets, task, "amin")
        arrival = sorted(order, key=lambda number: (int(first[number]), order.index(number)))
        self._names = [names[number] for number in arrival]
        self._relabel = torch.empty(len(names), dtype=torch.int64)
        self._relabel[arrival] = torch.arange(len(arrival))
        self._bounds = [0, *torch.bincount(first, minlength=self.tasks).cumsum(0).tolist()]
        self._train, self._test = loaded.train, loaded.test
        self._test_of = by_task(first[loaded.test.targets], len(self))
        group = task * len(names) + loaded.train.targets
        self._train_of, self._validation_of = dealt(task, len(self), group, self.validation, seed)
        self.info = StreamInfo(
            modalities=loaded.modalities,
            classes=len(names),
            tasks=self.tasks,
            passes=1 if self.online else None,
            licence=loaded.licence,
            class_names=tuple(self._names),
        )
        return self.info

    def __len__(self) -> int:
        return self.tasks

    def task(self, index: int) -> Task:
        known, reached = self._bounds[index : index + 2]
        train: Dataset = Subset(self._train, self._train_of[index], self._relabel)
        labels = set(train.targets.unique().tolist())
        validation = None
        if self.validation:
            validation = Subset(self._train, self._validation_of[index], self._relabel)
            labels |= set(validation.targets.unique().tolist())
        new = listing(self._names[known:reached]) or "no new class"
        return Task(
            index=index,
            name=f"task {index + 1}: {new}",
            train=SinglePass(train) if self.online else train,
            classes=tuple(range(known, reached)),
            seen=tuple(range(reached)),
            labels=tuple(sorted(labels)),
            validation=validation,
            names=dict(enumerate(self._names[:reached])),
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        rows = self._test_of[task.index]
        return Subset(self._test, rows, self._relabel) if len(rows) else None

    def files(self) -> list[str]:
        return self.data.files()

    def _deal(self, targets: Tensor, order: list[int], seed: int) -> tuple[Tensor, Tensor]:
        """The task of every training sample, and the own task of every class."""
        draw = generator(seed, "blurry")
        disjoint = round(self.disjoint * len(order))
        own = torch.empty(len(order), dtype=torch.int64)
        if self.sizes == "random":
            cuts = torch.randint(0, disjoint + 1, (self.tasks - 1,), generator=draw).sort().values.tolist()
            groups = np.split(np.array(order[:disjoint], dtype=np.int64), cuts)
        else:
            groups = np.array_split(np.array(order[:disjoint], dtype=np.int64), self.tasks)
        strays = np.array_split(np.array(order[disjoint:], dtype=np.int64), self.tasks)
        for index in range(self.tasks):
            own[torch.from_numpy(groups[index])] = index
            own[torch.from_numpy(strays[index])] = self.tasks - 1 - index  # from the end, so that other tasks have one class more
        task = own[targets]
        blurs = torch.zeros(len(order), dtype=torch.bool)
        blurs[order[disjoint:]] = True
        shuffled = torch.randperm(len(targets), generator=draw)
        candidates = shuffled[blurs[targets[shuffled]]]  # in random order
        held = torch.bincount(task[candidates], minlength=self.tasks)
        if self.sizes == "random":
            total = int(self.blurry * len(candidates) + 1e-9)
            borders = torch.randint(0, total + 1, (self.tasks - 1,), generator=draw).sort().values.tolist()
            given = torch.tensor([0, *borders, total]).diff().minimum(held)
            left = torch.arange(self.tasks).repeat_interleave(held - given)  # the task of each sample that another one may give instead
            rest = left[torch.randperm(len(left), generator=draw)[: total - int(given.sum())]]
            given += torch.bincount(rest, minlength=self.tasks)
        else:
            given = (held.double() * self.blurry + 1e-9).long()
        self.given = given  # how many samples of its own each task gives away
        grouped = candidates[task[candidates].argsort(stable=True)]
        place = torch.arange(len(grouped)) - (held.cumsum(0) - held).repeat_interleave(held)
        strayed = grouped[place < given.repeat_interleave(held)]
        strayed = strayed[torch.randperm(len(strayed), generator=draw)]
        task[strayed] = torch.arange(self.tasks).repeat_interleave(given)
        return task, own
