"""FeCAM against plain NumPy, and where its rule cannot be applied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_strategies import engine, learn, make, prepared

from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError


def learned(tasks: int = 5, scenario: dict | None = None, **options: Any) -> Engine:
    run = engine(make("strategy", "fecam", **options), backbone=make("backbone", "identity"), tasks=tasks, **(scenario or {}))
    learn(run, tasks)
    return run


def arrays(run: Engine) -> list[tuple[np.ndarray, np.ndarray]]:
    batches = [prepared(run, whole(task.train)) for task in run.tasks]
    return [(batch.inputs["image"].flatten(1).double().numpy(), batch.target.numpy()) for batch in batches]  # type: ignore[union-attr]


def served(run: Engine) -> Any:
    return prepared(run, whole(run.scenario.test(run.tasks[1], run.tasks[-1])))


def shrunk(covariance: np.ndarray, alpha1: float, alpha2: float) -> np.ndarray:
    off = covariance - np.diag(np.diag(covariance))
    v1, v2 = np.diag(covariance).mean(), off[off != 0].mean()
    identity = np.eye(len(covariance))
    return covariance + alpha1 * v1 * identity + alpha2 * v2 * (1 - identity)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def plain(
    parts: list, test: np.ndarray, beta: float | None, alphas: tuple[float, float], times: int = 1, covariance: str = "full"
) -> np.ndarray:
    """The distances, straight from the equations  # (samples, classes)"""
    x, y = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    power = (lambda values: values) if beta is None else (lambda values: values**beta)
    x, test = (unit(x), unit(test)) if beta is None else (x, test)
    queries = test if beta is None else unit(power(test))
    common, seen = None, 0
    for part, labels in parts:
        new = len(np.unique(labels))
        matrix = np.cov(power(part).T)
        for _ in range(times):
            matrix = shrunk(matrix, *alphas)
        common, seen = matrix if common is None else seen / (seen + new) * common + new / (seen + new) * matrix, seen + new
    distances = []
    for label in range(10):
        mine = x[y == label]
        centre = mine.mean(axis=0) if beta is None else unit(power(mine.mean(axis=0)))
        matrix = np.cov(power(mine).T)
        for _ in range(times):
            matrix = shrunk(matrix, *alphas)
        deviations = np.sqrt(np.diag(matrix))
        if covariance == "full":
            matrix = matrix / np.outer(deviations, deviations)
        elif covariance == "diagonal":
            matrix = np.diag(np.diag(matrix)) / np.linalg.norm(np.diag(matrix))
        else:
            matrix = common
        u = queries - centre
        distances.append(np.einsum("ij,jk,ik->i", u, np.linalg.pinv(matrix), u))
    return np.stack(distances, axis=1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, (0.5, (1.0, 1.0))),
        ({"tukey": 0.3, "alpha1": 0.5, "alpha2": 0.2, "batch": 9}, (0.3, (0.5, 0.2))),
        ({"shrinkages": 2}, (0.5, (1.0, 1.0), 2)),
        ({"tukey": None, "alpha2": 0.0}, (None, (1.0, 0.0))),
        ({"covariance": "diagonal"}, (0.5, (1.0, 1.0), 1, "diagonal")),
        ({"covariance": "common"}, (0.5, (1.0, 1.0), 1, "common")),
    ],
)
def test_the_distances_are_those_of_a_plain_numpy_model(options: dict, told: tuple) -> None:
    run = learned(**options)
    test = served(run)
    expected = plain(arrays(run), test.inputs["image"].flatten(1).double().numpy(), *told)
    torch.testing.assert_close(-run.strategy.predict(test).scores, torch.from_numpy(expected), rtol=1e-8, atol=1e-10)


def test_the_rule_is_the_same_for_every_split_also_where_classes_come_back() -> None:
    one, many = learned(tasks=1), learned(tasks=10, scenario={"repeat": 0.4}, batch=13)
    names = [[run.tasks[-1].names[label] for label in run.memory.prototypes.labels().tolist()] for run in (one, many)]
    order = torch.tensor([names[1].index(name) for name in names[0]])
    torch.testing.assert_close(one.strategy.precisions, many.strategy.precisions[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.strategy.centres, many.strategy.centres[order], rtol=0, atol=1e-12)


def test_without_tukey_and_with_shrinkage_to_the_identity_it_is_the_nearest_mean() -> None:
    run = learned(tukey=None, alpha1=1e9, alpha2=0.0)
    test = served(run)
    x = torch.nn.functional.normalize(test.inputs["image"].flatten(1).double(), dim=1)
    distances = torch.cdist(x, run.memory.prototypes.means()).square()
    torch.testing.assert_close(-run.strategy.predict(test).scores[:, run.memory.prototypes.labels()], distances, rtol=1e-6, atol=1e-8)


def test_a_class_of_one_sample_is_measured_with_the_covariance_of_the_others() -> None:
    run = engine(make("strategy", "fecam"), backbone=make("backbone", "identity"))
    random = torch.Generator().manual_seed(0)
    run.strategy.take_in(torch.rand(1, 64, generator=random).double(), torch.tensor([2]))
    torch.testing.assert_close(run.strategy.precisions[0], torch.eye(64).double())  # there is no other yet
    run.strategy.take_in(torch.rand(60, 64, generator=random).double(), torch.tensor([0, 1]).repeat(30))
    assert run.strategy.precisions.isfinite().all()
    alone, first, second = run.memory.prototypes.covariances()
    assert not bool(alone.any())
    pooled = run.strategy.shrink((first + second) / 2)
    deviations = pooled.diagonal().sqrt()
    expected = torch.linalg.inv(pooled / deviations / deviations[:, None])
    torch.testing.assert_close(run.strategy.precisions[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"tukey": None}, {"covariance": "diagonal"}])
def test_samples_are_taken_back_as_if_they_had_never_come(options: dict) -> None:
    run = learned(**options)
    part = whole(run.tasks[1].train)[torch.arange(0, 200, 3)]
    test = served(run)
    before = run.strategy.predict(test).scores
    assert run.strategy.erase(part) == ("prototypes", "sums")
    fresh = engine(make("strategy", "fecam", **options), backbone=make("backbone", "identity"))
    for task in run.tasks:
        kept = task.train[(~torch.isin(task.train.ids, part.ids)).nonzero().squeeze(1)]
        fresh.strategy.take_in(*fresh.context.embedded(kept))
    after = run.strategy.predict(test).scores
    torch.testing.assert_close(after, fresh.strategy.predict(test).scores, rtol=1e-8, atol=1e-8)
    assert not torch.equal(after, before)


def test_the_common_covariance_cannot_be_taken_back() -> None:
    run = learned(covariance="common")
    assert run.strategy.erase(whole(run.tasks[1].train)) == ()


@pytest.mark.parametrize(("tukey", "least"), [(0.5, -0.25), (0.0, 0.0)])
def test_features_that_have_no_such_power_are_refused_with_what_to_change(tukey: float, least: float) -> None:
    run = engine(make("strategy", "fecam", tukey=tukey), backbone=make("backbone", "identity"))
    features = torch.rand(8, 64, dtype=torch.float64) + 0.1
    features[3, 5] = least
    with pytest.raises(ConfigError, match=r"set strategy.tukey=null"):
        run.strategy.take_in(features, torch.zeros(8, dtype=torch.int64))
    assert not len(run.memory.prototypes.labels()) and not run.strategy.sums.numel()  # before anything was taken in


def test_tukey_zero_is_the_logarithm() -> None:
    run = engine(make("strategy", "fecam", tukey=0.0), backbone=make("backbone", "identity"))
    features = torch.rand(8, 64, dtype=torch.float64) + 0.1
    run.strategy.take_in(features, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(run.memory.prototypes.means()[0], features.log().mean(0))
    torch.testing.assert_close(run.strategy.centres[0], torch.nn.functional.normalize(features.mean(0).log(), dim=0))


def test_on_digits_each_further_statistic_of_a_class_helps() -> None:
    """SimpleCIL < one covariance for all < one for each class, RanPAC: by more than the seeds' spread."""

    def final(strategy: str, **options: Any) -> float:
        runs = [engine(make("strategy", strategy, **options), backbone=make("backbone", "identity"), seed=seed) for seed in range(2)]
        return sum(run.run()["final"] for run in runs) / len(runs)

    simplecil, slda, fecam = final("simplecil"), final("slda"), final("fecam")
    ranpac = final("ranpac", M=500, ridge=10.0)
    assert simplecil + 0.03 < slda and slda + 0.02 < min(fecam, ranpac) and simplecil + 0.05 < min(fecam, ranpac)
