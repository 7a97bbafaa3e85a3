"""Data sets and batches: vectorised in memory, workers for what is on disk. The order of reading is always the caller's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from streamcl.errors import DataError, StreamclError
from streamcl.stream import Batch, Column, Dataset, join, level, take

CHUNK = 256  # samples; smaller batches are looked up together


class MapDataset(ABC):
    """What data sets that can be read at any index share: batches in any order, and views of a part."""

    targets: Tensor
    ids: Tensor
    workers: int = 0  # processes that read ahead
    in_memory: bool = False  # a look-up is a copy of rows: small batches are looked up together
    among: tuple[int, ...] | None = None  # of a test set: the classes that its samples are decided among, where not all that were seen

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def __getitem__(self, indices: Tensor) -> Batch: ...

    def read(self, order: Tensor, size: int) -> Iterator[Batch]:
        if self.in_memory:
            yield from self._together(order, size)
            return
        yield from self._ahead(self.__getitem__, order.split(size) if len(order) else ())

    def _ahead(self, work: Callable[[Tensor], Any], plan: Sequence[Tensor]) -> Iterator[Any]:
        """What `work` makes of each part of the plan, ahead of time in other processes where there are workers."""
        if self.workers == 0 or len(plan) < 2:
            yield from map(work, plan)
            return
        loader: DataLoader = DataLoader(
            _Guarded(work),  # type: ignore[arg-type]
            sampler=plan,
            batch_size=None,
            num_workers=min(self.workers, len(plan)),
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the loader draws a seed for its workers: not from the run's generator, or a resume would differ
        )
        for answer in loader:
            if isinstance(answer, StreamclError):
                raise answer
            yield answer

    def _together(self, order: Tensor, size: int) -> Iterator[Batch]:
        """Many small batches are looked up at once and handed out as views."""
        for part in order.split(size * max(1, CHUNK // size)) if len(order) else ():
            found = self[part]
            if len(part) <= size:
                yield found
                continue
            inputs, present, extra = (
                {name: _pieces(column, size) for name, column in columns.items()}
                for columns in (found.inputs, found.present or {}, found.extra)
            )
            targets, tasks = (None if column is None else column.split(size) for column in (found.target, found.task))
            for step, ids in enumerate(found.ids.split(size)):
                yield Batch(
                    {name: pieces[step] for name, pieces in inputs.items()},
                    None if targets is None else targets[step],
                    ids,
                    {name: pieces[step] for name, pieces in present.items()} if present else None,  # type: ignore[misc]
                    None if tasks is None else tasks[step],
                    {name: pieces[step] for name, pieces in extra.items()} if extra else {},
                )

    def batches(self, size: int, shuffle: bool = False, generator: torch.Generator | None = None) -> Iterator[Batch]:
        order = torch.randperm(len(self), generator=generator) if shuffle else torch.arange(len(self))
        return self.read(order, size)


class ArrayDataset(MapDataset):
    """Samples that lie in memory: one column per modality, indexed a batch at a time.

    Images stay uint8 until they reach the device. `targets` are the numbers of the classes, or the rows of a label matrix.
    """

    in_memory = True

    def __init__(
        self,
        inputs: dict[str, Column],
        targets: Tensor,
        ids: Tensor | None = None,
        present: dict[str, Tensor] | None = None,
        extra: dict[str, Column] | None = None,
    ) -> None:
        self.inputs, self.targets, self.present, self.extra = inputs, targets, present, extra or {}
        self.ids = torch.arange(len(targets)) if ids is None else ids
        _check_lengths(len(targets), inputs, self.extra, present or {}, {"ids": self.ids})

    def __getitem__(self, indices: Tensor) -> Batch:
        return self.labelled(indices, self.targets.index_select(0, indices))

    def labelled(self, indices: Tensor, targets: Tensor) -> Batch:
        """These samples with these targets."""
        return Batch(
            {name: take(values, indices) for name, values in self.inputs.items()},
            targets,
            self.ids.index_select(0, indices),
            None if self.present is None else {name: mask.index_select(0, indices) for name, mask in self.present.items()},
            None,
            {name: take(values, indices) for name, values in self.extra.items()} if self.extra else {},
        )


def _check_lengths(count: int, *columns: Mapping[str, Column]) -> None:
    for name, column in (item for group in columns for item in group.items()):
        if len(column) != count:
            raise DataError(f"{name} has {len(column)} rows and the targets have {count}: they must be equally many")


class FileDataset(MapDataset):
    """Samples that are decoded when they are read, ahead of time by `workers` processes (0: in this one).

    `decode(rows)` gets row numbers and returns the columns of these rows; it runs inside the workers, so it must not hold open
    files. A record that does not decode raises DataError with the file and the row. `extra` and `present` lie in memory.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], dict[str, Column]],
        targets: Tensor,
        ids: Tensor | None = None,
        workers: int = 2,
        extra: dict[str, Column] | None = None,
        present: dict[str, Tensor] | None = None,
    ) -> None:
        self.decode, self.targets, self.workers = decode, targets, workers
        self.ids = torch.arange(len(targets)) if ids is None else ids
        self.extra, self.present = extra or {}, present
        _check_lengths(len(targets), self.extra, present or {}, {"ids": self.ids})

    def __getitem__(self, indices: Tensor) -> Batch:
        return self._completed(self._decoded(indices), indices)

    def read(self, order: Tensor, size: int) -> Iterator[Batch]:
        plan = order.split(size) if len(order) else ()
        # What lies in memory here is looked up here: every tensor that a worker hands over costs as much as a few small images.
        return map(self._completed, self._ahead(self._decoded, plan), plan)

    def _decoded(self, indices: Tensor) -> dict[str, Column]:
        return self.decode(indices.tolist())

    def _completed(self, inputs: dict[str, Column], indices: Tensor) -> Batch:
        return Batch(
            inputs,
            self.targets.index_select(0, indices),
            self.ids.index_select(0, indices),
            None if self.present is None else {name: mask.index_select(0, indices) for name, mask in self.present.items()},
            None,
            {name: take(values, indices) for name, values in self.extra.items()} if self.extra else {},
        )


class _Guarded:
    """Hands an error for the person back as a value: raised in a worker, it would arrive wrapped in the worker's traceback."""

    def __init__(self, work: Callable[[Tensor], Any]) -> None:
        self.work = work

    def __getitem__(self, indices: Tensor) -> Any:
        try:
            return self.work(indices)
        except StreamclError as error:
            return error


def _as_it_is(answer: Any) -> Any:
    return answer


class Subset(MapDataset):
    """Some samples of another data set, in a given order, with its classes renumbered by `relabel` or its targets replaced.

    For a matrix of labels `relabel` lists the columns to keep, -1 for one that is not annotated here.
    """

    def __init__(self, dataset: Dataset, indices: Tensor, relabel: Tensor | None = None, targets: Tensor | None = None) -> None:
        if targets is None:
            own = dataset.targets.index_select(0, indices)
            targets = own if relabel is None else relabelled(own, relabel)
            self.own = relabel is None  # the targets that the data set reads are the ones of this view
        else:
            self.own = False
        self.targets, self.dataset, self.indices = targets, dataset, indices
        self.ids = dataset.ids.index_select(0, indices)
        self.workers, self.in_memory = getattr(dataset, "workers", 0), getattr(dataset, "in_memory", False)

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        if not self.own:
            batch.target = self.targets.index_select(0, indices)
        return batch

    def __getitem__(self, indices: Tensor) -> Batch:
        rows = self.indices.index_select(0, indices)
        if type(self) is Subset and type(self.dataset) is ArrayDataset:  # another kind of subset has more to finish
            return self.dataset.labelled(rows, self.targets.index_select(0, indices))
        return self._finish(self.dataset[rows], indices)

    def read(self, order: Tensor, size: int) -> Iterator[Batch]:
        if self.in_memory:
            return self._together(order, size)
        parts = order.split(size) if len(order) else ()
        return map(self._finish, self.dataset.read(self.indices.index_select(0, order), size), parts)


def relabelled(targets: Tensor, relabel: Tensor) -> Tensor:
    """Classes by their new number; of a matrix of labels the columns `relabel`, where -1 is one that is not annotated."""
    if targets.dim() == 1:
        return relabel.index_select(0, targets)
    if targets.dtype == torch.uint8:  # masks: 255 stays what it is
        return torch.cat([relabel, relabel.new_full((256 - len(relabel),), 255)])[targets.long()].to(torch.uint8)
    kept = targets.index_select(1, relabel.clamp(min=0))
    return kept.masked_fill(relabel < 0, -1)


def _pieces(column: Column, size: int) -> Sequence[Column]:
    return [column[start : start + size] for start in range(0, len(column), size)] if isinstance(column, list) else column.split(size)


class Joined(MapDataset):
    """Data sets one after another, read as one: ahead, in other processes, where any of them is."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = [d for d in datasets if len(d)]
        self.targets = torch.cat(level([d.targets for d in datasets]))
        self.ids = torch.cat([d.ids for d in datasets])
        self.starts = torch.tensor([0] + [len(d) for d in self.datasets]).cumsum(0)
        self.workers = max((getattr(d, "workers", 0) for d in self.datasets), default=0)
        self.in_memory = all(getattr(d, "in_memory", False) for d in self.datasets)

    def __getitem__(self, indices: Tensor) -> Batch:
        owner = torch.bucketize(indices, self.starts[1:], right=True)
        pieces, places = [], []
        for number in owner.unique().tolist():
            mine = (owner == number).nonzero().squeeze(1)
            places.append(mine)
            pieces.append(self.datasets[number][indices[mine] - self.starts[number]])
        if len(pieces) == 1:
            return pieces[0]
        return Batch.cat(pieces)[torch.cat(places).argsort()]


class View(MapDataset):
    """What is read of another data set, of its samples `rows` where they are given, changed on the way by `_finish`.

    Its targets and ids are looked up where they are asked for and not held a second time, so that many tasks of many samples may be
    alive at once.
    """

    def __init__(self, dataset: Dataset, rows: Tensor | None = None) -> None:
        self.dataset, self.rows = dataset, rows
        self.workers, self.in_memory = getattr(dataset, "workers", 0), getattr(dataset, "in_memory", False)

    def __len__(self) -> int:
        return len(self.dataset if self.rows is None else self.rows)

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        """The samples `indices` of this view, as they are read of the data set below."""
        return batch

    def _targets(self) -> Tensor:
        return self._of_rows(self.dataset.targets)

    def _ids(self) -> Tensor:
        return self._of_rows(self.dataset.ids)

    if not TYPE_CHECKING:  # to a type checker they are the plain attributes of every data set
        targets = property(lambda self: self._targets())
        ids = property(lambda self: self._ids())

    def _of_rows(self, column: Tensor) -> Tensor:
        return column if self.rows is None else column.index_select(0, self.rows)

    def _below(self, indices: Tensor) -> Tensor:
        """Where these samples stand in the data set below."""
        return indices if self.rows is None else self.rows.index_select(0, indices).long()

    def __getitem__(self, indices: Tensor) -> Batch:
        return self._finish(self.dataset[self._below(indices)], indices)

    def read(self, order: Tensor, size: int) -> Iterator[Batch]:
        if self.in_memory:
            return self._together(order, size)
        return map(self._finish, self.dataset.read(self._below(order), size), order.split(size) if len(order) else ())


class Masked(View):
    """Samples of which some lack a modality: `present` says which have it, and the value of one that is absent cannot be read.

    It is NaN in floats, 0 in integers, "" in text. What the data set lacks itself stays absent.
    """

    def __init__(self, dataset: Dataset, present: dict[str, Tensor]) -> None:
        super().__init__(dataset)
        self.present = present

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        masks = dict(batch.present or {})
        for name, mask in self.present.items():
            mine = mask.index_select(0, indices)
            masks[name] = mine & masks[name] if name in masks else mine
        inputs = {name: blanked(values, masks.get(name), owned=self.in_memory) for name, values in batch.inputs.items()}
        return Batch(inputs, batch.target, batch.ids, masks, batch.task, batch.extra)


def blanked(values: Column, present: Tensor | None, owned: bool = False) -> Column:
    """A column without the values that are absent; the same tensor, changed, where it is `owned` by the caller."""
    if present is None:
        return values
    if isinstance(values, list):
        return values if bool(present.all()) else [value if there else "" for value, there in zip(values, present.tolist(), strict=True)]
    blank = torch.nan if values.is_floating_point() else 0
    if values.device.type != "cpu" or values.dtype == torch.bfloat16:  # which NumPy does not know
        return values.masked_fill(~present.to(values.device).view(-1, *[1] * (values.dim() - 1)), blank)
    absent = np.flatnonzero(~present.cpu().numpy())
    if not len(absent):
        return values
    left = values if owned else values.clone()
    left.numpy()[absent] = blank  # row by row; torch goes through the mask for every element, in many times the time
    return left


class Told(View):
    """Samples with the number of their task, as a task-incremental protocol tells it: one for all, or one for each."""

    def __init__(self, dataset: Dataset, task: int | Tensor) -> None:
        super().__init__(dataset)
        self.task = task

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        task = self.task
        return batch.replace(task=torch.full_like(batch.ids, task) if isinstance(task, int) else task.index_select(0, indices))


class Unlabelled(View):
    """Samples without their targets, as a deployed model is served them."""

    def _targets(self) -> Tensor:
        raise AttributeError("these samples are served without their targets")

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        return batch.replace(target=None)


class SinglePass(View):
    """Samples that may be read once, as in an online stream: a second reading is an error that says so."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self.workers, self.in_memory = 0, False  # each batch is marked as it is handed out, not as it is looked up
        self.read_already = np.zeros(len(dataset), dtype=bool)

    def _mark(self, indices: Tensor) -> None:
        rows = indices.numpy()  # a few rows at a time: NumPy is there in a third of the time
        if self.read_already[rows].any():
            raise DataError(
                "this stream is single-pass (scenario.online: true) and a sample was read twice: "
                "use a strategy that reads each one once, with epochs: 1"
            )
        self.read_already[rows] = True

    def __getitem__(self, indices: Tensor) -> Batch:
        self._mark(indices)
        return self.dataset[indices]

    def read(self, order: Tensor, size: int) -> Iterator[Batch]:
        for indices, batch in zip(order.split(size) if len(order) else (), self.dataset.read(order, size), strict=True):
            self._mark(indices)
            yield batch


def whole(dataset: Dataset, size: int = 1024) -> Batch:
    """A data set as one batch."""
    return Batch.cat(list(dataset.batches(size)))


def place_in_class(targets: Tensor) -> Tensor:
    """The how-manieth sample of its class each one is, counted from 0  # (samples,)"""
    order = targets.argsort(stable=True)
    counts = targets[order].unique_consecutive(return_counts=True)[1]
    place = torch.empty_like(targets)
    place[order] = torch.arange(len(targets)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return place


def split_by_class(targets: Tensor, fraction: float, generator: torch.Generator, at_least: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of two parts, each in the order of the samples; the second gets `fraction` of every class, drawn at random.

    A class gives the whole number below or above its share, so that the second part as a whole has the size asked for; it gives
    `at_least` this many, and it always keeps one sample.
    """
    shuffled = torch.randperm(len(targets), generator=generator)
    _, group, counts = targets[shuffled].unique(return_inverse=True, return_counts=True)
    up_to = (counts.cumsum(0).double() * fraction + 0.5).floor().long()
    share = up_to.diff(prepend=up_to.new_zeros(1)).clamp(min=at_least).minimum(counts - 1)
    held = torch.zeros(len(targets), dtype=torch.bool)
    held[shuffled] = place_in_class(group) < share[group]
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)


def split_by(kind: str, targets: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of two parts, each in the order of the samples, for targets of any kind; the second gets `fraction`, at least one of each
    class or one in all, drawn at random. The first keeps a sample of every class, of sets of labels one that carries it.
    """
    if kind == "class":
        return split_by_class(targets, fraction, generator, at_least=1)
    count = len(targets)
    held = torch.randperm(count, generator=generator) < min(max(1, round(fraction * count)), count - 1)
    if kind == "labels":
        carried = targets == 1
        lost = carried.any(dim=0) & ~carried[~held].any(dim=0)
        held[carried[:, lost].int().argmax(dim=0)] = False
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)


__all__ = [
    "ArrayDataset",
    "Column",
    "FileDataset",
    "Joined",
    "MapDataset",
    "Masked",
    "SinglePass",
    "Subset",
    "Told",
    "Unlabelled",
    "View",
    "blanked",
    "check_finite",
    "join",
    "place_in_class",
    "split_by",
    "split_by_class",
    "whole",
]


def check_finite(columns: dict[str, Any], where: str) -> None:
    """Raise DataError naming the first rows with NaN or infinite values, and how many there are."""
    for name, column in columns.items():
        if isinstance(column, Tensor) and column.is_floating_point():
            bad = (~torch.isfinite(column.flatten(1) if column.dim() > 1 else column[:, None])).any(dim=1).nonzero().squeeze(1)
            if len(bad):
                rows = ", ".join(str(r) for r in bad[:5].tolist())
                raise DataError(
                    f"{where}: {len(bad)} rows of {name} hold NaN or infinite values (rows {rows}{', ...' if len(bad) > 5 else ''})"
                )
