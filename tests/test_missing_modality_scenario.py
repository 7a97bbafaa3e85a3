"""Streams with missing modalities: exact shares, masks that are right, and values that nobody can read."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.scenarios.missing_modality import MissingModality, lost_independently
from torch import Tensor
from toy_streams import Toy, assert_repeatable, columns, ids, opened, read

from streamcl.errors import ConfigError, DataError
from streamcl.seeding import generator
from streamcl.stream import Batch, Column, Dataset, Scenario, asked

TRIO = ("image", "sound", "text")
SIX = {"image": 0.1, "sound": 0.1, "text": 0.1, "image+sound": 0.1, "image+text": 0.1, "sound+text": 0.1}


def trio(count: int = 40, **changes: Any) -> Toy:
    options: dict[str, Any] = {"modalities": TRIO, **changes}
    return Toy(torch.arange(count) % 4, **options)


def checked(dataset: Dataset | None, stride: int | None = None) -> tuple[Batch, dict[str, Tensor]]:
    """A batch whose present values are the sample's own, whose absent ones hold nothing, and whose bit mask says which they are."""
    batch = read(dataset)
    assert batch.present is not None and batch.present.keys() == batch.inputs.keys()
    source = batch.extra.get("source_id", batch.ids if stride is None else batch.ids % stride)
    assert isinstance(source, Tensor) and batch.extra.keys() <= {"missing", "source_id"}
    truth = columns(source, list(batch.inputs))
    code = torch.zeros(len(batch), dtype=torch.int64)
    for place, name in enumerate(sorted(batch.inputs)):
        there, values = batch.present[name], batch.inputs[name]
        assert there.dtype == torch.bool and there.shape == (len(batch),)
        if isinstance(values, Tensor):
            expected = truth[name]
            assert isinstance(expected, Tensor) and values.dtype == expected.dtype
            assert torch.equal(values[there], expected[there])
            gone = values[~there]
            assert gone.isnan().all() if gone.is_floating_point() else not gone.any()
        else:
            assert values == [text if here else "" for text, here in zip(truth[name], there.tolist(), strict=True)]
        code += (~there).long() << place
    assert torch.equal(batch.extra["missing"], code)  # type: ignore[arg-type]
    lost = {name: ~mask for name, mask in batch.present.items()}
    assert not torch.stack(list(lost.values())).all(dim=0).any(), "a sample never loses everything"
    return batch, lost


def tally(lost: dict[str, Tensor]) -> dict[str, int]:
    """How many samples lack what: "" is nothing."""
    names = sorted(lost)
    rows = torch.stack([lost[name] for name in names], dim=1).tolist()
    keys = ["+".join(name for name, gone in zip(names, row, strict=True) if gone) for row in rows]
    return {key: keys.count(key) for key in set(keys)}


def test_every_task_has_exactly_the_shares_of_its_pattern() -> None:
    patterns: list[dict[str, float]] = [{"text": 0.35, "image": 0.35}, {"sound": 1.0}, {}, {"image+sound": 0.2, "text": 0.5}]
    scenario = opened(MissingModality, trio(80), missing=patterns)
    counted = [{"text": 7, "image": 7, "": 6}, {"sound": 20}, {"": 20}, {"image+sound": 4, "text": 10, "": 6}]
    names = ["35% without text and 35% without image", "100% without sound", "complete", "20% without image and sound and 50% without text"]
    for task, expected, name in zip(scenario, counted, names, strict=True):
        assert tally(checked(task.train)[1]) == expected and task.name == name
        assert task.missing == patterns[task.index] and task.modalities == ["image", "sound", "text"]
        tested = tally(checked(scenario.test(task, task))[1])
        assert tested == {key: count * 4 for key, count in expected.items()}, "the test set has the pattern of its task, and is whole"


def test_the_six_incomplete_patterns_of_three_modalities_have_a_tenth_each() -> None:
    (task,) = opened(MissingModality, trio(100), missing=[SIX])
    assert tally(checked(task.train)[1]) == {**{key: 10 for key in SIX}, "": 40}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_shares_are_exact_and_masks_are_right_for_any_pattern(data: st.DataObject) -> None:
    keys = ["image", "sound", "text", "image+sound", "text+image", "sound+text"]
    weights = st.dictionaries(st.sampled_from(keys), st.integers(0, 20), max_size=4)
    patterns = [{key: w / 100 for key, w in data.draw(weights).items()} for _ in range(data.draw(st.integers(1, 3)))]
    divide = data.draw(st.sampled_from(["samples", "classes", "all"]))
    count, validation = data.draw(st.integers(12, 50)), data.draw(st.sampled_from([0.0, 0.3]))
    scenario = opened(MissingModality, trio(count), data.draw(st.integers(0, 99)), missing=patterns, divide=divide, validation=validation)
    for task in scenario:
        for dataset in (task.train, task.validation, scenario.test(task, task)):
            if dataset is None or not len(dataset):
                continue
            found = tally(checked(dataset, 2 * count if divide == "all" else None)[1])
            for key, share in task.missing.items():
                assert abs(found.get("+".join(sorted(key.split("+"))), 0) - share * len(dataset)) <= 1
            total = sum(task.missing.values()) * len(dataset)
            assert abs(len(dataset) - found.get("", 0) - total) <= 0.5 + 1e-6, "rounded once, not once for each part"


def test_with_independent_draws_each_modality_goes_at_its_own_rate() -> None:
    count = 4000
    rates = {"image": 0.3, "sound": 0.6}
    (task,) = opened(MissingModality, trio(count), 2, missing=[rates], draws="independent")
    lost = checked(task.train)[1]
    for name in TRIO:
        rate = rates.get(name, 0.0)
        assert abs(int(lost[name].sum()) - count * rate) <= 5 * (count * rate * (1 - rate)) ** 0.5
    both = int((lost["image"] & lost["sound"]).sum())
    assert abs(both - count * 0.18) <= 5 * (count * 0.18 * 0.82) ** 0.5, "independent of each other"


def conditioned(rates: list[float]) -> dict[tuple[bool, ...], float]:
    """How likely it is to lose what, by plain counting over all combinations: odds raised step by step until the rates are right."""
    loses = list(rates)
    for _ in range(20000):
        every = {
            lost: float(torch.tensor([p if gone else 1 - p for p, gone in zip(loses, lost, strict=True)], dtype=torch.float64).prod())
            for lost in itertools.product([False, True], repeat=len(rates))
        }
        del every[(True,) * len(rates)]
        total = sum(every.values())
        found = [sum(chance for lost, chance in every.items() if lost[m]) / total for m in range(len(rates))]
        if max(abs(one - other) for one, other in zip(found, rates, strict=True)) < 1e-9:
            break
        odds = [p / (1 - p) * (r / (1 - r)) / (f / (1 - f)) for p, r, f in zip(loses, rates, found, strict=True)]
        loses = [odd / (1 + odd) for odd in odds]
    return {lost: chance / total for lost, chance in every.items()}


@pytest.mark.parametrize("rates", [[0.5, 0.5, 0.5], [0.7, 0.6, 0.5], [0.2, 0.9, 0.8], [0.66, 0.66, 0.66]])
def test_rates_are_kept_although_no_sample_loses_everything(rates: list[float]) -> None:
    count = 20000
    lost = lost_independently(rates, count, generator(3, "x"))
    assert not lost.all(dim=1).any()
    for found, rate in zip(lost.sum(0).tolist(), rates, strict=True):
        assert abs(found - count * rate) <= 5 * (count * rate * (1 - rate)) ** 0.5
    for pattern, chance in conditioned(rates).items():
        found = int((lost == torch.tensor(pattern)).all(dim=1).sum())
        assert abs(found - count * chance) <= 5 * (count * chance * (1 - chance)) ** 0.5 + 1


def test_every_task_loses_at_its_rates_although_no_sample_loses_everything() -> None:
    count, rates = 6000, {"image": 0.6, "sound": 0.6, "text": 0.6}
    (task,) = opened(MissingModality, trio(count), missing=[rates], draws="independent")
    lost = checked(task.train)[1]
    for name, rate in rates.items():
        assert abs(int(lost[name].sum()) - count * rate) <= 5 * (count * rate * (1 - rate)) ** 0.5


def test_rates_that_leave_exactly_one_modality_leave_each_one_in_proportion() -> None:
    (task,) = opened(MissingModality, trio(900), missing=[{"image": 0.5, "sound": 0.75, "text": 0.75}], draws="independent")
    found = tally(checked(task.train)[1])
    assert set(found) == {"image+sound", "image+text", "sound+text"} and sum(found.values()) == 900
    for key, share in {"sound+text": 0.5, "image+text": 0.25, "image+sound": 0.25}.items():
        assert abs(found[key] - 900 * share) <= 5 * (900 * share * (1 - share)) ** 0.5
    (task,) = opened(MissingModality, trio(40), missing=[{"image": 1.0, "sound": 1.0}], draws="independent")
    assert tally(checked(task.train)[1]) == {"image+sound": 40}, "whole modalities may be absent while one is left"


SAID = {"text": ("answer", "verifier", "choices", "difficulty", "skill", "pair"), "class": ("choices",)}


def said(ids: Tensor) -> dict[str, Column]:
    """All that sources say, and copies of two modalities among it."""
    texts: dict[str, Column] = {name: [f"{name} {number}" for number in ids.tolist()] for name in ("verifier", "choices", "skill")}
    copies = columns(ids, ["text", "sound"])
    caption = copies["text"]
    numbers = {"difficulty": ids.float(), "pair": ids, "boxes": ids.repeat(2, 1).T, "waveform": copies["sound"]}
    return {**texts, **numbers, "answer": caption, "caption": caption}


@pytest.mark.parametrize("workers", [None, 0])
@pytest.mark.parametrize("target", ["class", "text"])
def test_what_is_absent_cannot_be_read_beside_the_inputs_either(target: str, workers: int | None) -> None:
    scenario = opened(
        MissingModality,
        trio(40, target=target, names=["a", "b", "c", "d"], extra=said, workers=workers),
        missing=[{"text": 0.4, "sound": 0.4}, {"text": 1.0}],
        validation=0.25,
    )
    for task in scenario:
        for dataset in (task.train, task.validation, scenario.test(task, task)):
            batch = read(dataset)
            tested = dataset not in (task.train, task.validation)
            if tested:
                assert batch.extra["answer" if target == "text" else "choices"], "the engine has what it scores by"
                batch = asked(batch, scenario.info)
            assert batch.extra.keys() == ({"choices", "missing"} if tested else {*SAID[target], "missing"})
            assert batch.present is not None
            own = columns(batch.ids % 80, ["text"])["text"]
            for name, column in batch.extra.items():
                if isinstance(column, list):
                    for value, text, there in zip(column, own, batch.present["text"].tolist(), strict=True):
                        assert value and value != text if there and name != "answer" else value != text or there
            if "answer" in batch.extra:
                assert [bool(answer) for answer in batch.extra["answer"]] == batch.present["text"].tolist()


def test_what_a_source_lacks_itself_is_as_unreadable_as_what_the_pattern_takes() -> None:
    present = {"text": torch.arange(40) % 2 == 0}
    (task,) = opened(MissingModality, trio(40, target="text", names=list("abcd"), extra=said, present=present), missing=[{"sound": 0.5}])
    batch = read(task.train)
    assert [bool(answer) for answer in batch.extra["answer"]] == present["text"][batch.ids].tolist()


@pytest.mark.parametrize("divide", ["all", "samples"])
def test_copies_of_test_samples_have_ids_of_their_own_and_say_whose_they_are(divide: str) -> None:
    scenario = opened(MissingModality, trio(40), missing=[{"text": 0.5}, {}, {"image": 0.3}], divide=divide, validation=0.25)
    tasks = list(scenario)
    everything = []
    for task in tasks:
        test = scenario.test(task, task)
        batch = read(test)
        assert batch.ids.tolist() == ids(test) and batch.extra["source_id"].tolist() == list(range(40, 80))  # type: ignore[union-attr]
        everything += [n for dataset in (task.train, task.validation, test) for n in ids(dataset)]
        assert "source_id" not in read(task.train).extra and "source_id" not in asked(batch, scenario.info).extra
    assert len(everything) == len(set(everything)) and max(everything) < 2**40


def test_twenty_tasks_that_see_everything_hold_one_byte_for_each_sample() -> None:
    count, tasks = 20000, 20
    options: dict[str, Any] = {"missing": [{"text": 0.3}] * tasks, "divide": "all", "validation": 0.5, "online": True}
    scenario = opened(MissingModality, Toy(torch.arange(count) % 4, modalities=("vector", "sound", "text"), test=[0] * 10), **options)
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if isinstance(thing, Tensor | np.ndarray)}
    alive = list(scenario)
    gc.collect()
    new = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and id(thing) not in before]
    assert alive and sum(thing.nbytes for thing in new) == tasks * count
    assert len(alive[3].train.ids) == len(alive[3].train.targets) == count // 2


def test_what_the_source_lacks_stays_absent_and_no_pattern_takes_the_rest() -> None:
    present = {"text": torch.arange(40) % 2 == 0, "sound": torch.arange(40) % 4 != 1}
    for pattern in ({"image": 1.0}, {"image+text": 0.5, "sound": 0.5}, {"image+sound": 1.0}):
        (task,) = opened(MissingModality, trio(40, present=present), missing=[pattern])
        batch, lost = checked(task.train)  # the bit mask says what is absent, whoever took it
        for name, there in present.items():
            assert lost[name][~there[batch.ids]].all()
    (task,) = opened(MissingModality, trio(40, present=present), missing=[{"image": 1.0}])
    assert tally(checked(task.train)[1]) == {"image": 20, "image+text": 10, "sound+text": 10}


def test_the_parts_are_each_task_s_own_samples_its_classes_or_everything() -> None:
    patterns = [{"text": 0.5}, {"image": 0.5}]
    shared = list(opened(MissingModality, trio(40), missing=patterns))
    assert sorted(n for task in shared for n in ids(task.train)) == list(range(40)) and [len(t.train) for t in shared] == [20, 20]
    assert [task.classes for task in shared] == [(0, 1, 2, 3), ()] and [task.labels for task in shared] == [(0, 1, 2, 3)] * 2

    scenario = opened(MissingModality, trio(40), missing=patterns, divide="classes", order="given")
    by_class = list(scenario)
    assert [task.classes for task in by_class] == [(0, 1), (2, 3)] == [task.labels for task in by_class]
    assert by_class[1].seen == (0, 1, 2, 3) and by_class[0].names == {0: "c0", 1: "c1"}
    assert [set(task.train.targets.tolist()) for task in by_class] == [{0, 1}, {2, 3}]
    assert sorted(n for task in by_class for n in ids(scenario.test(task, task))) == list(range(40, 80))

    everything = list(opened(MissingModality, trio(40), missing=patterns, divide="all"))
    assert [sorted(number % 80 for number in ids(task.train)) for task in everything] == [list(range(40))] * 2
    assert len({n for task in everything for n in ids(task.train)}) == 80, "every copy has an id of its own"


def test_classes_that_arrive_are_numbered_as_they_arrive() -> None:
    scenario = opened(MissingModality, trio(40), 3, missing=[{"text": 0.5}] * 4, divide="classes")
    for task in scenario:
        batch = checked(task.train)[0]
        assert batch.target is not None
        assert {scenario.info.class_names[c] for c in batch.target.tolist()} == {f"c{row % 4}" for row in batch.ids.tolist()}
        assert task.name == f"50% without text, {scenario.info.class_names[task.index]}"


@pytest.mark.parametrize(
    ("options", "trained", "tested"),
    [
        ({"test": "own"}, {"text": 20, "": 20}, {"text": 20, "": 20}),
        ({"test": "complete"}, {"text": 20, "": 20}, {"": 40}),
        ({"test": {"image": 0.25, "text+sound": 0.25}}, {"text": 20, "": 20}, {"image": 10, "sound+text": 10, "": 20}),
        ({"train_complete": True}, {"": 40}, {"text": 20, "": 20}),
        ({"train_complete": True, "test": {"sound": 1.0}}, {"": 40}, {"sound": 40}),
    ],
)
def test_what_is_scored_has_a_pattern_of_its_own(options: dict[str, Any], trained: dict[str, int], tested: dict[str, int]) -> None:
    scenario = opened(MissingModality, trio(40), missing=[{"text": 0.5}], **options)
    (task,) = scenario
    assert tally(checked(task.train)[1]) == trained and tally(checked(scenario.test(task, task))[1]) == tested


def test_a_sample_lacks_the_same_whenever_it_is_read() -> None:
    scenario = opened(MissingModality, trio(40), missing=[SIX, {"text": 0.5}], validation=0.2)
    for dataset in (scenario.task(0).train, scenario.task(0).validation):
        assert dataset is not None
        whole = dict(zip(read(dataset).ids.tolist(), read(dataset).extra["missing"].tolist(), strict=True))  # type: ignore[union-attr]
        shuffled = Batch.cat(list(dataset.batches(3, shuffle=True, generator=torch.Generator().manual_seed(1))))
        assert dict(zip(shuffled.ids.tolist(), shuffled.extra["missing"].tolist(), strict=True)) == whole  # type: ignore[union-attr]
    one = scenario.task(0).train[torch.tensor([5])]
    assert one.extra["missing"].tolist() == read(scenario.task(0).train).extra["missing"][5:6].tolist()  # type: ignore[union-attr]


def test_tasks_parts_and_seeds_each_draw_anew_who_lacks_what() -> None:
    patterns: list[dict[str, float]] = [{"text": 0.5}, {"text": 0.5}]
    drawn = []
    for seed in (0, 1):
        scenario = opened(MissingModality, trio(40), seed, missing=patterns, divide="all")
        for task in scenario:
            drawn += [tuple(read(dataset).extra["missing"]) for dataset in (task.train, scenario.test(task, task))]
    assert len(set(map(str, drawn))) == 8


def test_validation_is_trained_on_in_no_task_not_even_as_a_copy() -> None:
    for divide in ("samples", "all"):
        tasks = list(opened(MissingModality, trio(40), missing=[{"text": 0.5}, {}, {"image": 0.3}], divide=divide, validation=0.25))
        trained = {number % 80 for task in tasks for number in ids(task.train)}
        held = {number % 80 for task in tasks for number in ids(task.validation)}
        assert held and not trained & held and trained | held == set(range(40))
        for task in tasks:
            checked(task.validation, 80)


def test_an_online_stream_of_values_is_read_once() -> None:
    source = Toy(torch.arange(12) / 4, target="value", modalities=TRIO)
    scenario = opened(MissingModality, source, missing=[{"text": 0.5}], online=True, validation=0.25)
    assert scenario.info.metrics == ("mae", "rmse", "correlation") and scenario.info.passes == 1
    batch = read(scenario.task(0).train)
    assert batch.target is not None and batch.target.tolist() == (batch.ids / 4).tolist() and len(batch) == 9
    task = scenario.task(0)
    read(task.train)
    with pytest.raises(DataError, match="single-pass"):
        read(task.train)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing": []}, "missing is empty: one pattern per task is needed"),
        ({"missing": [{}], "train_complete": True, "test": "complete"}, "nothing would be missing anywhere"),
        ({"missing": [{}, {"text": 0.7, "image": 0.4}]}, r"missing.1: the shares add up to 1.1"),
        ({"missing": [{}], "test": {"text": 0.7, "image": 0.4}}, r"test: the shares add up to 1.1"),
        ({"missing": [{"text+image": 0.5}], "draws": "independent"}, "missing.0: with draws: independent a rate belongs to one modality"),
        (
            {"missing": [{"text": 0.7, "image": 0.7, "sound": 0.7}], "draws": "independent"},
            "the rates text: 0.7, image: 0.7, sound: 0.7 leave 0.9 of a modality per sample, and every sample keeps one",
        ),
        ({"missing": [{"txt": 0.5}]}, "'txt' is no modality of this source: did you mean 'text'"),
        ({"missing": [{}], "test": {"video": 0.5}}, "'video' is no modality of this source: it has image, sound, text"),
        ({"missing": [{"text+image+sound": 0.1}]}, "is all that this source has: a sample must keep a modality"),
        ({"missing": [{}] * 5, "divide": "classes"}, "5 patterns and only 4 classes"),
        ({"missing": [{}] * 41}, "41 patterns and only 40 training samples to divide"),
        ({"missing": [{}], "order": "given"}, "order is that of the classes, and divide: samples brings them all at once"),
    ],
)
def test_missing_modality_refuses_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(MissingModality, trio(40), **options)


def test_missing_modality_says_what_is_wrong_with_the_data() -> None:
    with pytest.raises(ConfigError, match="the source has no test set"):
        opened(MissingModality, trio(4, test=[]), missing=[{}])
    with pytest.raises(ConfigError, match=r"one class per sample \(divide: classes\)"):
        opened(MissingModality, Toy([0.5, 1.0], target="value", modalities=TRIO), missing=[{}], divide="classes")
    with pytest.raises(ConfigError, match="vector is all that this source has"):
        opened(MissingModality, Toy([0, 1]), missing=[{"vector": 0.5}])
    with pytest.raises(DataError, match="no training sample of c1: add some, or leave the class out of the source"):
        opened(MissingModality, Toy([0, 2], test=[0, 1], modalities=TRIO), missing=[{}, {}], divide="classes")


@pytest.mark.parametrize("divide", ["samples", "classes", "all"])
def test_a_stream_with_missing_modalities_is_repeatable(divide: str) -> None:
    def make(seed: int, workers: int | None) -> Scenario:
        patterns = [{"text": 0.3, "image+sound": 0.3}, {"sound": 0.5}]
        draws = "shares" if divide != "all" else "independent"
        if draws == "independent":
            patterns[0] = {"text": 0.6, "image": 0.6}
        return opened(MissingModality, trio(24, workers=workers), seed, missing=patterns, divide=divide, draws=draws, validation=0.2)

    assert_repeatable(make)
