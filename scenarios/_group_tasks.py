"""Tasks that are groups of a source's samples, or one source each: what streams of instruction sets and of domains share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from streamcl.data import ArrayDataset, SinglePass, Subset, View, split_by_class
from streamcl.errors import ConfigError, DataError
from streamcl.plugins import near_name
from streamcl.seeding import generator
from streamcl.stream import Batch, Column, Dataset, Modality, Scenario, Source, SourceData, StreamInfo, Task

from ._division import arranged, by_task, listing, need_test


class GroupTasks(Scenario):
    """`data` is one source, whose groups are the tasks, or a list of sources, each of which is a task.

    `by` names the grouping of the one source (its own groups where it is not given), `names` the sources of a list. `order` is the order
    of the source or of the list ("given"), the seed's permutation ("seed"), or a list of all names. Each task has its own test set.
    """

    kind: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    fact: ClassVar[str]  # what a task calls its group

    def __init__(
        self,
        *,
        data: Source | list[Source],
        by: str | None = None,
        names: list[str] | None = None,
        order: Literal["given", "seed"] | list[str | int] = "given",
        online: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if by is not None and isinstance(data, list):
            raise ConfigError("by divides one source, and data is a list of sources, each of which is a task: leave out by")
        if names is not None and (not isinstance(data, list) or not len(data) == len(names) == len(set(names))):
            raise ConfigError("names gives each source of the list data a name of its own: one for each, no two alike")
        if data == []:
            raise ConfigError("data lists no source: at least one is needed")
        self.data, self.by, self.names, self.order, self.online = data, by, names, order, online

    @abstractmethod
    def check(self, loaded: SourceData, first: Batch, where: str) -> None:
        """Raise for a source whose samples this kind cannot use; `first` is one of them."""

    def open(self, seed: int) -> StreamInfo:
        sources = self.data if isinstance(self.data, list) else [self.data]
        parts = [source.load() for source in sources]
        labels = self._labels(sources)
        for loaded, label in zip(parts, labels, strict=True):
            where = f"{self.kind}: {label}" if len(parts) > 1 else self.kind
            need_test(loaded, where)
            if not len(loaded.train):
                raise DataError(f"{where}: there is not a single training sample")
            self.check(loaded, loaded.train[torch.zeros(1, dtype=torch.int64)], where)
        if isinstance(self.data, list):
            self._open_several(parts, labels, seed)
        else:
            self._open_one(parts[0], seed)
        self._hold_back(seed)
        self.problems = {
            problem if len(parts) == 1 else f"{label}: {problem}": count
            for loaded, label in zip(parts, labels, strict=True)
            for problem, count in loaded.problems.items()
        }
        self.info = StreamInfo(
            modalities=parts[0].modalities,
            target="text",
            metrics=self.metrics,
            classes=len(self._names),
            tasks=len(self._names),
            passes=1 if self.online else None,
            licence="; ".join(dict.fromkeys(loaded.licence for loaded in parts)),
            class_names=tuple(self._names),
        )
        return self.info

    def task(self, index: int) -> Task:
        dataset, rows = self._train[index]
        train: Dataset = _rows(dataset, rows, index)
        return Task(
            index=index,
            name=self._names[index],
            train=SinglePass(train) if self.online else train,
            classes=(index,),
            seen=tuple(range(index + 1)),
            labels=(index,),
            validation=_rows(dataset, self._held[index], index) if self.validation else None,
            names=dict(enumerate(self._names[: index + 1])),
            about={self.fact: self._names[index]},
        )

    def __len__(self) -> int:
        return len(self._names)

    def test(self, task: Task, after: Task) -> Dataset | None:
        dataset, rows = self._test[task.index]
        return _rows(dataset, rows, task.index) if len(rows) else None

    def files(self) -> list[str]:
        sources = self.data if isinstance(self.data, list) else [self.data]
        return [file for source in sources for file in source.files()]

    def _labels(self, sources: Sequence[Source]) -> list[str]:
        if self.names is not None:
            return self.names
        kinds = [type(source).__name__ for source in sources]
        return [kind if kinds.count(kind) == 1 else f"{kind} {kinds[:place].count(kind) + 1}" for place, kind in enumerate(kinds)]

    def _open_one(self, loaded: SourceData, seed: int) -> None:
        """The groups of a source that have training samples, in order."""
        assert loaded.test is not None
        names, train, test = self._grouping(loaded)
        order = arranged(names, self.order, seed, self.kind, self.fact)
        counts = torch.bincount(train, minlength=len(names))
        empty = [names[number] for number in order if not counts[number]]
        if empty:
            raise DataError(f"{self.kind}: no training sample of {listing(empty, what=self.fact)}: a task without one cannot be learned")
        arrival = torch.empty(len(names), dtype=torch.int64)
        arrival[torch.tensor(order)] = torch.arange(len(names))
        self._names = [names[number] for number in order]
        self._train = [(loaded.train, rows) for rows in by_task(arrival[train], len(names))]
        self._test = [(loaded.test, rows) for rows in by_task(arrival[test], len(names))]

    def _grouping(self, loaded: SourceData) -> tuple[list[str], Tensor, Tensor]:
        assert loaded.test is not None
        if self.by is None:
            if loaded.train.targets.dim() != 1 or loaded.train.targets.is_floating_point():
                among = listing(list(loaded.groupings), what="grouping") or "none"
                raise ConfigError(
                    f"{self.kind}: the targets of this source ({loaded.target}) are no groups: name one with by; there are {among}"
                )
            return loaded.class_names, loaded.train.targets, loaded.test.targets
        if self.by not in loaded.groupings:
            others = f": there are {listing(list(loaded.groupings), what='grouping')}" if loaded.groupings else ": this source has none"
            raise ConfigError(f"{self.kind}: by names an unknown grouping {self.by!r}" + (near_name(self.by, loaded.groupings) or others))
        grouping = loaded.groupings[self.by]
        if grouping.test is None:
            raise ConfigError(f"{self.kind}: the grouping {self.by!r} says nothing of the test samples: name another one")
        return grouping.names, grouping.train, grouping.test

    def _open_several(self, parts: Sequence[SourceData], labels: Sequence[str], seed: int) -> None:
        """One task for each source; ids and the numbers of pairs go on from source to source, so that none is used twice."""
        for loaded, label in zip(parts[1:], labels[1:], strict=True):
            for name in {**parts[0].modalities, **loaded.modalities}:
                first, own = parts[0].modalities.get(name), loaded.modalities.get(name)
                if first != own:
                    raise ConfigError(
                        f"{self.kind}: {name} is {_described(first)} in {labels[0]} and {_described(own)} in {label}: all sources of a "
                        "stream need the same modalities, of the same size"
                    )
        order = arranged(labels, self.order, seed, self.kind, self.fact)
        self._names = [labels[number] for number in order]
        ids = pairs = 0
        numbered: list[tuple[Dataset, Dataset]] = []
        for loaded in parts:
            assert loaded.test is not None
            both = (loaded.train, loaded.test)
            numbered.append((_renumbered(both[0], ids, pairs), _renumbered(both[1], ids, pairs)))
            pairs += 1 + max(int(_pairs(dataset).max()) if len(dataset) else 0 for dataset in both)
            ids += 1 + max(int(dataset.ids.max()) if len(dataset) else 0 for dataset in both)
        self._train = [(numbered[number][0], torch.arange(len(numbered[number][0]))) for number in order]
        self._test = [(numbered[number][1], torch.arange(len(numbered[number][1]))) for number in order]

    def _hold_back(self, seed: int) -> None:
        """Give validation its part of every task, all captions of a picture together."""
        if not self.validation:
            return
        task = torch.arange(len(self._train)).repeat_interleave(torch.tensor([len(rows) for _, rows in self._train]))
        pair = torch.cat([_pairs(dataset)[rows] for dataset, rows in self._train])
        both = task * (int(pair.max()) + 1) + pair
        units, unit = both.unique(return_inverse=True)
        _, held = split_by_class(units // (int(pair.max()) + 1), self.validation, generator(seed, "validation"))
        chosen = torch.zeros(len(units), dtype=torch.bool)
        chosen[held] = True
        masks = chosen[unit].split([len(rows) for _, rows in self._train])
        self._held = [rows[mask] for (_, rows), mask in zip(self._train, masks, strict=True)]
        self._train = [(dataset, rows[~mask]) for (dataset, rows), mask in zip(self._train, masks, strict=True)]


def _rows(dataset: Dataset, rows: Tensor, index: int) -> Subset:
    return Subset(dataset, rows, targets=torch.full((len(rows),), index))


def _pairs(dataset: Dataset) -> Tensor:
    """What each row belongs together by: the number of its picture where captions have one, or else the row itself."""
    pair = getattr(dataset, "extra", {}).get("pair")
    return pair if isinstance(pair, Tensor) else dataset.ids


def _renumbered(dataset: Dataset, ids: int, pairs: int) -> Dataset:
    """A data set whose ids and pairs begin further on."""
    if isinstance(dataset, ArrayDataset):
        extra: dict[str, Column] = {**dataset.extra, "pair": _pairs(dataset) + pairs}
        return ArrayDataset(dataset.inputs, dataset.targets, dataset.ids + ids, dataset.present, extra)
    return _FurtherOn(dataset, ids, pairs)


class _FurtherOn(View):
    """The same for what is decoded or drawn when it is read."""

    def __init__(self, dataset: Dataset, ids: int, pairs: int) -> None:
        super().__init__(dataset)
        self.by, self.pairs = ids, pairs
        self.extra = {"pair": _pairs(dataset) + pairs}

    def _ids(self) -> Tensor:
        return super()._ids() + self.by

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        pair = batch.extra.get("pair")
        pair = pair if isinstance(pair, Tensor) else batch.ids
        return batch.replace(ids=batch.ids + self.by, extra={**batch.extra, "pair": pair + self.pairs})


def _described(modality: Modality | None) -> str:
    if modality is None:
        return "absent"
    return f"{modality.kind} of {' x '.join(map(str, modality.shape))}" if modality.shape else modality.kind
