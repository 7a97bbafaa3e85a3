"""Prototypes: one pass gives what two passes give, in whatever pieces, and everything read off them is worked out beside in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.memory.prototypes import Prototypes
from torch import Tensor
from torch.nn.functional import normalize

from streamcl.checkpoint import flatten, unflatten
from streamcl.contracts import PrototypeMemory
from streamcl.errors import ConfigError, DataError

KINDS = ["none", "diagonal", "full", "shared"]


def made(covariance: Any = "none", per_class: int = 1, dtype: torch.dtype = torch.float64) -> Prototypes:
    prototypes = Prototypes(torch.device("cpu"))
    prototypes.configure(covariance, per_class, dtype)
    return prototypes


def stream(count: int = 300, dim: int = 5, classes: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    mixing = torch.randn(classes, dim, dim, generator=generator, dtype=dtype)
    centres = 5 * torch.randn(classes, dim, generator=generator, dtype=dtype)
    noise = torch.randn(count, dim, generator=generator, dtype=dtype)
    return centres[labels] + torch.einsum("bd,bde->be", noise, mixing[labels]), labels


def fed(kind: Any, features: Tensor, labels: Tensor, size: int = 10**9, **options: Any) -> Prototypes:
    prototypes = made(kind, **options)
    for x, y in zip(features.split(size), labels.split(size), strict=True):
        prototypes.update(x, y)
    return prototypes


def by_class(prototypes: Prototypes) -> dict[int, Any]:
    """Count, mean and covariance of each class, whatever the rows."""
    covariances = prototypes.covariances() if prototypes.covariance in ("diagonal", "full") else [None] * len(prototypes)
    return {
        label: (int(count), mean, covariance)
        for label, count, mean, covariance in zip(
            prototypes.labels().tolist(), prototypes.counts(), prototypes.means(), covariances, strict=True
        )
    }


def same(one: Prototypes, other: Prototypes, tolerance: float = 1e-9) -> None:
    mine, theirs = by_class(one), by_class(other)
    assert mine.keys() == theirs.keys()
    for label, (count, mean, covariance) in mine.items():
        assert count == theirs[label][0]
        torch.testing.assert_close(mean, theirs[label][1], rtol=tolerance, atol=tolerance)
        if covariance is not None:
            torch.testing.assert_close(covariance, theirs[label][2], rtol=tolerance, atol=tolerance)
    if one.covariance == "shared":
        torch.testing.assert_close(one.covariances(), other.covariances(), rtol=tolerance, atol=tolerance)


# -- statistics --------------------------------------------------------------------------------------------------------------------


def test_it_is_what_the_contract_says() -> None:
    assert isinstance(made(), PrototypeMemory)


@pytest.mark.parametrize("size", [1, 7, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_gives_the_two_pass_statistics(kind: str, size: int) -> None:
    features, labels = stream()
    prototypes = fed(kind, features, labels, size)
    within = np.zeros((5, 5))
    for row, label in enumerate(prototypes.labels().tolist()):
        own = features[labels == label].numpy()
        assert int(prototypes.counts()[row]) == len(own)
        np.testing.assert_allclose(prototypes.means()[row], own.mean(axis=0), rtol=1e-12)
        within += (len(own) - 1) * np.cov(own.T)
        if kind == "diagonal":
            np.testing.assert_allclose(prototypes.covariances()[row], own.var(axis=0, ddof=1), rtol=1e-12)
        if kind == "full":
            np.testing.assert_allclose(prototypes.covariances()[row], np.cov(own.T), rtol=1e-11, atol=1e-12)
    if kind == "shared":
        np.testing.assert_allclose(prototypes.covariances(), within / (300 - 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["diagonal", "full", "shared"])
def test_a_million_samples_in_float32_far_from_zero_agree_with_two_passes(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1_000_000, 3, generator=generator) + 1000  # float32: the data as it is, rounded
    features[:, 1] += features[:, 0] - 1000
    labels = torch.arange(1_000_000) % 2
    prototypes = fed(kind, features, labels, 2500, dtype=torch.float32)
    assert prototypes.means().dtype == prototypes.covariances().dtype == torch.float32
    exact = features.double()
    total = torch.zeros(3, 3, dtype=torch.float64)
    for row in (0, 1):
        own = exact[labels == row]
        torch.testing.assert_close(prototypes.means()[row].double(), own.mean(dim=0), rtol=1e-6, atol=0)
        covariance = own.T.cov()
        total += covariance * (len(own) - 1)
        if kind == "diagonal":
            torch.testing.assert_close(prototypes.covariances()[row].double(), covariance.diagonal(), rtol=1e-6, atol=0)
        if kind == "full":
            torch.testing.assert_close(prototypes.covariances()[row].double(), covariance, rtol=1e-6, atol=1e-6)
    if kind == "shared":
        torch.testing.assert_close(prototypes.covariances().double(), total / (1_000_000 - 2), rtol=1e-6, atol=1e-6)


def test_in_wide_features_the_upper_half_stands_for_the_whole() -> None:
    """More dimensions than one band of a symmetric matrix holds."""
    generator = torch.Generator().manual_seed(2)
    features, labels = torch.randn(500, 300, generator=generator, dtype=torch.float64), torch.arange(500) % 2
    full, shared = fed("full", features, labels, 64), fed("shared", features, labels, 64)
    covariances = [features[labels == label].T.cov() for label in (0, 1)]
    torch.testing.assert_close(full.covariances(), torch.stack(covariances), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(shared.covariances(), sum(covariances) / 2, rtol=1e-10, atol=1e-12)
    assert torch.equal(shared.covariances(), shared.covariances().T)
    assert full.nbytes() < 0.75 * 2 * 300 * 300 * 8


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_splitting_and_order_gives_the_same(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    features, labels = stream(60, 3, 5, seed=data.draw(st.integers(0, 9)))
    order = torch.tensor(data.draw(st.permutations(range(60))))
    prototypes = made(kind)
    cuts = sorted(data.draw(st.sets(st.integers(1, 59), max_size=8)))
    for part in torch.tensor_split(order, cuts):
        prototypes.update(features[part], labels[part])
    same(prototypes, fed(kind, features, labels))
    first = dict.fromkeys(labels[order].tolist())
    assert prototypes.labels().tolist() == list(first)  # rows in order of first appearance, also within a batch


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_merging_is_seeing_the_samples_of_both(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    features, labels = stream(60, 3, 5, seed=data.draw(st.integers(0, 9)))
    parts = [fed(kind, features[part], labels[part], 11) for part in torch.tensor(data.draw(st.permutations(range(60)))).chunk(3)]
    whole = made(kind)
    for part in parts:
        before = part.state()
        whole.merge(part)
        assert torch.equal(part.means(), fed_from(before).means())  # the other is left as it was
    same(whole, fed(kind, features, labels))


def fed_from(state: dict[str, Any]) -> Prototypes:
    prototypes = Prototypes(torch.device("cpu"))
    prototypes.restore(state)
    return prototypes


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_taken_back_was_never_there(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    features, labels = stream(60, 3, 5, seed=data.draw(st.integers(0, 9)))
    gone = torch.tensor(data.draw(st.lists(st.booleans(), min_size=60, max_size=60)))
    prototypes = fed(kind, features, labels, 13)
    for x, y in zip(features[gone].split(17), labels[gone].split(17), strict=True):
        prototypes.remove(x, y)
    if bool(gone.all()):
        assert len(prototypes) == 0 and prototypes.labels().tolist() == []
        with pytest.raises(DataError, match="no prototype yet"):
            prototypes.means()
    else:
        same(prototypes, fed(kind, features[~gone], labels[~gone]))
        prototypes.update(features[gone], labels[gone])
    prototypes = prototypes if len(prototypes) else fed(kind, features, labels)
    same(prototypes, fed(kind, features, labels))


def test_the_last_sample_of_a_class_takes_the_class_with_it() -> None:
    x = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64)
    prototypes = fed("full", x, torch.tensor([7, 3, 7]))
    prototypes.remove(x[:1], torch.tensor([7]))
    assert prototypes.covariances().tolist() == [[[0.0]], [[0.0]]]  # one sample each: no rounding is left over
    prototypes.remove(x[2:], torch.tensor([7]))
    assert prototypes.labels().tolist() == [3] and prototypes.counts().tolist() == [1] and prototypes.means().tolist() == [[2.0]]


def test_a_class_that_goes_leaves_the_shared_covariance_of_the_others() -> None:
    features, labels = stream(60, 3, 3)
    prototypes = fed("shared", features, labels, 13)
    gone = labels == 1
    prototypes.remove(features[gone], labels[gone])
    same(prototypes, fed("shared", features[~gone], labels[~gone]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_class", [1, 3])
def test_a_restored_memory_goes_on_bit_for_bit(kind: str, per_class: int) -> None:
    features, labels = stream(200, 140, 6, dtype=torch.float32)
    one = fed(kind, features[:120], labels[:120], 20, per_class=per_class, dtype=torch.float32)
    tree, tensors = flatten(one.state())
    kept = {name: value.clone() for name, value in tensors.items()}
    other = fed_from(unflatten(tree, tensors))
    assert other.nbytes() == one.nbytes() > 0
    for both in (one, other):
        both.update(features[120:], labels[120:])
    assert torch.equal(one.means(), other.means()) and torch.equal(one.labels(), other.labels())
    assert torch.equal(one.counts(), other.counts())
    if kind != "none":
        assert torch.equal(one.covariances(), other.covariances())
    assert all(torch.equal(kept[name], value) for name, value in tensors.items())  # a state is a copy


def test_set_puts_a_class_in_place_and_the_stream_goes_on_from_it() -> None:
    features, labels = stream(80, 3, 1)
    known = fed("full", features[:50], labels[:50])
    prototypes = made("full")
    prototypes.set(0, known.means()[0], 50, known.covariances()[0])
    prototypes.update(features[50:], labels[50:])
    same(prototypes, fed("full", features, labels))
    moved = prototypes.covariances().clone()
    prototypes.set(0, torch.zeros(3), 20)  # the mean moves, the covariance stays
    torch.testing.assert_close(prototypes.covariances(), moved)
    assert prototypes.counts().tolist() == [20] and prototypes.means().tolist() == [[0, 0, 0]]
    shared = made("shared")
    for label in (0, 1):
        shared.set(label, torch.zeros(2), 3, torch.eye(2) * (label + 1))
    torch.testing.assert_close(shared.covariances(), torch.eye(2, dtype=torch.float64) * 1.5)


def test_answers_have_the_precision_of_the_first_features_until_it_is_configured() -> None:
    prototypes = Prototypes(torch.device("cpu"))
    prototypes.update(torch.rand(4, 2, dtype=torch.bfloat16), torch.arange(4))
    assert prototypes.means().dtype == torch.float32
    prototypes.configure(dtype=torch.float32)
    assert len(prototypes) == 4  # nothing new was asked for
    prototypes.configure(dtype=torch.float64)
    assert len(prototypes) == 0


def test_callers_modes_do_not_reach_the_statistics() -> None:
    features, labels = stream(40, 20, 3, dtype=torch.float32)
    plain = fed("full", features, labels, dtype=torch.float32)
    moded = made("full", dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        moded.update(features[:20].clone(), labels[:20])
        assert torch.equal(plain.nearest(features, metric="mahalanobis")[0], plain.nearest(features.clone(), metric="mahalanobis")[0])
    moded.update(features[20:].requires_grad_(), labels[20:])
    same(plain, moded, 1e-5)
    assert not moded.means().requires_grad


# -- the nearest -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [1, 3, 40, 300])
@pytest.mark.parametrize("k", [1, 3, 30])
def test_the_nearest_by_euclid_and_cosine_are_those_of_a_full_search(dtype: torch.dtype, queries: int, k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(40, 256, generator=generator, dtype=dtype) + 100
    means[7] = 0  # without a direction
    x = torch.randn(queries, 256, generator=generator, dtype=dtype) + 100
    x[0] = 0
    prototypes = fed("none", means, torch.arange(40), dtype=dtype)
    exact, table = x.double().numpy(), means.double().numpy()
    euclid = np.linalg.norm(exact[:, None] - table[None], axis=2)
    with np.errstate(invalid="ignore"):
        cosine = 1 - np.nan_to_num((exact @ table.T) / np.linalg.norm(exact, axis=1)[:, None] / np.linalg.norm(table, axis=1))
    for metric, full in (("euclidean", euclid), ("cosine", cosine)):
        distances, labels = prototypes.nearest(x, k, metric)
        assert distances.shape == labels.shape == (queries, k) and distances.dtype == dtype
        nearest, tolerance = np.sort(full, axis=1)[:, :k], 3e-6 if dtype == torch.float32 else 1e-9
        np.testing.assert_allclose(distances[:, :16], nearest[:, :16], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(distances, nearest, rtol=20 * tolerance, atol=tolerance)
        np.testing.assert_allclose(np.take_along_axis(full, labels.numpy(), axis=1), distances, rtol=20 * tolerance, atol=tolerance)


def test_far_from_zero_the_nearest_is_still_found_in_float32() -> None:
    generator = torch.Generator().manual_seed(4)
    means = torch.randn(50, 64, generator=generator)
    x = means[torch.arange(400) % 50] + 0.1 * torch.randn(400, 64, generator=generator)
    for size in (400, 30, 2):
        prototypes = fed("none", means + 3000, torch.arange(50), dtype=torch.float32)
        assert torch.equal(prototypes.nearest(x[:size] + 3000)[1][:, 0], torch.arange(size) % 50)


def test_fewer_prototypes_than_asked_for_give_fewer_columns() -> None:
    prototypes = fed("full", *stream(90, 3, 3))
    for metric in ("euclidean", "cosine", "mahalanobis"):
        distances, labels = prototypes.nearest(torch.rand(4, 3), 10, metric)
        assert distances.shape == (4, 3) and all(row.unique().numel() == 3 for row in labels)
        assert bool((distances.diff(dim=1) >= 0).all())
        assert prototypes.nearest(torch.rand(0, 3), 2, metric)[0].shape == (0, 2)


def fecam(covariance: np.ndarray, alpha: tuple[float, float], correlation: bool) -> np.ndarray:
    """The matrix of FeCAM's distance, entry by entry."""
    dim = len(covariance)
    first = sum(covariance[i, i] for i in range(dim)) / dim
    others = [covariance[i, j] for i in range(dim) for j in range(dim) if i != j and covariance[i, j] != 0]
    second = sum(others) / len(others) if others else 0.0
    out = np.zeros_like(covariance)
    for i in range(dim):
        for j in range(dim):
            out[i, j] = covariance[i, j] + (alpha[0] * first if i == j else alpha[1] * second)
    deviation = np.sqrt(np.diag(out))
    return np.linalg.inv(out / np.outer(deviation, deviation) if correlation else out)


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize("alpha", [(0.0, 0.0), (1.0, 1.0), (10.0, 2.0)])
@pytest.mark.parametrize("kind", ["diagonal", "full", "shared"])
def test_mahalanobis_distances_are_fecams(kind: str, alpha: tuple[float, float], correlation: bool) -> None:
    features, labels = stream(200, 4, 3)
    prototypes = fed(kind, features, labels, 50)
    queries = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 5
    full = np.empty((20, 3))
    for row, label in enumerate(prototypes.labels().tolist()):
        covariance = prototypes.covariances() if kind == "shared" else prototypes.covariances()[row]
        covariance = covariance.diag() if kind == "diagonal" else covariance
        matrix = fecam(covariance.numpy(), alpha, correlation)
        difference = queries.numpy() - features[labels == label].numpy().mean(axis=0)
        full[:, row] = np.sqrt(np.einsum("bd,de,be->b", difference, matrix, difference))
    distances, found = prototypes.nearest(queries, 3, "mahalanobis", alpha, correlation)
    np.testing.assert_allclose(distances, np.sort(full, axis=1), rtol=1e-9)
    assert torch.equal(found, prototypes.labels()[torch.from_numpy(full.argsort(axis=1))])


def test_mahalanobis_of_a_case_worked_out_by_hand() -> None:
    """Covariance [[3, 1], [1, 1]], shrunk by (1, 1): V1 = 2, V2 = 1, so [[5, 2], [2, 3]]; its inverse is [[3, -2], [-2, 5]] / 11."""
    prototypes = made("full")
    prototypes.set(4, torch.tensor([1.0, 0.0]), 10, torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    distances, label = prototypes.nearest(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 1, "mahalanobis")
    torch.testing.assert_close(distances[:, 0], torch.tensor([4 / 11, 20 / 11], dtype=torch.float64).sqrt())
    assert label.tolist() == [[4], [4]]
    correlated, _ = prototypes.nearest(torch.tensor([[1.0, 2.0]]), 1, "mahalanobis", correlation=True)  # [[1, r], [r, 1]], r^2 = 4/15
    torch.testing.assert_close(correlated[0, 0], torch.tensor(4 / (1 - 4 / 15), dtype=torch.float64).sqrt())


@pytest.mark.parametrize("kind", ["diagonal", "full", "shared"])
def test_with_the_identity_mahalanobis_is_the_nearest_mean(kind: str) -> None:
    generator = torch.Generator().manual_seed(6)
    means = normalize(torch.randn(12, 6, generator=generator, dtype=torch.float64), dim=1)
    queries = normalize(torch.randn(50, 6, generator=generator, dtype=torch.float64), dim=1)
    prototypes = made(kind)
    for label, mean in enumerate(means):
        prototypes.set(label, mean, 9, torch.ones(6) if kind == "diagonal" else torch.eye(6))
    for shrinkage in ((0.0, 0.0), (1.0, 1.0)):
        for one, other in zip(
            prototypes.nearest(queries, 5, "mahalanobis", shrinkage, correlation=True), prototypes.nearest(queries, 5), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_the_shared_covariance_ranks_as_slda_does() -> None:
    features, labels = stream(400, 5, 4)
    prototypes = fed("shared", features, labels, 32)
    epsilon = 1e-2
    shared = prototypes.covariances()
    precision = torch.linalg.inv((1 - epsilon) * shared + epsilon * torch.eye(5, dtype=torch.float64))
    means = prototypes.means()
    scores = features @ (means @ precision).T - 0.5 * ((means @ precision) * means).sum(dim=1)
    amount = epsilon / ((1 - epsilon) * float(shared.diagonal().mean()))
    assert torch.equal(
        prototypes.nearest(features, 4, "mahalanobis", (amount, 0.0))[1], prototypes.labels()[scores.argsort(1, descending=True)]
    )


@pytest.mark.parametrize("kind", ["diagonal", "full", "shared"])
def test_fewer_samples_than_dimensions_are_shrunk_or_refused_and_never_nan(kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(9, 20, generator=generator)
    features[:, 3] = 1.5  # a dimension that never moves
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])  # class 2 has one sample
    prototypes = fed(kind, features, labels, dtype=torch.float32)
    distances, found = prototypes.nearest(features, 3, "mahalanobis")
    assert bool(torch.isfinite(distances).all()) and found[:, 0].tolist() == labels.tolist()
    with pytest.raises(ConfigError, match=r"covariance.* cannot be inverted with shrinkage \(0, 0\), in 20 dimensions: raise the first"):
        prototypes.nearest(features, 1, "mahalanobis", (0.0, 0.0))
    alone = fed(kind, features[-1:], labels[-1:])
    with pytest.raises(DataError, match="two samples that differ"):
        alone.nearest(features, 1, "mahalanobis")


def test_a_class_of_one_sample_is_measured_by_the_pooled_covariance() -> None:
    features, labels = stream(100, 3, 2)
    alone = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    full = fed("full", torch.cat([features, alone]), torch.cat([labels, torch.tensor([9])]))
    shared = fed("shared", torch.cat([features, alone]), torch.cat([labels, torch.tensor([9])]))
    pick = (slice(None), full.labels().tolist().index(9))
    ordered = [m.nearest(features, 3, "mahalanobis") for m in (full, shared)]
    ours, theirs = (torch.where(found == 9, distances, 0).sum(dim=1) for distances, found in ordered)
    torch.testing.assert_close(ours, theirs)
    assert pick[1] == 2


# -- several prototypes per class --------------------------------------------------------------------------------------------------


def blobs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two classes of three well separated heaps each: features, labels, heap."""
    generator = torch.Generator().manual_seed(seed)
    heap = torch.randint(6, (600,), generator=generator)
    centres = 100 * torch.eye(6, dtype=torch.float64)
    return centres[heap] + torch.randn(600, 6, generator=generator, dtype=torch.float64), heap // 3, heap


@pytest.mark.parametrize("size", [600, 60])
def test_several_prototypes_find_the_heaps_of_a_class(size: int) -> None:
    features, labels, heap = blobs()
    prototypes = fed("full", features, labels, size, per_class=3)
    assert sorted(prototypes.labels().tolist()) == [0, 0, 0, 1, 1, 1]
    _, found = prototypes.nearest(100 * torch.eye(6), 1)
    assert found[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    for one in range(6):  # what joined is known here, so its statistics are exact
        row = int((prototypes.means() - 100 * torch.eye(6)[one]).square().sum(dim=1).argmin())
        own = features[heap == one]
        assert int(prototypes.counts()[row]) == len(own)
        torch.testing.assert_close(prototypes.means()[row], own.mean(dim=0))
        torch.testing.assert_close(prototypes.covariances()[row], own.T.cov())
    assert torch.equal(prototypes.means(), fed("full", features, labels, size, per_class=3).means())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from(KINDS), st.integers(0, 5))
def test_counts_and_means_over_the_prototypes_of_a_class_stay_exact(per_class: int, size: int, kind: str, seed: int) -> None:
    features, labels = stream(70, 3, 3, seed=seed)
    features = features.round()  # some samples coincide
    prototypes = fed(kind, features, labels, size, per_class=per_class)
    for label in labels.unique().tolist():
        mine = prototypes.labels() == label
        own = features[labels == label]
        counts = prototypes.counts()[mine]
        assert 1 <= int(mine.sum()) <= per_class and int(counts.sum()) == len(own) and int(counts.min()) > 0
        torch.testing.assert_close((prototypes.means()[mine] * counts[:, None]).sum(dim=0) / len(own), own.mean(dim=0))
    if kind != "none":
        assert bool(torch.isfinite(prototypes.covariances()).all())
    with pytest.raises(ConfigError, match="cannot be taken back from several prototypes"):
        fed(kind, features, labels, per_class=2).remove(features, labels)


def test_several_prototypes_merge_by_the_nearest_of_the_class() -> None:
    features, labels, _ = blobs()
    one, other = (fed("diagonal", features[part], labels[part], per_class=3) for part in (slice(0, 300), slice(300, 600)))
    one.merge(other)
    joint = fed("diagonal", features, labels, per_class=3)
    order, theirs = one.means().sum(dim=1).argsort(), joint.means().sum(dim=1).argsort()
    nearest = torch.cdist(one.means(), joint.means()).argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(6)) and len(order) == len(theirs)
    torch.testing.assert_close(one.means(), joint.means()[nearest])
    torch.testing.assert_close(one.covariances(), joint.covariances()[nearest])
    assert torch.equal(one.counts(), joint.counts()[nearest])


def test_merging_fills_the_places_that_a_class_has_left() -> None:
    one, other = made(per_class=3), made(per_class=3)
    one.update(torch.tensor([[0.0], [0.0]]), torch.tensor([4, 4]))
    other.update(torch.tensor([[10.0], [10.0], [1.0]]), torch.tensor([4, 4, 6]))
    one.merge(other)
    assert one.labels().tolist() == [4, 4, 6] and one.means().flatten().tolist() == [0, 10, 1] and one.counts().tolist() == [2, 2, 1]


# -- drift and pseudo-features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "floor"), [(0.3, 0.0), (4.0, 1e-5), (1e-3, 0.0), (1e-3, 1e-5)])
def test_a_pure_translation_shifts_every_mean_by_itself(sigma: float, floor: float) -> None:
    """Also where every weight would underflow."""
    features, labels = stream(50, 4, 3)
    prototypes = fed("full", features, labels)
    means, covariances = prototypes.means(), prototypes.covariances()
    way = torch.tensor([1.0, -2.0, 0.5, 100.0], dtype=torch.float64)
    prototypes.shift(features, features + way, sigma, floor)
    torch.testing.assert_close(prototypes.means(), means + way, rtol=1e-12, atol=1e-12)
    assert torch.equal(prototypes.covariances(), covariances)


def test_shift_is_the_weighted_mean_worked_out_by_hand() -> None:
    prototypes = made("none")
    for label, mean in ((0, [0.0, 0.0]), (1, [3.0, 4.0])):
        prototypes.set(label, torch.tensor(mean), 5)
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    after = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    near, far = np.exp(-1 / 2) + 0.1, np.exp(-4 / 2) + 0.1  # squared distances 1 and 4 from class 0, sigma 1, floor 0.1
    prototypes.shift(before, after, 1.0, 0.1, labels=torch.tensor([0]))
    expected = [near / (near + far) * 1.0, far / (near + far) * 3.0]
    np.testing.assert_allclose(prototypes.means()[0], expected, rtol=1e-12)
    assert prototypes.means()[1].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("kind", ["diagonal", "full", "shared"])
def test_drawn_features_have_the_mean_and_covariance_of_their_class(kind: str) -> None:
    features, labels = stream(300, 3, 2)
    prototypes = fed(kind, features, labels)
    count = 40_000
    drawn, names = prototypes.draw(count, generator=torch.Generator().manual_seed(8))
    again, _ = prototypes.draw(count, generator=torch.Generator().manual_seed(8))
    assert torch.equal(drawn, again) and drawn.shape == (2 * count, 3) and drawn.dtype == torch.float64
    assert names.tolist() == [prototypes.labels()[0].item()] * count + [prototypes.labels()[1].item()] * count
    for row, label in enumerate(prototypes.labels().tolist()):
        own = drawn[names == label]
        covariance = prototypes.covariances() if kind == "shared" else prototypes.covariances()[row]
        covariance = covariance.diag() if kind == "diagonal" else covariance
        deviation = covariance.diagonal().sqrt()
        # five standard errors: sqrt(v / n) of a mean, sqrt((v_i v_j + c^2) / n) of a covariance
        assert bool(((own.mean(dim=0) - prototypes.means()[row]).abs() < 5 * deviation / count**0.5).all())
        error = ((deviation[:, None] * deviation) ** 2 + covariance**2).sqrt() / count**0.5
        assert bool(((own.T.cov() - covariance).abs() < 5 * error).all())


def test_what_is_drawn_from_a_degenerate_covariance_lies_where_the_samples_did() -> None:
    generator = torch.Generator().manual_seed(9)
    plane = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    features = torch.randn(30, 2, generator=generator, dtype=torch.float64) @ plane + 3
    prototypes = fed("full", features, torch.zeros(30, dtype=torch.int64))
    prototypes.update(torch.ones(1, 6), torch.tensor([5]))
    drawn, names = prototypes.draw(50, generator=generator)
    offset = drawn[names == 0] - 3
    residual = offset - offset @ torch.linalg.pinv(plane) @ plane
    assert float(residual.abs().max()) < 1e-6 and float(offset.abs().max()) > 1
    assert torch.equal(drawn[names == 5], torch.ones(50, 6, dtype=torch.float64))  # one sample: nothing to draw around
    only, names = prototypes.draw(4, labels=torch.tensor([5, 0]), generator=generator)
    assert names.tolist() == [5] * 4 + [0] * 4 and torch.equal(only[:4], torch.ones(4, 6, dtype=torch.float64))


def test_of_several_prototypes_each_is_drawn_in_proportion_to_its_samples() -> None:
    features, labels, _ = blobs()
    prototypes = fed("full", features, labels, per_class=3)
    drawn, names = prototypes.draw(3000, generator=torch.Generator().manual_seed(10))
    rows = torch.cdist(drawn, prototypes.means()).argmin(dim=1)
    assert torch.equal(prototypes.labels()[rows], names)
    share = prototypes.counts() / torch.tensor([int(prototypes.counts()[prototypes.labels() == n].sum()) for n in prototypes.labels()])
    found = rows.bincount(minlength=6) / 3000
    assert bool(((found - share).abs() < 5 * (share * (1 - share) / 3000).sqrt()).all())


# -- bad input ---------------------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused_in_one_sentence_and_changes_nothing() -> None:
    features, labels = stream(40, 3, 2)
    prototypes = fed("full", features, labels)
    before = flatten(prototypes.state())[1]
    bad = features.clone()
    bad[[4, 9], 1] = torch.tensor([float("nan"), float("inf")], dtype=torch.float64)
    for call, message in (
        (lambda: prototypes.update(bad, labels), r"2 features are NaN or infinite \(rows \[4, 9\]\)"),
        (lambda: prototypes.nearest(bad), r"2 features are NaN or infinite \(rows \[4, 9\]\)"),
        (lambda: prototypes.update(features[:, :2], labels), "features have 2 dimensions and the prototypes 3"),
        (lambda: prototypes.update(features[0], labels), r"features are \(3,\), and prototypes take"),
        (lambda: prototypes.update(features, labels[:-1]), "40 features need as many labels"),
        (lambda: prototypes.update(features, labels.double()), "whole numbers"),
        (lambda: prototypes.update(features, labels - 1), r"labels are below 0 \(rows"),
        (lambda: prototypes.remove(features[:1], torch.tensor([8])), "1 of class 8, which has 0"),
        (lambda: prototypes.remove(torch.cat([features] * 2), torch.cat([labels] * 2)), "more samples would be taken back"),
        (lambda: prototypes.draw(3, labels=torch.tensor([0, 8])), r"classes \[8\] have no prototype"),
        (lambda: prototypes.shift(features, features[:-1]), "40 before and 39 after"),
        (lambda: prototypes.shift(features, features, labels=torch.tensor([8])), r"classes \[8\] have no prototype"),
        (lambda: prototypes.set(8, features[0], 3), "class 8 cannot be set without one"),
        (lambda: prototypes.set(8, features[0], 3, torch.ones(3)), r"is \(3,\), and these prototypes take \(3, 3\)"),
        (lambda: prototypes.set(8, features[0], 0, torch.eye(3)), "cannot stand for 0 samples"),
        (lambda: prototypes.merge(fed("full", features[:, :2], labels)), "of 2 dimensions do not merge with those of 3"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    for call, message in (
        (lambda: prototypes.nearest(features, 0), "the 0 nearest"),
        (lambda: prototypes.nearest(features, 1, "manhattan"), "unknown metric 'manhattan'"),  # type: ignore[arg-type]
        (lambda: prototypes.nearest(features, 1, "mahalanobis", (-1.0, 0.0)), "at least 0"),
        (lambda: prototypes.draw(0), "at least one"),
        (lambda: prototypes.shift(features, features, sigma=0.0), "sigma is above 0"),
        (lambda: prototypes.merge(made("none")), "do not merge"),
        (lambda: prototypes.merge(object()), "not with object"),  # type: ignore[arg-type]
        (lambda: prototypes.configure("half"), "unknown covariance 'half'"),  # type: ignore[arg-type]
        (lambda: prototypes.configure("none", 0), "per_class is 0"),
        (lambda: prototypes.configure("none", 1, torch.float16), "float32 or float64"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert all(torch.equal(value, before[name]) for name, value in flatten(prototypes.state())[1].items())


def test_what_is_not_kept_cannot_be_asked_for() -> None:
    features, labels = stream(40, 3, 2)
    plain, shared, empty = fed("none", features, labels), fed("shared", features, labels), made("full")
    for call in (
        plain.covariances,
        lambda: plain.draw(2),
        lambda: plain.nearest(features, 1, "mahalanobis"),
        lambda: plain.set(0, features[0], 2, torch.eye(3)),
    ):
        with pytest.raises(ConfigError, match="configure covariance="):
            call()
    with pytest.raises(ConfigError, match="part of the shared covariance already"):
        shared.set(0, features[0], 2, torch.eye(3))
    for call in (
        empty.means,
        empty.covariances,
        lambda: empty.nearest(features),
        lambda: empty.draw(2),
        lambda: empty.shift(features, features),
    ):
        with pytest.raises(DataError, match="there is no prototype yet"):
            call()
    assert empty.labels().tolist() == empty.counts().tolist() == []
    empty.update(features[:0], labels[:0])
    assert len(empty) == 0
