"""Tokens of one modality, as the small transformers read them: an encoder for each kind, and which one a modality takes."""

from __future__ import annotations

import math
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, pad

from streamcl.errors import ConfigError
from streamcl.stream import Modality

WORDS = 4096  # buckets of the hashed vocabulary
FRAME, STEPS = 256, 8  # samples of one spectrum; steps of time


def encoder(name: str, modality: Modality, width: int, patch: int | None, words: int, reader: str) -> Encoder:
    """What makes tokens of the modality `name`, for the backbone `reader`; an image's patches are a quarter of its side by default."""
    shape, kind = modality.shape, modality.kind
    if kind == "text":
        return Words(words, width)
    if kind == "audio" and len(shape) in (1, 2):
        return Spectrum(width) if len(shape) == 1 else Steps(shape[0], width)
    if (kind == "image" and len(shape) == 3) or (kind == "video" and len(shape) == 4):
        side = min(shape[-2:])
        cut = patch or max(1, side // 4)
        if cut > side:
            raise ConfigError(f"backbone {reader}: patch is {cut}, and {name} has {side} pixels on a side: take fewer")
        return Patches(shape, cut, width)
    if kind == "vector":
        return Whole(math.prod(shape), width)
    raise ConfigError(
        f"backbone {reader}: it cannot read {name} ({kind} of shape {tuple(shape)}): it takes images (channels, height, width), videos "
        "(frames, channels, height, width), waveforms, spectrograms (bands, frames), vectors and texts; name those that it is to read in "
        "modalities"
    )


class Encoder(nn.Module, ABC):
    """Tokens of one modality, and which of them are no padding."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.length, self.norm = length, nn.LayerNorm(width)

    def forward(self, values: Any) -> tuple[Tensor, Tensor]:
        tokens, mask = self.tokens(values)
        return self.norm(tokens), torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask

    @abstractmethod
    def tokens(self, values: Any) -> tuple[Tensor, Tensor | None]:
        """Tokens before their norm, and the mask where there is padding  # (batch, length, width), (batch, length)"""


class Patches(Encoder):
    """Patches of an image; of a video the mean patch of each frame."""

    def __init__(self, shape: Sequence[int], patch: int, width: int) -> None:
        frames = shape[0] if len(shape) == 4 else 0
        super().__init__(frames or (shape[-2] // patch) * (shape[-1] // patch), width)
        self.frames = frames
        self.stem = nn.Sequential(nn.Conv2d(shape[-3], 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.cut = nn.Conv2d(16, width, patch, stride=patch)

    def tokens(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        pictures = values.flatten(0, 1) if self.frames else values
        tokens = self.cut(self.stem(pictures)).flatten(2).transpose(1, 2)  # (pictures, patches, width)
        return (tokens.mean(dim=1).unflatten(0, (-1, self.frames)) if self.frames else tokens), None


class Steps(Encoder):
    """8 steps of a spectrogram."""

    def __init__(self, bands: int, width: int) -> None:
        super().__init__(STEPS, width)
        self.out = nn.Linear(bands, width)

    def tokens(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.out(adaptive_avg_pool1d(values, STEPS).transpose(1, 2)), None


class Spectrum(Steps):
    """8 steps of the logarithm of a waveform's short-time spectrum."""

    window: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(FRAME // 2 + 1, width)
        self.register_buffer("window", torch.hann_window(FRAME), persistent=False)

    def tokens(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        short = FRAME - values.shape[1]
        values = pad(values, (0, short)) if short > 0 else values
        spectrum = torch.stft(values.float(), FRAME, FRAME // 2, window=self.window, return_complex=True).abs()  # (batch, bins, time)
        return super().tokens((spectrum + 1e-3).log())


class Whole(Encoder):
    """A vector as one token."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__(1, width)
        self.out = nn.Linear(values, width)

    def tokens(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.out(values.flatten(1))[:, None], None


class Words(Encoder):
    """The first words of a text by their hash, after one token that begins it."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__(words + 1, width)
        self.words = words
        self.table = nn.Embedding(WORDS + 2, width, padding_idx=0)

    def tokens(self, values: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        rows = torch.tensor([_numbers(text, self.words) for text in values], dtype=torch.int64).to(self.table.weight.device)
        return self.table(rows), rows > 0


@lru_cache(maxsize=65536)
def _numbers(text: str, words: int) -> tuple[int, ...]:
    """1 begins, 0 pads, and a word is from 2 on."""
    found = [2 + zlib.crc32(word.encode()) % WORDS for word in re.findall(r"\w+", text.lower())[:words]]
    return (1, *found, *[0] * (words - len(found)))
