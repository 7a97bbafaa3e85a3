"""A folder with a sub-folder for each class, full of images or of WAV sounds.

With sub-folders `train` and `test` (and any others beside them, which are left alone) these are the parts, each with its sub-folders
of classes; otherwise `test` names another such folder or `test_fraction` holds a part back. Files are taken from all levels below a
class's folder, in the order of their names; hidden files are left out. The classes are numbered in the order of their names.

The data and its licence are whatever the folder holds. Errors name the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from streamcl.data_files import IMAGES, locate
from streamcl.errors import DataError
from streamcl.stream import SourceData

from ._media import Encoded, FileBytes
from ._records import Records, RecordSource


class Folder(RecordSource):
    """`path` is the folder; `test` another one, where the test set does not lie beside the training set."""

    def __init__(self, *, path: Path, test: Path | None = None, **records: Any) -> None:
        super().__init__(**records)
        self.path, self.test = path, test

    def files(self) -> list[str]:
        return [str(part) for part in self._parts() if part is not None]

    def load(self) -> SourceData:
        train, test = self._parts()
        problems: dict[str, int] = {}
        kind, records = self._records(train, None, problems)
        data = self.assemble(records, self._records(test, kind, problems)[1] if test is not None else None)
        for problem, count in problems.items():
            data.problems[problem] = data.problems.get(problem, 0) + count
        return data

    def _parts(self) -> tuple[Path, Path | None]:
        folder = locate(self.path)
        if not folder.is_dir():
            raise DataError(f"{folder}: this is a file, and a folder with a sub-folder for each class is needed")
        if self.test is not None:
            return folder, locate(self.test)
        if (folder / "train").is_dir():
            return folder / "train", folder / "test" if (folder / "test").is_dir() else None
        return folder, None

    def _records(self, folder: Path, kind: str | None, problems: dict[str, int]) -> tuple[str, Records]:
        import pyarrow as pa

        files: list[str] = []
        labels: list[str] = []
        for place in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
            before = len(files)
            for file in sorted(place.rglob("*")):
                if file.name.startswith(".") or not file.is_file():
                    continue
                its = "audio" if file.suffix.lower() == ".wav" else "image" if file.suffix.lower() in IMAGES else None
                kind = kind or its
                if its is None or its != kind:
                    if self.on_error == "fail":
                        raise DataError(
                            f"{file}: this is no {kind or 'image or .wav'} file by its ending; on_error: skip leaves such files out"
                        )
                    problems["file of another kind"] = problems.get("file of another kind", 0) + 1
                    continue
                files.append(str(file))
                labels.append(place.name)
            if len(files) == before:
                problems[f"class {place.name!r}, whose folder has no image and no .wav file"] = 1
        if not files or kind is None:
            raise DataError(f"{folder}: there is no image and no .wav file in its sub-folders, one for each class")
        where = _Path(files)
        return kind, Records({kind: Encoded(kind, FileBytes(files), where, np.arange(len(files)))}, pa.array(labels), where)


class _Path:
    """Says where a record stands, which is a file of its own."""

    def __init__(self, files: list[str]) -> None:
        self.files = np.asarray(files)

    def __call__(self, row: int) -> str:
        return str(self.files[row])
