"""Images listed in text files: miniImageNet's CSV, the lists of ImageNet subsets, and the session lists of few-shot protocols.

`train` and `test` are lists: .csv with the columns `filename` and `label` (miniImageNet as CEC splits it,
github.com/icoz69/CEC-CVPR2021), or text with a path and a label in each line (`train/n01440764/1.JPEG 0`), or with a path alone, whose
folder is the class. Paths start from the folder `path`. `sessions` names the session lists of a few-shot protocol, as in
index_list/mini_imagenet/session_*.txt: they fix the training images of the classes that they name, of which others are left out, and give
the grouping `session`.

The classes are numbered in the order in which the training list first names them. The images and their licence are whatever the lists
name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamcl.data_files import locate
from streamcl.errors import DataError
from streamcl.stream import SourceData

from ._index_files import csv_rows, text_lines
from ._listed import Listed, ListedMedia, Refused, numbered, pictures
from ._sessions import only_listed


class ImageList(ListedMedia):
    """`path` is the folder from which the paths in the lists start."""

    def __init__(self, *, path: Path, train: Path, test: Path, sessions: str | None = None, **media: Any) -> None:
        super().__init__(**media)
        self.path, self.train, self.test, self.sessions = path, train, test, sessions

    def files(self) -> list[str]:
        return [str(locate(path)) for path in (self.path, self.train, self.test)]

    def load(self) -> SourceData:
        folder, refused = locate(self.path), Refused(self.on_error)
        train, test = (_there(folder, locate(file), refused) for file in (self.train, self.test))
        names = list(dict.fromkeys(label for _, _, label in train))
        number = {name: place for place, name in enumerate(names)}
        known = []
        for place, image, label in test:
            if label in number:
                known.append((place, image, label))
            else:
                refused.add("class that training lacks", f"{place}: the class {label!r} does not occur in training")
        parts = [
            Listed({"image": pictures([str(folder / image) for _, image, _ in rows])}, numbered([number[label] for _, _, label in rows]))
            for rows in (train, known)
        ]
        group_names = {}
        if self.sessions is not None:
            images = [image for _, image, _ in train]
            parts[0], group_names["session"] = only_listed(parts[0], parts[1], images, self.sessions, len(names))
        return self.assemble(parts[0], parts[1], names, refused, group_names=group_names)


def _there(folder: Path, file: Path, refused: Refused) -> list[tuple[str, str, str]]:
    """Where each record stands, its image and its label, for the images that are there."""
    found = []
    for place, image, label in _listed(file, refused):
        if (folder / image).is_file():
            found.append((place, image, label))
        else:
            refused.add("image that is not there", f"{place}: there is no {image} in {folder}")
    return found


def _listed(file: Path, refused: Refused) -> list[tuple[str, str, str]]:
    found = []
    if file.suffix.lower() == ".csv":
        rows = csv_rows(file)
        _, header = next(rows, (1, []))
        if not {"filename", "label"} <= set(header):
            raise DataError(f"{file}, line 1: the columns filename and label are needed, and there are {', '.join(header) or 'none'}")
        for line, fields in rows:
            row = dict(zip(header, fields, strict=False))
            if row.get("filename") and row.get("label"):
                found.append((f"{file}, line {line}", row["filename"], row["label"]))
            else:
                refused.add("line that is not complete", f"{file}, line {line}: a filename and a label are needed")
        return found
    for line, written in text_lines(file):
        path, _, label = written.rpartition(" ")
        path, label = (path.strip(), label) if path else (written, Path(written).parent.name)
        if label:
            found.append((f"{file}, line {line}", path.removeprefix("./"), label))
        else:
            refused.add("line that is not complete", f"{file}, line {line}: a label is needed where the path has no folder")
    return found
