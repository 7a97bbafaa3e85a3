"""Multi-label streams: which label is visible in which task, what is scored, and annotations that are made worse on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.scenarios.multi_label import MultiLabel
from streamcl.scenarios.sources.digit_scenes import DigitScenes
from torch import Tensor
from toy_streams import Toy, assert_repeatable, ids, opened, read

from streamcl.data import Subset
from streamcl.errors import ConfigError, DataError
from streamcl.stream import Scenario, Task

BOX = [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]


def toy(train: Any, test: Any = None, **changes: Any) -> Toy:
    return Toy(train, test, names=[f"c{number}" for number in range(torch.as_tensor(train).shape[1])], target="labels", **changes)


def visible(task: Task, dataset: Any = None) -> tuple[list[int], Tensor]:
    """The samples and their labels, as they are read."""
    batch = read(task.train if dataset is None else dataset)
    assert batch.target is not None and batch.target.dtype == torch.int8
    return batch.ids.tolist(), batch.target


@st.composite
def truths(draw: st.DrawFn, unknown: bool = False) -> Tensor:
    """Labels of some samples, with a positive of every class among the first ones."""
    classes, samples = draw(st.integers(1, 6)), draw(st.integers(0, 20))
    values = st.sampled_from([0, 1, -1] if unknown else [0, 1])
    rows = draw(st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=samples, max_size=samples))
    return torch.cat([torch.eye(classes, dtype=torch.int8), torch.tensor(rows, dtype=torch.int8).reshape(-1, classes)])


@settings(max_examples=60, deadline=None)
@given(truths(unknown=True), truths(), st.data())
def test_each_task_annotates_its_own_classes_and_the_tasks_together_everything(truth: Tensor, tested: Tensor, data: st.DataObject) -> None:
    classes = truth.shape[1]
    tested = (
        tested[:, :classes] if tested.shape[1] >= classes else torch.cat([tested, tested[:, :1].expand(-1, classes - tested.shape[1])], 1)
    )
    division = data.draw(
        st.one_of(
            st.fixed_dictionaries({"tasks": st.integers(1, classes)}),
            st.fixed_dictionaries({"base": st.integers(1, classes), "increment": st.integers(1, classes)}),
        )
    )
    order: Any = data.draw(st.sampled_from(["alphabetical", "seed"]))
    scenario = opened(MultiLabel, toy(truth, tested), data.draw(st.integers(0, 99)), order=order, **division)
    tasks = list(scenario)
    arrival = [int(name[1:]) for name in scenario.info.class_names]
    if order == "alphabetical":
        assert arrival == sorted(arrival)
    assert [c for task in tasks for c in task.classes] == list(range(classes))

    told = torch.zeros(len(truth), classes, dtype=torch.int64)
    joined: set[int] = set()
    appearances = 0
    for task in tasks:
        rows, target = visible(task)
        assert target.shape == (len(rows), len(task.seen)), "classes that have not come have no column"
        assert torch.equal(target, task.train.targets)
        first = task.classes[0]
        assert (target[:, :first] == -1).all(), "earlier classes are unknown, not absent"
        own = truth[rows][:, [arrival[c] for c in task.classes]]
        assert torch.equal(target[:, first:], own)
        assert (own == 1).any(dim=1).all(), "a sample without a class of this task is not in it"
        told[torch.tensor(rows, dtype=torch.int64)[:, None], torch.tensor([arrival[c] for c in task.classes])] += (own == 1).long()
        joined |= set(rows)
        appearances += len(rows)
    carrying = (truth == 1).any(dim=1).nonzero().squeeze(1).tolist()
    assert joined == set(carrying), "every sample that carries a label, and no other"
    assert torch.equal(told, (truth == 1).long()), "the labels that are seen in the tasks add up to the truth"
    expected = sum(int((truth[:, [arrival[c] for c in task.classes]] == 1).any(dim=1).sum()) for task in tasks)
    assert appearances == expected >= len(carrying)

    for after in tasks:
        seen = [arrival[c] for c in after.seen]
        parts = [scenario.test(task, after) for task in tasks[: after.index + 1]]
        scored = ids(*parts)
        assert len(scored) == len(set(scored)), "no test sample is scored twice"
        assert sorted(scored) == (len(truth) + (tested[:, seen] == 1).any(dim=1).nonzero().squeeze(1)).tolist()
        for part in parts:
            if part is not None:
                rows, target = visible(after, part)
                assert torch.equal(target, tested[torch.tensor(rows) - len(truth)][:, seen]), "the whole truth over the classes seen"
        for later in tasks[after.index + 1 :]:
            assert scenario.test(later, after) is None


def test_the_tables_of_the_protocol_come_out_as_counted_by_hand() -> None:
    first, second = opened(MultiLabel, toy(BOX), base=3, increment=1)
    assert visible(first)[0] == [0, 1, 2, 3] and visible(first)[1].tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
    assert visible(second)[0] == [2, 3, 5] and visible(second)[1].tolist() == [[-1, -1, -1, 1]] * 3
    scenario = opened(MultiLabel, toy(BOX), base=3, increment=1, threshold=0.8, online=True)
    assert (scenario.info.threshold, scenario.info.passes, scenario.info.target) == (0.8, 1, "labels")
    assert scenario.info.metrics == ("map", "cf1", "macro_f1", "of1")
    task = scenario.task(1)
    assert len(read(task.train)) == 3
    with pytest.raises(DataError, match="single-pass"):
        read(task.train)


def test_b40_c10_is_five_tasks() -> None:
    scenario = opened(MultiLabel, toy(torch.eye(80)), base=40, increment=10)
    assert [len(task.classes) for task in scenario] == [40, 10, 10, 10, 10]
    assert list(scenario.info.class_names[:3]) == ["c0", "c1", "c10"], "in the order of the names"


@settings(max_examples=30, deadline=None)
@given(truths(), st.data())
def test_with_occurrences_once_every_sample_lies_in_the_first_of_its_tasks(truth: Tensor, data: st.DataObject) -> None:
    tasks = list(opened(MultiLabel, toy(truth), tasks=data.draw(st.integers(1, truth.shape[1])), occurrences="once", order="given"))
    met = torch.zeros(len(truth), dtype=torch.bool)
    for task in tasks:
        mine = (truth[:, list(task.classes)] == 1).any(dim=1) & ~met
        assert visible(task)[0] == mine.nonzero().squeeze(1).tolist()
        met |= mine
    assert int(met.sum()) == sum(len(task.train) for task in tasks)


def test_a_class_that_only_occurs_beside_an_earlier_one_cannot_be_learned_once() -> None:
    source = toy([[1, 0], [1, 1]])
    with pytest.raises(DataError, match="no training sample of c1"):
        opened(MultiLabel, source, tasks=2, occurrences="once")
    assert [visible(task)[0] for task in opened(MultiLabel, source, tasks=2)] == [[0, 1], [1]]


# -- worse annotations


def dense(samples: int = 600, classes: int = 6, seed: int = 0) -> Tensor:
    truth = (torch.rand(samples, classes, generator=torch.Generator().manual_seed(seed)) < 0.5).to(torch.int8)
    truth[:, 0] = 1  # so that each sample is in the first task
    return truth


def within(count: int, draws: int, rate: float) -> bool:
    """Five standard deviations on either side of the binomial's mean."""
    return abs(count - draws * rate) <= 5 * (draws * rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_partial_hides_its_share_and_changes_nothing_else(rate: float) -> None:
    truth = dense()
    for task in opened(MultiLabel, toy(truth), 3, tasks=2, partial=rate):
        rows, target = visible(task)
        own, expected = target[:, list(task.classes)], truth[rows][:, list(task.classes)]
        hidden = own == -1
        assert torch.equal(own[~hidden], expected[~hidden])
        for value in (0, 1):
            assert within(int((hidden & (expected == value)).sum()), int((expected == value).sum()), rate)


@pytest.mark.parametrize("rate", [0.1, 0.4, 1.0])
def test_wrong_turns_its_share_round_of_positives_and_negatives_alike(rate: float) -> None:
    truth = dense()
    for task in opened(MultiLabel, toy(truth), 3, tasks=2, wrong=rate):
        rows, target = visible(task)
        own, expected = target[:, list(task.classes)], truth[rows][:, list(task.classes)]
        assert (own >= 0).all()
        for value in (0, 1):
            assert within(int((own != expected)[expected == value].sum()), int((expected == value).sum()), rate)


def test_what_is_not_annotated_is_neither_turned_round_nor_told() -> None:
    truth = dense()
    truth[::3, 1] = -1
    (task,) = opened(MultiLabel, toy(truth), tasks=1, wrong=0.5, partial=0.3)
    rows, target = visible(task)
    assert rows == list(range(len(truth))) and (target[truth == -1] == -1).all()


def test_single_positive_keeps_one_label_per_sample_and_task_drawn_alike() -> None:
    truth = torch.ones(900, 6, dtype=torch.int8)
    truth[0, 1:] = 0
    for task in opened(MultiLabel, toy(truth), 1, tasks=2, single_positive=True):
        rows, target = visible(task)
        own = target[:, list(task.classes)]
        assert ((own == 1).sum(dim=1) == 1).all() and not (own == 0).any()
        assert (truth[rows][:, list(task.classes)][own == 1] == 1).all()
        for column in own.T:
            assert within(int((column == 1).sum()), len(own), 1 / 3)


def test_a_sample_of_which_every_label_is_hidden_stays_and_is_counted() -> None:
    truth = dense()
    tasks = list(opened(MultiLabel, toy(truth), 3, tasks=2, partial=0.7))
    clean = list(opened(MultiLabel, toy(truth), 3, tasks=2))
    for task, whole in zip(tasks, clean, strict=True):
        rows, target = visible(task)
        assert rows == ids(whole.train)
        bare = int((target[:, list(task.classes)] == -1).all(dim=1).sum())
        assert task.unannotated == bare and within(bare, len(rows), 0.7**3), "three classes a task"
        assert whole.about == {"complete": True}


def told_by_the_source(numbers: Tensor) -> dict[str, Any]:
    return {
        "box_labels": numbers[:, None].expand(-1, 4),
        "caption": [f"caption {n}" for n in numbers.tolist()],
        "choices": [f"one\ntwo {n}" for n in numbers.tolist()],
    }


@pytest.mark.parametrize("workers", [None, 0])
def test_nothing_beside_a_sample_tells_what_is_not_annotated(workers: int | None) -> None:
    scenario = opened(MultiLabel, toy(dense(60), extra=told_by_the_source, workers=workers), tasks=3, validation=0.2, online=True)
    for task in scenario:
        for dataset in (task.train, task.validation, scenario.test(task, task)):
            if dataset is not None:
                batch = read(dataset)
                assert batch.extra == {"choices": [f"one\ntwo {n}" for n in batch.ids.tolist()]}
    scenes = DigitScenes(scenes=80, test_scenes=40)
    for task in opened(MultiLabel, scenes, increment=5):
        assert read(task.train).extra == {}


def test_a_view_of_a_source_tells_no_more_than_the_source_itself() -> None:
    class Seen(Toy):
        def load(self) -> Any:
            loaded = super().load()
            return replace(loaded, train=Subset(loaded.train, torch.arange(len(loaded.train))))

    truth = dense(30)
    scenario = opened(MultiLabel, Seen(truth, names=[f"c{n}" for n in range(6)], target="labels", extra=told_by_the_source), tasks=3)
    plain = opened(MultiLabel, toy(truth), tasks=3)
    for task, other in zip(scenario, plain, strict=True):
        assert read(task.train).extra.keys() == {"choices"} and torch.equal(visible(task)[1], visible(other)[1])


def test_worse_annotations_leave_validation_and_test_true() -> None:
    truth = dense()
    options: dict[str, Any] = {"tasks": 2, "wrong": 0.4, "partial": 0.4, "validation": 0.2}
    scenario = opened(MultiLabel, toy(truth), 5, **options)
    plain = opened(MultiLabel, toy(truth), 5, tasks=2, validation=0.2)
    for task, clean in zip(scenario, plain, strict=True):
        assert ids(task.train) == ids(clean.train), "which samples a task has is a matter of the true labels"
        rows, target = visible(task, task.validation)
        assert torch.equal(target[:, list(task.classes)], truth[rows][:, list(task.classes)])
        test = scenario.test(task, task)
        if test is not None:
            rows, target = visible(task, test)
            assert torch.equal(target, truth[torch.tensor(rows) - len(truth)][:, list(task.seen)])


@settings(max_examples=40, deadline=None)
@given(truths(), st.sampled_from([0.2, 0.5, 0.95]), st.integers(0, 99), st.sampled_from(["every", "once"]))
def test_a_held_back_sample_is_trained_on_in_no_task_and_every_class_keeps_one(
    truth: Tensor, validation: float, seed: int, occurrences: str
) -> None:
    tasks = list(opened(MultiLabel, toy(truth), seed, tasks=truth.shape[1], validation=validation, occurrences=occurrences))
    trained = {n for task in tasks for n in ids(task.train)}
    held = {n for task in tasks for n in ids(task.validation)}
    assert not trained & held and trained | held == set((truth == 1).any(dim=1).nonzero().squeeze(1).tolist())
    for task in tasks:
        assert (task.train.targets[:, list(task.classes)] == 1).any(dim=0).all()


def test_validation_takes_its_share_of_all_samples() -> None:
    tasks = list(opened(MultiLabel, toy(dense(200)), tasks=3, validation=0.25))
    assert len({n for task in tasks for n in ids(task.validation)}) == 50


@pytest.mark.parametrize(
    ("source", "options", "kind", "message"),
    [
        (toy(BOX), {"tasks": 2, "single_positive": True, "partial": 0.1}, ConfigError, "single_positive already hides all labels but one"),
        (toy(BOX), {"tasks": 2, "single_positive": True, "wrong": 0.1}, ConfigError, "keeps one label, a true one, .* leave out wrong"),
        (toy(BOX), {"tasks": 2, "partial": 1.0}, ConfigError, "partial is 1, which hides every label"),
        (Toy([0, 1]), {"tasks": 2}, ConfigError, "multi_label needs a set of labels per sample, and the target of this source is 'class'"),
        (toy(BOX, test=torch.empty(0, 4)), {"tasks": 2}, ConfigError, "multi_label: the source has no test set"),
        (toy(BOX), {"tasks": 5}, ConfigError, "multi_label: tasks is 5 and there are only 4 classes"),
        (toy(BOX), {"classes": [["c0"], ["c9"]]}, ConfigError, "multi_label: classes names an unknown class 'c9'"),
        (toy(BOX), {"classes": [["c0"], ["c1"]], "order": "seed"}, ConfigError, "classes already says the order"),
        (toy([[1, 0], [1, -1]]), {"tasks": 2}, DataError, "no training sample of c1: add some, or leave the class out with `classes`"),
    ],
)
def test_multi_label_refuses_what_cannot_be(source: Toy, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        opened(MultiLabel, source, **options)


def test_classes_that_are_not_listed_are_neither_trained_nor_scored() -> None:
    scenario = opened(MultiLabel, toy(BOX), classes=[["c3"], ["c1"]])
    first, second = scenario
    assert visible(first)[0] == [2, 3, 5] and visible(first)[1].tolist() == [[1], [1], [1]]
    assert visible(second)[0] == [1, 3] and visible(second)[1].tolist() == [[-1, 1], [-1, 1]]
    assert sorted(ids(scenario.test(first, second), scenario.test(second, second))) == [7, 8, 9, 11]


@pytest.mark.parametrize("worse", [{"wrong": 0.3, "partial": 0.3}, {"single_positive": True}, {"occurrences": "once"}], ids=str)
def test_a_multi_label_stream_is_repeatable(worse: dict[str, Any]) -> None:
    def make(seed: int, workers: int | None) -> Scenario:
        return opened(MultiLabel, toy(torch.cat([torch.eye(6), dense(24)]), workers=workers), seed, tasks=3, validation=0.2, **worse)

    assert_repeatable(make)
