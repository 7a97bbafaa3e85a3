"""MEMO of test-time adaptation: its loss, that each sample is alone, that everything is forgotten, and its random views."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from streamcl.strategies.test_time import _augmenting
from streamcl.strategies.test_time._augmenting import augmix
from streamcl.strategies.test_time.marginal_entropy import MarginalEntropy, marginal_entropy
from test_lame import CLASSES, answers, deployed, goes_back_exactly, learns_nothing_from_predicting, same, served, small_model
from torch import Tensor

from streamcl.adapting import entropy
from streamcl.errors import ConfigError
from streamcl.options import Optimizer
from streamcl.stream import Batch, Modality, StreamInfo


def test_the_loss_is_the_entropy_of_the_mean_prediction() -> None:
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    mean = logits.softmax(1).mean(0)
    assert marginal_entropy(logits).item() == pytest.approx(-(mean * mean.log()).sum().item(), abs=1e-12)
    assert marginal_entropy(logits[:1].expand(9, -1)).item() == pytest.approx(entropy(logits[:1]).item(), abs=1e-12)
    assert marginal_entropy(torch.tensor([[1e4, -1e4], [1e4, -1e4]])).item() == 0.0


def test_one_step_is_the_papers_by_hand() -> None:
    memo = deployed(MarginalEntropy(views=6, optimizer=Optimizer(name="sgd", lr=0.05)), model=small_model(norm="group"))
    sample, drawn = served(1), torch.Generator()
    drawn.set_state(memo.context.generator.get_state())
    answered = answers(memo, [sample])[0]
    model = small_model(norm="group")
    views = augmix(cast(Tensor, sample.inputs["image"]).expand(6, -1, -1, -1), drawn)
    p = model(sample[[0] * 6].replace(inputs={"image": views})).softmax(1).mean(0)
    values = list(model.parameters())
    gradients = torch.autograd.grad(-(p * p.log()).sum(), values)
    with torch.no_grad():
        for value, gradient in zip(values, gradients, strict=True):
            value.sub_(gradient, alpha=0.05)
    assert torch.allclose(answered, model(sample), atol=1e-5)
    assert not torch.allclose(answered, memo.predict(sample).scores, atol=1e-3), "the step did something"


def test_each_sample_is_answered_as_if_it_had_come_alone_and_all_is_forgotten() -> None:
    batch = served(4)
    momentum = Optimizer(name="sgd", lr=0.05, momentum=0.9)
    together, apart = (deployed(MarginalEntropy(views=4, steps=2, optimizer=momentum)) for _ in range(2))
    one = answers(together, [batch])[0]
    other = torch.cat(answers(apart, [batch[i : i + 1] for i in range(4)]))
    assert torch.equal(one, other)
    assert all(torch.equal(value, together.source[name]) for name, value in together.adapted.items())
    assert torch.equal(together.predict(batch).scores, torch.cat([apart.predict(batch[i : i + 1]).scores for i in range(4)]))
    assert not together.optimizer.state and together.counts == {"updates": 8}


def test_under_autocast_too_every_sample_begins_with_the_sources_weights() -> None:
    """Autocast keeps a cast of each weight: what is forgotten must not answer for the next sample."""
    batch, optimizer = served(2), Optimizer(name="sgd", lr=0.5)
    together, apart = (deployed(MarginalEntropy(views=4, optimizer=optimizer), model=small_model(norm="group")) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        at_once = answers(together, [batch])
    alone = []
    for sample in (batch[:1], batch[1:]):
        with torch.autocast("cpu", torch.bfloat16):
            alone += answers(apart, [sample])
    assert torch.equal(at_once[0], torch.cat(alone)) and not torch.equal(alone[0], apart.predict(batch[:1]).scores)


def test_batch_normalisation_mixes_in_the_sample() -> None:
    memo = deployed(MarginalEntropy(prior=3.0))
    torch.manual_seed(0)
    layer = next(iter(memo.layers.values()))
    x = torch.randn(1, layer.num_features, 4, 4)
    with memo.statistics():
        y = layer(x)
    mean = 0.75 * layer.running_mean + 0.25 * x.mean((0, 2, 3))
    variance = 0.75 * layer.running_var + 0.25 * x.var((0, 2, 3), unbiased=False)
    by_hand = (x - mean[:, None, None]) / (variance[:, None, None] + layer.eps).sqrt()
    assert torch.allclose(y, by_hand * layer.weight[:, None, None] + layer.bias[:, None, None], atol=1e-5)
    source = deployed(MarginalEntropy(prior=None))
    assert torch.equal(source.predict(served(3)).scores, small_model()(served(3)))


def test_what_is_not_finite_leaves_the_source_behind() -> None:
    memo = deployed(MarginalEntropy(views=2))
    batch = served(2)
    cast(Tensor, batch.inputs["image"])[0] = torch.nan
    first = answers(memo, [batch])[0]
    assert first[0].isnan().all() and first[1].isfinite().all() and memo.counts == {"not_finite": 1, "updates": 1}
    assert all(torch.equal(value, memo.source[name]) for name, value in memo.adapted.items())


def test_it_goes_back_exactly() -> None:
    goes_back_exactly(lambda: MarginalEntropy(views=3), [served(2, seed=s) for s in range(4)])
    memo = deployed(MarginalEntropy(views=3))
    learns_nothing_from_predicting(memo, [served(2)])
    answers(memo, [served(2)])
    assert same([memo.predict(served(2)).scores], [deployed(MarginalEntropy()).predict(served(2)).scores])


@pytest.mark.parametrize("crop", ["padded", "resized"])
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_images_and_all_different(channels: int, crop: str) -> None:
    image = torch.rand(1, channels, 12, 10, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    views = augmix(image, torch.Generator().manual_seed(1), crop=crop)
    assert views.shape == image.shape and float(views.min()) >= 0 and float(views.max()) <= 1 + 1e-6
    assert all(not torch.allclose(views[i], views[j], atol=1e-3) for i in range(6) for j in range(i))
    assert torch.equal(views, augmix(image, torch.Generator().manual_seed(1), crop=crop))
    still = augmix(image[..., :10], torch.Generator().manual_seed(1), flip=0.0, severity=0.1)
    assert still.isfinite().all()


def test_operations_on_levels_are_pillows() -> None:
    reference = pytest.importorskip("torchvision.transforms.v2.functional")
    levels = torch.randint(30, 200, (3, 3, 24, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images, nothing = levels / 255, torch.zeros(3)
    for mine, theirs in (
        (_augmenting._equalize(images, nothing), reference.equalize(levels)),
        (_augmenting._posterize(images, nothing), reference.posterize(levels, 4)),
        (_augmenting._solarize(images, torch.full((3,), 0.5)), reference.solarize(levels, 128)),
        (_augmenting._autocontrast(images, nothing), reference.autocontrast(levels)),
    ):
        assert torch.allclose(mine, theirs / 255, atol=1.01 / 255)
    flat = torch.full((1, 1, 4, 4), 0.3)
    assert torch.allclose(_augmenting._equalize(flat, nothing[:1]), flat)
    assert torch.equal(_augmenting._autocontrast(flat, nothing[:1]), flat)


def test_turns_and_shifts_move_what_they_should() -> None:
    images = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    right = torch.full((2,), 1 / 3)  # a third of a third of the image: one pixel
    assert torch.allclose(_augmenting._translate_x(images, right)[..., :-1], images[..., 1:], atol=1e-5)
    assert torch.allclose(_augmenting._translate_y(images, right)[..., :-1, :], images[..., 1:, :], atol=1e-5)
    quarter = torch.full((2,), 3.0)  # of 30 degrees
    turned = _augmenting._rotate(images, quarter)
    assert torch.allclose(turned, images.rot90(1, (2, 3)), atol=1e-4) or torch.allclose(turned, images.rot90(-1, (2, 3)), atol=1e-4)
    sheared = _augmenting._shear_x(images, torch.full((2,), 1 / 0.3))
    assert torch.allclose(sheared[:, :, 4], images[:, :, 4], atol=1e-5), "the middle row stays"
    assert torch.allclose(sheared[:, :, 5, :-1], images[:, :, 5, 1:], atol=1e-4)


def test_labels_that_come_late_are_refused() -> None:
    memo = deployed(MarginalEntropy(views=2))
    with pytest.raises(ConfigError, match="forgets after each sample what it learned from it: labels that come late would change nothing"):
        memo.correct(served(2).replace(target=torch.tensor([0, 1])))
    assert all(torch.equal(value, memo.source[name]) for name, value in memo.adapted.items())


def test_a_stream_without_images_is_refused() -> None:
    from streamcl.nn.backbones.mlp import Mlp

    info = StreamInfo({"sensor": Modality("vector", (12,))}, classes=CLASSES, test_time=True)
    with pytest.raises(ConfigError, match=r"marginal_entropy learns from random views of images: .* this stream has sensor \(vector\)"):
        deployed(MarginalEntropy(), model=small_model(info, Mlp(hidden=[8])), info=info)


def test_other_modalities_stay_as_they_are() -> None:
    from streamcl.nn.backbones.fusion import Fusion

    info = StreamInfo({"image": Modality("image", (1, 8, 8)), "sensor": Modality("vector", (5,))}, classes=CLASSES, test_time=True)
    memo = deployed(MarginalEntropy(views=4), model=small_model(info, Fusion(width=8)), info=info)
    seen: list[Batch] = []
    memo.model.register_forward_pre_hook(lambda module, given: seen.append(cast(Any, given[0])))
    batch = served(1, info=info)
    answers(memo, [batch])
    assert all(torch.equal(row, cast(Tensor, batch.inputs["sensor"])[0]) for row in cast(Tensor, seen[0].inputs["sensor"]))
    assert len(seen[0]) == 4 and len(seen[1]) == 1
