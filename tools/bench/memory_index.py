"""Time of the vector index against FAISS itself: the same index, the same vectors, with and without what `FeatureIndex` adds to it.

    python tools/bench/memory_index.py [--quick] [--thresholds]

Vectors of 512 dimensions, 1e3 to 1e6 of them: two hundred classes with 24 directions of their own, features as a network makes them (white
noise has no neighbours, and no approximate index finds them). Searching: 256 queries at once and one alone, 10 neighbours. Adding: all at
once, and 256 at a time, into an index made for it. The two alternate; the ratio is the median of the ratios of neighbouring runs, on one
thread, in seconds of the processor: what else the machine does meets the caches alone.
`auto` is compared with exact search where it has chosen for itself, with its recall. --quick stops at 1e4 vectors. --thresholds prints
what the choice of `auto` stands on: the cost of exact search, of building, and of finding 95 % of the neighbours, by size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import faiss
import numpy as np
import streamcl.memory.index as module
import torch
from streamcl.memory.index import Index
from torch import Tensor

Row = tuple[str, str, float, str]  # what, baseline, ratio, bar
DIM, QUERIES, BATCH = 512, 256, 256
SEARCH, ADD = "at most 1.05", "at most 2"


def features(count: int, seed: int = 0) -> Tensor:
    """Samples of the same classes, others for each seed."""
    draw = np.random.default_rng(100)
    classes, directions = draw.standard_normal((200, DIM), np.float32), draw.standard_normal((24, DIM), np.float32) / 24**0.5
    draw = np.random.default_rng(seed)
    made = np.empty((count, DIM), np.float32)
    for start in range(0, count, 50_000):
        part = made[start : start + 50_000]
        draw.standard_normal(out=part, dtype=np.float32)
        part *= 0.3
        part += classes[draw.integers(200, size=len(part))]
        part += draw.standard_normal((len(part), 24), np.float32) @ directions
    return torch.from_numpy(made)


def compare(ours: Callable[[], object], raw: Callable[[], object], repeats: int) -> float:
    """The median of the ratios of runs that follow each other, so that the noise of the machine meets both."""
    ratios = []
    for repeat in range(repeats + 1):
        times = {}
        for contender in (ours, raw) if repeat % 2 else (raw, ours):
            started = time.process_time()
            contender()
            times[contender] = time.process_time() - started
        if repeat:  # the first round warms up
            ratios.append(times[ours] / times[raw])
    return statistics.median(ratios)


def rows(quick: bool = False) -> list[Row]:
    threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        vectors, queries = features(10_000 if quick else 1_000_000), features(QUERIES, 1)
        measured = []
        for count in (1_000, 10_000) if quick else (1_000, 10_000, 100_000, 1_000_000):
            measured += against("Flat", vectors[:count], queries)
        for kind in ("HNSW32", "IVF64,Flat", "IVF64,PQ16"):
            measured += against(kind, vectors[:10_000], queries)
        return measured if quick else [*measured, *automatic(vectors[:100_000], queries)]
    finally:
        torch.set_num_threads(threads[0])
        faiss.omp_set_num_threads(threads[1])


def against(kind: str, vectors: Tensor, queries: Tensor) -> list[Row]:
    """Ours and FAISS's own index, trained on the same vectors; a search through ours and through the one that is inside."""
    ours = Index(DIM, "l2", kind, device="cpu")
    ours.add(torch.arange(len(vectors)), vectors)
    ours.search(vectors[:1], 1)  # which settles how far it searches
    raw = faiss.index_factory(DIM, kind)
    if not raw.is_trained:
        raw.train(vectors.numpy())
    raw.add(vectors.numpy())
    inner = raw if ours.built is None else ours.built.index  # one copy, so that neither finds its vectors in the caches
    measured = []
    for asked, bar in ((queries, SEARCH), (queries[:1], "-")):
        one = asked.numpy()
        repeats = int(min(201, max(5, 2e9 / (len(vectors) * DIM * max(len(asked), 8)))))
        ratio = compare(lambda asked=asked: ours.search(asked, 10), lambda one=one: inner.search(one, 10), repeats)
        measured.append((f"{kind}: search of {len(asked)} among {len(vectors):,}", "the same index of FAISS", ratio, bar))
    baseline = "the same index of FAISS, without ids and checks"
    for step in (len(vectors), BATCH) if kind == "Flat" and len(vectors) <= 100_000 else (len(vectors),):
        how = "at once" if step == len(vectors) else f"by {step}"
        measured.append((f"{kind}: adding {len(vectors):,} {how}", baseline, adding(kind, ours, raw, vectors, step), ADD))
    return measured


def adding(kind: str, ours: Index, raw: faiss.Index, vectors: Tensor, step: int) -> float:
    """Into empty indexes. Flat ones are new each time: room that is there already would favour one of them."""
    ids, whole = torch.arange(len(vectors)), vectors.numpy()

    def mine() -> None:
        for start in range(0, len(ids), step):
            ours.add(ids[start : start + step], vectors[start : start + step])

    def theirs() -> None:
        for start in range(0, len(ids), step):
            raw.add(whole[start : start + step])

    ratios = []
    for repeat in range(1 + int(min(31, max(3, 1e5 / len(ids))))):
        if kind == "Flat":
            ours, raw = Index(DIM, "l2", "Flat", device="cpu"), faiss.IndexFlatL2(DIM)
        else:
            ours.remove(ids)
            raw.reset()
        times = {}
        for contender in (mine, theirs) if repeat % 2 else (theirs, mine):
            started = time.process_time()
            contender()
            times[contender] = time.process_time() - started
        if repeat:  # the first round warms up
            ratios.append(times[mine] / times[theirs])
    return statistics.median(ratios)


def automatic(vectors: Tensor, queries: Tensor) -> list[Row]:
    """What `auto` becomes once searches have paid for it."""
    exact, auto = Index(DIM, "l2", "Flat", device="cpu"), Index(DIM, "l2", device="cpu")
    for index in (exact, auto):
        index.add(torch.arange(len(vectors)), vectors)
    auto.queries = module.AUTO_QUERIES
    auto.search(queries[:1], 1)
    about = auto.about()
    chosen = f"auto ({about['kind']}, recall@10 {about['recall']:.3f})"
    measured = []
    for asked in (queries, queries[:1]):
        ratio = compare(lambda asked=asked: auto.search(asked, 10), lambda asked=asked: exact.search(asked, 10), 7)
        measured.append((f"{chosen}: search of {len(asked)} among {len(vectors):,}", "exact search", ratio, "below 1"))
    return measured


def thresholds() -> None:
    """By size: microseconds for a query, and for building an index in queries of a batch."""
    vectors, queries = features(200_000), features(500, 1)
    print(f"{'vectors':>8} {'index':14} {'batch':>8} {'alone':>8} {'width':>6} {'recall':>7} {'built for':>10}")
    for count in (5_000, 20_000, 50_000, 100_000, 200_000):
        held = vectors[:count]
        exact = Index(DIM, "l2", "Flat", device="cpu")
        exact.add(torch.arange(count), held)
        truth = exact.search(queries, 10)[1]
        batch = timed(lambda exact=exact: exact.search(queries, 10)) / len(queries)
        alone = timed(lambda exact=exact: [exact.search(queries[i : i + 1], 10) for i in range(20)]) / 20
        print(f"{count:8,} {'Flat':14} {batch * 1e6:8.0f} {alone * 1e6:8.0f} {'':6} {1:7.3f} {'':>10}", flush=True)
        for kind in ("HNSW32,Flat", f"IVF{int(min(4 * count**0.5, count // 39))},Flat"):
            index = Index(DIM, "l2", kind, device="cpu")
            started = time.process_time()
            index.add(torch.arange(count), held)
            index.search(queries[:1], 1)
            built = (time.process_time() - started) / batch
            found = index.search(queries, 10)[1]
            recall = float((found[:, :, None] == truth[:, None]).any(dim=2).float().mean())
            quick = timed(lambda index=index: index.search(queries, 10)) / len(queries)
            single = timed(lambda index=index: [index.search(queries[i : i + 1], 10) for i in range(20)]) / 20
            width = index.built.width if index.built else 0
            print(f"{count:8,} {kind:14} {quick * 1e6:8.0f} {single * 1e6:8.0f} {width:6} {recall:7.3f} {built:10,.0f}", flush=True)


def timed(call: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--thresholds", action="store_true")
    chosen = parser.parse_args()
    if chosen.thresholds:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        thresholds()
        return
    print("| what | baseline | ratio | bar |\n| --- | --- | --- | --- |")
    for what, baseline, ratio, bar in rows(chosen.quick):
        print(f"| {what} | {baseline} | {ratio:.2f} | {bar} |", flush=True)


if __name__ == "__main__":
    main()
