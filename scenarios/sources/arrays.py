"""NumPy arrays: an .npz file, a folder of .npy files, or a pair of .npy files.

Arrays go by their names; in a folder these are the files' names without the ending. `inputs` maps modalities to arrays
(`{image: x, audio: sound}`); without it there must be one array beside the target, and its type and shape say what it is: whole numbers
(images, height, width) or with 1, 3 or 4 channels first or last are images and become uint8, channels first; two dimensions are
vectors, float32; text is text. Where the arrays of the training set have `train` in their names, those with `test` in its place are the
test set. A single .npy file holds the inputs; its labels lie in the file of the same name with `target` in the place of `x`
(`x.npy` and `y.npy`, `x_test.npy` and `y_test.npy`; `inputs`, `images`, `data` and `features` count as `x`).

`as: labels` reads the target as sets of labels, a column for each class (1 it is there, 0 it is not, -1 not annotated), and `as: value`
as numbers to predict, one or several in a row.

The data and its licence are whatever the files hold. Nothing that needs pickle is read. Errors name the file and the row, from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError
from streamcl.options import Fraction, NonNegativeInt
from streamcl.stream import Column, SourceData

from ._records import Place, Records, RecordSource, column_named, refuse_rows

_OTHER_PARTS = re.compile(r"(?<![a-z])(test|val|valid|validation)(?![a-z])", re.IGNORECASE)
_KINDS = ("image", "audio", "vector", "text")


class Arrays(RecordSource):
    """`target` names the array of labels, whole numbers or text; `class_names` gives whole numbers (or columns) their names; `test` is a
    second file with arrays of the same names. `layout` settles images whose channels could be the first dimension or the last."""

    def __init__(
        self,
        *,
        path: Path,
        test: Path | None = None,
        inputs: dict[str, str] | None = None,
        target: str = "y",
        as_: Literal["class", "labels", "value"] = "class",
        class_names: list[str] | None = None,
        layout: Literal["auto", "nchw", "nhwc"] = "auto",
        test_fraction: Fraction = 0.0,
        split_seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(test_fraction=test_fraction, split_seed=split_seed)
        self.path, self.test, self.inputs, self.target, self.class_names = path, test, inputs, target, class_names
        self.kind = as_
        self.layout = layout

    def files(self) -> list[str]:
        found = []
        for path in (self.path, self.test):
            if path is not None:
                file = locate(path)
                found += [str(file)] + ([str(_labels_beside(file, self.target))] if file.suffix.lower() == ".npy" else [])
        return found

    def load(self) -> SourceData:
        place = locate(self.path)
        arrays = _open(place, self.target)
        names = self._names(place, arrays)
        train = self._records(place, arrays, names, self.target)
        test = None
        test_target = self.target.replace("train", "test")
        test_names = {modality: name.replace("train", "test") for modality, name in names.items()}
        if self.test is not None:
            test_place = locate(self.test)
            test = self._records(test_place, _open(test_place, self.target), names, self.target)
        elif test_target != self.target and {test_target, *test_names.values()} <= set(arrays):
            test = self._records(place, arrays, test_names, test_target)
        return self.assemble(train, test, self._columns(place, train, test), target=self.kind)

    def _columns(self, place: Path, train: Records, test: Records | None) -> list[str] | None:
        """The declared names, one for each column where the target has several."""
        if train.targets is None:
            return self.class_names
        width = train.targets.shape[1] if train.targets.dim() == 2 else 1
        if test is not None and test.targets is not None and test.targets.shape[1:] != train.targets.shape[1:]:
            raise DataError(f"{place}: {self.target!r} has {width} columns, and that of the test set another number")
        if self.kind == "labels" and self.class_names is None:
            raise DataError(f"{place}: {self.target!r} has {width} columns of labels: name their classes, class_names: [...]")
        if not width:
            raise DataError(f"{place}: {self.target!r} has no column")
        if self.class_names is not None and len(set(self.class_names)) < len(self.class_names):
            twice = next(name for name in self.class_names if self.class_names.count(name) > 1)
            raise DataError(f"{place}: class_names names {twice!r} twice")
        if self.class_names is not None and len(self.class_names) != width:
            raise DataError(f"{place}: {self.target!r} has {width} columns, and there are {len(self.class_names)} class_names")
        return self.class_names or []

    def _names(self, place: Path, arrays: Mapping[str, Any]) -> dict[str, str]:
        """Modality -> array; the modality "" is told by the array."""
        column_named(self.target, list(arrays), str(place), "target")
        if self.inputs is not None:
            return {modality: column_named(name, list(arrays), str(place), f"inputs: {modality}") for modality, name in self.inputs.items()}
        left = [name for name in arrays if name != self.target and not _OTHER_PARTS.search(name)]
        if len(left) != 1:
            raise ConfigError(
                f"{place}: beside the target {self.target!r} there are {', '.join(left) or 'no arrays'}: say which are the `inputs`"
            )
        return {"": left[0]}

    def _records(self, place: Path, arrays: Mapping[str, Any], names: dict[str, str], target: str) -> Records:
        import pyarrow as pa

        labels = _array(place, arrays, column_named(target, list(arrays), str(place), "target"))
        if not len(labels):
            raise DataError(f"{place}: {target!r} is empty")
        where = Place([place], [len(labels)])
        if labels.ndim == 2 and labels.shape[1] == 1 and self.kind != "labels":
            labels = labels[:, 0]
        if self.kind != "class":
            records = Records({}, None, where, targets=self._targets(labels, where, f"{place}: {target!r}"))
        elif labels.ndim != 1 or labels.dtype.kind not in "iufUb":
            told = " (sets of labels: `as: labels`)" if labels.ndim == 2 and labels.dtype.kind in "iub" else ""
            raise DataError(
                f"{place}: {target!r} must hold one whole number or text per row, and has the shape {labels.shape} and type "
                f"{labels.dtype}{told}"
            )
        else:
            records = Records({}, pa.array(labels), where)
        for asked, name in names.items():
            values = _array(place, arrays, name)
            if values.ndim == 0 or len(values) != len(labels):
                raise DataError(
                    f"{place}: {name!r} has the shape {values.shape} and {target!r} has {len(labels)} rows: they must be equally many"
                )
            kind = asked if asked in _KINDS else _kind(values, f"{place}: {name!r}")
            records.columns[asked or kind] = self._column(values, kind, where, f"{place}: {name!r}")
            records.kinds[asked or kind] = kind
        return records

    def _targets(self, values: np.ndarray, where: Place, what: str) -> Tensor:
        """Sets of labels, or values."""
        if self.kind == "labels":
            if values.ndim != 2 or values.dtype.kind not in "iub":
                raise DataError(
                    f"{what} has the shape {values.shape} and type {values.dtype}: whole numbers, a column per class, are needed"
                )
            refuse_rows(np.flatnonzero(~np.isin(values, (-1, 0, 1)).all(axis=1)), where, "a label is not 1, 0 or -1")
            return torch.from_numpy(values.astype(np.int8))
        if values.ndim not in (1, 2) or values.dtype.kind not in "iuf":
            raise DataError(f"{what} has the shape {values.shape} and type {values.dtype}: numbers, one or several per row, are needed")
        with np.errstate(over="ignore"):
            single = values.astype(np.float32)
        wrong = np.flatnonzero(~np.isfinite(single.reshape(len(single), -1)).all(axis=1))
        refuse_rows(wrong, where, "a value is NaN, infinite or too large")
        return torch.from_numpy(single)

    def _column(self, values: np.ndarray, kind: str, where: Place, what: str) -> Column:
        if (kind == "text") != (values.dtype.kind == "U"):
            found = "text" if values.dtype.kind == "U" else f"type {values.dtype}"
            raise DataError(f"{what} holds {found} where {kind} is expected")
        if kind == "text":
            return values.tolist()
        flat = values.reshape(len(values), -1)
        if values.dtype.kind == "f":
            refuse_rows(np.flatnonzero(~np.isfinite(flat).all(axis=1)), where, "there are NaN or infinite values")
        if kind != "image":
            return torch.from_numpy(flat.astype(np.float32))
        if values.ndim not in (3, 4):
            raise DataError(
                f"{what} has the shape {values.shape}, and images need (images, height, width) or (images, channels, height, width)"
            )
        if values.dtype.kind != "f":
            refuse_rows(np.flatnonzero(((flat < 0) | (flat > 255)).any(axis=1)), where, "a pixel is not from 0 to 255")
        pixels = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32 if values.dtype.kind == "f" else np.uint8))
        return self._channels_first(pixels, what)

    def _channels_first(self, images: Tensor, what: str) -> Tensor:
        if images.dim() == 3:
            return images.unsqueeze(1)
        first, last = images.shape[1] in (1, 3, 4), images.shape[3] in (1, 3, 4)
        if self.layout == "auto" and first == last:
            raise ConfigError(
                f"{what} has the shape {tuple(images.shape)}: say which dimension is the channels, `layout: nchw` or `layout: nhwc`"
            )
        to_turn = self.layout == "nhwc" or (self.layout == "auto" and last)
        return images.permute(0, 3, 1, 2).contiguous() if to_turn else images


def _open(place: Path, target: str) -> Mapping[str, Any]:
    """The arrays by name, each read when it is asked for."""
    if place.is_dir():
        return {file.stem: file for file in sorted(place.glob("*.npy"))}
    if place.suffix.lower() == ".npy":
        return {"x": place, target: _labels_beside(place, target)}
    try:
        return np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{place}: this is no .npz file that can be read: {error}") from None


def _array(place: Path, arrays: Mapping[str, Any], name: str) -> np.ndarray:
    try:
        found = arrays[name]
        return np.load(found, allow_pickle=False) if isinstance(found, Path) else found
    except Exception as error:  # a damaged zip raises errors of many kinds
        raise DataError(f"{place}: the array {name!r} cannot be read: {error}") from None


def _labels_beside(file: Path, target: str) -> Path:
    name, changed = re.subn(r"(?<![A-Za-z])(x|inputs?|images?|data|features)(?![A-Za-z])", target, file.stem, count=1, flags=re.IGNORECASE)
    if not changed:
        raise ConfigError(
            f"{file}: no part of the name is x, inputs, images, data or features, so the labels beside it have no name: use .npz"
        )
    return locate(file.with_name(f"{name}.npy"))


def _kind(values: np.ndarray, what: str) -> str:
    if values.dtype.kind == "U":
        return "text"
    if values.dtype.kind in "iuf" and values.ndim == 2:
        return "vector"
    if (values.dtype.kind in "iu" and values.ndim == 3) or (values.dtype.kind in "iuf" and values.ndim == 4):
        return "image"
    raise DataError(f"{what} has the shape {values.shape} and type {values.dtype}: name its kind under `inputs` ({', '.join(_KINDS)})")
