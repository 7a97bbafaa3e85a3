"""Banking77: 13,083 customer questions to a bank in 77 intents, with its official training and test part.

Origin: I. Casanueva et al., "Efficient Intent Detection with Dual Sentence Encoders" (2020), train.csv and test.csv of
github.com/PolyAI-LDN/task-specific-datasets. Licence: CC BY 4.0. The classes are numbered in the order of their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError
from streamcl.stream import SourceData

from ._index_files import csv_rows
from ._listed import Listed, ListedSource, Refused, numbered


class Banking77(ListedSource):
    """`path` and `test` are the two official files, comma-separated with the columns `text` and `category`; by default
    banking77-train.csv and banking77-test.csv under STREAMCL_DATA.

    A row that lacks its text or its category is an error, or left out and counted (`on_error: skip`).
    """

    licence = "CC BY 4.0"
    class_count = 77

    def __init__(
        self,
        *,
        path: Path | None = None,
        test: Path | None = None,
        on_error: Literal["fail", "skip"] = "fail",
    ) -> None:
        super().__init__(on_error=on_error)
        if (path is None) != (test is None):
            raise ConfigError("banking77: path and test are files that belong together: give both, or neither")
        self.path, self.test = path or Path("banking77-train.csv"), test or Path("banking77-test.csv")

    def files(self) -> list[str]:
        return [str(locate(self.path)), str(locate(self.test))]

    def load(self) -> SourceData:
        refused = Refused(self.on_error)
        train, test = (self._rows(locate(path), refused) for path in (self.path, self.test))
        names = sorted({category for _, _, category in train})
        number = {name: position for position, name in enumerate(names)}
        known = []
        for place, text, category in test:
            if category in number:
                known.append((place, text, category))
            else:
                refused.add("category that training lacks", f"{place}: the category {category!r} does not occur in training")
        parts = [
            Listed({"text": [text for _, text, _ in rows]}, numbered([number[category] for _, _, category in rows]))
            for rows in (train, known)
        ]
        return self.assemble(parts[0], parts[1], names, refused)

    def _rows(self, file: Path, refused: Refused) -> list[tuple[str, str, str]]:
        """Where each row stands, its text and its category."""
        found = []
        rows = csv_rows(file)
        _, header = next(rows, (1, []))
        if not {"text", "category"} <= set(header):
            raise DataError(f"{file}, line 1: the columns text and category are needed, and there are {', '.join(header) or 'none'}")
        for line, fields in rows:
            row = dict(zip(header, fields, strict=False))
            place = f"{file}, line {line}"
            if len(fields) != len(header) or not row["text"].strip() or not row["category"].strip():
                refused.add("row that is not complete", f"{place}: a text and a category are needed")
            else:
                found.append((place, row["text"], row["category"].strip()))
        return found
