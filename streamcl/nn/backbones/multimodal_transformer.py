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

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from streamcl.errors import ConfigError
from streamcl.nn.backbone import Backbone, choose_modalities
from streamcl.nn.prompts import Embedded, Prefix, Promptable, encode, filled
from streamcl.nn.tokens import encoder
from streamcl.options import Fraction, PositiveInt
from streamcl.stream import Batch, StreamInfo

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
        self.encoders = nn.ModuleDict(
            {
                name: encoder(name, info.modalities[name], self.width, self.patch, self.words, "multimodal_transformer")
                for name in self.reads
            }
        )
        self.lengths = {name: int(encoder.length) for name, encoder in self.encoders.items()}  # type: ignore[arg-type]
        self.places = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(self.lengths[name], width)) for name in self.reads})
        self.kind = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(width)) for name in self.reads})
        self.lead = nn.Parameter(0.02 * torch.randn(width))
        self.layers = nn.ModuleList(_Layer(width, self.heads, self.dropout) for _ in range(self.depth))
        self.norm, self.pool = nn.LayerNorm(width), nn.Linear(width, width)
        self.dim = width

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
