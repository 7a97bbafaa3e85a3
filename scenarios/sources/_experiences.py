"""What the streams of an Avalanche benchmark hold, and the samples of a scenario of ours as Avalanche reads them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcl.data import SinglePass
from streamcl.errors import ConfigError, DataError, StreamclError
from streamcl.stream import Column, Dataset, Modality, StreamInfo

from ._media import Encoded


@dataclass
class Part:
    """One stream of a benchmark, its experiences joined: what is known of each sample without reading it."""

    where: str
    datasets: list[Any]
    targets: np.ndarray  # (samples,) as the benchmark numbers the classes
    experience: np.ndarray
    label: np.ndarray  # of the task
    own: np.ndarray  # the class in the data set below, as a place in `names`; -1 where it is not known
    names: list[str]
    leaves: list[Any] = field(default_factory=list)  # the data sets below, and which sample of which is which
    leaf: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    row: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @classmethod
    def of(cls, stream: list[Any], where: str) -> Part:
        datasets = [experience.dataset for experience in stream]
        sizes = [len(dataset) for dataset in datasets]
        total = sum(sizes)
        part = cls(
            where,
            datasets,
            np.concatenate([_numbers(getattr(d, "targets", None), len(d), where) for d in datasets] or [np.empty(0, dtype=np.int64)]),
            np.repeat(np.arange(len(datasets)), sizes),
            np.concatenate([_task_labels(e, len(e.dataset), where) for e in stream] or [np.empty(0, dtype=np.int64)]),
            np.full(total, -1),
            [],
            leaf=np.full(total, -1),
            row=np.full(total, -1),
        )
        start = 0
        for dataset, size in zip(datasets, sizes, strict=True):
            for leaf, places, rows in _leaves(dataset, np.arange(size)):
                number = next((n for n, known in enumerate(part.leaves) if known is leaf), len(part.leaves))
                if number == len(part.leaves):
                    part.leaves.append(leaf)
                part.leaf[start + places], part.row[start + places] = number, rows
            start += size
        for number, leaf in enumerate(part.leaves):
            part._name_classes(leaf, np.flatnonzero(part.leaf == number))
        return part

    def _name_classes(self, leaf: Any, places: np.ndarray) -> None:
        known = getattr(leaf, "targets", None)
        if known is None and isinstance(getattr(leaf, "tensors", None), (list, tuple)) and len(leaf.tensors) > 1:
            known = leaf.tensors[1]
        classes = getattr(leaf, "classes", None)
        try:
            numbers = _numbers(known, len(leaf), self.where)[self.row[places]]
        except DataError:
            return
        listed = isinstance(classes, (list, tuple)) and len(classes) > int(numbers.max(initial=0))
        values, inverse = np.unique(numbers, return_inverse=True)
        named = [str(classes[value]) if listed else str(value) for value in values.tolist()]  # type: ignore[index]
        self.names += [name for name in named if name not in self.names]
        self.own[places] = np.array([self.names.index(name) for name in named], dtype=np.int64)[inverse]


class Reader:
    """Reads rows of a part through Avalanche, one after another as its data sets give them; it travels to worker processes."""

    def __init__(self, part: Part, raw: bool, size: int | None) -> None:
        self.datasets = [_bare(d) if raw else d.eval() if hasattr(d, "eval") else d for d in part.datasets]
        self.experience, self.where = part.experience, part.where
        self.place = np.concatenate([np.arange(len(d)) for d in part.datasets])
        self.rows, self.name, self.grey = np.arange(len(part.experience)), "image", False
        self.encoded: Encoded | None = Encoded("image", self._picture, self.said, self.rows)
        self.encoded.size = size
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.uint8
        self.size = size

    def said(self, row: int) -> str:
        return f"{self.where}, experience {self.experience[row]}, sample {self.place[row]}"

    def item(self, row: int) -> Any:
        try:
            return self.datasets[self.experience[row]][int(self.place[row])][0]
        except StreamclError:
            raise
        except Exception as error:  # what broken files and a benchmark's own transforms raise is of every type
            raise DataError(f"{self.said(row)} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error

    def settle(self, ours: Samples | None) -> tuple[Modality, str]:
        """The modality, from the first sample, or as the scenario of ours that made the benchmark said."""
        first = self.item(0)
        if _is_picture(first):
            assert self.encoded is not None
            step = max(len(self.rows) // 16, 1)
            self.grey = all(getattr(self.item(int(row)), "mode", "") in ("L", "1") for row in self.rows[::step])
            self.shape = (1 if self.grey else 3, *self.encoded.one(0).shape[1:])
            return Modality("image", self.shape, high=255), self.name
        self.encoded = None
        value = self._tensor(0, first)
        self.shape, self.dtype = tuple(value.shape), value.dtype
        if ours is not None:
            self.name = ours.name
            return ours.modality, self.name
        kind = {1: "vector", 3: "image"}.get(value.dim())
        if kind is None:
            raise ConfigError(
                f"{self.said(0)} has the shape {self.shape}: pictures, tensors (channels, height, width) or vectors are needed"
            )
        if self.size is not None and self.shape[1:] != (self.size, self.size):
            raise ConfigError(
                f"avalanche: size scales pictures, and {self.where} gives tensors of {self.shape}: scale them in its transforms"
            )
        self.name = kind
        return Modality(kind, self.shape, high=255 if value.dtype == torch.uint8 else None), kind

    def like(self, other: Reader) -> None:
        """Read as the training part is read."""
        self.name, self.grey, self.shape, self.dtype = other.name, other.grey, other.shape, other.dtype
        if other.encoded is None:
            self.encoded = None
        elif self.encoded is not None:
            self.encoded.shape = other.encoded.shape

    @property
    def bytes_each(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __call__(self, places: Iterable[int]) -> dict[str, Column]:
        rows = self.rows[list(places)].tolist()
        if self.encoded is not None:
            pictures = self.encoded.read(rows)
            return {self.name: pictures[:, :1].contiguous() if self.grey else pictures}
        values = torch.empty(len(rows), *self.shape, dtype=self.dtype)
        for place, row in enumerate(rows):
            value = self._tensor(row, self.item(row))
            if value.shape != self.shape or value.dtype != self.dtype:
                raise DataError(f"{self.said(row)} is {_form(value)}, and the first sample is {_form(values[0])}: make them equal")
            values[place] = value
        return {self.name: values}

    def _picture(self, row: int) -> Any:
        picture = self.item(row)
        if not _is_picture(picture):
            raise DataError(f"{self.said(row)} is a {type(picture).__name__}, and the first sample is a picture")
        if self.grey and picture.mode not in ("L", "1"):
            raise DataError(f"{self.said(row)} is in colour and the others are grey: convert them to one of the two")
        return picture

    def _tensor(self, row: int, value: Any) -> Tensor:
        if not isinstance(value, (Tensor, np.ndarray)):
            what = "a picture" if _is_picture(value) else f"a {type(value).__name__}"
            raise DataError(f"{self.said(row)} is {what}: every sample must be a picture, or every one a tensor")
        tensor = torch.as_tensor(value)
        return tensor if tensor.dtype == torch.uint8 else tensor.float()


def _numbers(values: Any, count: int, where: str) -> np.ndarray:
    try:
        return np.fromiter((operator.index(value) for value in values), dtype=np.int64, count=count)
    except (TypeError, ValueError):
        raise DataError(f"avalanche: {where}: its data sets do not say one class per sample (targets), as whole numbers") from None


def _task_labels(experience: Any, count: int, where: str) -> np.ndarray:
    told = getattr(experience.dataset, "targets_task_labels", None)
    return _numbers(told, count, where) if told is not None else np.full(count, getattr(experience, "task_label", 0))


def _leaves(data: Any, rows: np.ndarray) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """The data sets below joined and cut ones: each with the places among `rows` that it fills, and its own rows there."""
    from avalanche.benchmarks.utils.flat_data import FlatData

    data = getattr(data, "_flat_data", data)
    inner, indices = None, None
    if isinstance(data, FlatData):
        inner, indices = data._datasets, data._indices
    elif isinstance(data, torch.utils.data.Subset):
        inner, indices = [data.dataset], data.indices
    elif isinstance(data, torch.utils.data.ConcatDataset):
        inner = data.datasets
    if inner is None:
        yield data, np.arange(len(rows)), rows
        return
    if indices is not None:
        rows = np.fromiter(indices, dtype=np.int64, count=len(indices))[rows]
    ends = np.cumsum([len(part) for part in inner])
    owner = np.searchsorted(ends, rows, side="right")
    for number in np.unique(owner).tolist():
        mine = np.flatnonzero(owner == number)
        for leaf, places, own in _leaves(inner[number], rows[mine] - (ends[number] - len(inner[number]))):
            yield leaf, mine[places], own


def _bare(dataset: Any) -> Any:
    """The data set without transforms at any depth, but for those that are frozen because they make the benchmark what it is.

    Avalanche's own `remove_current_transform_group` leaves those of inner data sets whose current group is another one.
    """
    from avalanche.benchmarks.utils.transform_groups import EmptyTransformGroups

    def stripped(flat: Any) -> Any:
        if not hasattr(flat, "_shallow_clone_dataset"):
            return flat
        clone = flat._shallow_clone_dataset()
        if hasattr(clone, "_flat_data"):
            clone._flat_data = stripped(clone._flat_data)
        else:
            clone._transform_groups = EmptyTransformGroups()
            clone._datasets = [stripped(inner) for inner in clone._datasets]
        return clone

    return stripped(dataset)


def _is_picture(value: Any) -> bool:
    from PIL.Image import Image

    return isinstance(value, Image)


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of {tuple(value.shape)}"


class Samples(torch.utils.data.Dataset):
    """The samples of a task, `(x, y)` by their index, with what Avalanche looks for beside them.

    Avalanche's replay reads old samples again from where they came, so the single pass of an online stream is not watched over here.
    """

    def __init__(self, dataset: Dataset, name: str, info: StreamInfo) -> None:
        self.dataset = dataset.dataset if isinstance(dataset, SinglePass) else dataset
        self.name, self.modality, self.licence = name, info.modalities[name], info.licence
        self.classes, self.targets = list(info.class_names), dataset.targets.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        batch = self.dataset[torch.tensor([index])]
        values = batch.inputs[self.name]
        assert isinstance(values, Tensor)
        if batch.present is not None and not bool(batch.present.get(self.name, torch.ones(1))[0]):
            raise DataError(f"sample {int(batch.ids[0])} has no {self.name}, and Avalanche knows no missing modalities")
        return values[0], self.targets[index]


class Scaled:
    """Integers as floats from 0 to 1."""

    def __init__(self, high: float) -> None:
        self.high = high

    def __call__(self, values: Tensor) -> Tensor:
        return values / self.high
