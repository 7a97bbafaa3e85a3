"""Clips on disk: a WAV file and a folder of frames for each, as the preprocessed audio-video sets keep them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcl.data_files import IMAGES
from streamcl.errors import DataError
from streamcl.options import PositiveFloat, PositiveInt
from streamcl.stream import Column, Modality

from ._listed import ListedMedia, Standing
from ._media import Encoded, FileBytes, Undecodable, _image


class ClipSource(ListedMedia):
    """What sources of clips share.

    `frames` of each clip's folder are taken, evenly over its files in the order of their names: with 1 the middle one as the modality
    `image`, with more a `video`. Sounds are 16-bit PCM, cut and padded to `seconds`; without it all must be of one length.
    """

    def __init__(self, *, frames: PositiveInt = 1, seconds: PositiveFloat | None = None, **media: Any) -> None:
        super().__init__(**media)
        self.frames, self.seconds = frames, seconds

    def columns(self, sounds: Sequence[Path], folders: Sequence[Path]) -> dict[str, Column | Encoded]:
        rows, heard = np.arange(len(sounds)), [str(path) for path in sounds]
        audio = Encoded("audio", FileBytes(heard), Standing(heard), rows)
        seen = Standing([str(folder) for folder in folders])
        if self.frames == 1:
            return {"audio": audio, "image": Encoded("image", MiddleFrame(seen), seen, rows)}
        return {"audio": audio, "video": Frames(seen, rows, self.frames)}


class MiddleFrame:
    """Fetches the middle frame of each folder."""

    def __init__(self, folders: Standing) -> None:
        self.folders = folders

    def __call__(self, row: int) -> bytes:
        files = frame_files(Path(self.folders(row)))
        return files[(len(files) - 1) // 2].read_bytes()


class Frames(Encoded):
    """A column of videos: folders of images, of which `count` are decoded  # (frames, channels, height, width) each"""

    def __init__(self, folders: Callable[[int], str], rows: np.ndarray, count: int) -> None:
        super().__init__("video", FileBytes([]), folders, rows)
        self.count = count

    def take(self, places: np.ndarray) -> Frames:
        taken = Frames(self.where, self.rows[places], self.count)
        taken.size, taken.shape = self.size, self.shape
        return taken

    def modality(self) -> Modality:
        return Modality("video", self.shape, high=255)

    def nbytes(self) -> int:
        return len(self) * int(np.prod(self.shape))

    def one(self, place: int) -> np.ndarray:
        folder = self.where(int(self.rows[place]))
        try:
            files = frame_files(Path(folder))
            chosen = np.linspace(0, len(files) - 1, self.count).round().astype(int)
            decoded = [_image(files[number].read_bytes(), self.size) for number in chosen]
        except Exception as error:  # broken bytes make Pillow raise nearly anything
            raise Undecodable(f"{folder}: this is no folder of frames that can be read: {error}") from None
        shapes = {frame.shape for frame in decoded} | ({self.shape[1:]} if self.shape else set())
        if len(shapes) > 1:
            raise DataError(f"{folder}: its frames are not of the size of the others: give `size` to make them equal")
        video = np.stack(decoded)
        self.shape = video.shape
        return video

    def _empty(self, count: int) -> Tensor:
        return torch.zeros(count, *self.shape, dtype=torch.uint8)


def frame_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES and not file.name.startswith("."))
    if not files:
        raise ValueError("there is no image in it")
    return files
