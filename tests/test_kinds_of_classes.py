"""Streams whose classes or domains change: what arrives when, in which proportions, and what each kind refuses."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from streamcl.scenarios.blurry import Blurry
from streamcl.scenarios.class_incremental import ClassIncremental
from streamcl.scenarios.domain_incremental import DomainIncremental, turned, turned_masks
from streamcl.scenarios.hierarchical import Hierarchical
from torch import Tensor
from toy_streams import Toy, assert_repeatable, ids, opened, read

from streamcl.data import ArrayDataset
from streamcl.errors import ConfigError, DataError
from streamcl.seeding import derived
from streamcl.stream import Grouping, Modality, Scenario, Source, SourceData, Task

COUNTS = [9, 12, 7, 10, 8, 11]  # samples of each class
TARGETS = [c for c, count in enumerate(COUNTS) for _ in range(count)]


def per_class(task: Task, width: int) -> list[int]:
    return torch.bincount(task.train.targets, minlength=width).tolist()


def source_classes(scenario: Scenario, task: Task, targets: list[int]) -> dict[int, set[str]]:
    """The names of the classes that the stream's numbers stand for, by the samples that carry them."""
    found: dict[int, set[str]] = {}
    for number, row in zip(task.train.targets.tolist(), task.train.ids.tolist(), strict=True):
        found.setdefault(number, set()).add(f"c{targets[row]}")
    return found


# -- class_incremental: long tails and told tasks


def test_the_sizes_of_a_long_tail_fall_by_equal_factors() -> None:
    scenario = opened(ClassIncremental, Toy([0, 1, 2] * 100), tasks=3, imbalance=0.01, tail="ordered", order="given")
    assert [per_class(task, 3) for task in scenario] == [[100, 0, 0], [0, 10, 0], [0, 0, 1]]
    assert [len(scenario.test(task, task) or []) for task in scenario.past()] == [100] * 3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=7),
    st.sampled_from([0.02, 0.1, 0.5, 0.9]),
    st.sampled_from(["ordered", "shuffled"]),
    st.integers(0, 999),
)
def test_a_long_tail_keeps_its_share_of_every_class_and_of_the_test_set_all(
    counts: list[int], imbalance: float, tail: str, seed: int
) -> None:
    targets = [c for c, count in enumerate(counts) for _ in range(count)]
    scenario = opened(ClassIncremental, Toy(targets), seed, tasks=1, imbalance=imbalance, tail=tail)
    (task,) = scenario
    last = max(len(counts) - 1, 1)
    wanted = [max(1, int(max(counts) * imbalance ** (rank / last))) for rank in range(len(counts))]
    arrived = [counts[int(name[1:])] for name in scenario.info.class_names]
    kept = per_class(task, len(counts))
    if tail == "ordered":
        assert kept == [min(want, there) for want, there in zip(wanted, arrived, strict=True)]
    if tail == "shuffled" and len(set(counts)) == 1:
        assert sorted(kept, reverse=True) == wanted
    assert all(1 <= left <= there for left, there in zip(kept, arrived, strict=True))
    assert len(set(ids(task.train))) == sum(kept)
    assert len(scenario.test(task, task) or []) == len(targets)


def test_a_shuffled_tail_is_not_always_the_order_of_arrival() -> None:
    sizes = {tuple(per_class(next(iter(opened(ClassIncremental, Toy([0, 1, 2] * 20), s, tasks=1, imbalance=0.05))), 3)) for s in range(30)}
    assert len(sizes) == 6, "every order of the three sizes comes up"


@pytest.mark.parametrize("seed", range(8))
def test_the_rarest_class_still_arrives_in_its_own_task(seed: int) -> None:
    options: dict[str, Any] = {"tasks": 4, "imbalance": 0.02, "tail": "ordered", "repeat": 1.0, "validation": 0.3}
    targets = list(range(4)) * 50
    tasks = list(opened(ClassIncremental, Toy(targets), seed, **options))
    for task in tasks:
        assert set(task.classes) <= set(task.train.targets.tolist())
    everything = [number for task in tasks for number in ids(task.train, task.validation)]
    assert len(everything) == len(set(everything)) == 50 + 13 + 3 + 1  # 50 x 0.02 ^ (rank / 3), rounded down


def test_repeat_takes_its_share_of_what_a_long_tail_keeps() -> None:
    # 100, 31 and 10 are kept of the first three classes; the tenth of them that come back is 10, and 3, and 1, or one off by rounding.
    options: dict[str, Any] = {"tasks": 4, "imbalance": 0.031, "tail": "ordered", "order": "given", "repeat": 0.1}
    first, second, third, _ = opened(ClassIncremental, Toy(list(range(4)) * 100), **options)
    for task, c, kept in ((first, 0, 100), (second, 1, 31), (third, 2, 9)):
        assert abs(per_class(task, 4)[c] - 0.9 * kept) <= 1


def test_a_task_is_told_with_every_batch_where_it_is_asked_for() -> None:
    scenario = opened(ClassIncremental, Toy(TARGETS), tasks=3, task_ids=True, validation=0.2, online=True)
    tasks = list(scenario)
    assert scenario.info.task_ids and scenario.info.passes == 1
    for task in tasks:
        for dataset in (task.train, task.validation, scenario.test(task, tasks[-1])):
            batch = read(dataset)
            assert batch.task is not None and set(batch.task.tolist()) == {task.index}
            assert batch.target is not None and set(batch.target.tolist()) <= set(task.classes)
    untold = opened(ClassIncremental, Toy(TARGETS), tasks=3)
    assert not untold.info.task_ids and read(untold.task(1).train).task is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalance": 0.0}, "imbalance is 0, and the smallest class needs a sample"),
        ({"tail": "ordered"}, "imbalance: 1 makes none"),
        ({"repeat": 0.1, "task_ids": True}, "repeat brings classes back in the tasks of others"),
    ],
)
def test_class_incremental_refuses_what_contradicts_itself(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassIncremental(data=Toy(TARGETS), tasks=2, **options)


def test_a_long_tailed_task_incremental_stream_is_repeatable() -> None:
    assert_repeatable(
        lambda seed, workers: opened(
            ClassIncremental, Toy(TARGETS, workers=workers), seed, tasks=3, imbalance=0.3, task_ids=True, validation=0.2
        )
    )


# -- blurry


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_sample_of_a_blurry_stream_appears_once_and_disjoint_classes_in_one_task(data: st.DataObject) -> None:
    classes = data.draw(st.integers(1, 8))
    targets = data.draw(st.permutations([*range(classes), *data.draw(st.lists(st.integers(0, classes - 1), max_size=60))]))
    disjoint, blurry = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])), data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    sizes, validation = data.draw(st.sampled_from(["equal", "random"])), data.draw(st.sampled_from([0.0, 0.3]))
    options: dict[str, Any] = {"disjoint": disjoint, "blurry": blurry, "sizes": sizes, "validation": validation}
    try:
        scenario = opened(Blurry, Toy(targets), data.draw(st.integers(0, 99)), tasks=data.draw(st.integers(1, classes)), **options)
    except ConfigError as error:
        assert sizes == "random" and "would have no sample" in str(error)
        assume(False)
    tasks = list(scenario)

    assert sorted(number for task in tasks for number in ids(task.train, task.validation)) == list(range(len(targets)))
    assert [number for task in tasks for number in task.classes] == list(range(classes))
    occurs: dict[str, set[int]] = {}
    met: set[int] = set()
    for task in tasks:
        for dataset in (task.train, task.validation):
            if dataset is None:
                continue
            for number, row in zip(dataset.targets.tolist(), dataset.ids.tolist(), strict=True):
                assert task.names[number] == f"c{targets[row]}"
                occurs.setdefault(task.names[number], set()).add(task.index)
        here = {number for number in task.labels}
        assert here == set(task.train.targets.tolist()), "validation never takes the last sample of a class"
        assert set(task.classes) == here - met, "a class is new where it first occurs"
        met |= here
        assert task.seen == tuple(sorted(met))
        test = scenario.test(task, tasks[-1])
        assert {f"c{targets[row - len(targets)]}" for row in ids(test)} == {task.names[c] for c in task.classes}
    assert sum(len(where) == 1 for where in occurs.values()) >= round(disjoint * classes)
    assert sorted(row for task in tasks for row in ids(scenario.test(task, task))) == [
        len(targets) + place for place in range(len(targets))
    ]


@pytest.mark.parametrize("disjoint", [0.0, 0.2, 0.3, 0.5, 0.7, 1.0])
def test_with_equal_sizes_every_task_has_a_class_of_its_own(disjoint: float) -> None:
    for classes in range(1, 9):
        for tasks in range(1, classes + 1):
            scenario = opened(Blurry, Toy(list(range(classes))), tasks=tasks, disjoint=disjoint, blurry=0.0, sizes="equal")
            brought = [len(task.classes) for task in scenario]
            assert sum(brought) == classes and min(brought) >= 1 and max(brought) - min(brought) <= 2


@pytest.mark.parametrize("blurry", [0.1, 0.5])
def test_with_equal_sizes_every_task_gives_its_share_and_gets_as_many_back(blurry: float) -> None:
    # Ten classes of 200 in five tasks, order as given: classes 0 to 4 are disjoint, of 5 to 9 each task has one.
    targets = torch.arange(10).repeat_interleave(200)
    scenario = opened(Blurry, Toy(targets), 7, tasks=5, disjoint=0.5, blurry=blurry, sizes="equal", order="given")
    given_away = int(200 * blurry)
    strays = 5 * given_away
    own: Tensor = scenario.own  # type: ignore[attr-defined]
    returned = 0
    for task in scenario:
        assert len(task.train) == 400, "as many as its own two classes have"
        home = own[targets[task.train.ids]] == task.index
        away = int((~home).sum())
        returned += given_away - away
        assert away <= given_away
        assert int((home & (targets[task.train.ids] >= 5)).sum()) >= 200 - given_away
    # A stray comes back to its own task with probability 1/5: five standard deviations on either side.
    assert abs(returned - strays / 5) <= 5 * (strays * 0.2 * 0.8) ** 0.5


def test_strays_are_dealt_out_over_all_tasks_alike() -> None:
    targets = torch.arange(4).repeat_interleave(500)
    scenario = opened(Blurry, Toy(targets), 1, tasks=4, disjoint=0.0, blurry=0.4, sizes="equal", order="given")
    own: Tensor = scenario.own  # type: ignore[attr-defined]
    for task in scenario:
        for other in set(range(4)) - {task.index}:
            there = int((own[targets[task.train.ids]] == other).sum())
            assert abs(there - 50) <= 5 * (200 * 0.25 * 0.75) ** 0.5, "a quarter of the 200 that each other task gives"


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.sampled_from([0.05, 0.1, 0.29, 0.3, 0.7, 0.9, 1.0]), st.integers(0, 999))
def test_random_sizes_give_away_exactly_the_share_that_is_asked_for(tasks: int, blurry: float, seed: int) -> None:
    targets = torch.arange(12).repeat_interleave(100)
    try:
        scenario = opened(Blurry, Toy(targets), seed, tasks=tasks, disjoint=0.5, blurry=blurry)
    except ConfigError as error:
        assert "would have no sample" in str(error)
        assume(False)
    given: Tensor = scenario.given  # type: ignore[attr-defined]
    own: Tensor = scenario.own  # type: ignore[attr-defined]
    total = round(600 * blurry)
    strays = np.random.RandomState(seed).permutation(12)[6:].tolist()  # the later half in the order of the seed is blurry
    held = 100 * torch.bincount(own[strays], minlength=tasks)
    assert int(given.sum()) == total and (given >= 0).all() and (given <= held).all()
    home = torch.tensor([own[targets[task.train.ids]].eq(task.index).sum() for task in scenario])
    assert [len(task.train) for task in scenario.past()] == torch.bincount(own[targets], minlength=tasks).tolist(), "as many back as given"
    away = sum(len(task.train) for task in scenario.past()) - int(home.sum())
    chance = given.double() / total  # of a dealt sample to come into each task: of those that a task gave, this share is back home
    back, spread = float((given * chance).sum()), float((given * chance * (1 - chance)).sum()) ** 0.5
    assert abs(total - away - back) <= 5 * spread + 1e-6


def test_random_sizes_give_away_no_more_than_the_share_and_vary() -> None:
    targets = torch.arange(10).repeat_interleave(50)
    new, sizes = set(), set()
    for seed in range(12):
        scenario = opened(Blurry, Toy(targets), seed, tasks=3, disjoint=0.5, blurry=0.2)
        own: Tensor = scenario.own  # type: ignore[attr-defined]
        away = sum(int((own[targets[task.train.ids]] != task.index).sum()) for task in scenario)
        assert 0 < away <= int(0.2 * 5 * 50)
        new.add(tuple(len(task.classes) for task in scenario.past()))
        sizes.add(tuple(len(task.train) for task in scenario.past()))
    assert len(new) > 3 and len(sizes) > 3


def test_without_blur_the_stream_is_divided_by_class_alone() -> None:
    tasks = list(opened(Blurry, Toy(TARGETS), tasks=3, disjoint=0.0, blurry=0.0, sizes="equal", online=True))
    assert [task.labels for task in tasks] == [task.classes for task in tasks] == [(0, 1), (2, 3), (4, 5)]
    list(tasks[0].train.batches(4))
    with pytest.raises(DataError, match="single-pass"):
        list(tasks[0].train.batches(4))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (Toy(TARGETS), {"tasks": 7}, "tasks is 7 and there are only 6 classes"),
        (Toy(TARGETS, test=[]), {"tasks": 2}, "the source has no test set"),
        (Toy([[1, 0]], target="labels"), {"tasks": 1}, "one class per sample"),
        (Toy(TARGETS), {"tasks": 6, "disjoint": 1.0}, "task . would have no sample: take fewer tasks, or sizes: equal"),
        (Toy(TARGETS), {"tasks": 2, "order": ["c0"]}, "order lacks c1"),
    ],
)
def test_blurry_refuses_what_cannot_be(source: Toy, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(Blurry, source, 1, **options)


def test_blurry_refuses_a_class_without_samples_and_names_a_way_out_that_it_has() -> None:
    with pytest.raises(DataError, match="no training sample of c1: add some, or leave the class out of the source"):
        opened(Blurry, Toy([0, 2], test=[0, 1, 2]), tasks=1)


@pytest.mark.parametrize("sizes", ["equal", "random"])
def test_a_blurry_stream_is_repeatable(sizes: str) -> None:
    options: dict[str, Any] = {"tasks": 3, "disjoint": 0.3, "blurry": 0.3, "sizes": sizes, "validation": 0.2}
    assert_repeatable(lambda seed, workers: opened(Blurry, Toy(TARGETS, workers=workers), seed, **options))


# -- hierarchical


def tree(parents: list[list[int]], samples: int) -> tuple[Toy, list[dict[str, list[str | int]]]]:
    """A source with `samples` of each class, and the levels above: parents[level][label] is the number of the label above."""
    count = len(parents[-1])
    above: list[list[int]] = []
    current = list(range(count))
    for row in reversed(parents):
        current = [row[label] for label in current]
        above.insert(0, current)
    levels: list[dict[str, list[str | int]]] = []
    for depth, labels in enumerate(above):
        levels.append({f"L{depth}-{label}": [f"c{c}" for c in range(count) if labels[c] == label] for label in sorted(set(labels))})
    return Toy(torch.arange(count).repeat(samples)), levels


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_hierarchy_gives_every_sample_once_with_the_label_of_its_level(data: st.DataObject) -> None:
    top = data.draw(st.integers(1, 3))
    middle = data.draw(st.lists(st.integers(0, top - 1), min_size=1, max_size=5))
    bottom = data.draw(st.lists(st.integers(0, len(middle) - 1), min_size=1, max_size=8))
    parents = [middle, bottom] if data.draw(st.booleans()) else [bottom]
    samples = data.draw(st.integers(len(parents) + 1, 8))
    source, levels = tree(parents, samples)
    names = [[next(name for name, members in level.items() if f"c{c}" in members) for c in range(len(bottom))] for level in levels]
    names.append([f"c{c}" for c in range(len(bottom))])
    counts = [data.draw(st.integers(1, len(set(row)))) for row in names]
    dual, validation = data.draw(st.booleans()), data.draw(st.sampled_from([0.0, 0.25]))
    scenario = opened(Hierarchical, source, data.draw(st.integers(0, 99)), levels=levels, tasks=counts, dual=dual, validation=validation)
    tasks = list(scenario)

    everything = [number for task in tasks for number in ids(task.train, task.validation)]
    assert sorted(everything) == list(range(len(bottom) * samples)), "each sample once over all levels"
    assert [task.level - 1 for task in tasks] == [level for level, count in enumerate(counts) for _ in range(count)]
    assert [c for task in tasks for c in task.classes] == list(range(len(scenario.info.class_names)))
    final = tasks[-1]
    shares: dict[tuple[int, int], int] = {}
    for task in tasks:
        own = [c for earlier in tasks[: task.index + 1] for c in earlier.classes if earlier.level == task.level]
        for dataset in (task.train, task.validation):
            if dataset is None or not len(dataset):
                continue
            batch = read(dataset)
            assert batch.target is not None and set(batch.target.tolist()) <= set(task.classes)
            for place, (number, row) in enumerate(zip(batch.target.tolist(), batch.ids.tolist(), strict=True)):
                c = int(source.train[row])
                assert task.names[number] == names[task.level - 1][c]
                shares[c, task.level - 1] = shares.get((c, task.level - 1), 0) + 1
                if dual:
                    told = batch.extra["parents"][place].tolist()
                    assert [task.names[p] for p in told[: task.level - 1]] == [names[level][c] for level in range(task.level - 1)]
                    assert told[task.level - 1 :] == [-1] * (len(levels) - task.level + 1)
            assert dual == ("parents" in batch.extra)
        for child in task.classes:
            if task.level > 1:
                members = next(c for c in range(len(bottom)) if names[task.level - 1][c] == task.names[child])
                assert task.names[task.parents[child]] == names[task.level - 2][members]
            else:
                assert child not in task.parents or task.parents[child] == -1
        assert set(task.parents) <= set(task.seen), "nothing is told of labels that have not arrived"
        test = scenario.test(task, task)
        batch = read(test)
        assert getattr(test, "among", None) == tuple(own) and "parents" not in batch.extra
        assert set(getattr(scenario.test(task, final), "among", ())) == {c for t in tasks if t.level == task.level for c in t.classes}
        assert batch.target is not None
        for number, row in zip(batch.target.tolist(), batch.ids.tolist(), strict=True):
            assert final.names[number] == names[task.level - 1][int(source.tested[row - len(source.train)])]
    for level in range(len(names)):
        tested = [row for task in tasks if task.level == level + 1 for row in ids(scenario.test(task, final))]
        assert sorted(tested) == list(range(len(source.train), 2 * len(source.train))), "every test sample once per level"
    for c in range(len(bottom)):
        mine = [shares.get((c, level), 0) for level in range(len(names))]
        assert sum(mine) == samples and max(mine) - min(mine) <= 1, "equal shares of every class"


def test_the_children_of_one_parent_arrive_together_where_there_are_parents_enough() -> None:
    source, levels = tree([[0, 0, 1, 1, 2, 2]], 4)
    for seed in range(5):
        tasks = list(opened(Hierarchical, source, seed, levels=levels, tasks=[1, 3]))
        for task in tasks[1:]:
            assert len(task.classes) == 2 and len({task.parents[c] for c in task.classes}) == 1
        apart = list(opened(Hierarchical, source, seed, levels=levels, tasks=[2, 6]))
        assert [len(task.classes) for task in apart] == [2, 1, 1, 1, 1, 1, 1, 1]


def test_levels_may_be_groupings_of_the_source_and_a_stream_read_once() -> None:
    kinds = torch.tensor([0, 1, 0, 1])
    source = Toy(torch.arange(4).repeat(4), groupings={"kind": Grouping(["even", "odd"], kinds.repeat(4))})
    coarse, fine = opened(Hierarchical, source, levels=["kind"], online=True)
    assert set(coarse.names.values()) == {"even", "odd"} and fine.level == 2
    assert {fine.names[c]: fine.names[p] for c, p in fine.parents.items() if p >= 0} == {
        "c0": "even",
        "c1": "odd",
        "c2": "even",
        "c3": "odd",
    }
    assert len(read(fine.train)) == 8
    with pytest.raises(DataError, match="single-pass"):
        read(fine.train)


GROUPED = {"kind": Grouping(["even", "odd"], torch.tensor([0, 1, 1] * 4)), "mixed": Grouping(["a", "b"], torch.tensor([0, 1, 1, 1] * 3))}
EVEN_ODD: dict[str, list[str | int]] = {"even": ["c0", "c2"], "odd": ["c1"]}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"levels": []}, ConfigError, "levels is empty"),
        ({"levels": ["kind"], "tasks": [1]}, ConfigError, "tasks has 1 entries for 2 levels"),
        ({"levels": ["kint"]}, ConfigError, "'kint', which is no grouping of this source: did you mean 'kind'"),
        ({"levels": ["zzz"]}, ConfigError, "no grouping of this source: it has kind, mixed"),
        ({"levels": ["mixed"]}, DataError, "samples of class 'c0' lie in several groups of 'mixed'"),
        ({"levels": [{"even": ["c0"], "odd": ["c1"]}]}, ConfigError, "levels.0 leaves out c2"),
        ({"levels": [{"even": ["c0", "c2"], "odd": ["c1", "c2"]}]}, ConfigError, "levels.0 lists class 'c2' twice"),
        ({"levels": [{"even": ["c0", "c2", "c9"], "odd": ["c1"]}]}, ConfigError, "levels.0 names an unknown class 'c9'"),
        ({"levels": [{**EVEN_ODD, "none": []}]}, ConfigError, "levels.0: 'none' lists no class"),
        (
            {"levels": [EVEN_ODD, {"x": ["c0", "c1"], "y": ["c2"]}]},
            ConfigError,
            "'x' lies under 'even' and under 'odd': each label has one",
        ),
        ({"levels": [EVEN_ODD], "tasks": [3, 1]}, ConfigError, "level 1 has 2 labels and tasks asks for 3"),
        (
            {"levels": [EVEN_ODD, EVEN_ODD, EVEN_ODD, EVEN_ODD]},
            DataError,
            r"needs 5 training samples, .* fewer of c0 \(4\), c1 \(4\), c2 \(4\)",
        ),
    ],
)
def test_hierarchical_refuses_what_cannot_be(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        opened(Hierarchical, Toy([0, 1, 2] * 4, groupings=GROUPED), **options)


def test_hierarchical_needs_a_test_set_and_one_class_per_sample() -> None:
    with pytest.raises(ConfigError, match="the source has no test set"):
        opened(Hierarchical, Toy([0, 1, 2], test=[]), levels=[EVEN_ODD])
    with pytest.raises(ConfigError, match="one class per sample"):
        opened(Hierarchical, Toy([[1, 0]], target="labels"), levels=[EVEN_ODD])


def test_the_levels_of_different_seeds_have_orders_of_their_own() -> None:
    # 20 labels in 20 singletons above: the order in which a level's labels arrive is its permutation.
    levels: list[str | dict[str, list[str | int]]] = [{f"p{number:02}": [f"c{number}"] for number in range(20)}]
    source = Toy(torch.arange(20).repeat(2))

    def orders(seed: int) -> tuple[list[str], list[str]]:
        flat = opened(Hierarchical, source, seed, levels=[{"all": [f"c{number}" for number in range(20)]}])
        above = opened(Hierarchical, source, seed, levels=levels)
        return [name[1:].lstrip("0") or "0" for name in above.info.class_names[:20]], [name[1:] for name in flat.info.class_names[1:]]

    for seed in range(5):
        first, second = orders(seed)
        assert first == [str(number) for number in np.random.RandomState(seed).permutation(20)], "the published order at the first level"
        assert second != orders(seed + 1)[0] and second != first
        assert second == [str(n) for n in np.random.RandomState(derived(seed, "level", 1) % 2**32).permutation(20)]


def test_a_hierarchical_stream_is_repeatable() -> None:
    def make(seed: int, workers: int | None) -> Scenario:
        source = Toy(TARGETS, workers=workers)
        levels = [{"a": ["c0", "c1", "c2"], "b": ["c3", "c4", "c5"]}]
        return opened(Hierarchical, source, seed, levels=levels, tasks=[1, 2], dual=True, validation=0.2)

    assert_repeatable(make)


# -- domain_incremental


DOMAINS = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0])


def spoken(**changes: Any) -> Toy:
    grouping = Grouping(["ann", "bob", "cem"], DOMAINS, torch.tensor([0, 1, 2, 2]))
    options: dict[str, Any] = {"groupings": {"speaker": grouping}, **changes}
    return Toy([0, 1] * 4, test=[0, 1, 0, 1], **options)


@pytest.mark.parametrize(
    ("order", "names"), [("given", ["ann", "bob", "cem"]), (["cem", "ann", "bob"], ["cem", "ann", "bob"]), ("seed", None)]
)
def test_the_groups_of_a_source_arrive_as_domains(order: Any, names: list[str] | None) -> None:
    scenario = opened(DomainIncremental, spoken(), 5, by="speaker", order=order)
    tasks = list(scenario)
    if names is None:
        assert sorted(task.domain for task in tasks) == ["ann", "bob", "cem"]
    else:
        assert [task.domain for task in tasks] == names
    for task in tasks:
        group = ["ann", "bob", "cem"].index(task.domain)
        assert ids(task.train) == DOMAINS.eq(group).nonzero().squeeze(1).tolist()
        assert ids(scenario.test(task, task)) == [[8], [9], [10, 11]][group]
        assert task.classes == ((0, 1) if task.index == 0 else ()) and task.seen == (0, 1)
    assert scenario.info.classes == 2 and scenario.info.metrics == ("accuracy",)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["ann", "bob"], "order lacks cem: it must list every domain once"),
        (["ann", "bob", "ann", "cem"], "order names domain 'ann' twice: every domain arrives once"),
        (["ann", "bob", "zoe"], "order names an unknown domain 'zoe': there are ann, bob, cem"),
    ],
)
def test_an_order_of_domains_is_said_to_be_one_of_domains(order: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(DomainIncremental, spoken(), by="speaker", order=order)


def test_a_domain_without_training_samples_is_left_out_and_its_test_samples_are_counted() -> None:
    grouping = Grouping(["ann", "bob", "cem"], torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 1, 2]))
    scenario = opened(DomainIncremental, Toy([0, 1] * 2, groupings={"speaker": grouping}, problems={"unreadable": 1}), by="speaker")
    assert [task.domain for task in scenario] == ["ann", "cem"]
    assert scenario.problems == {"unreadable": 1, "test samples in a group of 'speaker' without training samples": 2}
    assert opened(DomainIncremental, spoken(), by="speaker").problems == {}


def pictures(**changes: Any) -> Toy:
    return Toy([0, 1, 2] * 4, test=[0, 1, 2], modalities=("image", "vector"), **changes)


def test_turned_pictures_are_the_same_samples_under_ids_of_their_own() -> None:
    scenario = opened(DomainIncremental, pictures(), shift="rotate", angles=[0.0, 90.0, 180.0])
    tasks = list(scenario)
    plain = read(tasks[0].train)
    assert ids(tasks[0].train) == list(range(12)) and ids(scenario.test(tasks[0], tasks[0])) == [12, 13, 14]
    everything = [n for task in tasks for n in ids(task.train, scenario.test(task, task))]
    assert len(everything) == len(set(everything)) == 45
    image = plain.inputs["image"]
    assert isinstance(image, Tensor)
    for task, quarters in zip(tasks, range(3), strict=True):
        batch = read(task.train)
        turned_image = batch.inputs["image"]
        assert isinstance(turned_image, Tensor) and turned_image.dtype == torch.uint8
        assert (turned_image.int() - torch.rot90(image, quarters, (-2, -1)).int()).abs().max() <= 1, "anticlockwise"
        assert torch.equal(batch.inputs["vector"], plain.inputs["vector"])  # type: ignore[arg-type]
        assert batch.target is not None and batch.target.tolist() == [0, 1, 2] * 4
        assert batch.ids.tolist() == ids(task.train), "what is read carries the ids that are told"
    assert [task.domain for task in tasks] == ["0 degrees", "90 degrees", "180 degrees"]
    assert [task.domain for task in opened(DomainIncremental, pictures(), shift="rotate", tasks=4)] == [
        "0 degrees",
        "45 degrees",
        "90 degrees",
        "135 degrees",
    ]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 99))
def test_turning_works_about_the_centre_of_any_picture(height: int, width: int, seed: int) -> None:
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(turned(image, 180), image.flip(-1, -2), atol=1e-4)
    assert torch.allclose(turned(image, 360), image, atol=1e-4)
    square = image[..., : min(height, width), : min(height, width)]
    assert torch.allclose(turned(square, 90), torch.rot90(square, 1, (-2, -1)), atol=1e-4)
    assert torch.allclose(turned(square, -90), torch.rot90(square, -1, (-2, -1)), atol=1e-4)


@pytest.mark.parametrize("modality", ["image", "vector"])
def test_a_permutation_moves_all_pixels_of_all_samples_alike(modality: str) -> None:
    values = torch.arange(60).view(5, 12)
    source = Toy([0, 1, 0, 1, 0], test=[0, 1], modalities=("image", "vector"))
    scenario = opened(DomainIncremental, source, 3, shift="permute", tasks=3, modality=modality)
    tasks = list(scenario)
    plain, plain_test = read(tasks[0].train).inputs[modality], read(scenario.test(tasks[0], tasks[0])).inputs[modality]
    assert isinstance(plain, Tensor) and isinstance(plain_test, Tensor) and len(values) == len(plain)
    orders = []
    for task in tasks:
        shifted = read(task.train).inputs[modality]
        tested = read(scenario.test(task, task)).inputs[modality]
        assert isinstance(shifted, Tensor) and isinstance(tested, Tensor)
        first = plain[0].flatten().tolist()
        order = [first.index(value) for value in shifted[0].flatten().tolist()]  # the toy's pixels all differ
        assert sorted(order) == list(range(len(order)))
        assert torch.equal(shifted.flatten(1), plain.flatten(1)[:, order]) and torch.equal(
            tested.flatten(1), plain_test.flatten(1)[:, order]
        )
        orders.append(order)
    assert orders[0] == sorted(orders[0]) and tasks[0].domain == "as it is"
    if modality == "image":
        assert orders[1] != orders[0] and orders[2] not in (orders[0], orders[1])


class Pictures(Source):
    """Pictures whose masks are the pictures themselves, to within their scale, with boxes beside them."""

    def __init__(self, height: int = 6, width: int = 6, mask: tuple[int, int] | None = None, target: str = "mask") -> None:
        self.height, self.width, self.mask, self.target = height, width, mask or (height, width), target

    def load(self) -> SourceData:
        ink = torch.randint(0, 5, (9, *self.mask), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        targets = {"mask": ink, "value": torch.arange(9) / 8, "labels": torch.eye(9, 5, dtype=torch.int8)}[self.target]
        image = (ink * 50)[:, None] if self.mask == (self.height, self.width) else torch.zeros(9, 1, self.height, self.width).byte()
        told: dict[str, Any] = {"boxes": torch.zeros(9, 4), "box_labels": torch.zeros(9, 1), "choices": ["a"] * 9}
        train, test = (
            ArrayDataset({"image": image[rows]}, targets[rows], rows, extra={name: column[: len(rows)] for name, column in told.items()})
            for rows in (torch.arange(6), torch.arange(6, 9))
        )
        modalities = {"image": Modality("image", (1, self.height, self.width), 255)}
        return SourceData(train, test, [f"c{number}" for number in range(5)], modalities, target=self.target)


@pytest.mark.parametrize("options", [{"shift": "permute", "tasks": 3}, {"shift": "rotate", "angles": [0.0, 90.0, 180.0, -90.0]}], ids=str)
def test_masks_move_with_their_pictures_and_boxes_are_left_out(options: dict[str, Any]) -> None:
    scenario = opened(DomainIncremental, Pictures(), 2, validation=0.34, **options)
    for task in scenario:
        for dataset in (task.train, task.validation, scenario.test(task, task)):
            batch = read(dataset, 2)
            image, mask = batch.inputs["image"], batch.target
            assert isinstance(image, Tensor) and mask is not None and mask.dtype == torch.uint8
            assert (image[:, 0].int() - mask.int() * 50).abs().max() <= 1
            assert dataset is not None and torch.equal(dataset.targets, mask), "what is told is what is read"
            assert batch.extra.keys() == {"choices"}


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.sampled_from([45.0, 90.0, 30.0]), st.integers(0, 99))
def test_a_turned_mask_says_nothing_of_what_comes_from_outside(height: int, width: int, angle: float, seed: int) -> None:
    masks = torch.randint(0, 256, (2, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    moved = turned_masks(masks, angle)
    inside = turned(torch.ones(1, 1, height, width), angle)[0, 0]
    assert (moved[:, inside < 1e-4] == 255).all()
    for before, after in zip(masks, moved, strict=True):
        assert set(after[after != 255].tolist()) <= set(before.flatten().tolist()), "no class between two classes"
    assert torch.equal(turned_masks(masks, 180), masks.flip(-1, -2)) and torch.equal(turned_masks(masks, 360), masks)


def test_values_and_labels_stay_what_they_are_when_pictures_move() -> None:
    for target in ("value", "labels"):
        scenario = opened(DomainIncremental, Pictures(target=target), shift="rotate", tasks=3)
        first, *others = [read(task.train).target for task in scenario]
        assert first is not None and all(other is not None and torch.equal(first, other) for other in others)


def test_masks_of_another_size_cannot_move_with_their_pictures() -> None:
    with pytest.raises(ConfigError, match="image is of 6 x 6 pixels and its masks are of 3 x 3: shift moves both alike"):
        opened(DomainIncremental, Pictures(mask=(3, 3)), shift="permute", tasks=2)


def test_the_labels_of_a_domain_are_the_classes_that_occur_in_it() -> None:
    grouping = Grouping(["a", "b"], torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    first, second = opened(DomainIncremental, Toy([0, 1, 1, 2], groupings={"g": grouping}), by="g")
    assert (first.labels, second.labels) == ((0, 1), (1, 2))
    assert (first.classes, second.classes) == ((0, 1, 2), ()) and first.seen == second.seen == (0, 1, 2)


def test_domains_hold_no_masks_of_their_own() -> None:
    scenario = opened(DomainIncremental, Pictures(), shift="rotate", tasks=20)
    tasks = list(scenario)
    gc.collect()
    whole = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.shape == (6, 6, 6)]
    assert len(tasks) == 20 and len(whole) == 1


def test_parts_divide_the_samples_among_the_domains() -> None:
    scenario = opened(DomainIncremental, pictures(), shift="rotate", tasks=4, share="parts", validation=0.34)
    tasks = list(scenario)
    assert sorted(n for task in tasks for n in ids(task.train, task.validation)) == list(range(12))
    assert sorted(n for task in tasks for n in ids(scenario.test(task, task))) == [12, 13, 14]
    assert [len(ids(task.train, task.validation)) for task in tasks] == [3] * 4


def test_what_is_held_back_for_validation_is_trained_on_in_no_domain() -> None:
    tasks = list(opened(DomainIncremental, pictures(), shift="permute", tasks=3, validation=0.25))

    def samples(dataset: Any) -> set[float]:
        values = read(dataset).inputs["vector"]
        assert isinstance(values, Tensor)
        return set(values[:, 0].tolist())

    trained = set().union(*(samples(task.train) for task in tasks))
    held = set().union(*(samples(task.validation) for task in tasks))
    assert len(held) == 3 and len(trained) == 9 and not held & trained


def test_a_domain_stream_of_values_and_of_masks_keeps_its_targets_and_its_metrics() -> None:
    grouping = {"speaker": Grouping(["a", "b"], torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 0, 1]))}
    values = opened(DomainIncremental, Toy([0.5, 1.0, -1.0, 2.0], target="value", groupings=grouping), by="speaker", validation=0.5)
    assert values.info.metrics == ("mae", "rmse", "correlation") and values.info.class_names == ("c0",)
    first, second = values
    held = {number for task in (first, second) for number in ids(task.validation)}
    assert {number for task in (first, second) for number in ids(task.train)} == set(range(4)) - held and len(held) == 2
    assert read(second.train).target is not None and set(read(second.train).target.tolist()) <= {1.0, 2.0}  # type: ignore[union-attr]
    masks = opened(DomainIncremental, Toy(torch.full((4, 2, 2), 255), target="mask", names=["cat"], groupings=grouping), by="speaker")
    assert masks.info.metrics == ("miou", "pixel_accuracy") and read(masks.task(0).train).target.shape == (2, 2, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("source", "options", "kind", "message"),
    [
        (spoken(), {}, ConfigError, "give either by .* or shift"),
        (spoken(), {"by": "speaker", "shift": "rotate"}, ConfigError, "give either by .* or shift"),
        (spoken(), {"by": "speaker", "tasks": 2}, ConfigError, "belong to shift; with by the domains are the groups of 'speaker'"),
        (pictures(), {"shift": "permute"}, ConfigError, "shift: permute needs tasks"),
        (pictures(), {"shift": "permute", "tasks": 2, "angles": [1.0]}, ConfigError, "takes no angles"),
        (pictures(), {"shift": "permute", "tasks": 2, "angles": []}, ConfigError, "angles is empty"),
        (pictures(), {"shift": "rotate"}, ConfigError, "needs either tasks .* or angles"),
        (pictures(), {"shift": "rotate", "tasks": 2, "angles": [0.0]}, ConfigError, "needs either tasks .* or angles"),
        (pictures(), {"shift": "rotate", "angles": []}, ConfigError, "angles is empty"),
        (pictures(), {"shift": "rotate", "tasks": 2, "order": "seed"}, ConfigError, "order is that of the groups"),
        (spoken(), {"by": "speakr"}, ConfigError, "no grouping of this source: did you mean 'speaker'"),
        (pictures(), {"by": "speaker"}, ConfigError, "no grouping of this source: it has none"),
        (spoken(), {"by": "speaker", "order": ["ann"]}, ConfigError, "order lacks bob, cem"),
        (Toy([0, 1]), {"shift": "rotate", "tasks": 2}, ConfigError, "changes images, and the source has none that fits"),
        (pictures(), {"shift": "rotate", "tasks": 2, "modality": "vector"}, ConfigError, "the source has image: set modality"),
        (pictures(), {"shift": "rotate", "tasks": 13, "share": "parts"}, ConfigError, "13 domains are asked for and there are 12"),
        (Toy([0, 1], test=[]), {"by": "speaker"}, ConfigError, "the source has no test set"),
        (
            Toy([0, 1], groupings={"speaker": Grouping(["a", "b"], torch.tensor([0, 0]), torch.tensor([1, 1]))}),
            {"by": "speaker"},
            DataError,
            "no test sample lies in a group of 'speaker' that has training samples",
        ),
        (
            Toy([0, 1], groupings={"speaker": Grouping(["a"], torch.tensor([0, 0]))}),
            {"by": "speaker"},
            DataError,
            "no test sample lies in a group of 'speaker'",
        ),
    ],
)
def test_domain_incremental_refuses_what_cannot_be(source: Toy, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        opened(DomainIncremental, source, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"shift": "permute", "tasks": 3, "validation": 0.25, "task_ids": True},
        {"shift": "rotate", "tasks": 2, "share": "parts"},
        {"by": "speaker", "order": "seed", "online": True},
    ],
    ids=["permuted", "turned", "grouped"],
)
def test_a_domain_stream_is_repeatable(options: dict[str, Any]) -> None:
    def make(seed: int, workers: int | None) -> Scenario:
        grouping = Grouping([f"s{number}" for number in range(6)], torch.arange(12) % 6, torch.arange(3))
        return opened(DomainIncremental, pictures(workers=workers, groupings={"speaker": grouping}), seed, **options)

    assert_repeatable(make)


def test_a_told_domain_comes_with_every_batch() -> None:
    scenario = opened(DomainIncremental, spoken(), by="speaker", task_ids=True)
    for task in scenario:
        for dataset in (task.train, scenario.test(task, task)):
            told = read(dataset).task
            assert told is not None and set(told.tolist()) == {task.index}


def test_domains_that_share_no_class_are_refused() -> None:
    domain = torch.tensor([0, 0, 1, 1] * 3)
    source = Toy([0, 1, 2, 3] * 3, groupings={"domain": Grouping(["a", "b"], domain, domain)})
    with pytest.raises(ConfigError, match="no two groups of 'domain' share a class"):
        opened(DomainIncremental, source, by="domain")
