"""ARFF files, as Weka and Mulan use them: multi-label sets with an XML file that names the labels, or one class attribute.

Mulan's archives (G. Tsoumakas et al., "Mulan: A Java Library for Multi-Label Learning", JMLR 2011; github.com/tsoumakas/mulan) hold
NAME-train.arff and NAME-test.arff, the official split, and NAME.xml; `path` names the archive. Its data sets have their own terms.
Outside of an archive `path` and `test` name ARFF files and `labels` the XML; without an XML the attribute `label` is the class, by
default one called class, or else the last nominal attribute.

Dense and sparse rows are read. A numeric attribute is one column of the vector as it is; a nominal one is one column where its values
are numbers of which there are two, and else one column for each value. Labels are numbered in the order of their attributes; a label
that is `?` is not annotated (-1). A `?` elsewhere, and text and dates as inputs, are refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from streamcl.data import split_by_class
from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError
from streamcl.options import Fraction, NonNegativeInt
from streamcl.plugins import near_name
from streamcl.seeding import generator
from streamcl.stream import SourceData

from ._arff_format import Attribute, Relation, read_arff
from ._listed import Listed, ListedSource, Refused


class Arff(ListedSource):
    """`path` is an archive of Mulan's or an ARFF file; `test` and `labels` (the XML) where they are not in the archive.

    `test_fraction` holds a part back where there is no test file, in every class or of all rows where there are several labels, drawn
    with `split_seed`. A row that is wrong is an error, or left out and counted (`on_error: skip`).
    """

    licence = "the set's own"

    def __init__(
        self,
        *,
        path: Path,
        test: Path | None = None,
        labels: Path | None = None,
        label: str | None = None,
        test_fraction: Fraction = 0.0,
        split_seed: NonNegativeInt = 0,
        on_error: Literal["fail", "skip"] = "fail",
    ) -> None:
        super().__init__(on_error=on_error)
        if labels is not None and label is not None:
            raise ConfigError("labels names the XML of a multi-label set and label the attribute of a single class: give one of them")
        self.path, self.test, self.labels, self.label = path, test, labels, label
        self.test_fraction, self.split_seed = test_fraction, split_seed

    def files(self) -> list[str]:
        return [str(locate(path)) for path in (self.path, self.test, self.labels) if path is not None]

    def load(self) -> SourceData:
        refused = Refused(self.on_error)
        train_text, test_text, xml = self._texts()
        train = read_arff(*train_text, refused)
        test = None if test_text is None else read_arff(*test_text, refused)
        if test is not None and [a.name for a in test.attributes] != [a.name for a in train.attributes]:
            raise DataError(f"{test.file}: its attributes are not those of {train.file}")
        if xml is not None:
            marked = _label_names(*xml, train)
            names = [attribute.name for attribute in train.attributes if attribute.name in marked]
            parts = [self._multi_label(part, names, refused) for part in (train, test) if part is not None]
        else:
            attribute = self._class_attribute(train)
            names = list(attribute.values or ())
            parts = [self._single(part, attribute.name, names, refused) for part in (train, test) if part is not None]
        whole, held = parts[0], parts[1] if len(parts) > 1 else None
        if held is None and self.test_fraction:
            keep, back = self._split(whole.targets)
            whole, held = whole.take(keep), whole.take(back)
        return self.assemble(whole, held, names, refused, target="labels" if xml is not None else "class")

    def _split(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        drawn = generator(self.split_seed, "test")
        if targets.dim() == 1:
            return split_by_class(targets, self.test_fraction, drawn, at_least=1)
        order = torch.randperm(len(targets), generator=drawn)
        count = round(self.test_fraction * len(targets))
        return order[count:].sort().values, order[:count].sort().values

    def _texts(self) -> tuple[tuple[str, bytes], tuple[str, bytes] | None, tuple[str, bytes] | None]:
        """The training file, the test file and the XML: what each is called, and its bytes."""
        place = locate(self.path)
        if place.suffix.lower() != ".zip":
            others = [None if path is None else (str(locate(path)), locate(path).read_bytes()) for path in (self.test, self.labels)]
            return (str(place), place.read_bytes()), others[0], others[1]
        if self.test is not None or self.labels is not None:
            raise ConfigError("arff: an archive holds its own test part and labels: leave out test and labels, or name its ARFF files")
        try:
            with zipfile.ZipFile(place) as archive:
                inside = {name: archive.read(name) for name in archive.namelist() if name.lower().endswith((".arff", ".xml"))}
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise DataError(f"{place}: this is no zip archive that can be read: {error}") from None
        tables = {name: text for name, text in inside.items() if name.lower().endswith(".arff")}
        xmls = [name for name in inside if name.lower().endswith(".xml")]
        train = [name for name in tables if name.lower().endswith("train.arff")] or (list(tables) if len(tables) == 1 else [])
        test = [name for name in tables if name.lower().endswith("test.arff")]
        if len(train) != 1 or len(test) > 1 or len(xmls) > 1 or (not xmls and self.label is None):
            raise DataError(
                f"{place}: NAME-train.arff, NAME-test.arff and NAME.xml are expected in it, and there is {', '.join(inside) or 'none'}"
            )

        def member(names: list[str]) -> tuple[str, bytes] | None:
            return (f"{place}: {names[0]}", inside[names[0]]) if names else None

        return (f"{place}: {train[0]}", tables[train[0]]), member(test), member(xmls) if self.label is None else None

    def _class_attribute(self, relation: Relation) -> Attribute:
        nominal = {attribute.name: attribute for attribute in relation.attributes if attribute.values is not None}
        if self.label is not None:
            if self.label not in nominal:
                hint = near_name(self.label, nominal) or f": there are {', '.join(list(nominal)[:8]) or 'none'}"
                raise ConfigError(f"{relation.file}: no nominal attribute is called {self.label!r} (label){hint}")
            return nominal[self.label]
        if not nominal:
            raise ConfigError(
                f"{relation.file}: no attribute is nominal, so none can be the class; `labels` names the XML of several labels"
            )
        return next((a for name, a in nominal.items() if name.lower() == "class"), list(nominal.values())[-1])

    def _multi_label(self, relation: Relation, names: list[str], refused: Refused) -> Listed:
        number = {attribute.name: position for position, attribute in enumerate(relation.attributes)}
        for name in names:
            values = relation.attributes[number[name]].values
            if values is None or set(values) - {"0", "1"}:
                raise DataError(f"{relation.file}: the label {name!r} must be a nominal attribute with the values 0 and 1")
        columns = []
        for name in names:
            codes = relation.columns[number[name]]  # the place of the value among those declared, -1 for ?
            meaning = np.array([*(int(v) for v in relation.attributes[number[name]].values or ()), -1], dtype=np.int8)
            columns.append(meaning[codes.astype(np.int64)])
        vector, good = self._vector(relation, set(names), refused)
        return Listed({"vector": vector}, torch.from_numpy(np.stack(columns, axis=1))[good])

    def _single(self, relation: Relation, name: str, names: list[str], refused: Refused) -> Listed:
        place = next(p for p, attribute in enumerate(relation.attributes) if attribute.name == name)
        codes = relation.columns[place].astype(np.int64)
        declared = relation.attributes[place].values or ()
        if sorted(declared) != sorted(names):
            raise DataError(f"{relation.file}: the values of {name!r} are not those of the training file")
        codes = np.array([*(names.index(value) for value in declared), -1])[codes]
        vector, good = self._vector(relation, {name}, refused, codes < 0)
        return Listed({"vector": vector}, torch.from_numpy(codes)[good])

    def _vector(self, relation: Relation, leave: set[str], refused: Refused, lacking: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """The inputs of the rows that have them all, float32, and which rows these are."""
        blocks = []
        bad = np.zeros(len(relation.lines), dtype=bool) if lacking is None else lacking.copy()
        for attribute, column in zip(relation.attributes, relation.columns, strict=True):
            if attribute.name in leave:
                continue
            if attribute.kind == "other":
                raise DataError(f"{relation.file}: the attribute {attribute.name!r} is text or a date, and cannot be an input")
            block, absent = _block(attribute, column)
            blocks.append(block)
            bad |= absent
        if not blocks:
            raise DataError(f"{relation.file}: every attribute is a label, and none is left as an input")
        for row in np.flatnonzero(bad).tolist():
            refused.add("row with a missing value", f"{relation.file}, line {relation.lines[row]}: a value is missing (?) or not finite")
        good = torch.from_numpy(~bad)
        return torch.from_numpy(np.concatenate(blocks, axis=1))[good], good


def _block(attribute: Attribute, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An attribute as columns of the vector, float32, and the rows that lack it."""
    if attribute.values is None:
        return column.astype(np.float32)[:, None], ~np.isfinite(column)
    codes = column.astype(np.int64)
    numbers = _as_numbers(attribute.values)
    if numbers is not None and len(numbers) == 2:
        return numbers[codes.clip(min=0)].astype(np.float32)[:, None], codes < 0
    return (codes[:, None] == np.arange(len(attribute.values))).astype(np.float32), codes < 0


def _as_numbers(values: Sequence[str]) -> np.ndarray | None:
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        return None


def _label_names(file: str, data: bytes, relation: Relation) -> set[str]:
    """The names of all labels in Mulan's XML, nested or not; each must be an attribute."""
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise DataError(f"{file}: this is no XML: {error}") from None
    names = {element.get("name", "") for element in root.iter() if element.tag.rpartition("}")[2] == "label"}
    if not names:
        raise DataError(f'{file}: it names no label; <labels><label name="..."/></labels> is expected')
    known = [attribute.name for attribute in relation.attributes]
    lacking = sorted(names - set(known))
    if lacking:
        raise DataError(f"{file}: {relation.file} has no attribute {lacking[0]!r}{near_name(lacking[0], known)}")
    return names
