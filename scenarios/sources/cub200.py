"""CUB-200-2011 in its official form: 11,788 photographs of birds of 200 species.

Origin: C. Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset" (2011). Licence: non-commercial research and education only.

`path` is the folder CUB_200_2011 with images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and images. The split is the
official one (5,994 to train on, 5,794 to test); the benchmarks with pre-trained models use another one, in folders, which the source
`folder` reads. The classes are numbered as in the files. `sessions` names the lists of a few-shot protocol, such as
index_list/cub200/session_*.txt of CEC (Zhang et al., CVPR 2021): they fix the training
images of the classes that they name, and give the grouping `session`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamcl.data_files import locate
from streamcl.errors import DataError
from streamcl.stream import SourceData

from ._index_files import text_lines, within
from ._listed import Listed, ListedMedia, Refused, numbered, pictures
from ._sessions import only_listed


class Cub200(ListedMedia):
    """`path` is the folder CUB_200_2011; `sessions` a pattern of session lists, where there are any."""

    licence = "non-commercial research and education only"
    class_count = 200

    def __init__(self, *, path: Path, sessions: str | None = None, **media: Any) -> None:
        super().__init__(**media)
        self.path, self.sessions = path, sessions

    def files(self) -> list[str]:
        return [str(locate(self.path))]

    def load(self) -> SourceData:
        folder, refused = locate(self.path), Refused(self.on_error)
        if (folder / "CUB_200_2011").is_dir():
            folder = folder / "CUB_200_2011"
        names, images, classes, split = (
            _pairs(within(folder, f"{name}.txt"), refused) for name in ("classes", "images", "image_class_labels", "train_test_split")
        )
        place_of = {number: place for place, number in enumerate(sorted(names, key=_natural))}
        parts: dict[str, list[tuple[str, int]]] = {"1": [], "0": []}
        for number in sorted(images, key=_natural):
            path = folder / "images" / images[number]
            where = f"{folder}: image {number} ({images[number]})"
            if classes.get(number) not in place_of or split.get(number) not in parts:
                refused.add(
                    "image without a class or a part", f"{where} needs a class in image_class_labels.txt and 0 or 1 in train_test_split.txt"
                )
            elif not path.is_file():
                refused.add("image that is not there", f"{where} is not there")
            else:
                parts[split[number]].append((images[number], place_of[classes[number]]))
        train, test = (
            Listed({"image": pictures([str(folder / "images" / name) for name, _ in parts[part]])}, numbered([c for _, c in parts[part]]))
            for part in ("1", "0")
        )
        group_names = {}
        if self.sessions is not None:
            images_of_train = [name for name, _ in parts["1"]]
            train, group_names["session"] = only_listed(train, test, images_of_train, self.sessions, len(place_of))
        return self.assemble(train, test, [names[number] for number in place_of], refused, group_names=group_names)


def _pairs(file: Path, refused: Refused) -> dict[str, str]:
    """The second word of each line by its first."""
    found: dict[str, str] = {}
    for line, written in text_lines(file):
        key, _, value = written.partition(" ")
        if not value.strip():
            refused.add("line that is not complete", f"{file}, line {line}: two words are needed")
        elif key in found:
            raise DataError(f"{file}, line {line}: {key} is listed twice")
        else:
            found[key] = value.strip()
    return found


def _natural(number: str) -> tuple[int, str]:
    return (int(number) if number.isdigit() else 0, number)
