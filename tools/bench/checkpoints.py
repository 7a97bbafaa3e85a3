"""What checkpoints cost: their share of a run of five minutes, and the time and bytes of one by the size of the model.

The run: resnet32 on random images of 3 x 32 x 32 in 5 tasks, 2,000 exemplars, the `jsonl` log. By default a checkpoint is written every
60 seconds and after each task: ten in five minutes, where nothing else is said. The run is made to learn for about `--minutes` and writes
as often as five minutes would (every 12 seconds where it is one minute), so its own share is that of a run this short, and the share of
five minutes is what ten checkpoints take of them.

The sizes: `er` with SGD and momentum, and a checkpoint at every step, so that the optimiser's state is in each; medians of 6.

    python tools/bench/checkpoints.py [--minutes 1] [--strategies er,icarl]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from noise import Noise

from streamcl.config import CheckpointConfig, EngineConfig
from streamcl.engine import Engine
from streamcl.events import Event, Sink
from streamcl.nn.backbone import Backbone
from streamcl.plugins import find
from streamcl.run_folder import RunFolder
from streamcl.strategy import Strategy

TASKS, CLASSES, EXEMPLARS = 5, 10, 2000
WRITTEN = TASKS + 5  # checkpoints in five minutes
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {}),
    "resnet32": ("resnet32", {}),
    "resnet18": ("resnet18", {}),
    "mlp of 100 million": ("mlp", {"hidden": [5300] * 4}),
}


class Written(Sink):
    """The checkpoints of a run."""

    def __init__(self) -> None:
        self.each: list[dict[str, Any]] = []

    def write(self, event: Event) -> None:
        if event.kind == "checkpoint":
            self.each.append(event.fields)


def backbone(name: str) -> Backbone:
    kind, options = SIZES[name]
    return find("backbone", kind).load()(**options)


def strategy(name: str, batch: int, **options: Any) -> Strategy:
    replay = {"replay": batch} if name == "er" else {}
    return find("strategy", name).load()(epochs=1, batch=batch, optimizer={"lr": 0.01, "momentum": 0.9}, **replay, **options)


def run(method: Strategy, model: Backbone, per_class: int, every: dict[str, float], scored: int) -> tuple[dict[str, Any], Written]:
    folder, written = Path(tempfile.mkdtemp()) / "run", Written()
    engine = Engine(
        find("scenario", "class_incremental").load()(data=Noise(CLASSES, per_class, scored), tasks=TASKS),
        method,
        model,
        find("memory", "faiss").load()(exemplars=EXEMPLARS),
        engine=EngineConfig(device="cpu", checkpoint=CheckpointConfig(every=every)),  # type: ignore[arg-type]
        log=[written, find("sink", "jsonl").load()()],
        folder=RunFolder.create(folder),
    )
    scores = engine.run()
    shutil.rmtree(folder.parent)
    return scores, written


def share(name: str, minutes: float) -> None:
    batch = per_class = 32
    every: dict[str, float] = {"seconds": 12 * minutes}
    for target in (18 * minutes, 60 * minutes):  # two short runs find out how many samples the time asked for takes
        scores, _ = run(strategy(name, batch), backbone("resnet32"), per_class, every, scored=1)
        per_class = int(per_class * target / scores["seconds"]["learn"])
    scores, written = run(strategy(name, batch), backbone("resnet32"), per_class, every, scored=50)
    seconds, each = scores["seconds"], [one["seconds"] for one in written.each]
    print(f"{name:8} {seconds['total']:8.1f} {seconds['learn']:8.1f} {seconds['evaluate']:9.1f} {seconds['checkpoint']:11.3f}", end=" ")
    print(f"{len(each):7} {1e3 * statistics.median(each):9.1f} {written.each[-1]['bytes'] / 1e6:6.1f}", end=" ")
    print(f"{100 * seconds['checkpoint'] / seconds['total']:9.3f} {100 * WRITTEN * statistics.mean(each) / 300:20.3f}", flush=True)


def size(name: str) -> None:
    batch = 4
    scores, written = run(strategy("er", batch), backbone(name), 2 * batch, {"steps": 1.0}, scored=1)
    within = [one for one in written.each if one["bytes"] > 0.9 * max(each["bytes"] for each in written.each)][:6]
    middle, large = statistics.median(one["seconds"] for one in within), within[-1]["bytes"]
    print(f"{name:20} {scores['parameters'] / 1e6:10.2f} {large / 1e6:8.1f} {1e3 * middle:8.1f} {large / 1e6 / middle:7.0f}", end=" ")
    print(f"{100 * WRITTEN * middle / 300:36.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--strategies", default="er,icarl")
    options = parser.parse_args()
    print(f"{'seconds':8} {'total':>8} {'learn':>8} {'evaluate':>9} {'checkpoints':>11}", end=" ")
    print(f"{'written':>7} {'ms each':>9} {'MB':>6} {'% of it':>9} {'% of five minutes':>20}   (bar: under 2)")
    for name in options.strategies.split(","):
        share(name, options.minutes)
    print(f"\n{'one checkpoint':20} {'million':>10} {'MB':>8} {'ms':>8} {'MB/s':>7} {'ten of them, % of five minutes':>36}")
    for name in SIZES:
        size(name)


if __name__ == "__main__":
    main()
