"""The class-incremental scenario: what arrives when, that nothing is lost or seen twice, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.scenarios.class_incremental import ClassIncremental
from streamcl.scenarios.sources.digits import Digits

from streamcl.data import ArrayDataset
from streamcl.errors import ConfigError, DataError
from streamcl.stream import Modality, Source, SourceData


class Toy(Source):
    """Samples whose only feature is their class as the source numbers it."""

    def __init__(self, train, test=None, classes=None, target="class", names=None):
        self.train, self.test_targets, self.target = train, test, target
        count = classes or (max(train) + 1 if train else 0)
        self.names = names or [f"c{number}" for number in range(count)]

    def load(self):
        def dataset(targets, first):
            return ArrayDataset(
                {"vector": torch.tensor(targets, dtype=torch.float32)[:, None]}, torch.tensor(targets), first + torch.arange(len(targets))
            )

        test = self.test_targets if self.test_targets is not None else sorted(set(self.train))
        return SourceData(
            dataset(self.train, 0),
            dataset(test, len(self.train)) if test else None,
            self.names,
            {"vector": Modality("vector", (1,))},
            target=self.target,
            licence="CC0",
        )


def opened(source, seed=0, **options):
    scenario = ClassIncremental(data=source, **options)
    scenario.open(seed)
    return scenario


def ids(*datasets):
    return [number for dataset in datasets if dataset is not None for number in dataset.ids.tolist()]


def own_names(scenario, dataset, task):
    """The own name of each sample's class, by the renumbered target and by the feature; both must agree."""
    batch = dataset[torch.arange(len(dataset))]
    names = [task.names[number] for number in batch.target.tolist()]
    assert names == [f"c{int(value)}" for value in batch.inputs["vector"][:, 0].tolist()]
    assert torch.equal(batch.target, dataset.targets)
    return set(names)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_sample_appears_once_and_every_class_arrives_once(data):
    classes = data.draw(st.integers(1, 7))
    extra = data.draw(st.lists(st.integers(0, classes - 1), max_size=40))
    targets = data.draw(st.permutations([*range(classes), *extra]))
    repeat, validation = data.draw(st.sampled_from([0.0, 0.3, 1.0])), data.draw(st.sampled_from([0.0, 0.25, 0.9]))
    division = data.draw(
        st.one_of(
            st.fixed_dictionaries({"tasks": st.integers(1, classes)}),
            st.fixed_dictionaries({"increment": st.integers(1, classes)}),
            st.fixed_dictionaries({"base": st.integers(1, classes), "increment": st.integers(1, classes)}),
        )
    )
    seed = data.draw(st.integers(0, 2**31))
    scenario = opened(Toy(targets), seed, repeat=repeat, validation=validation, **division)
    tasks = list(scenario)

    assert sorted(number for task in tasks for number in ids(task.train, task.validation)) == list(range(len(targets)))
    assert [number for task in tasks for number in task.classes] == list(range(classes))
    order = [f"c{number}" for number in np.random.RandomState(seed).permutation(classes)]
    assert list(scenario.info.class_names) == order
    for task in tasks:
        occurring = own_names(scenario, task.train, task) | (own_names(scenario, task.validation, task) if validation else set())
        assert {task.names[number] for number in task.labels} == occurring
        assert set(task.classes) <= set(task.train.targets.tolist()), "every new class has a training sample in its own task"
        assert task.seen == tuple(range(task.classes[-1] + 1)) and list(task.names.values()) == order[: len(task.seen)]
        if not repeat:
            assert set(task.labels) == set(task.classes)
        test = scenario.test(task, tasks[-1])
        assert own_names(scenario, test, task) == {order[number] for number in task.classes}
        assert min(ids(test)) >= len(targets)
    tested = [number for task in tasks for number in ids(scenario.test(task, task))]
    assert sorted(tested) == list(range(len(targets), len(targets) + classes))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 5), st.sampled_from([0.0, 0.4]))
def test_a_restored_stream_goes_on_as_the_first_one(seed, position, repeat):
    options = {"tasks": 5, "repeat": repeat, "validation": 0.2}
    source = Toy(np.random.RandomState(seed).randint(0, 10, 80).tolist() + list(range(10)))
    whole = [(task.name, ids(task.train), ids(task.validation)) for task in opened(source, seed, **options)]
    first = opened(source, seed, **options)
    for _ in zip(range(position), first, strict=False):
        pass
    saved = json.loads(json.dumps(first.state()))
    second = opened(source, seed, **options)
    second.restore(saved)
    assert [task.name for task in second.past()] == [name for name, _, _ in whole[:position]]
    assert [(task.name, ids(task.train), ids(task.validation)) for task in second] == whole[position:]


def test_seed_1993_gives_the_class_order_of_the_published_tables():
    scenario = opened(Toy(list(range(100))), seed=1993, tasks=10)
    assert scenario.task(0).name == "classes c68, c56, c78, c8, c23, c84, c90, c65, ... (10 classes)"
    assert list(scenario.info.class_names[:10]) == [f"c{number}" for number in (68, 56, 78, 8, 23, 84, 90, 65, 74, 76)]


@pytest.mark.parametrize(
    ("division", "sizes"),
    [
        ({"tasks": 5}, [2, 2, 2, 2, 2]),
        ({"tasks": 3}, [4, 3, 3]),
        ({"base": 4, "increment": 3}, [4, 3, 3]),
        ({"base": 5, "increment": 3}, [5, 3, 2]),
        ({"increment": 4}, [4, 4, 2]),
        ({"base": 10, "increment": 1}, [10]),
    ],
)
def test_classes_are_divided_as_asked(division, sizes):
    assert [len(task.classes) for task in opened(Toy(list(range(10))), **division)] == sizes


def test_explicit_lists_fix_the_tasks_and_leave_the_other_classes_out():
    scenario = opened(Toy([0, 1, 2, 3, 1], names=["0", "1", "2", "3"]), classes=[["3"], [1, 0]])
    first, second = scenario
    assert (first.name, second.name) == ("classes 3", "classes 1, 0")
    assert ids(first.train, second.train) == [3, 0, 1, 4]
    assert second.train.targets.tolist() == [2, 1, 1]
    assert scenario.info.classes == 3


def test_an_order_of_names_and_the_order_of_the_source_are_kept():
    assert opened(Toy([0, 1, 2]), tasks=3, order=["c2", "c0", "c1"]).info.class_names == ("c2", "c0", "c1")
    assert opened(Toy([0, 1, 2]), seed=5, tasks=3, order="given").info.class_names == ("c0", "c1", "c2")


def test_repeated_classes_are_dealt_out_evenly_over_the_later_tasks():
    # Ten samples of each of four classes, three of ten held back: the first class sends one to each of three later tasks, the second
    # one and two to its two, the third all three to the last, which keeps its own ten.
    scenario = opened(Toy(list(range(4)) * 10), tasks=4, order="given", repeat=0.3)
    counts = [torch.bincount(task.train.targets, minlength=4).tolist() for task in scenario]
    assert counts == [[7, 0, 0, 0], [1, 7, 0, 0], [1, 1, 7, 0], [1, 2, 3, 10]]
    assert scenario.task(2).classes == (2,) and scenario.task(2).labels == (0, 1, 2)


def test_validation_takes_its_share_of_every_class_in_its_task():
    scenario = opened(Toy(list(range(4)) * 20), tasks=2, validation=0.25)
    for task in scenario:
        assert torch.bincount(task.validation.targets).tolist()[-2:] == [5, 5]
        assert not set(ids(task.validation)) & set(ids(task.train))
    assert opened(Toy([0, 1]), tasks=2).task(0).validation is None


def test_a_class_with_one_sample_can_be_learned():
    scenario = opened(Toy([0, 1, 1, 1, 1]), tasks=2, repeat=0.5, validation=0.5, order="given")
    assert scenario.task(0).train.targets.tolist()[:1] == [0]


def test_an_online_stream_is_read_once():
    scenario = opened(Toy([0, 1] * 8), tasks=1, online=True)
    task = scenario.task(0)
    assert scenario.info.passes == 1
    assert sum(len(batch) for batch in task.train.batches(5, shuffle=True)) == 16
    with pytest.raises(DataError, match="single-pass"):
        next(iter(task.train.batches(5)))
    assert sum(len(batch) for batch in scenario.task(0).train.batches(5)) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing says how the classes are divided"),
        ({"tasks": 2, "increment": 2}, "tasks and increment contradict each other"),
        ({"tasks": 2, "base": 2}, "base belongs to increment, not to tasks"),
        ({"base": 2}, "nothing says how the classes are divided"),
        ({"classes": [["c0"]], "order": "given"}, "classes already says the order"),
        ({"tasks": 5}, "tasks is 5 and there are only 4 classes"),
        ({"base": 6, "increment": 1}, "base is 6 and there are only 4 classes"),
        ({"classes": [["c0"], ["c11"]]}, "unknown class 'c11': did you mean 'c1'"),
        ({"classes": [["c0"], []]}, "task 2 lists no class"),
        ({"classes": []}, "task 1 lists no class"),
        ({"classes": [["c0"], ["c0"]]}, "names class 'c0' twice"),
        ({"tasks": 2, "order": ["c0", "c1"]}, "order lacks c2, c3"),
        ({"tasks": 2, "order": ["c0", "c1", "c2", "c2"]}, "names class 'c2' twice"),
    ],
)
def test_what_cannot_be_is_refused_before_training(options, message):
    with pytest.raises(ConfigError, match=message):
        opened(Toy([0, 1, 2, 3]), **options)


def test_a_class_without_a_training_sample_is_refused_and_can_be_left_out():
    source = Toy([0, 2], test=[0, 1, 2], classes=3)
    with pytest.raises(DataError, match="no training sample of c1"):
        opened(source, tasks=1)
    scenario = opened(source, classes=[["c0"], ["c2"]])
    assert [ids(scenario.test(task, task)) for task in scenario] == [[2], [4]]


def test_a_source_without_a_test_set_is_told_how_to_get_one():
    with pytest.raises(ConfigError, match="test_fraction"):
        opened(Toy([0, 1], test=[]), tasks=1)


def test_a_task_whose_classes_have_no_test_sample_is_not_scored():
    scenario = opened(Toy([0, 1], test=[0]), tasks=2, order="given")
    first, second = scenario
    assert ids(scenario.test(first, second)) == [2]
    assert scenario.test(second, second) is None


def test_targets_other_than_one_class_per_sample_are_refused():
    with pytest.raises(ConfigError, match="one class per sample"):
        opened(Toy([0, 1], target="labels"), tasks=1)


def test_digits_arrive_with_all_their_images_and_their_licence():
    scenario = opened(Digits(), tasks=5)
    tasks = list(scenario)
    assert sum(len(task.train) + len(scenario.test(task, task)) for task in tasks) == 1797
    assert scenario.info.licence == "CC BY 4.0" and scenario.info.tasks == 5
    assert scenario.info.modalities["image"] == Modality("image", (1, 8, 8), 16)
    batch = tasks[0].train[torch.tensor([3, 0])]
    assert batch.inputs["image"].dtype == torch.uint8 and batch.inputs["image"].shape == (2, 1, 8, 8)
