"""The session lists of few-shot protocols: which training images belong to which session, and which are left out."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from streamcl.data_files import locate_all
from streamcl.errors import DataError

from ._index_files import text_lines
from ._listed import Listed

UNLISTED = "unlisted"


def only_listed(train: Listed, test: Listed, images: Sequence[str], pattern: str, classes: int) -> tuple[Listed, list[str]]:
    """The training samples that the lists leave, and the names of the sessions; the grouping `session` is added to both parts.

    Lists fix the shots of the classes that they name: other training images of these are left out. Classes that no list names keep all
    theirs. A test sample is of the session that brings its class.
    """
    group, names = _session_of(images, pattern)
    unlisted = len(names) - 1
    first = torch.full((classes,), unlisted).scatter_reduce(0, train.targets, group, "amin")  # the session of each class
    train.groups["session"], test.groups["session"] = group, first[test.targets]
    kept = (group != unlisted) | (first[train.targets] == unlisted)
    return train.take(kept.nonzero().squeeze(1)), names


def _session_of(images: Sequence[str], pattern: str) -> tuple[Tensor, list[str]]:
    """The number of each image's list, and the names of the lists, the last of them for images that none lists.

    The lists are files with a path in each line, in the order of the number in their name. A path is that of an image where it ends
    in the image's own, or where only one image has its file name.
    """
    row_of: dict[str, int] = {image: row for row, image in enumerate(images)}
    alone: dict[str, int] = {}
    for row, image in enumerate(images):
        name = image.rpartition("/")[2]
        alone[name] = -1 if name in alone else row
    files = sorted(locate_all(pattern), key=lambda file: ([int(n) for n in re.findall(r"\d+", file.stem)][-1:], file.name))
    group = torch.full((len(images),), len(files), dtype=torch.int64)
    for number, file in enumerate(files):
        for line, written in text_lines(file):
            parts = written.replace("\\", "/").split("/")
            endings = ("/".join(parts[start:]) for start in range(len(parts)))
            row = next((row_of[ending] for ending in endings if ending in row_of), alone.get(parts[-1], -1))
            if row < 0:
                raise DataError(f"{file}, line {line}: {written!r} is no training image, or the name of several")
            if group[row] != len(files):
                raise DataError(f"{file}, line {line}: {written!r} is already in {files[int(group[row])].name}")
            group[row] = number
    return group, [*(file.stem for file in files), UNLISTED]
