"""Seconds of learning a task as tasks of one size add up: `against_avalanche.py --cost`.

50 tasks of 2 classes, 160 vectors of 64 numbers each, made on the spot; an MLP 64-256, 3 epochs, batch 32, 500 exemplars. Processor
time of `learn` alone; the middle of each fifth of the tasks, and the last fifth over the second: the first one warms up, and has classes
that fill the memory. The middle one of the repeats. A classifier of 100 rows costs more than one of 40 in any case, so the gradient methods
run once more with 100 rows from the first task on: what still grows then grows with the tasks.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from noise import Noise

from streamcl.config import EngineConfig
from streamcl.engine import Engine
from streamcl.plugins import find
from streamcl.stream import Task

TASKS, EXEMPLARS = 50, 500
LOOP: dict[str, Any] = {"epochs": 3, "batch": 32}
REPLAY = {**LOOP, "replay": 32}
METHODS: dict[str, dict[str, Any]] = {
    "finetune": LOOP,
    "lwf": LOOP,
    "ewc": LOOP,
    "er": REPLAY,
    "er_ace": REPLAY,
    "derpp": REPLAY,
    "icarl": {**LOOP, "optimizer": {"lr": 0.1}},
    "bic": {**LOOP, "bias_epochs": 20},
    "memo": {**LOOP, "optimizer": {"lr": 0.02}},
    "joint": LOOP,
    "simplecil": {},
    "slda": {},
    "fecam": {"tukey": None},  # for features that may be below 0
    "ranpac": {"M": 500},
    "gacil": {"buffer": 500},
}
TERMS = ("lwf", "ewc")
WITHOUT_NETWORK = ("simplecil", "slda", "fecam", "ranpac", "gacil")


def times(name: str, wide: bool = False) -> tuple[list[float], list[int]]:
    """Seconds of each task, and the bytes kept after it; with a head for all classes from the first task on, if it is to be wide."""
    options = METHODS[name]
    if name in TERMS:
        strategy = find("strategy", "finetune").load()(**options, over="task", with_=(find("term", name).load()(),))
    else:
        strategy = find("strategy", name).load()(**options)
    backbone = find("backbone", "identity").load()() if name in WITHOUT_NETWORK else find("backbone", "mlp").load()(hidden=[256])
    if name == "memo":
        backbone = find("backbone", "mlp").load()(hidden=[256, 64])  # the last layer is what grows
    seconds: list[float] = []
    learn = strategy.learn

    def timed(task: Task) -> None:
        started = time.process_time()
        learn(task)
        seconds.append(time.process_time() - started)

    strategy.learn = timed
    source = Noise(2 * TASKS, 160, 2, shape=(64,))
    run = Engine(
        find("scenario", "class_incremental").load()(data=source, tasks=TASKS),
        strategy,
        backbone,
        find("memory", "faiss").load()(exemplars=EXEMPLARS),
        engine=EngineConfig(device="cpu", threads=1),
    )
    if wide:
        run.model.grow(2 * TASKS)
    run.run()
    return seconds, run.memory_per_task


def main(names: list[str], repeats: int) -> None:
    print("| method | ms a task, second fifth | last fifth | last / second | with 100 rows throughout | kB kept, task 20 | task 50 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in names or METHODS:
        runs = [times(name) for _ in range(repeats)]
        second, last = (statistics.median(values) for values in zip(*(fifths(seconds) for seconds, _ in runs), strict=True))
        ratio, kept = statistics.median(growth(seconds) for seconds, _ in runs), runs[0][1]
        wide = "–"
        if name not in (*WITHOUT_NETWORK, "memo"):  # memo makes the heads of its blocks itself
            wide = f"{statistics.median(growth(times(name, wide=True)[0]) for _ in range(repeats)):.2f}"
        kilobytes = " | ".join(f"{kept[task - 1] / 1e3:.0f}" for task in (2 * TASKS // 5, TASKS))
        print(f"| {name} | {second:.1f} | {last:.1f} | {ratio:.2f} | {wide} | {kilobytes} |", flush=True)


def fifths(seconds: list[float]) -> tuple[float, float]:
    """Milliseconds of a task in the second fifth and in the last."""
    fifth = TASKS // 5
    return 1e3 * statistics.median(seconds[fifth : 2 * fifth]), 1e3 * statistics.median(seconds[-fifth:])


def growth(seconds: list[float]) -> float:
    second, last = fifths(seconds)
    return last / second
