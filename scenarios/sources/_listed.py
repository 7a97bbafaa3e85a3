"""Sets whose official files list their samples: targets of any kind, groupings beside them, images decoded now or when they are read.

What the sources of published sets share. Where `_records.py` numbers whatever labels a table holds, these know their classes, and
have their own training and test parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data import ArrayDataset, FileDataset
from streamcl.errors import DataError
from streamcl.options import NonNegativeInt, PositiveInt
from streamcl.stream import Column, Dataset, Grouping, Modality, Source, SourceData, take

from ._media import Encoded
from ._records import EAGER_LIMIT, _Decoder


@dataclass
class Listed:
    """The samples of one part: a column per modality, their targets, and the words for where each stands."""

    columns: dict[str, Column | Encoded]
    targets: Tensor
    groups: dict[str, Tensor] = field(default_factory=dict)  # by the name of the grouping, int64
    present: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Column] = field(default_factory=dict)

    def take(self, rows: Tensor) -> Listed:
        return Listed(
            {
                name: column.take(rows.numpy()) if isinstance(column, Encoded) else take(column, rows)
                for name, column in self.columns.items()
            },
            self.targets[rows],
            {name: group[rows] for name, group in self.groups.items()},
            {name: mask[rows] for name, mask in self.present.items()},
            {name: take(column, rows) for name, column in self.extra.items()},
        )


class Refused:
    """Records that are wrong: the first is an error, or (`on_error: skip`) all are left out and counted by what is wrong with them."""

    def __init__(self, on_error: str) -> None:
        self.skip = on_error == "skip"
        self.problems: dict[str, int] = {}

    def add(self, problem: str, message: str) -> None:
        if not self.skip:
            raise DataError(f"{message}; on_error: skip leaves such records out")
        self.problems[problem] = self.problems.get(problem, 0) + 1


class Standing:
    """Says where a row stands, from a word for each: the path of its file, or the line that lists it."""

    def __init__(self, places: Sequence[str]) -> None:
        self.places = np.asarray(places)  # one block of memory: worker processes share it without copying

    def __call__(self, row: int) -> str:
        return str(self.places[row])


class ListedSource(Source):
    """A record that is wrong is an error, or left out and counted (`on_error: skip`)."""

    size: int | None = None
    seconds: float | None = None
    decode: str = "auto"
    workers: int = 2

    def __init__(self, *, on_error: Literal["fail", "skip"] = "fail") -> None:
        self.on_error = on_error

    def assemble(
        self,
        train: Listed,
        test: Listed | None,
        class_names: Sequence[str],
        refused: Refused,
        *,
        target: str = "class",
        group_names: Mapping[str, Sequence[str]] | None = None,
        about: dict[str, Any] | None = None,
        licence: str | None = None,
    ) -> SourceData:
        """The data sets, with the groupings that `group_names` names."""
        if not len(train.targets):
            raise DataError(f"{type(self).__name__.lower()}: there is not a single training sample")
        train_set, train = self._dataset(train, 0, refused)
        test_set = None
        if test is not None:
            for name, column in test.columns.items():
                like = train.columns[name]
                if isinstance(column, Encoded) and isinstance(like, Encoded):
                    column.shape, column.rate = like.shape, like.rate
            if len(test.targets):
                test_set, test = self._dataset(test, len(train_set), refused)
        return SourceData(
            train_set,
            test_set,
            list(class_names),
            {name: _modality(column) for name, column in train.columns.items()},
            target=target,
            licence=licence or self.licence,
            problems=refused.problems,
            groupings={
                name: Grouping(list(names), train.groups[name], test.groups[name] if test is not None and test_set is not None else None)
                for name, names in (group_names or {}).items()
            },
            about=about or {},
        )

    def _dataset(self, listed: Listed, first_id: int, refused: Refused) -> tuple[Dataset, Listed]:
        encoded = {name: column for name, column in listed.columns.items() if isinstance(column, Encoded)}
        for column in encoded.values():
            column.size, column.seconds = self.size, self.seconds
            column.settle(refused.skip)
        eager = self.decode == "eager" or (self.decode == "auto" and sum(c.nbytes() for c in encoded.values()) <= EAGER_LIMIT)
        good = torch.ones(len(listed.targets), dtype=torch.bool)
        read: dict[str, Tensor] = {}
        for name, column in encoded.items():
            if eager or refused.skip:  # what is to be left out must be known before the first batch
                values, decoded = column.read_all(self.workers, refused.skip, keep=eager)
                good &= decoded
                if not bool(decoded.all()):
                    problem = f"{column.kind} that does not decode"
                    refused.problems[problem] = refused.problems.get(problem, 0) + int((~decoded).sum())
                if eager:
                    read[name] = values
        kept = good.nonzero().squeeze(1)
        if len(kept) < len(good):
            listed, read = listed.take(kept), {name: values[kept] for name, values in read.items()}
        ids = first_id + torch.arange(len(listed.targets))
        present = listed.present or None
        if encoded and not eager:
            return FileDataset(_Decoder(listed.columns), listed.targets, ids, self.workers, listed.extra, present), listed
        columns: dict[str, Column] = {n: c for n, c in listed.columns.items() if not isinstance(c, Encoded)}
        columns.update(read)
        ordered = {name: columns[name] for name in listed.columns}
        return ArrayDataset(ordered, listed.targets, ids, present, listed.extra), listed


class ListedMedia(ListedSource):
    """What sources of images share.

    Images are scaled and cut to `size` x `size`; without it all must be of one size. They are decoded at once (`decode: eager`), when
    they are read (`lazy`), or at once while they take less than 512 MB decoded (`auto`), by `workers` processes or threads. A record
    that is wrong or does not decode is an error, or left out and counted (`on_error: skip`, which looks through all records once before
    the first is used).
    """

    def __init__(
        self,
        *,
        size: PositiveInt | None = None,
        decode: Literal["eager", "lazy", "auto"] = "auto",
        on_error: Literal["fail", "skip"] = "fail",
        workers: NonNegativeInt = 2,
    ) -> None:
        super().__init__(on_error=on_error)
        self.size, self.decode, self.workers = size, decode, workers


def pictures(paths: Sequence[str], where: Callable[[int], str] | None = None) -> Encoded:
    """A column of images that are files of their own."""
    from ._media import FileBytes

    return Encoded("image", FileBytes(paths), where or Standing(paths), np.arange(len(paths)))


def label_matrix(rows: Sequence[int], columns: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """1 at these places, 0 elsewhere, int8  # (samples, classes)"""
    matrix = torch.zeros(shape, dtype=torch.int8)
    matrix[torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)] = 1
    return matrix


def numbered(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _modality(column: Column | Encoded) -> Modality:
    if isinstance(column, Encoded):
        return column.modality()
    if isinstance(column, list):
        return Modality("text")
    whole = column.dtype == torch.uint8
    return Modality("image" if whole else "vector", tuple(column.shape[1:]), high=255 if whole else None)
