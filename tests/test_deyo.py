"""DeYO: what destroying the shape of each kind of input means, and which samples are kept by what it does to their answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_tent import batch, convolutions, goes_back_exactly, started
from torch import Tensor, nn

from streamcl.adapting import entropy
from streamcl.errors import ConfigError
from streamcl.stream import Batch, Modality

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}


def destroyed(values: Tensor, kind: str = "image", **options: Any) -> Tensor:
    module = nn.Sequential(nn.Flatten(), nn.LayerNorm(values[0].numel()))
    deyo = started("deyo", module, {"input": Modality(kind, values.shape[1:])}, **options)
    return deyo.destroyed(batch(values)).inputs["input"]


def numbered(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def cut(picture: Tensor, side: int) -> list[list[float]]:
    """The pieces of one picture  # (channels, height, width), sorted"""
    rows, columns = picture.shape[1] // side, picture.shape[2] // side
    return sorted(
        picture[:, r * side : (r + 1) * side, c * side : (c + 1) * side].flatten().tolist() for r in range(rows) for c in range(columns)
    )


def test_patches_are_the_same_ones_in_another_order_drawn_for_each_sample() -> None:
    values = numbered(1, 3, 8, 8).repeat(6, 1, 1, 1)
    found = destroyed(values, patches=4)
    assert all(cut(one, 2) == cut(values[0], 2) for one in found)
    assert not torch.equal(found[0], values[0]) and len({tuple(one.flatten().tolist()) for one in found}) == 6
    assert torch.equal(destroyed(values, patches=1), values)


def test_a_size_that_does_not_divide_is_resized_and_comes_back() -> None:
    found = destroyed(torch.ones(2, 3, 7, 10), patches=4)
    torch.testing.assert_close(found, torch.ones(2, 3, 7, 10))
    tiny = numbered(2, 1, 2, 2)
    assert all(sorted(a.flatten()) == sorted(b.flatten()) for a, b in zip(destroyed(tiny, patches=4), tiny, strict=True)), "one pixel each"


def test_pixels_change_places_in_one_order_for_the_batch() -> None:
    values = numbered(1, 2, 6, 6).repeat(3, 1, 1, 1)
    found = destroyed(values, destroy="pixel")
    assert torch.equal(found[0], found[2]) and not torch.equal(found, values)
    assert torch.equal(found[0, 1], found[0, 0] + 36), "the channels stay together"
    assert sorted(found[0, 0].flatten().tolist()) == list(range(36))


def test_the_middle_half_is_filled_with_the_mean() -> None:
    values = numbered(2, 2, 8, 8)
    found = destroyed(values, destroy="occlude")
    middle = found[:, :, 2:6, 2:6]
    torch.testing.assert_close(middle, values.mean(dim=(2, 3), keepdim=True).expand_as(middle))
    found[:, :, 2:6, 2:6] = values[:, :, 2:6, 2:6]
    assert torch.equal(found, values), "and nothing else; the batch itself is as it was"


def test_frames_of_a_video_are_cut_alike_and_a_wave_along_time() -> None:
    video = numbered(1, 1, 1, 8, 8).repeat(2, 5, 3, 1, 1)
    found = destroyed(video, "video")
    assert all(torch.equal(found[0, 0, 0], found[0, frame, channel]) for frame in range(5) for channel in range(3))
    assert not torch.equal(found, video)
    wave = destroyed(numbered(2, 160), "audio")
    assert all(
        sorted(map(tuple, one.reshape(16, 10).tolist())) == [tuple(range(s, s + 10)) for s in range(b * 160, b * 160 + 160, 10)]
        for b, one in enumerate(wave)
    )
    spectrum = destroyed(numbered(2, 8, 16), "audio", patches=4)
    assert cut(spectrum[1][None], 2) != [] and spectrum.shape == (2, 8, 16)
    assert sorted(spectrum[1].flatten().tolist()) == list(range(128, 256))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64 + 4)
        self.head = nn.Linear(68, 3)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.head(self.norm(torch.cat([image.flatten(1), vector], dim=1)))


def test_of_several_modalities_those_with_places_are_destroyed_or_those_that_are_named() -> None:
    kinds = {"image": Modality("image", (1, 8, 8)), "vector": Modality("vector", (4,))}
    served = Batch({"image": numbered(2, 1, 8, 8), "vector": numbered(2, 4)}, None, torch.arange(2))
    deyo = started("deyo", Both(), kinds, skip=[])
    found = deyo.destroyed(served)
    assert not torch.equal(found.inputs["image"], served.inputs["image"]) and found.inputs["vector"] is served.inputs["vector"]
    with pytest.raises(ConfigError, match=r"modalities names 'vector'.* found image \(image\), vector \(vector\)"):
        started("deyo", Both(), kinds, modalities=["vector"])
    with pytest.raises(ConfigError, match=r"shape of images, videos and sounds.* found input \(vector\)"):
        started("deyo", nn.LayerNorm(4), {"input": Modality("vector", (4,))}, skip=[])


def test_what_nobody_has_described_is_told_by_its_shape_or_by_being_named() -> None:
    deyo = started("deyo", nn.LayerNorm(4), {"wave": Modality("audio", (160,))}, skip=[], modalities=["wave"])
    deyo.kinds = {}
    served = Batch({"wave": numbered(2, 160), "other": numbered(2, 3, 8, 8)}, None, torch.arange(2))
    found = deyo.destroyed(served).inputs
    assert not torch.equal(found["wave"], served.inputs["wave"]) and found["other"] is served.inputs["other"]
    deyo.modalities = None
    found = deyo.destroyed(served).inputs
    assert found["wave"] is served.inputs["wave"] and not torch.equal(found["other"], served.inputs["other"])


def test_with_all_kept_and_no_weights_it_is_tent_on_sure_samples() -> None:
    deyo = started("deyo", convolutions(), tau_p=-2, tau_e=0.9, weighted="none", skip=[], optimizer=SGD)
    by_hand = started("tent", convolutions(), optimizer=SGD)
    by_hand.loss = lambda batch, logits: (found := entropy(logits))[found < 0.9].mean()
    for seed in range(4):
        torch.testing.assert_close(deyo.adapt(batch(seed=seed)).scores, by_hand.adapt(batch(seed=seed)).scores, rtol=1e-4, atol=1e-4)
    assert 0 < deyo.counts["sure"] == deyo.counts["kept"] < 48


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("weighted", ["both", "entropy", "plpd", "none"])
def test_the_loss_is_the_one_worked_out_row_by_row(norm: str, weighted: str) -> None:
    """Occlusion draws nothing, so that it can be done again by hand."""
    deyo = started("deyo", convolutions(norm), destroy="occlude", weighted=weighted, tau_p=0.05, skip=[])
    served, module = batch(size=32), convolutions(norm)
    module.train(norm == "batch")  # by the batch, as torch itself does it
    values = served.inputs["input"].clone()
    logits = module(values)
    values[:, :, 2:6, 2:6] = values.mean(dim=(2, 3), keepdim=True)
    before, after = logits.softmax(dim=1).tolist(), module(values).softmax(dim=1).tolist()
    terms = []
    for p, q in zip(before, after, strict=True):
        h, decision = -sum(x * math.log(x) for x in p), p.index(max(p))
        fall = p[decision] - q[decision]
        if h < 0.5 * math.log(5) and fall > 0.05:
            one, two = math.exp(0.4 * math.log(5) - h), math.exp(fall)
            terms.append({"both": one + two, "entropy": one, "plpd": two, "none": 1.0}[weighted] * h)
    with torch.enable_grad(), deyo.statistics():
        loss = deyo.loss(served, deyo.model(served))
    assert 0 < len(terms) == deyo.counts["kept"] < deyo.counts["sure"] < 32
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-3)


def test_a_batch_of_which_nothing_is_kept_makes_no_step() -> None:
    for options in ({"tau_e": 1e-9}, {"tau_p": 1.0}):
        deyo = started("deyo", convolutions(), **options)
        deyo.adapt(batch())
        assert deyo.counts["kept"] == 0 and deyo.counts["skipped"] == 1
        assert all(torch.equal(deyo.adapted[name], value) for name, value in deyo.source.items())


def test_going_back_is_exact_with_the_orders_that_were_drawn() -> None:
    goes_back_exactly("deyo", optimizer=SGD)
    goes_back_exactly("deyo", lambda: convolutions("group"), optimizer=SGD, destroy="pixel", answer="after")


def test_one_sample_is_enough_where_nothing_needs_a_batch() -> None:
    deyo = started("deyo", convolutions("group"), tau_p=-2, tau_e=10.0)
    assert deyo.adapt(batch(size=1)).scores.shape == (1, 5) and deyo.counts["updates"] == 1
