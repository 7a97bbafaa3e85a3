"""Class-incremental learning: the classes of one data set arrive in groups, one group per task.

The protocol of iCaRL (Rebuffi et al., CVPR 2017) and of nearly every method since: `tasks: 10` divides the classes equally,
`base: 50, increment: 10` begins with a large task, `classes` lists the groups by name. With `order: seed` the classes are
permuted by NumPy's legacy generator, `RandomState(seed).permutation(classes)`, whose stream is frozen; this is the permutation
of PyCIL, PILOT and FACIL, so that seed 1993 gives the class order of the published tables.

`repeat` lets classes come back: this fraction of every class's training samples is kept out of the class's own task and dealt out
evenly over the later tasks (the classes of the last task keep theirs). Each sample still appears exactly once in the stream.
`online` allows a single pass over each task. `task_ids` tells the task with every batch, in training and in testing:
task-incremental learning (score it with `evaluate: {protocols: [task_incremental]}`).

`imbalance: 0.01` makes the stream long-tailed, as Liu et al. (ECCV 2022) do: the smallest class keeps this fraction of the largest
class's training samples, and between them the sizes fall exponentially, class c of C keeping n imbalance^(c / (C - 1)). `tail:
shuffled` gives the sizes to the classes at random, `tail: ordered` lets them fall in the order of arrival. The test set is left as it is.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.data import SinglePass, Subset, Told, place_in_class, split_by_class
from streamcl.errors import ConfigError
from streamcl.options import Fraction
from streamcl.seeding import generator
from streamcl.stream import Dataset, StreamInfo, Task

from ._division import DividedByClass, by_task, dealt, listing, need_target, need_test, need_training_samples


class ClassIncremental(DividedByClass):
    """New classes in every task, numbered in order of arrival, and one test set per task: that of its new classes."""

    def __init__(
        self,
        *,
        repeat: Fraction = 0.0,
        online: bool = False,
        task_ids: bool = False,
        imbalance: Fraction = 1.0,
        tail: Literal["shuffled", "ordered"] = "shuffled",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if imbalance == 0:
            raise ConfigError("class_incremental: imbalance is 0, and the smallest class needs a sample: 0.01 keeps a hundredth")
        if tail == "ordered" and imbalance == 1:
            raise ConfigError("class_incremental: tail says where the small classes are, and imbalance: 1 makes none: give imbalance")
        if repeat and task_ids:
            raise ConfigError(
                "class_incremental: repeat brings classes back in the tasks of others, and with task_ids a sample is decided among the "
                "classes of the task that it is told: leave one of them out"
            )
        self.repeat, self.online, self.task_ids, self.imbalance, self.tail = repeat, online, task_ids, imbalance, tail

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_target(loaded, ("class",), self.kind, "one class per sample")
        need_test(loaded, self.kind)
        assert loaded.test is not None
        self.divide(loaded, seed)
        counts = torch.bincount(loaded.train.targets, minlength=len(loaded.class_names))[self._arrival]
        need_training_samples(counts, self._names, self.kind)
        self._train, self._test = loaded.train, loaded.test
        self._deal(counts, seed)
        self._test_of = by_task(self.task_of_class(loaded.test.targets), len(self))
        self.info = StreamInfo(
            modalities=loaded.modalities,
            classes=len(self._names),
            tasks=len(self),
            passes=1 if self.online else None,
            task_ids=self.task_ids,
            licence=loaded.licence,
            class_names=tuple(self._names),
        )
        return self.info

    def task(self, index: int) -> Task:
        train: Dataset = Subset(self._train, self._train_of[index], self._relabel)
        labels = set(train.targets.unique().tolist())
        validation: Dataset | None = None
        if self.validation:
            validation = Subset(self._train, self._validation_of[index], self._relabel)
            labels.update(validation.targets.unique().tolist())
        if self.task_ids:
            train = Told(train, index)
            validation = None if validation is None else Told(validation, index)
        classes = self.new_classes(index)
        return Task(
            index=index,
            name=f"classes {listing([self._names[c] for c in classes])}",
            train=SinglePass(train) if self.online else train,
            classes=classes,
            seen=tuple(range(classes[-1] + 1)),
            labels=tuple(sorted(labels)),
            validation=validation,
            names=self.names_until(index),
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        indices = self._test_of[task.index]
        if not len(indices):
            return None
        test = Subset(self._test, indices, self._relabel)
        return Told(test, task.index) if self.task_ids else test

    def _deal(self, counts: Tensor, seed: int) -> None:
        """Give every training sample its task, and to validation its part of each class in each task."""
        task = self.task_of_class(self._train.targets)
        if self.imbalance < 1:
            task[self._left_out(counts, seed)] = -1
        if self.repeat:
            group = torch.where(task < 0, -1, self._train.targets)  # of what is in the stream: a class keeps a sample of its own
            _, back = split_by_class(group, self.repeat, generator(seed, "repeat"))
            back = back[(task[back] >= 0) & (task[back] < len(self) - 1)]
            arrived = self._relabel[self._train.targets[back]]
            # Each class begins with another task, so that a few held-back samples of many classes do not all land in the next one.
            task[back] += 1 + (place_in_class(arrived) + arrived) % (len(self) - 1 - task[back])
        group = torch.where(task < 0, -1, task * len(self._names) + self._relabel[self._train.targets])
        self._train_of, self._validation_of = dealt(task, len(self), group, self.validation, seed)

    def _left_out(self, counts: Tensor, seed: int) -> Tensor:
        """Which training samples a long-tailed stream leaves out: of each class all but its share, chosen at random."""
        classes = len(counts)
        rank = torch.randperm(classes, generator=generator(seed, "tail")) if self.tail == "shuffled" else torch.arange(classes)
        wanted = int(counts.max()) * self.imbalance ** (rank.double() / max(classes - 1, 1))
        keep = torch.cat([wanted.floor().long().clamp(min=1), torch.zeros(1, dtype=torch.int64)])  # -1 is a class that is left out anyway
        arrived = self._relabel[self._train.targets]
        shuffled = torch.randperm(len(arrived), generator=generator(seed, "imbalance"))
        place = torch.empty_like(arrived)
        place[shuffled] = place_in_class(arrived[shuffled])
        return place >= keep[arrived]
