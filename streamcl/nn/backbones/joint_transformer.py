"""A small transformer for each modality, and one over the tokens of all of them: what test-time adaptation of several modalities is about.

The form is that of CAV-MAE fine-tuned (Gong et al., ICLR 2023), which READ and SuMi adapt, made small: tokens of each modality with an
embedding of their place, `depth` blocks of its own, then `joint` blocks over all tokens, the mean over the tokens and a LayerNorm. Blocks
normalise first; attention has q, k and v in one linear layer (`qkv`). In the joint blocks every modality has its own norms, in complete
samples as in incomplete ones: in CAV-MAE these are for samples of one modality alone, and a network that is trained on complete samples
would leave them as they began. How values become tokens is as in multimodal_transformer. No weights, no licence.

What is absent is never read, and its tokens are zeros after its own blocks. By default nothing attends to them and they are not in the
mean, so that what is absent does not dilute what is there; `absent: zeros` attends to them and has them in the mean, as SuMi's released
passes of one modality do. A sample of which nothing is there has zeros for all of its tokens.

`dropout` is on the tokens, on what attention and the MLP add, and within the MLP: CASP's contrast lives on it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from streamcl.errors import ConfigError
from streamcl.nn.backbone import Backbone, choose_modalities
from streamcl.nn.prompts import filled
from streamcl.nn.tokens import Words, encoder
from streamcl.options import Fraction, PositiveInt
from streamcl.stream import Batch, StreamInfo


class JointTransformer(Backbone):
    """`depth` blocks of `width` in `heads` heads for each of `modalities` (all that the stream has), then `joint` blocks over all."""

    def __init__(
        self,
        *,
        width: PositiveInt = 32,
        depth: PositiveInt = 2,
        joint: PositiveInt = 1,
        heads: PositiveInt = 4,
        patch: PositiveInt | None = None,
        words: PositiveInt = 12,
        dropout: Fraction = 0.0,
        absent: Literal["hidden", "zeros"] = "hidden",
        modalities: list[str] | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"backbone joint_transformer: width {width} is no multiple of heads, {heads}")
        self.width, self.depth, self.shared, self.heads, self.patch, self.words = width, depth, joint, heads, patch, words
        self.dropout, self.absent, self.modalities = dropout, absent, modalities

    def build(self, info: StreamInfo) -> None:
        self.reads = choose_modalities(info, self.modalities, "joint_transformer")
        width = self.width
        self.encoders = nn.ModuleDict(
            {name: encoder(name, info.modalities[name], self.width, self.patch, self.words, "joint_transformer") for name in self.reads}
        )
        self.lengths = {name: int(encoder.length) for name, encoder in self.encoders.items()}  # type: ignore[arg-type]
        self.places = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(self.lengths[name], width)) for name in self.reads})
        self.blocks = nn.ModuleDict(
            {
                name: nn.ModuleList(_Block(width, self.heads, self.dropout, {name: self.lengths[name]}) for _ in range(self.depth))
                for name in self.reads
            }
        )
        self.joint_blocks = nn.ModuleList(_Block(width, self.heads, self.dropout, self.lengths) for _ in range(self.shared))
        self.norm, self.drop, self.dim = nn.LayerNorm(width), nn.Dropout(self.dropout), width

    def joint(self) -> list[nn.Module]:
        """The attention over the tokens of all modalities, each with its q, k and v in one linear layer called `qkv`."""
        return [block.attention for block in self.joint_blocks]  # type: ignore[misc]

    def forward(self, batch: Batch) -> Tensor:
        tokens, masks = self._encoded(batch)
        x, seen = torch.cat(list(tokens.values()), dim=1), torch.cat(list(masks.values()), dim=1)  # (batch, tokens, width), (batch, tokens)
        attended = seen | ~seen.any(dim=1, keepdim=True)
        for block in self.joint_blocks:
            x = block(x, attended)
        share = seen / seen.sum(dim=1, keepdim=True).clamp(min=1)
        return self.norm((share[:, :, None] * x).sum(dim=1))

    def by_modality(self, batch: Batch) -> dict[str, Tensor]:
        """The tokens of each modality after its own blocks, zeros where it is absent  # (batch, tokens, width)"""
        return self._encoded(batch)[0]

    def _encoded(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tokens of each modality before they come together, and which of them are attended to  # (batch, tokens)"""
        tokens, masks = {}, {}
        for name in self.reads:
            here = (batch.present or {}).get(name)
            values = batch.inputs[name] if here is None else filled(batch.inputs[name], here, "" if self._is_text(name) else 0.0)
            x, mask = self.encoders[name](values)
            x = self.drop(x + self.places[name])
            for block in self.blocks[name]:  # type: ignore[attr-defined]
                x = block(x, mask)
            there = mask if here is None else mask & here[:, None]
            tokens[name] = x * there[:, :, None]
            masks[name] = there if self.absent == "hidden" or here is None else mask
        return tokens, masks

    def _is_text(self, name: str) -> bool:
        return isinstance(self.encoders[name], Words)


class _Block(nn.Module):
    """Attention and an MLP of twice the width, over tokens of one or more modalities with norms of their own."""

    def __init__(self, width: int, heads: int, dropout: float, lengths: dict[str, int]) -> None:
        super().__init__()
        self.lengths = list(lengths.values())
        self.first, self.second = (nn.ModuleDict({name: nn.LayerNorm(width) for name in lengths}) for _ in range(2))
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self._normed(self.first, x), mask))
        return x + self.drop(self.mlp(self._normed(self.second, x)))

    def _normed(self, norms: nn.ModuleDict, x: Tensor) -> Tensor:
        return torch.cat([norm(part) for norm, part in zip(norms.values(), x.split(self.lengths, dim=1), strict=True)], dim=1)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, width / heads)
        seen = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        return self.out(seen.transpose(1, 2).flatten(2))
