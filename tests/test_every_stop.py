"""Tiny runs are stopped at every place where a run can be stopped, in the configurations where something happens there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import comparable
from torch import Tensor

from streamcl import running
from streamcl.config import EngineConfig, EvaluateConfig
from streamcl.engine import Engine
from streamcl.errors import Interrupted, PluginError, TrainingError
from streamcl.options import Stage
from streamcl.plugins import find
from streamcl.run_folder import RunFolder
from streamcl.strategy import GradientStrategy, Term
from streamcl.stream import Batch, Prediction, Task


class Fisher(Term):
    """Gathers squared gradients over the task's data after it, in a pass of its own, and holds the weights near where they were."""

    def __init__(self, *, strength: float = 0.1, name: str = "fisher") -> None:
        self.strength, self.name = strength, name
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def loss(self, batch: Batch) -> Tensor | None:
        named = dict(self.strategy.model.backbone.named_parameters())
        parts = [(self.importance[n] * (named[n] - self.anchor[n]) ** 2).sum() for n in self.importance]
        return self.strength * torch.stack(parts).sum() if parts else None

    def after_task(self, task: Task) -> None:
        strategy = self.strategy
        for raw in strategy.context.batches(task.train, 64, name=self.name, shuffle=False):
            strategy.model.zero_grad()
            strategy.loss(strategy.context.prepare(raw, train=False)).backward()
            for n, p in strategy.model.backbone.named_parameters():
                if p.grad is not None:
                    self.sums[n] = self.sums.get(n, torch.zeros_like(p)) + p.grad.detach() ** 2
        for n, p in strategy.model.backbone.named_parameters():
            self.importance[n] = self.importance.get(n, torch.zeros_like(p)) + self.sums[n]
            self.anchor[n] = p.detach().clone()
        self.sums = {}

    def state(self) -> dict[str, Any]:
        return {"importance": self.importance, "anchor": self.anchor, "sums": self.sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.importance, self.anchor, self.sums = dict(state["importance"]), dict(state["anchor"]), dict(state["sums"])


class TwoStages(GradientStrategy):
    """A warm-up before the task and a second stage on the head alone after it, each with its own optimiser; `known` follows the task."""

    def enter_task(self, task: Task) -> None:
        self.known = len(task.seen) - len(task.classes)

    def before_task(self, task: Task) -> None:
        self.fit(task, task.train, Stage(epochs=1, batch=200), name="warm-up")

    def loss(self, batch: Batch) -> Tensor:
        assert self.known == self.model.classes - 2
        return super().loss(batch)

    def after_task(self, task: Task) -> None:
        self.fit(task, task.train, Stage(epochs=2, batch=150), name="head", parameters=self.model.head.parameters())


class Drawing(GradientStrategy):
    """Its predictions depend on the random state, as a method with dropout at test time does."""

    def predict(self, batch: Batch) -> Prediction:
        scores = self.model(batch)
        return Prediction(scores + 0.5 * torch.randn_like(scores))


def make(kind: str, name: str, **options: Any) -> Any:
    return find(kind, name).load()(**options)


SMALL = {"epochs": 2, "batch": 100}
CASES: dict[str, Any] = {
    "icarl with a term": (lambda: make("strategy", "icarl", **SMALL, optimizer={"lr": 1.0}, with_=(Fisher(),)), {}, {}),
    "er with two terms": (lambda: make("strategy", "er", **SMALL, with_=(Fisher(), Fisher(name="again"))), {}, {}),
    "stages around a task": (lambda: TwoStages(**SMALL, optimizer={"name": "adam", "lr": 0.01}), {}, {}),
    "early stopping": (lambda: make("strategy", "er", epochs=4, batch=100, patience=1), {"validation": 0.2}, {}),
    "accumulation": (lambda: make("strategy", "er", epochs=2, batch=30, accumulate=3, optimizer={"momentum": 0.9}), {}, {}),
    "scores within tasks": (lambda: Drawing(**SMALL), {}, {"every": {"samples": 150}}),
    "future tasks": (lambda: make("strategy", "icarl", **SMALL, optimizer={"lr": 1.0}), {}, {"future": True, "batch": 30}),
    "statistics": (lambda: make("strategy", "gacil", buffer=40), {"repeat": 0.2}, {}),
}


def build(case: str, folder: Path) -> Engine:
    strategy, scenario, evaluate = CASES[case]
    classes = [["3", "7"], ["0", "8"]]
    stream = make("scenario", "class_incremental", data=make("source", "digits"), classes=classes, **scenario)
    backbone, memory = make("backbone", "mlp", hidden=[16]), make("memory", "faiss", exemplars=40)
    settings = EngineConfig(device="cpu", threads=1)
    folder.mkdir(exist_ok=True)
    evaluation = EvaluateConfig(**evaluate)
    return Engine(stream, strategy(), backbone, memory, engine=settings, evaluate=evaluation, folder=RunFolder(folder))


def stop_after(engine: Engine, places: int) -> list[int]:
    """Ask the engine to stop at its next place, once this many have gone by; returns a count that goes on."""
    count = [0]

    def counted(original: Any) -> Any:
        def place() -> None:
            count[0] += 1
            engine.context.interrupted |= count[0] == places
            original()

        return place

    engine._between = counted(engine._between)  # type: ignore[method-assign]
    engine.context.tick = counted(engine.context.tick)
    limits = engine._set_limits

    def every_step() -> None:
        limits()
        engine.context.step_limit = 0

    engine._set_limits = every_step  # type: ignore[method-assign]
    return count


@pytest.mark.parametrize("case", list(CASES))
def test_a_run_may_be_stopped_anywhere_and_twice(case: str, tmp_path: Path) -> None:
    whole = build(case, tmp_path / "whole")
    places = stop_after(whole, -1)
    expected = comparable(whole.run())
    chosen = range(1, places[0] + 1) if places[0] <= 24 else sorted({1 + round(i * (places[0] - 1) / 23) for i in range(24)})
    for place in chosen:
        folder = tmp_path / f"stopped-{place}"
        first = build(case, folder)
        stop_after(first, place)
        with pytest.raises(Interrupted):
            first.run()
        second = build(case, folder)
        stop_after(second, 1)  # and at once again
        torch.manual_seed(place)
        try:
            found = second.run(resume=True)
        except Interrupted:
            found = build(case, folder).run(resume=True)
        assert json.dumps(comparable(found)) == json.dumps(expected), f"stopped at place {place} of {places[0]}"


def test_a_task_that_cannot_be_scored_is_not_learned_again(tmp_path: Path) -> None:
    engine = build("er with two terms", tmp_path / "run")
    engine.strategy.predict = lambda batch: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(PluginError, match="division by zero"):
        engine.run()
    again = build("er with two terms", tmp_path / "run")
    learned: list[int] = []
    learn = again.strategy.learn
    again.strategy.learn = lambda task: learned.append(task.index) or learn(task)  # type: ignore[method-assign, func-returns-value]
    again.run(resume=True)
    assert learned == [1]


def test_a_pass_gone_through_twice_is_an_error_that_says_so(tmp_path: Path) -> None:
    class Twice(GradientStrategy):
        def after_task(self, task: Task) -> None:
            for _ in self.context.batches(task.train, 100):
                pass

    CASES["twice"] = (lambda: Twice(**SMALL), {}, {})
    try:
        with pytest.raises(PluginError, match=r"the pass 'train' was gone through already in this task: .* \(name=\.\.\.\)"):
            build("twice", tmp_path / "run").run()
    finally:
        del CASES["twice"]


def test_gradients_of_one_pass_do_not_reach_the_next(tmp_path: Path) -> None:
    engine = build("stages around a task", tmp_path / "run")
    task = engine._next_task()
    assert task is not None
    engine._learn(task)
    assert all(p.grad is None for p in engine.model.parameters())


def test_parts_kept_in_evaluation_mode_stay_there(tmp_path: Path) -> None:
    modes: list[bool] = []

    class Keeps(GradientStrategy):
        def training_mode(self) -> None:
            self.model.train()
            self.model.backbone.eval()

        def loss(self, batch: Batch) -> Tensor:
            modes.append(self.model.backbone.training)
            return super().loss(batch)

    CASES["keeps"] = (lambda: Keeps(**SMALL), {}, {"every": {"samples": 100}})
    try:
        build("keeps", tmp_path / "run").run()
    finally:
        del CASES["keeps"]
    assert modes and not any(modes)


def test_trained_weights_are_saved_whatever_they_started_from(tmp_path: Path) -> None:
    """A backbone from a named source: frozen and untouched it is named, trained it is copied, also when it is frozen afterwards."""
    engine = build("stages around a task", tmp_path / "run")
    engine.model.backbone.origin = {"source": "somewhere", "revision": "1", "sha256": "0" * 64}
    engine.model.remember()
    engine.model.backbone.requires_grad_(False)
    assert not any(name.startswith("backbone.") for name in engine.model.state()["tensors"])
    with torch.no_grad():
        next(engine.model.backbone.parameters())[0, 0] += 1e-3
    assert [name for name in engine.model.state()["tensors"] if name.startswith("backbone.")] == ["backbone.layers.0.weight"]
    teacher = engine.model.copy()
    assert "backbone.layers.0.weight" in teacher.state()["tensors"]
    fresh = build("stages around a task", tmp_path / "fresh")
    fresh.model.backbone.origin = engine.model.backbone.origin
    fresh.model.remember()
    fresh.model.restore(engine.model.state())
    for ours, theirs in zip(fresh.model.parameters(), engine.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_seconds_add_up_over_interruptions(tmp_path: Path) -> None:
    first = build("accumulation", tmp_path / "run")
    stop_after(first, 5)
    with pytest.raises(Interrupted):
        first.run()
    before = dict(first.seconds)
    scores = build("accumulation", tmp_path / "run").run(resume=True)
    seconds = scores["seconds"]
    assert seconds["total"] > before["total"] and seconds["learn"] >= before["learn"] > 0
    assert seconds["learn"] + seconds["evaluate"] + seconds["checkpoint"] <= seconds["total"] + 1e-6


def test_early_stopping_without_a_validation_part_is_refused() -> None:
    stream = make("scenario", "class_incremental", data=make("source", "digits"), tasks=5)
    engine = Engine(stream, make("strategy", "er", patience=2), make("backbone", "mlp"), engine=EngineConfig(device="cpu"))
    with pytest.raises(Exception, match="set scenario") as refused:
        engine.run()
    assert not isinstance(refused.value, TrainingError)


def test_a_run_killed_before_it_began_can_be_resumed_or_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_runs import small_run

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    config = small_run("gacil", log=[])
    with monkeypatch.context() as patch:
        patch.setattr(running, "build", killed)
        patch.setattr(RunFolder, "discard", lambda folder: None)
        with pytest.raises(Killed):
            running.run(config, out=tmp_path / "run")
    resumed = running.resume(tmp_path / "run")
    assert comparable(resumed) == comparable(running.run(config, out=tmp_path / "whole"))
