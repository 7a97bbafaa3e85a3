"""Analytic statistics: both forms hold the one ridge regression on everything taken in, and not on what was taken back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.memory.analytic import GATHER, Analytic, Symmetric
from torch import Tensor
from torch.nn.functional import one_hot

from streamcl.checkpoint import flatten, unflatten
from streamcl.contracts import AnalyticStatistics
from streamcl.errors import ConfigError, DataError

FORMS = ["accumulated", "recursive"]


def made(form: Any = "accumulated", dim: int = 6, ridge: float = 0.5, dtype: torch.dtype = torch.float64) -> Analytic:
    analytic = Analytic(torch.device("cpu"))
    analytic.configure(dim, ridge, dtype, form)
    return analytic


def stream(count: int = 300, dim: int = 6, classes: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, dim, generator=generator, dtype=dtype) @ torch.randn(dim, dim, generator=generator, dtype=dtype)
    return features, torch.randint(classes, (count,), generator=generator)


def fed(form: Any, features: Tensor, labels: Tensor, size: int = 10**9, classes: int = 4, **options: Any) -> Analytic:
    analytic = made(form, features.shape[1], **options)
    for x, y in zip(features.split(size), labels.split(size), strict=True):
        analytic.update(x, y, classes)
    return analytic


def joint(features: Tensor, targets: Tensor, ridge: float = 0.5) -> Tensor:
    """Ridge regression as least squares on rows that the ridge adds: no normal equations, nothing of what is tested."""
    x = np.vstack([features.double().numpy(), np.sqrt(ridge) * np.eye(features.shape[1])])
    y = np.vstack([targets.double().numpy(), np.zeros((features.shape[1], targets.shape[1]))])
    return torch.from_numpy(np.linalg.lstsq(x, y, rcond=None)[0])


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# -- the solution ------------------------------------------------------------------------------------------------------------------


def test_it_is_what_the_contract_says() -> None:
    assert isinstance(made(), AnalyticStatistics)


@pytest.mark.parametrize("size", [1, 5, 64, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_the_joint_ridge_regression(form: str, size: int) -> None:
    features, labels = stream()
    expected = joint(features, one_hot(labels))
    analytic = fed(form, features, labels, size)
    assert analytic.count == 300
    close(analytic.weights(), expected)
    squares = features.T @ features + 0.5 * torch.eye(6, dtype=torch.float64)
    close(analytic.inverse @ squares, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
def test_in_wide_features_the_upper_half_stands_for_the_whole(form: str) -> None:
    features, labels = stream(900, 300)
    expected = joint(features, one_hot(labels), 5.0)
    for size in (64, 900):  # fewer and more rows than features
        analytic = fed(form, features, labels, size, ridge=5.0)
        close(analytic.weights(), expected, 1e-8)
        assert analytic._matrix is not None and analytic._matrix.nbytes() < 0.75 * 300 * 300 * 8


def test_a_symmetric_matrix_is_the_sum_of_its_products() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, 500, generator=generator, dtype=torch.float64) for _ in range(2))
    matrix = Symmetric(500, torch.float64, torch.device("cpu"))
    matrix.add(x)
    matrix.add(y, -2.0)
    expected = x.T @ x - 2 * y.T @ y
    close(matrix.whole(), expected)
    close(matrix.left(x), x @ expected)
    close(matrix.diagonal(), expected.diagonal())
    assert torch.equal(matrix.whole(), matrix.whole().T)
    again = Symmetric(500, torch.float64, torch.device("cpu"))
    again.put(matrix.whole())
    again.plus(matrix, 2.0)
    again.scale(0.5)
    close(again.whole(), 1.5 * expected)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_splitting_order_and_growth_gives_the_same(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    features, labels = stream(60, seed=data.draw(st.integers(0, 9)))
    order = torch.tensor(data.draw(st.permutations(range(60))))
    cuts = sorted(data.draw(st.sets(st.integers(1, 59), max_size=8)))
    analytic, seen = made(form), 0
    for part in torch.tensor_split(order, cuts):
        seen = max(seen, int(labels[part].max()) + 1)
        analytic.update(features[part], labels[part], seen)
        if data.draw(st.booleans()):
            assert analytic.weights().shape == (6, seen)  # asking in between changes nothing
    analytic.update(features[:0], labels[:0], 4)
    close(analytic.weights(), joint(features, one_hot(labels, 4)))


def test_of_labels_the_splitting_does_not_even_change_the_rounding() -> None:
    features, labels = stream(3 * GATHER + 50, dtype=torch.float32)
    whole = fed("accumulated", features, labels)
    for size in (1, 7, GATHER, 300):
        cut = fed("accumulated", features, labels, size)
        cut.weights()
        assert torch.equal(cut.weights(), whole.weights())


def test_classes_that_come_later_have_zeros_behind_them() -> None:
    features, labels = stream(90)
    labels = labels.sort().values
    for form in FORMS:
        analytic = made(form)
        for label in range(4):
            own = labels == label
            analytic.update(features[own], labels[own], label + 1)
            targets = one_hot(labels[labels <= label], label + 1)
            close(analytic.weights(), joint(features[labels <= label], targets))
        analytic.update(features[:3], labels[:3], 2)  # a batch that knows of fewer classes takes none away
        assert analytic.weights().shape == (6, 4)


@pytest.mark.parametrize("form", FORMS)
def test_targets_are_numbers_of_any_columns(form: str) -> None:
    """Multi-label: a column for each class, more of them later; what was not there is 0."""
    features, _ = stream(120)
    generator = torch.Generator().manual_seed(2)
    annotated = torch.randint(2, (120, 5), generator=generator)
    annotated[:50, 3:] = 0
    analytic = made(form)
    for part in torch.arange(50).split(9):
        analytic.update(features[part], annotated[part, :3], 3)
    analytic.update(features[50:], annotated[50:], 5)
    close(analytic.weights(), joint(features, annotated))
    values = torch.randn(120, 5, generator=generator, dtype=torch.float64)
    close(fed(form, features, values, 11, classes=5).weights(), joint(features, values))
    analytic.remove(features[50:], annotated[50:])
    close(analytic.weights(), joint(features[:50], annotated[:50]), 1e-8)


def test_the_accumulated_form_is_solved_at_any_ridge() -> None:
    features, labels = stream()
    analytic = fed("accumulated", features, labels, 40)
    for ridge in (1e-3, 0.5, 20.0):
        close(analytic.weights(ridge), joint(features, one_hot(labels), ridge))
        assert analytic.weights(ridge) is analytic.weights(ridge)  # solved once
    close(analytic.weights(), joint(features, one_hot(labels)))
    solved = analytic.weights()
    analytic.update(features[:1], labels[:1], 4)
    assert not torch.equal(analytic.weights(), solved)


@pytest.mark.parametrize("form", FORMS)
def test_float32_is_kept_when_asked_for(form: str) -> None:
    features, labels = stream(dtype=torch.float32)
    analytic = fed(form, features, labels, 30, dtype=torch.float32)
    assert analytic.weights().dtype == torch.float32
    close(analytic.weights().double(), joint(features, one_hot(labels)), 1e-3)
    assert analytic.nbytes() * 2 == fed(form, features, labels, 30).nbytes()


def test_weights_before_the_first_sample_are_zero() -> None:
    for form in FORMS:
        analytic = made(form)
        assert analytic.weights().shape == (6, 0)
        analytic.update(torch.rand(0, 6), torch.empty(0, dtype=torch.int64), 3)
        assert torch.equal(analytic.weights(), torch.zeros(6, 3, dtype=torch.float64))


def test_callers_modes_do_not_reach_the_statistics() -> None:
    features, labels = stream(60, dtype=torch.float32)
    for form in FORMS:
        moded = made(form, dtype=torch.float32)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            moded.update(features[:30].clone(), labels[:30], 4)
        moded.update(features[30:].requires_grad_(), labels[30:], 4)
        assert torch.equal(moded.weights(), fed(form, features.detach(), labels, 30, dtype=torch.float32).weights())
        assert not moded.weights().requires_grad


# -- taking back, merging, going on ------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_what_is_taken_back_was_never_there(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    features, labels = stream(60, seed=data.draw(st.integers(0, 9)))
    gone = torch.tensor(data.draw(st.lists(st.booleans(), min_size=60, max_size=60)))
    analytic = fed(form, features, labels, data.draw(st.integers(1, 60)))
    for x, y in zip(features[gone].split(17), labels[gone].split(17), strict=True):
        analytic.remove(x, y)
    assert analytic.count == int((~gone).sum())
    close(analytic.weights(), joint(features[~gone], one_hot(labels[~gone], 4)), 1e-7)
    analytic.update(features[gone], labels[gone], 4)
    close(analytic.weights(), joint(features, one_hot(labels, 4)), 1e-7)


def test_of_a_sample_that_was_taken_back_no_row_stays() -> None:
    features, labels = stream(GATHER // 2)
    analytic = fed("accumulated", features, labels)
    assert torch.equal(analytic.state()["gathered"], features)
    analytic.remove(features[3:4], labels[3:4])
    assert len(analytic.state()["gathered"]) == 0 and not bool(analytic._gathered.any())
    analytic.remove(torch.cat([features[:3], features[4:]]), torch.cat([labels[:3], labels[4:]]))
    assert analytic.count == 0 and not bool(analytic.weights().any()) and not any(bool(band.any()) for band in analytic.state()["matrix"])


@pytest.mark.parametrize("mine", FORMS)
@pytest.mark.parametrize("theirs", FORMS)
def test_merging_is_seeing_the_samples_of_both(mine: str, theirs: str) -> None:
    features, labels = stream(700)
    labels[:400] %= 2
    one = fed(mine, features[:400], labels[:400], 37, classes=2)
    other = fed(theirs, features[400:], labels[400:], 37, ridge=3.0)  # whose own ridge is not taken over
    before = other.weights().clone()
    one.merge(other)
    assert one.count == 700 and torch.equal(other.weights(), before)
    close(one.weights(), joint(features, one_hot(labels)), 1e-8)
    one.update(features[:50], labels[:50], 4)
    close(one.weights(), joint(torch.cat([features, features[:50]]), one_hot(torch.cat([labels, labels[:50]]))), 1e-8)
    empty = made(mine)
    empty.merge(other)
    close(empty.weights(), joint(features[400:], one_hot(labels[400:])), 1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_restored_statistics_go_on_bit_for_bit(form: str) -> None:
    features, labels = stream(500, 140, dtype=torch.float32)
    one = fed(form, features[:300], labels[:300], 43)
    tree, tensors = flatten(one.state())
    kept = {name: value.clone() for name, value in tensors.items()}
    one.weights(7.0 if form == "accumulated" else None)  # what is solved in between is no part of the statistics
    other = Analytic(torch.device("cpu"))
    other.restore(unflatten(tree, tensors))
    assert other.nbytes() == one.nbytes() > 0
    assert torch.equal(other.weights(), one.weights())
    for both in (one, other):
        both.update(features[300:], labels[300:], 6)
    assert torch.equal(one.weights(), other.weights()) and one.weights().shape == (140, 6)
    assert all(torch.equal(kept[name], value) for name, value in tensors.items())  # a state is a copy


def test_configuring_again_changes_nothing_unless_something_else_is_asked_for() -> None:
    features, labels = stream()
    analytic = fed("accumulated", features, labels)
    analytic.configure(6, 0.5)
    assert analytic.count == 300
    analytic.configure(6, 0.5, form="recursive")
    assert analytic.count == 0 and analytic.weights().shape == (6, 0)


def test_a_state_of_one_form_is_not_put_into_the_other() -> None:
    features, labels = stream()
    state = fed("recursive", features, labels).state()
    analytic = fed("accumulated", features, labels)
    with pytest.raises(ConfigError, match="are of the recursive form and cannot go on in the accumulated form: configure form='recursive'"):
        analytic.restore(state)
    assert analytic.count == 300
    fresh = Analytic(torch.device("cpu"))
    fresh.restore(state)
    close(fresh.weights(), analytic.weights())
    fresh.restore(Analytic(torch.device("cpu")).state())
    with pytest.raises(DataError, match="not configured"):
        fresh.weights()


# -- bad input ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_what_makes_no_sense_is_refused_in_one_sentence_and_changes_nothing(form: str) -> None:
    features, labels = stream(40)
    analytic = fed(form, features, labels)
    before = {name: value.clone() for name, value in flatten(analytic.state())[1].items()}
    bad = features.clone()
    bad[[4, 9], 1] = torch.tensor([float("nan"), -float("inf")], dtype=torch.float64)
    unannotated = torch.zeros(40, 4, dtype=torch.int64)
    unannotated[7, 2] = -1
    for call, message in (
        (lambda: analytic.update(bad, labels, 4), r"2 features are NaN or infinite \(rows \[4, 9\]\)"),
        (lambda: analytic.remove(bad, labels), r"rows \[4, 9\]"),
        (lambda: analytic.update(features[:, :2], labels, 4), r"features are \(40, 2\), and the analytic statistics take \(batch, 6\)"),
        (lambda: analytic.update(features, labels[:3], 4), r"40 features have labels of \(3,\)"),
        (lambda: analytic.update(features, labels.double(), 4), "labels are whole numbers, not float64"),
        (lambda: analytic.update(features, labels, 2), r"labels \[2, 3\] are not among the 2 classes"),
        (lambda: analytic.update(features, labels - 1, 4), r"labels \[-1\] are not among the 4 classes"),
        (lambda: analytic.update(features, torch.ones(40, 5), 4), "5 columns, more than the 4 classes"),
        (lambda: analytic.update(features, torch.full((40, 2), torch.nan), 4), "40 targets are NaN or infinite"),
        (lambda: analytic.update(features, unannotated, 4), r"1 targets have -1, not annotated \(rows \[7\]\)"),
        (lambda: analytic.remove(torch.cat([features] * 2), torch.cat([labels] * 2)), "80 samples cannot be taken back from .* 40"),
        (lambda: analytic.merge(made(form, 5)), "of 5 features do not merge with those of 6"),
        (lambda: analytic.merge(Analytic(torch.device("cpu"))), "were not configured with their size"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    for call, message in (
        (lambda: analytic.configure(6, 0.0), "the ridge is 0.0: it must be above 0"),
        (lambda: analytic.configure(0, 1.0), "at least one feature"),
        (lambda: analytic.configure(6, 1.0, torch.float16), "float64 or float32, not in torch.float16"),
        (lambda: analytic.configure(6, 1.0, torch.float64, "batch"), "unknown form 'batch'"),  # type: ignore[arg-type]
        (lambda: analytic.weights(-1.0), "the ridge is -1.0"),
        (lambda: analytic.merge(object()), "not with object"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert all(torch.equal(value, before[name]) for name, value in flatten(analytic.state())[1].items())


def test_what_a_form_cannot_answer_is_said() -> None:
    features, labels = stream(40)
    with pytest.raises(ConfigError, match=r"the recursive form holds the solution at ridge 0.5 alone: .* asked for 2"):
        fed("recursive", features, labels).weights(2.0)
    with pytest.raises(DataError, match="not configured"):
        Analytic(torch.device("cpu")).update(features, labels, 4)
    for form in FORMS:  # samples that never came in leave a matrix without a solution
        analytic = fed(form, features, labels)
        with pytest.raises(DataError, match="a larger ridge or float64 is needed, or samples are taken back that never came in"):
            analytic.remove(100 * features[:5], labels[:5])
            analytic.weights()


def test_nothing_of_single_samples_is_left_once_a_task_is_learned() -> None:
    statistics = Analytic(torch.device("cpu"))
    statistics.configure(4, 1.0)
    rows = torch.arange(12, dtype=torch.float64).reshape(3, 4) + 0.125
    statistics.update(rows, torch.tensor([0, 0, 0]), 1)
    before = statistics.weights().clone()
    statistics.settle()
    content = b"".join(tensor.numpy().tobytes() for tensor in flatten(statistics.state())[1].values())
    assert not any(row.numpy().tobytes() in content for row in rows)
    torch.testing.assert_close(statistics.weights(), before, rtol=1e-12, atol=1e-12)
