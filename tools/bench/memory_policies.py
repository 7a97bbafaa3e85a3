"""Time of the selection policies: herding against the textbook loop, and the bookkeeping of those that place samples of a stream.

    python tools/bench/memory_policies.py [--quick]        (Avalanche's rows are left out where avalanche-lib is not installed)

Herding of 20 from 5,000 x 512 against the loop of iCaRL and PyCIL in NumPy, which computes the distance of every candidate at each step:
in float64, whose selection has to come out to the last index, and in float32, as PyCIL has its features. Reservoir, CBRS and the other
streaming policies: a stream of labels of 100 classes in batches into a memory of 2,000, with the slots written down as a memory does,
against 1e6 samples/s and against Avalanche's buffers on the first part of the same stream (only their `update_from_dataset` is timed).
All on one thread, in seconds of the processor: what else the machine does meets the caches alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from streamcl.contracts import Slots
from streamcl.plugins import find

Row = tuple[str, str, float, str]  # what, baseline, ratio, bar
BUDGET, CLASSES = 2000, 100
AVALANCHE = {"reservoir": "ReservoirSamplingBuffer", "class_balanced": "ClassBalancedBuffer"}


def rows(quick: bool = False) -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):  # NumPy's products have threads of their own
            return [*herding(quick), *streaming(quick)]
    finally:
        torch.set_num_threads(threads)


def medians(contenders: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """They take turns, so that the noise of the machine meets all alike; the first round warms up."""
    taken = [{name: contender() for name, contender in contenders.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(times[name] for times in taken) for name in contenders}


def textbook(features: np.ndarray, count: int) -> list[int]:
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean, left = rows.mean(axis=0), np.arange(len(rows))
    taken, chosen = np.zeros_like(rows[:0]), []
    for k in range(1, count + 1):
        means = (rows + taken.sum(axis=0)) / k
        pick = int(np.argmin(np.sqrt(np.sum((mean - means) ** 2, axis=1))))
        chosen.append(int(left[pick]))
        taken = np.concatenate([taken, rows[pick : pick + 1]])
        rows, left = np.delete(rows, pick, axis=0), np.delete(left, pick)
    return chosen


def herding(quick: bool) -> list[Row]:
    features = torch.randn(5000, 512, generator=torch.Generator().manual_seed(0)).relu()
    narrow, wide, policy, selected = features.numpy(), features.double().numpy(), find("policy", "herding").load()(), {}

    def timed(name: str, select: Callable[[], list[int]]) -> Callable[[], float]:
        def run() -> float:
            started = time.process_time()
            selected[name] = select()
            return time.process_time() - started

        return run

    seconds = medians(
        {
            "ours": timed("ours", lambda: policy.rank(features, None, 20, torch.Generator()).tolist()),
            "float32": timed("float32", lambda: textbook(narrow, 20)),
            "float64": timed("float64", lambda: textbook(wide, 20)),
        },
        repeats=3 if quick else 9,
    )
    if selected["ours"] != selected["float64"]:
        raise SystemExit(f"herding selects {selected['ours']}, and the textbook {selected['float64']}")
    what = f"herding, 20 of 5,000 x 512 ({seconds['ours'] * 1e3:.1f} ms, same selection)"
    return [
        (what, f"textbook loop, {name} ({seconds[name] * 1e3:.0f} ms)", seconds[name] / seconds["ours"], bar)
        for name, bar in (("float64", "at least 10"), ("float32", ""))
    ]


def labels(kind: str, count: int) -> Tensor:
    """Balanced, or long-tailed: the most frequent class a hundred times as often as the rarest."""
    share = np.ones(CLASSES) if kind == "balanced" else 0.01 ** (np.arange(CLASSES) / (CLASSES - 1))
    return torch.from_numpy(np.random.default_rng(0).choice(CLASSES, count, p=share / share.sum()))


def streamcl(name: str, stream: Tensor, size: int) -> float:
    """Seconds per sample."""
    policy, slots, generator = find("policy", name).load()(), Slots(BUDGET), torch.Generator().manual_seed(0)
    groups, kept = np.empty(BUDGET, dtype=np.int64), np.empty(BUDGET)
    parts = stream.split(size)
    started = time.process_time()
    for part in parts:
        given = torch.full((len(part),), torch.nan, dtype=torch.float64) if policy.scored else None
        slots.groups, slots.scores = torch.from_numpy(groups[: slots.held]), torch.from_numpy(kept[: slots.held])
        placed = policy.place(part, given, slots, generator).numpy()
        rows = np.flatnonzero(placed >= 0)
        where = placed[rows]
        groups[where] = part.numpy()[rows]
        if given is not None:
            kept[where] = given.numpy()[rows]
        slots.seen += len(part)
        slots.held = min(BUDGET, slots.held + int((where >= slots.held).sum()))
        if policy.by_group:
            for label, count in zip(*(column.tolist() for column in np.unique(part.numpy(), return_counts=True)), strict=True):
                slots.seen_of[label] = slots.seen_of.get(label, 0) + count
    return (time.process_time() - started) / len(stream)


def avalanche(name: str, stream: Tensor, size: int) -> float:
    """Seconds per sample."""
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.benchmarks.utils.data_attribute import TensorDataAttribute
    from avalanche.training import storage_policy

    buffer: Any = getattr(storage_policy, AVALANCHE[name])(BUDGET)
    parts = [
        AvalancheDataset(
            [torch.utils.data.TensorDataset(part, part)],
            data_attributes=[
                TensorDataAttribute(part, name="targets"),
                TensorDataAttribute(torch.zeros_like(part), name="targets_task_labels", use_in_getitem=True),
            ],
        )
        for part in stream.split(size)
    ]
    started = time.process_time()
    for part in parts:
        buffer.update_from_dataset(part)
    return (time.process_time() - started) / len(stream)


def streaming(quick: bool) -> list[Row]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import avalanche as _  # noqa: F401
    except ImportError:
        print("avalanche-lib is not installed: pip install 'streamcl[avalanche]' for its rows")
        peers = False
    else:
        peers = True
    found: list[Row] = []
    for name in ("reservoir", "class_balanced", "ring", "hierarchical"):
        for kind in ("balanced", "long-tailed"):
            for size in (1000, 256, 32):
                count = 20_000 if quick or name == "hierarchical" else 1000 * min(size, 500)
                stream = labels(kind, count)
                contenders: dict[str, Callable[[], float]] = {"ours": lambda n=name, s=stream, z=size: streamcl(n, s, z)}  # type: ignore[misc]
                if peers and name in AVALANCHE:
                    part = stream[: min(count, 100 * size, 20_000)]
                    contenders["theirs"] = lambda n=name, s=part, z=size: avalanche(n, s, z)  # type: ignore[misc]
                seconds = medians(contenders, repeats=1 if quick else 3)
                rate = 1e-6 / seconds["ours"]
                what, bar = f"{name}, {kind}, batches of {size}", "at least 1" if size == 1000 and name in AVALANCHE else ""
                found.append((f"{what}: {rate:.2f}e6 samples/s", "1e6 samples/s", rate, bar))
                if "theirs" in seconds:
                    baseline = f"Avalanche {AVALANCHE[name]} ({1e-6 / seconds['theirs']:.3f}e6 samples/s)"
                    found.append((what, baseline, seconds["theirs"] / seconds["ours"], ""))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    for what, baseline, ratio, bar in rows(parser.parse_args().quick):
        print(f"{what:62} {baseline:58} {ratio:8.2f}  {bar}")


if __name__ == "__main__":
    main()
