"""A test-time stream in a run: what is served is answered by `adapt`, in its order, without labels, and scored by those answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import comparable, small_run

from streamcl import feeding, running, scoring
from streamcl.engine import Engine
from streamcl.errors import ConfigError, DataError, Interrupted

ADAPTS = '''
import torch
from streamcl.strategy import Strategy
from streamcl.stream import Prediction


class Counts(Strategy):
    """Counts what it was served and leans towards the class that it has answered most."""

    def start(self, info, context):
        super().start(info, context)
        self.served = torch.zeros(len(info.class_names))

    def learn(self, task):
        raise AssertionError("a test-time stream is not learned")

    def adapt(self, batch):
        assert batch.target is None and not batch.extra, "nothing but the samples"
        told = self.context.task
        assert not self.context.earlier and len(told.train) == 0 and told.name.startswith("segment") and set(told.about) == {"batch"}
        with torch.no_grad():
            scores = self.model(batch) + 0.01 * self.served
        self.served += torch.bincount(scores.argmax(dim=1), minlength=len(self.served))
        return Prediction(scores)

    def state(self):
        return {"served": self.served}

    def restore(self, state):
        self.served = state["served"]
'''


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("STREAMCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counts.py").write_text(ADAPTS)
    return small_run("source", strategy={"name": f"{tmp_path}/counts.py:Counts"})


def test_the_scores_are_those_of_what_was_answered_in_the_order_of_the_stream(config: dict[str, Any], tmp_path: Path) -> None:
    scores = running.run(config, out=tmp_path / "run")
    assert [[value is not None for value in row] for row in scores["matrix"]] == [[i == j for j in range(3)] for i in range(3)]
    assert scores["samples_seen"] == 300 and list(scores["per_domain"]) == ["contrast", "fog", "jpeg_compression"]
    assert list(scores["per_domain"].values()) == [scores["matrix"][i][i] for i in range(3)] == scores["per_task"]
    assert scores["final"] == pytest.approx(sum(scores["per_task"]) / 3) and scores["forgetting"] is None, "of the stream as a whole"

    engine = running.build(running.as_config(config), None, log=[])
    served = torch.zeros(10)
    for task in engine.scenario:  # by hand, over the same stream
        right = 0
        for batch in engine.scenario.test(task, task).batches(32):
            logits = engine._forward(batch) + 0.01 * served
            served += torch.bincount(logits.argmax(dim=1), minlength=10)
            right += int((logits.argmax(dim=1) == batch.target).sum())
        assert right / 100 == scores["matrix"][task.index][task.index]


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_stream_stopped_while_it_is_served_resumes_to_the_same_scores(
    stop: int, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = running.run(config, out=tmp_path / "whole")
    served = 0
    adapt = Engine._adapt

    def stopped(engine: Engine, batch: Any) -> Any:
        nonlocal served
        served += 1
        engine.context.interrupted |= served == stop
        return adapt(engine, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_adapt", stopped)
        with pytest.raises(Interrupted, match="streamcl resume"):
            running.run(config, out=tmp_path / "stopped")
    assert served == stop
    assert comparable(running.resume(tmp_path / "stopped")) == comparable(whole)


def test_a_domain_that_comes_back_is_scored_over_all_its_segments(config: dict[str, Any]) -> None:
    config["scenario"] = {**config["scenario"], "corruptions": ["contrast"], "shift": "gradual", "severity": [1, 5]}
    scores = running.run({**config, "strategy": "source", "log": []})
    assert len(scores["per_task"]) == 2 and scores["per_domain"] == {
        "contrast": pytest.approx(sum(scores["per_task"]) / len(scores["per_task"]))
    }
    assert min(scores["per_task"]) < scores["final"] < max(scores["per_task"])


def test_a_mixed_stream_is_scored_by_the_domain_of_each_sample(config: dict[str, Any]) -> None:
    config["scenario"] = {**config["scenario"], "shift": "mixed"}
    config["strategy"] = "source"
    scores = running.run({**config, "log": []})
    assert set(scores["per_domain"]) == {"contrast", "fog", "jpeg_compression"}
    engine = running.build(running.as_config(config), None, log=[])
    task = next(iter(engine.scenario))
    batch = next(iter(engine.scenario.test(task, task).batches(1000)))
    right = engine._forward(batch).argmax(dim=1) == batch.target
    for domain, value in scores["per_domain"].items():
        mine = torch.tensor([name == domain for name in batch.extra["domain"]])
        assert value == pytest.approx(int(right[mine].sum()) / int(mine.sum()), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "finetune"}, "finetune learns from labels: a test-time strategy is needed"),
        ({"model": {"backbone": "mlp"}}, "this one is new: give model.pretrain"),
        ({"evaluate": {"future": True}}, "leave out evaluate.future"),
        ({"scenario": {"order": "given"}}, "the model was trained on 2, 8, .* and the stream has 0, 1, "),
    ],
)
def test_what_cannot_serve_is_refused_before_it_begins(changes: dict[str, Any], message: str, config: dict[str, Any]) -> None:
    for section, value in changes.items():
        config[section] = {**config[section], **value} if section == "scenario" else value
    with pytest.raises(ConfigError, match=message):
        running.run({**config, "log": []})


def test_a_served_run_cannot_be_fed_and_can_be_asked(config: dict[str, Any], tmp_path: Path) -> None:
    running.run(config, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="learns from no labels"):
        feeding.feed(tmp_path / "run", "digits")
    learned = running.load(tmp_path / "run")
    assert learned.classes == ["2", "8", "4", "9", "1", "6", "7", "3", "0", "5"]
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    ("scenario", "answer"),
    [
        ({"name": "multi_label", "data": {"name": "digit_scenes", "scenes": 60, "test_scenes": 30}, "increment": 5}, list),
        (
            {
                "name": "domain_incremental",
                "data": {"name": "shapes", "target": "value", "samples": 60, "test_samples": 20},
                "by": "domain",
            },
            float,
        ),
    ],
)
def test_a_run_of_other_targets_is_scored_again_and_asked_and_takes_its_own_kind_alone(
    scenario: dict[str, Any], answer: type, tmp_path: Path
) -> None:
    backbone = {"name": "fusion", "width": 8, "modalities": ["image"]}
    scores = running.run(
        small_run("finetune", scenario=scenario, model={"backbone": backbone}, memory={"exemplars": 0}), out=tmp_path / "run"
    )
    again = scoring.score(tmp_path / "run")
    assert again["overall"] == pytest.approx(scores["final"], rel=1e-6) and scoring.table(again)
    assert (tmp_path / "run").exists() and scores["metrics"]
    with pytest.raises(DataError, match=r"digits is labelled with class, and this run takes (labels|value)"):
        feeding.feed(tmp_path / "run", "digits")
    with pytest.raises(ConfigError, match="data can be given to score for a model of classes"):
        scoring.score(tmp_path / "run", "digits")
    learned = running.load(tmp_path / "run")
    inputs = {
        name: torch.rand(3, *m.shape) if m.high is None else torch.zeros(3, *m.shape, dtype=torch.uint8)
        for name, m in learned.info.modalities.items()
        if m.kind != "text"
    }
    inputs |= {name: ["one", "two", "three"] for name, m in learned.info.modalities.items() if m.kind == "text"}
    assert [type(one) for one in learned.predict(inputs)] == [answer] * 3


def test_predict_is_not_told_what_would_tell_it_the_answer(tmp_path: Path) -> None:
    (tmp_path / "nosy.py").write_text(
        "from streamcl.strategy import GradientStrategy\n\n\n"
        "class Nosy(GradientStrategy):\n"
        "    def predict(self, batch):\n"
        "        assert batch.target is None and not batch.extra, sorted(batch.extra)\n"
        "        return super().predict(batch)\n"
    )
    scenes = {"name": "multi_label", "data": {"name": "digit_scenes", "scenes": 60, "test_scenes": 30}, "increment": 5}
    running.run(small_run(f"{tmp_path}/nosy.py:Nosy", scenario=scenes, memory={"exemplars": 0}, log=[]), out=tmp_path / "run")
