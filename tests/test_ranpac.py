"""RanPAC: the joint ridge solution on random features, and the lambda that the held-out part chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from streamcl.strategies.class_incremental.ranpac import held_out
from test_strategies import engine, learn, make, prepared
from torch import Tensor
from torch.nn.functional import one_hot

from streamcl.data import whole
from streamcl.engine import Engine


def learned(tasks: int = 5, seed: int = 0, repeat: float = 0.0, **options: Any) -> Engine:
    run = engine(make("strategy", "ranpac", **options), backbone=make("backbone", "identity"), tasks=tasks, seed=seed, repeat=repeat)
    learn(run, tasks)
    return run


def expanded(run: Engine, tasks: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """h, labels and ids, with the projection written out."""
    batches = [prepared(run, whole(task.train)) for task in run.tasks[tasks]]
    features = torch.cat([batch.inputs["image"].flatten(1) for batch in batches]).double()
    h = (features @ run.strategy.projection).clamp(min=0) if run.strategy.M else features
    return h, torch.cat([batch.target for batch in batches]), torch.cat([batch.ids for batch in batches])


@pytest.mark.parametrize("options", [{"tasks": 5}, {"tasks": 1}, {"tasks": 10, "repeat": 0.4, "batch": 13}, {"tasks": 5, "M": 0}])
def test_the_weights_are_the_joint_ridge_solution_and_scikit_learns(options: dict) -> None:
    run = learned(**{"M": 300, "ridge": 10.0, **options})
    h, labels, _ = expanded(run)
    y = one_hot(labels, 10).double()
    joint = torch.linalg.solve(h.T @ h + 10.0 * torch.eye(h.shape[1], dtype=torch.float64), h.T @ y)
    torch.testing.assert_close(run.strategy.classifier, joint, rtol=0, atol=1e-10)
    ridge = Ridge(alpha=10.0, fit_intercept=False, solver="cholesky").fit(h.numpy(), y.numpy())
    torch.testing.assert_close(run.strategy.classifier, torch.from_numpy(ridge.coef_.T), rtol=0, atol=1e-10)
    test = prepared(run, whole(run.scenario.test(run.tasks[0], run.tasks[-1])))
    features = test.inputs["image"].flatten(1).double()
    logits = ((features @ run.strategy.projection).clamp(min=0) if run.strategy.M else features) @ joint
    torch.testing.assert_close(run.strategy.predict(test).scores, logits, rtol=0, atol=1e-9)


def best(h: Tensor, y: Tensor, held: Tensor) -> float:
    """The grid search as it reads in the paper, on the samples themselves."""
    errors = {}
    for exponent in range(-8, 9):
        squares = h[~held].T @ h[~held] + 10.0**exponent * torch.eye(h.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(squares, h[~held].T @ y[~held])
        errors[10.0**exponent] = float((h[held] @ weights - y[held]).square().mean())
    return min(errors, key=errors.__getitem__)


@pytest.mark.parametrize(("choice", "tasks"), [("task", slice(-1, None)), ("stream", slice(None))])
def test_lambda_has_the_least_squared_error_on_the_held_out_fifth(choice: str, tasks: slice) -> None:
    for seed in range(3):
        run = learned(seed=seed, M=100, ridge=choice)
        h, labels, ids = expanded(run, tasks)
        assert run.strategy.chosen == best(h, one_hot(labels, 10).double(), held_out(ids))
        assert bool(run.strategy.parts) == (choice == "stream")


def test_lambda_of_the_stream_is_the_same_for_every_split() -> None:
    runs = [learned(tasks=tasks, batch=batch, M=100, ridge="stream") for tasks, batch in ((1, 128), (5, 17))]
    assert runs[0].strategy.chosen == runs[1].strategy.chosen
    names = [[run.tasks[-1].names[label] for label in range(10)] for run in runs]
    order = torch.tensor([names[1].index(name) for name in names[0]])
    torch.testing.assert_close(runs[0].strategy.classifier, runs[1].strategy.classifier[:, order], rtol=0, atol=1e-9)


def test_a_fifth_of_all_ids_is_held_out_wherever_they_begin_and_whatever_the_step() -> None:
    for ids in (torch.arange(10000), torch.arange(0, 50000, 5), torch.arange(10000) + 3 * 2**40, torch.arange(0, 100000, 10) + 7):
        assert 0.185 < float(held_out(ids).double().mean()) < 0.215
    assert torch.equal(held_out(torch.arange(20).flip(0)), held_out(torch.arange(20)).flip(0))


def test_a_lambda_at_which_the_regression_cannot_be_solved_is_not_taken() -> None:
    run = engine(make("strategy", "ranpac", M=400), backbone=make("backbone", "identity"))
    learn(run, 1)
    run.strategy.chosen = 1e-300
    weights = run.strategy.classifier
    assert weights.isfinite().all() and float(weights.abs().max()) < 1e6


def test_nothing_held_out_leaves_lambda_at_one() -> None:
    run = engine(make("strategy", "ranpac", M=50), backbone=make("backbone", "identity"))
    run.strategy.split(torch.rand(1, 50).double(), torch.tensor([0]), torch.tensor([0]), 1.0)
    run.strategy.choose()
    assert run.strategy.chosen == 1.0


@pytest.mark.parametrize("choice", ["task", "stream", 10.0])
def test_samples_are_taken_back_as_if_they_had_never_come(choice: Any) -> None:
    run = learned(M=100, ridge=choice)
    part = whole(run.tasks[1].train)[torch.arange(0, 200, 3)]
    told = run.strategy.erase(part)
    h, labels, ids = expanded(run)
    kept = ~torch.isin(ids, part.ids)
    h, y = h[kept], one_hot(labels[kept], 10).double()
    joint = torch.linalg.solve(h.T @ h + run.strategy.chosen * torch.eye(100, dtype=torch.float64), h.T @ y)
    torch.testing.assert_close(run.strategy.classifier, joint, rtol=0, atol=1e-9)
    assert ("chosen" in told) == (choice != "task") and "analytic" in told
    if choice == "stream":
        assert run.strategy.chosen == best(h, y, held_out(ids[kept]))


def test_random_features_beat_the_regression_on_the_features_themselves() -> None:
    def final(**options: Any) -> float:
        runs = [engine(make("strategy", "ranpac", **options), backbone=make("backbone", "identity"), seed=seed) for seed in range(2)]
        return float(np.mean([run.run()["final"] for run in runs]))

    assert final(M=500, ridge="stream") > final(M=0, ridge="stream") + 0.03
