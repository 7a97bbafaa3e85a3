"""LwF: the distillation by hand, whose model teaches, and runs that stop while it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import comparable, small_run
from test_resume import stopped_and_resumed
from test_strategies import engine, learn, make, prepared

from streamcl import running
from streamcl.config import from_mapping
from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError

PLAIN: dict[str, Any] = {"epochs": 2, "batch": 32, "optimizer": {"lr": 0.1}, "schedule": "constant", "over": "task"}


def carried(tasks: int, **lwf: Any) -> Engine:
    """Fine-tuning with the term after its first tasks, at the beginning of the next."""
    run = engine(make("strategy", "finetune", with_=(make("term", "lwf", **lwf),), **PLAIN))
    learn(run, tasks)
    task = run._next_task()
    run.context.begin(task, {})
    run.model.grow(len(task.seen))
    run.strategy.terms[0].before_task(task)
    return run


def test_the_loss_is_the_cross_entropy_of_softened_scores_by_hand() -> None:
    run = carried(1, strength=3.0, temperature=2.0)
    term = run.strategy.terms[0]
    batch = prepared(run, whole(run.tasks[0].train))[:5]
    with torch.no_grad():
        run.model.head.weight += 0.3 * torch.randn(run.model.head.weight.shape)
    student, teacher = run.strategy.forward(batch).detach(), term.teacher(batch)
    assert student.shape == (5, 4) and teacher.shape == (5, 2)
    by_hand = 0.0
    for row in range(5):
        target = (teacher[row] / 2).exp() / (teacher[row] / 2).exp().sum()
        scores = (student[row, :2] / 2).exp() / (student[row, :2] / 2).exp().sum()
        by_hand -= 3.0 / 5 * float((target * scores.log()).sum())
    assert term.loss(batch).item() == pytest.approx(by_hand, rel=1e-5)


def test_where_student_and_teacher_agree_the_loss_is_the_entropy_and_its_gradient_zero() -> None:
    run = carried(1)
    term = run.strategy.terms[0]
    run.model.eval()
    batch = prepared(run, whole(run.tasks[0].train))
    run.strategy.forward(batch)
    loss = term.loss(batch)
    loss.backward()
    assert all(p.grad.abs().max() < 1e-6 for p in run.model.parameters())
    soft = (term.teacher(batch) / 2).softmax(1)
    torch.testing.assert_close(loss, 3.0 * -(soft * soft.log()).sum(1).mean())


def test_the_teacher_is_the_model_of_the_last_task_and_does_not_learn() -> None:
    run = engine(make("strategy", "finetune", with_=(make("term", "lwf"),), **PLAIN))
    term, teachers, learn_one = run.strategy.terms[0], [], run.strategy.fit

    def fit(task: Any, *given: Any, **more: Any) -> None:
        before = None if term.teacher is None else {k: v.clone() for k, v in term.teacher.state_dict().items()}
        learn_one(task, *given, **more)
        teachers.append(before)
        assert before is None or all(torch.equal(v, before[k]) for k, v in term.teacher.state_dict().items())

    run.strategy.fit = fit
    for number in range(3):
        last = {k: v.clone() for k, v in run.model.state_dict().items()}
        learn(run, 1)
        assert (teachers[-1] is None) == (number == 0)
        if number:
            assert all(torch.equal(teachers[-1][k], v) for k, v in last.items())
    assert term.teacher is None  # nothing is kept between tasks


def test_with_no_strength_it_is_fine_tuning_bit_for_bit() -> None:
    plain = engine(make("strategy", "finetune", **PLAIN)).run()
    carrying = engine(make("strategy", "finetune", with_=(make("term", "lwf", strength=0.0),), **PLAIN)).run()
    assert plain["matrix"] == carrying["matrix"]


def test_other_strategies_carry_it_over_all_that_is_in_their_batches() -> None:
    for name, options in {"er": {}, "icarl": {"batch": 32}, "derpp": {}}.items():
        term, seen = make("term", "lwf"), []
        term.loss = lambda batch, loss=term.loss, seen=seen: seen.append(loss(batch)) or seen[-1]
        learn(engine(make("strategy", name, epochs=1, **options, with_=(term,))), 2)
        later = [value for value in seen if value is not None]
        assert later and seen[0] is None and all(value > 0 for value in later)


def test_a_run_that_stops_while_the_teacher_teaches_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run("finetune", strategy={"name": "lwf", "epochs": 2, "batch": 32})
    whole_run = running.run(config, out=tmp_path / "whole")
    for stop in (21, 40):
        assert comparable(stopped_and_resumed(config, tmp_path / str(stop), monkeypatch, stop)) == comparable(whole_run)


def test_named_as_the_strategy_it_is_fine_tuning_over_the_new_classes() -> None:
    options = from_mapping(small_run("finetune", strategy={"name": "lwf", "temperature": 4})).strategy.options
    assert options["over"] == "task" and options["epochs"] == 250 and options["optimizer"].weight_decay == 2e-4
    assert options["with"][0].to_dict() == {"name": "lwf", "strength": 3.0, "temperature": 4.0}


def test_a_stream_of_several_labels_is_refused() -> None:
    stream = make("scenario", "multi_label", data=make("source", "digit_scenes"), tasks=2)
    with pytest.raises(ConfigError, match="lwf distils the scores of classes"):
        Engine(
            stream,
            make("strategy", "finetune", epochs=1, with_=(make("term", "lwf"),)),
            make("backbone", "convnet"),
            make("memory", "faiss"),
        )


def test_it_forgets_less_than_the_fine_tuning_that_carries_it() -> None:
    options = {"epochs": 10, "batch": 32, "over": "task"}
    without = engine(make("strategy", "finetune", **options)).run()
    with_term = engine(make("strategy", "finetune", with_=(make("term", "lwf"),), **options)).run()
    assert with_term["forgetting"] < without["forgetting"] - 0.1 and with_term["final"] > without["final"]
