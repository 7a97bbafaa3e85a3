"""Class-incremental learning: the classes of one data set arrive in groups, one group per task.

The protocol of iCaRL (Rebuffi et al., CVPR 2017) and of nearly every method since: `tasks: 10` divides the classes equally,
`base: 50, increment: 10` begins with a large task, `classes` lists the groups by name. With `order: seed` the classes are
permuted by NumPy's legacy generator, `RandomState(seed).permutation(classes)`, whose stream is frozen; this is the permutation
of PyCIL, PILOT and FACIL, so that seed 1993 gives the class order of the published tables.

`repeat` lets classes come back: this fraction of every class's training samples is kept out of the class's own task and dealt out
evenly over the later tasks (the classes of the last task keep theirs). Each sample still appears exactly once in the stream.
`online` allows a single pass over each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data import SinglePass, Subset, place_in_class, split_by_class
from streamcl.errors import ConfigError, DataError
from streamcl.options import Fraction, PositiveInt
from streamcl.plugins import near_name
from streamcl.seeding import generator
from streamcl.stream import Dataset, Scenario, Source, StreamInfo, Task


class ClassIncremental(Scenario):
    """New classes in every task, numbered in order of arrival, and one test set per task: that of its new classes.

    One of `tasks`, `increment` (with or without `base`) and `classes` says how the classes are divided. Where `tasks` does not
    divide them, the first tasks get one class more; with `increment` the last task may be smaller; classes that `classes` does not
    list are left out of the stream. `order` is the seed's permutation, the order of the source ("given"), or a list of all names.
    """

    bounded_by_classes = ("tasks", "base")

    def __init__(
        self,
        *,
        data: Source,
        tasks: PositiveInt | None = None,
        base: PositiveInt | None = None,
        increment: PositiveInt | None = None,
        classes: list[list[str | int]] | None = None,
        order: Literal["seed", "given"] | list[str | int] = "seed",
        repeat: Fraction = 0.0,
        online: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        ways = {"tasks": tasks, "increment": increment, "classes": classes}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            told = f"{' and '.join(given)} contradict each other" if given else "nothing says how the classes are divided into tasks"
            raise ConfigError(f"{told}: give one of tasks, increment (with base if the first task is larger), classes")
        if base is not None and increment is None:
            raise ConfigError(f"base belongs to increment, not to {given[0]}: give base and increment, or {given[0]} alone")
        if classes is not None and order != "seed":
            raise ConfigError("classes already says the order: leave out order, or give tasks or increment instead")
        self.data, self.tasks, self.base, self.increment, self.classes = data, tasks, base, increment, classes
        self.order, self.repeat, self.online = order, repeat, online

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        if loaded.target != "class":
            raise ConfigError(f"class_incremental needs one class per sample, and the target of this source is {loaded.target!r}")
        if loaded.test is None or len(loaded.test) == 0:
            raise ConfigError("class_incremental: the source has no test set: name one (test) or hold a part back (test_fraction: 0.2)")
        groups = self._groups(loaded.class_names, seed)
        arrival = [number for group in groups for number in group]
        counts = torch.bincount(loaded.train.targets, minlength=len(loaded.class_names))
        lacking = [loaded.class_names[number] for number in arrival if counts[number] == 0]
        if lacking:
            raise DataError(f"class_incremental: no training sample of {_shown(lacking)}: add some, or leave the class out with `classes`")

        self._train, self._test, self.problems = loaded.train, loaded.test, loaded.problems
        self._names = [loaded.class_names[number] for number in arrival]
        self._bounds = np.cumsum([0] + [len(group) for group in groups]).tolist()
        self._relabel = torch.full((len(loaded.class_names),), -1, dtype=torch.int64)
        self._relabel[arrival] = torch.arange(len(arrival))
        self._own_task = torch.arange(len(groups)).repeat_interleave(torch.tensor(self._bounds).diff())  # of each class, as it arrives
        self._deal(seed)
        self._test_of = self._by_task(self._task_of_class(loaded.test.targets))
        self.info = StreamInfo(
            modalities=loaded.modalities,
            classes=len(arrival),
            tasks=len(groups),
            passes=1 if self.online else None,
            licence=loaded.licence,
            class_names=tuple(self._names),
        )
        return self.info

    def task(self, index: int) -> Task:
        known, reached = self._bounds[index : index + 2]
        train: Dataset = Subset(self._train, self._train_of[index], self._relabel)
        labels = set(train.targets.unique().tolist())
        if self.validation:
            validation = Subset(self._train, self._validation_of[index], self._relabel)
            labels.update(validation.targets.unique().tolist())
        return Task(
            index=index,
            name=f"classes {_shown(self._names[known:reached])}",
            train=SinglePass(train) if self.online else train,
            classes=tuple(range(known, reached)),
            seen=tuple(range(reached)),
            labels=tuple(sorted(labels)),
            validation=validation if self.validation else None,
            names=dict(enumerate(self._names[:reached])),
        )

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def test(self, task: Task, after: Task) -> Dataset | None:
        indices = self._test_of[task.index]
        return Subset(self._test, indices, self._relabel) if len(indices) else None

    def files(self) -> list[str]:
        return self.data.files()

    def _groups(self, names: list[str], seed: int) -> list[list[int]]:
        """The classes of each task, as the source numbers them."""
        number = {name: position for position, name in enumerate(names)}
        if self.classes is not None:
            groups = [[_number(name, number, "classes") for name in group] for group in self.classes]
            _refuse_repeats([names[n] for group in groups for n in group], "classes")
            if not groups or not all(groups):
                raise ConfigError(f"class_incremental: classes: task {([*groups, []]).index([]) + 1} lists no class: every task needs one")
            return groups
        if self.order == "seed":
            order = np.random.RandomState(seed % 2**32).permutation(len(names)).tolist()
        elif self.order == "given":
            order = list(range(len(names)))
        else:
            order = [_number(name, number, "order") for name in self.order]
            _refuse_repeats([names[n] for n in order], "order")
            if len(order) < len(names):
                missing = [name for name in names if number[name] not in set(order)]
                raise ConfigError(f"class_incremental: order lacks {_shown(missing)}: it must list every class once")
        if self.tasks is not None:
            if self.tasks > len(names):
                raise ConfigError(
                    f"class_incremental: tasks is {self.tasks} and there are only {len(names)} classes: at most one task for each"
                )
            return [part.tolist() for part in np.array_split(np.array(order), self.tasks)]
        assert self.increment is not None
        base = self.increment if self.base is None else self.base
        if base > len(names):
            what = "increment" if self.base is None else "base"
            raise ConfigError(f"class_incremental: {what} is {base} and there are only {len(names)} classes")
        starts = [0, *range(base, len(order), self.increment)]
        return [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]

    def _deal(self, seed: int) -> None:
        """Give every training sample its task, and to validation its part of each class in each task."""
        task = self._task_of_class(self._train.targets)
        if self.repeat:
            _, back = split_by_class(self._train.targets, self.repeat, generator(seed, "repeat"))
            back = back[(task[back] >= 0) & (task[back] < len(self) - 1)]
            arrived = self._relabel[self._train.targets[back]]
            # Each class begins with another task, so that a few held-back samples of many classes do not all land in the next one.
            task[back] += 1 + (place_in_class(arrived) + arrived) % (len(self) - 1 - task[back])
        self._train_of = self._by_task(task)
        if self.validation:
            group = torch.where(task < 0, -1, task * len(self._names) + self._relabel[self._train.targets])
            _, held = split_by_class(group, self.validation, generator(seed, "validation"))
            mine = torch.full_like(task, -1)
            mine[held] = task[held]
            self._validation_of = self._by_task(mine)
            task[held] = -1
            self._train_of = self._by_task(task)

    def _task_of_class(self, targets: Tensor) -> Tensor:
        """The task in which the class of each sample arrives; -1 where the stream leaves the class out."""
        return torch.cat([self._own_task, self._own_task.new_tensor([-1])])[self._relabel[targets]]

    def _by_task(self, task: Tensor) -> tuple[Tensor, ...]:
        """The indices of each task's samples in the order of the source; one sort for all tasks."""
        counts = torch.bincount(task + 1, minlength=len(self) + 1)
        return task.argsort(stable=True).split(counts.tolist())[1:]


def _number(name: str | int, number: dict[str, int], option: str) -> int:
    if str(name) not in number:
        hint = near_name(str(name), number) or f": there are {_shown(list(number))}"
        raise ConfigError(f"class_incremental: {option} names an unknown class {str(name)!r}{hint}")
    return number[str(name)]


def _refuse_repeats(names: Sequence[str], option: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise ConfigError(f"class_incremental: {option} names class {twice!r} twice: every class arrives once")


def _shown(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} classes)" if len(names) > most else "")
