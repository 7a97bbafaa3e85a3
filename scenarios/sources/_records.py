"""From the records of a file to data sets: labels become numbers, encoded images and sounds become tensors, now or when read."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data import ArrayDataset, FileDataset, split_by
from streamcl.errors import ConfigError, DataError
from streamcl.options import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from streamcl.plugins import near_name
from streamcl.seeding import generator
from streamcl.stream import Column, Dataset, Modality, Source, SourceData, take

from ._media import Encoded

if TYPE_CHECKING:
    import pyarrow as pa

EAGER_LIMIT = 512 * 2**20  # bytes that decoded images and sounds may take before `decode: auto` leaves them encoded
LABELS = ("label", "labels", "target", "class", "category", "intent", "fine_label", "y")  # looked for where none is named


@dataclass
class Records:
    """The records of one part as they were read: a column per modality, the labels, and the words for where a row stands.

    `kinds` says of a modality what its column does not tell by itself: uint8 is an image and float32 a vector. `labels` are of one class
    each, unless the targets are sets of labels or values, which `targets` holds as a data set does.
    """

    columns: dict[str, Tensor | list | Encoded]
    labels: pa.Array | None
    where: Callable[[int], str]
    kinds: dict[str, str] = field(default_factory=dict)
    targets: Tensor | None = None


class RecordSource(Source):
    """What sources that read records share.

    `test_fraction` of every class becomes the test set where no other is given, drawn with `split_seed`. Images are scaled and cut to
    `size` x `size`, sounds cut and padded to `seconds`; without these all must be of one size. They are decoded at once
    (`decode: eager`), when they are read (`lazy`), or at once while they take less than 512 MB decoded (`auto`), by `workers`
    processes or threads. A record that does not decode is an error, or left out and counted (`on_error: skip`, which looks through all
    records once before the first is used).
    """

    def __init__(
        self,
        *,
        test_fraction: Fraction = 0.0,
        split_seed: NonNegativeInt = 0,
        size: PositiveInt | None = None,
        seconds: PositiveFloat | None = None,
        decode: Literal["eager", "lazy", "auto"] = "auto",
        on_error: Literal["fail", "skip"] = "fail",
        workers: NonNegativeInt = 2,
    ) -> None:
        self.test_fraction, self.split_seed, self.size, self.seconds = test_fraction, split_seed, size, seconds
        self.decode, self.on_error, self.workers = decode, on_error, workers

    @abstractmethod
    def load(self) -> SourceData: ...

    def assemble(
        self, train: Records, test: Records | None, names: Sequence[str] | None = None, licence: str | None = None, target: str = "class"
    ) -> SourceData:
        """The data sets; `names` are the declared classes, by which whole-numbered labels count."""
        numbering = Numbering(names)
        targets = numbering.learn(train) if train.targets is None else train.targets
        test_targets = None if test is None else numbering.apply(test) if test.targets is None else test.targets
        if test is None and self.test_fraction:
            keep, held = split_by(target, targets, self.test_fraction, generator(self.split_seed, "test"))
            test, test_targets = _pick(train, held), targets[held]
            train, targets = _pick(train, keep), targets[keep]
        problems: dict[str, int] = {}
        data = self._dataset(train, targets, 0, problems)
        test_data = None
        if test is not None and test_targets is not None:
            for name, column in test.columns.items():
                like = train.columns[name]
                if isinstance(column, Encoded) and isinstance(like, Encoded):
                    column.shape, column.rate = like.shape, like.rate
                elif _modality(test, name) != _modality(train, name):
                    raise DataError(f"{test.where(0)}: {name} is {_modality(test, name)}, and in training {_modality(train, name)}")
            test_data = self._dataset(test, test_targets, len(data), problems)
        modalities = {name: _modality(train, name) for name in train.columns}
        return SourceData(data, test_data, numbering.names, modalities, target, licence or self.licence, problems)

    def _dataset(self, records: Records, targets: Tensor, first_id: int, problems: dict[str, int]) -> Dataset:
        skip = self.on_error == "skip"
        encoded = {name: column for name, column in records.columns.items() if isinstance(column, Encoded)}
        for column in encoded.values():
            column.size, column.seconds = self.size, self.seconds
            column.settle(skip)
        eager = self.decode == "eager" or (self.decode == "auto" and sum(c.nbytes() for c in encoded.values()) <= EAGER_LIMIT)
        good = torch.ones(len(targets), dtype=torch.bool)
        columns: dict[str, Tensor | list | Encoded] = dict(records.columns)
        for name, column in encoded.items():
            if eager or skip:  # what is to be left out must be known before the first batch
                values, decoded = column.read_all(self.workers, skip, keep=eager)
                good &= decoded
                if not bool(decoded.all()):
                    problem = f"{column.kind} that does not decode"
                    problems[problem] = problems.get(problem, 0) + int((~decoded).sum())
                if eager:
                    columns[name] = values
        if not bool(good.all()):
            kept = good.nonzero().squeeze(1)
            columns, targets = {name: _rows(column, kept) for name, column in columns.items()}, targets[kept]
        ids = first_id + torch.arange(len(targets))
        if encoded and not eager:
            return FileDataset(_Decoder(columns), targets, ids, self.workers)
        return ArrayDataset({name: c for name, c in columns.items() if not isinstance(c, Encoded)}, targets, ids)


class Place:
    """Says where a row stands: in which of several files read one after another, and in which row (or line) of it.

    Rows count from 0, lines (where a text file's own are given) from 1.
    """

    def __init__(self, files: Sequence[Path | str], counts: Sequence[int], lines: Sequence[int] | None = None) -> None:
        self.files, self.starts = [str(file) for file in files], np.cumsum([0, *counts])
        self.lines = None if lines is None else np.asarray(lines, dtype=np.int64)

    def __call__(self, row: int) -> str:
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        if self.lines is not None:
            return f"{self.files[file]}, line {self.lines[row]}"
        return f"{self.files[file]}, row {row - self.starts[file]}"


class _Decoder:
    """The columns of some rows, decoded; it travels to worker processes."""

    def __init__(self, columns: dict[str, Tensor | list | Encoded]) -> None:
        self.columns = columns

    def __call__(self, rows: list[int]) -> dict[str, Column]:
        index = torch.tensor(rows, dtype=torch.int64)
        return {name: c.read(rows) if isinstance(c, Encoded) else take(c, index) for name, c in self.columns.items()}


class Numbering:
    """Numbers for labels: those of the declared class names, or those of the training labels in their natural order."""

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.declared = names is not None
        self.names = list(names or ())
        self.number: dict[str | int, int] = {name: position for position, name in enumerate(self.names)}
        self.number.update({position: position for position in range(len(self.names))})

    def learn(self, records: Records) -> Tensor:
        """The numbers of the training labels."""
        if not self.declared:
            values = {str(value) for value in _values(records)[1] if value not in (None, "")}
            whole = all(re.fullmatch(r"-?\d+", value) for value in values)
            self.names = sorted(values, key=lambda name: (int(name) if whole else 0, name))
            self.number = {name: position for position, name in enumerate(self.names)}
        return self.apply(records)

    def apply(self, records: Records) -> Tensor:
        codes, values = _values(records)
        numbers = np.array([self._find(value) for value in values], dtype=np.int64)
        targets = numbers[codes]
        wrong = np.flatnonzero(targets < 0)
        if len(wrong):
            value = values[codes[wrong[0]]]
            if value in (None, ""):
                raise DataError(f"{records.where(int(wrong[0]))}: the label is empty{_more(wrong)}")
            known = "among the declared classes" if self.declared else "in the training data"
            others = f": there are {len(self.names)} classes, {', '.join(self.names[:8])}{', ...' * (len(self.names) > 8)}"
            hint = near_name(str(value), self.names) or others
            raise DataError(f"{records.where(int(wrong[0]))}: the label {str(value)!r} is not {known}{_more(wrong)}{hint}")
        return torch.from_numpy(targets)

    def _find(self, value: str | int | None) -> int:
        if value is None:
            return -1
        return self.number.get(value, self.number.get(str(value), -1))


def _values(records: Records) -> tuple[np.ndarray, list]:
    """For each row the place of its label among the distinct labels, and these  # (rows,)"""
    import pyarrow as pa

    labels = records.labels
    assert labels is not None
    if pa.types.is_floating(labels.type):
        whole = labels.cast(pa.int64(), safe=False)
        wrong = np.flatnonzero(whole.fill_null(0).to_numpy(zero_copy_only=False) != labels.fill_null(0).to_numpy(zero_copy_only=False))
        if len(wrong):
            raise DataError(
                f"{records.where(int(wrong[0]))}: the label {labels[int(wrong[0])].as_py()} is no class: a whole number or a name is needed"
            )
        labels = whole
    encoded = labels if pa.types.is_dictionary(labels.type) else labels.dictionary_encode()
    values = [*encoded.dictionary.to_pylist(), None]
    return encoded.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False), values


def refuse_rows(wrong: np.ndarray, where: Callable[[int], str], what: str) -> None:
    """DataError for the first of these rows, where there are any, with how many more there are."""
    if len(wrong):
        raise DataError(f"{where(int(wrong[0]))}: {what}{_more(wrong)}")


def label_column(asked: str | None, names: Sequence[str], where: str, declared: Sequence[str] = ()) -> str:
    """The column with the labels: the one asked for, one that is declared as such, or one with a usual name."""
    if asked is not None:
        return column_named(asked, names, where, "label")
    found = [name for name in (*declared, *LABELS) if name in names]
    if not found:
        raise ConfigError(
            f"{where}: no column is named {', '.join(LABELS[:-1])} or {LABELS[-1]}: say which of {', '.join(names)} is the label"
        )
    return found[0]


def column_named(asked: str, names: Sequence[str], where: str, option: str) -> str:
    if asked not in names:
        raise DataError(f"{where}: there is no {asked!r} ({option})" + (near_name(asked, names) or f": there are {', '.join(names)}"))
    return asked


def modality_names(kinds: dict[str, str]) -> dict[str, str]:
    """The modality of each column: its kind where that is unique, or else the column's own name."""
    counted = list(kinds.values())
    return {name: kind if counted.count(kind) == 1 else name for name, kind in kinds.items()}


def _more(wrong: np.ndarray) -> str:
    return f" (and {len(wrong) - 1} more such)" if len(wrong) > 1 else ""


def _pick(records: Records, places: Tensor) -> Records:
    rows = places.numpy()
    return replace(
        records,
        columns={name: _rows(column, places) for name, column in records.columns.items()},
        labels=None if records.labels is None else records.labels.take(rows),
        targets=None if records.targets is None else records.targets[places],
        where=lambda row: records.where(int(rows[row])),
    )


def _rows(column: Tensor | list | Encoded, places: Tensor) -> Tensor | list | Encoded:
    return column.take(places.numpy()) if isinstance(column, Encoded) else take(column, places)


def _modality(records: Records, name: str) -> Modality:
    column = records.columns[name]
    if isinstance(column, Encoded):
        return column.modality()
    if isinstance(column, list):
        return Modality("text")
    whole = column.dtype == torch.uint8
    return Modality(records.kinds.get(name, "image" if whole else "vector"), tuple(column.shape[1:]), high=255 if whole else None)
