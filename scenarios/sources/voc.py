"""PASCAL VOC in its official form: photographs with 20 kinds of things, as a multi-label set.

Origin: M. Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge" (IJCV 2010), VOCdevkit of 2007 and 2012. Licence:
images under Flickr's terms of use.

`path` is the folder VOCdevkit (or VOC2007 in it), with ImageSets/Main, Annotations and JPEGImages. What an image shows is read from its
annotation (XML). Objects that are marked as difficult do not count, as in KRT-MLCIL (Dong et al., ICCV 2023), or count like others
(`difficult: present`), or leave the label open where they are the only ones of their kind (`unknown`: -1, as in VOC's own evaluation).
VOC2007 is trained on trainval and tested on test; the test annotations of VOC2012 are not published, so there train and val are used. The
classes are in alphabetical order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import torch

from streamcl.data_files import locate
from streamcl.stream import SourceData

from ._index_files import text_lines, within
from ._listed import Listed, ListedMedia, Refused, pictures

_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
)
CLASSES = tuple(_CLASSES.split())
_PARTS = {"2007": ("trainval", "test"), "2012": ("train", "val")}


class Voc(ListedMedia):
    """`train` and `test` name other lists in ImageSets/Main than the usual ones."""

    licence = "images under Flickr's terms of use"
    class_count = 20

    def __init__(
        self,
        *,
        path: Path,
        year: Literal["2007", "2012"] = "2007",
        train: str | None = None,
        test: str | None = None,
        difficult: Literal["absent", "present", "unknown"] = "absent",
        **media: Any,
    ) -> None:
        super().__init__(**media)
        self.path, self.year, self.difficult = path, year, difficult
        self.train, self.test = train or _PARTS[year][0], test or _PARTS[year][1]

    def files(self) -> list[str]:
        return [str(locate(self.path))]

    def load(self) -> SourceData:
        folder = locate(self.path)
        inner = folder / f"VOC{self.year}"
        folder, refused = inner if inner.is_dir() else folder, Refused(self.on_error)
        train, test = (self._part(folder, name, refused) for name in (self.train, self.test))
        return self.assemble(train, test, CLASSES, refused, target="labels")

    def _part(self, folder: Path, name: str, refused: Refused) -> Listed:
        file = within(folder, f"ImageSets/Main/{name}.txt")
        paths, targets = [], []
        for line, written in text_lines(file):
            where, image = f"{file}, line {line}", written.split()[0]
            picture, annotation = folder / "JPEGImages" / f"{image}.jpg", folder / "Annotations" / f"{image}.xml"
            lacking = [place for place in (picture, annotation) if not place.is_file()]
            if lacking:
                refused.add("image that is not there", f"{where}: there is no {lacking[0]}")
                continue
            try:
                targets.append(self._labels(annotation))
            except (ElementTree.ParseError, ValueError) as error:
                refused.add("annotation that cannot be read", f"{annotation}: this is no annotation of VOC: {error}")
                continue
            paths.append(str(picture))
        return Listed({"image": pictures(paths)}, torch.tensor(targets, dtype=torch.int8).reshape(len(targets), len(CLASSES)))

    def _labels(self, annotation: Path) -> list[int]:
        labels = [0] * len(CLASSES)
        for thing in ElementTree.parse(annotation).getroot().iter("object"):
            name = (thing.findtext("name") or "").strip()
            if name not in CLASSES:
                raise ValueError(f"{name!r} is none of its 20 classes")
            place = CLASSES.index(name)
            if (thing.findtext("difficult") or "0").strip() != "1" or self.difficult == "present":
                labels[place] = 1
            elif self.difficult == "unknown" and labels[place] == 0:
                labels[place] = -1
        return labels
