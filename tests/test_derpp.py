"""DER++: its loss from three passes by hand, the logits it stores, and what of it is ER."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import comparable, small_run
from test_resume import stopped_and_resumed
from test_strategies import engine, learn, make, prepared
from torch import Tensor
from torch.nn.functional import cross_entropy

from streamcl import running
from streamcl.engine import Engine
from streamcl.errors import ConfigError
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch


class SeparateER(GradientStrategy):
    """Experience replay whose new and replayed samples go through the network apart; the sum of the two means."""

    selection = "reservoir"

    def loss(self, batch: Batch) -> Tensor:
        new = len(batch) if batch.new is None else batch.new
        loss = cross_entropy(self.forward(batch[:new]), batch.target[:new])
        return loss + cross_entropy(self.forward(batch[new:]), batch.target[new:]) if len(batch) > new else loss


@pytest.mark.parametrize("backbone", ["mlp", "convnet"])
def test_with_alpha_0_and_beta_1_it_is_er_with_separate_passes_bit_for_bit(backbone: str) -> None:
    options = {"epochs": 1, "batch": 32, "replay": 32, "optimizer": {"lr": 0.1}}
    runs, matrices = [], []
    for strategy in (make("strategy", "derpp", alpha=0.0, beta=1.0, **options), SeparateER(**options)):
        runs.append(engine(strategy, backbone=make("backbone", backbone), tasks=5))
        matrices.append(runs[-1].run()["matrix"])
    dark, plain = runs
    assert matrices[0] == matrices[1]
    for ours, theirs in zip(dark.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(dark.memory.exemplars.held.ids, plain.memory.exemplars.held.ids)


def at_second_task(beta: float = 0.5, exemplars: int = 60, known: bool = True, **options: Any) -> Engine:
    strategy = make("strategy", "derpp", alpha=0.3, beta=beta, epochs=1, batch=40, replay=16, **options)
    run = engine(strategy, exemplars=exemplars)
    if not known:  # as on a stream that does not know how many classes there will be
        strategy.start(dataclasses.replace(run.info, classes=None), run.context)
    learn(run, 1)
    task = run._next_task()
    run.context.begin(task, {})
    strategy.begun, strategy.hooks_done = task.index, 0
    run.model.grow(len(task.seen))
    strategy.before_task(task)
    return run


@pytest.mark.parametrize("known", [True, False])
def test_the_loss_is_the_papers_by_hand(known: bool) -> None:
    run = at_second_task(known=known)
    raw = next(iter(run.context.task.train.batches(40)))
    composed = run.strategy.compose(raw)
    assert composed.new == 40 and len(composed) == 40 + 16 + 16
    dark, labelled = composed.ids[40:56], composed.ids[56:]
    assert not torch.equal(dark, labelled)
    batch = prepared(run, composed)
    reserve = run.strategy.reserve.detach()
    assert len(reserve) == (6 if known else 0)
    features = run.model.features(batch)
    logits = torch.cat([run.model(batch), features @ reserve[:, :-1].T + reserve[:, -1]], dim=1)
    assert logits.shape[1] == (10 if known else 4)
    held = run.memory.exemplars.held
    place = {number: row for row, number in enumerate(held.ids.tolist())}
    stored = torch.zeros(16, logits.shape[1])  # a class that came since has the logit 0
    for row, number in enumerate(dark.tolist()):
        stored[row, : held.extra["logits"].shape[1]] = held.extra["logits"][place[number]]
    logs = logits.log_softmax(1)
    by_hand = (
        -logs[torch.arange(40), batch.target[:40]].mean()
        + 0.3 * ((logits[40:56] - stored) ** 2).mean()
        - 0.5 * logs[torch.arange(56, 72), batch.target[56:]].mean()
    )
    torch.testing.assert_close(run.strategy.loss(batch), by_hand)
    assert run.strategy.logits.shape == (72, 4)  # what terms see


def test_der_draws_once_and_learns_no_label_of_what_it_holds() -> None:
    run = at_second_task(beta=0.0)
    composed = run.strategy.compose(next(iter(run.context.task.train.batches(40))))
    assert len(composed) == 40 + 16
    batch = prepared(run, composed)
    target = batch.target.clone()
    target[40:] = 1 - target[40:]
    assert torch.equal(run.strategy.loss(batch), run.strategy.loss(batch.replace(target=target)))


@pytest.mark.parametrize("known", [True, False])
def test_the_logits_stored_are_those_that_the_model_gave_before_its_step(known: bool) -> None:
    run = at_second_task(exemplars=2000, known=known)
    strategy, given = run.strategy, {}
    loss = strategy.loss

    def watch(batch: Batch) -> Tensor:
        reserve = strategy.reserve.detach()
        logits = torch.cat([run.model(batch), run.model.features(batch) @ reserve[:, :-1].T + reserve[:, -1]], dim=1).detach()
        own = len(batch) if batch.new is None else batch.new
        given.update(zip(batch.ids[:own].tolist(), logits[:own], strict=True))
        return loss(batch)

    strategy.loss = watch
    strategy.fit(run.context.task, run.context.task.train, name="train")
    held = run.memory.exemplars.held
    place = {number: row for row, number in enumerate(held.ids.tolist())}
    for number, logits in given.items():
        torch.testing.assert_close(held.extra["logits"][place[number]], logits)
    old = [row for number, row in place.items() if number not in given]
    assert old and bool(held.extra["logits"][old, 2:].isnan().all()) is not known  # widened for the classes that came later


def test_every_epoch_renews_the_logits_of_what_is_held() -> None:
    kept = []
    for epochs in (1, 2):
        run = engine(make("strategy", "derpp", epochs=epochs), exemplars=2000)
        learn(run, 1)
        kept.append(run.memory.exemplars.held)
    assert torch.equal(kept[0].ids.sort().values, kept[1].ids.sort().values)  # no sample twice
    assert not torch.equal(kept[0].extra["logits"][kept[0].ids.argsort()], kept[1].extra["logits"][kept[1].ids.argsort()])


def test_the_rows_of_a_class_move_from_the_reserve_into_the_head() -> None:
    run = engine(make("strategy", "derpp", epochs=1))
    learn(run, 1)
    waiting, head = run.strategy.reserve.detach().clone(), run.model.head.weight.detach().clone()
    assert len(waiting) == 8 and run.model.classes == 2
    task = run._next_task()
    run.context.begin(task, {})
    run.model.grow(4)
    run.strategy.before_task(task)
    assert torch.equal(run.model.head.weight[:2], head) and torch.equal(run.model.head.weight[2:], waiting[:2, :-1])
    assert torch.equal(run.model.head.bias[2:], waiting[:2, -1]) and torch.equal(run.strategy.reserve.detach(), waiting[2:])


def test_rows_in_the_reserve_are_trained_down() -> None:
    run = engine(make("strategy", "derpp", epochs=3, optimizer={"lr": 0.1}))
    before = run.strategy.reserve.detach()[2:, -1].clone()
    learn(run, 1)
    assert bool((run.strategy.reserve[:, -1] < before).all())


@pytest.mark.parametrize("alpha", [0.3, 0.0])
def test_it_stops_and_goes_on_bit_for_bit(alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run("derpp", strategy={"epochs": 2, "alpha": alpha})
    whole_run = running.run(config, out=tmp_path / "whole")
    for stop in (5, 37):
        assert comparable(stopped_and_resumed(config, tmp_path / str(stop), monkeypatch, stop)) == comparable(whole_run)


def test_what_cannot_work_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"derpp needs exemplars and memory\.exemplars is 0"):
        engine(make("strategy", "derpp"), exemplars=0)
    stream = make("scenario", "class_incremental", data=make("source", "digits"), tasks=5)
    memory = make("memory", "faiss", exemplars=60, select=make("policy", "herding"))
    with pytest.raises(ConfigError, match=r"set memory\.select=reservoir"):
        Engine(stream, make("strategy", "derpp"), make("backbone", "mlp"), memory)
