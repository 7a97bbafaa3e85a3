"""Kills real runs with SIGKILL at random moments, resumes each in a new process, and compares its scores.json with the undisturbed run's.

Small runs on scikit-learn's digits (tests/small_runs.py, a little longer) that write a checkpoint every few steps. A run is killed again
and again, each time resumed by a process of its own, until it comes through; then every number of its scores.json but the seconds must
be that of a run that nobody killed. Moments are drawn uniformly, so some fall into the start of a process and many into the write of a
checkpoint (the `.writing` folder is still there).

To be quick, this process imports once whatever such a run imports, and forks the processes that run, which saves each of them some
seconds of imports. They share code and nothing else: nothing is computed, seeded or read before a fork, and torch keeps to one thread.

    python tools/kills.py [--kills 100] [--strategies er,icarl,gacil,finetune,joint] [--steps 5] [--seed 0]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamcl import running

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from small_runs import comparable, small_run

LONGER: dict[str, dict[str, Any]] = {
    "er": {"epochs": 25},
    "finetune": {"epochs": 25, "batch": 32},
    "joint": {"epochs": 8, "batch": 32},
    "icarl": {"epochs": 15, "batch": 16},
    "gacil": {"buffer": 400, "batch": 4},
}
KILLS_PER_RUN = 6  # at most; a run that comes through early has fewer


@dataclass
class Tally:
    runs: int = 0
    kills: int = 0
    before: int = 0  # before there was a run to resume
    writing: int = 0  # while a checkpoint was written
    identical: int = 0
    different: int = 0


def begin(config: dict[str, Any], out: Path) -> int:
    """A process that starts the run, or goes on with it; its id."""
    process = os.fork()
    if process:
        return process
    try:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        torch.manual_seed(os.getpid())  # what happened before a resume must not matter
        if (out / "status.json").exists():
            running.resume(out)
        else:
            shutil.rmtree(out, ignore_errors=True)
            running.run(config, out=out)
        out.with_suffix(".modules").write_text("\n".join(sys.modules), encoding="utf-8")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def import_all(names: list[str]) -> None:
    """What a run has imported, so that the processes that are forked from now on have it."""
    for name in names:
        with suppress(Exception):  # some are no files but are made by others as they go
            importlib.import_module(name)


def finished(process: int, seconds: float | None) -> bool:
    """Whether the process came through within this time (None: however long it takes); one that failed is an error here."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, 0 if until is None else os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"the run ended with exit code {os.waitstatus_to_exitcode(status)}")
            return True
        if until is not None and time.monotonic() >= until:
            return False
        time.sleep(0.001)


def scores(out: Path) -> dict[str, Any]:
    return comparable(json.loads((out / "scores.json").read_text(encoding="utf-8")))


def attack(strategy: str, kills: int, steps: int, chance: random.Random, folder: Path) -> Tally:
    config = small_run(strategy, strategy=LONGER.get(strategy, {}), engine={"checkpoint": {"every": {"steps": steps}}})
    for attempt in range(3):  # the first ones say what is to be imported, the last one how long a run takes
        whole, started = folder / f"undisturbed{attempt}", time.monotonic()
        finished(begin(config, whole), None)
        span, expected = time.monotonic() - started, scores(whole)
        import_all(whole.with_suffix(".modules").read_text(encoding="utf-8").splitlines())
    tally = Tally()
    while tally.kills < kills:
        out = folder / f"killed{tally.runs}"
        tally.runs += 1
        process, left = begin(config, out), min(KILLS_PER_RUN, kills - tally.kills)
        while not finished(process, chance.uniform(0, span / 2) if left else None):
            os.kill(process, signal.SIGKILL)
            left -= 1
            os.waitpid(process, 0)
            tally.kills += 1
            tally.before += not (out / "status.json").exists()
            tally.writing += any((out / "checkpoints").glob(".*.writing"))
            process = begin(config, out)
        same = scores(out) == expected
        tally.identical += same
        tally.different += not same
        if same:
            shutil.rmtree(out)
        else:
            print(f"{strategy}: {out} differs from {whole}: both are kept")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, divided among the strategies")
    parser.add_argument("--strategies", default="er,icarl,gacil,finetune,joint")
    parser.add_argument("--steps", type=int, default=5, help="between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names, chance = options.strategies.split(","), random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    started, totals = time.monotonic(), Tally()
    print(
        f"{'strategy':12} {'runs':>5} {'kills':>6} {'before it began':>16} {'inside a checkpoint':>20} {'identical':>10} {'different':>10}"
    )
    for number, name in enumerate(names):
        share = options.kills // len(names) + (number < options.kills % len(names))
        (folder / name).mkdir()
        tally = attack(name, share, options.steps, chance, folder / name)
        for field in vars(totals):
            setattr(totals, field, getattr(totals, field) + getattr(tally, field))
        print(_line(name, tally), flush=True)
    print(_line("all", totals))
    print(f"{time.monotonic() - started:.0f} s")
    if totals.different:
        sys.exit(1)
    shutil.rmtree(folder)


def _line(name: str, tally: Tally) -> str:
    return f"{name:12} {tally.runs:5} {tally.kills:6} {tally.before:16} {tally.writing:20} {tally.identical:10} {tally.different:10}"


if __name__ == "__main__":
    main()
