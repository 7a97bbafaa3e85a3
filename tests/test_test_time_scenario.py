"""The test-time scenario: which domain comes when, that no label is told, that bytes depend on the seed alone, and what it refuses."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.scenarios.sources.digits import Digits
from streamcl.scenarios.test_time import TestTime as Stream

from streamcl import config
from streamcl.corruptions import AUDIO_CORRUPTIONS, IMAGE_CORRUPTIONS, corrupt
from streamcl.data import ArrayDataset, FileDataset
from streamcl.errors import ConfigError, DataError
from streamcl.seeding import generator
from streamcl.stream import Modality, Source, SourceData

IMAGE = Modality("image", (1, 8, 8), high=16)
AUDIO = Modality("audio", (80,))


class Toy(Source):
    """A test part of images, sounds and words, all at random; the training part is one sample of each class."""

    def __init__(self, targets, modalities=("image", "audio", "text"), workers=None, about=True, present=None, **changes):
        self.targets, self.names, self.workers, self.about = list(targets), modalities, workers, about
        self.present, self.changes = present, changes

    def load(self):
        classes = max(self.targets) + 1
        columns, count = columns_of(len(self.targets), self.names), len(self.targets)
        columns |= {name: value for name, value in self.changes.items() if name in self.names}
        ids, targets = torch.arange(1000, 1000 + count), torch.tensor(self.targets)
        extra = {"answer": [str(target) for target in self.targets]}
        if self.workers is None:
            test = ArrayDataset(columns, targets, ids, self.present, extra)
        else:
            test = FileDataset(Rows(columns), targets, ids, self.workers, extra)
        known = {"image": IMAGE, "audio": AUDIO, "text": Modality("text"), "vector": Modality("vector", (3,))}
        train = ArrayDataset(columns_of(classes, self.names), torch.arange(classes))
        return SourceData(
            train,
            test if count else None,
            [f"c{number}" for number in range(classes)],
            {name: self.changes.get("modality", known[name]) for name in self.names},
            target=self.changes.get("target", "class"),
            about={"audio": {"rate": 8000}} if self.about else {},
        )


class Rows:
    """Reads rows by their numbers, as what lies on disk would be; it travels to worker processes."""

    def __init__(self, columns):
        self.columns = columns

    def __call__(self, rows):
        return {name: [c[row] for row in rows] if isinstance(c, list) else c[rows] for name, c in self.columns.items()}


def columns_of(count, names):
    draw = torch.Generator().manual_seed(count)
    columns = {
        "image": torch.randint(0, 17, (count, 1, 8, 8), generator=draw, dtype=torch.uint8),
        "audio": torch.rand(count, 80, generator=draw) * 2 - 1,
        "text": [f"sample {number}" for number in range(count)],
        "vector": torch.rand(count, 3, generator=draw),
    }
    return {name: columns[name] for name in names}


def opened(source=None, seed=0, **options):
    scenario = Stream(data=source or Toy([0, 1, 2] * 50), **options)
    scenario.open(seed)
    return scenario


def whole(dataset, size=37):
    from streamcl.stream import Batch

    return Batch.cat(list(dataset.batches(size)))


def same(one, other):
    assert one.ids.tolist() == other.ids.tolist() and one.inputs.keys() == other.inputs.keys()
    for name, values in one.inputs.items():
        if isinstance(values, list):
            assert values == other.inputs[name]
        else:
            assert values.dtype == other.inputs[name].dtype
            assert torch.equal(values.view(torch.uint8), other.inputs[name].view(torch.uint8)), name


def twin(scenario, index=0):
    task = scenario.task(index)
    return scenario.test(task, task)


def sourced(scenario, index=0):
    """What is served, under the ids that the source has for it, as its twin says them."""
    batch = whole(scenario.task(index).train)
    told = whole(twin(scenario, index))
    assert batch.ids.tolist() == told.ids.tolist()
    return batch.replace(ids=told.extra["source_id"])


ONE = {"corruptions": {"image": ["gaussian_noise"], "audio": ["rain"]}}
MIXED = {**ONE, "corruptions": {"image": ["gaussian_noise", "fog", "motion_blur"], "audio": ["rain", "wind"]}, "shift": "mixed"}


# -- the same bytes, however it is read -------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_bytes_depend_neither_on_the_batches_nor_on_the_order_of_reading(data):
    count = data.draw(st.sampled_from([1, 63, 64, 65, 128, 150]))
    scenario = opened(Toy([0, 1, 2] + [0] * count), samples=count, seed=data.draw(st.integers(0, 99)), **MIXED)
    view = scenario.task(0).train
    assert len(view) == count
    expected = view[torch.arange(count)]
    size = data.draw(st.integers(1, 150))
    same(whole(scenario.task(0).train, size), expected)
    order = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=150)))
    parts = list(view.read(order, size))
    assert [len(part) for part in parts] == [len(part) for part in order.split(size)]
    same(type(expected).cat(parts), expected[order])
    same(type(expected).cat([view[part] for part in order.split(size)]), expected[order])


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_depend_neither_on_workers_nor_on_a_restart(workers):
    options = {"samples": 150, "labels": "dirichlet", "missing": {"audio": 0.3}, **MIXED}
    expected = whole(opened(**options).task(0).train)
    assert expected.present is not None
    scenario = opened(Toy([0, 1, 2] * 50, workers=workers), **options)
    same(whole(scenario.task(0).train, 20), expected)
    order = torch.arange(149, -1, -1)
    same(type(expected).cat(list(scenario.task(0).train.read(order, 50))), expected[order])


def test_a_restored_stream_goes_on_as_the_first_one():
    first = opened(corruptions={"image": ["fog", "snow", "contrast"]}, rounds=2)
    tasks = [(task.name, whole(task.train)) for task in first]
    again = opened(corruptions={"image": ["fog", "snow", "contrast"]}, rounds=2)
    again.restore(json.loads(json.dumps({"position": 4})))
    assert [task.name for task in again.past()] == [name for name, _ in tasks[:4]]
    for task, (name, batch) in zip(again, tasks[4:], strict=True):
        assert task.name == name
        same(whole(task.train), batch)


def test_the_seed_orders_everything_and_each_segment_has_an_order_and_noise_of_its_own():
    def images(seed, index):
        return sourced(opened(corruptions={"image": ["gaussian_noise"]}, rounds=2, seed=seed), index)

    same(images(3, 0), images(3, 0))
    assert images(3, 0).ids.tolist() != images(4, 0).ids.tolist()
    assert images(3, 0).ids.tolist() != images(3, 1).ids.tolist()
    clean = columns_of(150, ["image"])["image"]

    def noise(batch):
        return batch.inputs["image"][0].int() - clean[batch.ids[0] - 1000].int()

    assert not torch.equal(noise(images(3, 0)), noise(images(3, 1)))


def test_reading_in_order_corrupts_each_block_once_whatever_the_size_of_the_batches(monkeypatch):
    from streamcl.scenarios._shifts import served

    calls = []
    monkeypatch.setattr(served, "corrupt", lambda name, values, *rest, **more: calls.append(len(values)) or values)
    view = opened(corruptions={"image": ["fog"]}).task(0).train
    assert sum(1 for _ in view.batches(1)) == 150 and calls == [64, 64, 22]
    for position in range(150):
        view[torch.tensor([position])]
    assert calls == [64, 64, 22] * 2
    list(view.batches(100))
    assert calls == [64, 64, 22] * 3


# -- what a corruption does to the values ------------------------------------------------------------------------------------------


def test_a_block_is_the_library_s_corruption_of_it_on_the_scale_of_the_source():
    scenario = opened(corruptions={"image": ["contrast"], "audio": ["gaussian_noise"]}, severity=3, combine="together")
    batch, columns = sourced(scenario), columns_of(150, ["image", "audio"])
    image = columns["image"][batch.ids - 1000]
    scaled = corrupt("contrast", image.float() / 16, 3, generator(0))
    assert batch.inputs["image"].dtype == torch.uint8
    assert torch.equal(batch.inputs["image"], (scaled * 16).round().to(torch.uint8))
    audio, heard = columns["audio"][batch.ids - 1000], batch.inputs["audio"]
    for block in range(3):
        rows = slice(64 * block, 64 * block + 64)
        same_noise = corrupt("gaussian_noise", audio[rows], 3, generator(0, "corrupt", 0, block, "audio"), rate=8000)
        assert torch.equal(heard[rows], same_noise) and heard.dtype == torch.float32
    assert batch.inputs["text"] == [f"sample {number - 1000}" for number in batch.ids.tolist()], "words pass untouched"


def test_an_image_does_not_depend_on_whether_the_sound_is_corrupted_too():
    alone = whole(opened(corruptions={"image": ["gaussian_noise"]}).task(0).train)
    both = whole(opened(corruptions={"image": ["gaussian_noise"], "audio": ["rain"]}, combine="together").task(0).train)
    assert torch.equal(alone.inputs["image"], both.inputs["image"])
    assert not torch.equal(alone.inputs["audio"], both.inputs["audio"])


def test_without_corruptions_the_inputs_are_those_of_the_source():
    batch, columns = sourced(opened(corruptions="none")), columns_of(150, ["image", "audio"])
    assert all(torch.equal(batch.inputs[name], columns[name][batch.ids - 1000]) for name in columns)


def test_video_frames_are_corrupted_one_by_one():
    frames = torch.rand(5, 3, 1, 8, 8)
    source = Toy([0, 1, 2, 0, 1], ("image",), image=frames, modality=Modality("video", (3, 1, 8, 8)))
    batch = sourced(opened(source, corruptions=["contrast"]))
    assert torch.equal(batch.inputs["image"].flatten(0, 1), corrupt("contrast", frames[batch.ids - 1000].flatten(0, 1), 5, generator(0)))


def test_what_the_source_lacks_stays_absent_and_takes_no_noise():
    there = torch.arange(150) % 3 > 0
    columns = columns_of(150, ["image", "audio"])
    image, audio = columns["image"].clone(), columns["audio"].clone()
    image[~there], audio[~there] = 0, torch.nan
    source = Toy([0, 1, 2] * 50, image=image, audio=audio, present={"image": there, "audio": there})
    batch = sourced(opened(source, combine="together", corruptions={"image": ["brightness"], "audio": ["gaussian_noise"]}))
    absent = ~there[batch.ids - 1000]
    assert torch.equal(batch.present["image"], ~absent) and torch.equal(batch.present["audio"], ~absent)
    assert (batch.inputs["image"][absent] == 0).all() and batch.inputs["audio"][absent].isnan().all()
    assert (batch.inputs["image"][~absent].flatten(1).sum(1) > 0).all() and batch.inputs["audio"][~absent].isfinite().all()


def test_floats_outside_of_their_range_and_integers_without_a_scale_are_told():
    floats = Toy([0, 1, 2], ("image",), image=torch.full((3, 1, 8, 8), 16.0), modality=Modality("image", (1, 8, 8)))
    with pytest.raises(DataError, match="image holds values from 16 to 16, and corruptions are of values from 0 to 1"):
        whole(opened(floats, corruptions=["fog"]).task(0).train)
    with pytest.raises(DataError, match=r"does not say which value is the largest"):
        whole(opened(Toy([0, 1, 2], ("image",), modality=Modality("image", (1, 8, 8))), corruptions=["fog"]).task(0).train)


# -- nothing but inputs, and a labelled twin ---------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["iid", "ordered", "dirichlet", "blocks"]),
    st.sampled_from(["abrupt", "mixed"]),
    st.integers(1, 200),
    st.integers(0, 99),
)
def test_a_served_sample_tells_no_label_and_its_twin_is_the_same_sample(labels, shift, samples, seed):
    scenario = opened(seed=seed, labels=labels, shift=shift, samples=samples, corruptions={"image": ["fog"], "audio": ["wind"]})
    tasks = list(scenario)
    assert scenario.info.test_time and scenario.info.passes == 1 and scenario.info.tasks == len(tasks)
    for task in tasks:
        served, told = whole(task.train), whole(scenario.test(task, task))
        assert served.target is None and not served.extra and not hasattr(task.train, "targets")
        same(served, told)
        sources = told.extra["source_id"].tolist()
        assert len(served) == samples and set(sources) <= set(range(1000, 1150))
        assert served.ids.tolist() == list(range(task.index * samples, (task.index + 1) * samples)) == task.train.ids.tolist()
        names = [task.names[number] for number in told.target.tolist()]
        assert names == [f"c{(number - 1000) % 3}" for number in sources]
        assert set(task.labels) == set(told.target.tolist())
        assert all(scenario.test(task, other) is None for other in tasks if other.index != task.index)
    assert tasks[0].classes == (0, 1, 2) and all(task.classes == () and task.seen == (0, 1, 2) for task in tasks[1:])


def test_classes_are_numbered_as_the_scenario_numbers_them_that_trained_the_model():
    from streamcl.scenarios.class_incremental import ClassIncremental

    for seed, order in ((3, "seed"), (4, "seed"), (4, "given"), (4, [str(digit) for digit in range(9, -1, -1)])):
        before = ClassIncremental(data=Digits(), tasks=1, order=order)
        before.open(seed)
        scenario = opened(Digits(), seed, samples=60, corruptions="none", order=order)
        assert scenario.info.class_names == before.info.class_names
        trained = whole(before.test(before.task(0), before.task(0)))
        number = dict(zip(trained.ids.tolist(), trained.target.tolist(), strict=True))
        told = whole(twin(scenario))
        assert told.target.tolist() == [number[sample] for sample in told.extra["source_id"].tolist()]


class Other(Source):
    """Six images with other targets than a class."""

    def __init__(self, target, targets):
        self.target, self.targets = target, targets

    def load(self):
        data = ArrayDataset(columns_of(6, ["image"]), self.targets)
        return SourceData(data, data, ["c0", "c1", "c2"], {"image": IMAGE}, target=self.target)


def test_labels_are_numbered_like_classes_and_values_and_masks_stay_as_they_are():
    labels = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 0], [-1, 0, 1], [1, 1, 1]], dtype=torch.int8)
    scenario = opened(Other("labels", labels), corruptions="none", order=["c2", "c0", "c1"])
    told = whole(twin(scenario))
    assert torch.equal(told.target, labels[told.extra["source_id"]][:, [2, 0, 1]]) and scenario.info.class_names == ("c2", "c0", "c1")
    assert scenario.info.metrics[0] == "map"
    for target, targets in (("value", torch.rand(6)), ("mask", torch.randint(0, 3, (6, 8, 8), dtype=torch.uint8))):
        scenario = opened(Other(target, targets), corruptions=["fog"])
        told = whole(twin(scenario))
        assert torch.equal(told.target, targets[told.extra["source_id"]]) and scenario.info.target == target
        assert whole(scenario.task(0).train).target is None
    with pytest.raises(ConfigError, match="order numbers classes, and the target of this source is 'value'"):
        opened(Other("value", torch.rand(6)), order="given")


def test_ids_are_unique_over_the_stream_and_the_same_again():
    def numbers(scenario):
        return [task.train.ids.tolist() for task in scenario]

    options = {"corruptions": {"image": ["fog", "snow"]}, "rounds": 2, "samples": 301, "clean": 0.1, "labels": "blocks"}
    ids = numbers(opened(**options))
    together = [number for segment in ids for number in segment]
    assert len(ids) == 5 and len(together) == len(set(together)) == 30 + 4 * 301 and min(together) >= 0 and max(together) < 2**40
    assert numbers(opened(**options)) == ids
    with pytest.raises(ConfigError, match="more than the 1099511627776 that can be numbered: take fewer samples"):
        opened(corruptions="none", samples=2**39, rounds=3)


def test_a_segment_is_arranged_once_for_what_is_served_and_for_its_twin(monkeypatch):
    from streamcl.scenarios._shifts import arrival

    calls = []
    drawn = arrival.independent
    monkeypatch.setattr(arrival, "independent", lambda *given: calls.append(given) or drawn(*given))
    scenario = opened(corruptions={"image": ["fog", "snow"]}, labels="dirichlet")
    for task in scenario:
        scenario.test(task, task)
    assert len(calls) == 2


def test_blocks_put_the_source_in_order_once_for_all_segments(monkeypatch):
    source = Toy([0, 1, 2] * 2000, ("image",))
    scenario = opened(source, corruptions="none", labels="blocks", samples=20, rounds=10)
    sorted_, argsort = [], torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda self, *given, **more: sorted_.append(len(self)) or argsort(self, *given, **more))
    shuffled, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **more: shuffled.append(n) or randperm(n, **more))
    assert [len(task.train) for task in scenario] == [20] * 10
    assert sorted(sorted_)[-1] == 6000 and sorted(sorted_)[-2] <= 40 and max(shuffled) <= 40


def test_many_segments_may_be_alive_at_once_and_masks_are_not_copied():
    import gc

    class Masks(Source):
        def load(self):
            masks = ArrayDataset({"image": torch.zeros(4000, 1, 8, 8, dtype=torch.uint8)}, torch.zeros(4000, 32, 32, dtype=torch.uint8))
            return SourceData(masks, masks, ["c0"], {"image": IMAGE}, target="mask")

    scenario = opened(Masks(), corruptions="none", rounds=10)
    tasks = [(task, scenario.test(task, task)) for task in scenario]
    assert tasks[9][1].targets.shape == (4000, 32, 32)
    gc.collect()
    rows = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and len(t.shape) and len(t) == 4000 and t.dtype != torch.uint8]
    assert sum(t.nbytes for t in rows) <= 10 * 4 * 4000 + 8 * 4000, "four bytes for each sample served; the source has ids of its own"
    masks = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape == (4000, 32, 32)]
    assert len(masks) == 1 and masks[0] is scenario._served.targets


# -- domains and severities --------------------------------------------------------------------------------------------------------


def plan(scenario):
    return [(task.domain, task.severity) for task in scenario]


def test_all_corruptions_come_one_after_another():
    assert plan(opened(Digits(), samples=10)) == [(name, 5) for name in IMAGE_CORRUPTIONS]
    names = [f"image {name}" for name in IMAGE_CORRUPTIONS] + [f"audio {name}" for name in AUDIO_CORRUPTIONS]
    assert [domain for domain, _ in plan(opened())] == names


def test_gradual_shifts_go_up_and_down_and_a_schedule_is_kept():
    scenario = opened(corruptions={"image": ["fog", "frost"]}, shift="gradual")
    assert plan(scenario) == [(name, severity) for name in ("fog", "frost") for severity in (1, 2, 3, 4, 5, 4, 3, 2, 1)]
    assert plan(opened(corruptions={"image": ["fog"]}, severity=[1, 3])) == [("fog", 1), ("fog", 3)]
    assert scenario.task(1).name == "fog, severity 2"


def test_domains_come_back_in_rounds_and_can_be_shuffled_in_each():
    names = list(IMAGE_CORRUPTIONS)
    scenario = opened(Digits(), rounds=2, samples=5)
    assert [domain for domain, _ in plan(scenario)] == names * 2 and [task.round for task in opened(Digits(), rounds=2)] == [0] * 15 + [
        1
    ] * 15
    shuffled = [domain for domain, _ in plan(opened(Digits(), rounds=2, samples=5, domains="seed"))]
    assert sorted(shuffled[:15]) == sorted(shuffled[15:]) == sorted(names)
    assert shuffled[:15] != shuffled[15:] and shuffled[:15] != names


def test_corruptions_of_several_modalities_come_in_turns_or_at_once():
    two = {"corruptions": {"image": ["fog", "snow", "frost"], "audio": ["rain", "wind"]}, "samples": 5}
    turns = [domain for domain, _ in plan(opened(combine="interleaved", **two))]
    assert turns == ["image fog", "audio rain", "image snow", "audio wind", "image frost"]
    pairs = [domain for domain, _ in plan(opened(combine="together", **two))]
    assert pairs == [f"image {a} + audio {b}" for a in ("fog", "snow", "frost") for b in ("rain", "wind")]
    assert len(plan(opened(combine="together", samples=1))) == 90
    every = [domain for domain, _ in plan(opened(combine="weak_and_strong", **two))]
    assert every == ["image fog", "image snow", "image frost", "audio rain", "audio wind", *pairs, "no image", "no audio"]


def test_a_mixed_segment_has_every_domain_equally_often_and_says_so_to_the_twin_only():
    scenario = opened(Toy([0, 1, 2] * 100), **MIXED, severity=[2, 4], rounds=2)
    assert plan(scenario) == [("mixed", None)] * 2
    told = whole(twin(scenario))
    told.ids = told.extra["source_id"]
    assert Counter(zip(told.extra["domain"], told.extra["severity"].tolist(), strict=True)) == {
        (domain, severity): 30 for domain in scenario.task(0).domains for severity in (2, 4)
    }
    assert set(told.extra["strength"]) == {"weak"} and len(scenario.task(0).domains) == 5
    clean = columns_of(300, ["image", "audio"])
    touched = torch.tensor([domain.startswith("image") for domain in told.extra["domain"]])
    assert torch.equal(told.inputs["image"][~touched], clean["image"][told.ids - 1000][~touched])
    assert torch.equal(told.inputs["audio"][touched], clean["audio"][told.ids - 1000][touched])
    assert (told.inputs["audio"][~touched] != clean["audio"][told.ids - 1000][~touched]).flatten(1).any(dim=1).all()


def test_half_of_a_mixed_stream_is_weakly_shifted_and_half_strongly():
    told = whole(twin(opened(Toy([0, 1, 2] * 40), **{**MIXED, "combine": "weak_and_strong"})))
    assert Counter(told.extra["strength"]) == {"weak": 60, "strong": 60}
    for number, domain in enumerate(told.extra["domain"]):
        assert (told.extra["strength"][number] == "strong") == ("+" in domain or domain.startswith("no "))
        for modality in ("image", "audio"):
            assert bool(told.present[modality][number]) == (domain != f"no {modality}")
    counts = Counter(told.extra["domain"])  # 60 over 5 corruptions, 30 over 6 pairs, 30 over 2 absences
    assert counts == {domain: 15 if domain.startswith("no ") else 5 if "+" in domain else 12 for domain in counts} and len(counts) == 13
    lost = torch.tensor([domain == "no audio" for domain in told.extra["domain"]])
    assert told.inputs["audio"][lost].isnan().all() and not told.extra["severity"][lost].any()


def test_a_stream_may_begin_with_a_segment_without_shift():
    scenario = opened(corruptions={"image": ["fog"]}, clean=0.2, missing={"audio": 0.5})
    assert plan(scenario) == [("clean", None), ("fog", 5)]
    told = whole(twin(scenario))
    assert len(told) == 30 and told.present is None and set(told.extra["strength"]) == {"clean"}
    assert torch.equal(told.inputs["image"], columns_of(150, ["image"])["image"][told.extra["source_id"] - 1000])


def test_a_segment_serves_as_many_samples_as_asked_each_once_before_one_comes_again():
    for samples, most in ((40, 1), (150, 1), (301, 3)):
        ids = sourced(opened(corruptions="none", samples=samples)).ids
        counts = Counter(ids.tolist())
        assert len(ids) == samples and max(counts.values()) == most and len(counts) == min(samples, 150)


# -- the order of the labels -------------------------------------------------------------------------------------------------------


def runs(labels):
    """The mean length of a stretch with one label."""
    return len(labels) / (1 + sum(a != b for a, b in pairwise(labels)))


def arrival(labels, seed=0, **options):
    scenario = opened(Toy([number % 10 for number in range(1000)], ("image",)), seed, corruptions="none", labels=labels, **options)
    return twin(scenario).targets.tolist()


def test_an_ordered_stream_is_sorted_and_the_other_orders_keep_the_same_samples():
    assert arrival("ordered") == sorted(arrival("ordered"))
    for labels in ("iid", "ordered", "dirichlet"):
        assert Counter(arrival(labels)) == dict.fromkeys(range(10), 100)


def test_independent_labels_come_in_the_runs_of_independent_draws():
    # Of 1,000 samples in ten equal classes two neighbours are alike with probability 99/999: 99 of 999 times, with a deviation of 9.4.
    alike = [sum(a == b for a, b in pairwise(arrival("iid", seed))) for seed in range(10)]
    assert abs(np.mean(alike) - 99) < 5 * 9.5 / np.sqrt(10)


def test_a_smaller_alpha_makes_longer_runs():
    assert runs(arrival("dirichlet", alpha=1e-9, slots=10)) == 100, "each class in one slot, all of it: ten runs"
    few, some, even = (
        np.mean([runs(arrival("dirichlet", seed, alpha=alpha, slots=10)) for seed in range(3)]) for alpha in (0.01, 0.1, 1e9)
    )
    # With even proportions every slot has a run of every class, 100 runs in all; at each of 9 borders two of one class may meet.
    assert few > some > 1000 / 91 >= even >= 10 > runs(arrival("iid"))


def reference_dirichlet(labels, classes, slots, proportions, ranks):
    """The published loop, sample by sample, with given proportions and given orders of the classes within a slot."""
    parts = [[[] for _ in range(classes)] for _ in range(slots)]
    for class_ in range(classes):
        mine = [place for place, label in enumerate(labels) if label == class_]
        cuts = (np.cumsum(proportions[class_])[:-1] * len(mine)).astype(int)
        for slot, piece in enumerate(np.split(np.array(mine, dtype=int), cuts)):
            parts[slot][class_] = piece.tolist()
    return [place for slot in range(slots) for class_ in ranks[slot] for place in parts[slot][class_]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 6), st.integers(0, 50))
def test_correlated_arrival_is_the_published_loop(labels, slots, seed):
    from streamcl.scenarios._shifts.arrival import correlated

    from streamcl.seeding import derived

    random = np.random.RandomState(derived(seed, "x", "slots") % 2**32)
    broken = random.beta(0.5, 0.5 * np.arange(slots - 1, 0, -1), size=(5, slots - 1))
    left = np.concatenate([np.ones((5, 1)), np.cumprod(1 - broken, axis=1), np.zeros((5, 1))], axis=1)
    ranks = np.argsort(random.rand(slots, 5), axis=1)
    places = correlated(torch.tensor(labels), 5, 0.5, slots, seed, ("x",)).tolist()
    assert sorted(places) == list(range(len(labels)))
    assert places == reference_dirichlet(labels, 5, slots, -np.diff(left, axis=1), ranks)


def test_blocks_have_one_dominant_class_each_with_the_probability_of_the_ratio():
    alone = arrival("blocks", samples=2000)  # the default ratio: one class at a time
    assert [len(set(alone[200 * block : 200 * block + 200])) for block in range(10)] == [1] * 10
    assert len({alone[200 * block] for block in range(10)}) == 10
    # ratio 9 among ten classes: the dominant one has 9/18, each other one 1/18; of 20,000 draws a deviation of 70.7 and 32.4 at most.
    labels = np.array(arrival("blocks", ratio=9, samples=20000)).reshape(10, 2000)
    dominant = [np.bincount(block, minlength=10).argmax() for block in labels]
    assert sorted(dominant) == list(range(10))
    share = np.array([np.bincount(block, minlength=10) for block in labels])
    assert abs(sum(row.max() for row in share) - 10000) < 5 * 70.8
    assert abs(sum(row[(best + 1) % 10] for row, best in zip(share, dominant, strict=True)) - 20000 / 18) < 5 * 32.5
    even = np.bincount(arrival("blocks", ratio=1, samples=20000), minlength=10)
    assert (abs(even - 2000) < 5 * np.sqrt(20000 * 0.09)).all(), "ratio 1 is no imbalance"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 100), st.floats(1, 50), st.integers(0, 50))
def test_blocks_are_what_a_plain_loop_draws(labels, count, ratio, seed):
    from streamcl.scenarios._shifts.arrival import in_blocks

    draw = generator(seed, "x", "blocks")
    here = sorted(set(labels))
    order = torch.randperm(len(here), generator=draw).tolist()
    chance = torch.rand(count, generator=draw, dtype=torch.float64).tolist()
    other = torch.randint(1, max(len(here), 2), (count,), generator=draw).tolist()
    expected = []
    for step in range(count):
        major = order[step * len(here) // count]
        expected.append(here[major if chance[step] < ratio / (ratio + len(here) - 1) else (major + other[step]) % len(here)])
    assert in_blocks(torch.tensor(here), count, ratio, seed, ("x",)).tolist() == expected


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.data(), st.integers(0, 50))
def test_all_samples_of_a_class_come_before_one_comes_again(counts, data, seed):
    from streamcl.scenarios._shifts.arrival import one_of_each

    there = [class_ for class_, count in enumerate(counts) if count]
    wanted = data.draw(st.lists(st.sampled_from(there), max_size=80)) if there else []
    places = one_of_each(torch.tensor(wanted, dtype=torch.int64), torch.tensor(counts), seed, ("x",)).tolist()
    assert len(places) == len(wanted)
    for class_, count in enumerate(counts):
        mine = [place for place, want in zip(places, wanted, strict=True) if want == class_]
        for start in range(0, len(mine), max(count, 1)):
            turn = mine[start : start + count]
            assert len(set(turn)) == len(turn) and set(turn) <= set(range(count))


@pytest.mark.parametrize("asked", [3, 4, 8])
def test_the_samples_of_a_class_are_drawn_evenly_at_every_place(asked):
    from streamcl.scenarios._shifts.arrival import one_of_each

    # 3 and 4 of 8 are drawn a few at a time, 8 by shuffling them all: in each of 1,600 draws every sample is as likely at every place.
    drawn = torch.stack([one_of_each(torch.zeros(asked, dtype=torch.int64), torch.tensor([8]), seed, ("x",)) for seed in range(1600)])
    for place in range(asked):
        assert (torch.bincount(drawn[:, place], minlength=8) - 200).abs().max() < 5 * np.sqrt(1600 / 8 * 7 / 8)


def test_blocks_bring_every_sample_of_a_class_before_one_comes_again():
    ids = sourced(opened(Toy([0, 1, 2] * 50), corruptions="none", labels="blocks", samples=150)).ids
    assert len(set(ids.tolist())) == 150


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(0, 1200), st.integers(0, 9))
def test_samples_come_once_before_one_comes_again_however_few_of_how_many(samples, count, seed):
    from streamcl.scenarios._shifts.arrival import independent

    picked = independent(samples, count, seed, ("x",)).tolist()
    assert len(picked) == count
    for start in range(0, count, samples):
        turn = picked[start : start + samples]
        assert len(set(turn)) == len(turn) and set(turn) <= set(range(samples))


def test_a_few_of_many_are_drawn_evenly():
    from streamcl.scenarios._shifts.arrival import independent

    # 200 draws of 50 of 1,000: each tenth of the samples is expected 1,000 times, with a deviation of about 30.
    drawn = torch.cat([independent(1000, 50, seed, ("x",)) for seed in range(200)])
    assert (torch.bincount(drawn // 100) - 1000).abs().max() < 150


def test_a_class_without_a_test_sample_takes_part_in_no_order():
    source = Toy([0, 2, 2, 4] * 20, ("image",))
    for labels in ("ordered", "dirichlet", "blocks"):
        task = opened(source, corruptions="none", labels=labels).task(0)
        assert len(task.seen) == 5 and {task.names[number] for number in task.labels} == {"c0", "c2", "c4"}


# -- modalities that are absent ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rates_are_exact_and_every_sample_keeps_a_modality(data):
    count = data.draw(st.integers(1, 60))
    image, text = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    audio = data.draw(st.floats(0, max(0.0, min(1.0, 2 - image - text))))
    scenario = opened(samples=count, corruptions="none", missing={"image": image, "audio": audio, "text": text}, seed=count)
    batch = whole(scenario.task(0).train)
    lost = {name: int((~mask).sum()) for name, mask in batch.present.items()}
    together = round(image * count) + round(audio * count) + round(text * count)
    over = max(0, together - 2 * count)  # rounding up three times may ask for more than there is
    assert lost["image"] == round(image * count) and lost["audio"] == round(audio * count)
    assert lost["text"] == round(text * count) - over
    present = torch.stack(list(batch.present.values()))
    assert present.any(dim=0).all()
    if together <= count:
        assert (~present).sum(dim=0).max() <= 1, "while there is room nobody loses two"
    assert scenario.task(0).missing["image"] == pytest.approx(lost["image"] / count)
    assert batch.inputs["audio"][~batch.present["audio"]].isnan().all() and (batch.inputs["image"][~batch.present["image"]] == 0).all()
    assert all((value == "") != there for value, there in zip(batch.inputs["text"], batch.present["text"].tolist(), strict=True))


def test_a_burst_takes_one_stretch_and_a_whole_modality_can_be_absent():
    starts = set()
    for seed in range(5):
        absent = ~whole(opened(corruptions="none", missing={"audio": {"burst": 0.2}, "image": 0.3}, seed=seed).task(0).train).present[
            "audio"
        ]
        places = absent.nonzero().squeeze(1)
        assert len(places) == 30 and int(places[-1] - places[0]) == 29
        starts.add(int(places[0]))
    assert len(starts) > 1
    gone = opened(corruptions={"image": ["fog"]}, missing={"audio": 1}).task(0)
    assert gone.missing == {"audio": 1.0} and not whole(gone.train).present["audio"].any()


def test_patterns_come_in_turn_and_what_is_absent_is_strongly_shifted():
    scenario = opened(corruptions={"image": ["fog", "snow", "frost"]}, missing=[{"audio": 0.4}, {"image": 0.2}], clean=0.5)
    assert [task.missing for task in scenario] == [{}, {"audio": 0.4}, {"image": pytest.approx(0.2)}, {"audio": 0.4}]
    told = whole(twin(scenario, 1))
    assert [strength == "strong" for strength in told.extra["strength"]] == (~told.present["audio"]).tolist()


# -- what cannot be ----------------------------------------------------------------------------------------------------------------

SMALL = Modality("image", (1, 4, 4), high=16)
MEL = Modality("audio", (32, 9))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (None, {"corruptions": {"image": ["fogg"]}}, "unknown 'fogg': did you mean 'fog'"),
        (None, {"corruptions": {"audio": ["fog"]}}, "'fog' is no corruption of audio"),
        (None, {"corruptions": {"imge": "all"}}, "source lacks, 'imge': did you mean 'image'"),
        (None, {"corruptions": {"text": "all"}}, "text is of the kind text, and there are corruptions of images, videos and sounds only"),
        (None, {"corruptions": ["fog"]}, "image and audio: say of which"),
        (None, {"corruptions": []}, "write corruptions: none"),
        (None, {"severity": 6}, "severity is 6"),
        (None, {"severity": []}, "a list of these"),
        (None, {"severity": 3, "shift": "gradual"}, "gradual goes through severities"),
        (None, {"alpha": 0.1}, "alpha belongs to labels: dirichlet, and labels is iid"),
        (None, {"ratio": 0.5, "labels": "blocks"}, "1 or more is needed"),
        (None, {"shift": "mixed", "domains": "seed"}, "leave out domains"),
        (None, {"combine": "together", "corruptions": {"image": "all"}}, "of two modalities or more, and there are those of 1"),
        (None, {"combine": "weak_and_strong", "missing": {"audio": 0.1}}, "takes modalities away itself"),
        (None, {"missing": {"audioo": 0.1}}, "unknown modality 'audioo': did you mean 'audio'"),
        (None, {"missing": {"audio": 1.5}}, "audio is 1.5: a share from 0 to 1"),
        (None, {"missing": {"audio": {"bursts": 0.1}}}, "a share from 0 to 1 is needed, or {burst: share}"),
        (None, {"missing": [{}, {"image": 1, "audio": 1, "text": 0.5}]}, "pattern 2: the shares add up to 2.5"),
        (None, {"missing": {"image": {"burst": 0.6}, "audio": {"burst": 0.6}}}, "the bursts take 1.2"),
        (Toy([0, 1], ("image",)), {"missing": {"image": 0.1}}, "image is the only modality"),
        (Toy([0, 1], ("vector", "text")), {}, r"this source has vector \(vector\), text \(text\): set corruptions: none"),
        (Toy([0, 1], ("image",), modality=SMALL), {}, "sides of at least 8 pixels"),
        (Toy([0, 1], ("audio",), modality=MEL), {}, "log-mel spectrogram .* set audio_as: waveform"),
        (Toy([0, 1], ("audio",), about=False), {}, "does not say how many samples a second audio has"),
        (Toy([0, 1], target="text"), {}, "the target of this source is 'text'"),
        (Toy([0, 1], target="value"), {"labels": "ordered"}, "labels: ordered needs one class per sample"),
        (None, {"device": "gpu"}, "cpu, cuda or cuda:NUMBER"),
        (None, {"validation": 0.1}, "leave out validation"),
        (None, {"order": ["c0", "c1"]}, "order lacks c2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_served(source, options, message):
    with pytest.raises(ConfigError, match=message):
        opened(source, **options)


def test_a_source_without_a_test_part_is_told_and_its_training_part_can_be_served():
    class Trained(Toy):
        def load(self):
            loaded = super().load()
            loaded.test = None
            return loaded

    with pytest.raises(ConfigError, match="no test set"):
        opened(Trained([0, 1, 2]))
    assert len(opened(Trained([0, 1, 2]), part="train").task(0).train) == 3


# -- the embedded streams ----------------------------------------------------------------------------------------------------------


def test_digits_grow_worse_with_the_severity_and_stay_digits():
    scenario = opened(Digits(), corruptions=["gaussian_noise"], severity=[1, 2, 3, 4, 5])
    test = Digits().load().test
    place = {number: row for row, number in enumerate(test.ids.tolist())}
    distances = []
    for task in scenario:
        batch = sourced(scenario, task.index)
        assert (
            sorted(batch.ids.tolist()) == test.ids.tolist()
            and batch.inputs["image"].dtype == torch.uint8
            and batch.inputs["image"].max() == 16
        )
        before = test.inputs["image"][[place[number] for number in batch.ids.tolist()]]
        distances.append(float((batch.inputs["image"].float() - before).square().mean()))
    assert distances == sorted(distances)


@pytest.mark.parametrize(
    ("name", "tasks", "samples"),
    [
        ("digits", 15, 539),
        ("mixed", 1, 15 * 539),
        ("gradual", 15 * 9 * 2, 128),
        ("label_shift", 15, 539),
        ("one_at_a_time", 1 + 6, 539),
        ("digits_av", 1, 5390),
        ("missing", 4 + 6, 539),
    ],
)
def test_the_stream_of_each_configuration_is_what_its_header_says(name, tasks, samples):
    settings = config.load(f"test_time/{name}", ["strategy=finetune"])  # the stream alone: nothing is trained
    scenario = settings.scenario.build()
    assert scenario.open(settings.seed).tasks == tasks
    task = scenario.task(tasks - 1)
    assert len(task.train) == samples and next(iter(task.train.batches(task.batch))).target is None
    if name == "mixed":
        assert Counter(whole(scenario.test(task, task)).extra["domain"]) == dict.fromkeys(IMAGE_CORRUPTIONS, 539)
    if name == "one_at_a_time":
        assert task.batch == 1 and len(scenario.task(0).train) == 54 and scenario.task(0).domain == "clean"
