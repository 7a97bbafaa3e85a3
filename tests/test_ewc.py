"""EWC: the Fisher information in closed form, the penalty and what becomes of several tasks by hand, and runs that stop in its pass."""

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
from torch.nn.functional import cross_entropy, one_hot

from streamcl import running
from streamcl.config import from_mapping
from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError

PLAIN: dict[str, Any] = {"epochs": 1, "batch": 32, "optimizer": {"lr": 0.1}, "schedule": "constant"}


def carried(tasks: int = 0, backbone: str = "identity", options: dict[str, Any] | None = None, **ewc: Any) -> Engine:
    """Fine-tuning with the term, after its first tasks."""
    ewc = {"ceiling": None, "strength": 0.0, **ewc}
    network = make("backbone", "identity") if backbone == "identity" else make("backbone", backbone, hidden=[8])
    run = engine(make("strategy", "finetune", with_=(make("term", "ewc", **ewc),), **{**PLAIN, **(options or {})}), backbone=network)
    learn(run, tasks)
    return run


def term(run: Engine) -> Any:
    return run.strategy.terms[0]


def by_name(run: Engine, vector: Tensor) -> dict[str, Tensor]:
    shapes = term(run).shapes
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), vector.split(sizes), strict=True)}


def trained(run: Engine) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in run.model.named_parameters()}


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_the_fisher_information_is_that_of_logistic_regression(fisher: str) -> None:
    run = carried(1, fisher=fisher)
    batch = prepared(run, whole(run.tasks[0].train))
    x = batch.inputs["image"].flatten(1)
    p = run.model(batch).softmax(1).detach()
    weight = p * (1 - p) if fisher == "exact" else (p - one_hot(batch.target, 2)) ** 2  # (samples, classes)
    measured = by_name(run, term(run).importance)
    torch.testing.assert_close(measured["head.weight"], weight.T @ x**2 / len(x), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(measured["head.bias"], weight.mean(0), rtol=1e-4, atol=1e-8)


def test_the_fisher_information_of_a_linear_gaussian_model_is_the_mean_square_of_its_inputs() -> None:
    run = carried(1, fisher="exact")
    batch = prepared(run, whole(run.tasks[0].train))
    run.strategy.info = dataclasses.replace(run.strategy.info, target="value")
    term(run).squares = torch.zeros(2 * 65)
    found = by_name(run, term(run).squared_gradients(batch, trained(run)) / len(batch))
    x = batch.inputs["image"].flatten(1)
    torch.testing.assert_close(found["head.weight"], (x**2).mean(0).expand(2, -1))
    torch.testing.assert_close(found["head.bias"], torch.ones(2))


def test_in_a_network_it_is_the_mean_of_each_samples_own_squared_gradient() -> None:
    run = carried(1, backbone="mlp")
    run.model.eval()
    expected = {name: torch.zeros_like(p) for name, p in run.model.named_parameters()}
    batch = prepared(run, whole(run.tasks[0].train))
    for row in range(len(batch)):
        one = batch[row : row + 1]
        gradients = torch.autograd.grad(cross_entropy(run.model(one), one.target), list(run.model.parameters()))
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient**2 / len(batch)
    for name, value in by_name(run, term(run).importance).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-9)


def test_samples_that_cannot_be_stacked_are_measured_alone_with_the_same_result() -> None:
    run = carried(1, backbone="mlp")
    batch = prepared(run, whole(run.tasks[0].train))[:20]
    masked = batch.replace(present={"image": torch.ones(20, dtype=torch.bool)})
    together, alone = (term(run).squared_gradients(b, trained(run)) for b in (batch, masked))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-9)


def test_it_does_not_depend_on_the_size_of_the_batches() -> None:
    """The square of a mini-batch's gradient would."""
    run = carried(1, backbone="mlp")
    batch = prepared(run, whole(run.tasks[0].train))
    parts = [term(run).squared_gradients(batch[start : start + 7], trained(run)) for start in range(0, len(batch), 7)]
    torch.testing.assert_close(sum(parts) / len(batch), term(run).importance, rtol=1e-4, atol=1e-9)


def test_penalty_and_gradient_are_zero_at_the_anchor_and_new_rows_of_the_head_are_free() -> None:
    run = carried(1, backbone="mlp", strength=3.0)
    run.model.grow(4)
    batch = prepared(run, whole(run.tasks[0].train))
    penalty = term(run).loss(batch)
    penalty.backward()
    assert penalty.item() == 0.0 and all(not p.grad.any() for p in run.model.parameters() if p.grad is not None)
    run.model.zero_grad()
    with torch.no_grad():
        for p in run.model.parameters():
            p += 0.5
    penalty = term(run).loss(batch)
    penalty.backward()
    importance = by_name(run, term(run).importance)
    torch.testing.assert_close(penalty, 3.0 / 2 * term(run).importance.sum() * 0.25, rtol=1e-4, atol=1e-7)
    head = run.model.head.weight.grad
    torch.testing.assert_close(head[:2], 3.0 * importance["head.weight"] * 0.5, rtol=1e-4, atol=1e-7)
    assert not head[2:].any()


def test_there_is_no_penalty_in_the_first_task() -> None:
    with_term, without = carried(1, strength=1000.0), engine(make("strategy", "finetune", **PLAIN), backbone=make("backbone", "identity"))
    learn(without, 1)
    assert torch.equal(with_term.model.head.weight, without.model.head.weight)


def measured(run: Engine) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The Fisher information and the weights of each task from now on, as they are before they are merged."""
    kept: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    merge = term(run).merge

    def spy(task: Any, weights: dict[str, Tensor], fisher: Tensor) -> None:
        sizes = [p.numel() for p in weights.values()]
        split = {name: part.view_as(p).clone() for (name, p), part in zip(weights.items(), fisher.split(sizes), strict=True)}
        kept.append((split, {name: p.clone() for name, p in weights.items()}))
        merge(task, weights, fisher)

    term(run).merge = spy
    return kept


def test_online_with_gamma_one_is_the_sum_of_the_fishers_around_the_last_weights() -> None:
    run = carried(mode="online", gamma=1.0, backbone="mlp")
    kept = measured(run)
    learn(run, 3)
    found, anchor = by_name(run, term(run).importance), by_name(run, term(run).anchor)
    for name, value in found.items():
        expected = torch.zeros_like(value)
        for fisher, _ in kept:
            expected[tuple(slice(0, n) for n in fisher[name].shape)] += fisher[name]
        torch.testing.assert_close(value, expected)
        assert torch.equal(anchor[name], run.model.get_parameter(name))


@pytest.mark.parametrize(("mode", "old", "new"), [("average", 0.5, 0.5), ("online", 0.9, 1.0)])
def test_old_and_new_importances_are_weighed_by_hand(mode: str, old: float, new: float) -> None:
    run = carried(mode=mode, gamma=0.9)
    kept = measured(run)
    learn(run, 2)  # two classes of four are old
    (first, _), (second, _) = kept
    rows = by_name(run, term(run).importance)["head.weight"]
    torch.testing.assert_close(rows[:2], old * first["head.weight"] + new * second["head.weight"][:2])
    assert torch.equal(rows[2:], second["head.weight"][2:])


def test_separate_penalties_pull_as_one_around_each_tasks_own_weights() -> None:
    run = carried(mode="separate", strength=2.0, backbone="mlp")
    kept = measured(run)
    learn(run, 3)
    term(run).loss(prepared(run, whole(run.tasks[0].train))).backward()
    for name, p in run.model.named_parameters():
        expected = torch.zeros_like(p)
        for fisher, weights in kept:
            where = tuple(slice(0, n) for n in weights[name].shape)
            expected[where] += 2.0 * fisher[name] * (p.detach()[where] - weights[name])
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-7)
    assert len(term(run).importance) == sum(p.numel() for p in run.model.parameters())  # nothing grows with the tasks


def test_the_ceiling_bounds_each_tasks_importances() -> None:
    assert carried(2, ceiling=1e-4, backbone="mlp").strategy.terms[0].importance.max() <= 1e-4
    assert carried(2, ceiling=None, backbone="mlp").strategy.terms[0].importance.max() > 1e-4


def test_a_task_without_new_classes_is_averaged_in_by_the_number_of_tasks() -> None:
    run = carried(1)
    task = dataclasses.replace(run.tasks[0], index=1, classes=())
    before = term(run).importance.clone()
    fisher = torch.full_like(before, 3.0)
    term(run).merge(task, trained(run), fisher.clone())
    torch.testing.assert_close(term(run).importance, before / 2 + fisher / 2)


def test_a_run_that_stops_in_the_pass_over_the_fisher_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run("finetune", strategy={"name": "ewc", "epochs": 1, "batch": 32})
    whole_run = running.run(config, out=tmp_path / "whole")
    for stop in (10, 11, 22, 25):  # eight steps of the first task's epoch, eight of its pass, and so on
        assert comparable(stopped_and_resumed(config, tmp_path / str(stop), monkeypatch, stop)) == comparable(whole_run)


def test_what_is_kept_is_counted() -> None:
    scores = carried(backbone="mlp", options={"over": "task"}).run()
    numbers = 64 * 8 + 8 + 8 * 10 + 10
    assert scores["memory_bytes"] >= 2 * 4 * numbers


def test_named_as_the_strategy_it_is_fine_tuning_with_the_settings_of_its_own() -> None:
    alone = from_mapping(small_run("finetune", strategy={"name": "ewc"}))
    assert alone.strategy.plugin.name == "finetune" and alone.strategy.options["over"] == "task"
    given = from_mapping(small_run("finetune", strategy={"name": "ewc", "strength": 5, "over": "seen", "epochs": 3, "batch": 16}))
    options = given.strategy.options
    assert (options["over"], options["epochs"], options["batch"], options["optimizer"].lr) == ("seen", 3, 16, 0.1)
    assert options["with"][0].options["strength"] == 5.0
    beside = from_mapping(small_run("finetune", strategy={"name": "finetune", "with": ["ewc"]}))
    assert beside.strategy.options["over"] == "seen"


def test_what_cannot_work_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="ewc reads a task again"):
        engine(make("strategy", "finetune", epochs=1, with_=(make("term", "ewc"),)), online=True)


def test_it_forgets_less_than_the_fine_tuning_that_carries_it() -> None:
    options = {"epochs": 10, "batch": 32, "over": "task"}
    without = engine(make("strategy", "finetune", **options)).run()
    with_term = engine(make("strategy", "finetune", with_=(make("term", "ewc"),), **options)).run()
    assert with_term["forgetting"] < without["forgetting"] - 0.1 and with_term["final"] > without["final"]
