"""What it takes to build a stream of 1,000 tasks over 1e6 samples, kind by kind: time and memory beyond the data themselves.

    OMP_NUM_THREADS=1 python tools/bench/streams_building.py [--repeats 3]        (Linux: it reads /proc/self)

Each kind in a process of its own, whose data lie in memory before it begins: seconds of the processor for `open`, and for emitting every
task with its test set, one after another; the peak of resident memory on the way above what there was before, while one task is held at
a time and when all are (as the engine holds them, to score them). A small stream of the same kind is built first, so that all code is
loaded. The baseline is the least that dividing takes: one stable sort of the samples by their task. Medians over repeats, the kinds
taking turns.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from growth import MALLOC, Loaded, resident

from streamcl.data import ArrayDataset
from streamcl.plugins import find
from streamcl.stream import Grouping, Modality, SourceData

SAMPLES, TASKS, SEED = 1_000_000, 1_000, 3
BUILDING: dict[str, tuple[str, int, int, dict[str, Any]]] = {  # kind, samples, classes (and domains) of the source, options
    "class_incremental": ("class_incremental", SAMPLES, TASKS, {"tasks": TASKS}),
    "class_incremental, repeat, tail, validation": (
        "class_incremental",
        SAMPLES,
        TASKS,
        {"tasks": TASKS, "repeat": 0.2, "imbalance": 0.1, "validation": 0.1},
    ),
    "blurry": ("blurry", SAMPLES, TASKS, {"tasks": TASKS, "sizes": "equal"}),
    "hierarchical, levels of 90 and 900": ("hierarchical", SAMPLES, 900, {"levels": ["coarse"], "tasks": [90, 900]}),
    "few_shot": ("few_shot", SAMPLES, TASKS, {"base": 1, "ways": 1, "shots": 5}),
    "domain_incremental, groups": ("domain_incremental", SAMPLES, TASKS, {"by": "domain"}),
    "domain_incremental, permuted parts": ("domain_incremental", SAMPLES, 10, {"shift": "permute", "tasks": TASKS, "share": "parts"}),
    "missing_modality": ("missing_modality", SAMPLES, 10, {"missing": [{"vector": 0.3, "other": 0.3}] * TASKS}),
    "missing_modality, by classes": ("missing_modality", SAMPLES, TASKS, {"missing": [{"vector": 0.3}] * TASKS, "divide": "classes"}),
    "test_time, 1,000 served in each": (
        "test_time",
        SAMPLES,
        10,
        {"part": "train", "corruptions": "none", "missing": {"vector": 0.3}, "rounds": TASKS, "samples": 1000},
    ),
    "multi_label, 100 labels": ("multi_label", SAMPLES, 100, {"increment": 1}),  # 1,000 labels of 1e6 samples take 1 GB by themselves
    "multi_label, 1,000 labels, 1e5 samples": ("multi_label", SAMPLES // 10, TASKS, {"increment": 1}),
}


def numbers(kind: str, samples: int, groups: int) -> SourceData:
    """Samples of two numbers each, in so many classes and as many domains of two classes; for multi_label with about four labels each."""
    parts, classes, domains = [], [], []
    for count, first in ((samples, 0), (samples // 100, samples)):
        draw = torch.Generator().manual_seed(first)
        group = torch.randperm(count, generator=draw) % groups
        targets = group
        if kind == "multi_label":
            targets = torch.zeros(count, groups, dtype=torch.int8)
            targets[torch.arange(count), group] = 1
            for _ in range(3):
                targets[torch.arange(count), torch.randint(groups, (count,), generator=draw)] = 1
        parts.append(ArrayDataset({name: torch.zeros(count, 1) for name in ("vector", "other")}, targets, first + torch.arange(count)))
        classes.append(group)
        domains.append((group + torch.arange(count) % 2) % groups)
    names = [str(number) for number in range(groups)]
    return SourceData(
        *parts,
        names,
        {name: Modality("vector", (1,)) for name in ("vector", "other")},
        target="labels" if kind == "multi_label" else "class",
        groupings={"domain": Grouping(names, *domains), "coarse": Grouping(names[: groups // 10], *(group // 10 for group in classes))},
    )


def build(what: str) -> None:
    """In a process of its own: once small, so that all code is there, and then in earnest."""
    kind, wanted, groups, options = BUILDING[what]
    for samples in (10 * TASKS, wanted):
        stream = find("scenario", kind).load()(data=Loaded(numbers(kind, samples, groups)), **options)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, started = resident("VmRSS"), time.process_time()
        stream.open(SEED)
        opened = time.process_time() - started
        for task in stream:
            stream.test(task, task)
        through, peak = time.process_time() - started - opened, resident("VmHWM") - before
        tasks = stream.past()
        held = resident("VmHWM") - before
    print("\nmeasured", json.dumps({"tasks": len(tasks), "open": opened, "through": through, "peak": peak, "held": held}))


def sorting() -> float:
    task = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)) % TASKS
    started = time.process_time()
    task.argsort(stable=True).split(torch.bincount(task, minlength=TASKS).tolist())
    return time.process_time() - started


def measure(what: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--build", what], capture_output=True, text=True, env={**os.environ, **MALLOC})
    if done.returncode:
        sys.exit(done.stderr)
    return {**json.loads(done.stdout.rsplit("measured", 1)[1]), "sort": statistics.median(sorting() for _ in range(3))}


def report(repeats: int) -> None:
    runs = [{what: measure(what) for what in BUILDING} for _ in range(repeats)]
    print("| building | tasks | open, s | all tasks, s | both, s (bar 2) | over one sort | peak, MB (bar 100) | all tasks held, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for what in BUILDING:
        mine = [{**run[what], "both": run[what]["open"] + run[what]["through"]} for run in runs]
        m = {key: statistics.median(run[key] for run in mine) for key in mine[0]}
        times = f"{m['open']:.2f} | {m['through']:.2f} | {m['both']:.2f} | {m['both'] / m['sort']:.0f}"
        print(f"| {what} | {m['tasks']:.0f} | {times} | {m['peak'] / 1e6:.0f} | {m['held'] / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--build", choices=list(BUILDING), help=argparse.SUPPRESS)  # how it calls itself
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.build:
        build(options.build)
    else:
        report(options.repeats)


if __name__ == "__main__":
    main()
