"""CREMA-D: 7,442 clips of 91 actors who speak twelve sentences in six emotions, heard and seen.

Origin: H. Cao et al., "CREMA-D: Crowd-sourced Emotional Multimodal Actors Dataset" (IEEE TAC, 2014),
github.com/CheyneyComputerScience/CREMA-D. Licence: Open Database License (ODbL).

`path` is the folder with AudioWAV/1001_DFA_ANG_XX.wav and, for each clip, a folder of frames of the same name in `frames_in`: videos
are not decoded here, since the published protocols extract their frames beforehand (Image-01-FPS, one a second, in OGM-GE, CVPR 2022).
The class is the third part of a clip's name, in the order NEU, HAP, SAD, FEA, DIS, ANG; the groupings `actor` and `sentence` are the
first and the second.

`train` and `test` name lists of clips, a name in each row (train.csv and test.csv of OGM-GE, whose actors are in both); without lists
a share of the actors, `test_actors`, is the test set, so that nobody is in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError
from streamcl.options import Fraction, NonNegativeInt
from streamcl.seeding import generator
from streamcl.stream import SourceData

from ._clips import ClipSource
from ._index_files import csv_rows, within
from ._listed import Listed, Refused, numbered

EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")


class CremaD(ClipSource):
    """`frames_in` is the folder of the frames' folders, from `path`; `split_seed` draws the actors of the test set."""

    licence = "ODbL"
    class_count = 6

    def __init__(
        self,
        *,
        path: Path,
        frames_in: str = "Image-01-FPS",
        train: Path | None = None,
        test: Path | None = None,
        test_actors: Fraction = 0.2,
        split_seed: NonNegativeInt = 0,
        **clips: Any,
    ) -> None:
        super().__init__(**clips)
        if (train is None) != (test is None):
            raise ConfigError("crema_d: train and test are lists that belong together: give both, or neither")
        self.path, self.frames_in, self.train, self.test = path, frames_in, train, test
        self.test_actors, self.split_seed = test_actors, split_seed

    def files(self) -> list[str]:
        return [str(locate(path)) for path in (self.path, self.train, self.test) if path is not None]

    def load(self) -> SourceData:
        folder, refused = locate(self.path), Refused(self.on_error)
        sounds = within(folder, "AudioWAV")
        if self.train is not None and self.test is not None:
            parts = [_names(locate(file)) for file in (self.train, self.test)]
        else:
            everything = [(str(file), file.stem) for file in sorted(sounds.glob("*.wav"))]
            if not everything:
                raise DataError(f"{sounds}: there is no .wav file in it")
            actors = sorted({name.partition("_")[0] for _, name in everything})
            drawn = torch.randperm(len(actors), generator=generator(self.split_seed, "test actors")).tolist()
            held = {actors[place] for place in drawn[: min(round(self.test_actors * len(actors)), len(actors) - 1)]}
            parts = [
                [(place, name) for place, name in everything if (name.partition("_")[0] in held) == wanted] for wanted in (False, True)
            ]
        frames = within(folder, self.frames_in)
        good = [[name for place, name in part if _usable(place, name, sounds, frames, refused)] for part in parts]
        actors, sentences = (sorted({name.split("_")[place] for part in good for name in part}) for place in (0, 1))
        train, test = (
            Listed(
                self.columns([sounds / f"{name}.wav" for name in part], [frames / name for name in part]),
                numbered([EMOTIONS.index(name.split("_")[2]) for name in part]),
                {
                    "actor": numbered([actors.index(name.split("_")[0]) for name in part]),
                    "sentence": numbered([sentences.index(name.split("_")[1]) for name in part]),
                },
            )
            for part in good
        )
        groups = {"actor": actors, "sentence": sentences}
        return self.assemble(train, test if good[1] else None, EMOTIONS, refused, group_names=groups)


def _names(file: Path) -> list[tuple[str, str]]:
    return [(f"{file}, line {line}", fields[0].strip().removesuffix(".wav")) for line, fields in csv_rows(file)]


def _usable(place: str, name: str, sounds: Path, frames: Path, refused: Refused) -> bool:
    words = name.split("_")
    if len(words) < 3 or words[2] not in EMOTIONS:
        refused.add(
            "clip without an emotion",
            f"{place}: ACTOR_SENTENCE_EMOTION_LEVEL is expected as a clip's name, with one of {', '.join(EMOTIONS)}",
        )
        return False
    lacking = [there for there in (sounds / f"{name}.wav", frames / name) if not there.exists()]
    if lacking:
        refused.add("clip that is not there", f"{place}: there is no {lacking[0]}")
    return not lacking
