"""Time per task as tasks add up: 10 and 200 tasks of one class each, with `er` and `gacil`; learning a task must not get slower.

Vectors of 64 numbers made on the spot, 320 samples of each class to learn and 20 to score. `er`: MLP 64-256, 3 epochs, batch 32 + 32
replayed from 500; `gacil`: no backbone, 1,000 random features, batch 64. One thread, everything else equal. The classifier grows with the
classes, and its products with it: that cost belongs to the number of classes and not of tasks, so each method runs once more with all 200
columns from the first task on, and the last lines say what the head alone costs a bare training step in plain PyTorch. What is scored
grows by itself, each task's test set being scored after every later task. `rest` is whatever is neither learning, scoring nor a
checkpoint. All runs take turns within one process; medians over ten tasks and over repeats.

    python tools/bench/tasks.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from noise import Noise
from torch import nn
from torch.nn.functional import cross_entropy

from streamcl.config import EngineConfig
from streamcl.engine import Engine
from streamcl.events import Event, Sink
from streamcl.plugins import find
from streamcl.run_folder import RunFolder
from streamcl.strategy import Strategy

CLASSES, TEN, STEPS = 200, 10, 30
PARTS = ("learn", "evaluate", "checkpoint", "rest")
ER, GACIL = find("strategy", "er").load(), find("strategy", "gacil").load()


class WideER(ER):
    def start(self, info, context) -> None:
        super().start(info, context)
        self.model.grow(CLASSES)


class WideGACIL(GACIL):
    def start(self, info, context) -> None:
        super().start(info, context)
        self.memory.analytic.update(torch.zeros(1, self.buffer), torch.zeros(1, dtype=torch.int64), CLASSES)  # adds columns, and no data


def er(kind: type = ER) -> Strategy:
    return kind(epochs=3, batch=32, replay=32)


def gacil(kind: type = GACIL) -> Strategy:
    return kind(buffer=1000, batch=64)


RUNS: dict[str, tuple[int, Callable[[], Strategy], bool]] = {  # tasks, strategy, whether it has a folder
    "er, 10 tasks": (TEN, er, False),
    "er, 200 tasks": (CLASSES, er, False),
    "er, 200 tasks, wide head": (CLASSES, lambda: er(WideER), False),
    "er, 200 tasks, its folder": (CLASSES, er, True),
    "gacil, 10 tasks": (TEN, gacil, False),
    "gacil, 200 tasks": (CLASSES, gacil, False),
    "gacil, 200 tasks, all columns": (CLASSES, lambda: gacil(WideGACIL), False),
}


class Clock(Sink):
    """The seconds of each part of each task."""

    def open(self, directory: Path) -> None:
        self.tasks: list[dict[str, float]] = []
        self.before, self.since = dict.fromkeys(PARTS, 0.0), time.monotonic()

    def write(self, event: Event) -> None:
        if event.kind == "task_finished":
            now, so_far = time.monotonic(), event.fields["seconds"]
            parts = {part: so_far[part] - self.before[part] for part in PARTS[:-1]}
            self.tasks.append({**parts, "rest": now - self.since - sum(parts.values())})
            self.before, self.since = so_far, now


def run(name: str) -> list[dict[str, float]]:
    tasks, strategy, keeps = RUNS[name]
    folder = Path(tempfile.mkdtemp()) / "run"
    clock = Clock()
    source = Noise(CLASSES, 320, 20, shape=(64,))
    Engine(
        find("scenario", "class_incremental").load()(data=source, classes=[[str(c)] for c in range(tasks)]),
        strategy(),
        find("backbone", "mlp" if "er" in name else "identity").load()(),
        find("memory", "faiss").load()(exemplars=500),
        engine=EngineConfig(device="cpu", threads=1),
        log=[clock],
        folder=RunFolder.create(folder) if keeps else None,
    ).run()
    shutil.rmtree(folder.parent)
    return clock.tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in RUNS}
    run("er, 10 tasks"), run("gacil, 10 tasks")  # warms up
    for _ in range(repeats):
        for name in RUNS:
            found[name].append(run(name))
    heads = "".join(f"{part:>20}" for part in PARTS)
    print(f"{'ms a task, first > last ten':34}{heads}   last ten / first ten, learning (lowest to highest)")
    ratios, lasts = {}, {}
    for name, runs in found.items():
        each = {part: [(middle_of(tasks[:TEN], part), middle_of(tasks[-TEN:], part)) for tasks in runs] for part in PARTS}
        middle = {part: [statistics.median(column) * 1e3 for column in zip(*pairs, strict=True)] for part, pairs in each.items()}
        quotients = [last / first for first, last in each["learn"]]
        ratios[name], lasts[name] = statistics.median(quotients), middle["learn"][1]
        cells = "".join(f"{first:>10.2f} > {last:7.2f}" for first, last in middle.values())
        print(f"{name:34}{cells}   {ratios[name]:.2f} ({min(quotients):.2f} to {max(quotients):.2f})")
    for method in ("er", "gacil"):
        against_ten = lasts[f"{method}, 200 tasks"] / lasts[f"{method}, 10 tasks"]
        wide = next(name for name in RUNS if name.startswith(f"{method}, 200 tasks, ") and "folder" not in name)
        print(f"{method}: the last ten of 200 tasks take {against_ten:.2f} of the ten of 10 tasks;", end=" ")
        same = ratios[f"{method}, 200 tasks"]
        print(f"last over first ten: {same:.2f}, with {wide.rsplit(', ', 1)[1]} {ratios[wide]:.2f} (bar: about 1)")
    print(f"{STEPS} bare steps of the er network: {bare(1):.2f} ms with a head of 1, {bare(CLASSES):.2f} ms with one of {CLASSES}")


def middle_of(tasks: list[dict[str, float]], part: str) -> float:
    return statistics.median(task[part] for task in tasks)


def bare(columns: int) -> float:
    """Milliseconds of as many bare steps as `er` makes in a task, on the same network with a head of this width."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, columns))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(64, 64), torch.randint(0, columns, (64,))
    times = []
    for _ in range(1000):
        started = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * STEPS * 1e3


if __name__ == "__main__":
    main()
