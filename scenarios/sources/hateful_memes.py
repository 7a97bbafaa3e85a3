"""The Hateful Memes Challenge in its official form: memes, each an image with its text, hateful or not.

Origin: D. Kiela et al., "The Hateful Memes Challenge: Detecting Hate Speech in Multimodal Memes" (NeurIPS 2020). Licence: Facebook's
Hateful Memes licence agreement, research use only; the images may not be passed on.

`path` is the folder with train.jsonl, dev_seen.jsonl, test_seen.jsonl (or dev.jsonl and test.jsonl) and img. A line has `img`, `text` and
`label`; the first release of test.jsonl has no labels, which is said. The published figure is the area under the ROC curve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamcl.data_files import locate
from streamcl.stream import SourceData

from ._index_files import json_lines, within
from ._listed import Listed, ListedMedia, Refused, numbered, pictures

CLASSES = ("not hateful", "hateful")


class HatefulMemes(ListedMedia):
    """`train` and `test` are the lists that are used, by their names in the folder."""

    licence = "Hateful Memes licence agreement (research only)"
    class_count = 2

    def __init__(self, *, path: Path, train: str = "train.jsonl", test: str = "test_seen.jsonl", **media: Any) -> None:
        super().__init__(**media)
        self.path, self.train, self.test = path, train, test

    def files(self) -> list[str]:
        return [str(locate(self.path))]

    def load(self) -> SourceData:
        folder, refused = locate(self.path), Refused(self.on_error)
        train, test = (self._part(folder, within(folder, name), refused) for name in (self.train, self.test))
        return self.assemble(train, test, CLASSES, refused)

    def _part(self, folder: Path, file: Path, refused: Refused) -> Listed:
        paths, texts, labels = [], [], []
        for line, record in json_lines(file):
            where = f"{file}, line {line}"
            image, text, label = (record.get(key) for key in ("img", "text", "label")) if record else (None, None, None)
            if not isinstance(image, str) or not isinstance(text, str):
                refused.add("line that is not complete", f"{where}: an object with img, text and label is needed")
            elif label not in (0, 1) or isinstance(label, bool):
                refused.add(
                    "meme without a label", f"{where}: the label is {label!r}, and 0 or 1 is needed (the first test.jsonl has none)"
                )
            elif not (folder / image).is_file():
                refused.add("image that is not there", f"{where}: there is no {image} in {folder}")
            else:
                paths.append(str(folder / image))
                texts.append(text)
                labels.append(int(label))
        return Listed({"image": pictures(paths), "text": texts}, numbered(labels))
