"""A run that was stopped, however, goes on as if nothing had happened: the final scores are those of the run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import comparable, learning, small_run

from streamcl import running
from streamcl.checkpoint import Checkpoints
from streamcl.engine import Engine
from streamcl.errors import DataError, DiskError, Interrupted, RunError, TrainingError


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Every engine made from now on is asked to stop at this training step, as Ctrl-C would."""
    limits, tick = Engine._set_limits, Engine._tick

    def set_limits(engine: Engine) -> None:
        limits(engine)
        if engine.context.steps < step:
            engine.context.step_limit = min(engine.context.step_limit, step)

    def ask_and_tick(engine: Engine) -> None:
        engine.context.interrupted |= engine.context.steps == step
        tick(engine)

    monkeypatch.setattr(Engine, "_set_limits", set_limits)
    monkeypatch.setattr(Engine, "_tick", ask_and_tick)


def stopped_and_resumed(config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> dict[str, Any]:
    """The scores of a run that was stopped at this step and went on, whatever happened in between."""
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted, match="streamcl resume"):
            running.run(config, out=folder)
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    torch.manual_seed(999)
    return running.resume(folder)


@pytest.mark.parametrize("strategy", learning())
def test_a_run_stopped_at_any_step_resumes_to_the_same_scores(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = running.run(small_run(strategy), out=tmp_path / "whole")
    steps = json.loads((tmp_path / "whole/status.json").read_text())["cursor"]["step"]
    for stop in random.Random(strategy).sample(range(1, steps), 2):
        assert comparable(stopped_and_resumed(small_run(strategy), tmp_path / f"stopped{stop}", monkeypatch, stop)) == comparable(whole)


RUN = "import sys; from streamcl.cli import main; sys.argv = ['streamcl', *sys.argv[1:]]; main()"


def launch(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("strategy", ["er", "icarl", "gacil"])
def test_resume_after_sigkill_gives_the_same_scores(strategy: str, tmp_path: Path) -> None:
    long = {"er": {"epochs": 25}, "icarl": {"epochs": 15, "batch": 16}, "gacil": {"buffer": 500, "batch": 4}}[strategy]
    config = small_run(strategy, strategy=long, engine={"checkpoint": {"every": {"steps": 7}}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    whole = running.run(config, out=tmp_path / "whole")
    chance, out = random.Random(strategy), tmp_path / "killed"
    saved = Checkpoints(out / "checkpoints")
    process, kills = launch("run", str(tmp_path / "config.yaml"), "--out", str(out)), 0
    for _ in range(3):
        before = saved.numbers()
        while process.poll() is None and saved.numbers() == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.4))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        process = launch("resume", str(out))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert kills >= 1
    scores = json.loads((out / "scores.json").read_text())
    assert comparable(scores) == json.loads(json.dumps(comparable(whole)))


def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    config = small_run("er", strategy={"epochs": 200})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    process = launch("run", str(tmp_path / "config.yaml"), "--out", str(out))
    while process.poll() is None and not (out / "events.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"streamcl resume {out}" in output and "Traceback" not in output
    assert json.loads((out / "status.json").read_text())["status"] == "interrupted"
    assert Checkpoints(out / "checkpoints").numbers()


def stopped_run(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int = 60) -> dict:
    config = small_run("er", engine={"checkpoint": {"every": {"steps": 20}}})
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            running.run(config, out=folder)
    return config


def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stopped_run(tmp_path / "run", monkeypatch)
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    newest = checkpoints.path(checkpoints.numbers()[-1])
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)
    resumed = running.resume(tmp_path / "run")
    warnings = [line for line in (tmp_path / "run/events.jsonl").read_text().splitlines() if '"warning"' in line]
    assert any("tensors.safetensors does not have its checksum" in line and newest.name in line for line in warnings)
    assert comparable(resumed) == comparable(running.run(config, out=tmp_path / "whole"))


@pytest.mark.parametrize("lost", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_lost_checkpoint_file_costs_one_checkpoint(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stopped_run(tmp_path / "run", monkeypatch)
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    (checkpoints.path(checkpoints.numbers()[-1]) / lost).unlink()
    assert comparable(running.resume(tmp_path / "run")) == comparable(running.run(config, out=tmp_path / "whole"))


def test_a_run_without_any_whole_checkpoint_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_run(tmp_path / "run", monkeypatch)
    for number in Checkpoints(tmp_path / "run/checkpoints").numbers():
        (Checkpoints(tmp_path / "run/checkpoints").path(number) / "state.json").write_text("{}")
    with pytest.raises(RunError, match=r"every checkpoint .* is damaged"):
        running.resume(tmp_path / "run")


@pytest.mark.parametrize("writes", [0, 5, 9])  # in the middle of what is written after the first checkpoint
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_later(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run("er")
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        if Checkpoints(tmp_path / "run/checkpoints").numbers():
            calls.append(descriptor)
        if len(calls) > writes:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match="the disk is full"):
            running.run(config, out=tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    assert checkpoints.numbers() and not list((tmp_path / "run/checkpoints").glob(".*"))
    assert comparable(running.resume(tmp_path / "run")) == comparable(running.run(config, out=tmp_path / "whole"))


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_run(tmp_path / "run", monkeypatch)
    hold = f"from streamcl.run_folder import RunFolder; folder = RunFolder.open(Path({str(tmp_path / 'run')!r})); print('held', flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import time; from pathlib import Path; {hold}; time.sleep(60)"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(RunError, match=f"in use by process {holder.pid}"):
            running.resume(tmp_path / "run")
    finally:
        holder.kill()
        holder.wait()
    assert running.resume(tmp_path / "run")["final"] is not None


def test_a_run_of_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_run(tmp_path / "run", monkeypatch)
    status = json.loads((tmp_path / "run/status.json").read_text())
    (tmp_path / "run/status.json").write_text(json.dumps({**status, "format": 99}))
    with pytest.raises(RunError, match="newer streamcl"):
        running.resume(tmp_path / "run")


def test_data_that_changed_since_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "data.csv"
    table.write_text("a,b,label\n" + "".join(f"{i % 7},{i % 3},{'even' if i % 2 else 'odd'}\n" for i in range(80)))
    scenario = {
        "name": "class_incremental",
        "data": {"name": "csv", "path": str(table), "label": "label", "test_fraction": 0.25},
        "tasks": 2,
    }
    config = small_run("er", scenario=scenario, engine={"checkpoint": {"every": {"steps": 1}}})
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            running.run(config, out=tmp_path / "run")
    table.write_text(table.read_text() + "1,1,odd\n")
    with pytest.raises(DataError, match=r"data\.csv has changed since"):
        running.resume(tmp_path / "run")


def test_a_plugin_that_changed_since_is_told_once_and_stays_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, beside = tmp_path / "mine.py", tmp_path / "mended_base.py"
    plugin.write_text("from mended_base import Base\n\n\nclass Mine(Base):\n    pass\n")
    beside.write_text("from streamcl.strategy import GradientStrategy\n\n\nclass Base(GradientStrategy):\n    pass\n")
    config = small_run(f"{plugin}:Mine", engine={"checkpoint": {"every": {"steps": 1}}})

    def warnings() -> list[str]:
        return [line for line in (tmp_path / "run/events.jsonl").read_text().splitlines() if '"kind": "warning"' in line]

    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            running.run(config, out=tmp_path / "run")
        stop_at(patch, 6)
        with pytest.raises(Interrupted):
            running.resume(tmp_path / "run")
        assert not warnings()
        beside.write_text(beside.read_text() + "# mended\n")
        stop_at(patch, 9)
        with pytest.raises(Interrupted):
            running.resume(tmp_path / "run")
    assert len(warnings()) == 1 and f"{beside} has changed since the run last used it" in warnings()[0]
    assert running.resume(tmp_path / "run")["resume"] == {"kind": "none", "why": "mended_base.py changed while the run was under way"}
    assert len(warnings()) == 1
    files = json.loads((tmp_path / "run/files.json").read_text())
    assert "before" not in files[str(plugin)] and len(files[str(beside)]["before"]) == 1


def test_a_loss_that_is_nan_stops_with_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = small_run("finetune", strategy={"optimizer": {"lr": 1e12}, "epochs": 4}, engine={"checkpoint": {"every": {"steps": 1}}})
    with pytest.raises(TrainingError, match=r"(the loss is|not finite).*task \d.*step \d+.*(checkpoint)") as failure:
        running.run(config, out=tmp_path / "run")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "failed" and status["error"] == str(failure.value)
    for number in Checkpoints(tmp_path / "run/checkpoints").numbers():
        state = Checkpoints(tmp_path / "run/checkpoints")
        loaded = state.load(lambda message: pytest.fail(message))
        assert number and all(torch.isfinite(value).all() for value in loaded["model"]["tensors"].values())


def test_a_torn_line_in_the_events_is_skipped_and_the_file_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamcl.sinks.jsonl import read_events

    stopped_run(tmp_path / "run", monkeypatch)
    with (tmp_path / "run/events.jsonl").open("a") as file:
        file.write('{"kind": "progr')
    running.resume(tmp_path / "run")
    kinds = [event.kind for event in read_events(tmp_path / "run/events.jsonl")]
    assert kinds[-1] == "run_finished" and kinds.count("run_started") == 2
