"""ViLT in parts (Kim et al., ICML 2021): how `hf:` reads an image and a text together, and how prompts get in between its layers.

transformers runs its layers in one call, and draws patches at random where images are of different sizes. Here all images have the size
that the model was trained with, so that every patch is taken, in order, and texts are padded to one length; what comes out is what
ViltModel gives, and prompts can join before any layer. Where a model's files have no pooler, the features are the normalised token itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.nn.backbone import numbers, texts
from streamcl.nn.prompts import Embedded, Prefix, Promptable, filled
from streamcl.stream import Batch


class Vilt(Promptable):
    """A loaded ViltModel. The token that is read is the text's first one ([CLS]); it stays where a text is absent.

    `tokens` makes ids and masks of texts; `image` and `text` are the names of the modalities. An absent text is "", an absent image all
    ones after its transforms, as Lee et al. have them.
    """

    def __init__(self, net: Any, tokens: Callable[[list[str]], dict[str, Tensor]], image: str, text: str, length: int) -> None:
        self.net, self.tokens, self.image, self.text = net, tokens, image, text
        self.reads = sorted((image, text))
        self.width, self.depth = net.config.hidden_size, net.config.num_hidden_layers
        self.lengths = {image: net.embeddings.patch_embeddings.num_patches + 1, text: length - 1}

    def embed(self, batch: Batch, here: Tensor) -> Embedded:
        parts, place = self.net.embeddings, {name: here[:, number] for number, name in enumerate(self.reads)}
        given = filled(texts(batch, self.text), place[self.text], "")
        assert isinstance(given, list)
        encoded = self.tokens(given)
        words = parts.text_embeddings(input_ids=encoded["input_ids"]) + parts.token_type_embeddings.weight[0]
        pixels = filled(numbers(batch, self.image), place[self.image], 1.0)
        assert isinstance(pixels, Tensor)
        patches = parts.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        patches = torch.cat([parts.cls_token.expand(len(batch), -1, -1), patches], dim=1)
        patches = parts.dropout(patches + parts.position_embeddings) + parts.token_type_embeddings.weight[1]
        there = encoded["attention_mask"].bool()
        all_of_it = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        return Embedded(words[:, :1], {self.image: patches, self.text: words[:, 1:]}, {self.image: all_of_it, self.text: there[:, 1:]})

    def layer(self, number: int, x: Tensor, mask: Tensor, prefix: Prefix | None) -> Tensor:
        layer = self.net.encoder.layer[number]
        hidden = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)[:, None, None, :]
        if prefix is None:
            return layer(x, hidden)[0]
        attention, normed = layer.attention, layer.layernorm_before(x)  # the same steps, with more keys and values
        inner = attention.attention
        key, value = (
            torch.cat([more.to(x.dtype), make(normed)], dim=1) for more, make in zip(prefix, (inner.key, inner.value), strict=True)
        )
        query, key, value = (
            part.unflatten(2, (inner.num_attention_heads, -1)).transpose(1, 2) for part in (inner.query(normed), key, value)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(inner.attention_head_size) + hidden
        seen = (inner.dropout(scores.softmax(dim=-1)) @ value).transpose(1, 2).flatten(2)
        x = attention.output(seen, normed) + x
        return layer.output(layer.intermediate(layer.layernorm_after(x)), x)

    def finish(self, lead: Tensor) -> Tensor:
        normed = self.net.layernorm(lead)
        return normed if self.net.pooler is None else self.net.pooler(normed[:, None])

    def pooler(self) -> list[nn.Parameter]:
        return [] if self.net.pooler is None else list(self.net.pooler.parameters())

    def projections(self) -> list[nn.Parameter]:
        return list(self.net.embeddings.patch_embeddings.parameters())  # words have a table, no projection
