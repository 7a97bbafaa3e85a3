"""Avalanche, both ways: its benchmarks as sources and streams, ours as its benchmarks, and what cannot be is told in one sentence."""

from __future__ import annotations

import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.scenarios.avalanche import Avalanche
from streamcl.scenarios.blurry import Blurry
from streamcl.scenarios.class_incremental import ClassIncremental
from streamcl.scenarios.domain_incremental import DomainIncremental
from streamcl.scenarios.sources.avalanche import Avalanche as AvalancheSource
from streamcl.scenarios.sources.avalanche import to_benchmark
from streamcl.scenarios.sources.digits import Digits
from test_docs import follow

from streamcl import running
from streamcl.data import ArrayDataset, FileDataset, whole
from streamcl.errors import ConfigError, DataError
from streamcl.plugins import find
from streamcl.stream import Modality, Scenario, Source, SourceData, StreamInfo, Task

pytest.importorskip("avalanche", reason="the extra streamcl[avalanche] is not installed")

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "avalanche.md"
MNIST_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def idx(path: Path, values: np.ndarray) -> None:
    """The form in which MNIST is published."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes())


def small_set(root: Path, name: str = "MNIST") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Thirty training and ten test pictures of 28 x 28, of every class equally many."""
    random, parts = np.random.RandomState(1), {}
    for part, count in (("train", 30), ("t10k", 10)):
        pixels, labels = random.randint(0, 256, (count, 28, 28)), random.permutation(np.arange(count) % 10)
        idx(root / name / "raw" / f"{part}-images-idx3-ubyte", pixels)
        idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", labels)
        parts[part] = (pixels, labels)
    return parts


def opened(benchmark: Any, seed: int = 0, **options: Any) -> Avalanche:
    scenario = Avalanche(benchmark=benchmark, **options)
    scenario.open(seed)
    return scenario


def written(folder: Path, body: str) -> str:
    """A file of a person's own with a function `make`, as `benchmark` names it."""
    file = folder / "mine.py"
    file.write_text(body, encoding="utf-8")
    return f"{file}:make"


def in_memory(train: list[list[int]], test: list[list[int]], labels: list[list[int]] | None = None) -> Any:
    """A benchmark whose samples are vectors: the stream (0 or 1), the place in it, and the class."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset, TaskLabels
    from torch.utils.data import TensorDataset

    def experiences(stream: int, parts: list[list[int]]) -> list[Any]:
        made, place = [], 0
        for number, classes in enumerate(parts):
            rows = [[float(stream), float(place + row), float(c)] for row, c in enumerate(classes)]
            place += len(classes)
            told = labels[number] if labels and stream == 0 else [0] * len(classes)
            attributes = [DataAttribute(classes, "targets"), TaskLabels(told)]
            data = TensorDataset(torch.tensor(rows).reshape(-1, 3), torch.tensor(classes, dtype=torch.int64))
            made.append(TaskAwareSupervisedClassificationDataset([data], data_attributes=attributes))
        return made

    return benchmark_from_datasets(train=experiences(0, train), test=experiences(1, test))


# Classic benchmarks -------------------------------------------------------------------------------------------------------------


def test_split_mnist_gives_every_picture_to_the_experience_of_its_class(tmp_path):
    parts = small_set(tmp_path)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    scenario = opened("SplitMNIST", arguments={"dataset_root": str(tmp_path), "fixed_class_order": order})
    assert len(scenario) == 5 and scenario.info.modalities == {"image": Modality("image", (1, 28, 28))}
    arrival = [c for start in range(0, 10, 2) for c in sorted(order[start : start + 2])]
    assert list(scenario.info.class_names) == [f"{c} - {MNIST_NAMES[c]}" for c in arrival]
    assert not scenario.info.task_ids
    for task in scenario:
        assert task.classes == (2 * task.index, 2 * task.index + 1) and task.seen == tuple(range(2 * task.index + 2))
        for part, dataset in (("train", task.train), ("t10k", scenario.test(task, task))):
            pixels, labels = parts[part]
            batch = whole(dataset)
            for number in task.classes:
                wanted = torch.from_numpy(pixels[labels == arrival[number]])[:, None].float() / 255
                assert torch.equal(batch.inputs["image"][batch.target == number], wanted)


def test_pictures_stay_bytes_and_grey_and_the_default_transforms_are_not_applied(tmp_path):
    pixels, labels = small_set(tmp_path, "FashionMNIST")["train"]
    arguments = {"dataset_root": str(tmp_path), "n_experiences": 1, "shuffle": False}
    data = AvalancheSource(benchmark="SplitFMNIST", arguments=arguments).load()
    assert data.modalities == {"image": Modality("image", (1, 28, 28), high=255)}
    assert data.class_names[0] == "T-shirt/top" and isinstance(data.train, ArrayDataset)
    batch = whole(data.train)
    for number in range(10):
        assert torch.equal(batch.inputs["image"][batch.target == number], torch.from_numpy(pixels[labels == number]).byte()[:, None])
    normalised = whole(AvalancheSource(benchmark="SplitFMNIST", arguments=arguments, transform_group="eval").load().train)
    expected = (batch.inputs["image"].float() / 255 - 0.2860) / 0.3530  # what Avalanche documents for this set
    torch.testing.assert_close(normalised.inputs["image"], expected)


def test_samples_read_by_worker_processes_are_those_read_at_once(tmp_path):
    small_set(tmp_path, "FashionMNIST")
    options = {"benchmark": "SplitFMNIST", "arguments": {"dataset_root": str(tmp_path), "n_experiences": 2}, "size": 14}
    at_once, later = opened(**options, decode="eager"), opened(**options, decode="lazy", workers=2)
    assert isinstance(later.task(0).train.dataset, FileDataset) and later.info.modalities["image"].shape == (1, 14, 14)
    for index in range(2):
        order = torch.randperm(15, generator=torch.Generator().manual_seed(index))
        pairs = zip(at_once.task(index).train.read(order, 4), later.task(index).train.read(order, 4), strict=True)
        assert all(torch.equal(a.inputs["image"], b.inputs["image"]) and torch.equal(a.target, b.target) for a, b in pairs)


def test_permutations_make_domains_that_hold_the_same_pixels_in_another_order(tmp_path):
    pixels, labels = small_set(tmp_path)["train"]
    scenario = opened("PermutedMNIST", arguments={"dataset_root": str(tmp_path), "n_experiences": 3, "seed": 4})
    permutations = np.random.RandomState(4)
    order = np.argsort(labels, kind="stable")  # a benchmark of new classes lists its samples class by class
    flat = torch.from_numpy(pixels[order]).float().reshape(30, 784) / 255
    for task in scenario:
        expected = flat[:, torch.from_numpy(permutations.permutation(784))]
        batch = whole(task.train)
        assert torch.equal(batch.inputs["image"].flatten(1), expected) and batch.target.tolist() == sorted(labels.tolist())
        assert task.domain == f"experience {task.index}"
        assert task.classes == (tuple(range(10)) if task.index == 0 else ()) and task.seen == tuple(range(10))
    ids = torch.cat([task.train.ids for task in scenario.past()])
    assert len(ids.unique()) == 90, "another picture is another sample"


@pytest.mark.parametrize("numbering", ["class_ids_from_zero_in_each_exp", "class_ids_from_zero_from_first_exp"])
def test_classes_that_are_counted_from_zero_keep_their_own_names(tmp_path, numbering):
    labels = small_set(tmp_path)["train"][1]
    arguments = {"dataset_root": str(tmp_path), "return_task_id": True, numbering: True}
    scenario = opened("SplitMNIST", seed=2, arguments=arguments)
    assert scenario.info.classes == 10 and scenario.info.task_ids
    assert sorted(scenario.info.class_names) == [f"{c} - {name}" for c, name in enumerate(MNIST_NAMES)]
    counts = np.bincount(labels)
    for task in scenario:
        batch = whole(task.train)
        assert batch.task.tolist() == [task.index] * len(batch) and batch.target.unique().tolist() == list(task.classes)
        for number in task.classes:
            assert int((batch.target == number).sum()) == counts[int(task.names[number][0])]


def test_chance_is_the_runs_seed_and_the_global_generators_stay_as_they_were(tmp_path):
    small_set(tmp_path)
    orders = []
    for seed in (0, 1, 0):
        torch.manual_seed(9)
        scenario = opened("SplitMNIST", seed, arguments={"dataset_root": str(tmp_path)})
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(9)))
        orders.append(scenario.info.class_names)
    assert orders[0] == orders[2] != orders[1]
    fixed = [opened("SplitMNIST", seed, arguments={"dataset_root": str(tmp_path), "seed": 5}).info.class_names for seed in (0, 1)]
    assert fixed[0] == fixed[1]


def test_the_experiences_of_a_source_are_a_grouping_that_other_kinds_can_use(tmp_path):
    small_set(tmp_path)
    arguments = {"dataset_root": str(tmp_path), "n_experiences": 3, "return_task_id": True}
    source = AvalancheSource(benchmark="RotatedMNIST", arguments=arguments)
    data = source.load()
    assert torch.equal(data.groupings["experience"].train, torch.arange(3).repeat_interleave(30))
    assert torch.equal(data.groupings["task_label"].test, torch.arange(3).repeat_interleave(10))
    assert data.about == {"benchmark": "RotatedMNIST"} and source.files() == [str(tmp_path)]
    domains = DomainIncremental(data=source, by="experience")
    domains.open(0)
    benchmark = opened("RotatedMNIST", arguments={**arguments, "seed": 0})
    for ours, theirs in zip(domains, benchmark, strict=True):
        assert torch.equal(whole(ours.train).inputs["image"], whole(theirs.train).inputs["image"])
    classes = ClassIncremental(data=source, tasks=5)
    classes.open(0)
    assert [len(task.train) for task in classes] == [18] * 5


# Benchmarks of one's own ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_stream_is_what_a_plain_model_of_it_says(data):
    experiences = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5)
    train, test = data.draw(experiences), data.draw(experiences)
    scenario = opened(in_memory(train, test), validation=data.draw(st.sampled_from([0.0, 0.5])))
    number: dict[int, int] = {}
    brings: list[list[int]] = []
    for part in train:
        brings.append([c for c in sorted(set(part)) if c not in number])
        number.update({c: len(number) + place for place, c in enumerate(brings[-1])})
    names = [str(c) for c in number]
    assert list(scenario.info.class_names) == names and len(scenario) == len(train)
    place = 0
    for index, task in enumerate(scenario):
        parts = [whole(part) for part in (task.train, task.validation) if part is not None and len(part)]
        rows = sorted(row for part in parts for row in part.inputs["vector"].tolist())
        assert rows == [[0.0, float(place + row), float(c)] for row, c in enumerate(train[index])]
        place += len(train[index])
        assert all(part.target.tolist() == [number[int(c)] for c in part.inputs["vector"][:, 2].tolist()] for part in parts)
        assert task.classes == tuple(number[c] for c in brings[index]) and task.labels == tuple(
            sorted(number[c] for c in set(train[index]))
        )
        assert task.names == dict(enumerate(names[: len(task.seen)])) and task.seen == tuple(range(len(task.seen)))

    flat = [(e, float(row), c) for row, (e, c) in enumerate((e, c) for e, part in enumerate(test) for c in part)]
    tasks = scenario.past()
    for after in tasks:
        arrived = {c for part in brings[: after.index + 1] for c in part}
        for task in tasks[: after.index + 1]:
            mine = [
                [1.0, row, float(c)]
                for e, row, c in flat
                if c in arrived and (e == task.index if len(test) == len(train) else c in brings[task.index])
            ]
            found = scenario.test(task, after)
            assert (whole(found).inputs["vector"].tolist() if found is not None else []) == mine
    untrained = sum(c not in number for _, _, c in flat)
    assert scenario.problems == ({"test sample whose class no experience trains": untrained} if untrained else {})


def test_task_labels_are_told_with_every_sample_even_where_they_differ_within_an_experience():
    scenario = opened(in_memory([[0, 1, 1], [0, 1]], [[0], [1]], labels=[[0, 0, 4], [4, 0]]))
    assert scenario.info.task_ids
    first, second = scenario
    assert whole(first.train).task.tolist() == [0, 0, 4]
    assert [batch.task.tolist() for batch in second.train.read(torch.tensor([1, 0]), 1)] == [[0], [4]]
    assert whole(scenario.test(first, first)).task.tolist() == [0]


def test_an_online_stream_has_an_experience_per_batch_and_one_test_set_per_class():
    from avalanche.benchmarks import CLScenario, split_online_stream

    base = in_memory([[0] * 7, [1] * 6], [[0, 0], [1, 1, 1]])
    online = split_online_stream(base.train_stream, experience_size=3, shuffle=False)
    scenario = opened(CLScenario([online, base.test_stream]), train="train_online", online=True)
    tasks = list(scenario)
    assert [len(task.train) for task in tasks] == [3, 3, 1, 3, 3] and scenario.info.passes == 1
    assert [task.classes for task in tasks] == [(0,), (), (), (1,), ()]
    tests = [scenario.test(task, tasks[-1]) for task in tasks]
    assert [None if test is None else len(test) for test in tests] == [2, None, None, 3, None]
    assert len(whole(tasks[0].train)) == 3
    with pytest.raises(DataError, match="single-pass"):
        whole(tasks[0].train)


def test_one_test_experience_for_all_is_the_test_set_of_the_tasks_by_their_classes():
    from avalanche.benchmarks import new_instances_benchmark

    source = in_memory([[0, 1] * 6], [[0, 1, 1]])
    instances = new_instances_benchmark(source.train_stream[0].dataset, source.test_stream[0].dataset, num_experiences=3, seed=0)
    scenario = opened(instances)
    tasks = list(scenario)
    assert len(tasks) == 3 and [len(task.train) for task in tasks] == [4, 4, 4]
    assert len(scenario.test(tasks[0], tasks[0])) == 3 and scenario.test(tasks[1], tasks[2]) is None


def test_coarse_labels_are_classes_of_their_own_and_not_those_of_the_set_below():
    from avalanche.benchmarks import nc_benchmark
    from torch.utils.data import TensorDataset

    fine = TensorDataset(torch.rand(8, 2), torch.arange(8) % 4)
    coarse = [TensorDataset(fine.tensors[0], fine.tensors[1] // 2)]
    scenario = opened(nc_benchmark(coarse, coarse, 1, task_labels=False, shuffle=False))
    assert scenario.info.class_names == ("0", "1")
    renamed = TensorDataset(torch.rand(4, 2), torch.tensor([5, 5, 9, 9]))
    scenario = opened(nc_benchmark(renamed, renamed, 2, False, shuffle=False, class_ids_from_zero_in_each_exp=True))
    assert scenario.info.class_names == ("5", "9") and [task.classes for task in scenario] == [(0,), (1,)]


OWN_FILE = """
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms import Lambda
from avalanche.benchmarks import nc_benchmark


def make(classes, seed):
    x = torch.arange(classes * 8.0).reshape(-1, 2)
    y = torch.arange(classes).repeat_interleave(4)
    data = TensorDataset(x, y)
    train, test = Lambda(lambda v: v + 1000), Lambda(lambda v: v / 2)
    return nc_benchmark(data, data, classes, False, shuffle=True, seed=seed, train_transform=train, eval_transform=test)
"""


def test_a_function_of_ones_own_is_read_as_its_test_transforms_leave_it_or_raw(tmp_path):
    name = written(tmp_path, OWN_FILE)
    data = AvalancheSource(benchmark=name, arguments={"classes": 3}).load()
    raw = AvalancheSource(benchmark=name, arguments={"classes": 3}, transform_group="raw").load()
    assert data.modalities == {"vector": Modality("vector", (2,))}
    for part, plain in ((data.train, raw.train), (data.test, raw.test)):
        values, bare = whole(part), whole(plain)
        assert sorted(bare.inputs["vector"].flatten().tolist()) == [float(value) for value in range(24)]
        assert torch.equal(values.inputs["vector"], bare.inputs["vector"] / 2) and torch.equal(values.target, bare.target)
    assert AvalancheSource(benchmark=name, arguments={"classes": 3}).files() == [str(tmp_path / "mine.py")]


def test_a_yaml_file_runs_a_benchmark_by_its_name(tmp_path):
    small_set(tmp_path / "data")
    settings = {
        "scenario": {"name": "avalanche:SplitMNIST", "arguments": {"dataset_root": str(tmp_path / "data"), "n_experiences": 2}},
        "strategy": {"name": "finetune", "epochs": 1, "batch": 8},
        "model": {"backbone": {"name": "mlp", "hidden": [8]}},
        "engine": {"device": "cpu", "threads": 1},
        "log": ["jsonl"],
    }
    first, second = (running.run(settings, out=tmp_path / name) for name in ("a", "b"))
    assert len(first["per_task"]) == 2 and first["matrix"] == second["matrix"]


# The other way --------------------------------------------------------------------------------------------------------------------

OURS: dict[str, Any] = {
    "class_incremental": lambda: ClassIncremental(data=Digits(), tasks=5),
    "task_incremental": lambda: ClassIncremental(data=Digits(), tasks=3, task_ids=True),
    "rotated": lambda: DomainIncremental(data=Digits(test_fraction=0.2), shift="rotate", tasks=3, share="parts"),
    "online": lambda: ClassIncremental(data=Digits(), tasks=5, repeat=0.2, online=True),
    "blurry": lambda: Blurry(data=Digits(), tasks=5),
}


@pytest.mark.parametrize("kind", OURS)
def test_there_and_back_again_is_the_same_stream(kind):
    ours = OURS[kind]()
    ours.open(3)
    tasks = [ours.task(index) for index in range(len(ours))]
    back = opened(to_benchmark(OURS[kind](), seed=3), seed=8)
    assert back.info.modalities == ours.info.modalities and back.info.class_names == ours.info.class_names
    assert back.info.licence == ours.info.licence and back.info.task_ids == ours.info.task_ids and len(back) == len(ours)
    for task, other in zip(tasks, back, strict=True):
        pairs = [(task.train, other.train), (ours.test(task, tasks[-1]), back.test(other, back.task(len(back) - 1)))]
        for a, b in ((whole(a), whole(b)) for a, b in pairs if a is not None or b is not None):
            assert torch.equal(a.inputs["image"], b.inputs["image"]) and torch.equal(a.target, b.target) and torch.equal(a.ids, b.ids)
            assert (a.task is None and b.task is None) or torch.equal(a.task, b.task)
        assert (other.classes, other.seen, other.labels) == (task.classes, task.seen, task.labels)


def test_experiences_say_what_avalanche_asks_them():
    scenario = ClassIncremental(data=Digits(), tasks=5, task_ids=True, validation=0.1)
    benchmark = to_benchmark(scenario, seed=1)
    assert scenario.position == 0, "the stream itself has not moved"
    assert set(benchmark.streams) == {"train", "test", "valid"}
    for index, (train, test, valid) in enumerate(zip(benchmark.train_stream, benchmark.test_stream, benchmark.valid_stream, strict=True)):
        task = scenario.task(index)
        for experience, ours in ((train, task.train), (test, scenario.test(task, task)), (valid, task.validation)):
            assert experience.classes_in_this_experience == set(task.classes) == {2 * index, 2 * index + 1}
            assert experience.classes_seen_so_far == set(task.seen) and experience.task_label == index
            x, y, t = experience.dataset[5]
            batch = ours[torch.tensor([5])]
            assert torch.equal(x, batch.inputs["image"][0] / 16) and (y, t) == (int(batch.target), index)
            assert list(experience.dataset.targets) == ours.targets.tolist()
    assert to_benchmark(ClassIncremental(data=Digits(), tasks=5), seed=1).train_stream[3].task_labels == [0]


def test_avalanches_naive_strategy_is_scored_on_our_test_samples():
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    scenario = ClassIncremental(data=Digits(), tasks=5)
    benchmark = to_benchmark(scenario, seed=0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    before = model[1].weight.clone()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=32,
        train_epochs=1,
        eval_mb_size=64,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True, experience=True), loggers=[]),
    )
    tasks = [scenario.task(index) for index in range(5)]
    for experience in benchmark.train_stream:
        strategy.train(experience, num_workers=0)
    assert not torch.equal(model[1].weight, before)
    told = strategy.eval(benchmark.test_stream, num_workers=0)
    right, count = 0, 0
    for task in tasks:
        batch = whole(scenario.test(task, tasks[-1]))
        hits = (model(batch.inputs["image"] / 16).argmax(dim=1) == batch.target).float()
        key = f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{task.index:03d}"
        assert told[key] == pytest.approx(float(hits.mean()), abs=1e-6)
        right, count = right + int(hits.sum()), count + len(hits)
    assert told["Top1_Acc_Stream/eval_phase/test_stream/Task000"] == pytest.approx(right / count, abs=1e-6)
    assert count == len(Digits().load().test)


class Two(Source):
    """Two modalities, one of which some samples lack, and words."""

    def __init__(self, names: tuple[str, ...], target: str = "class") -> None:
        self.names, self.target = names, target

    def load(self) -> SourceData:
        columns: dict[str, Any] = {"vector": torch.arange(8.0).reshape(4, 2), "sound": torch.ones(4, 3), "text": ["a", "b", "c", "d"]}
        kinds = {"vector": Modality("vector", (2,)), "sound": Modality("audio", (3,)), "text": Modality("text")}
        present = {"sound": torch.tensor([True, True, True, False])} if "sound" in self.names else None
        data = ArrayDataset({name: columns[name] for name in self.names}, torch.arange(4) % 2, present=present)
        return SourceData(data, data, ["a", "b"], {name: kinds[name] for name in self.names}, target=self.target)


class Served(Scenario):
    def open(self, seed: int) -> StreamInfo:
        return StreamInfo({"vector": Modality("vector", (2,))}, test_time=True)

    def task(self, index: int) -> Task:
        raise AssertionError

    def test(self, task: Task, after: Task) -> None:
        raise AssertionError


class Endless(Served):
    def open(self, seed: int) -> StreamInfo:
        return StreamInfo({"vector": Modality("vector", (2,))})


def test_one_of_several_modalities_is_chosen_and_a_missing_value_is_never_handed_over():
    scenario = ClassIncremental(data=Two(("vector", "sound")), tasks=1)
    benchmark = to_benchmark(scenario, modality="vector")
    assert benchmark.train_stream[0].dataset[3][0].tolist() == [6.0, 7.0]
    sounds = to_benchmark(scenario, modality="sound").train_stream[0].dataset
    assert sounds[0][0].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(DataError, match="sample 3 has no sound"):
        sounds[3]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (ClassIncremental(data=Two(("vector", "sound")), tasks=1), "set modality to one of vector, sound"),
        (ClassIncremental(data=Two(("text",)), tasks=1), "set modality to one of none"),
        (Served(), "an unlabelled stream that is served"),
        (Endless(), "does not know its end"),
    ],
)
def test_a_scenario_that_is_no_benchmark_is_refused(scenario, message):
    with pytest.raises(ConfigError, match=message):
        to_benchmark(scenario)


# What cannot be -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [
        ("SplitMNST", {}, "no classic benchmark 'SplitMNST': did you mean 'SplitMNIST'"),
        ("CLEARMetric", {}, "no classic benchmark"),
        ("SplitMNIST", {"n_experiences": 3}, "SplitMNIST refuses its arguments: .*cannot be divided"),
        ("SplitMNIST", {"experiences": 5}, "unexpected keyword argument 'experiences'; it takes n_experiences"),
        ("mine.py", {}, "name the function in the file"),
        (7, {}, "a name .SplitMNIST., my_file.py:function or a benchmark is needed"),
    ],
)
def test_a_benchmark_that_cannot_be_made_is_told(tmp_path, benchmark, arguments, message):
    small_set(tmp_path)
    if benchmark == "SplitMNIST":
        arguments = {**arguments, "dataset_root": str(tmp_path)}
    with pytest.raises(ConfigError, match=message) as caught:
        opened(benchmark, arguments=arguments)
    assert "\n" not in str(caught.value)


def test_data_that_is_neither_there_nor_to_be_had_is_told_in_one_sentence(tmp_path, monkeypatch, capsys):
    from urllib.error import URLError

    def refused(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refused)
    with pytest.raises(DataError, match=r"SplitMNIST could not get its data: .*no network.*arguments: \{dataset_root: FOLDER\}") as caught:
        opened("SplitMNIST", arguments={"dataset_root": str(tmp_path)})
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def makes():\n    pass\n", "there is no function 'make': did you mean 'makes'"),
        ("def make():\n    return 3\n", "returns int: a benchmark of Avalanche is needed"),
        ("def make():\n    return 1 / 0\n", r"mine.py:2: ZeroDivisionError"),
        ("1 / 0\n", r"mine.py:1: ZeroDivisionError"),
        ("def make(:\n", "SyntaxError"),
    ],
)
def test_a_file_of_ones_own_that_is_wrong_is_told_with_its_line(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        opened(written(tmp_path, body))


def test_samples_that_do_not_fit_together_are_told_with_their_place(tmp_path):
    from avalanche.benchmarks import nc_benchmark
    from PIL import Image

    class Mixed(torch.utils.data.Dataset):
        def __init__(self, samples: list[Any], targets: Any = None) -> None:
            self.samples, self.targets = samples, list(range(len(samples))) if targets is None else targets

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> Any:
            if isinstance(self.samples[index], Exception):
                raise self.samples[index]
            return self.samples[index], self.targets[index]

    def told(*samples: Any, **options: Any) -> str:
        data = Mixed(list(samples))
        with pytest.raises((DataError, ConfigError)) as caught:
            opened(nc_benchmark(data, data, 1, False, shuffle=False), **options)
        return str(caught.value)

    grey, colour = Image.new("L", (4, 4)), Image.new("RGB", (4, 4))
    assert "sample 1 is float32 of (3,), and the first sample is float32 of (2,)" in told(torch.ones(2), torch.ones(3))
    assert "sample 1 is a picture: every sample must be a picture, or every one a tensor" in told(torch.ones(2), grey)
    assert "sample 1 is a Tensor, and the first sample is a picture" in told(grey, torch.ones(2))
    assert "experience 0, sample 1: this image is 5 x 4 and the others are 4 x 4: give `size`" in told(colour, colour.resize((5, 4)))
    assert "has the shape (2, 2)" in told(torch.ones(2, 2), torch.ones(2, 2))
    assert "sample 1 cannot be read: OSError: broken" in told(torch.ones(2), OSError("broken"))
    assert "size scales pictures" in told(torch.ones(1, 4, 4), torch.ones(1, 4, 4), size=8)
    many = [grey] * 39 + [colour, grey]
    assert "sample 39 is in colour and the others are grey" in told(*many)
    mixed = nc_benchmark(*[Mixed([grey, colour])] * 2, 1, False, shuffle=False)
    assert opened(mixed).info.modalities["image"].shape == (3, 4, 4), "a set with a picture in colour is in colour"
    with pytest.raises(DataError, match="do not say one class per sample"):
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.benchmarks.utils import AvalancheDataset

        opened(benchmark_from_datasets(train=[AvalancheDataset([Mixed([grey])])], test=[]))


def test_a_missing_extra_is_one_sentence_with_the_command(monkeypatch):
    for name in [name for name in sys.modules if name == "avalanche" or name.startswith("avalanche.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without(), *sys.meta_path])
    for attempt in (lambda: opened("SplitMNIST"), lambda: to_benchmark(ClassIncremental(data=Digits(), tasks=2))):
        with pytest.raises(ConfigError, match=r"which is not installed: pip install 'streamcl\[avalanche\]'"):
            attempt()


class _Without:
    """An importer by which Avalanche is not installed."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == "avalanche":
            raise ModuleNotFoundError(f"No module named {name!r}", name="avalanche")


def test_a_stream_that_the_benchmark_lacks_is_told_and_one_without_a_test_stream_is_not_scored():
    benchmark = in_memory([[0, 1]], [[0]])
    with pytest.raises(ConfigError, match="train: CLScenario has no stream 'trains': did you mean 'train'"):
        opened(benchmark, train="trains")
    with pytest.raises(ConfigError, match="test: CLScenario has no stream 'valid'"):
        opened(benchmark, test="valid")
    for unscored in (opened(benchmark, test=None), opened(in_memory([[0, 1]], []))):
        task = unscored.task(0)
        assert unscored.test(task, task) is None and len(task.train) == 2


def test_the_guide_can_be_followed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in follow(GUIDE, tmp_path):
        assert command[:2] == ["streamcl", "run"]
        assert len(running.run(command[2], ["engine.device=cpu", "engine.threads=1"], out=tmp_path / "run")["per_task"]) == 2
    runpy.run_path("train_there.py", run_name="__main__")
    assert capsys.readouterr().out.count("classes [") == 5


def test_every_option_of_the_source_is_one_of_the_scenario_and_the_benchmark_comes_first():
    source, scenario = (find(kind, "avalanche").options for kind in ("source", "scenario"))
    assert list(source) == [name for name in scenario if name in source]
    assert next(iter(source)) == next(iter(scenario)) == "benchmark"
    assert all((scenario[name].type, scenario[name].default) == (option.type, option.default) for name, option in source.items())
