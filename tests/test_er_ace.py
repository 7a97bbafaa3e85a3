"""ER-ACE: which classes new samples speak of, by hand, and that they leave all others alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_strategies import engine, learn, make, prepared
from torch.nn.functional import cross_entropy

from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError
from streamcl.stream import Batch

NO = -torch.inf


def started(tasks: int = 1, **options: Any) -> Engine:
    """After its first tasks, at the beginning of the next."""
    run = engine(make("strategy", "er_ace", epochs=1, replay=16, **options))
    learn(run, tasks)
    task = run._next_task()
    run.context.begin(task, {})
    run.strategy.begun = task.index
    run.model.grow(len(task.seen))
    return run


@pytest.mark.parametrize(
    ("seen", "labels", "closed"),
    [
        ([], [0, 1], [0, 0, 0, 0, 0]),  # the first batch of all
        ([1, 1], [1], [1, 0, 0, 0, 0]),  # 0 was seen and is absent; 2, 3 and 4 are still to come
        ([1, 1, 1, 0], [2, 4], [1, 1, 0, 0, 0]),  # 3 has its rows and no sample yet
        ([1, 1, 1, 1, 1], [4, 3], [1, 1, 1, 0, 0]),
        ([1, 1, 1, 1, 1], [0, 4], [0, 1, 1, 1, 0]),  # the largest class seen is no exception, nor is a class that came back
    ],
)
def test_which_classes_new_samples_are_closed_to(seen: list[int], labels: list[int], closed: list[int]) -> None:
    strategy = make("strategy", "er_ace")
    strategy.seen = torch.tensor(seen, dtype=torch.bool)
    assert strategy.closed(torch.tensor(labels), 5).int().tolist() == closed


def test_the_loss_of_hand_worked_scores() -> None:
    run = started()
    strategy = run.strategy
    assert strategy.seen.tolist() == [True, True]
    logits = {0: torch.tensor([[5.0, 1.0, 0.0, 2.0], [0.0, 3.0, 1.0, 1.0]]), 1: torch.tensor([[1.0, 2.0, 0.0, 0.0]])}
    passes = iter(logits.values())
    strategy.features = torch.zeros(1, 1)
    strategy.forward = lambda batch: next(passes)
    ids = torch.arange(3)
    loss = strategy.loss(Batch({"image": torch.zeros(3, 1)}, torch.tensor([2, 3, 1]), ids, new=2))
    new = torch.tensor([[NO, NO, 0.0, 2.0], [NO, NO, 1.0, 1.0]]).log_softmax(1)
    by_hand = -(new[0, 2] + new[1, 3]) / 2 - logits[1].log_softmax(1)[0, 1]
    torch.testing.assert_close(loss, by_hand)
    expected = (2.126928 + 0.693147) / 2 + 0.493810  # log(1 + e^2), log 2; log(e + e^2 + 2) - 2
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_rows_of_old_absent_classes_get_no_gradient_from_new_samples() -> None:
    run = started()
    batch = prepared(run, next(iter(run.context.task.train.batches(32))))
    run.strategy.loss(batch).backward()
    assert not run.model.head.weight.grad[:2].any() and not run.model.head.bias.grad[:2].any()
    assert run.model.head.weight.grad[2:].any()
    run.model.zero_grad()
    cross_entropy(run.model(batch), batch.target).backward()
    assert run.model.head.weight.grad[:2].any()  # as plain replay would have it


def test_replayed_samples_are_decided_among_all_classes() -> None:
    run = started()
    batch = prepared(run, run.strategy.compose(next(iter(run.context.task.train.batches(32)))))
    assert batch.new == 32 and len(batch) == 48
    logits = run.model(batch)
    own = logits[:32].masked_fill(torch.tensor([True, True, False, False]), NO)
    by_hand = cross_entropy(own, batch.target[:32]) + cross_entropy(logits[32:], batch.target[32:])
    torch.testing.assert_close(run.strategy.loss(batch), by_hand)
    assert run.strategy.logits.shape == (48, 4)  # what terms see


def test_a_class_is_seen_once_a_sample_of_it_has_passed() -> None:
    run = started()
    raw = whole(run.context.task.train)
    assert run.strategy.seen.tolist() == [True, True]
    run.strategy.after_step(raw[(raw.target == 3).nonzero().squeeze(1)])
    assert run.strategy.seen.tolist() == [True, True, False, True]


def test_told_where_the_first_task_ends_it_is_learned_plainly() -> None:
    options = {"epochs": 2, "batch": 32, "optimizer": {"lr": 0.1}}
    runs = []
    for name, more in (("er_ace", {"task_free": False}), ("er_ace", {}), ("finetune", {"schedule": "constant"})):
        runs.append(engine(make("strategy", name, **options, **more)))
        learn(runs[-1], 1)
    told, free, plain = runs
    assert torch.equal(told.model.head.weight, plain.model.head.weight)
    assert not torch.equal(free.model.head.weight, plain.model.head.weight)
    assert len(told.memory.exemplars) == 60  # the memory fills all the same
    learn(told, 1)
    assert told.strategy.seen.tolist() == [True] * 4


def test_what_was_seen_survives_a_stop() -> None:
    run = started()
    again = engine(make("strategy", "er_ace", epochs=1))
    again.strategy.restore(run.strategy.state())
    assert torch.equal(again.strategy.seen, run.strategy.seen)


def test_what_cannot_work_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"er_ace needs exemplars and memory\.exemplars is 0"):
        engine(make("strategy", "er_ace"), exemplars=0)
    stream = make("scenario", "multi_label", data=make("source", "digit_scenes"), tasks=2)
    with pytest.raises(ConfigError, match="er_ace learns class, and the target of this stream is labels"):
        Engine(stream, make("strategy", "er_ace"), make("backbone", "convnet"), make("memory", "faiss"))


def test_it_forgets_less_than_er() -> None:
    options = {"epochs": 5, "optimizer": {"lr": 0.1}}
    plain, asymmetric = (engine(make("strategy", name, **options)).run() for name in ("er", "er_ace"))
    assert asymmetric["forgetting"] < plain["forgetting"]
