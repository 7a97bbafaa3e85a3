"""MM-IMDb in its official form: 25,959 films with their poster, their plot and their genres, as a multi-label set.

Origin: J. Arevalo et al., "Gated Multimodal Units for Information Fusion" (ICLR workshop 2017), github.com/johnarevalo/gmu-mmimdb.
Licence: research use; posters and plots belong to their owners.

`path` is the folder with split.json (train, dev and test: lists of ids) and, for each id, ID.json (`plot`, `genres`) and ID.jpeg, both in
dataset, or in labels and images. The classes are the 23 genres of the published protocol in its order; films keep their place when
they have none of them, and other genres do not count. A film without a plot has its text masked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from streamcl.data_files import locate
from streamcl.errors import DataError
from streamcl.stream import SourceData

from ._index_files import json_file, within
from ._listed import Listed, ListedMedia, Refused, label_matrix, pictures

_GENRES = (
    "Drama Comedy Romance Thriller Crime Action Adventure Horror Documentary Mystery Sci-Fi Fantasy Family Biography War History Music "
    "Animation Musical Western Sport Short Film-Noir"
)
GENRES = tuple(_GENRES.split())


class MmImdb(ListedMedia):
    """`plot` says which of a film's plots is its text, and `dev` whether the part of that name is trained on or left out (`leave`)."""

    licence = "research use; posters and plots belong to their owners"
    class_count = 23

    def __init__(
        self, *, path: Path, plot: Literal["first", "longest", "all"] = "first", dev: Literal["train", "leave"] = "leave", **media: Any
    ) -> None:
        super().__init__(**media)
        self.path, self.plot, self.dev = path, plot, dev

    def files(self) -> list[str]:
        return [str(locate(self.path))]

    def load(self) -> SourceData:
        folder, refused = locate(self.path), Refused(self.on_error)
        file = within(folder, "split.json")
        split = json_file(file)
        for part in ("train", "test", *(["dev"] if self.dev == "train" else [])):
            if not isinstance(split.get(part), list):
                raise DataError(f"{file}: the list {part!r} is missing")
        records, posters = (
            next((folder / name for name in names if (folder / name).is_dir()), folder)
            for names in (("dataset", "labels"), ("dataset", "images"))
        )
        ids = split["train"] + (split["dev"] if self.dev == "train" else [])
        train, test = (self._part(records, posters, [str(number) for number in part], refused) for part in (ids, split["test"]))
        return self.assemble(train, test, GENRES, refused, target="labels")

    def _part(self, records: Path, posters: Path, ids: list[str], refused: Refused) -> Listed:
        paths: list[str] = []
        texts: list[str] = []
        rows: list[int] = []
        columns: list[int] = []
        place = {genre: column for column, genre in enumerate(GENRES)}
        for number in ids:
            record, poster = records / f"{number}.json", posters / f"{number}.jpeg"
            lacking = [file for file in (record, poster) if not file.is_file()]
            if lacking:
                refused.add("film that is not there", f"split.json lists {number}, and there is no {lacking[0]}")
                continue
            try:
                film = json_file(record)
            except DataError as error:
                refused.add("record that cannot be read", str(error))
                continue
            genres, plots = film.get("genres"), film.get("plot", [])
            plots = [plots] if isinstance(plots, str) else plots
            if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in (genres, plots)):
                refused.add("record that cannot be read", f"{record}: a list of genres and a plot (a text or a list of texts) are needed")
                continue
            columns += (its := [place[genre] for genre in genres if genre in place])
            rows += [len(paths)] * len(its)
            paths.append(str(poster))
            texts.append(self._text(plots))
        present = {"text": torch.tensor([bool(text) for text in texts], dtype=torch.bool)}
        targets = label_matrix(rows, columns, (len(paths), len(GENRES)))
        return Listed({"image": pictures(paths), "text": texts}, targets, present={} if bool(present["text"].all()) else present)

    def _text(self, plots: list[str]) -> str:
        written = [text.strip() for text in plots if text.strip()]
        if not written:
            return ""
        return {"first": written[0], "longest": max(written, key=len), "all": "\n".join(written)}[self.plot]
