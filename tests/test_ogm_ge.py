"""OGM-GE: scores and coefficients by hand, the noise, the epochs of its window, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from streamcl.strategies.terms.ogm_ge import modulation
from test_cggm import carried, gradients, learned, shapes
from test_strategies import begun, make, prepared

from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError


def entered(scenario: Any = None, **options: Any) -> tuple[Engine, Any, Any]:
    run = carried(make("term", "ogm_ge", **options), scenario=scenario)
    task = begun(run)
    run.strategy.training_data(task)
    return run, run.strategy.terms[0], prepared(run, whole(task.train))[:40]


def test_the_coefficients_by_hand() -> None:
    assert modulation(torch.tensor([3.0, 1.0]), 0.3).tolist() == pytest.approx([1 - math.tanh(0.9), 1.0])
    assert modulation(torch.tensor([2.0, 2.0]), 0.3).tolist() == [1.0, 1.0]
    assert modulation(torch.tensor([1.0, 4.0, 2.0]), 0.5).tolist() == pytest.approx([1.0, 1 - math.tanh(2.0), 1 - math.tanh(1.0)])
    drawn = modulation(torch.rand(50, 3).sum(1), 0.7)
    assert bool(((drawn >= 0) & (drawn <= 1)).all())


def test_the_score_of_a_modality_is_that_of_its_columns_and_its_share_of_the_bias() -> None:
    run, term, batch = entered()
    with torch.no_grad():
        run.model.head.bias.copy_(torch.randn(run.model.head.classes))
    features = run.model.features(batch).detach()
    by_hand, logits = [], torch.zeros(40, run.model.head.classes)
    for columns in (slice(0, 8), slice(8, 16)):
        own = features[:, columns] @ run.model.head.weight[:, columns].T + run.model.head.bias / 2
        logits += own.detach()
        by_hand.append(sum(own[row].softmax(0)[label].item() for row, label in enumerate(batch.target.tolist())))
    assert torch.allclose(logits, run.model(batch), atol=1e-5), "the modalities' logits add up to the model's"
    assert term.scored(features, batch).tolist() == pytest.approx(by_hand, rel=1e-4)


def test_the_weights_of_what_is_ahead_are_held_back_and_nothing_else() -> None:
    run, term, batch = entered(alpha=0.5, noise=False)
    run.strategy.total_loss(batch).backward()
    before, scores = gradients(run), term.scores.clone()
    term.after_backward(batch)
    after = gradients(run)
    ahead, ratio = ("audio", scores[0] / scores[1]) if scores[0] > scores[1] else ("image", scores[1] / scores[0])
    held = [name for name in before if f".encoders.{ahead}." in name and before[name].dim() > 1]
    assert held
    for name, gradient in before.items():
        expected = (1 - math.tanh(0.5 * float(ratio))) * gradient if name in held else gradient
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-9)


def test_the_noise_is_as_strong_as_the_gradient_varies_before_it_is_held_back() -> None:
    run, term, batch = entered(alpha=50.0)
    run.strategy.total_loss(batch).backward()
    before = gradients(run)
    term.after_backward(batch)
    after = gradients(run)
    drawn = torch.Generator().set_state(term.generator.get_state())
    assert not torch.equal(drawn.get_state(), entered(alpha=50.0)[1].generator.get_state())
    for part, factor in zip(run.model.backbone.fused().values(), modulation(torch.tensor([1.0, 1.0]), 50.0), strict=True):
        assert part.parameters and factor == 1
    name = "backbone.encoders.audio.out.0.weight"  # many entries: the deviation is met closely
    noise = [after[name] - k * before[name] for k in (0.0, 1.0)]  # one of the two, whichever modality is ahead
    assert min(abs(float(n.std() / before[name].std()) - 1) for n in noise) < 0.05
    assert all(torch.equal(before[key], after[key]) for key in before if before[key].dim() == 1 or key.startswith("head"))


def test_with_alpha_0_and_no_noise_it_is_plain_fine_tuning_bit_for_bit() -> None:
    plain, held = learned(), learned(make("term", "ogm_ge", alpha=0.0, noise=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, held, strict=True))


def test_outside_of_its_epochs_it_is_plain_fine_tuning_and_inside_it_is_not() -> None:
    plain, later, second = (
        learned(*terms, tasks=1, epochs=2) for terms in ((), (make("term", "ogm_ge", begin=2),), (make("term", "ogm_ge", begin=1, end=1),))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, later, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, second, strict=True))


def test_of_masks_the_score_is_the_mean_over_the_pixels_that_are_annotated() -> None:
    run, term, batch = entered(shapes("mask"))
    features = run.model.features(batch).detach()
    everywhere = term.scored(features, batch)
    batch.target = batch.target.clone()
    batch.target[:, :8] = 255
    part = run.model.backbone.fused()["audio"]
    head = run.model.head
    own = torch.einsum("bdhw,cd->bhwc", features[:, part.columns], head.weight[:, part.columns]) + head.bias / 3
    label = batch.target[:, 8:].long()
    by_hand = own[:, 8:].softmax(-1).gather(-1, label[..., None])[..., 0].mean(dim=(1, 2)).sum()
    assert term.scored(features, batch)[0].item() == pytest.approx(by_hand.item(), rel=1e-4) and everywhere.shape == (3,)


def test_samples_that_lack_a_modality_count_for_none() -> None:
    run, term, batch = entered(shapes("class", [{"image": 0.5}]))
    features = run.model.features(batch).detach()
    there = batch.present["image"].nonzero().squeeze(1)
    assert 0 < len(there) < len(batch)
    torch.testing.assert_close(term.scored(features, batch), term.scored(features[there], batch[there]))


def test_what_it_cannot_serve_is_refused() -> None:
    with pytest.raises(ConfigError, match="end is 2 and begin is 5"):
        make("term", "ogm_ge", begin=5, end=2)
    with pytest.raises(ConfigError, match=r"ogm_ge compares how probable .* is value: take cggm"):
        carried(make("term", "ogm_ge"), scenario=shapes("value"))
    with pytest.raises(ConfigError, match="ogm_ge weighs modalities against each other, and the model reads image alone"):
        carried(make("term", "ogm_ge"), backbone=make("backbone", "fusion", modalities=["image"]))
    with pytest.raises(ConfigError, match="the backbone mlp does not keep an encoder"):
        carried(make("term", "ogm_ge"), backbone=make("backbone", "mlp", modality="image"))


def test_what_the_model_does_not_read_decides_nothing_and_nothing_counted_changes_nothing() -> None:
    run, term, batch = entered()
    features = run.model.features(batch).detach()
    nobody = torch.zeros(40, dtype=torch.bool)
    other = batch.replace(present={"text": nobody})
    assert torch.equal(term.scored(features, other), term.scored(features, batch))
    run.strategy.total_loss(batch.replace(present={"audio": nobody})).backward()
    before = gradients(run)
    term.after_backward(batch)
    after = gradients(run)
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


def test_a_strategy_that_scores_by_another_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="proto scores by another rule: take cggm"):
        carried(make("term", "ogm_ge"), strategy="proto")


def test_two_terms_that_scale_the_same_gradients_are_refused() -> None:
    with pytest.raises(ConfigError, match="OgmGe and CGGM both scale the gradients"):
        carried(make("term", "ogm_ge"), make("term", "cggm"))
