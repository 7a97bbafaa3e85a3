"""Images and sounds as they lie in files and tables: encoded bytes, decoded when they are needed."""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from streamcl.errors import DataError
from streamcl.stream import Modality

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

Fetch = Callable[[int], "bytes | Image"]


class Undecodable(DataError):
    """A record whose bytes are no image or sound; `on_error: skip` leaves it out."""


class Encoded:
    """A column of encoded images or sounds. It is handed to worker processes, so it holds no open file.

    Images become uint8, RGB, channels first, upright as their EXIF says, at their own size, or scaled and cut to `size` x `size`.
    Sounds are 16-bit PCM in WAV and become float32 from -1 to 1, one channel, at their own length or cut and padded to `seconds`.
    """

    def __init__(self, kind: str, fetch: Fetch, where: Callable[[int], str], rows: np.ndarray) -> None:
        self.kind, self.fetch, self.where, self.rows = kind, fetch, where, rows
        self.size: int | None = None
        self.seconds: float | None = None
        self.shape: tuple[int, ...] = ()  # of one decoded record; that of the first one settles it
        self.rate = 0

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray) -> Encoded:
        taken = Encoded(self.kind, self.fetch, self.where, self.rows[places])
        taken.size, taken.seconds, taken.shape, taken.rate = self.size, self.seconds, self.shape, self.rate
        return taken

    def settle(self, skip: bool) -> None:
        """Take the shape of the first record that decodes."""
        for place in range(len(self)):
            try:
                self.one(place)
                return
            except Undecodable:
                if not skip:
                    raise
        raise DataError(f"no {self.kind} decodes; the first is {self.where(int(self.rows[0]))}" if len(self) else f"no {self.kind} at all")

    def modality(self) -> Modality:
        return Modality(self.kind, self.shape, high=255 if self.kind == "image" else None)

    def nbytes(self) -> int:
        """What the whole column takes when it is decoded."""
        return len(self) * int(np.prod(self.shape)) * (1 if self.kind == "image" else 4)

    def one(self, place: int) -> np.ndarray:
        row = int(self.rows[place])
        try:
            decoded = _image(self.fetch(row), self.size) if self.kind == "image" else self._sound(row)
        except DataError:
            raise
        except Exception as error:  # broken bytes make Pillow raise nearly anything
            told = re.sub(r" *<_io\.\w+ object at 0x[0-9a-f]+>", "", str(error)) or "it ends too early"
            left = "; on_error: skip leaves such records out"
            raise Undecodable(f"{self.where(row)}: this is no {self.kind} that can be read: {told}{left}") from None
        if not self.shape:
            self.shape = decoded.shape
        elif decoded.shape != self.shape:
            mine, others = self._extent(decoded.shape), self._extent(self.shape)
            option = "size" if self.kind == "image" else "seconds"
            raise DataError(
                f"{self.where(row)}: this {self.kind} is {mine} and the others are {others}: give `{option}` to make them equal"
            )
        return decoded

    def read(self, places: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([self.one(place) for place in places])) if len(places) else self._empty(0)

    def read_all(self, threads: int, skip: bool, keep: bool = True) -> tuple[Tensor, Tensor]:
        """Everything decoded (with `keep`), and which records do decode; with `skip` those that do not are left at zero."""
        values = self._empty(len(self) if keep else 0)
        good = torch.ones(len(self), dtype=torch.bool)
        view = values.numpy()

        def fill(start: int) -> None:
            for place in range(start, min(start + 64, len(self))):
                try:
                    decoded = self.one(place)
                except Undecodable:
                    if not skip:
                        raise
                    good[place] = False
                else:
                    if keep:
                        view[place] = decoded

        with ThreadPoolExecutor(max(threads, 1)) as pool:
            for _ in pool.map(fill, range(0, len(self), 64)):
                pass
        return values, good

    def _extent(self, shape: tuple[int, ...]) -> str:
        return f"{shape[2]} x {shape[1]}" if self.kind == "image" else f"{shape[0]} samples long"

    def _empty(self, count: int) -> Tensor:
        return torch.zeros(count, *self.shape, dtype=torch.uint8 if self.kind == "image" else torch.float32)

    def _sound(self, row: int) -> np.ndarray:
        data = self.fetch(row)
        with wave.open(io.BytesIO(data)) as file:  # type: ignore[arg-type]
            if file.getsampwidth() != 2:
                raise ValueError(f"it has {8 * file.getsampwidth()} bits per sample and only 16-bit PCM is read")
            rate, channels = file.getframerate(), file.getnchannels()
            frames = file.readframes(file.getnframes())
            if len(frames) < file.getnframes() * channels * 2:
                raise ValueError(f"it ends after {len(frames) // (2 * channels)} of the {file.getnframes()} samples that it announces")
            samples = np.frombuffer(frames, dtype="<i2").astype(np.float32) / 32768
        if self.rate and rate != self.rate:
            raise DataError(f"{self.where(row)}: this sound has {rate} samples per second and the others have {self.rate}: resample them")
        self.rate = rate
        mono = samples.reshape(-1, channels).mean(axis=1) if channels > 1 else samples
        if self.seconds is None:
            return mono
        length = round(self.seconds * rate)
        return np.pad(mono[:length], (0, max(length - len(mono), 0)))


def _image(data: bytes | Image, size: int | None) -> np.ndarray:
    from PIL import Image as pillow
    from PIL import ImageOps

    image = pillow.open(io.BytesIO(data)) if isinstance(data, bytes) else data
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits")
    ImageOps.exif_transpose(image, in_place=True)
    upright = image if image.mode == "RGB" else image.convert("RGB")  # which copies, as exif_transpose would
    if size is not None and upright.size != (size, size):
        upright = ImageOps.fit(upright, (size, size), method=pillow.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(upright).transpose(2, 0, 1))


class FileBytes:
    """Fetches records that are files of their own."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self.paths = np.asarray([str(path) for path in paths])  # one block of memory: worker processes share it without copying

    def __call__(self, row: int) -> bytes:
        try:
            return Path(self.paths[row]).read_bytes()
        except OSError as error:
            raise ValueError(f"{self.paths[row]}: {error.strerror}") from None


class ArrowBytes:
    """Fetches records from an Arrow column of bytes, of paths, or of {bytes, path}; paths start from `folder`."""

    def __init__(self, column: pa.ChunkedArray, folder: Path) -> None:
        self.column, self.folder = column, folder

    def __call__(self, row: int) -> bytes:
        value = self.column[row].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
        if isinstance(data, bytes):
            return data
        if isinstance(path, str):
            return FileBytes([self.folder / path])(0)
        raise ValueError("it is empty")
