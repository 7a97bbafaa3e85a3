"""Labelled samples that `streamcl serve` took in for the next task: parts `first` to `last` of a folder, each a file that never changes.

The server says which parts wait, and the command that learns them. The data is that of whoever sent it, and so is its licence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamcl.data import ArrayDataset
from streamcl.data_files import locate
from streamcl.errors import DataError
from streamcl.learned import info_from
from streamcl.options import PositiveInt
from streamcl.stream import Column, Source, SourceData, join


class Served(Source):
    """`path` is the folder of parts, RUN/served/deliveries."""

    def __init__(self, *, path: Path, first: PositiveInt = 1, last: PositiveInt | None = None) -> None:
        self.path, self.first, self.last = path, first, last

    def files(self) -> list[str]:
        folder = locate(self.path)
        numbers = sorted(int(file.stem) for file in folder.glob("[0-9]*.npz"))
        wanted = [number for number in numbers if number >= self.first and (self.last is None or number <= self.last)]
        if not wanted:
            raise DataError(f"{folder} has no part from {self.first} to {self.last or 'its end'}")
        return [str(folder / f"{number:08d}.npz") for number in wanted]

    def load(self) -> SourceData:
        parts = [_read(Path(file)) for file in self.files()]
        info = info_from(parts[0]["about"]["stream"])
        inputs: dict[str, Column] = {
            name: join([_column(part[f"inputs.{name}"], info.modalities[name].kind == "text") for part in parts])
            for name in info.modalities
        }
        if info.target == "value":
            targets, names = torch.cat([torch.from_numpy(part["target"]) for part in parts]), []
        elif info.target == "labels":
            names = list(dict.fromkeys(name for part in parts for name in part["classes"].tolist()))
            targets = torch.cat([_columns(part, names) for part in parts])
        else:
            given = [name for part in parts for name in part["target"].tolist()]
            names = list(dict.fromkeys(given))
            number = {name: label for label, name in enumerate(names)}
            targets = torch.tensor([number[name] for name in given])
        data = ArrayDataset(inputs, targets, torch.arange(len(targets)))
        return SourceData(data, None, names, dict(info.modalities), info.target, self.licence)


def _read(file: Path) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        return {**found, "about": json.loads(str(found["about"]))}
    except Exception as error:  # a damaged zip raises errors of many kinds
        raise DataError(f"{file}: this part cannot be read: {error}") from None


def _column(values: np.ndarray, text: bool) -> Column:
    return values.tolist() if text else torch.from_numpy(values)


def _columns(part: dict[str, Any], names: list[str]) -> torch.Tensor:
    """The label sets of a part with a column for every class; one that the part does not know is on none of its samples."""
    place = {name: column for column, name in enumerate(part["classes"].tolist())}
    rows = torch.from_numpy(part["target"])
    found = torch.zeros(len(rows), len(names), dtype=torch.int8)
    for column, name in enumerate(names):
        if name in place:
            found[:, column] = rows[:, place[name]]
    return found
