"""The memory within whole runs: every policy, store and budget by its name in the YAML, stopped and resumed, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import comparable, small_run
from streamcl.memory import disk
from test_processes import launch
from test_resume import stopped_and_resumed

from streamcl import running
from streamcl.checkpoint import Checkpoints
from streamcl.errors import ConfigError
from streamcl.plugins import plugins


@pytest.mark.parametrize("policy", sorted(plugins("policy")))
def test_replay_with_any_policy_goes_on_as_if_never_stopped(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run("er", strategy={"epochs": 2}, memory={"select": policy})
    whole = running.run(config, out=tmp_path / "whole")
    assert comparable(stopped_and_resumed(config, tmp_path / "run", monkeypatch, 37)) == comparable(whole)
    assert whole["memory_bytes"] > 60 * 64


BUDGETS: list[dict[str, Any]] = [
    {"unit": "per_class", "exemplars": 6},
    {"unit": "bytes", "exemplars": 6000},
    {"store": "both"},
]


@pytest.mark.parametrize("memory", BUDGETS, ids=str)
def test_every_budget_and_store_resumes(memory: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run("er", strategy={"epochs": 2}, memory=memory)
    whole = running.run(config, out=tmp_path / "whole")
    assert comparable(stopped_and_resumed(config, tmp_path / "run", monkeypatch, 53)) == comparable(whole)


@pytest.mark.parametrize("strategy", ["er", "icarl"])
def test_exemplars_on_disk_give_the_scores_of_exemplars_in_memory(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SEALED", 600)
    config = small_run(strategy, strategy={"epochs": 2})
    on_disk = small_run(strategy, strategy={"epochs": 2}, memory={"disk": True}, engine={"checkpoint": {"every": {"steps": 20}}})
    inside = running.run(config, out=tmp_path / "memory")
    resumed = stopped_and_resumed(on_disk, tmp_path / "disk", monkeypatch, 45)
    assert resumed["matrix"] == inside["matrix"] and resumed["per_class"] == inside["per_class"]
    assert list((tmp_path / "disk/checkpoints/parts").iterdir())
    named = {name for n in Checkpoints(tmp_path / "disk/checkpoints").numbers() for name in _parts(tmp_path / "disk/checkpoints", n)}
    assert {path.name for path in (tmp_path / "disk/checkpoints/parts").iterdir()} == named  # nothing is left behind


def _parts(folder: Path, number: int) -> list[str]:
    return json.loads((Checkpoints(folder).path(number) / "manifest.json").read_text())["parts"]


@pytest.mark.parametrize("store", ["features", "none"])
def test_replay_of_raw_samples_refuses_a_store_without_them(store: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"er needs raw exemplars and memory.store is {store}: set it to raw"):
        running.run(small_run("er", memory={"store": store}), out=tmp_path / "run")


SHARDED = """
from streamcl.strategy import GradientStrategy

class Sharded(GradientStrategy):
    processes = True

    def after_step(self, batch):
        self.memory.exemplars.add(batch[self.context.rank :: self.context.world])
"""


def test_two_processes_whose_memories_come_apart_are_stopped(tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    config = small_run("finetune", strategy={"epochs": 1})
    config["strategy"] = {"name": "sharded.py:Sharded", "epochs": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    processes = launch("run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"))
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    assert "the 2 processes remember different samples: sharded must offer its memory the same samples" in outputs[0].lower()


def test_files_of_exemplars_are_not_shared_by_two_processes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_run("er", memory={"disk": True})))
    processes = launch("run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"))
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "set memory.disk=false, or start one" in outputs[0]
