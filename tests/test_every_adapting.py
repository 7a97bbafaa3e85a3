"""What holds for every method of test-time adaptation there is: a new one is covered the day its file appears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import comparable, family, small_run

import streamcl
from streamcl import listing, running
from streamcl.adapting import AdaptingStrategy
from streamcl.checkpoint import flatten, tree_bytes, unflatten
from streamcl.engine import Engine
from streamcl.errors import ConfigError, Interrupted
from streamcl.online_loop import OnlineLoop
from streamcl.plugins import plugins
from streamcl.stream import Batch

METHODS = sorted(name for name in plugins("strategy") if family(name) == "test_time")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The starting models are trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def engine(name: str, **online: Any) -> Engine:
    return running.build(running.as_config({**small_run(name), "log": [], "online": {"calibrate": 64, **online}}), None, log=[])


def batches(made: Engine) -> list[Batch]:
    """What is served, prepared."""
    found = []
    for task in made.scenario:
        made.context.begin(task, {})
        data = made.scenario.test(task, task)
        assert data is not None
        found += [made.context.prepare(raw.replace(target=None, extra={}), train=False) for raw in data.batches(task.batch)]
    return found


def answers(loop: OnlineLoop, served: list[Batch]) -> list[torch.Tensor]:
    return [loop(batch).scores.clone() for batch in served]  # type: ignore[union-attr]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_there_are_all_that_the_issue_names() -> None:
    assert {
        "source",
        "bn_adapt",
        "tent",
        "eata",
        "sar",
        "cotta",
        "rotta",
        "lame",
        "deyo",
        "marginal_entropy",
        "read",
        "sumi",
        "casp",
    } <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_its_page_names_its_evidence_and_its_options(name: str) -> None:
    page = listing.show(name)
    assert "Evidence" in page or "evidence" in page
    assert issubclass(plugins("strategy")[name].load(), AdaptingStrategy)


@pytest.mark.parametrize("name", METHODS)
def test_a_reset_and_a_restored_state_are_exact(name: str) -> None:
    made = engine(name)
    loop, served = made.loop, batches(made)
    assert loop is not None
    model = {key: value.clone() for key, value in made.model.state_dict().items()}
    frozen = loop.frozen(served[0]).scores
    first = answers(loop, served)
    changed = {key for key, value in made.model.state_dict().items() if not torch.equal(value, model[key])}
    assert changed <= set(loop.strategy.adapted), "running statistics and what is not adapted stay as they were"
    assert torch.equal(loop.frozen(served[0]).scores, frozen)
    half = loop.state()
    rest = answers(loop, served[:3])
    loop.reset()
    assert all(torch.equal(value, model[key]) for key, value in made.model.state_dict().items())
    assert same(answers(loop, served), first)

    other = engine(name)
    assert other.loop is not None
    tree, tensors = flatten(half)
    other.loop.restore(unflatten(tree, {key: value.clone() for key, value in tensors.items()}))
    assert same(answers(other.loop, served[:3]), rest)
    other.loop.reset()
    assert same(answers(other.loop, served), first), "what a reset goes back to is part of the state"


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**small_run(name), "log": [], "online": {"guard": True, "frozen": True, "calibrate": 64}}
    whole = running.run(config, out=tmp_path / "whole")
    served, adapt = 0, Engine._adapt

    def stopped(engine: Engine, batch: Any) -> Any:
        nonlocal served
        served += 1
        engine.context.interrupted |= served == 6
        return adapt(engine, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_adapt", stopped)
        with pytest.raises(Interrupted):
            running.run(config, out=tmp_path / "stopped")
    assert comparable(running.resume(tmp_path / "stopped")) == comparable(whole)
    assert whole["heads"]["frozen"]["final"] is not None


@pytest.mark.parametrize("name", METHODS)
def test_batches_of_any_size_are_answered_and_one_sample_is(name: str) -> None:
    made = engine(name, window=16)
    loop, served = made.loop, batches(made)
    assert loop is not None
    for size in (1, 2, 3, 1, 20, 1):
        scores = loop(served[0][:size]).scores
        assert scores is not None and len(scores) == size and bool(scores.isfinite().all())
    for place in range(20):
        scores = loop(served[1][place : place + 1]).scores
        assert scores is not None and scores.shape[0] == 1 and bool(scores.isfinite().all())


@pytest.mark.parametrize("name", METHODS)
def test_it_runs_in_half_precision(name: str) -> None:
    config = {**small_run(name), "log": []}
    config["engine"] = {**config["engine"], "precision": "bfloat16"}
    made = running.build(running.as_config(config), None, log=[])
    assert made.loop is not None
    before = {key: value.detach().clone() for key, value in made.strategy.adapted.items()}
    assert all(bool(scores.isfinite().all()) for scores in answers(made.loop, batches(made)))
    if made.strategy.counts.get("updates") and made.strategy.changes_weights and name != "sar":  # whose recovery may have brought them back
        assert any(not torch.equal(value, before[key]) for key, value in made.strategy.adapted.items())


@pytest.mark.parametrize("name", METHODS)
def test_shadow_mode_serves_it_or_says_why_not(name: str, tmp_path: Path) -> None:
    config = small_run(name)
    running.run({**config, "strategy": "source", "log": []}, out=tmp_path / "run")
    learned, made = streamcl.load(tmp_path / "run"), engine(name)
    spec = made.strategy
    if not spec.changes_weights:
        with pytest.raises(ConfigError, match="take mode inline"):
            streamcl.online(learned, config["strategy"], mode="shadow", references=[] if spec.needs_references else None)
        return
    target: Any = made.info.target
    loop = streamcl.online(learned, config["strategy"], mode="shadow", promote=1, guard=False)
    data = made.scenario.test(task := next(iter(made.scenario)), task)
    assert data is not None and target
    raw = next(data.batches(32))
    raw = raw.replace(target=None, extra={})
    before = loop.predict(raw).scores
    for _ in range(4):
        loop(raw)
    after = loop.predict(raw)
    assert before is not None and after.scores is not None and bool(after.scores.isfinite().all())
    alone = loop.predict(raw[:1]).scores
    assert alone is not None
    torch.testing.assert_close(alone, after.scores[:1], atol=1e-4, rtol=1e-4)  # whatever else is in the batch
    loop.reset()
    assert torch.equal(loop.predict(raw).scores, before)


@pytest.mark.parametrize("name", METHODS)
def test_what_it_keeps_is_counted(name: str, tmp_path: Path) -> None:
    made = running.build(running.as_config({**small_run(name), "log": []}), None, log=[])
    scores = made.run()
    kept = tree_bytes(made.strategy.source) + tree_bytes(made.strategy.own_state())
    assert scores["memory_bytes"] >= tree_bytes(made.strategy.source) and kept <= tree_bytes(made.strategy.state())
