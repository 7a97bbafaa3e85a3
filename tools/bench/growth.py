"""Memory that grows during a run: streamcl's `er` against the hand-written loop of loop.py, on the same work, each in a process of its own.

Two works, both in 5 tasks of 2 classes with an MLP of 256 hidden units, batch 32 + 32 replayed, all tests seen so far scored after each
task: `digits` (20 epochs, 200 samples held) and `images` (50,000 random ones of 3 x 32 x 32 bytes and 10,000 to score, 1 epoch, 500
held). A process imports what its contender will import, loads the data, gives unused memory back and notes its resident memory: the
baseline. Growth is the peak of resident memory during the run above that (from /proc/self); `code` is the part of it that are pages of
libraries, which are read when a kernel is first used and are the same however long a run is. Without a folder the engine does what the
loop does; with its folder it writes checkpoints (every 2 seconds) and all logs as well. The allocator gives back at once what is freed,
in all contenders: its fragmentation, tens of MiB from run to run, would hide the difference. Medians over repeats, taking turns.

    python tools/bench/growth.py [--repeats 5]        (Linux)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from loop import BATCH, RATE, by_hand
from noise import Noise
from torch import Tensor, nn

from streamcl.config import CheckpointConfig, EngineConfig
from streamcl.data import Subset, whole
from streamcl.engine import Engine
from streamcl.plugins import find
from streamcl.run_folder import RunFolder
from streamcl.stream import Source, SourceData

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes
CONTENDERS = ("hand-written loop", "streamcl er", "streamcl er, with its folder")
SINKS = ("progress", "jsonl", "tensorboard", "report")
MIB = 2**20


@dataclass(frozen=True)
class Work:
    source: Source
    high: float  # of its pixels
    epochs: int
    held: int


def work(name: str) -> Work:
    if name == "digits":
        return Work(find("source", "digits").load()(), 16, 20, 200)
    return Work(Noise(10, 5000, 1000), 255, 1, 500)


class Loaded(Source):
    """Data that lies in memory already, so that loading it is no growth."""

    def __init__(self, data: SourceData) -> None:
        self.data = data

    def load(self) -> SourceData:
        return self.data


class Scaled(nn.Module):
    """Bytes to floats, a flat vector per image."""

    def __init__(self, high: float) -> None:
        super().__init__()
        self.high = high

    def forward(self, images: Tensor) -> Tensor:
        return (images / self.high).flatten(1)


def prepare_hand(work: Work):
    data = work.source.load()
    parts = []
    for dataset in (data.train, data.test):
        classes = torch.arange(10).split(2)
        batches = [whole(Subset(dataset, torch.isin(dataset.targets, pair).nonzero().squeeze(1))) for pair in classes]
        parts.append([(batch.inputs["image"], batch.target) for batch in batches])
    tasks, tests = parts
    seen = 0

    @torch.no_grad()
    def score(model: nn.Module) -> None:
        nonlocal seen
        seen += 1
        for x, y in tests[:seen]:
            sum(int((model(a).argmax(dim=1) == b).sum()) for a, b in zip(x.split(512), y.split(512), strict=True))

    width = tasks[0][0][0].numel()

    def run() -> None:
        model = nn.Sequential(Scaled(work.high), nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 10))
        by_hand(tasks, model, work.epochs, work.held, score)

    return run


def prepare_engine(work: Work, folder: Path | None):
    source = Loaded(work.source.load())
    scenario = find("scenario", "class_incremental").load()(data=source, tasks=5, order="given")
    strategy = find("strategy", "er").load()(epochs=work.epochs, batch=BATCH, replay=BATCH, optimizer={"lr": RATE})
    backbone = find("backbone", "mlp").load()(hidden=[256])
    memory = find("memory", "faiss").load()(exemplars=work.held, select=find("policy", "reservoir").load()())
    settings = EngineConfig(device="cpu", threads=1, checkpoint=CheckpointConfig(every={"seconds": 2}))
    sinks = [find("sink", name).load()() for name in SINKS] if folder else []

    def run() -> None:
        place = RunFolder.create(folder) if folder else None
        Engine(scenario, strategy, backbone, memory, engine=settings, log=sinks, folder=place).run()

    return run


def resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def contend(contender: str, name: str, modules: Path, folder: Path) -> None:
    """In a process of its own: run, and tell the baseline, the peak, and what is kept until the end."""
    if modules.exists():
        for module in modules.read_text().splitlines():
            with suppress(Exception):  # some are no files but are made by others as they go
                importlib.import_module(module)
    torch.set_num_threads(1)
    if contender == "hand-written loop":
        run = prepare_hand(work(name))
    else:
        run = prepare_engine(work(name), folder / "run" if "folder" in contender else None)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    baseline, code = resident("VmRSS"), resident("RssFile")
    run()
    peak = resident("VmHWM")
    print("\nmeasured", json.dumps({"baseline": baseline, "peak": peak, "growth": peak - baseline, "code": resident("RssFile") - code}))
    if not modules.exists():
        modules.write_text("\n".join(sys.modules))


def measure(contender: str, name: str, modules: Path) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--contender", contender, "--work", name, "--modules", str(modules), "--folder", folder]
        output = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC})
    if output.returncode:
        sys.exit(output.stderr)
    return json.loads(output.stdout.rsplit("measured", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    for name in ("contender", "work", "modules", "folder"):  # how it calls itself
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.contender:
        contend(options.contender, options.work, Path(options.modules), Path(options.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        modules = {contender: Path(folder) / contender for contender in CONTENDERS}
        for contender in CONTENDERS:  # a first process finds out what is imported on the way, for those that are measured
            measure(contender, "digits", modules[contender])
        for name in ("digits", "images"):
            found = {contender: [] for contender in CONTENDERS}
            for _ in range(options.repeats):
                for contender in CONTENDERS:
                    found[contender].append(measure(contender, name, modules[contender]))
            report(name, found)


def report(name: str, found: dict[str, list[dict[str, int]]]) -> None:
    print(f"{name + ', MiB':30} {'baseline':>9} {'peak':>8} {'growth':>8} {'lowest':>8} {'highest':>8} {'of it code':>11}")
    middle = {}
    for contender, runs in found.items():
        middle[contender] = {key: statistics.median(run[key] for run in runs) / MIB for key in runs[0]}
        m, growths = middle[contender], [run["growth"] / MIB for run in runs]
        row = f"{m['baseline']:9.1f} {m['peak']:8.1f} {m['growth']:8.1f} {min(growths):8.1f} {max(growths):8.1f} {m['code']:11.1f}"
        print(f"  {contender:28} {row}")
    plain, engine = (middle[contender] for contender in CONTENDERS[:2])
    more, code = engine["growth"] - plain["growth"], engine["code"] - plain["code"]
    print(f"  {CONTENDERS[1]} over the {CONTENDERS[0]}: {more:+.1f} MiB, {code:+.1f} of it code;", end=" ")
    print(f"{100 * more / plain['peak']:+.2f} % of its resident memory (bar: at most 5 %),", end=" ")
    without = 100 * (more - code) / (plain["growth"] - plain["code"])
    print(f"{100 * more / plain['growth']:+.0f} % of its growth, {without:+.0f} % without code", flush=True)


if __name__ == "__main__":
    main()
