"""The multimodal transformer: its tokens, what it does with what is absent, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from toy_modalities import INFO, WORDS, batch, every_pattern, transformer

from streamcl.errors import ConfigError
from streamcl.nn.backbones.mlp import Mlp
from streamcl.nn.backbones.multimodal_transformer import MultimodalTransformer
from streamcl.nn.prompts import encode, presence
from streamcl.stream import Batch, Modality, StreamInfo


def test_tokens_are_counted_by_hand() -> None:
    backbone = transformer()
    assert backbone.reads == ["image", "sound", "text"] and backbone.lengths == {"image": 16, "sound": 8, "text": 5} and backbone.dim == 8
    made = backbone.embed(batch(), presence(batch(), backbone.reads))
    assert made.lead.shape == (6, 1, 8) and {n: tuple(t.shape) for n, t in made.tokens.items()} == {
        "image": (6, 16, 8),
        "sound": (6, 8, 8),
        "text": (6, 5, 8),
    }
    assert made.masks["text"].sum(dim=1).tolist() == [4, 4, 4, 4, 2, 5], "one that begins, and the words that there is room for"
    parameters = sum(p.numel() for p in backbone.layers.parameters())
    assert parameters == 3 * (2 * 16 + 4 * (64 + 8) + (8 * 16 + 16) + (16 * 8 + 8))


def test_a_layer_is_what_the_papers_say() -> None:
    backbone = transformer()
    torch.manual_seed(1)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True, True, False, True, False]])
    prefix = (torch.randn(2, 2, 8), torch.randn(2, 2, 8))
    layer = backbone.layers[1]
    for given in (None, prefix):
        normed = layer_norm(x, (8,), layer.first.weight, layer.first.bias)
        q, k, v = layer.query(normed), layer.key(normed), layer.value(normed)
        there = mask if given is None else torch.cat([torch.ones(2, 2, dtype=torch.bool), mask], dim=1)
        if given is not None:
            k, v = torch.cat([given[0], k], dim=1), torch.cat([given[1], v], dim=1)
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            scores = (q[..., part] @ k[..., part].transpose(1, 2) / 2).masked_fill(~there[:, None], -math.inf)
            heads.append(scores.softmax(dim=-1) @ v[..., part])
        middle = x + layer.out(torch.cat(heads, dim=2))
        expected = middle + layer.mlp[2](gelu(layer.mlp[0](layer_norm(middle, (8,), layer.second.weight, layer.second.bias))))
        torch.testing.assert_close(backbone.layer(1, x, there, given), expected)


def test_what_is_absent_reaches_neither_features_nor_gradients() -> None:
    backbone = transformer()
    holed = batch(every_pattern())
    features = backbone(holed)
    assert features.isfinite().all()
    features.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())
    filled = batch()
    filled.present = holed.present
    assert torch.equal(backbone(filled), features), "whatever lies where a value is masked"
    backbone.absent = "drop"
    dropped = backbone(holed)
    assert torch.equal(backbone(filled), dropped) and torch.equal(dropped[0], features[0])
    assert not torch.isclose(dropped[1:], features[1:]).all(dim=1).any(), "a dummy is attended to, and one that is dropped is not"


def test_the_dummies_are_an_image_of_ones_a_text_without_a_word_and_silence() -> None:
    backbone = transformer()
    holed = batch({"image": [0] * 6, "sound": [0] * 6, "text": [0] * 6})
    dummies = Batch({"image": torch.ones(6, 1, 8, 8), "sound": torch.zeros(6, 700), "text": [""] * 6}, None, torch.arange(6))
    assert torch.equal(backbone(holed), backbone(dummies))


def test_padding_and_the_rest_of_the_batch_make_no_difference() -> None:
    backbone = transformer()
    together = backbone(batch())
    for row in range(6):
        torch.testing.assert_close(backbone(batch()[[row]]), together[[row]], atol=1e-6, rtol=1e-5)
    longer = transformer(words=9)
    longer.load_state_dict({**longer.state_dict(), **{n: v for n, v in backbone.state_dict().items() if n != "places.text"}})
    longer.places["text"].data[:5] = backbone.places["text"].data
    torch.testing.assert_close(longer(batch())[:5], together[:5], atol=1e-6, rtol=1e-5)


def test_every_modality_that_it_names_is_read() -> None:
    backbone = transformer()
    before = backbone(batch())
    for name in INFO.modalities:
        changed = batch()
        changed.inputs[name] = list(reversed(WORDS)) if name == "text" else batch(seed=1).inputs[name]
        assert not torch.isclose(backbone(changed), before).all()
    info = StreamInfo({"clip": Modality("video", (3, 1, 8, 8)), "mel": Modality("audio", (12, 9)), "vector": Modality("vector", (5,))})
    other = MultimodalTransformer(width=8, depth=1, heads=2)
    other.build(info)
    assert other.lengths == {"clip": 3, "mel": 8, "vector": 1}
    inputs: dict[str, Any] = {name: torch.rand(2, *m.shape) for name, m in info.modalities.items()}
    assert other(Batch(inputs, None, torch.arange(2))).shape == (2, 8)


def test_without_prompts_it_is_encode_and_it_drops_units_in_training_only() -> None:
    backbone = transformer(dropout=0.5)
    assert torch.equal(backbone(batch()), encode(backbone, batch()))
    backbone.train()
    assert not torch.equal(backbone(batch()), backbone(batch()))


@pytest.mark.parametrize(
    ("options", "info", "message"),
    [
        ({"modalities": ["smell"]}, INFO, "'smell' is no modality of the stream; it has image, sound, text"),
        ({"modalities": []}, INFO, "modalities is empty"),
        ({"width": 9}, INFO, "width 9 is no multiple of heads, 2"),
        ({"patch": 9}, INFO, "patch is 9, and image has 8 pixels on a side"),
        ({}, StreamInfo({"flow": Modality("flow", (2, 2))}), r"it cannot read flow \(flow of shape \(2, 2\)\): it takes images"),
    ],
)
def test_what_it_cannot_read_is_refused(options: dict[str, Any], info: StreamInfo, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultimodalTransformer(**{"width": 8, "depth": 1, "heads": 2, **options}).build(info)


def test_a_backbone_that_takes_no_prompts_says_which_do() -> None:
    with pytest.raises(ConfigError, match="the backbone mlp takes no prompts: take multimodal_transformer"):
        Mlp().transformer()


def pictures(values: Tensor) -> Batch:
    return Batch({"image": values}, None, torch.arange(len(values)))


def test_patches_are_cut_where_they_lie() -> None:
    backbone = transformer(modalities=["image"])
    image = torch.zeros(1, 1, 8, 8)
    changed = image.clone()
    changed[0, 0, 7, 7] = 1  # the last patch; two 3x3 convolutions reach two pixels further
    everything = torch.ones(1, 1, dtype=torch.bool)
    before, after = (backbone.embed(pictures(values), everything).tokens["image"] for values in (image, changed))
    assert (before != after).any(dim=2)[0].nonzero().flatten().tolist() == [10, 11, 14, 15]
