"""EATA: which samples it learns from, how they weigh, and what pulls its weights back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_tent import batch, convolutions, goes_back_exactly, pictures, started
from torch import Tensor
from torch.nn.functional import cross_entropy

from streamcl.adapting import entropy
from streamcl.stream import Batch

NONE_LEFT_OUT: dict[str, Any] = {"e0": 1e9, "epsilon": 2.0, "weighted": False, "beta": 0.0}


def clean(seed: int, size: int = 32) -> Batch:
    return batch(pictures(seed, size, shifted=False)[0])


def test_with_nothing_left_out_and_no_weights_it_is_tent_to_the_bit() -> None:
    eata, tent = started("eata", convolutions(), **NONE_LEFT_OUT), started("tent", convolutions())
    for seed in range(5):
        assert torch.equal(eata.adapt(batch(seed=seed)).scores, tent.adapt(batch(seed=seed)).scores)
    assert eata.counts == {"kept": 60, "updates": 5}


def test_the_loss_of_three_batches_is_the_one_worked_out_row_by_row() -> None:
    eata = started("eata", convolutions(), e0=1.0, epsilon=0.9, beta=0.0)
    mean: list[float] | None = None
    kept_in_all = 0
    for rows in ([[4.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 2.0, 0.0]], [[0.0, 3.0, 0.0], [0.5, 5.0, 0.0], [0.0, 0.0, 3.0]], [[0.0] * 3]):
        total, kept = 0.0, []
        for row in rows:
            p = [math.exp(z) / sum(map(math.exp, row)) for z in row]
            h = -sum(q * math.log(q) for q in p)
            cosine = 0.0 if mean is None else sum(a * b for a, b in zip(mean, p, strict=True)) / (math.hypot(*mean) * math.hypot(*p))
            if h < 1.0 and abs(cosine) < 0.9:
                total, kept = total + math.exp(1.0 - h) * h, [*kept, p]
        loss = eata.loss(batch(size=len(rows)), torch.tensor(rows))
        if not kept:
            assert loss is None
            continue
        kept_in_all += len(kept)
        assert loss is not None and loss.item() == pytest.approx(total / len(kept), rel=1e-5)
        new = [sum(column) / len(kept) for column in zip(*kept, strict=True)]
        mean = new if mean is None else [0.9 * old + 0.1 * fresh for old, fresh in zip(mean, new, strict=True)]
        assert eata.mean.tolist() == pytest.approx(mean, rel=1e-5)
    assert eata.counts["kept"] == kept_in_all == 5, "of seven"


def test_a_batch_of_which_nothing_is_kept_makes_no_step() -> None:
    eata = started("eata", convolutions(), e0=1e-9)
    eata.adapt(batch())
    assert eata.counts == {"kept": 0, "skipped": 1} and eata.mean is None
    assert all(torch.equal(eata.adapted[name], value) for name, value in eata.source.items())


def test_the_margins_follow_from_the_number_of_classes_and_stay_above_the_cosine_with_a_uniform_mean() -> None:
    eata = started("eata", convolutions())
    assert eata._epsilon(10) == pytest.approx(0.4) and eata._epsilon(1000) == pytest.approx(0.05)
    assert all(eata._epsilon(classes) > 1.1 / math.sqrt(classes) for classes in range(2, 3000))
    sure, unsure = torch.tensor([[9.0, 0, 0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0, 0]])
    assert entropy(sure) < 0.4 * math.log(5) < entropy(unsure)
    assert eata.loss(batch(size=1), unsure) is None and eata.loss(batch(size=1), sure) is not None


def test_a_margin_that_leaves_nothing_to_learn_from_is_told_once() -> None:
    eata = started("eata", convolutions(), epsilon=0.05, beta=0.0)
    for seed in range(3):
        eata.adapt(batch(seed=seed))
    told = [event.fields["message"] for event in eata.heard.events]
    assert len(told) == 1 and "epsilon is 0.05" in told[0] and "0.447" in told[0]


def fisher_by_hand(batches: list[Batch]) -> dict[str, Tensor]:
    """Over the batches, the mean square of the gradient of the cross-entropy with the model's own decisions."""
    module = convolutions().train()
    total: dict[str, Tensor] = {}
    names = [name for name, _ in module.named_parameters() if name.split(".")[1] == "1"]
    for one in batches:
        logits = module(one.inputs["input"])
        module.zero_grad()
        cross_entropy(logits, logits.argmax(dim=1)).backward()
        for name in names:
            total[f"module.{name}"] = total.get(f"module.{name}", torch.zeros(())) + module.get_parameter(name).grad ** 2  # type: ignore[operator]
    return {name: value / len(batches) for name, value in total.items()}


def test_the_fisher_information_is_that_of_the_first_samples_and_calibrating_changes_nothing_else() -> None:
    eata, batches = started("eata", convolutions(), fisher_samples=96), [clean(seed) for seed in range(5)]
    eata.calibrate(batches)
    expected = fisher_by_hand(batches[:3])
    assert expected.keys() == eata.fisher.keys()
    for name, value in expected.items():
        torch.testing.assert_close(eata.fisher[name], value, rtol=1e-3, atol=1e-7)
    assert all(value.grad is None and torch.equal(value, eata.source[name]) for name, value in eata.adapted.items())
    assert not eata.counts and eata.mean is None


def drift(eata: Any) -> float:
    return sum(float((value.detach() - eata.source[name]).square().sum()) for name, value in eata.adapted.items())


def test_the_pull_is_fisher_times_the_squared_distance_and_keeps_it_near_the_source() -> None:
    eata = started("eata", convolutions(), beta=3.0)
    eata.calibrate([clean(0)])
    with torch.no_grad():
        for value in eata.adapted.values():
            value.add_(0.1)
    by_hand = 3.0 * sum(0.01 * float(f.sum()) for f in eata.fisher.values())
    assert eata._pull().item() == pytest.approx(by_hand, rel=1e-4)

    def after(beta: float) -> float:
        eata = started("eata", convolutions(), beta=beta, optimizer={"name": "sgd", "lr": 0.01})
        eata.calibrate([batch(seed=seed, size=32) for seed in range(4)])
        for seed in range(40):
            eata.adapt(batch(seed=seed, size=32))
        return drift(eata)

    assert after(0.0) > 3 * after(5000.0)


def test_without_data_of_the_source_it_is_eta_and_says_so() -> None:
    first, second = started("eata", convolutions()), started("eata", convolutions(), beta=0.0)
    for seed in range(3):
        assert torch.equal(first.adapt(batch(seed=seed)).scores, second.adapt(batch(seed=seed)).scores)
    assert [event.kind for event in first.heard.events] == ["warning"] and not second.heard.events
    assert "this is eta" in first.heard.events[0].fields["message"]


def test_going_back_is_exact() -> None:
    goes_back_exactly("eata")
    eata = started("eata", convolutions(), beta=5.0)
    eata.calibrate([clean(0)])
    eata.calibrated()
    first = eata.adapt(batch()).scores
    eata.adapt(batch(seed=1))
    fisher = {name: value.clone() for name, value in eata.fisher.items()}
    eata.reset()
    assert eata.mean is None and all(torch.equal(eata.fisher[name], value) for name, value in fisher.items())
    assert torch.equal(eata.adapt(batch()).scores, first)
    other = started("eata", convolutions(), beta=5.0)
    other.restore(eata.state())
    assert torch.equal(other.adapt(batch(seed=2)).scores, eata.adapt(batch(seed=2)).scores)
    assert all(torch.equal(other.fisher[name], value) for name, value in fisher.items())
