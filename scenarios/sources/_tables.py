"""From an Arrow table, as Parquet files and Hugging Face data sets hold it, to records: which columns are inputs, and of what kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.types as kinds
import torch

from streamcl.errors import ConfigError
from streamcl.stream import Column

from ._media import ArrowBytes, Encoded
from ._records import Records, column_named, label_column, modality_names, refuse_rows

Features = Mapping[str, Mapping[str, Any]]  # Hugging Face's description of the columns, as its metadata spells it


class Columns:
    """Which columns of a table are read, decided once by its schema: the label, and the inputs with the kind of each."""

    def __init__(self, schema: pa.Schema, features: Features, asked: str | Sequence[str] | None, label: str | None, where: str) -> None:
        declared = {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
        self.label = label_column(label, schema.names, where, list(declared))
        self.class_names: list[str] | None = declared.get(self.label)
        if asked is None:
            self.inputs = _guess(schema, features, self.label, where)
        else:
            names = [column_named(name, schema.names, where, "input") for name in ([asked] if isinstance(asked, str) else asked)]
            self.inputs = {name: _kind(schema.field(name), features) for name in names}
            unread = [name for name, kind in self.inputs.items() if kind == "other"]
            if unread or not names:
                what = (
                    f"the column {unread[0]!r} of type {schema.field(unread[0]).type} cannot be an input"
                    if unread
                    else "input lists no column"
                )
                raise ConfigError(f"{where}: {what}: images, audio, text, numbers and lists of numbers can")

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.inputs, self.label]))

    def records(self, table: pa.Table, where: Callable[[int], str], folder: Path) -> Records:
        """The records of a table with these columns; paths of images and sounds start from `folder`."""
        columns: dict[str, Column | Encoded] = {}
        numbers = [name for name, kind in self.inputs.items() if kind == "number"]
        given = {name: "vector" if kind in ("number", "list") else kind for name, kind in self.inputs.items() if name not in numbers[1:]}
        for name, modality in modality_names(given).items():  # all single numbers together are one vector, at the first one's place
            if given[name] == "text":
                refuse_rows(np.flatnonzero(table[name].is_null().to_numpy()), where, f"the text in {name!r} is missing")
                columns[modality] = table[name].to_pylist()
            elif given[name] == "vector":
                parts = [_floats(table[part], where, part) for part in (numbers if name in numbers else [name])]
                columns[modality] = torch.from_numpy(np.concatenate([part.reshape(len(table), -1) for part in parts], axis=1))
            else:
                columns[modality] = Encoded(given[name], ArrowBytes(table[name], folder), where, np.arange(len(table)))
        labels = table[self.label].combine_chunks()
        return Records(columns, labels, where)


def _guess(schema: pa.Schema, features: Features, label: str, where: str) -> dict[str, str]:
    """The inputs where none are named: the images, or else the audio, the text, the one list of numbers, all numbers."""
    kind_of = {field.name: _kind(field, features) for field in schema if field.name != label}
    for kind in ("image", "audio", "text", "list"):
        found = [name for name, its in kind_of.items() if its == kind]
        if len(found) > 1:
            raise ConfigError(f"{where}: several columns are {kind} ({', '.join(found)}): say which one is the `input`")
        if found:
            return {found[0]: kind}
    numbers = {name: kind for name, kind in kind_of.items() if kind == "number" and features.get(name, {}).get("_type") != "ClassLabel"}
    if not numbers:
        raise ConfigError(
            f"{where}: none of the columns {', '.join(schema.names)} can be an input: images, audio, text, numbers and lists of numbers can"
        )
    return numbers


def _kind(field: pa.Field, features: Features) -> str:
    """image, audio, text, list, number, or other."""
    declared = features.get(field.name, {}).get("_type")
    if declared in ("Image", "Audio"):
        return declared.lower()
    type_ = field.type
    if kinds.is_string(type_) or kinds.is_large_string(type_):
        return "text"
    if kinds.is_integer(type_) or kinds.is_floating(type_):
        return "number"
    while kinds.is_list(type_) or kinds.is_large_list(type_) or kinds.is_fixed_size_list(type_):
        type_ = type_.value_type
        if kinds.is_integer(type_) or kinds.is_floating(type_):
            return "list"
    encoded = kinds.is_binary(field.type) or kinds.is_large_binary(field.type)
    encoded = encoded or (kinds.is_struct(field.type) and {part.name for part in field.type} == {"bytes", "path"})
    if encoded:  # undeclared bytes: sounds are told by their column's name
        return "audio" if "audio" in field.name.lower() or "sound" in field.name.lower() else "image"
    return "other"


def _floats(column: pa.ChunkedArray, where: Callable[[int], str], name: str) -> np.ndarray:
    """Numbers, or lists of equally many numbers, as float32  # (rows, ...)"""
    array = column.combine_chunks()
    refuse_rows(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)), where, f"{name!r} is empty")
    values = _dense(array, where, name)
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    refuse_rows(np.flatnonzero(bad), where, f"{name!r} holds NaN or infinite values")
    return values


def _dense(array: pa.Array, where: Callable[[int], str], name: str) -> np.ndarray:
    if not (kinds.is_list(array.type) or kinds.is_large_list(array.type) or kinds.is_fixed_size_list(array.type)):
        return array.to_numpy(zero_copy_only=False).astype(np.float32)
    lengths = pa.compute.list_value_length(array).to_numpy(zero_copy_only=False)
    rows = len(array)
    length = int(lengths[0]) if rows else 0
    refuse_rows(np.flatnonzero(lengths != length), where, f"{name!r} is of another length than the first row's {length}")
    inner = _dense(array.flatten(), lambda value: where(value // max(length, 1)), name)
    return inner.reshape(rows, length, *inner.shape[1:])
