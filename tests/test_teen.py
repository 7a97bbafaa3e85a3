"""TEEN and the prototypes that it starts from, by what must be exactly true of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_run
from streamcl.strategies.few_shot.teen import calibrated
from torch.nn.functional import cross_entropy, normalize

from streamcl import running
from streamcl.config import EngineConfig, from_mapping
from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError
from streamcl.plugins import find
from streamcl.stream import Batch


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


FEW_SHOT = {"name": "few_shot", "data": "digits", "base": 4, "ways": 2, "shots": 5}


def few_shot(name: str, **options: Any) -> Engine:
    config = small_run(name, scenario=FEW_SHOT, strategy={"epochs": 3, "batch": 64, **options}, memory={"exemplars": 0}, log=[])
    run = running.build(from_mapping(config), None)
    for task in iter(run._next_task, None):
        run._learn(task)
        run.context.task = None
    run.model.eval()
    return run


def questions(run: Engine) -> Batch:
    return whole(run.scenario.test(run.tasks[-1], run.tasks[-1]))


def test_calibration_by_hand() -> None:
    """Base directions along the axes, a new class between them at 3 : 4; tau = ln 2 makes the softmax weights powers of two."""
    base, new = torch.eye(2, dtype=torch.float64), torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    w = torch.tensor([2**0.6, 2**0.8], dtype=torch.float64)
    towards = w / w.norm()  # the softmax's own sum goes with the length
    expected = 0.7 * new + 0.3 * towards
    torch.testing.assert_close(calibrated(new, base, 0.3, math.log(2)), expected, rtol=1e-14, atol=0)


def test_calibration_at_its_ends() -> None:
    drawn = torch.Generator().manual_seed(0)
    base = normalize(torch.randn(5, 8, generator=drawn, dtype=torch.float64), dim=1)
    new = normalize(torch.randn(3, 8, generator=drawn, dtype=torch.float64), dim=1)
    assert torch.equal(calibrated(new, base, 0.0, 16.0), new)
    mean = normalize(base.mean(dim=0), dim=0)
    torch.testing.assert_close(calibrated(new, base, 1.0, 0.0), mean.expand(3, 8))
    nearest = base[(new @ base.T).argmax(dim=1)]
    torch.testing.assert_close(calibrated(new, base, 1.0, 1e6), nearest)


def test_prototypes_are_the_means_of_the_frozen_features_and_decide_by_cosine() -> None:
    run = few_shot("proto")
    features, labels = zip(*(run.context.embedded(whole(task.train)) for task in run.tasks), strict=True)
    features, labels = torch.cat(features), torch.cat(labels)
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(10)])
    torch.testing.assert_close(run.memory.prototypes.means(), means[run.memory.prototypes.labels()])
    batch = run.context.prepare(questions(run), train=False)
    with torch.no_grad():
        asked = run.model.features(batch).double()
    by_hand = 16 * normalize(asked, dim=1) @ normalize(means, dim=1).T
    torch.testing.assert_close(run._predict(questions(run)).scores, by_hand)


def test_the_base_session_trains_a_cosine_head_and_nothing_is_trained_after_it() -> None:
    run = running.build(from_mapping(small_run("teen", scenario=FEW_SHOT, strategy={"epochs": 3, "scale": 8.0}, log=[])), None)
    task = run._next_task()
    run._learn(task)
    batch = run.context.prepare(whole(task.train), train=False)
    features = run.model.features(batch)
    cosines = (features @ run.model.head.weight.T) / features.norm(dim=1)[:, None] / run.model.head.weight.norm(dim=1)
    torch.testing.assert_close(run.strategy.loss(batch), cross_entropy(8 * cosines, batch.target))
    trained = {name: value.clone() for name, value in run.model.backbone.state_dict().items()}
    run.context.task = None
    run._learn(run._next_task())
    assert all(torch.equal(value, trained[name]) for name, value in run.model.backbone.state_dict().items())
    assert run.context.samples == 3 * len(task.train) + len(task.train) + 10


def test_early_stopping_watches_the_cosines_that_predict() -> None:
    run = running.build(from_mapping(small_run("proto", scenario=FEW_SHOT, strategy={"epochs": 20}, log=[])), None)
    run._learn(run._next_task())
    data = run.tasks[0].train
    before = run.strategy.validate(data)
    with torch.no_grad():
        run.model.head.weight[0] *= 3  # no cosine changes
        run.model.head.bias[1] += 100
    assert run.strategy.validate(data) == before > 0.5


def test_teen_without_calibration_is_the_prototypes_bit_for_bit() -> None:
    plain, none = few_shot("proto"), few_shot("teen", alpha=0.0)
    assert torch.equal(plain._predict(questions(plain)).scores, none._predict(questions(none)).scores)


def test_base_logits_stay_and_only_base_classes_are_calibrated_towards() -> None:
    plain, teen = few_shot("proto"), few_shot("teen", alpha=0.7, tau=4.0)
    before, after = plain._predict(questions(plain)).scores, teen._predict(questions(teen)).scores
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4:], after[:, 4:])
    directions = normalize(teen.memory.prototypes.means(), dim=1)  # those of the base came first
    expected = calibrated(directions[4:], directions[:4], 0.7, 4.0)  # of whatever session: the four base classes alone
    torch.testing.assert_close(teen.strategy.prototypes[4:], expected)


def test_fewer_new_samples_are_taken_for_base_classes() -> None:
    """The effect that the method has at this size; accuracy does not gain."""

    def taken(name: str, seed: int) -> float:
        options = {"epochs": 30, "batch": 64}
        scores = running.run(
            small_run(name, scenario=FEW_SHOT, strategy=options, model={"backbone": "mlp"}, seed=seed, memory={"exemplars": 0}, log=[])
        )
        return scores["metrics"]["new_as_base"]["final"]

    falls = [taken("proto", seed) - taken("teen", seed) for seed in range(4)]
    assert min(falls) > 0 and sum(falls) / 4 > 0.04, falls


def test_a_frozen_backbone_is_not_trained_and_reads_the_stream_once() -> None:
    config = small_run("teen", strategy={"frozen": True}, model={"backbone": "identity"}, memory={"exemplars": 0}, log=[])
    scores = running.run(config)
    simple = running.run(small_run("simplecil", memory={"exemplars": 0}, log=[]))
    assert scores["samples_seen"] == simple["samples_seen"]
    plain = running.run(small_run("proto", strategy={"frozen": True}, model={"backbone": "identity"}, memory={"exemplars": 0}, log=[]))
    assert plain["matrix"] == simple["matrix"]
    online = {"name": "class_incremental", "data": "digits", "tasks": 5, "online": True}
    once = running.run(
        small_run("proto", strategy={"frozen": True}, model={"backbone": "identity"}, scenario=online, memory={"exemplars": 0}, log=[])
    )
    assert once["matrix"] == simple["matrix"]


@pytest.mark.parametrize(
    ("options", "scenario", "message"),
    [
        ({"epochs": 1}, {"online": True}, "read again for its prototypes.*set strategy.frozen=true"),
        ({"replay": 8}, {}, "strategy.replay is 8"),
    ],
)
def test_what_it_cannot_serve_is_refused(options: dict, scenario: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream = find("scenario", "class_incremental").load()(data=find("source", "digits").load()(), tasks=5, **scenario)
        strategy = find("strategy", "proto").load()(**options)
        Engine(stream, strategy, find("backbone", "mlp").load()(), engine=EngineConfig(device="cpu"))


def test_a_sample_that_is_erased_leaves_its_prototype() -> None:
    run = few_shot("teen")
    first = whole(run.tasks[1].train)
    gone, kept = first[[0]], whole(run.tasks[1].train)[list(range(1, len(first)))]
    assert run.strategy.erase(gone) == ("prototypes",)
    label = int(gone.target[0])
    features, labels = run.context.embedded(kept)
    row = run.memory.prototypes.labels().tolist().index(label)
    torch.testing.assert_close(run.memory.prototypes.means()[row], features[labels == label].mean(dim=0))
    directions = normalize(run.memory.prototypes.means(), dim=1)
    torch.testing.assert_close(run.strategy.prototypes[4:], calibrated(directions[4:], directions[:4], 0.5, 16.0))
