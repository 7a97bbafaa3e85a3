"""SuMi: bands, filters, the sharing of information and the loss by hand, and what changes while it adapts."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from streamcl.strategies.test_time.sumi import Sumi, inside, sharing
from test_joint_transformer import NAMES, around, assert_exact, changed, deployed, served, weights
from torch import Tensor
from toy_shadow import shadow, statistics_of_one_pass

from streamcl.adapting import alone, entropy
from streamcl.errors import ConfigError
from streamcl.nn.norms import Gathered

LR = {"name": "adam", "lr": 1e-2}
EVERY: dict[str, Any] = {"gamma_m": 100.0, "gamma_u": 0.0, "inside": 0.0, "cap": 0.0}  # every sample is kept
TWO = NAMES[:2]


def sumi(**options: Any) -> Any:
    names = options.pop("modalities", None)
    return deployed(Sumi(**{"optimizer": LR, **EVERY, **options}), modalities=names)


def all_given(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def some(seed: int = 0, rows: int = 6, modalities: int = 2, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, dtype=torch.float64, generator=draw)
    single = torch.randn(rows, modalities, classes, dtype=torch.float64, generator=draw)
    return logits, single, torch.ones(rows, modalities, dtype=torch.bool)


# -- smoothing ---------------------------------------------------------------------------------------------------------------------


def test_the_band_of_quartiles_by_hand() -> None:
    values = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])  # quartiles 1 and 3, IQR 2
    for widening, expected in ((0.0, [False, True, True, True, False]), (0.5, [True, True, True, True, False]), (3.5, [True] * 5)):
        assert inside(values, all_given(values), by="quartiles", widening=widening, share=1.0).tolist() == expected
    # the released form: 0 to 10 gives 2.5 and 7.5, and a range between them of 5
    expected = [False, False, False, True, False]
    assert inside(values, all_given(values), by="range", widening=0.0, share=1.0).tolist() == expected
    assert inside(values, all_given(values), by="range", widening=0.5, share=1.0).all()


def test_more_pass_as_the_band_widens_and_fewer_as_more_is_asked() -> None:
    values = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    passed = [inside(values, all_given(values), by="quartiles", widening=w, share=0.8) for w in (0, 0.25, 0.5, 1.0, 1.5)]
    assert all(bool((one <= other).all()) for one, other in pairwise(passed))
    assert 0 == passed[0].sum() < passed[1].sum() < passed[-1].sum() == 64
    asked = [inside(values, all_given(values), by="quartiles", widening=1.5, share=s) for s in (0.6, 0.95, 1.0)]
    assert asked[0].sum() >= asked[1].sum() > asked[2].sum(), "who asks for all dimensions rejects at the end: hence the cap"


def test_the_released_band_is_everything_after_a_third_of_the_stream() -> None:
    values = torch.randn(32, 300, generator=torch.Generator().manual_seed(0))
    assert inside(values, all_given(values), by="range", widening=1.5 / 3, share=0.6 + 0.4 / 3).all()


def test_where_a_modality_is_absent_the_band_is_of_those_that_have_it() -> None:
    values = torch.tensor([[0.0, 9.0], [1.0, 9.0], [2.0, 0.0], [3.0, 1.0], [10.0, 2.0], [0.0, 3.0]])
    given = torch.tensor([[True, False]] * 2 + [[True, True]] * 3 + [[False, True]])
    expected = inside(values[:5, :1], all_given(values[:5, :1]), by="quartiles", widening=0, share=1.0)
    second = inside(values[2:, 1:], all_given(values[2:, 1:]), by="quartiles", widening=0, share=1.0)
    got = inside(values, given, by="quartiles", widening=0, share=1.0)
    assert got.tolist() == [*expected[:2].tolist(), *(expected[2:] & second[:3]).tolist(), bool(second[3])]
    nothing = torch.zeros_like(given)
    assert not inside(values, nothing, by="range", widening=1, share=0.6).any()
    assert not inside(values, nothing, by="quartiles", widening=1, share=0.6).any()


def test_the_features_are_the_means_over_tokens_of_every_modality() -> None:
    strategy, given = sumi(modalities=TWO, inside=1.0, cap=1.0, width=1.0), served(size=16, modalities=TWO)
    made = strategy.model.by_modality(given)
    values = torch.cat([made["image"].mean(dim=1), made["sound"].mean(dim=1)], dim=1).detach()
    strategy.batches = 40
    expected = inside(values, all_given(values), by="quartiles", widening=0.4, share=1.0)
    assert torch.equal(strategy.smooth(given, torch.ones(16, 2, dtype=torch.bool)), expected)
    assert sumi(modalities=TWO, band="none").smooth(given, torch.ones(16, 2, dtype=torch.bool)).all()


def test_the_horizon_stands_for_the_length_of_the_stream_and_begins_anew_at_a_reset() -> None:
    strategy = sumi(horizon=4)
    seen = []
    for seed in range(6):
        seen.append(strategy.progress)
        strategy.adapt(served(seed))
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1]
    strategy.reset()
    assert strategy.progress == 0


# -- assistance --------------------------------------------------------------------------------------------------------------------


def test_kept_are_those_sure_together_and_not_already_sure_alone() -> None:
    sure, unsure = torch.tensor([9.0, 0.0, 0.0]), torch.zeros(3)
    logits = torch.stack([sure, sure, unsure, sure])
    single = torch.stack([torch.stack(pair) for pair in ((unsure, unsure), (sure, sure), (unsure, unsure), (sure, unsure))])
    there = torch.ones(4, 2, dtype=torch.bool)
    strategy = Sumi()
    assert strategy.assisted(logits, single, there).tolist() == [True, False, False, True]  # ln 3 / 2 = 0.55 >= e / 10
    assert Sumi(mu=0.1).assisted(logits, single, there).tolist() == [True, False, False, False], "0.1 ln 3 / 1.1 = 0.10"
    assert Sumi(gamma_u=0.0).assisted(logits, single, there).tolist() == [True, True, False, True]
    assert Sumi(gamma_m=5.0, gamma_u=0.0).assisted(logits, single, there).all()
    there[3, 1] = False
    assert strategy.assisted(logits, single, there).tolist() == [True, False, False, False], "alone it is sure, and there is no other"


def test_the_threshold_is_that_of_the_paper_for_any_number_of_classes() -> None:
    def row(classes: int, share: float) -> Tensor:
        """Logits whose entropy is this share of the largest one."""
        low, high = 0.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            logits = torch.zeros(1, classes, dtype=torch.float64)
            logits[0, 0] = middle
            low, high = (middle, high) if float(entropy(logits)) > share * math.log(classes) else (low, middle)
        return logits

    for classes in (3, 10, 50):
        single = torch.zeros(1, 2, classes, dtype=torch.float64)
        kept = [bool(Sumi().assisted(row(classes, s), single, torch.ones(1, 2, dtype=torch.bool))) for s in (0.39, 0.41)]
        assert kept == [True, False]


def test_where_nothing_is_kept_nothing_changes() -> None:
    strategy = sumi(gamma_m=0.0)
    before, answer = weights(strategy), strategy.predict(served()).scores
    assert torch.equal(strategy.adapt(served()).scores, answer) and not changed(strategy, before)
    assert strategy.counts == {"skipped": 1, "smooth": strategy.counts["smooth"], "kept": 0} and strategy.progress > 0


# -- sharing and the loss ----------------------------------------------------------------------------------------------------------


def test_sharing_of_two_modalities_by_hand() -> None:
    logits, single, there = some()
    p, pa, pv = logits.softmax(1), single[:, 0].softmax(1), single[:, 1].softmax(1)

    def kl(q: Tensor, r: Tensor) -> Tensor:
        return (q * (q / r).log()).sum(dim=1)

    torch.testing.assert_close(sharing(logits, single, there), kl((pv + p) / 2, pa) + kl((pa + p) / 2, pv))
    same = logits[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(sharing(logits, same, there), torch.zeros(6, dtype=torch.float64))


def test_sharing_of_three_modalities_and_of_absent_ones() -> None:
    logits, single, there = some(modalities=3)
    p, each = logits.softmax(1), single.softmax(2)
    expected = torch.zeros(6, dtype=torch.float64)
    for m in range(3):
        q = (p + each.sum(1) - each[:, m]) / 3
        expected = expected + (q * (q / each[:, m]).log()).sum(1)
    torch.testing.assert_close(sharing(logits, single, there), expected)
    there[:, 1] = False
    torch.testing.assert_close(sharing(logits, single, there), sharing(logits, single[:, [0, 2]], there[:, [0, 2]]))
    there[:, 2] = False
    p0 = each[:, 0]
    torch.testing.assert_close(sharing(logits, single, there), (p * (p / p0).log()).sum(1))
    extreme = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    value = sharing(extreme, extreme.flip(0)[:, None].expand(-1, 2, -1), torch.ones(2, 2, dtype=torch.bool)).sum()
    value.backward()
    assert value.isfinite() and extreme.grad.isfinite().all()  # type: ignore[union-attr]


def test_the_loss_by_hand_warm_and_afterwards() -> None:
    logits, single, there = some()
    h, m = entropy(logits), sharing(logits, single, there)
    w = (0.4 * math.log(3) - h).exp()
    q = logits.softmax(1).sum(0).softmax(0)
    even = -(q * q.log()).sum()
    torch.testing.assert_close(Sumi(lam=2.0).loss_of(logits, single, there), (w * (h + 2 * m)).mean() - even)
    torch.testing.assert_close(Sumi(lam=0.0, balance=0.5).loss_of(logits, single, there), (w * h).mean() - 0.5 * even)
    torch.testing.assert_close(Sumi(weights="none", lam=0, balance=0).loss_of(logits, single, there), h.mean())
    torch.testing.assert_close(Sumi(ent0=1.0, lam=0, balance=0).loss_of(logits, single, there), ((1 - h).exp() * h).mean())
    late = Sumi(horizon=10)
    late.batches = 5
    torch.testing.assert_close(late.loss_of(logits, single, there), (w * h).mean() - even)
    released = Sumi(horizon=10, weights="mean", balance=0)
    torch.testing.assert_close(released.loss_of(logits, single, there), (w * (h + 5 * m)).mean())
    released.batches = 5
    torch.testing.assert_close(released.loss_of(logits, single, there), w.mean() * h.mean())


def test_the_weight_has_no_gradient() -> None:
    logits, single, there = some(rows=1)
    logits.requires_grad_()
    Sumi(lam=0, balance=0).loss_of(logits, single, there).backward()
    other = logits.detach().clone().requires_grad_()
    h = entropy(other)
    ((0.4 * math.log(3) - h).exp().detach() * h).sum().backward()
    torch.testing.assert_close(logits.grad, other.grad)


def test_after_the_warm_half_lam_has_no_say() -> None:
    answers = []
    for lam in (0.0, 5.0):
        strategy = sumi(lam=lam, horizon=4)
        strategy.batches = 2
        answers.append(strategy.adapt(served()).scores)
    assert torch.equal(*answers)
    early = [sumi(lam=lam, horizon=4).adapt(served()).scores for lam in (0.0, 5.0)]
    assert not torch.equal(*early)


def test_the_step_is_that_of_the_loss_of_the_kept_samples_by_hand() -> None:
    strategy = sumi(optimizer={"name": "sgd", "lr": 0.1}, modalities=TWO)
    given = served(modalities=TWO)
    other = deployed(Sumi(), modalities=TWO)
    logits = other.model(given)
    single = torch.stack([other.model(alone(given, name)) for name in TWO], dim=1)
    Sumi().loss_of(logits, single, torch.ones(6, 2, dtype=torch.bool)).backward()
    strategy.adapt(given)
    for name, value in strategy.adapted.items():
        torch.testing.assert_close(value.data, other.source[name] - 0.1 * other.adapted[name].grad)


# -- in whole ----------------------------------------------------------------------------------------------------------------------


def test_only_norms_change() -> None:
    strategy = sumi()
    before = weights(strategy)
    strategy.adapt(served())
    touched = changed(strategy, before)
    assert touched and all(any(part in name for part in (".first.", ".second.", ".norm.")) for name in touched), touched


def test_the_order_within_a_batch_makes_no_difference() -> None:
    given, order = served(size=12), torch.tensor([5, 3, 11, 0, 2, 1, 9, 8, 10, 4, 7, 6])
    one, other = sumi(gamma_m=None), sumi(gamma_m=None)
    torch.testing.assert_close(one.adapt(given).scores[order], other.adapt(given[order]).scores, atol=1e-5, rtol=1e-4)


def test_incomplete_samples_are_learned_from() -> None:
    strategy = sumi()
    holed = served(present={"image": [1, 0, 1, 0, 1, 0], "sound": [1, 1, 0, 0, 1, 1], "text": [1, 1, 1, 1, 0, 0]})
    assert strategy.adapt(holed).scores.isfinite().all()
    assert strategy.counts["updates"] == 1 and strategy.counts["kept"] > 0
    assert all(value.isfinite().all() for value in strategy.adapted.values())


def test_going_back_is_exact() -> None:
    assert_exact(lambda: sumi(horizon=4), [served(seed, present={"image": [1, 1, 0, 1, 1, 1]}) for seed in range(3)])


def test_it_stands_around_any_network_that_tells_its_modalities_apart() -> None:
    strategy, given = around(Sumi(optimizer=LR, **EVERY))
    before = weights(strategy)
    assert strategy.adapt(given).scores.shape == (24, 3) and strategy.counts == {"updates": 1, "smooth": 24, "kept": 24}
    assert changed(strategy, before) == set(strategy.adapted)


@pytest.mark.parametrize("answer", ["before", "after"])
def test_statistics_are_gathered_of_the_batch_as_it_is_and_of_nothing_else(answer: Any) -> None:
    strategy, given = shadow(Sumi(**{"optimizer": LR, "answer": answer, **EVERY}))
    expected = statistics_of_one_pass(strategy, given)
    strategy.adapt(given)
    assert strategy.counts["updates"] == 1
    for name, value in strategy.gathered.values.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_nothing_is_learned_nor_gathered_where_a_modality_is_absent_for_every_sample_or_from_one() -> None:
    strategy, given = shadow(Sumi(**{"optimizer": LR, **EVERY}))
    before, gathered = weights(strategy), Gathered(strategy.layers).values
    given.inputs["right"].zero_()
    answer = strategy.adapt(given.replace(present={"right": torch.zeros(24, dtype=torch.bool)})).scores
    assert torch.equal(answer, strategy.predict(given).scores) and not changed(strategy, before)
    assert all(torch.equal(value, gathered[name]) for name, value in strategy.gathered.values.items())
    assert strategy.counts == {"skipped": 1} and strategy.batches == 1
    strategy.adapt(given.replace(present={"right": torch.arange(24) < 1}))
    assert strategy.counts["updates"] == 1 and changed(strategy, before)
    alone_served = sumi()
    before = weights(alone_served)
    assert alone_served.adapt(served(size=1)).scores.shape == (1, 3)
    assert alone_served.counts == {"skipped": 1} and not changed(alone_served, before)


def test_one_modality_is_refused() -> None:
    with pytest.raises(ConfigError, match="sumi compares modalities: it needs two or more, and a batch has image"):
        sumi(modalities=["image"]).adapt(served(modalities=["image"]))
