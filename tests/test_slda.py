"""SLDA: batch linear discriminant analysis on everything seen, and the released recursion sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from test_strategies import engine, learn, make, prepared
from torch import Tensor

from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError


def learned(tasks: int = 5, seed: int = 0, repeat: float = 0.0, **options: Any) -> Engine:
    run = engine(make("strategy", "slda", **options), backbone=make("backbone", "identity"), tasks=tasks, seed=seed, repeat=repeat)
    learn(run, tasks)
    return run


def everything(run: Engine) -> tuple[Tensor, Tensor]:
    batches = [prepared(run, whole(task.train)) for task in run.tasks]
    return torch.cat([batch.inputs["image"].flatten(1) for batch in batches]).double(), torch.cat([batch.target for batch in batches])


@pytest.mark.parametrize("options", [{"tasks": 5}, {"tasks": 1}, {"tasks": 10, "repeat": 0.4, "batch": 7}])
def test_the_exact_form_is_scikit_learns_batch_lda_on_everything_seen(options: dict) -> None:
    epsilon = 0.01
    run = learned(epsilon=epsilon, **options)
    x, y = everything(run)
    within = sum(((x[y == c] - x[y == c].mean(0)).T @ (x[y == c] - x[y == c].mean(0)) for c in range(10)), torch.zeros(64, 64)) / len(x)
    variance = float(within.diagonal().mean())
    shrinkage = epsilon / (epsilon + (1 - epsilon) * variance)  # scikit-learn's identity is scaled by the mean variance
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.numpy(), y.numpy())
    test = prepared(run, whole(run.scenario.test(run.tasks[0], run.tasks[-1])))
    decision = lda.decision_function(test.inputs["image"].flatten(1).double().numpy()) - torch.tensor(lda.priors_).log().numpy()
    expected = torch.from_numpy(decision) * (1 - shrinkage) / (1 - epsilon)
    torch.testing.assert_close(run.strategy.predict(test).scores, expected, rtol=1e-8, atol=1e-7)


def released(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The released recursion, a sample at a time."""
    means, counts, covariance = torch.zeros(10, 64).double(), torch.zeros(10), torch.ones(64, 64).double()
    for n, (one, label) in enumerate(zip(x, y.tolist(), strict=True)):
        e = one - means[label]
        covariance = (n * covariance + torch.outer(e, e) * n / (n + 1)) / (n + 1)
        means[label] += e / (counts[label] + 1)
        counts[label] += 1
    return means, covariance


@pytest.mark.parametrize("batch", [1, 64, 5000])
def test_the_released_form_is_the_recursion_sample_by_sample(batch: int) -> None:
    run = learned(scatter="released", batch=batch)
    x, y = everything(run)
    means, covariance = released(x, y)
    torch.testing.assert_close(run.strategy.covariance()[1], covariance, rtol=0, atol=1e-12)
    weights = torch.linalg.pinv((1 - 1e-4) * covariance + 1e-4 * torch.eye(64).double(), hermitian=True) @ means.T
    known = run.memory.prototypes.labels()
    torch.testing.assert_close(run.strategy.classifier[:-1], weights[:, known], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(run.strategy.classifier[-1], -0.5 * (means.T * weights).sum(0)[known], rtol=1e-7, atol=1e-7)


def test_the_exact_form_is_the_same_for_every_split_and_the_released_one_is_only_near() -> None:
    exact = [learned(tasks=tasks, batch=batch).strategy.covariance()[1] for tasks, batch in ((1, 128), (10, 3))]
    torch.testing.assert_close(*exact, rtol=0, atol=1e-12)
    run = learned(scatter="released")
    x, y = everything(run)
    turned = released(x.flip(0), y.flip(0))[1]
    near = run.strategy.covariance()[1]
    assert 1e-6 < float((near - turned).abs().max()) < 0.05 * float(near.abs().max())
    assert float((near - exact[0]).abs().max()) < 0.1 * float(near.abs().max())  # the first sample of each class, about the origin


@pytest.mark.parametrize("scatter", ["exact", "released"])
def test_a_base_task_counts_with_the_covariance_that_scikit_learns_oas_gives(scatter: str) -> None:
    run = engine(make("strategy", "slda", scatter=scatter, base="oas"), backbone=make("backbone", "identity"))
    learn(run, 1)
    x, y = everything(run)
    centred = x - torch.stack([x[y == label].mean(0) for label in range(2)])[y]
    oas = torch.from_numpy(OAS(assume_centered=True).fit(centred.numpy()).covariance_)
    count, covariance = run.strategy.covariance()
    assert count == len(x)
    torch.testing.assert_close(covariance, oas, rtol=0, atol=1e-12)
    learn(run, 1)
    assert run.strategy.covariance()[0] == sum(len(task.train) for task in run.tasks)


def test_samples_are_taken_back_from_the_exact_form_alone() -> None:
    run = learned()
    part = whole(run.tasks[1].train)[torch.arange(0, 200, 3)]
    assert run.strategy.classifier.shape == (65, 10) and run.strategy.erase(part) == ("prototypes",)
    x, y = everything(run)
    gone = torch.isin(torch.cat([task.train.ids for task in run.tasks]), part.ids)
    fresh = engine(make("strategy", "slda"), backbone=make("backbone", "identity"))
    fresh.strategy.take_in(x[~gone], y[~gone])
    left, anew = (one.strategy.classifier[:, one.memory.prototypes.labels().argsort()] for one in (run, fresh))
    torch.testing.assert_close(left, anew, rtol=1e-8, atol=1e-8)
    for options in ({"scatter": "released"}, {"base": "oas"}):
        run = learned(**options)
        before = run.strategy.covariance()[1].clone()
        assert run.strategy.erase(part) == () and torch.equal(run.strategy.covariance()[1], before)


def test_a_class_that_was_not_seen_is_masked_and_epsilon_is_a_share() -> None:
    run = engine(make("strategy", "slda"), backbone=make("backbone", "identity"))
    run.strategy.take_in(-torch.rand(9, 64, dtype=torch.float64), torch.tensor([3] * 5 + [1] * 4))
    scores = run.strategy.predict(prepared(run, whole(run.scenario.task(0).train))).scores
    assert bool((scores[:, [0, 2]] == -torch.inf).all()) and scores[:, [1, 3]].isfinite().all()
    with pytest.raises(ConfigError, match="at most 1: it is 2"):
        make("strategy", "slda", epsilon=2.0)
