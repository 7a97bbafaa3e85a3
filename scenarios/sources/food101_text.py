"""UPMC Food-101 in its official form: photographs of 101 dishes, each with the text of the web page that it was found on.

Origin: X. Wang et al., "Recipe Recognition with Large Multimodal Food Dataset" (ICME workshop 2015). Licence: research use; images and
texts belong to their owners.

`path` is the folder with images/train and images/test (a sub-folder per dish) and the texts: texts/train_titles.csv and
texts/test_titles.csv (image, title, dish in each row, without a header), or text.json (image to text) with split.json (part to
images), as the missing-modality protocols use them (Lee et al., CVPR 2023). A photograph without a text has its text masked. A `val` part
of split.json is trained on, or left out (`leave`, as published). The classes are in the order of their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from streamcl.data_files import locate
from streamcl.errors import DataError
from streamcl.stream import SourceData

from ._index_files import csv_rows, json_file, within
from ._listed import Listed, ListedMedia, Refused, numbered, pictures

Row = tuple[str, str, str, str]  # where it stands, the image's name, its dish, its text ("" where there is none)


class Food101Text(ListedMedia):
    """`path` is the folder of the set; `val` matters only where split.json has such a part."""

    licence = "research use; images and texts belong to their owners"

    def __init__(self, *, path: Path, val: Literal["train", "leave"] = "leave", **media: Any) -> None:
        super().__init__(**media)
        self.path, self.val = path, val

    def files(self) -> list[str]:
        return [str(locate(self.path))]

    def load(self) -> SourceData:
        folder, refused = locate(self.path), Refused(self.on_error)
        if (folder / "split.json").exists():
            train, test = self._from_json(folder, refused)
        else:
            train, test = (_from_csv(within(folder, f"texts/{part}_titles.csv"), refused) for part in ("train", "test"))
        names = sorted({dish for _, _, dish, _ in train})
        number = {name: place for place, name in enumerate(names)}
        parts = [_part(folder, part, rows, number, refused) for part, rows in (("train", train), ("test", test))]
        if not all(bool(part.present["text"].all()) for part in parts):
            return self.assemble(parts[0], parts[1], names, refused)
        for part in parts:
            part.present = {}
        return self.assemble(parts[0], parts[1], names, refused)

    def _from_json(self, folder: Path, refused: Refused) -> tuple[list[Row], list[Row]]:
        split, texts = json_file(folder / "split.json"), json_file(within(folder, "text.json"))
        for part in ("train", "test", *(["val"] if self.val == "train" else [])):
            if not isinstance(split.get(part), list):
                raise DataError(f"{folder / 'split.json'}: the list {part!r} is missing")
        lists = split["train"] + (split["val"] if self.val == "train" else []), split["test"]
        found: tuple[list[Row], list[Row]] = ([], [])
        for part_rows, images in zip(found, lists, strict=True):
            for image in images:
                where = f"{folder / 'split.json'}: {image}"
                dish, text = (image.rpartition("_")[0], texts.get(image, "")) if isinstance(image, str) else ("", "")
                if dish and isinstance(text, str):
                    part_rows.append((where, image, dish, text.strip()))
                else:
                    refused.add("record that cannot be read", f"{where}: DISH_NUMBER.jpg is expected as its name, and a text in text.json")
        return found


def _from_csv(file: Path, refused: Refused) -> list[Row]:
    found = []
    for line, fields in csv_rows(file):
        where = f"{file}, line {line}"
        if len(fields) == 3 and fields[0].strip() and fields[2].strip():
            found.append((where, fields[0].strip(), fields[2].strip(), fields[1].strip()))
        else:
            refused.add("record that cannot be read", f"{where}: an image, its text and its dish are needed")
    return found


def _part(folder: Path, part: str, rows: list[Row], number: dict[str, int], refused: Refused) -> Listed:
    paths, texts, labels = [], [], []
    for where, image, dish, text in rows:
        path = folder / "images" / part / dish / image
        if dish not in number:
            refused.add("class that training lacks", f"{where}: the class {dish!r} does not occur in training")
        elif not path.is_file():
            refused.add("image that is not there", f"{where}: there is no {path}")
        else:
            paths.append(str(path))
            texts.append(text)
            labels.append(number[dish])
    present = {"text": torch.tensor([bool(text) for text in texts], dtype=torch.bool)}
    return Listed({"image": pictures(paths), "text": texts}, numbered(labels), present=present)
