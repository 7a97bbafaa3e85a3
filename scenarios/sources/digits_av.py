"""Seen and heard: a real handwritten digit of scikit-learn with a spoken digit of the same class.

The images are those of the source `digits` (UCI, E. Alpaydin and C. Kaynak, 1998, CC BY 4.0). With `audio` the sounds are real: Parquet
files or folders of spoken digits that the source `audio` reads, the Free Spoken Digit Dataset for instance (Z. Jackson and others,
CC BY-SA 4.0): `audio: fsdd-train.parquet, audio_test: fsdd-test.parquet`, with the speaker in the files' names. Each image is joined to
a recording of its class that is drawn at random; training images meet training recordings only, and test images test recordings only.

Without `audio` the sounds are tones made on the spot, not speech: a class is a pitch (200 Hz for 0, and a quarter of an octave up for
each next digit), a speaker is one of six mixtures of overtones, and each tone has its own loudness, length, beginning, phases,
detuning (up to 1 %) and noise. The groupings say who speaks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data import ArrayDataset
from streamcl.errors import ConfigError, DataError
from streamcl.options import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from streamcl.stream import Column, Dataset, Grouping, Modality, SourceData

from ._drawn import Draws, drawn
from ._sound import VOICES, Hearing, SoundOptions, tones
from .audio import Audio
from .digits import Digits

RATE = 8000  # of the tones
PITCH = 200.0


class DigitsAv(SoundOptions):
    """One row per image, or as many as `samples` and `test_samples` say, over and over the images with other sounds.

    Sounds are cut and padded to `seconds`. `audio_test` holds the test recordings where `audio` does not; else `test_fraction` of every
    class is held back, of the recordings as of the images. `speaker` is a regular expression or a column, as the source `audio` takes
    it. `noise` is how strong the noise in a tone is beside the loudest tone. `draw` makes samples at once, when they are read, or at
    once while they take less than 512 MB (`auto`).
    """

    licence = "CC BY 4.0"
    class_count = 10

    def __init__(
        self,
        *,
        audio: Path | None = None,
        audio_test: Path | None = None,
        speaker: str | None = r"^[^_]+_([^_]+)_",
        seconds: PositiveFloat = 1.0,
        noise: NonNegativeFloat | None = None,
        samples: PositiveInt | None = None,
        test_samples: PositiveInt | None = None,
        seed: NonNegativeInt = 0,
        test_fraction: Fraction = 0.3,
        split_seed: NonNegativeInt = 0,
        draw: Literal["eager", "lazy", "auto"] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if audio is None and audio_test is not None:
            raise ConfigError("digits_av: audio_test is given and audio is not: the training recordings are needed too")
        if audio is not None and noise is not None:
            raise ConfigError("digits_av: noise belongs to the synthesised tones; leave it out beside audio")
        if not test_fraction:
            raise ConfigError("digits_av: test_fraction is 0, and the test images are held back from scikit-learn's digits: 0.3 is usual")
        self.audio, self.audio_test, self.speaker, self.seconds = audio, audio_test, speaker, seconds
        self.noise = 0.05 if noise is None else noise
        self.samples, self.test_samples, self.seed, self.draw = samples, test_samples, seed, draw
        self.test_fraction, self.split_seed = test_fraction, split_seed

    def files(self) -> list[str]:
        return [] if self.audio is None else self._recordings(self.audio).files()

    def load(self) -> SourceData:
        digits = Digits(test_fraction=self.test_fraction, split_seed=self.split_seed).load()
        heard = None if self.audio is None else self._recordings(self.audio).load()
        speakers = heard.groupings.get("speaker") if heard else None
        if heard is None:
            hearing = self.hearing(RATE, round(self.seconds * RATE))
            audio, about = hearing.modality(), {**hearing.about, "synthesised": True}
            names: list[str] | None = [f"voice {number + 1}" for number in range(len(VOICES))]
        else:
            if heard.class_names != digits.class_names:
                raise DataError(f"{self.audio}: recordings of the classes 0 to 9 are needed, and there are {', '.join(heard.class_names)}")
            if heard.test is None or len(heard.test) == 0:
                raise DataError(f"{self.audio}: there are no test recordings: name them (audio_test)")
            audio, about = heard.modalities["audio"], {**heard.about["audio"], "synthesised": False}
            names = speakers.names if speakers else None
        parts, who, first_id = [], [], 0
        for part, images, wanted in (("train", digits.train, self.samples), ("test", digits.test, self.test_samples)):
            assert isinstance(images, ArrayDataset)
            draws, rows = Draws(self.seed, "digits_av", part), np.arange(wanted or len(images))
            image = torch.from_numpy(rows % len(images))
            targets = images.targets[image]
            if heard is None:
                voice = torch.from_numpy(draws.whole(rows, "voice", 1, len(VOICES))[:, 0])
                sounds: _Tones | _Recordings = _Tones(draws, targets.numpy(), voice.numpy(), self.noise, hearing)
                who.append(voice)
            else:
                recordings = heard.train if part == "train" else heard.test
                assert recordings is not None
                chosen = _of_the_class(draws, rows, targets, recordings.targets, f"{self.audio_test or self.audio} ({part})")
                sounds = _Recordings(recordings, chosen)
                if speakers is not None:
                    spoken = speakers.train if part == "train" else speakers.test
                    assert spoken is not None
                    who.append(spoken[chosen])
            pixels = images.inputs["image"]
            assert isinstance(pixels, Tensor)
            parts.append(drawn(_Pairs(pixels, image, sounds), targets, first_id, self.draw))
            first_id += len(rows)
        return SourceData(
            parts[0],
            parts[1],
            digits.class_names,
            {"image": Modality("image", (1, 8, 8), high=16), "audio": audio},
            licence=self.licence if heard is None else f"{self.licence} (images); the recordings: {heard.licence}",
            problems=heard.problems if heard else {},
            groupings={"speaker": Grouping(names, who[0], who[1])} if names else {},
            about={"audio": about},
        )

    def _recordings(self, audio: Path) -> Audio:
        return Audio(
            path=audio,
            test=self.audio_test,
            speaker=self.speaker,
            seconds=self.seconds,
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
            audio_as=self.audio_as,
            n_fft=self.n_fft,
            hop=self.hop,
            mels=self.mels,
            fmin=self.fmin,
            fmax=self.fmax,
        )


class _Pairs:
    """The images and sounds of some rows."""

    def __init__(self, pixels: Tensor, image: Tensor, sounds: _Tones | _Recordings) -> None:
        self.pixels, self.image, self.sounds = pixels, image, sounds

    def __call__(self, rows: np.ndarray) -> dict[str, Column]:
        image = self.pixels.index_select(0, self.image[torch.from_numpy(rows)])
        return {"image": image, "audio": self.sounds(rows)}


class _Recordings:
    """The recording that each row was given."""

    def __init__(self, recordings: Dataset, chosen: Tensor) -> None:
        self.recordings, self.chosen = recordings, chosen

    def __call__(self, rows: np.ndarray) -> Tensor:
        sounds = self.recordings[self.chosen[torch.from_numpy(rows)]].inputs["audio"]
        assert isinstance(sounds, Tensor)
        return sounds


class _Tones:
    """A tone for each row: its class is the pitch, its voice the overtones."""

    def __init__(self, draws: Draws, classes: np.ndarray, voice: np.ndarray, noise: float, hearing: Hearing) -> None:
        self.draws, self.classes, self.voice, self.noise, self.hearing = draws, classes, voice, noise, hearing

    def __call__(self, rows: np.ndarray) -> Tensor:
        pitch = PITCH * 2 ** (self.classes[rows] / 4)
        return self.hearing(tones(self.draws, rows, pitch, self.voice[rows], self.noise, self.hearing.rate, self.hearing.samples))


def _of_the_class(draws: Draws, rows: np.ndarray, targets: Tensor, available: Tensor, where: str) -> Tensor:
    """For each row a recording of its class, drawn at random  # (rows,)"""
    counts = torch.bincount(available, minlength=10).numpy()
    lacking = np.flatnonzero(counts == 0)
    if len(lacking):
        raise DataError(f"{where}: there is no recording of {', '.join(map(str, lacking.tolist()))}: every digit needs at least one")
    order, classes = available.argsort(stable=True).numpy(), targets.numpy()
    member = draws.whole(rows, "recording", 1, counts[classes, None])[:, 0]
    return torch.from_numpy(order[(counts.cumsum() - counts)[classes] + member])
