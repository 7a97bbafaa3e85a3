"""The records of a task as a data set: read from the spool when they are needed, and let go of again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamcl.data import ArrayDataset, MapDataset
from streamcl.errors import DataError
from streamcl.stream import Batch, Column

from .records import Line, Reader, Shapes, encoded, told
from .spool import Spool

KEPT = 256 * 2**20  # bytes of samples that stay in memory; the latest data set stays whatever it takes


class Shelf:
    """The data sets that were read last."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[int, int, bool], ArrayDataset] = OrderedDict()

    def get(self, key: tuple[int, int, bool], load: Callable[[], ArrayDataset]) -> ArrayDataset:
        if key not in self.kept:
            self.kept[key] = load()
            while len(self.kept) > 1 and sum(map(_nbytes, self.kept.values())) > KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]


class Spooled(MapDataset):
    """Records `start` to before `stop` of a spool, those held out or the others; `targets` are their classes."""

    def __init__(self, spool: Spool, reader: Reader, shelf: Shelf, start: int, stop: int, held: bool, number: dict[str, int]) -> None:
        self.spool, self.reader, self.shelf, self.range = spool, reader, shelf, (start, stop, held)
        ids, labels = spool.labels(start, stop, held)
        self.ids = torch.tensor(ids, dtype=torch.int64)
        self.targets = torch.tensor([number.get(label, -1) for label in labels], dtype=torch.int64)

    def _loaded(self) -> ArrayDataset:
        return self.shelf.get(self.range, self._load)

    def _load(self) -> ArrayDataset:
        shapes = self.spool.shapes
        assert shapes is not None, "a spool that holds records knows their shapes"
        columns = {field: self.spool.column(field, *self.range) for field in shapes}
        return ArrayDataset(_inputs(columns, shapes, self.reader), self.targets, self.ids)

    def __getitem__(self, indices: Tensor) -> Batch:
        return self._loaded()[indices]

    def read(self, order: Tensor, size: int) -> Iterator[Batch]:
        return self._loaded().read(order, size)


def read_test_file(path: Path, reader: Reader, shapes: Shapes) -> tuple[dict[str, Column], list[str]]:
    """A file of labelled records: the inputs, and each one's label. A line that does not fit is an error."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"live: test: {path} cannot be read: {error.strerror}") from None
    lines = [Line(str(path), number, line) for number, line in enumerate(content.split(b"\n"), 1)]
    parsed = reader.lines(lines, path.parent)
    wrong = [f"line {problem.line.number}: {problem.reason}" for problem in parsed.problems]
    wrong += [
        f"line {record.line.number}: it has {told(record.shapes)}, and the stream has {told(shapes)}"
        for record in parsed.records
        if record.shapes != shapes
    ]
    if wrong:
        raise DataError(f"live: test: {path}: {'; '.join(wrong[:5])}{f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''}")
    if not parsed.records:
        raise DataError(f"live: test: {path} holds no record")
    columns = {field: [record.values[field] for record in parsed.records] for field in shapes}
    return _inputs(columns, shapes, reader), [record.label for record in parsed.records]


def _inputs(columns: dict[str, list], shapes: Shapes, reader: Reader) -> dict[str, Column]:
    """Columns as they are kept -> what a batch holds of each modality."""
    inputs: dict[str, Column] = {}
    for field, values in columns.items():
        if field == "text":
            inputs[field] = values
        elif field == "features":
            numbers = np.frombuffer(b"".join(values), dtype=np.float32).reshape(len(values), *shapes[field])
            inputs["vector"] = torch.from_numpy(numbers.copy())
        else:
            column = encoded(field, values, reader.side, reader.seconds)
            column.shape = tuple(shapes[field] if field == "image" else shapes[field][:1])
            inputs[field] = column.read_all(2, skip=False)[0]
    return inputs


def _nbytes(data: ArrayDataset) -> int:
    return sum(column.nbytes if isinstance(column, Tensor) else sum(map(len, column)) for column in data.inputs.values())
