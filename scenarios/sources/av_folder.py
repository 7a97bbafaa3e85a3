"""Audio-video clips that lists name, as Kinetics-Sounds is kept once it is preprocessed: a WAV file and a folder of frames for each clip.

Kinetics-Sounds (R. Arandjelovic, A. Zisserman, "Look, Listen and Learn", ICCV 2017) is a choice of the classes of Kinetics (annotations
CC BY 4.0, videos under YouTube's terms) that are heard as well as seen. Rows of `train` and `test` begin with the clip's name and end
with its class, without a header, as in `--4-0ihtnBU_000058_000068,10,4` of OGM-GE's lists (Peng et al., CVPR 2022). A clip's sound is
NAME.wav in `audio_in` and its frames lie in the folder NAME in `frames_in`; both start from `path`, and may hold {part} for train and
test.

`classes` is a file with the name of a class in each line, where the lists number them; otherwise the classes are named as in the lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamcl.data_files import locate
from streamcl.errors import DataError
from streamcl.stream import SourceData

from ._clips import ClipSource
from ._index_files import csv_rows, text_lines, within
from ._listed import Listed, Refused, numbered


class AvFolder(ClipSource):
    """`path` is the folder of the clips; `train` and `test` the lists."""

    licence = "the set's own"

    def __init__(
        self,
        *,
        path: Path,
        train: Path,
        test: Path,
        audio_in: str = "audio",
        frames_in: str = "frames",
        classes: Path | None = None,
        **clips: Any,
    ) -> None:
        super().__init__(**clips)
        self.path, self.train, self.test, self.classes = path, train, test, classes
        self.audio_in, self.frames_in = audio_in, frames_in

    def files(self) -> list[str]:
        return [str(locate(path)) for path in (self.path, self.train, self.test, self.classes) if path is not None]

    def load(self) -> SourceData:
        folder, refused = locate(self.path), Refused(self.on_error)
        lists = [self._clips(folder, part, locate(file), refused) for part, file in (("train", self.train), ("test", self.test))]
        names, number = self._classes([label for _, _, label in lists[0]])
        parts = []
        for part, rows in zip(("train", "test"), lists, strict=True):
            known = []
            for place, name, label in rows:
                if label in number:
                    known.append((name, number[label]))
                else:
                    refused.add("clip of an unknown class", f"{place}: {label!r} is no class: there are {', '.join(names[:8])}")
            sounds, frames = self._places(folder, part)
            columns = self.columns([sounds / f"{name}.wav" for name, _ in known], [frames / name for name, _ in known])
            parts.append(Listed(columns, numbered([label for _, label in known])))
        return self.assemble(parts[0], parts[1], names, refused)

    def _places(self, folder: Path, part: str) -> tuple[Path, Path]:
        return within(folder, self.audio_in.replace("{part}", part)), within(folder, self.frames_in.replace("{part}", part))

    def _classes(self, labels: list[str]) -> tuple[list[str], dict[str, int]]:
        """The classes' names, and the number of each label of the lists."""
        if self.classes is not None:
            names = [line for _, line in text_lines(locate(self.classes))]
            if len(set(names)) < len(names):
                raise DataError(f"{locate(self.classes)}: a class is named twice")
            return names, {name: place for place, name in enumerate(names)} | {str(place): place for place in range(len(names))}
        whole = all(label.isdigit() for label in labels)
        names = sorted(set(labels), key=lambda label: (int(label) if whole else 0, label))
        return names, {name: place for place, name in enumerate(names)}

    def _clips(self, folder: Path, part: str, file: Path, refused: Refused) -> list[tuple[str, str, str]]:
        """Where each clip is listed, its name and its class, for those that are there."""
        sounds, frames = self._places(folder, part)
        found = []
        for line, fields in csv_rows(file):
            place, name, label = f"{file}, line {line}", fields[0].strip().removesuffix(".wav"), fields[-1].strip()
            lacking = [there for there in (sounds / f"{name}.wav", frames / name) if not there.exists()]
            if len(fields) < 2 or not name or not label:
                refused.add("line that is not complete", f"{place}: a clip's name and its class are needed")
            elif lacking:
                refused.add("clip that is not there", f"{place}: there is no {lacking[0]}")
            else:
                found.append((place, name, label))
        return found
