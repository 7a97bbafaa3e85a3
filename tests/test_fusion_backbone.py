"""The fusion backbone: features side by side, and nothing of an absent value in them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.nn.backbones.fusion import Fusion
from streamcl.nn.model import GrowingHead
from streamcl.stream import Batch, Modality, StreamInfo

MODALITIES = {
    "clip": Modality("video", (3, 3, 8, 8)),
    "image": Modality("image", (3, 20, 20)),
    "mel": Modality("audio", (16, 12)),
    "sound": Modality("audio", (700,)),
    "text": Modality("text"),
    "vector": Modality("vector", (5,)),
}
WORDS = ["a red circle", "Look at it!", "one two three", "circle red a"]


def built(target: str = "class", **options: Any) -> Fusion:
    torch.manual_seed(0)
    backbone = Fusion(width=6, **options)
    backbone.build(StreamInfo(MODALITIES, target=target))
    with torch.no_grad():
        for name, parameter in backbone.absent.items():
            parameter.copy_(torch.randn(6, generator=torch.Generator().manual_seed(len(name))))
    return backbone


def batch(present: dict[str, Tensor] | None = None, seed: int = 0) -> Batch:
    """Four samples, with every absent value as the scenarios leave it."""
    draw = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {name: torch.randn(4, *m.shape, generator=draw) for name, m in MODALITIES.items() if m.kind != "text"}
    inputs["text"] = list(WORDS)
    for name, there in (present or {}).items():
        if name == "text":
            inputs[name] = [text if here else "" for text, here in zip(WORDS, there.tolist(), strict=True)]
        else:
            inputs[name][~there] = math.nan
    return Batch(inputs, torch.zeros(4, dtype=torch.int64), torch.arange(4), present)


def gradients(backbone: Fusion, features: Tensor) -> dict[str, Tensor | None]:
    backbone.zero_grad(set_to_none=True)
    features.square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in backbone.named_parameters()}


def test_the_features_of_each_modality_stand_side_by_side() -> None:
    backbone = built()
    features = backbone(batch())
    assert backbone.dim == 36 and features.shape == (4, 36) and features.isfinite().all()
    parts = backbone.by_modality(batch())
    assert list(parts) == sorted(MODALITIES) and torch.equal(torch.cat(list(parts.values()), dim=1), features)


@pytest.mark.parametrize("name", sorted(MODALITIES))
def test_a_sample_s_features_do_not_depend_on_the_others_nor_on_other_modalities(name: str) -> None:
    backbone = built()
    both = backbone.by_modality(batch())
    alone = backbone.by_modality(batch()[2:3])
    assert torch.allclose(both[name][2:3], alone[name], atol=1e-6)
    changed = backbone.by_modality(batch(seed=1))
    assert name == "text" or not torch.allclose(both[name], changed[name]), "what is present is read"


@pytest.mark.parametrize("name", sorted(MODALITIES))
def test_what_is_absent_reaches_neither_features_nor_gradients(name: str) -> None:
    backbone = built()
    there = torch.tensor([True, False, True, False])
    holed = batch({name: there})
    features = backbone(holed)
    assert features.isfinite().all()
    parts = backbone.by_modality(holed)
    assert torch.equal(parts[name][~there], backbone.absent[name].expand(2, 6)), "a learned vector stands in"
    assert torch.allclose(parts[name][there], backbone.by_modality(batch()[there.nonzero().squeeze(1)])[name], atol=1e-6)
    for other in set(MODALITIES) - {name}:
        assert torch.equal(parts[other], backbone.by_modality(batch())[other])
    found = gradients(backbone, backbone(holed))
    assert all(gradient is None or gradient.isfinite().all() for gradient in found.values())
    stand_in = found[f"absent.{name}"]
    assert stand_in is not None and torch.allclose(stand_in, 4 * backbone.absent[name]), "of two samples, each 2 a"

    filled = batch()
    if name == "text":
        filled.inputs[name] = [text if here else "anything else" for text, here in zip(WORDS, there.tolist(), strict=True)]
    else:
        values = filled.inputs[name]
        assert isinstance(values, Tensor)
        values[~there] = 1e6
    filled.present = {name: there}
    assert torch.equal(backbone(filled), features), "whatever lies where a value is masked"
    again = gradients(backbone, backbone(filled))
    assert all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(found.values(), again.values(), strict=True)
    )


def test_a_batch_of_absent_values_alone_gives_the_vectors_that_stand_in() -> None:
    backbone = built()
    none = torch.zeros(4, dtype=torch.bool)
    features = backbone(batch(dict.fromkeys(MODALITIES, none)))
    assert torch.equal(features, torch.cat([backbone.absent[name] for name in sorted(MODALITIES)]).expand(4, -1))
    found = gradients(backbone, features)
    for name, parameter in backbone.named_parameters():
        gradient = found[name]
        if name.startswith("absent."):
            assert gradient is not None and torch.allclose(gradient, 8 * parameter)
        else:
            assert gradient is None or not gradient.any(), "no encoder learns from nothing"


def test_an_absent_vector_starts_as_nothing_and_a_batch_that_lacks_nothing_does_not_touch_it() -> None:
    backbone = Fusion(width=3)
    backbone.build(StreamInfo(MODALITIES))
    assert all(not parameter.any() for parameter in backbone.absent.values())
    everything = dict.fromkeys(MODALITIES, torch.ones(4, dtype=torch.bool))
    assert torch.equal(backbone(batch(everything)), backbone(batch()))
    assert all(g is None for name, g in gradients(backbone, backbone(batch())).items() if name.startswith("absent."))


def test_words_count_by_case_and_order_no_more_than_they_should() -> None:
    backbone = built(modalities=["text"])
    texts = ["a red circle", "circle red a", "A RED, circle!", "a blue circle", "", "..."]
    features = backbone(Batch({"text": texts}, None, torch.arange(6)))
    assert torch.allclose(features[0], features[1], atol=1e-6) and torch.allclose(features[0], features[2], atol=1e-6)
    assert not torch.allclose(features[0], features[3]) and torch.equal(features[4], features[5])
    assert torch.equal(backbone(Batch({"text": [""]}, None, torch.arange(1))), features[4:5]), "a text without a word is read too"


def test_a_video_is_the_mean_of_its_frames_and_a_short_sound_is_padded() -> None:
    backbone = built(modalities=["clip", "sound"])
    still = torch.randn(1, 1, 3, 8, 8).expand(2, 3, 3, 8, 8)
    sound = torch.zeros(2, 700)
    parts = backbone.by_modality(Batch({"clip": still, "sound": sound}, None, torch.arange(2)))
    once = backbone.by_modality(Batch({"clip": still[:, :1], "sound": sound[:, :100]}, None, torch.arange(2)))
    assert torch.allclose(parts["clip"], once["clip"], atol=1e-6) and once["sound"].isfinite().all()


def test_some_modalities_may_be_chosen_and_each_is_read_once() -> None:
    backbone = built(modalities=["vector", "image", "vector"])
    assert backbone.dim == 12 and backbone(batch()).shape == (4, 12)


@pytest.mark.parametrize(
    ("modalities", "message"), [(["smell"], "'smell' is no modality of the stream; it has clip, image"), ([], "modalities is empty")]
)
def test_modalities_that_cannot_be_read_are_refused(modalities: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(modalities=modalities)


@pytest.mark.parametrize("target", ["class", "mask"])
def test_each_modality_s_columns_depend_on_its_own_parameters_and_on_no_other_s(target: str) -> None:
    backbone = built(target)
    features = backbone(batch({"clip": torch.tensor([True, False, True, True])}))
    parts = backbone.fused()
    assert sum(len(part.parameters) for part in parts.values()) == len(list(backbone.parameters()))
    owner = {id(parameter): name for name, part in parts.items() for parameter in part.parameters}
    for name, part in parts.items():
        backbone.zero_grad(set_to_none=True)
        features[:, part.columns].square().sum().backward(retain_graph=True)
        assert {owner[id(p)] for p in backbone.parameters() if p.grad is not None and bool(p.grad.any())} == {name}


def test_for_masks_there_are_features_and_logits_of_every_pixel() -> None:
    backbone = built("mask")
    there = torch.tensor([True, False, True, False])
    features = backbone(batch({"image": there, "text": there}))
    assert features.shape == (4, 36, 20, 20)
    columns = {name: part.columns for name, part in backbone.fused().items()}
    said, seen = features[:, columns["text"]], features[:, columns["image"]]
    assert torch.equal(said, said[:, :, :1, :1].expand_as(said)) and not torch.equal(seen[0, :, 0, 0], seen[0, :, 9, 9])
    assert torch.equal(seen[1], backbone.absent["image"][:, None, None].expand(6, 20, 20)), "a learned vector stands in for each pixel"
    head = GrowingHead(36, 3)
    assert torch.allclose(head(features)[:, :, 4, 7], head(features[:, :, 4, 7]), atol=1e-6) and head(features).shape == (4, 3, 20, 20)


def test_masks_need_images_of_one_size() -> None:
    with pytest.raises(ConfigError, match="masks need images of one size, and what it reads has no image"):
        built("mask", modalities=["text"])
