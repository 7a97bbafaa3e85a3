"""Parquet files as Hugging Face writes them: images or audio as bytes, text, lists of numbers, or numeric columns, with a label.

`path` is a file, a glob pattern, or a folder; in a folder whose files are named after their parts, those that begin with `train` are
read for training and those that begin with `test` are the test set. The columns and the class names come from the metadata that
Hugging Face keeps in the schema, or else from the types and the usual names; bytes without a declared kind are images unless their
column is named after sound. Only pyarrow reads the files. Encoded images stay in memory as they are; a set that does not fit is better
read by the source `huggingface`, which leaves it on disk.

The data and its licence are whatever the files hold. Errors name the file and the row, counted from 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamcl.data_files import locate, locate_all
from streamcl.errors import DataError
from streamcl.stream import SourceData

from ._records import Place, Records, RecordSource


class Parquet(RecordSource):
    """`input` names one column or several (numeric ones together are one vector); `label` names the column of the classes."""

    def __init__(
        self, *, path: Path, test: Path | None = None, input: str | list[str] | None = None, label: str | None = None, **records: Any
    ) -> None:
        super().__init__(**records)
        self.path, self.test, self.input, self.label = path, test, input, label

    def files(self) -> list[str]:
        return [str(file) for part in self._parts() for file in part]

    def load(self) -> SourceData:
        from ._tables import Columns

        train, test = self._parts()
        schema, features, licence = _described(train[0])
        columns = Columns(schema, features, self.input, self.label, str(train[0]))
        return self.assemble(_read(train, columns), _read(test, columns) if test else None, columns.class_names, licence)

    def _parts(self) -> tuple[list[Path], list[Path]]:
        train, test = _files(self.path), _files(self.test) if self.test is not None else []
        if test == [] and any(file.name.startswith("train") for file in train):
            by_part = {part: [file for file in train if file.name.startswith(part)] for part in ("train", "test")}
            train, test = by_part["train"], by_part["test"]
        return train, test


def _files(path: Path) -> list[Path]:
    if any(sign in str(path) for sign in "*?["):
        return locate_all(str(path))
    place = locate(path)
    found = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not found:
        raise DataError(f"{place}: there is no .parquet file in this folder")
    return found


def _described(file: Path) -> tuple[Any, dict[str, Any], str | None]:
    """The schema of a file, and what Hugging Face's metadata in it say of the columns and the licence."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: this is no Parquet file that can be read: {error}") from None
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    except (ValueError, AttributeError):
        info = {}
    features = {name: feature for name, feature in (info.get("features") or {}).items() if isinstance(feature, dict)}
    return schema, features, info.get("license") or None


def _read(files: Sequence[Path], columns: Any) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for file in files:
        lacking = [name for name in columns.names if name not in _described(file)[0].names]
        if lacking:
            raise DataError(
                f"{file}: there is no column {lacking[0]!r}, which {files[0].name if file != files[0] else 'the training data'} has"
            )
        try:
            tables.append(pq.read_table(file, columns=columns.names, partitioning=None))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: reading stopped: {error}") from None
    if not sum(len(table) for table in tables):
        raise DataError(f"{files[0]}: there is not a single record in it")
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{files[0]} and the files beside it hold columns of different types: {error}") from None
    return columns.records(table, Place(files, [len(part) for part in tables]), files[0].parent)
