"""A small transformer over the tokens of all modalities of the stream, that takes prompts; to be trained once by `model.pretrain`.

One sequence: a class token, then the tokens of each modality with an embedding of their place and of their modality added. An image is cut
into patches (those of a 3x3 convolution, a quarter of the side each unless `patch` says otherwise), a video has a token for each frame; a
waveform is 8 steps of the logarithm of its short-time spectrum, a log-mel picture 8 steps of its frames; a text is its first words by a
hash, with one token that begins it; a vector is one token. Layers normalise first (pre-norm), as in ViLT (Kim et al., ICML 2021), whose
form this follows: attention, then an MLP of twice the width; after the last one a norm, and the class token through a linear layer and
tanh (the pooler). No weights, no licence.

What is absent is read by nothing: a dummy stands in, an image of ones, a text without a word, zeros (`streamcl/nn/prompts.py`). `absent:
drop` hides the dummy's tokens from the others.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, pad, scaled_dot_product_attention

from streamcl.errors import ConfigError
from streamcl.nn.backbone import Backbone, choose_modalities
from streamcl.nn.prompts import Embedded, Prefix, Promptable, encode, filled
from streamcl.options import Fraction, PositiveInt
from streamcl.stream import Batch, Modality, StreamInfo

WORDS = 4096  # buckets of the hashed vocabulary
FRAME, STEPS = 256, 8  # samples of one spectrum; steps of time
DUMMIES: dict[str, float | str] = {"image": 1.0, "video": 1.0, "text": ""}  # of the others 0


class MultimodalTransformer(Backbone, Promptable):
    """`depth` layers of `width` in `heads` heads over `modalities` (all that the stream has)."""

    def __init__(
        self,
        *,
        width: PositiveInt = 64,
        depth: PositiveInt = 6,
        heads: PositiveInt = 4,
        patch: PositiveInt | None = None,
        words: PositiveInt = 10,
        dropout: Fraction = 0.0,
        absent: Literal["dummy", "drop"] = "dummy",
        modalities: list[str] | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"backbone multimodal_transformer: width {width} is no multiple of heads, {heads}")
        self.width, self.depth, self.heads, self.patch, self.words = width, depth, heads, patch, words
        self.dropout, self.absent, self.modalities = dropout, absent, modalities

    def build(self, info: StreamInfo) -> None:
        self.reads = choose_modalities(info, self.modalities, "multimodal_transformer")
        width = self.width
        self.kinds = {name: info.modalities[name].kind for name in self.reads}
        self.encoders = nn.ModuleDict({name: self._encoder(name, info.modalities[name]) for name in self.reads})
        self.lengths = {name: int(encoder.length) for name, encoder in self.encoders.items()}  # type: ignore[arg-type]
        self.places = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(self.lengths[name], width)) for name in self.reads})
        self.kind = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(width)) for name in self.reads})
        self.lead = nn.Parameter(0.02 * torch.randn(width))
        self.layers = nn.ModuleList(_Layer(width, self.heads, self.dropout) for _ in range(self.depth))
        self.norm, self.pool = nn.LayerNorm(width), nn.Linear(width, width)
        self.dim = width

    def _encoder(self, name: str, modality: Modality) -> nn.Module:
        shape = modality.shape
        if modality.kind == "text":
            return _Words(self.words, self.width)
        if modality.kind == "audio" and len(shape) == 1:
            return _Spectrum(self.width)
        if modality.kind == "audio" and len(shape) == 2:
            return _Steps(shape[0], self.width)
        if modality.kind in ("image", "video") and len(shape) == (3 if modality.kind == "image" else 4):
            side = min(shape[-2:])
            patch = self.patch or max(1, side // 4)
            if patch > side:
                raise ConfigError(f"backbone multimodal_transformer: patch is {patch}, and {name} has {side} pixels on a side: take fewer")
            return _Patches(shape, patch, self.width)
        if modality.kind == "vector":
            return _Whole(math.prod(shape), self.width)
        raise ConfigError(
            f"backbone multimodal_transformer: it cannot read {name} ({modality.kind} of shape {tuple(shape)}): it takes images (channels, "
            "height, width), videos (frames, channels, height, width), waveforms, spectrograms (bands, frames), vectors and texts; name "
            "those that it is to read in modalities"
        )

    def transformer(self) -> Promptable:
        return self

    def forward(self, batch: Batch) -> Tensor:
        return encode(self, batch)

    def embed(self, batch: Batch, here: Tensor) -> Embedded:
        tokens, masks = {}, {}
        for place, name in enumerate(self.reads):
            values = filled(batch.inputs[name], here[:, place], DUMMIES.get(self.kinds[name], 0.0))
            made, masks[name] = self.encoders[name](values)
            tokens[name] = made + self.places[name] + self.kind[name]
        return Embedded(self.lead.expand(len(batch), 1, -1), tokens, masks)

    def layer(self, number: int, x: Tensor, mask: Tensor, prefix: Prefix | None) -> Tensor:
        return self.layers[number](x, mask, prefix)

    def finish(self, lead: Tensor) -> Tensor:
        return self.pool(self.norm(lead)).tanh()

    def pooler(self) -> list[nn.Parameter]:
        return list(self.pool.parameters())

    def projections(self) -> list[nn.Parameter]:
        return list(self.encoders.parameters())


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, prefix: Prefix | None) -> Tensor:
        normed = self.first(x)
        query, key, value = self.query(normed), self.key(normed), self.value(normed)
        if prefix is not None:
            key, value = torch.cat([prefix[0].to(key.dtype), key], dim=1), torch.cat([prefix[1].to(value.dtype), value], dim=1)
        parts = [
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        ]  # (batch, heads, tokens, width / heads)
        seen = scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=mask[:, None, None, :])
        x = x + self.drop(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.second(x)))


class _Encoder(nn.Module):
    """Tokens of one modality, and which of them are no padding."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.length, self.norm = length, nn.LayerNorm(width)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm(self.tokens(values))
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def tokens(self, values: Tensor) -> Tensor:
        raise NotImplementedError


class _Patches(_Encoder):
    """Patches of an image; of a video the mean patch of each frame."""

    def __init__(self, shape: Sequence[int], patch: int, width: int) -> None:
        frames = shape[0] if len(shape) == 4 else 0
        super().__init__(frames or (shape[-2] // patch) * (shape[-1] // patch), width)
        self.frames = frames
        self.stem = nn.Sequential(nn.Conv2d(shape[-3], 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.cut = nn.Conv2d(16, width, patch, stride=patch)

    def tokens(self, values: Tensor) -> Tensor:
        pictures = values.flatten(0, 1) if self.frames else values
        tokens = self.cut(self.stem(pictures)).flatten(2).transpose(1, 2)  # (pictures, patches, width)
        return tokens.mean(dim=1).unflatten(0, (-1, self.frames)) if self.frames else tokens


class _Steps(_Encoder):
    """8 steps of a spectrogram."""

    def __init__(self, bands: int, width: int) -> None:
        super().__init__(STEPS, width)
        self.out = nn.Linear(bands, width)

    def tokens(self, values: Tensor) -> Tensor:
        return self.out(adaptive_avg_pool1d(values, STEPS).transpose(1, 2))


class _Spectrum(_Steps):
    """8 steps of the logarithm of a waveform's short-time spectrum."""

    window: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(FRAME // 2 + 1, width)
        self.register_buffer("window", torch.hann_window(FRAME), persistent=False)

    def tokens(self, values: Tensor) -> Tensor:
        short = FRAME - values.shape[1]
        values = pad(values, (0, short)) if short > 0 else values
        spectrum = torch.stft(values.float(), FRAME, FRAME // 2, window=self.window, return_complex=True).abs()  # (batch, bins, time)
        return super().tokens((spectrum + 1e-3).log())


class _Whole(_Encoder):
    """A vector as one token."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__(1, width)
        self.out = nn.Linear(values, width)

    def tokens(self, values: Tensor) -> Tensor:
        return self.out(values.flatten(1))[:, None]


class _Words(_Encoder):
    """The first words of a text by their hash, after one token that begins it."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__(words + 1, width)
        self.words = words
        self.table = nn.Embedding(WORDS + 2, width, padding_idx=0)

    def forward(self, values: Sequence[str]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows = torch.tensor([_numbers(text, self.words) for text in values], dtype=torch.int64).to(self.table.weight.device)
        return self.norm(self.table(rows)), rows > 0


@lru_cache(maxsize=65536)
def _numbers(text: str, words: int) -> tuple[int, ...]:
    """1 begins, 0 pads, and a word is from 2 on."""
    found = [2 + zlib.crc32(word.encode()) % WORDS for word in re.findall(r"\w+", text.lower())[:words]]
    return (1, *found, *[0] * (words - len(found)))
