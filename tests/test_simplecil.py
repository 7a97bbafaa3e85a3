"""SimpleCIL: the cosine to the class mean of all data, whatever the order and the tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import small_run
from test_processes import finish, launch, same
from test_strategies import engine, learn, make, prepared
from torch.nn.functional import normalize

from streamcl import forgetting, running
from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError


def learned(options: dict, **strategy: int) -> Engine:
    run = engine(make("strategy", "simplecil", **strategy), backbone=make("backbone", "identity"), **options)
    learn(run, options["tasks"])
    return run


def by_class_name(run: Engine) -> torch.Tensor:
    """The means, in the order of the classes' own names."""
    names = [run.tasks[-1].names[label] for label in run.memory.prototypes.labels().tolist()]
    return run.memory.prototypes.means()[torch.tensor(sorted(range(len(names)), key=names.__getitem__))]


@pytest.mark.parametrize("options", [{"tasks": 5}, {"tasks": 2, "seed": 3}, {"tasks": 10, "repeat": 0.4}, {"tasks": 5, "online": True}])
def test_the_means_are_those_of_all_data_for_every_order_split_and_batch(options: dict) -> None:
    joint = learned({"tasks": 1})
    batch = prepared(joint, whole(joint.tasks[0].train))
    features = batch.inputs["image"].flatten(1).double()
    means = torch.stack([features[batch.target == label].mean(dim=0) for label in joint.memory.prototypes.labels()])
    torch.testing.assert_close(joint.memory.prototypes.means(), means, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_class_name(learned(options, batch=17)), by_class_name(joint), rtol=0, atol=1e-12)


def test_a_sample_goes_to_the_class_with_the_largest_cosine_to_the_mean_of_raw_features() -> None:
    run = learned({"tasks": 5})
    batches = [prepared(run, whole(task.train)) for task in run.tasks]
    features = torch.cat([batch.inputs["image"].flatten(1) for batch in batches]).double()
    labels = torch.cat([batch.target for batch in batches])
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(10)])
    test = prepared(run, whole(run.scenario.test(run.tasks[0], run.tasks[-1])))
    x = test.inputs["image"].flatten(1).double()
    cosines = (x @ means.T) / x.norm(dim=1)[:, None] / means.norm(dim=1)
    torch.testing.assert_close(run.strategy.predict(test).scores, cosines, rtol=0, atol=1e-12)
    assert not torch.allclose(
        normalize(means, dim=1), normalize(torch.stack([normalize(features[labels == c], dim=1).mean(0) for c in range(10)]), dim=1)
    )


def test_classes_that_have_not_come_yet_are_masked() -> None:
    run = engine(make("strategy", "simplecil"), backbone=make("backbone", "identity"))
    batch = prepared(run, whole(run.scenario.task(0).train))
    assert run.strategy.predict(batch).scores.shape == (len(batch), 0)
    run.strategy.take_in(torch.rand(3, 64, dtype=torch.float64), torch.tensor([4, 1, 4]))
    scores = run.strategy.predict(batch).scores
    assert scores.shape == (len(batch), 5) and bool((scores[:, [0, 2, 3]] == -torch.inf).all()) and scores[:, [1, 4]].isfinite().all()


def test_erased_samples_are_as_if_they_had_never_come(tmp_path: Path) -> None:
    config = small_run("simplecil", model={"backbone": "identity"}, log=[])
    running.run(config, out=tmp_path / "run")
    fresh = running.build(running.as_config(config), None)
    tasks = list(fresh.scenario)
    ids = torch.cat([task.train.ids[::7] for task in tasks])
    receipt = forgetting.forget(tmp_path / "run", ids.tolist())
    for task in tasks:
        fresh.strategy.take_in(*fresh.context.embedded(task.train[(~torch.isin(task.train.ids, ids)).nonzero().squeeze(1)]))  # type: ignore[attr-defined]
    left = running.restored(tmp_path / "run")[0].context.memory.prototypes
    means = [part.means()[part.labels().argsort()] for part in (left, fresh.memory.prototypes)]  # rows are in the order of appearance
    torch.testing.assert_close(*means, rtol=0, atol=1e-12)
    assert receipt["recomputed"] == ["prototypes"] and len(receipt["not_covered"]) == 1


@pytest.mark.parametrize("strategy", ["simplecil", "slda", "fecam", "ranpac"])
def test_streams_without_one_class_per_sample_are_refused(strategy: str, tmp_path: Path) -> None:
    config = small_run(strategy, scenario={"name": "multi_label", "data": "digit_scenes", "tasks": 2}, model={"backbone": "identity"})
    with pytest.raises(ConfigError, match=f"{strategy} learns class, and the target of this stream is labels"):
        running.run(config, out=tmp_path / "run")


@pytest.mark.parametrize("strategy", ["simplecil", "slda", "fecam", "ranpac"])
def test_in_bfloat16_features_are_rounded_and_statistics_are_not(strategy: str, tmp_path: Path) -> None:
    options = {"ranpac": {"M": 100}}.get(strategy, {})
    config = small_run(
        strategy, strategy=options, engine={"precision": "bfloat16"}, scenario={"name": "class_incremental", "data": "digits", "tasks": 2}
    )
    scores = running.run(config, out=tmp_path / "run")
    assert scores["final"] > 0.7


@pytest.mark.parametrize("strategy", ["simplecil", "slda", "fecam", "ranpac"])
def test_two_processes_give_the_result_of_one(strategy: str, tmp_path: Path) -> None:
    options = {"batch": 31, **({"M": 100} if strategy == "ranpac" else {})}  # neither batches nor test sets divide by two
    config = small_run(strategy, strategy=options, model={"backbone": "identity"}, evaluate={"batch": 37})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    one = running.run(config, out=tmp_path / "one")
    finish(launch("run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "two")))
    same(one, json.loads((tmp_path / "two" / "scores.json").read_text()))
