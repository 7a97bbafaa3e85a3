"""A small encoder for each modality of the stream, and their features side by side: late fusion, trained from scratch.

Images (and log-mel pictures of sounds) go through two convolutions, every frame of a video through the same, sounds through the
logarithm of their short-time spectrum, vectors through a linear layer, and texts through hashed words whose embeddings are averaged.
Where a sample lacks a modality a learned vector stands in for it, so that nothing of what is masked is read. Where the target is a mask
there are features for every pixel: images keep their size (convolutions at full size, a half, a quarter and an eighth, brought together),
and what is no image says the same of each pixel. For tests, small streams and the checks of multimodal methods; no weights, no licence.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, interpolate, max_pool2d

from streamcl.errors import ConfigError
from streamcl.nn.backbone import Backbone, Part, choose_modalities
from streamcl.options import PositiveInt
from streamcl.stream import Batch, Column, Modality, StreamInfo

WORDS = 4096  # buckets of the hashed vocabulary
FRAME, BINS = 256, 16  # samples of one spectrum; steps of time that are kept


class Fusion(Backbone):
    """`width` features of each of `modalities` (all that the stream has), one after another."""

    def __init__(self, *, width: PositiveInt = 64, modalities: list[str] | None = None) -> None:
        super().__init__()
        self.width, self.modalities = width, modalities

    def build(self, info: StreamInfo) -> None:
        self.reads = choose_modalities(info, self.modalities, "fusion")
        self.grid: tuple[int, ...] | None = None  # height and width of the masks
        if info.target == "mask":
            sizes = sorted({info.modalities[name].shape[-2:] for name in self.reads if info.modalities[name].kind == "image"})
            if len(sizes) != 1:
                told = " and ".join(" x ".join(map(str, size)) for size in sizes) or "no image"
                raise ConfigError(f"backbone fusion: masks need images of one size, and what it reads has {told}: set modalities")
            self.grid = sizes[0]
        self.encoders = nn.ModuleDict({name: _encoder(info.modalities[name], self.width, self.grid is not None) for name in self.reads})
        self.absent = nn.ParameterDict({name: nn.Parameter(torch.zeros(self.width)) for name in self.reads})
        self.dim = self.width * len(self.reads)

    def forward(self, batch: Batch) -> Tensor:
        return torch.cat(list(self.by_modality(batch).values()), dim=1)

    def by_modality(self, batch: Batch) -> dict[str, Tensor]:
        """The features of each modality  # (batch, width), or (batch, width, height, width of the masks)"""
        return {name: self._encoded(batch, name) for name in self.reads}

    def fused(self) -> dict[str, Part]:
        return {
            name: Part(slice(place * self.width, (place + 1) * self.width), (*self.encoders[name].parameters(), self.absent[name]))
            for place, name in enumerate(self.reads)
        }

    def _encoded(self, batch: Batch, name: str) -> Tensor:
        values, here = batch.inputs[name], (batch.present or {}).get(name)
        encoder, absent = self.encoders[name], self.absent[name]
        if here is None or bool(here.all()):
            return self._spread(encoder(values))
        rows = here.nonzero().squeeze(1)
        features = self._spread(absent.expand(len(batch), -1))
        if not len(rows):
            return features.clone()
        given: Column = [values[place] for place in rows.tolist()] if isinstance(values, list) else values[rows]
        encoded = self._spread(encoder(given))
        return features.to(encoded.dtype).index_copy(0, rows, encoded)

    def _spread(self, features: Tensor) -> Tensor:
        """The same of every pixel, where there is one vector and pixels are asked for."""
        return features if self.grid is None or features.dim() == 4 else features[:, :, None, None].expand(-1, -1, *self.grid)


def _encoder(modality: Modality, width: int, dense: bool = False) -> nn.Module:
    shape = modality.shape
    if dense and modality.kind == "image":
        return _Pixels(shape[0] if len(shape) == 3 else 1, width)
    if modality.kind == "text":
        return _Words(width)
    if modality.kind == "audio" and len(shape) == 1:
        return _Spectrum(width)
    if modality.kind == "video":
        return _Pictures(shape[1], width)
    if modality.kind in ("image", "audio") and len(shape) in (2, 3):
        return _Pictures(shape[0] if len(shape) == 3 else 1, width)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU())


class _Pictures(nn.Module):
    """Two convolutions, pooled to 4 x 4 places; of a video the mean over its frames."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.first, self.second = nn.Conv2d(channels, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.out = nn.Linear(32 * 16, width)

    def forward(self, values: Tensor) -> Tensor:
        frames = values.shape[1] if values.dim() == 5 else 0
        pictures = values.flatten(0, 1) if frames else values
        if pictures.dim() == 3:
            pictures = pictures[:, None]
        hidden = self.first(pictures).relu()
        if min(hidden.shape[-2:]) >= 16:
            hidden = max_pool2d(hidden, 2)
        hidden = adaptive_avg_pool2d(self.second(hidden).relu(), 4).flatten(1)
        features = self.out(hidden).relu()
        return features.unflatten(0, (-1, frames)).mean(1) if frames else features


class _Pixels(nn.Module):
    """Features of every pixel, from its surroundings at four sizes."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(before, 16, 3, padding=1) for before in (channels, 16, 16, 16))
        self.out = nn.Conv2d(16 * len(self.levels), width, 1)

    def forward(self, values: Tensor) -> Tensor:
        hidden = values[:, None] if values.dim() == 3 else values
        size, found = hidden.shape[-2:], []
        for number, level in enumerate(self.levels):
            if number and min(hidden.shape[-2:]) > 1:
                hidden = max_pool2d(hidden, 2)
            hidden = level(hidden).relu()
            found.append(interpolate(hidden, size, mode="bilinear", align_corners=False) if number else hidden)
        return self.out(torch.cat(found, dim=1)).relu()


class _Spectrum(nn.Module):
    """The logarithm of the short-time spectrum at 16 steps of time."""

    window: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(FRAME), persistent=False)
        self.out = nn.Sequential(nn.Linear((FRAME // 2 + 1) * BINS, width), nn.ReLU())

    def forward(self, values: Tensor) -> Tensor:
        short = FRAME - values.shape[1]
        values = nn.functional.pad(values, (0, short)) if short > 0 else values
        spectrum = torch.stft(values.float(), FRAME, FRAME // 2, window=self.window, return_complex=True).abs()  # (batch, bins, time)
        return self.out(adaptive_avg_pool1d((spectrum + 1e-3).log(), BINS).flatten(1))


class _Words(nn.Module):
    """The mean of the embeddings of the words, which are told apart by a hash."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(WORDS, width, mode="mean")
        self.out = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, values: Sequence[str]) -> Tensor:
        rows = [_numbers(text) for text in values]
        device = self.table.weight.device
        flat = torch.tensor([number for row in rows for number in row], dtype=torch.int64, device=device)
        starts = torch.tensor([0] + [len(row) for row in rows[:-1]], device=device).cumsum(0)
        return self.out(self.table(flat, starts))


@lru_cache(maxsize=65536)
def _numbers(text: str) -> tuple[int, ...]:
    return tuple(zlib.crc32(word.encode()) % WORDS for word in re.findall(r"\w+", text.lower()))
