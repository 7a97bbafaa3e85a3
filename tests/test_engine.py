"""What a run promises: the same scores for the same seed, its record on disk, its protocols, and where its model starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import comparable, small_run

from streamcl import running
from streamcl.errors import ConfigError, RunError
from streamcl.stream import Batch


def test_the_same_seed_gives_the_same_scores_and_another_seed_another_order(tmp_path: Path) -> None:
    first, again = (running.run(small_run("er"), out=tmp_path / name) for name in ("a", "b"))
    other = running.run(small_run("er"), ["seed=1"], out=tmp_path / "c")
    assert comparable(first) == comparable(again)
    assert [task["classes"] for task in first["tasks"]] != [task["classes"] for task in other["tasks"]]


def test_a_runs_folder_is_its_whole_record(tmp_path: Path) -> None:
    scores = running.run(small_run("icarl", log=["jsonl", "tensorboard", "report"]), out=tmp_path / "run")
    folder = tmp_path / "run"
    assert json.loads((folder / "scores.json").read_text()) == json.loads(json.dumps(scores))
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert (folder / "report.html").stat().st_size > 10_000 and list((folder / "tensorboard").iterdir())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["strategy"]["mirror"] is False and config["evaluate"]["batch"] == 512  # every option, defaults filled in
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["seed"] == 0
    again = running.run(folder / "config.yaml", out=tmp_path / "again")
    assert comparable(again) == comparable(scores)


def test_memory_bytes_are_the_exemplars_and_what_was_added_to_the_model(tmp_path: Path) -> None:
    scores = running.run(small_run("er", log=[]), out=tmp_path / "run")
    exemplars = 60 * (64 * 1 + 8 + 8 + 4)  # uint8 pixels, label, id, and the task that it came with
    rows = 8 * (32 + 1) * 4  # the head's rows beyond those of the first task
    assert scores["memory_bytes"] == exemplars + rows
    assert scores["parameters"] == 64 * 32 + 32 + 10 * 32 + 10 == scores["trainable_parameters"]


def test_both_protocols_come_from_one_run_and_knowing_the_task_helps(tmp_path: Path) -> None:
    evaluate = {"protocols": ["class_incremental", "task_incremental"]}
    scores = running.run(small_run("finetune", log=[], evaluate=evaluate), out=tmp_path / "run")
    plain, told = scores["protocols"]["class_incremental"], scores["protocols"]["task_incremental"]
    assert plain["matrix"] == scores["matrix"]
    pairs = [(a, b) for i, row in enumerate(plain["matrix"]) for a, b in zip(row, told["matrix"][i], strict=True) if a is not None]
    assert all(b >= a for a, b in pairs) and told["final"] > plain["final"] + 0.2


def test_future_tasks_are_scored_on_request_and_change_nothing(tmp_path: Path) -> None:
    plain = running.run(small_run("er", log=[]), out=tmp_path / "plain")
    future = running.run(small_run("er", log=[], evaluate={"future": True}), out=tmp_path / "future")
    assert all(value is not None for row in future["matrix"] for value in row)
    assert future["per_task"] == plain["per_task"] and plain["forward_transfer"] is None
    assert isinstance(future["forward_transfer"], float)


def test_validation_is_scored_beside_the_test_set(tmp_path: Path) -> None:
    scenario = {"name": "class_incremental", "data": "digits", "tasks": 5, "validation": 0.2}
    scores = running.run(small_run("er", log=[], scenario=scenario), out=tmp_path / "run")
    assert len(scores["validation"]["per_task"]) == 5 and scores["validation"]["per_task"] != scores["per_task"]
    assert scores["samples_seen"] < 3 * 1257 * 0.85


def test_a_run_starts_from_another_runs_model(tmp_path: Path) -> None:
    running.run(small_run("joint", log=[]), out=tmp_path / "first")
    trained = running.load(tmp_path / "first").model.backbone.state_dict()
    config = small_run("finetune", log=[])
    config["model"] = {"run": str(tmp_path / "first")}
    engine = running.build(running.as_config(config), None, log=[])
    assert all(torch.equal(value, trained[name]) for name, value in engine.model.backbone.state_dict().items())
    assert engine.run()["final"] is not None


def test_pretraining_is_done_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMCL_CACHE", str(tmp_path / "cache"))
    config = small_run("finetune", log=[])
    pretrain = {"scenario": {"name": "class_incremental", "data": "digits", "tasks": 1}, "strategy": {"name": "joint", "epochs": 3}}
    config["model"] = {**config["model"], "pretrain": pretrain}
    settings = running.as_config(config)
    first = running.build(settings, None, log=[]).model.backbone.state_dict()
    (kept,) = (tmp_path / "cache/pretrained").iterdir()
    when = kept.stat().st_mtime_ns
    again = running.build(settings, None, log=[]).model.backbone.state_dict()
    assert kept.stat().st_mtime_ns == when and all(torch.equal(first[name], again[name]) for name in first)
    scratch = running.build(running.as_config(small_run("finetune", log=[])), None, log=[]).model.backbone.state_dict()
    assert not torch.equal(first["layers.0.weight"], scratch["layers.0.weight"])


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RunError, match="is not empty; name another folder with --out"):
        running.run(small_run("er"), out=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    scenario = {"name": "class_incremental", "data": "digits", "tasks": 11}
    with pytest.raises(ConfigError):
        running.run(small_run("er", scenario=scenario), out=tmp_path / "deep" / "run")
    assert not list(tmp_path.iterdir())


def test_resuming_a_finished_run_returns_its_scores(tmp_path: Path) -> None:
    scores = running.run(small_run("gacil", log=[]), out=tmp_path / "run")
    assert running.resume(tmp_path / "run") == json.loads(json.dumps(scores))


def test_the_measures_of_a_strategy_are_averaged_over_the_test_samples(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from streamcl.strategy import GradientStrategy\n\n\n"
        "class Mine(GradientStrategy):\n"
        "    def measure(self, batch):\n"
        "        return {'mean_label': float(batch.target.float().mean())}\n"
    )
    scores = running.run(small_run(f"{tmp_path}/mine.py:Mine", log=[], evaluate={"batch": 50}), out=tmp_path / "run")
    engine = running.load(tmp_path / "run")
    assert scores["metrics"]["mean_label"]["per_task"][0] == pytest.approx(0.5, abs=0.02) and engine is not None


def test_random_states_are_restored_whole() -> None:
    import random

    import numpy as np

    from streamcl.seeding import random_state, restore_random

    state = random_state()
    drawn = (torch.rand(3), np.random.rand(3), random.random())
    restore_random(state)
    again = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(drawn[0], again[0]) and (drawn[1] == again[1]).all() and drawn[2] == again[2]


def test_batches_are_indexed_joined_and_moved_with_every_field() -> None:
    batch = Batch(
        {"image": torch.arange(6).view(3, 2), "text": ["a", "b", "c"]},
        torch.tensor([0, 1, 2]),
        torch.tensor([10, 11, 12]),
        present={"image": torch.tensor([True, False, True])},
        task=torch.tensor([0, 0, 1]),
        extra={"logits": torch.rand(3, 4), "answer": ["x", "y", "z"]},
    )
    part = batch[torch.tensor([2, 0])]
    assert part.inputs["text"] == ["c", "a"] and part.ids.tolist() == [12, 10] and part.extra["answer"] == ["z", "x"]
    assert part.present["image"].tolist() == [True, True] and part.task.tolist() == [1, 0] and len(batch[1:]) == 2
    both = Batch.cat([part, batch])
    assert both.ids.tolist() == [12, 10, 10, 11, 12] and both.inputs["text"] == ["c", "a", "a", "b", "c"]
    assert both.present["image"].tolist() == [True, True, True, False, True] and both.extra["logits"].shape == (5, 4)
    assert batch.to("cpu") is batch
    with pytest.raises(ValueError, match="different modalities"):
        Batch.cat([batch, Batch({"audio": torch.rand(1, 2)}, None, torch.tensor([1]))])
