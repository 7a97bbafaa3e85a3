"""Multi-label class-incremental learning: a sample may carry several classes, and each task annotates only its own.

The protocol of the field (KRT, ICCV 2023, and its successors). The classes are divided into tasks, by default in the order of their
names, as MS-COCO and VOC are published; `base: 40, increment: 10` is B40-C10, `increment: 10` is B0-C10. A training sample joins
every task for which it carries at least one class, and there only the task's own classes are annotated: every other column, of
earlier classes as of those that have not come, is -1, which means unknown and not absent. (`occurrences: once` puts each sample into
the first of its tasks only; this is another protocol with other numbers.) After a task the test samples are those with at least
one class seen so far, with the complete truth over the classes seen.

Annotations may be made worse, from the seed: `partial: 0.5` hides this share of them at random; `single_positive` keeps one true
positive label per sample and task and hides everything else (Cole et al., CVPR 2021; what it keeps is right, so it goes with neither of the
others); `wrong: 0.1` turns this share of the labels round, before any are hidden. They touch the training data only; validation and
test stay true. A sample of which `partial` hides every label stays in its task without any: `task.unannotated` counts them.
`task.complete` says that every training sample which carries one of the task's classes is in it, so that the others carry none.

Of what a source says beside its samples (`extra`) nothing is handed on that may tell a label that is not annotated.

Scored by `map` (mean average precision), `cf1`, `macro_f1` and `of1`. A label counts as given from a probability of `threshold`: 0.5
suits scores that were trained by binary cross-entropy, and the published tables use 0.8 on scores of the asymmetric loss. What those
tables call CF1 is `macro_f1`, the mean of the classes' F1; `cf1` is the F1 of mean precision and mean recall, as most
other multi-label work has it. In the matrix a column is the classes that a task brought, on everything that is scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data import SinglePass, Subset, View
from streamcl.errors import ConfigError
from streamcl.options import Fraction
from streamcl.seeding import generator
from streamcl.stream import Batch, Dataset, StreamInfo, Task

from ._division import DividedByClass, listing, need_target, need_test, need_training_samples
from ._views import needed, only

BLOCK = 2**21  # labels that are looked through at a time


class MultiLabel(DividedByClass):
    """Samples with any number of classes, of which each task annotates its own."""

    kind = "multi_label"
    usual_order = "alphabetical"

    def __init__(
        self,
        *,
        order: Literal["seed", "given", "alphabetical"] | list[str | int] = "alphabetical",
        occurrences: Literal["every", "once"] = "every",
        partial: Fraction = 0.0,
        single_positive: bool = False,
        wrong: Fraction = 0.0,
        threshold: Fraction = 0.5,
        online: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(order=order, **options)
        if single_positive and partial:
            raise ConfigError("multi_label: single_positive already hides all labels but one: leave out partial")
        if single_positive and wrong:
            raise ConfigError("multi_label: single_positive keeps one label, a true one, and leaves none to turn round: leave out wrong")
        if partial == 1:
            raise ConfigError("multi_label: partial is 1, which hides every label: below 1 is needed")
        self.occurrences, self.partial, self.single_positive, self.wrong = occurrences, partial, single_positive, wrong
        self.threshold, self.online = threshold, online

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_target(loaded, ("labels",), self.kind, "a set of labels per sample")
        need_test(loaded, self.kind)
        assert loaded.test is not None
        self.divide(loaded, seed)
        told = needed(loaded.target)
        self._train, self._test, self._seed = only(loaded.train, told), only(loaded.test, told), seed
        self._deal(loaded.train.targets, loaded.test.targets, seed)
        self.info = StreamInfo(
            modalities=loaded.modalities,
            target="labels",
            metrics=("map", "cf1", "macro_f1", "of1"),
            classes=len(self._names),
            tasks=len(self),
            passes=1 if self.online else None,
            licence=loaded.licence,
            class_names=tuple(self._names),
            threshold=self.threshold,
        )
        return self.info

    def task(self, index: int) -> Task:
        classes = self.new_classes(index)
        rows = self._train_of[index]
        own = self._worsened(self._own_labels(rows, index), index)
        train: Dataset = _Annotated(self._train, rows, own, classes[0])
        about: dict[str, Any] = {"complete": self.occurrences == "every"}
        if self.partial:
            about["unannotated"] = int((own == -1).all(dim=1).sum())
        validation = None
        if self.validation:
            rows = self._validation_of[index]
            validation = _Annotated(self._train, rows, self._own_labels(rows, index), classes[0])
        return Task(
            index=index,
            name=f"classes {listing([self._names[c] for c in classes])}",
            train=SinglePass(train) if self.online else train,
            classes=classes,
            seen=tuple(range(classes[-1] + 1)),
            labels=classes,
            validation=validation,
            names=self.names_until(index),
            about=about,
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        """The samples whose earliest class among those seen came with `task`, so that the tasks' test sets share none."""
        rows = self._test_of[task.index].long()
        if task.index > after.index or not len(rows):
            return None
        return Subset(self._test, rows, targets=self._test.targets[rows].index_select(1, self._arrival[: len(after.seen)]))

    def _deal(self, train: Tensor, test: Tensor, seed: int) -> None:
        """The samples of each task: to train on, for validation, and of the test set those whose earliest class it brings."""
        held = torch.zeros(len(train), dtype=torch.bool)
        if self.validation:
            held = torch.randperm(len(train), generator=generator(seed, "validation")) < round(self.validation * len(train))
        counts, learned = torch.zeros(2, len(self._names), dtype=torch.int64)
        first = torch.full((len(self._names),), len(train))  # the first sample of each class

        joins = []
        for row, class_ in self._carried(train):
            task = self._own_task[class_]
            if self.occurrences == "once":
                begins = _begins(row)
                kept = task == task[begins][begins.cumsum(0) - 1]
                row, class_, task = row[kept], class_[kept], task[kept]
            counts += torch.bincount(class_, minlength=len(counts))
            learned += torch.bincount(class_[~held[row]], minlength=len(counts))
            first.scatter_reduce_(0, class_, row, "amin")
            new = _begins(row) | _begins(task)
            joins.append((row[new].int(), task[new].int()))
        need_training_samples(counts, self._names, self.kind)
        held[first[learned == 0]] = False  # every class keeps a sample to learn from
        self._validation_of: tuple[Tensor, ...] = ()
        if self.validation:
            masks = [held[row.long()] for row, _ in joins]
            self._validation_of = _dealt([(row[m], task[m]) for (row, task), m in zip(joins, masks, strict=True)], len(self))
            joins = [(row[~m], task[~m]) for (row, task), m in zip(joins, masks, strict=True)]
        self._train_of = _dealt(joins, len(self))
        earliest = [(row[_begins(row)].int(), self._own_task[class_[_begins(row)]]) for row, class_ in self._carried(test)]
        self._test_of = _dealt(earliest, len(self))

    def _carried(self, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Which sample carries which class, as they arrive: pairs in that order, looked for a block at a time to save memory."""
        classes, arrival = len(self._names), self._arrival.numpy()
        step = max(1, BLOCK // classes)
        for start in range(0, len(labels), step):
            block = np.take(labels[start : start + step].numpy(), arrival, axis=1)  # in a quarter of the time that torch takes
            row, class_ = np.divmod(np.flatnonzero(block == 1), classes)
            yield torch.from_numpy(row) + start, torch.from_numpy(class_)

    def _own_labels(self, rows: Tensor, index: int) -> Tensor:
        """What a task annotates of its samples: a column for each class that it brings."""
        known, reached = self._bounds[index : index + 2]
        return self._train.targets[rows.long()[:, None], self._arrival[known:reached]].to(torch.int8)

    def _worsened(self, own: Tensor, index: int) -> Tensor:
        if not (self.partial or self.single_positive or self.wrong):
            return own
        draw = generator(self._seed, "annotation", index)
        own = own.clone()
        if self.wrong:
            flipped = (torch.rand(own.shape, generator=draw) < self.wrong) & (own >= 0)
            own = torch.where(flipped, 1 - own, own)
        if self.partial:
            own[torch.rand(own.shape, generator=draw) < self.partial] = -1
        if self.single_positive:
            chosen = torch.where(own == 1, torch.rand(own.shape, generator=draw), -1.0).argmax(dim=1, keepdim=True)
            kept = torch.zeros_like(own, dtype=torch.bool).scatter_(1, chosen, True) & (own == 1)
            own = torch.where(kept, own, own.new_full((), -1))
        return own


class _Annotated(View):
    """A task's samples with the labels that it annotates; a column of -1 for each of the `known` classes of earlier tasks is put before
    them where it is asked for, since a stream of many tasks would hold mostly these."""

    def __init__(self, dataset: Dataset, rows: Tensor, own: Tensor, known: int) -> None:
        super().__init__(dataset, rows)
        self.own, self.known = own, known

    def _targets(self) -> Tensor:
        return torch.cat([self.own.new_full((len(self.own), self.known), -1), self.own], dim=1)

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        own = self.own.index_select(0, indices)
        batch.target = torch.cat([own.new_full((len(own), self.known), -1), own], dim=1) if self.known else own
        return batch


def _dealt(joins: list[tuple[Tensor, Tensor]], tasks: int) -> tuple[Tensor, ...]:
    """The samples of each task, in order, from blocks of (sample, task); to sort them all at once would take several times the memory."""
    counts = [torch.bincount(task, minlength=tasks) for _, task in joins]
    total = torch.stack(counts).sum(0)
    rows = torch.empty(int(total.sum()), dtype=torch.int32)
    free = total.cumsum(0) - total  # where the next sample of each task goes
    for (row, task), count in zip(joins, counts, strict=True):
        before = free - (count.cumsum(0) - count)
        rows[before.repeat_interleave(count) + torch.arange(len(row))] = row[task.argsort(stable=True)]
        free += count
    return rows.split(total.tolist())


def _begins(numbers: Tensor) -> Tensor:
    """Where another number begins than the one before."""
    return numbers.diff(prepend=numbers.new_full((1,), -1)) != 0
