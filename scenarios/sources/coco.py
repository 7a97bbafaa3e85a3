"""MS-COCO in its official form: photographs of everyday scenes with the 80 kinds of things in them, as a multi-label set.

Origin: T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context" (ECCV 2014), cocodataset.org. Licence: annotations CC BY 4.0, images
under the terms of Flickr's users.

`path` is the folder with annotations/instances_train2014.json and ..._val2014.json and the folders of images train2014 and val2014.
An image has the label of a category where an object of it is annotated; crowd regions (iscrowd) do not count unless `crowd` is set, as in
KRT-MLCIL (Dong et al., ICCV 2023). Images without any object stay, with no label set. The classes are in the order of the category ids;
the multi-label class-incremental protocols want them in alphabetical order, which the scenario gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from streamcl.data_files import locate
from streamcl.errors import DataError
from streamcl.stream import SourceData

from ._index_files import json_file, within
from ._listed import Listed, ListedMedia, Refused, label_matrix, pictures


class Coco(ListedMedia):
    """`path` is the folder of the set and `year` the edition (2014, 2017): train is trained on, and val is the test set."""

    licence = "annotations CC BY 4.0; images under Flickr's terms"

    def __init__(
        self,
        *,
        path: Path,
        year: Literal["2014", "2017"] = "2014",
        crowd: bool = False,
        **media: Any,
    ) -> None:
        super().__init__(**media)
        self.path, self.year, self.crowd = path, year, crowd

    def files(self) -> list[str]:
        return [str(locate(self.path))]

    def load(self) -> SourceData:
        folder, refused = locate(self.path), Refused(self.on_error)
        names: list[str] | None = None
        parts = []
        for part in (f"train{self.year}", f"val{self.year}"):
            file = within(folder, f"annotations/instances_{part}.json")
            written = json_file(file)
            for key in ("images", "annotations", "categories"):
                if not isinstance(written.get(key), list):
                    raise DataError(f"{file}: the list {key!r} is missing, which COCO's annotations have")
            category = self._categories(file, written["categories"])
            names = list(category.values()) if names is None else names
            if list(category.values()) != names:
                raise DataError(f"{file}: its categories are not those of the training part")
            parts.append(self._part(file, within(folder, part), written, list(category), refused))
        assert names is not None
        return self.assemble(parts[0], parts[1], names, refused, target="labels")

    def _categories(self, file: Path, written: list) -> dict[int, str]:
        """The name of each category by its id, in the order of the classes."""
        try:
            named = {int(category["id"]): str(category["name"]) for category in written}
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{file}: every category needs an id and a name") from None
        return dict(sorted(named.items()))

    def _part(self, file: Path, folder: Path, written: dict[str, list], categories: list[int], refused: Refused) -> Listed:
        there = {file.name for file in folder.iterdir()}
        row_of: dict[int, int] = {}
        paths: list[str] = []
        gone: set[int] = set()
        for position, image in enumerate(written["images"]):
            where = f"{file}, images[{position}]"
            number, name = (image.get("id"), image.get("file_name")) if isinstance(image, dict) else (None, None)
            if not isinstance(number, int) or not isinstance(name, str):
                refused.add("image record that is not complete", f"{where}: an id and a file_name are needed")
            elif number in row_of:
                refused.add("image that is listed twice", f"{where}: the id {number} is that of another image")
            elif name not in there:
                gone.add(number)
                refused.add("image that is not there", f"{where}: there is no {name} in {folder}")
            else:
                row_of[number] = len(paths)
                paths.append(str(folder / name))
        column_of = {number: column for column, number in enumerate(categories)}
        rows, columns = [], []
        for position, thing in enumerate(written["annotations"]):
            try:
                if thing.get("iscrowd", 0) and not self.crowd:
                    continue
                column = column_of[thing["category_id"]]
                if thing["image_id"] in gone:
                    continue
                rows.append(row_of[thing["image_id"]])
                columns.append(column)
            except (KeyError, TypeError, AttributeError):
                refused.add(
                    "annotation of an unknown image or category",
                    f"{file}, annotations[{position}]: the image_id of a listed image and the category_id of a listed category are needed",
                )
        return Listed({"image": pictures(paths)}, label_matrix(rows, columns, (len(paths), len(categories))))
