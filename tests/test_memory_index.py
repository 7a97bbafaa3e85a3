"""The vector index finds what a search through everything finds, by every kind of FAISS index, and never loses or mixes up an id."""

from __future__ import annotations

import ctypes
import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import streamcl.memory.chunked as chunked
import streamcl.memory.index as module
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.memory.chunked import Vectors, engine_for, nearest
from streamcl.memory.index import Index, Rows, Structure, points_to_train
from torch import Tensor
from torch.nn.functional import normalize

from streamcl.checkpoint import flatten, tree_bytes, unflatten
from streamcl.contracts import FeatureIndex
from streamcl.errors import ConfigError, DataError, DiskError

DIM = 8
FAMILIES = ["Flat", "IVF2,Flat", "HNSW8", "SQfp16", "IVF2,Flat,RFlat"]
METRICS = ["l2", "ip", "cosine"]


def widest(kind: str) -> int | None:
    """With this width an index of a few hundred vectors visits them all."""
    return 2 if "IVF2" in kind else 2000 if "HNSW" in kind else None


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Graphs are the same from run to run on one thread only."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes train on two vectors for each centroid, not on FAISS's 39."""
    monkeypatch.setattr(module, "POINTS", 2)


def points(count: int, seed: int = 0, dim: int = DIM) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32))


def filled(kind: str = "Flat", metric: Any = "l2", count: int = 60, **options: Any) -> tuple[Index, Tensor, Tensor]:
    index, ids, vectors = Index(DIM, metric, kind, **options), torch.arange(count) * 3 + 5, points(count)
    index.add(ids, vectors)
    return index, ids, vectors


def table(metric: str, queries: Tensor, vectors: Tensor) -> np.ndarray:
    """Distances by the definition, in float64  # (queries, vectors)"""
    a, b = queries.double().numpy(), vectors.double().numpy()
    if metric == "cosine":
        a, b = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300) for v in (a, b))
    return ((a[:, None] - b[None]) ** 2).sum(axis=2) if metric == "l2" else a @ b.T


def agree(index: Index, held: dict[int, Tensor], queries: Tensor, k: int, found: tuple[Tensor, Tensor], atol: float = 1e-4) -> None:
    """The result is that of a search through everything: right distances in order, ids that go with them, each once."""
    distances, ids = found
    assert distances.shape == ids.shape == (len(queries), k) and ids.dtype == torch.int64
    there = min(k, len(held))
    worst = float("inf") if index.metric == "l2" else float("-inf")
    assert bool((ids[:, there:] == -1).all()) and bool((distances[:, there:] == worst).all())
    if not there:
        return
    keys = list(held)
    true = table(index.metric, queries, torch.stack([held[key] for key in keys]))
    column = {key: i for i, key in enumerate(keys)}
    for row in range(len(queries)):
        mine = ids[row, :there].tolist()
        assert len(set(mine)) == there and set(mine) <= set(keys)
        np.testing.assert_allclose(distances[row, :there], true[row, [column[key] for key in mine]], atol=atol)
        best = np.sort(true[row])[:there] if index.metric == "l2" else -np.sort(-true[row])[:there]
        np.testing.assert_allclose(distances[row, :there], best, atol=atol)


# Sequences of calls against a dictionary

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40)),
        st.tuples(st.just("remove"), st.integers(1, 30)),
        st.tuples(st.just("update"), st.integers(1, 20)),
        st.tuples(st.just("search"), st.integers(1, 12)),
        st.tuples(st.just("where"), st.integers(1, 12)),
        st.tuples(st.just("restore"), st.just(0)),
        st.tuples(st.just("save"), st.just(0)),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    min_size=4,
    max_size=14,
)


def play(index: Index, steps: list[tuple[str, int]], seed: int, path: Path, check: Callable[..., None]) -> None:
    draw, held, used = np.random.default_rng(seed), {}, 0
    everything = draw.permutation(2000) * 7919 - 1000 * 7919  # below and above zero, never -1
    for verb, number in steps:
        vectors = torch.from_numpy(draw.normal(size=(number, DIM)).astype(np.float32))
        known = draw.permutation(np.array(sorted(held), dtype=np.int64))[:number]
        if verb == "add":
            ids, used = everything[used : used + number], used + number
            index.add(torch.from_numpy(ids), vectors)
            held.update(zip(ids.tolist(), vectors, strict=True))
        elif verb == "remove":
            assert index.remove(torch.from_numpy(np.append(known, 1))) == len(known)
            for key in known.tolist():
                del held[key]
        elif verb == "update":
            ids = np.append(known[: number - 1], everything[used])
            used += 1
            index.update(torch.from_numpy(ids), vectors[: len(ids)])
            held.update(zip(ids.tolist(), vectors[: len(ids)], strict=True))
        elif verb in ("search", "where"):
            queries = torch.from_numpy(draw.normal(size=(1 + number // 4, DIM)).astype(np.float32))
            if verb == "where":
                chosen = {key: held[key] for key in known.tolist()}
                check(index, chosen, queries, number, index.search(queries, number, where=torch.tensor([*chosen, 1, *chosen])))
            check(index, held, queries, number, index.search(queries, number))
        elif verb == "restore":
            fresh = Index(DIM, index.metric, index.kind, index.asked, index.float16, width=index.width)
            fresh.restore(index.state())
            index = fresh
        elif verb == "save":
            index.save(path)
            index = Index.load(path)
        elif held:
            assert index.remove(torch.tensor(sorted(held))) == len(held)
            held = {}
        assert len(index) == len(held) and index.nbytes() == tree_bytes(index.state())
        if held:
            keys = torch.tensor(sorted(held))
            stored = torch.stack([held[key] for key in keys.tolist()])
            check_stored(index, index.reconstruct(keys), normalize(stored) if index.metric == "cosine" else stored)


def check_stored(index: Index, got: Tensor, expected: Tensor) -> None:
    if index.kind == "L2norm,Flat":
        expected = normalize(expected)
    if "PQ" not in index.kind:
        torch.testing.assert_close(got, expected, atol=2e-3 if "16" in index.kind or index.float16 else 1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["Flat", "IVF2,Flat", "SQfp16", "HNSW8", "IVF2,Flat,RFlat", "PCA8,IVF2,Flat"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(steps=STEPS, seed=st.integers(0, 999), metric=st.sampled_from(METRICS))
def test_any_sequence_of_calls_finds_what_a_dictionary_holds(
    kind: str, steps: list[tuple[str, int]], seed: int, metric: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POINTS", 4)
        index = Index(DIM, metric, kind, width=widest(kind))
        play(index, steps, seed, tmp_path_factory.getbasetemp() / "a.index", lambda *a: agree(*a, atol=3e-2 if kind == "SQfp16" else 1e-3))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(steps=STEPS, seed=st.integers(0, 999), metric=st.sampled_from(METRICS))
def test_any_sequence_of_calls_keeps_the_ids_of_a_compressed_index(
    steps: list[tuple[str, int]], seed: int, metric: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def live(index: Index, held: dict[int, Tensor], queries: Tensor, k: int, found: tuple[Tensor, Tensor]) -> None:
        there = min(k, len(held))
        for row in found[1]:
            assert set(row[:there].tolist()) <= set(held) and len(set(row.tolist())) == min(there + 1, k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POINTS", 1)
        play(Index(DIM, metric, "IVF2,PQ2x4", width=2), steps, seed, tmp_path_factory.getbasetemp() / "a.index", live)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=STEPS, seed=st.integers(0, 999), metric=st.sampled_from(METRICS), float16=st.booleans(), large=st.booleans())
def test_any_sequence_of_calls_on_an_index_that_changes_its_kind(
    steps: list[tuple[str, int]], seed: int, metric: Any, float16: bool, large: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AUTO_VECTORS", 20), ("AUTO_QUERIES", 1), ("AUTO_IVF", 0 if large else 1000), ("POINTS", 2)):
            patch.setattr(module, name, value)
        patch.setattr(Index, "_widest", lambda self, built: 2000 if built.family == "graph" else built.core.nlist)
        patch.setattr(module, "RECALL", 1.1)  # never enough: the widest search
        patch.setattr(Index, "_build", accepting(Index._build))
        index = Index(DIM, metric, float16=float16)
        play(index, steps, seed, tmp_path_factory.getbasetemp() / "a.index", lambda *a: agree(*a, atol=3e-2 if float16 else 1e-3))


def accepting(build: Callable[[Index], None]) -> Callable[[Index], None]:
    """`_build` that tunes to the widest, and then takes what it has."""

    def accept(self: Index) -> None:
        tune = Index._tune
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Index, "_tune", lambda *a: tune(*a) + 1)
            build(self)

    return accept


def test_a_graph_that_cannot_be_small_lies_flat_while_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NSG_LEAST", 150)
    index, ids, vectors = filled("NSG8", count=149)
    assert index.about()["kind"] == "Flat" and not index.about()["trained"]
    index.add(torch.tensor([-5, -4]), points(2, 1))
    assert index.about()["kind"] == "NSG8" and index.search(points(2, 1), 1)[1].flatten().tolist() == [-5, -4]
    index.remove(ids[:2])
    assert index.about()["kind"] == "Flat" and len(index) == 149
    held = {**dict(zip(ids[2:].tolist(), vectors[2:], strict=True)), -5: points(2, 1)[0], -4: points(2, 1)[1]}
    agree(index, held, points(5, 2), 5, index.search(points(5, 2), 5))
    index.add(ids[:9] + 1, points(9, 3))
    assert index.about()["kind"] == "NSG8" and len(index) == 158


def test_rows_are_a_dictionary() -> None:
    rows, model, draw = Rows(), {}, np.random.default_rng(0)
    for step in range(200):
        ids = draw.choice(5000, size=draw.integers(1, 60), replace=False) * 1024 - 10_000  # alike in their low bits
        there = np.array([key in model for key in ids.tolist()])
        found = rows.find(ids)
        assert found.tolist() == [model.get(key, -1) for key in ids.tolist()]
        if step % 3 == 2:
            rows.leave(found[there], reuse=True)
            for key in ids[there].tolist():
                del model[key]
        else:
            fresh = ids[~there] if len(ids[~there]) else ids[:0]
            if there.any():
                with pytest.raises(DataError, match="in the index already"):
                    rows.enter(ids)
            if len(fresh):
                model.update(zip(fresh.tolist(), rows.enter(fresh).tolist(), strict=True))
        assert rows.held == len(model) and len(set(model.values())) == len(model)
        assert all(rows.of[row] == key for key, row in model.items())
        with pytest.raises(DataError, match="id 77 is twice in one call"):
            rows.enter(np.array([77, 78, 77]))
        assert rows.find(np.array([77, 78])).tolist() == [-1, -1]
    assert rows.count <= 3000  # rows that were given up are used again


# What a search means


def test_distances_are_those_of_the_metric() -> None:
    vectors, query = torch.tensor([[3.0, 4.0], [0.0, 1.0], [-2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    expected = {
        "l2": ([1, 13, 10], [1, 2, 0], [1.0, 10.0, 13.0]),
        "ip": ([7, 1, -2], [0, 1, 2], [7.0, 1.0, -2.0]),
        "cosine": (None, [0, 1, 2], [7 / (5 * 2**0.5), 1 / 2**0.5, -1 / 2**0.5]),
    }
    for metric, (_, order, distances) in expected.items():
        for kind in ("Flat", "HNSW8", "auto", "SQfp16"):
            index = Index(2, metric, kind)  # type: ignore[arg-type]
            index.add(torch.tensor([10, 11, 12]), vectors)
            got, ids = index.search(query, 3)
            assert (ids[0] - 10).tolist() == order
            torch.testing.assert_close(got[0], torch.tensor(distances), atol=1e-3, rtol=0)


def test_cosine_stores_what_has_length_one() -> None:
    index = Index(2, "cosine", "Flat")
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e25, 4e25], [3e-25, 4e-25], [-4e37, 3e37]])
    index.add(torch.arange(5), vectors)
    stored = index.reconstruct(torch.arange(5))
    torch.testing.assert_close(stored, torch.tensor([[0.6, 0.8], [0, 0], [0.6, 0.8], [0.6, 0.8], [-0.8, 0.6]]))
    distances, ids = index.search(torch.tensor([[6e20, 8e20]]), 5)
    assert set(ids[0, :3].tolist()) == {0, 2, 3} and ids[0, 3:].tolist() in ([1, 4], [4, 1])
    torch.testing.assert_close(distances[0], torch.tensor([1.0, 1, 1, 0, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("metric", METRICS)
def test_where_finds_the_nearest_of_what_it_names(kind: str, metric: Any, eager: None) -> None:
    index, ids, vectors = filled(kind, metric, width=widest(kind))
    for chosen in (ids[:2], ids[10:50], torch.cat([ids[20:25], torch.tensor([1, 10**12, -7]), ids[20:25]])):
        held = {int(i): vectors[(ids == i).nonzero()[0, 0]] for i in chosen.tolist() if i in ids}
        for queries in (points(3, 1), points(30, 2)):
            agree(index, held, queries, 7, index.search(queries, 7, where=chosen), atol=2e-2)
    distances, found = index.search(points(3, 1), 2, where=torch.tensor([1, 2]))
    assert bool((found == -1).all()) and bool(distances.isinf().all())
    assert index.search(points(3, 1), 2, where=ids[:0])[1].tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize("kind", ["HNSW8", "IVF8,Flat"])
def test_a_few_named_among_many_are_all_found(kind: str) -> None:
    index, ids, vectors = filled(kind, count=2000, width=1)  # a narrow search would not come by them
    named = torch.arange(0, 2000, 250)
    for k in (1, 5):
        agree(index, {int(ids[i]): vectors[i] for i in named}, points(40, 1), k, index.search(points(40, 1), k, where=ids[named]))


@pytest.mark.parametrize("kind", FAMILIES)
def test_more_neighbours_than_there_are(kind: str, eager: None) -> None:
    index, ids, vectors = filled(kind, width=1 if "IVF" in kind or "HNSW" in kind else None)
    held = dict(zip(ids.tolist(), vectors, strict=True))
    agree(index, held, points(4, 1), 61, index.search(points(4, 1), 61), atol=2e-2)
    agree(index, held, points(4, 1), 60, index.search(points(4, 1), 60), atol=2e-2)  # even a narrow search finds all there are
    index.remove(ids)
    distances, found = index.search(points(2), 3)
    assert found.tolist() == [[-1] * 3] * 2 and bool((distances == float("inf")).all())


def test_an_empty_index_answers() -> None:
    for kind in ("auto", "Flat", "HNSW8", "IVF2,Flat"):
        index = Index(DIM, "ip", kind)
        distances, ids = index.search(points(2), 4)
        assert ids.tolist() == [[-1] * 4] * 2 and distances.tolist() == [[float("-inf")] * 4] * 2
        assert [len(part) for part in index.range_search(points(2), 0.5)] == [3, 0, 0]
        assert len(index) == index.remove(torch.tensor([3])) == index.nbytes() - tree_bytes(index.state()) == 0
        assert index.search(points(2)[:0], 4)[0].shape == (0, 4)
        index.add(torch.empty(0, dtype=torch.int64), torch.empty(0, DIM))
        assert len(index) == 0 and index.about()["vectors"] == 0
        assert isinstance(index, FeatureIndex)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("metric", METRICS)
def test_range_search_finds_everything_within(kind: str, metric: Any, eager: None) -> None:
    index, ids, vectors = filled(kind, metric, width=widest(kind))
    index.remove(ids[5:20])
    keep = torch.cat([torch.arange(5), torch.arange(20, 60)])
    queries, radius = points(6, 1), {"l2": 9.0, "ip": 1.0, "cosine": 0.2}[metric]
    true = table(metric, queries, vectors[keep])
    limits, distances, found = index.range_search(queries, radius)
    assert limits[0] == 0 and len(limits) == 7
    for row in range(6):
        hit = slice(int(limits[row]), int(limits[row + 1]))
        within = true[row] < radius if metric == "l2" else true[row] > radius
        assert set(found[hit].tolist()) == set(ids[keep][torch.from_numpy(within)].tolist())
        order = np.sort(true[row][within]) if metric == "l2" else -np.sort(-true[row][within])
        np.testing.assert_allclose(distances[hit], order, atol=2e-2)


def test_the_radius_itself_is_outside() -> None:
    index = Index(1, "l2", "Flat")
    index.add(torch.arange(4), torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    limits, distances, ids = index.range_search(torch.tensor([[0.0], [3.0]]), 4.0)
    assert limits.tolist() == [0, 2, 4] and ids.tolist() == [0, 1, 3, 2] and distances.tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match="radius is NaN"):
        index.range_search(torch.tensor([[0.0]]), float("nan"))


def test_any_floating_point_comes_in_and_no_gradient_goes_out() -> None:
    index = Index(DIM, "l2", "Flat")
    for i, dtype in enumerate((torch.float64, torch.bfloat16, torch.float16, torch.int32)):
        index.add(torch.tensor([i], dtype=torch.int32), torch.full((1, DIM), float(i), dtype=dtype))
    index.add(torch.tensor([9], dtype=torch.uint8), points(3).T.contiguous().T[:1].requires_grad_())
    distances, ids = index.search(torch.full((1, DIM), 2.0, requires_grad=True), 1)
    assert ids.item() == 2 and not distances.requires_grad and distances.item() == 0


# Exact search in torch


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block", [1, 7 * 20, 2**24])
def test_chunked_torch_finds_what_faiss_finds(metric: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "SCORES", block)
    index, ids, _ = filled("Flat", metric)
    forced, _, _ = filled("Flat", metric)
    assert forced.flat is not None
    forced.flat.engine = "torch"
    assert forced.about()["device"] == "cpu (torch)" and index.about()["device"] == "cpu (FAISS)"
    for queries in (points(20, 1), points(3, 2)):
        for options in ({}, {"where": ids[::2]}, {"where": ids[:3]}):
            expected = index.search(queries, 5, **options)
            got = forced.search(queries, 5, **options)
            assert torch.equal(got[1], expected[1])
            torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=0)
        index.update(ids[7:40], 0.1 * points(33, 5))  # the lengths that torch keeps of the vectors must follow
        forced.update(ids[7:40], 0.1 * points(33, 5))
        index.remove(ids[30:33])
        forced.remove(ids[30:33])


def test_many_queries_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "QUERIES", 7)
    vectors = Vectors(DIM, torch.device("cpu"), torch.float32)
    vectors.append(points(50))
    whole = nearest(vectors, points(30, 1), 3, "l2")
    vectors.engine = "torch"
    assert torch.equal(nearest(vectors, points(30, 1), 3, "l2")[1], whole[1])


def test_a_search_is_exact_within_mixed_precision() -> None:
    index, _, _ = filled("Flat", float16=True)
    expected = index.search(points(20, 1), 5)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = index.search(points(20, 1), 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_what_is_no_longer_held_takes_no_memory() -> None:
    index, ids, vectors = filled(count=1000)
    assert index.flat is not None
    index.remove(ids[:900])
    assert len(index.flat.buffer) == 100
    agree(index, dict(zip(ids[900:].tolist(), vectors[900:], strict=True)), points(25, 1), 5, index.search(points(25, 1), 5))


def test_float16_halves_what_lies_flat() -> None:
    index, ids, vectors = filled("Flat", float16=True)
    assert index.nbytes() == 60 * (8 + 2 * DIM)
    half = vectors.half().float()
    assert torch.equal(index.reconstruct(ids), half)
    agree(index, dict(zip(ids.tolist(), half, strict=True)), points(4, 1), 5, index.search(points(4, 1), 5))
    with pytest.raises(DataError, match=r"the vector of id 1 is too large for float16"):
        index.add(torch.tensor([0, 1]), torch.tensor([[1.0] * DIM, [1e5] * DIM]))
    assert len(index) == 60


# What is refused


def bad(row: int, value: float) -> Tensor:
    vectors = points(8)
    vectors[row, 3] = value
    return vectors


@pytest.mark.parametrize("kind", FAMILIES)
def test_bad_input_is_named_and_changes_nothing(kind: str, eager: None) -> None:
    index, ids, _ = filled(kind)
    new = torch.arange(100_000, 100_008)
    before = flatten(index.state())
    cases: list[tuple[str, Callable[[], Any]]] = [
        (r"the vector of id 100002 is NaN or infinite", lambda: index.add(new, bad(2, float("nan")))),
        (r"the vector of id 100004 is NaN or infinite", lambda: index.update(new, bad(4, float("-inf")))),
        (r"vectors of ids 100000, 100001, 100002, 100003, 100004 and 3 more are NaN", lambda: index.add(new, points(8) * float("nan"))),
        (r"query 5 is NaN or infinite", lambda: index.search(bad(5, float("inf")), 2)),
        (r"the vector of id 100001 is too long", lambda: index.add(new, bad(1, 1e19))),
        (r"shape \(8, 5\) do not fit an index of 8 dimensions", lambda: index.add(new, points(8)[:, :5])),
        (r"shape \(8,\) do not fit", lambda: index.search(points(8)[0], 1)),
        (r"shape list do not fit", lambda: index.search([[0.0] * 8], 1)),  # type: ignore[arg-type]
        (r"8 ids came with vectors of shape \(7, 8\)", lambda: index.add(new, points(7))),
        (r"ids 5, 8 are in the index already", lambda: index.add(torch.cat([new[:6], ids[:2]]), points(8))),
        (r"id 100001 is twice in one call", lambda: index.add(new[[0, 1, 1, 2]], points(4))),
        (r"id 3 is twice in one call", lambda: index.add(torch.tensor([3, 3]), points(2))),
        (r"id 100001 is twice in one call", lambda: index.update(new[[0, 1, 1, 2]], points(4))),
        (r"id -1 stands for no sample", lambda: index.add(torch.tensor([7, -1]), points(2))),
        (r"one row of whole numbers, not as torch.float32 of shape \(8,\)", lambda: index.add(new.float(), points(8))),
        (r"one row of whole numbers, not as torch.int64 of shape \(2, 4\)", lambda: index.remove(new.view(2, 4))),
        (r"one row of whole numbers, not as list", lambda: index.search(points(1), 1, where=[1])),  # type: ignore[arg-type]
        (r"a search for 0 neighbours", lambda: index.search(points(1), 0)),
        (r"a search for 2.5 neighbours", lambda: index.search(points(1), 2.5)),  # type: ignore[arg-type]
        (r"ids 100000, 4 are not in the index", lambda: index.reconstruct(torch.tensor([5, 100_000, 4]))),
    ]
    for message, call in cases:
        with pytest.raises(DataError, match=message):
            call()
        after = flatten(index.state())
        assert after[0] == before[0] and all(torch.equal(after[1][name], tensor) for name, tensor in before[1].items()), message
    index.add(new, points(8))
    index.add(torch.tensor([3, 4]), points(2))
    assert len(index) == 70


def test_a_setting_that_cannot_be_is_refused_when_it_is_set() -> None:
    for kind in ("Nonsense", "", "IVF,Flat", "PQ3", "IVF10,PQ7x4", "HNSW32,Nothing"):
        with pytest.raises(ConfigError, match=r"is no FAISS index for l2 and 8 dimensions \(.*\): something like auto, Flat, HNSW32"):
            Index(DIM, "l2", kind)
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"gives Hamming distances only", {"kind": "LSH"}),
        (r"gives no vectors back", {"kind": "IVF4,FlatDedup"}),
        (r"knows no ip, only l2", {"kind": "HNSW8,PQ4x4", "metric": "ip"}),
        (r"'IMI2x2,Flat' is no FAISS index for cosine", {"kind": "IMI2x2,Flat", "metric": "cosine"}),
        (r"unknown metric 'euclid'", {"metric": "euclid"}),
        (r"index_device: all: FAISS finds no GPU", {"device": "all"}),
        (r"index_device: moon: no such device", {"device": "moon"}),
        (r"cannot search 0 wide", {"width": 0}),
    ]
    if not torch.cuda.is_available():
        cases.append((r"index_device: cuda: torch finds no GPU here", {"device": "cuda"}))
    for message, options in cases:
        with pytest.raises(ConfigError, match=message):
            Index(DIM, **options)
    with pytest.raises(ConfigError, match="0 dimensions"):
        Index(0)
    assert Index(DIM, kind="IDMap2,HNSW8").kind == "HNSW8" and Index(DIM, kind="IDMap,Flat").kind == Index(DIM, kind="flat").kind == "Flat"


# Training


def test_an_index_is_exact_until_it_has_seen_enough(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    index = Index(DIM, "l2", "IVF4,Flat", log=said.append)
    ids, vectors, queries = torch.arange(200), points(200), points(10, 1)
    index.add(ids[:155], vectors[:155])
    agree(index, dict(zip(ids[:155].tolist(), vectors, strict=False)), queries, 5, index.search(queries, 5), atol=1e-4)
    about = index.about()
    assert (about["kind"], about["trained"], about["recall"], said) == ("Flat", False, 1.0, [])
    assert about["why"] == "IVF4,Flat trains itself at 156 vectors; until then search is exact"
    index.add(ids[155:], vectors[155:])
    about = index.about()
    assert (about["kind"], about["trained"], about["asked"], about["vectors"]) == ("IVF4,Flat", True, "IVF4,Flat", 200)
    assert said == [f"index: IVF4,Flat trained itself on 200 vectors; recall@10 {about['recall']:.3f} with nprobe {about['nprobe']}"]
    assert 0.95 <= about["recall"] <= 1 and about["nprobe"] in (1, 2, 4)
    torch.testing.assert_close(index.reconstruct(ids), vectors)
    out, err = capfd.readouterr()
    assert "WARNING" not in out + err


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        ("HNSW8", 0),
        ("SQfp16", 0),
        ("PCA4,Flat", 10 * DIM),
        ("IVF4,Flat", 39 * 4),
        *((kind, 39 * 16) for kind in ("PQ2x4", "IVF4,PQ2x4", "RQ2x4", "IMI2x4,Flat", "PQ2x4,RFlat", "IVF16_HNSW8,Flat")),
        *((kind, 39 * 256) for kind in ("SQ8", "OPQ2,PQ2x4", "PQ2")),
        ("NSG8", 1000),
    ],
)
def test_what_an_index_needs_to_train_is_what_faiss_asks_for(kind: str, needed: int, capfd: pytest.CaptureFixture[str]) -> None:
    index = faiss.index_factory(DIM, kind)
    assert points_to_train(index, DIM) == needed
    if kind not in ("OPQ2,PQ2x4", "PQ2"):  # these take their time
        index.train(points(needed).numpy())
        out, err = capfd.readouterr()
        assert index.is_trained and "please provide at least" not in out + err


def test_the_same_calls_make_the_same_index() -> None:
    for kind in ("IVF2,PQ2x4", "HNSW8"):
        states = []
        for _ in range(2):
            index = Index(DIM, "l2", kind)
            for start in range(0, 700, 100):
                index.add(torch.arange(start, start + 100), points(100, start))
            index.search(points(5), 3)
            states.append(flatten(index.state()))
        assert states[0][0] == states[1][0] and all(torch.equal(tensor, states[1][1][name]) for name, tensor in states[0][1].items())


def test_deterministic_algorithms_link_a_graph_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    index, threads = Index(DIM, "l2", "HNSW8"), []
    index.add(torch.tensor([1]), points(1))
    assert index.built is not None
    faiss.omp_set_num_threads(2)
    add = index.built.index.add
    monkeypatch.setattr(index.built.index, "add", lambda values: (threads.append(faiss.omp_get_max_threads()), add(values)))
    index.add(torch.tensor([2]), points(1))
    torch.use_deterministic_algorithms(True)
    try:
        index.add(torch.tensor([3]), points(1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert threads == [2, 1] and faiss.omp_get_max_threads() == 2 and len(index) == 3


def test_recall_is_the_share_of_the_true_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLED", 400)  # all that are held: the sample is no matter of chance
    for metric in METRICS:
        index, ids, _ = filled("IVF8,Flat", metric, 400, width=1)
        held = index.reconstruct(ids)
        fifth = np.argsort(table("l2", held, held), axis=1)[:, 5]
        beyond = held + (held - held[fifth]) / 2
        true = table(metric, beyond, held)
        best = np.argsort(true if metric == "l2" else -true, axis=1)[:, :10]
        found = index.built.index.search((normalize(beyond) if metric == "cosine" else beyond).numpy(), 10)[1]  # type: ignore[union-attr]
        shares = [len({*best[i].tolist()} & {*found[i].tolist()}) / 10 for i in range(400)]
        assert index.measure_recall() == pytest.approx(np.mean(shares), abs=1e-3)
        assert index.about()["recall"] == index.measure_recall() < 0.95 and index.about()["recall_of"] == 400
    index.width, index.tuned = None, 0
    index.search(points(1), 1)
    assert index.about()["recall"] >= 0.95 and index.about()["nprobe"] > 1


def test_equal_vectors_are_no_misses() -> None:
    index = Index(DIM, "l2", "HNSW8")
    index.add(torch.arange(100), points(2).repeat(50, 1))
    index.search(points(1), 1)
    assert index.about()["recall"] == 1.0


# `auto`


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AUTO_VECTORS", 100), ("AUTO_QUERIES", 50), ("AUTO_IVF", 1000)):
        monkeypatch.setattr(module, name, value)


def test_auto_changes_when_searches_have_paid_for_it(small: None) -> None:
    said: list[str] = []
    index = Index(DIM, log=said.append)
    vectors = points(150)
    index.add(torch.arange(99), vectors[:99])
    index.search(points(60), 3)
    assert index.about()["kind"] == "Flat" and index.about()["why"] == "below 100 vectors exact search is the cheaper one"
    index.queries = 0
    index.add(torch.arange(99, 150), vectors[99:])
    index.search(points(25), 3)
    assert index.about()["kind"] == "Flat" and "(25 of 50 queries)" in index.about()["why"] and not said
    for _ in range(3):
        index.search(points(1), 3)
    assert index.about()["kind"] == "Flat" and "(46 of 50 queries)" in index.about()["why"]  # alone each costs seven
    expected = index.search(points(20, 3), 3)
    about = index.about()
    assert about["kind"] == "HNSW32,Flat" and about["recall"] >= 0.95 and about["efSearch"] == 16 and about["device"] == "cpu (FAISS)"
    assert about["why"] == "exact search of 150 vectors had cost 66 queries, more than building HNSW32,Flat does"
    assert said == [f"index: HNSW32,Flat from now on: {about['why']}; recall@10 {about['recall']:.3f} with efSearch 16"]
    agree(index, dict(enumerate(vectors)), points(20, 3), 3, expected)


def test_auto_takes_lists_where_a_graph_takes_too_long_and_more_of_them_as_it_grows(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AUTO_IVF", 0)
    monkeypatch.setattr(Index, "_widest", lambda self, built: built.core.nlist)
    said: list[str] = []
    index = Index(DIM, log=said.append)
    index.add(torch.arange(200), points(200))
    index.search(points(50), 3)
    assert index.about()["kind"] == "IVF5,Flat"
    index.add(torch.arange(200, 900), points(700, 1))
    index.search(points(1), 3)
    assert index.about()["kind"] == "IVF23,Flat" and len(said) == 3 and "it grew fourfold" in said[1]
    assert len(index) == 900
    index.remove(torch.arange(900))
    assert index.about()["kind"] == "Flat" and "it was emptied" in said[3]


def test_auto_stays_exact_where_an_index_finds_too_little(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AUTO_IVF", 0)
    monkeypatch.setattr(Index, "_widest", lambda self, built: 1)
    said: list[str] = []
    index = Index(DIM, log=said.append)
    index.add(torch.arange(400), points(400))
    index.search(points(50), 3)
    assert index.about()["kind"] == "Flat" and "tried again at 800 vectors" in index.about()["why"]
    assert len(said) == 1 and "so search stays exact" in said[0]
    index.search(points(100), 3)
    assert len(said) == 1


def test_auto_is_exact_again_when_a_third_of_its_graph_is_gone(small: None) -> None:
    said: list[str] = []
    index = Index(DIM, log=said.append)
    vectors = points(150)
    index.add(torch.arange(150), vectors)
    index.search(points(50), 3)
    index.remove(torch.arange(50))
    assert index.about()["kind"] == "HNSW32,Flat" and index.about()["removed_nodes"] == 50
    index.remove(torch.tensor([50]))
    assert (
        index.about()["kind"] == "Flat" and said[-1] == "index: exact search in the place of HNSW32,Flat: a third of its graph was removed"
    )
    agree(index, {i: vectors[i] for i in range(51, 150)}, points(5, 2), 4, index.search(points(5, 2), 4))


# What is kept, merged and erased


@pytest.mark.parametrize("kind", [*FAMILIES, "IVF2,PQ2x4", "IVF2,PQ2x4fs", "PQ2x4fs", "HNSW8,SQ8", "PCA4,HNSW8", "NSG8", "RQ2x4"])
def test_what_is_restored_searches_and_grows_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POINTS", 1)
    monkeypatch.setattr(module, "NSG_LEAST", 150)
    count = 300
    index, ids, _ = filled(kind, count=count)
    index.search(points(3), 3)
    index.remove(ids[40:80])
    tree, tensors = flatten(index.state())
    other = Index(DIM, "l2", kind)
    other.restore(unflatten(json.loads(json.dumps(tree)), {name: tensor.clone() for name, tensor in tensors.items()}))
    assert other.nbytes() == index.nbytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    assert other.about() == index.about()
    for _ in range(2):
        expected, got = index.search(points(20, 1), 7), other.search(points(20, 1), 7)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        for each in (index, other):
            each.add(torch.arange(30) * 3, points(30, 9))
            each.remove(ids[:5])
            each.update(ids[100:110], points(10, 10))
            ids = ids if each is index else ids[5:]
        index.remove(torch.arange(30) * 3)
        other.remove(torch.arange(30) * 3)


def test_a_state_is_a_copy_and_changes_only_where_vectors_do(eager: None) -> None:
    for kind, codes in (("Flat", "vectors"), ("IVF2,Flat", "codes"), ("HNSW8", "codes")):
        index, ids, _ = filled(kind)
        first = flatten(index.state())
        before = {name: tensor.clone() for name, tensor in first[1].items()}
        index.add(torch.arange(1000, 1010), points(10, 1))
        assert all(torch.equal(first[1][name], tensor) for name, tensor in before.items())

        def part(of: dict[str, Any], name: str = codes) -> Tensor:
            return of.get("built", of)[name]

        old, new = part(unflatten(*first)), part(index.state())
        assert len(new) == len(old) + 10 and torch.equal(new[: len(old)], old)
        index.update(ids[4:5], points(1, 2))
        assert int((part(index.state())[: len(old)] != old).any(dim=1).sum()) == 1  # IVF puts it where it was, a graph buries the old one
        if "built" in index.state():
            assert torch.equal(index.state()["built"]["trained"], unflatten(*first)["built"]["trained"])


@pytest.mark.parametrize("kind", [*FAMILIES, "HNSW8,SQ8", "PQ2x4fs", "IVF2,PQ2x4fs"])
def test_what_is_removed_is_nowhere_in_what_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POINTS", 1)
    index, ids, vectors = filled(kind, count=300)
    index.search(points(1), 1)
    mark = torch.full((1, DIM), 4.125) + torch.arange(DIM) * 0.25  # nothing else is near
    index.add(torch.tensor([777_777]), mark)
    assert "PQ" in kind or index.search(mark, 1)[1].item() == 777_777
    index.remove(torch.tensor([777_777]))
    assert not index.rows.of.tolist().count(777_777)
    _, tensors = flatten(index.state())
    for sought in (mark, mark.half()):
        needle = sought.numpy().tobytes()
        assert all(needle not in tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    assert 777_777 not in index.search(mark, 20)[1]
    if index.flat is not None:  # nor in the room that it has to grow
        assert mark.numpy().tobytes() not in index.flat.buffer.numpy().tobytes()
    if kind in ("Flat", "IVF2,Flat"):
        agree(index, dict(zip(ids.tolist(), vectors, strict=True)), mark, 20, index.search(mark, 20))


def test_a_graph_still_finds_everything_past_what_was_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    index, ids, vectors = filled("HNSW8", count=400)
    index.remove(ids[::4])
    assert index.about()["removed_nodes"] == 100
    kept = [i for i in range(400) if i % 4]
    distances, found = index.search(vectors[kept], 1)
    assert (found[:, 0] == ids[kept]).float().mean() > 0.99 and float(distances.median()) == 0
    index.remove(ids[1::4])  # now half of the graph is gone, and it is linked anew
    assert index.about()["removed_nodes"] == 0 and len(index) == 200
    torch.testing.assert_close(index.reconstruct(ids[2::4]), vectors[2::4])


@pytest.mark.parametrize("kind", FAMILIES)
def test_merging_is_adding_what_the_other_holds(kind: str, eager: None) -> None:
    whole = Index(DIM, "cosine", "Flat")
    one, other = Index(DIM, "cosine", "Flat"), Index(DIM, "cosine", kind)
    ids, vectors = torch.arange(80), points(80)
    whole.add(ids, vectors)
    one.add(ids[:30], vectors[:30])
    other.add(ids[30:], vectors[30:])
    one.merge(other)
    assert len(one) == 80 and len(other) == 50
    torch.testing.assert_close(one.reconstruct(ids), whole.reconstruct(ids), atol=1e-3 if "16" in kind else 0, rtol=0)
    empty = Index(DIM, "cosine", kind)
    empty.merge(other)
    assert len(empty) == 50
    with pytest.raises(DataError, match=r"ids 30, 31, 32, 33, 34 and 45 more are in both indexes"):
        one.merge(other)
    with pytest.raises(DataError, match="an index by cosine of 8 dimensions cannot take in one by l2 of 8"):
        one.merge(Index(DIM, "l2"))
    with pytest.raises(DataError, match="not with a str"):
        one.merge("another")  # type: ignore[arg-type]
    assert len(one) == 80


@pytest.mark.parametrize("kind", ["Flat", "IVF2,Flat", "HNSW8"])
def test_a_damaged_file_is_told_from_a_whole_one(kind: str, tmp_path: Path, eager: None) -> None:
    path = tmp_path / "faces.index"
    index, _, _ = filled(kind)
    index.save(path)
    whole = path.read_bytes()
    assert torch.equal(Index.load(path).search(points(5), 4)[1], index.search(points(5), 4)[1])
    for place in np.linspace(0, len(whole) - 1, 60).astype(int).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DataError, match="holds no whole index"):
            Index.load(path)
    for content in (whole[:-1], whole[:100], b"", b"no index at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="holds no whole index"):
            Index.load(path)
    with pytest.raises(DataError, match="there is no index"):
        Index.load(tmp_path / "other")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "faces.index"
    index, _, _ = filled()
    index.save(path)
    index.add(torch.tensor([1]), points(1))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, name in ((module, "save_file"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(DiskError, match="the disk is full"):
                index.save(path)
        assert [file.name for file in tmp_path.iterdir()] == ["faces.index"] and len(Index.load(path)) == 60


def cut(state: dict[str, Any], name: str) -> None:
    tensor = state[name]
    state[name] = tensor[:-1] if tensor.dim() else tensor


def flip(state: dict[str, Any], name: str) -> None:
    state[name] = state[name].clone()
    place = len(state[name]) // 2 if state[name].dtype == torch.uint8 else -1  # in what FAISS stored: a number that it would believe
    state[name].view(-1)[place] = state[name].view(-1)[place] + 100


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("Flat", ["of", "vectors"]),
        ("IVF2,Flat", ["of", "trained", "codes", "order", "sizes"]),
        ("HNSW8", ["of", "trained", "codes", "levels", "links"]),
        ("SQfp16", ["of", "trained", "codes"]),
        ("IVF2,Flat,RFlat", ["of", "whole"]),
    ],
)
def test_a_damaged_state_gives_one_clear_error(kind: str, names: list[str], eager: None) -> None:
    index, _, _ = filled(kind)
    for name in names:
        for damage in (cut, lambda state, name: state.pop(name), flip):
            if damage is flip and name in ("of", "vectors", "codes"):
                continue  # another id or vector is as good as this one: that is the checkpoint's checksum to tell
            state = index.state()
            damage(state if name in state else state["built"], name)
            victim, _, _ = filled(kind, count=50)
            with pytest.raises(DataError, match="the saved index is damaged: "):
                victim.restore(state)
            assert len(victim) == 50
    twice = index.state()
    twice["of"][0] = twice["of"][1]
    with pytest.raises(DataError, match="one of its ids occurs twice"):
        index.restore(twice)
    with pytest.raises(DataError, match="has metric l2, and this one ip"):
        Index(DIM, "ip", kind).restore(index.state())
    with pytest.raises(DataError, match="the saved index is damaged: "):
        index.restore({})


# GPUs, as far as a CPU can tell


class Pretended:
    """FAISS with some of its names replaced."""

    def __init__(self, **replaced: Any) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        if name in ("StandardGpuResources",) and not self.__dict__.get("gpu", True):
            raise AttributeError(name)
        return getattr(faiss, name)


def pretend(monkeypatch: pytest.MonkeyPatch, **replaced: Any) -> None:
    fake = Pretended(**{name: lambda *a: None for name in chunked.GPU_FUNCTIONS}, **replaced)
    for place in (chunked, module):
        monkeypatch.setattr(place, "faiss", fake)
    monkeypatch.setattr(chunked, "_resources", {})


def broken() -> int:
    raise RuntimeError("libcublas.so.12 is missing")


def test_faiss_has_the_gpus_that_it_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    for count, expected in ((lambda: 0, 0), (lambda: 2, 2), (broken, 0)):
        with monkeypatch.context() as patch:
            pretend(patch, get_num_gpus=count)
            assert chunked.faiss_gpus() == expected
            assert engine_for(gpu, torch.float32) == ("faiss gpu" if expected == 2 else "torch")
            assert engine_for(torch.device("cuda", 2), torch.float32) == engine_for(gpu, torch.float16) == "torch"
            assert engine_for(cpu, torch.float32) == "faiss" and engine_for(cpu, torch.float16) == "torch"
    for missing in chunked.GPU_FUNCTIONS:
        without = SimpleNamespace(**{name: None for name in chunked.GPU_FUNCTIONS if name != missing}, get_num_gpus=lambda: 4)
        monkeypatch.setattr(chunked, "faiss", without)
        assert chunked.faiss_gpus() == 0


def view(address: int, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(kind)), shape)


@pytest.mark.parametrize("metric", METRICS)
def test_brute_force_on_a_gpu_gets_the_tensors_themselves(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def brute(resources: Any, given: Any) -> None:
        asked.append(given)
        assert resources == "workspace" and given.vectorsRowMajor and given.queriesRowMajor and given.device == 0
        assert given.vectorType == given.queryType == faiss.METRIC_L2 * 0 + 7 and given.outIndicesType == 9
        queries = view(given.queries, (given.numQueries, given.dims), ctypes.c_float)
        vectors = view(given.vectors, (given.numVectors, given.dims), ctypes.c_float)
        near, rows = faiss.knn(queries, vectors, given.k, given.metric)
        view(given.outDistances, near.shape, ctypes.c_float)[:] = near
        view(given.outIndices, rows.shape, ctypes.c_int64)[:] = rows

    names = ("cast_integer_to_void_ptr", "cast_integer_to_float_ptr")
    pretend(monkeypatch, get_num_gpus=lambda: 1, **{name: int for name in names}, DistanceDataType_F32=7, IndicesDataType_I64=9)
    fake: Any = chunked.faiss
    fake.GpuDistanceParams, fake.bfKnn, fake.StandardGpuResources = SimpleNamespace, brute, lambda: "workspace"
    vectors = Vectors(DIM, torch.device("cpu"), torch.float32)
    vectors.append(points(50))
    vectors.engine = "faiss gpu"
    rows = torch.arange(0, 50, 3)
    for few in (points(3, 1), points(40, 1)):
        got = nearest(vectors, few, 4, metric)
        some = nearest(vectors, few, 4, metric, rows)
        true = torch.from_numpy(table("ip" if metric == "cosine" else metric, few, points(50))).float()
        expected = true.topk(4, largest=metric != "l2")
        assert torch.equal(got[1], expected.indices)
        assert torch.equal(some[1], rows[true[:, rows].topk(4, largest=metric != "l2").indices])
        torch.testing.assert_close(got[0], expected.values, atol=1e-4, rtol=0)
    assert len(asked) == 4
    monkeypatch.setattr(chunked, "GPU_MOST", 3)
    nearest(vectors, points(3, 1), 4, metric)
    assert len(asked) == 4  # more neighbours than FAISS finds there: torch did it


def copies(patch: pytest.MonkeyPatch) -> list[str]:
    """GPUs that are this CPU: what moves to one and back is copied."""
    moved: list[str] = []

    def there(*given: Any) -> Any:
        moved.append("there")
        return faiss.clone_index(next(part for part in given if isinstance(part, faiss.Index)))

    def back(index: Any) -> Any:
        moved.append("back")
        return faiss.clone_index(index)

    pretend(patch, get_num_gpus=lambda: 2, index_cpu_to_all_gpus=there, GpuMultipleClonerOptions=SimpleNamespace)
    fake: Any = chunked.faiss
    fake.index_cpu_to_gpu, fake.index_gpu_to_cpu, fake.GpuClonerOptions = there, back, SimpleNamespace
    return moved


@pytest.mark.parametrize("kind", ["auto", "Flat", "IVF2,Flat", "IVF2,PQ2x4"])
def test_all_gpus_serve_what_changes_on_the_host(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POINTS", 1)
    moved = copies(monkeypatch)
    index, ids, _ = filled(kind, device="all", width=widest(kind))
    plain, _, _ = filled(kind, device="cpu", width=widest(kind))
    assert index.about()["device"] == "2 GPUs (FAISS)"
    for step in range(3):
        for each in (index, plain):
            each.add(torch.arange(10) + 1000 * (step + 1), points(10, step))
            each.remove(ids[step * 5 : step * 5 + 5])
            each.update(ids[40:45], points(5, step + 7))
        for options in ({}, {"where": ids[20:60]}):
            got, expected = index.search(points(6, 1), 4, **options), plain.search(points(6, 1), 4, **options)
            assert torch.equal(got[1], expected[1])
    assert moved.count("there") >= 3 and "back" in moved
    other = Index(DIM, "l2", kind, "all", width=index.width)
    other.restore(index.state())
    assert torch.equal(other.search(points(6, 1), 4)[1], index.search(points(6, 1), 4)[1])


def test_an_index_on_one_gpu_takes_vectors_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of this GPU lie where the CPU's do, so that FAISS's CPU index can stand in for its GPU's."""
    moved = copies(monkeypatch)
    fake: Any = chunked.faiss
    fake.StandardGpuResources = lambda: "workspace"
    place = torch.device("cpu")
    there, here = Structure("IVF2,Flat", DIM, "l2", place, True), Structure("IVF2,Flat", DIM, "l2")
    for each in (there, here):
        each.train(points(80).numpy())
        each.add(points(80), np.arange(80))
        each.widen(2)
        assert each.fits_gpu()
    for step in range(2):
        expected, got = here.search(points(5, 1), 3), there.search(points(5, 1), 3)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        before = len(moved)
        for each in (there, here):
            each.add(points(10, step), np.arange(80 + 10 * step, 90 + 10 * step))
        assert len(moved) == before  # they went to the GPU's index, not through the host's
    assert moved == ["there"]
    assert torch.equal(there.vectors(np.arange(100)), here.vectors(np.arange(100))) and moved == ["there", "back"]


def test_ids_on_a_gpu_follow_those_on_the_host() -> None:
    index, ids, _ = filled("IVF2,Flat", count=100)
    for step in range(6):
        index.add(torch.arange(20) + 1000 * (step + 1), points(20, step))
        index.remove(ids[step * 7 : step * 7 + 7])
        found = torch.from_numpy(np.append(index.rows.live(), -1))[None]
        if step % 2:
            assert torch.equal(index._mirrored(found), index._ids_of(found))
    flat, ids, _ = filled("Flat", count=100)
    for step in range(6):
        flat.remove(ids[step * 9 : step * 9 + 9])
        flat.add(torch.arange(5) + 1000 * (step + 1), points(5, step))
        found = torch.arange(-1, len(flat))[None]
        assert torch.equal(flat._mirrored(found), flat._ids_of(found))


def test_what_has_no_gpu_version_is_searched_exactly_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device of the kind `meta` nothing can be computed, but what would be done there is decided all the same."""
    for gpus, kind, why in (
        (0, "IVF4,Flat", "IVF4,Flat runs on a CPU only: FAISS has no GPU here; exact search runs on meta in its place"),
        (1, "HNSW8", "HNSW8 has no GPU version; exact search runs on meta in its place"),
        (1, "IVF4,Flat", "IVF4,Flat trains itself at 156 vectors; until then search is exact"),
        (0, "auto", "exact search of everything on meta"),
    ):
        monkeypatch.setattr(module, "faiss_gpus", lambda gpus=gpus: gpus)
        index = Index(DIM, "l2", kind)
        index._settle(torch.device("meta"))
        assert index.about()["why"] == why and index.flat is not None and index.flat.buffer.device.type == "meta"
        assert (index.built is not None) == (gpus == 1 and kind == "IVF4,Flat")
        assert index.about()["device"] == "meta (torch)"
