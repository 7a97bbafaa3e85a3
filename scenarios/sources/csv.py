"""Records in text: .csv, .tsv (with a header line) and .jsonl (an object in each line).

`text` names the column of texts, `features` the numeric columns (in .jsonl also lists of numbers), `image` or `audio` a column of paths
that start from the file's folder. Where none is named, the columns are what their first record is: the one column of text, or
else the one of lists, or else all numbers. `label` names the column of the classes, by default the one with a usual name (`label`,
`target`, `category`, ...). Files are UTF-8.

The data and its licence are whatever the files hold. Errors name the file and the line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError
from streamcl.stream import SourceData

from ._records import Place, Records, RecordSource, column_named, label_column, refuse_rows

if TYPE_CHECKING:
    import pyarrow as pa


class Csv(RecordSource):
    """`test` is a second file with the same columns; without one `test_fraction` holds a part back."""

    def __init__(
        self,
        *,
        path: Path,
        test: Path | None = None,
        text: str | None = None,
        features: list[str] | None = None,
        image: str | None = None,
        audio: str | None = None,
        label: str | None = None,
        **records: Any,
    ) -> None:
        super().__init__(**records)
        self.path, self.test, self.label = path, test, label
        self.text, self.features, self.image, self.audio = text, features, image, audio

    def files(self) -> list[str]:
        return [str(locate(path)) for path in (self.path, self.test) if path is not None]

    def load(self) -> SourceData:
        train, *test = (_Rows(locate(path)) for path in (self.path, self.test) if path is not None)
        label = label_column(self.label, train.names, str(train.file))
        asked = {name: "number" for name in self.features or ()}
        asked |= {name: "text" for name in (self.text, self.image, self.audio) if name is not None}  # paths are text as well
        wanted = asked or {name: train.kind(name) for name in train.names if name != label}
        read = {name: "list" if kind == "number" and train.kind(name) == "list" else kind for name, kind in wanted.items()}
        declared = {name: {"_type": kind} for name, kind in ((self.image, "Image"), (self.audio, "Audio")) if name is not None}
        parts = [self._records(rows, read, label, declared, bool(asked)) for rows in (train, *test)]
        return self.assemble(parts[0], parts[1] if test else None)

    def _records(self, rows: _Rows, kinds: dict[str, str], label: str, declared: dict[str, Any], asked: bool) -> Records:
        import pyarrow as pa

        from ._tables import Columns

        columns = {
            name: rows.column(column_named(name, rows.names, str(rows.file), "column"), kind) for name, kind in kinds.items() if kind
        }
        table = pa.table({**columns, label: rows.labels(column_named(label, rows.names, str(rows.file), "label"))})
        if asked and label in columns:
            raise ConfigError(f"{rows.file}: {label!r} is the label and cannot be an input at the same time")
        return Columns(table.schema, declared, list(columns) if asked else None, label, str(rows.file)).records(
            table, rows.where, rows.file.parent
        )


class _Rows:
    """The rows of one file, and the line in which each begins."""

    def __init__(self, file: Path) -> None:
        self.file = file
        if file.suffix.lower() in (".jsonl", ".ndjson"):
            self.values, lines = _read_jsonl(file)
        else:
            self.values, lines = _read_csv(file, "\t" if file.suffix.lower() == ".tsv" else ",")
        if not lines:
            raise DataError(f"{file}: there is not a single record in it")
        self.names = list(self.values)
        self.where: Callable[[int], str] = Place([file], [len(lines)], lines)

    def kind(self, name: str) -> str:
        """number, list or text by the first record; "" for what cannot be an input."""
        first = self.values[name][0] if name in self.values else None
        if isinstance(first, list):
            return "list"
        return "number" if _is_number(first) else "text" if isinstance(first, str) else ""

    def column(self, name: str, kind: str) -> pa.Array:
        import pyarrow as pa

        values = self.values[name]
        if kind == "text":
            wrong = [row for row, value in enumerate(values) if not isinstance(value, str)]
            refuse_rows(np.array(wrong), self.where, f"{name!r} holds {_first(values, wrong)}, and text is needed")
            return pa.array(values, pa.string())
        try:
            numbers = np.asarray(values, dtype=np.float64)
            if kind == "list" and not numbers[0].size:
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            wrong = [row for row, value in enumerate(values) if not _is_number(value)]
            if kind == "list":
                length = max(len(values[0]), 1)
                wrong = [r for r, v in enumerate(values) if not (isinstance(v, list) and len(v) == length and all(map(_is_number, v)))]
            what = "no number" if kind == "number" else f"no list of {length} numbers"
            refuse_rows(np.array(wrong), self.where, f"{_first(values, wrong)} in column {name!r} is {what}")
            raise
        return pa.array(numbers) if kind == "number" else pa.FixedSizeListArray.from_arrays(numbers.ravel(), numbers[0].size)

    def labels(self, name: str) -> pa.Array:
        import pyarrow as pa

        values = self.values[name]
        wrong = [row for row, value in enumerate(values) if isinstance(value, (list, dict))]
        refuse_rows(np.array(wrong), self.where, f"{_first(values, wrong)} in column {name!r} is no label")
        return pa.array([None if value is None else str(value).strip() for value in values], pa.string())


def _read_csv(file: Path, delimiter: str) -> tuple[dict[str, Sequence[Any]], list[int]]:
    lines: list[int] = []
    rows: list[list[str]] = []
    line = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            names = [name.strip() for name in next(reader, [])]
            twice = [name for position, name in enumerate(names) if name in names[:position]]
            if twice or not names:
                what = f"two columns are called {twice[0]!r}" if twice else "a header line with the names of the columns is needed"
                raise DataError(f"{file}, line 1: {what}")
            line = reader.line_num + 1
            for row in reader:
                if row:
                    if len(row) != len(names):
                        raise DataError(f"{file}, line {line}: there are {len(row)} fields and {len(names)} columns")
                    rows.append(row)
                    lines.append(line)
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file}, line {line}: this cannot be read as a table: {error}") from None
    return dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else {}, lines


def _read_jsonl(file: Path) -> tuple[dict[str, Sequence[Any]], list[int]]:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    line = 0
    try:
        with file.open(encoding="utf-8-sig") as text:
            for line, written in enumerate(text, 1):
                if not written.strip():
                    continue
                record = json.loads(written)
                if "\\ud" in written:  # half of a surrogate pair is no text, though JSON lets it pass
                    json.dumps(record, ensure_ascii=False).encode()
                if not isinstance(record, dict):
                    raise DataError(f'{file}, line {line}: an object is needed, as in {{"text": ..., "label": ...}}')
                records.append(record)
                lines.append(line)
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file}, line {max(line, 1)}: this is no JSON: {error}") from None
    return {name: [record.get(name) for record in records] for name in (records[0] if records else ())}, lines


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True


def _first(values: Sequence[Any], wrong: list[int]) -> str:
    """The first of the wrong values, shortened."""
    shown = repr(values[wrong[0]]) if wrong else ""
    return shown if len(shown) <= 60 else shown[:57] + "..."
