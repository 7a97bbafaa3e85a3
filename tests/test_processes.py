"""Several processes that train one model give the result of one, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from small_runs import comparable, small_run

from streamcl import running

RUN = "from streamcl.cli import main; main()"


LAUNCHED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    for process in LAUNCHED:
        process.kill()
    LAUNCHED.clear()


def launch(*arguments: str, world: int = 2) -> list[subprocess.Popen]:
    """What torchrun and accelerate launch do: one process per rank, told of each other through the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    LAUNCHED.extend(started)
    return started


def finish(processes: list[subprocess.Popen]) -> str:
    outputs = [process.communicate(timeout=150)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return "\n".join(outputs)


def same(one: dict, several: dict) -> None:
    left, right = comparable(one), comparable(several)
    assert left.pop("resume")["kind"] == "bitwise" and right.pop("resume")["kind"] == "statistical"
    assert json.loads(json.dumps(left)) == right


@pytest.mark.parametrize("strategy", ["finetune", "er", "gacil"])
def test_two_processes_give_the_result_of_one_also_after_a_kill(strategy: str, tmp_path: Path) -> None:
    # Batches of 31 and test sets of odd sizes: neither divides by two, and nothing may be counted twice.
    options = {"gacil": {"batch": 31}}.get(strategy, {"batch": 31, "epochs": 6})
    config = small_run(strategy, strategy=options, engine={"checkpoint": {"every": {"steps": 10}}}, evaluate={"batch": 37})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    one = running.run(config, out=tmp_path / "one")
    out = tmp_path / "two"
    processes = launch("run", str(tmp_path / "config.yaml"), "--out", str(out))
    while all(p.poll() is None for p in processes) and not list((out / "checkpoints").glob("0*")):
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(launch("resume", str(out)))
    same(one, json.loads((out / "scores.json").read_text()))


def test_a_strategy_that_has_not_shown_it_refuses_several_processes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_run("icarl")))
    processes = launch("run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"))
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "ICaRL has not shown that 2 processes give it the result of one" in outputs[0]
    assert not (tmp_path / "run").exists()


def test_sigterm_stops_all_processes_at_one_step(tmp_path: Path) -> None:
    config = small_run("er", strategy={"epochs": 300})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    processes = launch("run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"))
    while all(p.poll() is None for p in processes) and not (tmp_path / "run/events.jsonl").exists():
        time.sleep(0.05)
    time.sleep(1.0)
    processes[1].terminate()  # one is told, all stop
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [130, 130], outputs
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "interrupted"
