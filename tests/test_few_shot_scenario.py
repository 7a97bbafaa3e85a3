"""Few-shot streams: a base session, then N-way K-shot sessions whose samples are exactly as many as asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.scenarios.few_shot import FewShot
from toy_streams import Toy, assert_repeatable, ids, opened, read

from streamcl.errors import ConfigError, DataError
from streamcl.stream import Scenario


def test_sixty_classes_and_eight_sessions_of_five_ways_and_five_shots() -> None:
    source = Toy(torch.arange(100).repeat(12), test=torch.arange(100).repeat(3))
    scenario = opened(FewShot, source, base=60, ways=5, shots=5)
    tasks = list(scenario)
    assert len(tasks) == 9 and scenario.info.tasks == 9 and scenario.info.classes == 100
    assert list(scenario.info.class_names) == [f"c{number}" for number in range(100)], "the order of the source, as published"
    assert scenario.info.metrics == ("accuracy", "harmonic_mean", "base_accuracy", "new_accuracy", "base_as_new", "new_as_base")
    assert len(tasks[0].train) == 60 * 12 and (tasks[0].shots, tasks[0].ways, tasks[0].base) == (None, 60, True)
    assert tasks[0].name.startswith("base: c0") and tasks[3].name == "session 3: c70, c71, c72, c73, c74"
    for session, task in enumerate(tasks):
        seen = 60 + 5 * session
        assert task.seen == tuple(range(seen)) and len(task.names) == seen
        tested = [number for earlier in tasks[: session + 1] for number in read(scenario.test(earlier, task)).target.tolist()]  # type: ignore[union-attr]
        assert torch.tensor(tested).bincount().tolist() == [3] * seen, "all test samples of all classes seen, and no other"
        if session:
            assert torch.bincount(task.train.targets).tolist()[seen - 5 :] == [5] * 5 and len(task.train) == 25
            assert (task.shots, task.ways, task.base) == (5, 5, False)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_new_class_has_exactly_its_shots_of_its_own_samples(data: st.DataObject) -> None:
    base, ways, shots = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    sessions = data.draw(st.integers(1, 3))
    classes = base + ways * sessions + data.draw(st.integers(0, 3))
    counts = data.draw(st.lists(st.integers(shots, shots + 5), min_size=classes, max_size=classes))
    base_shots = data.draw(st.sampled_from([None, 1, shots]))
    validation = data.draw(st.sampled_from([0.0, 0.4]))
    targets = data.draw(st.permutations([c for c, count in enumerate(counts) for _ in range(count)]))
    options: dict[str, Any] = {"base": base, "ways": ways, "shots": shots, "sessions": sessions, "base_shots": base_shots}
    scenario = opened(
        FewShot, Toy(targets, test=list(range(classes))), data.draw(st.integers(0, 99)), **options, order="seed", validation=validation
    )
    tasks = list(scenario)
    assert [len(task.classes) for task in tasks] == [base] + [ways] * sessions
    everything = [number for task in tasks for number in ids(task.train, task.validation)]
    assert len(everything) == len(set(everything)), "no sample twice, and none both to train and to validate on"
    for task in tasks:
        batch = read(task.train)
        assert batch.target is not None
        assert [task.names[c] for c in batch.target.tolist()] == [f"c{targets[row]}" for row in batch.ids.tolist()]
        assert sorted(batch.ids.tolist()) == batch.ids.tolist(), "in the order of the source"
        for c in task.classes:
            there = counts[int(task.names[c][1:])]
            held = 0 if task.validation is None else int((task.validation.targets == c).sum())
            wanted = shots if task.index else there if base_shots is None else base_shots
            kept = int((batch.target == c).sum())
            assert kept + held == wanted and kept >= 1
            assert not held or task.index == 0, "a session has no sample to spare"
        assert (task.validation is not None) == (validation > 0 and task.index == 0)
        tested = scenario.test(task, tasks[-1])
        assert {f"c{row - len(targets)}" for row in ids(tested)} == {task.names[c] for c in task.classes}


def test_without_sessions_there_are_as_many_as_there_are_classes_for() -> None:
    tasks = list(opened(FewShot, Toy(list(range(11)) * 2), base=4, ways=3, shots=1))
    assert [task.classes for task in tasks] == [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert len(list(opened(FewShot, Toy(list(range(11)) * 2), base=4, ways=3, shots=1, sessions=1))) == 2


def test_every_sample_of_a_class_may_be_a_shot() -> None:
    drawn: set[int] = set()
    for seed in range(40):
        drawn |= set(ids(opened(FewShot, Toy([0, 1, 1, 1, 1, 1]), seed, base=1, ways=1, shots=2).task(1).train))
    assert drawn == {1, 2, 3, 4, 5}


def test_a_session_without_test_samples_is_not_scored() -> None:
    scenario = opened(FewShot, Toy([0, 1, 1], test=[0]), base=1, ways=1, shots=2)
    first, second = scenario
    assert ids(scenario.test(first, second)) == [3] and scenario.test(second, second) is None


@pytest.mark.parametrize(
    ("source", "options", "kind", "message"),
    [
        (
            Toy([0, 1, 2] * 4),
            {"base": 1, "ways": 1, "shots": 5},
            DataError,
            r"5 shots are asked for .* fewer training samples: c1 \(4\), c2",
        ),
        (
            Toy([0, 0, 1, 1]),
            {"base": 1, "ways": 1, "shots": 2, "base_shots": 3},
            DataError,
            r"2 shots \(3 in the base\) are asked for and these classes have fewer training samples: c0 \(2\)$",
        ),
        (Toy([1, 1], test=[0, 1], names=["c0", "c1"]), {"base": 1, "ways": 1, "shots": 1}, DataError, r"c0 \(0\)"),
        (
            Toy([0, 1, 2]),
            {"base": 2, "ways": 1, "shots": 1, "sessions": 2},
            ConfigError,
            "2 base classes and 2 sessions of 1 classes need 4 classes, and the source has 3",
        ),
        (Toy([0, 1, 2]), {"base": 3, "ways": 1, "shots": 1}, ConfigError, "3 base classes and a session of 1 classes need 4 classes"),
        (Toy([0, 1, 2]), {"base": 9, "ways": 2, "shots": 1}, ConfigError, "9 base classes and a session of 2 classes need 11 classes"),
        (Toy([0, 1], test=[]), {"base": 1, "ways": 1, "shots": 1}, ConfigError, "few_shot: the source has no test set"),
        (Toy([[1, 0]], target="labels"), {"base": 1, "ways": 1, "shots": 1}, ConfigError, "few_shot needs one class per sample"),
        (Toy([0, 1]), {"base": 1, "ways": 1, "shots": 1, "order": ["c0", "c0"]}, ConfigError, "few_shot: order names class 'c0' twice"),
    ],
)
def test_few_shot_refuses_what_cannot_be(source: Toy, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        opened(FewShot, source, **options)


def test_a_class_that_stays_out_of_the_stream_may_have_too_few_samples() -> None:
    tasks = list(opened(FewShot, Toy([0, 0, 1, 1, 2]), base=1, ways=1, shots=2, sessions=1))
    assert [ids(task.train) for task in tasks] == [[0, 1], [2, 3]]


def test_a_few_shot_stream_is_repeatable() -> None:
    def make(seed: int, workers: int | None) -> Scenario:
        source = Toy(torch.arange(7).repeat(9), workers=workers)
        return opened(FewShot, source, seed, base=3, ways=2, shots=3, validation=0.2, order="seed")

    assert_repeatable(make)
