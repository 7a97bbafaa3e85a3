"""Joint training on sets of labels: every sample once, with all that any task said of it."""

from __future__ import annotations

import pytest
import torch
from test_asl import scenes
from test_strategies import learn, make
from toy_streams import Toy, opened

from streamcl.data import whole
from streamcl.errors import ConfigError
from streamcl.plugins import find

SCENARIO = find("scenario", "multi_label").load()


def test_the_labels_of_all_tasks_together_are_the_truth() -> None:
    """sum over the tasks of y_t(x) is y(x), for every sample, and each comes once."""
    run = scenes(make("strategy", "ml_joint", epochs=1, batch=64))
    learn(run, 4)
    task = run._next_task()
    data = run.strategy.training_data(task)
    source = run.scenario.data.load()
    truth = dict(zip(source.train.ids.tolist(), source.train.targets.tolist(), strict=True))
    names = [int(task.names[label]) for label in range(10)]
    batch = whole(data)
    assert len(data) == len(set(batch.ids.tolist())) == len(truth)
    for identity, labels in zip(batch.ids.tolist(), batch.target.tolist(), strict=True):
        assert labels == [truth[identity][name] for name in names]


def test_what_nobody_said_stays_unsaid_where_samples_come_once() -> None:
    labels = [[1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 1]]
    stream = opened(SCENARIO, Toy(labels, target="labels"), increment=2)
    tasks = list(stream)
    run = scenes(make("strategy", "ml_joint", epochs=1, complete=False))
    run.context.earlier = [tasks[0]]
    batch = whole(run.strategy.training_data(tasks[1]))
    said = dict(zip(batch.ids.tolist(), batch.target.tolist(), strict=True))
    assert said == {0: [1, 1, -1, -1], 1: [-1, -1, 1, 0], 2: [0, 1, 0, 1], 3: [-1, -1, 0, 1]}
    run.strategy.complete = True
    batch = whole(run.strategy.training_data(tasks[1]))
    assert dict(zip(batch.ids.tolist(), batch.target.tolist(), strict=True)) == dict(enumerate(labels))


def test_a_task_that_does_not_say_that_it_is_complete_tells_nothing_of_the_other_samples() -> None:
    labels = [[1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 1]]
    stream = opened(SCENARIO, Toy(labels, target="labels"), increment=2)
    tasks = list(stream)
    assert all(task.complete for task in tasks)
    tasks[1].about["complete"] = False  # as one that was fed
    run = scenes(make("strategy", "ml_joint", epochs=1))
    run.context.earlier = [tasks[0]]
    batch = whole(run.strategy.training_data(tasks[1]))
    said = dict(zip(batch.ids.tolist(), batch.target.tolist(), strict=True))
    assert said == {0: [1, 1, -1, -1], 1: [-1, -1, 1, 0], 2: [0, 1, 0, 1], 3: [-1, -1, 0, 1]}
    once = opened(SCENARIO, Toy(labels, target="labels"), increment=2, occurrences="once")
    assert not any(task.complete for task in once)


def test_hidden_labels_stay_hidden() -> None:
    run = scenes(make("strategy", "ml_joint", epochs=1, batch=64), partial=0.5)
    learn(run, 1)
    task = run._next_task()
    target = run.strategy.training_data(task).targets
    assert bool((target == -1).any()) and bool((target == 0).any()) and target.shape[1] == 4


def test_each_task_begins_with_the_first_backbone() -> None:
    run = scenes(make("strategy", "ml_joint", epochs=1, batch=64))
    learn(run, 1)
    run.model.grow(4)
    task = run._next_task()
    run.strategy.before_task(task)
    assert all(torch.equal(value, run.strategy.first[name]) for name, value in run.model.backbone.state_dict().items())
    assert run.model.classes == 4


def test_an_online_stream_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set scenario.online=false"):
        scenes(make("strategy", "ml_joint", epochs=1), online=True)
    with pytest.raises(ConfigError, match=r"set strategy.replay=0"):
        scenes(make("strategy", "ml_joint", epochs=1, replay=4))
