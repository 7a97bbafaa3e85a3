"""Hierarchical label expansion: coarse labels come first, finer ones later, for the same kind of samples.

The stream of Lee et al. (ICCV 2023). `levels` goes from coarse to fine, and the classes of the source are the last level: each entry
is the name of a grouping that the source has (`coarse`, `alphabet`), or a mapping from a label to the classes under it:
`{even: ["0", "2"], odd: ["1", "3"]}`. The training samples are dealt out evenly over the levels, each sample once, and carry the label
of their level only. `tasks` says in how many tasks each level arrives: one number per level, by default one task each, which is the
multiple-depth stream; `levels: [coarse], tasks: [1, 5]` is the single-depth one, whose later tasks each bring the children of some
coarse labels. `dual: true` also tells each finer training sample's coarser labels (`extra["parents"]`, a column for each level above
the classes, -1 where a level is not told): the dual-label variant.

The labels of all levels are classes of one stream, numbered as they arrive; `task.level` (1 is the coarsest) and `task.parents` (class
-> its parent's number) tell how they hang together. What is scored of a task is decided among the classes of its own level that were
seen, as the published per-level accuracy is: a coarse label never competes with its own children.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcl.data import MapDataset, SinglePass, Subset, View
from streamcl.errors import ConfigError, DataError
from streamcl.options import PositiveInt
from streamcl.plugins import near_name
from streamcl.seeding import derived, generator
from streamcl.stream import Batch, Dataset, Scenario, Source, SourceData, StreamInfo, Task

from ._division import by_task, dealt, listing, need_target, need_test, numbered

KIND = "hierarchical"


class Hierarchical(Scenario):
    """Levels of labels, from coarse to fine; within a level the children arrive parent by parent."""

    def __init__(
        self,
        *,
        data: Source,
        levels: list[str | dict[str, list[str | int]]],
        tasks: list[PositiveInt] | None = None,
        dual: bool = False,
        online: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not levels:
            raise ConfigError(f"{KIND}: levels is empty: at least one level above the classes is needed")
        if tasks is not None and len(tasks) != len(levels) + 1:
            raise ConfigError(
                f"{KIND}: tasks has {len(tasks)} entries for {len(levels) + 1} levels (the classes are the last): one number for each"
            )
        self.data, self.levels, self.dual, self.online = data, levels, dual, online
        self.tasks = tasks if tasks is not None else [1] * (len(levels) + 1)

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_target(loaded, ("class",), KIND, "one class per sample")
        need_test(loaded, KIND)
        assert loaded.test is not None
        self.problems = loaded.problems
        chains = self._chains(loaded)  # (levels, classes): the label of each class at each level
        names = [*(chain[0] for chain in chains), loaded.class_names]
        above = torch.stack([*(chain[1] for chain in chains), torch.arange(len(loaded.class_names))])
        self._arrange(names, above, seed)
        self._train, self._test = loaded.train, loaded.test
        self._deal(loaded, above, seed)
        self.info = StreamInfo(
            modalities=loaded.modalities,
            classes=len(self._names),
            tasks=len(self),
            passes=1 if self.online else None,
            licence=loaded.licence,
            class_names=tuple(self._names),
        )
        return self.info

    def __len__(self) -> int:
        return len(self._level_of_task)

    def task(self, index: int) -> Task:
        known, reached = self._bounds[index : index + 2]
        train = self._labelled(self._train, self._train_of[index], index)
        validation = self._labelled(self._train, self._validation_of[index], index) if self.validation else None
        level = self._level_of_task[index]
        return Task(
            index=index,
            name=f"level {level + 1}: {listing(self._names[known:reached])}",
            train=SinglePass(train) if self.online else train,
            classes=tuple(range(known, reached)),
            seen=tuple(range(reached)),
            labels=tuple(range(known, reached)),
            validation=validation,
            names=dict(enumerate(self._names[:reached])),
            about={"level": level + 1, "parents": {c: p for c, p in self._parents.items() if c < reached}},
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        rows = self._test_of[task.index]
        if not len(rows):
            return None
        level = self._level_of_task[task.index]
        test = Subset(self._test, rows, targets=self._number[level, self._test.targets[rows]])  # parents would tell half the answer
        test.among = tuple(c for c in after.seen if self._level_of_class[c] + 1 == task.level)
        return test

    def files(self) -> list[str]:
        return self.data.files()

    def _chains(self, data: SourceData) -> list[tuple[list[str], Tensor]]:
        """The names of each level above the classes, and the label that each class has there."""
        number = {name: position for position, name in enumerate(data.class_names)}
        chains = []
        for depth, level in enumerate(self.levels):
            if isinstance(level, str):
                if level not in data.groupings:
                    hint = near_name(level, data.groupings) or f": it has {', '.join(data.groupings) or 'none'}"
                    raise ConfigError(f"{KIND}: levels names {level!r}, which is no grouping of this source{hint}")
                grouping = data.groupings[level]
                label = torch.full((len(number),), -1, dtype=torch.int64).scatter_(0, data.train.targets, grouping.train)
                mixed = (label[data.train.targets] != grouping.train).nonzero().squeeze(1)
                if len(mixed):
                    name = data.class_names[int(data.train.targets[mixed[0]])]
                    raise DataError(f"{KIND}: the samples of class {name!r} lie in several groups of {level!r}: one is needed")
                names = grouping.names
            else:
                names, label = list(level), torch.full((len(number),), -1, dtype=torch.int64)
                for position, members in enumerate(level.values()):
                    if not members:
                        raise ConfigError(f"{KIND}: levels.{depth}: {names[position]!r} lists no class: every label needs one")
                    for member in members:
                        own = numbered(member, number, f"{KIND}: levels.{depth}")
                        if label[own] >= 0:
                            raise ConfigError(f"{KIND}: levels.{depth} lists class {str(member)!r} twice")
                        label[own] = position
            lacking = [data.class_names[c] for c in (label < 0).nonzero().squeeze(1).tolist()]
            if lacking:
                raise ConfigError(f"{KIND}: levels.{depth} leaves out {listing(lacking)}: every class needs a label at every level")
            chains.append((list(names), label))
        return chains

    def _arrange(self, names: list[list[str]], above: Tensor, seed: int) -> None:
        """Which labels arrive in which task, and their numbers: a level's labels by parent, the parents in the seed's order."""
        self._names: list[str] = []
        self._bounds, self._level_of_task = [0], list[int]()
        self._level_of_class: list[int] = []
        self._parents: dict[int, int] = {}
        self._number = torch.full(above.shape, -1, dtype=torch.int64)  # the stream's number of each class's label, by level
        self._own_task: list[int] = []
        for level, count in enumerate(self.tasks):
            parent_of: dict[int, int] = {}
            for c in range(above.shape[1]):
                label, parent = int(above[level, c]), int(self._number[level - 1, c]) if level else -1
                if parent_of.setdefault(label, parent) != parent:
                    raise ConfigError(
                        f"{KIND}: {names[level][label]!r} lies under {self._names[parent_of[label]]!r} and under {self._names[parent]!r}: "
                        "each label has one parent"
                    )
            labels = sorted(parent_of)
            # The first level has the published permutation; seed + level would give a level the one of another seed's level above.
            own = derived(seed, "level", level) if level else seed
            shuffled = np.random.RandomState(own % 2**32).permutation(len(labels)).tolist()
            order = sorted((labels[place] for place in shuffled), key=lambda label: parent_of[label])  # stable: children stay shuffled
            groups = self._together(order, parent_of, count, level)
            for group in groups:
                for label in group:
                    mine = above[level] == label
                    self._number[level, mine] = len(self._names)
                    if level:
                        self._parents[len(self._names)] = parent_of[label]
                    self._names.append(names[level][label])
                    self._level_of_class.append(level)
                    self._own_task.append(len(self._level_of_task))
                self._bounds.append(len(self._names))
                self._level_of_task.append(level)

    def _together(self, order: list[int], parent_of: dict[int, int], count: int, level: int) -> list[list[int]]:
        """A level's labels in `count` tasks, the children of one parent in the same one where there are parents enough."""
        if count > len(order):
            raise ConfigError(f"{KIND}: level {level + 1} has {len(order)} labels and tasks asks for {count}: at most one task for each")
        parents = list(dict.fromkeys(parent_of[label] for label in order))
        if level == 0 or count > len(parents):
            return [part.tolist() for part in np.array_split(np.array(order), count)]
        group_of = {parent: group for group, part in enumerate(np.array_split(np.array(parents), count)) for parent in part.tolist()}
        groups: list[list[int]] = [[] for _ in range(count)]
        for label in order:
            groups[group_of[parent_of[label]]].append(label)
        return groups

    def _deal(self, data: SourceData, above: Tensor, seed: int) -> None:
        """The task of every training sample: first its level, in equal shares of every class, then the task of its label there."""
        assert data.test is not None
        targets, own_task = data.train.targets, torch.tensor(self._own_task)
        counts = torch.bincount(targets, minlength=above.shape[1])
        levels = len(self.tasks)
        short = [f"{data.class_names[c]} ({counts[c]})" for c in (counts < levels).nonzero().squeeze(1).tolist()]
        if short:
            raise DataError(
                f"{KIND}: every class needs {levels} training samples, one for each level, and there are fewer of {listing(short)}"
            )
        shuffled = torch.randperm(len(targets), generator=generator(seed, "levels"))
        ranked = shuffled[targets[shuffled].argsort(stable=True)]
        place = torch.arange(len(ranked)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        level = torch.empty_like(targets)
        level[ranked] = (place + targets[ranked]) % levels
        self._level_of_row = level
        task = own_task[self._number[level, targets]]
        self._train_of, self._validation_of = dealt(task, len(self), task * len(self._names) + targets, self.validation, seed)
        tested = own_task[self._number[:, data.test.targets]]  # (levels, test samples)
        per_level = [by_task(row, len(self)) for row in tested]
        self._test_of = [per_level[level][index] for index, level in enumerate(self._level_of_task)]

    def _labelled(self, dataset: Dataset, rows: Tensor, index: int) -> MapDataset:
        level = self._level_of_task[index]
        targets = dataset.targets[rows]
        view = Subset(dataset, rows, targets=self._number[level, targets])
        if not self.dual:
            return view
        parents = torch.full((len(rows), len(self.levels)), -1, dtype=torch.int64)
        parents[:, :level] = self._number[:level, targets].T
        return _WithParents(view, parents)


class _WithParents(View):
    """Samples with the labels of the levels above theirs."""

    def __init__(self, dataset: Subset, parents: Tensor) -> None:
        super().__init__(dataset)
        self.parents = parents

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        return batch.replace(extra={**batch.extra, "parents": self.parents.index_select(0, indices)})
