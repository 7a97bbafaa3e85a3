"""Each selection policy keeps what its rule says: compared sample by sample with plain models, and by hand."""

from __future__ import annotations

import copy
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from streamcl.memory.policies import herding

from streamcl.contracts import SelectionPolicy, Slots
from streamcl.plugins import find

STREAMING = ("reservoir", "class_balanced", "ring", "hierarchical")


def policy(name: str, **options: Any) -> SelectionPolicy:
    return find("policy", name).load()(**options)


class Shelf:
    """The slots of a memory, as a memory keeps them: what is placed is written down one sample after the other."""

    def __init__(self, name: str, budget: int, seed: int = 0) -> None:
        self.policy, self.slots = policy(name), Slots(budget)
        self.generator = torch.Generator().manual_seed(seed)
        self.names: list[int] = []  # of the sample in each slot: its number in the stream

    def offer(self, groups: list[int], scores: list[float] | None = None) -> None:
        slots, offered = self.slots, torch.tensor(groups, dtype=torch.int64)
        given = torch.tensor(scores or [math.nan] * len(groups), dtype=torch.float64) if self.policy.scored else None
        if given is not None and slots.scores is None:
            slots.scores = torch.empty(0, dtype=torch.float64)
        placed = self.policy.place(offered, given, slots, self.generator)
        assert placed.shape == offered.shape and placed.dtype == torch.int64
        held, kept = slots.groups.tolist(), [] if slots.scores is None else slots.scores.tolist()
        for row, slot in enumerate(placed.tolist()):
            if slot < 0:
                continue
            assert slot < slots.budget and slot <= len(self.names)
            for column, value in ((self.names, slots.seen + row), (held, groups[row]), (kept, 0 if given is None else float(given[row]))):
                column[slot : slot + 1] = [value]
        slots.held, slots.groups = len(held), torch.tensor(held, dtype=torch.int64)
        slots.scores = None if given is None else torch.tensor(kept, dtype=torch.float64)
        slots.seen += len(groups)
        for group, count in Counter(groups).items():
            slots.seen_of[group] = slots.seen_of.get(group, 0) + count

    def drop(self, gone: list[int]) -> None:
        keep = [slot for slot in range(self.slots.held) if slot not in gone]
        self.names, self.slots.held = [self.names[slot] for slot in keep], len(keep)
        self.slots.groups = self.slots.groups[keep]
        self.slots.scores = None if self.slots.scores is None else self.slots.scores[keep]
        self.slots.version += 1

    def resize(self, budget: int) -> list[int]:
        over, self.slots.budget = max(0, self.slots.held - budget), budget
        gone = self.policy.evict(over, self.slots, self.generator).tolist() if over else []
        assert len(set(gone)) == over and all(0 <= slot < self.slots.held for slot in gone)
        if gone:
            self.drop(gone)
        return gone


# Plain models: what the rule does with one sample ----------------------------------------------------------------------------------


class Plain:
    """Lists by slot, and the draws of the policy's own generator, one for each sample."""

    draws_when_filling = True

    def __init__(self, budget: int, seed: int) -> None:
        self.budget, self.generator, self.seen = budget, torch.Generator().manual_seed(seed), 0
        self.names: list[int] = []
        self.groups: list[int] = []
        self.scores: list[float] = []
        self.seen_of: Counter[int] = Counter()

    def offer(self, groups: list[int], scores: list[float] | None = None) -> None:
        for row, group in enumerate(groups):
            score = math.nan if scores is None else scores[row]
            draw = math.nan
            if self.draws_when_filling or self.seen >= self.budget:
                draw = float(torch.rand(1, generator=self.generator, dtype=torch.float64))
            slot = self.place(group, draw)
            if slot is not None:
                score = self.score(group, score, slot)
                for column, value in ((self.names, self.seen), (self.groups, group), (self.scores, score)):
                    column[slot : slot + 1] = [value]
            self.seen += 1
            self.seen_of[group] += 1
            self.after()

    def drop(self, gone: list[int]) -> None:
        for column in (self.names, self.groups, self.scores):
            column[:] = [value for slot, value in enumerate(column) if slot not in gone]

    def of(self, group: int) -> list[int]:
        return [slot for slot, label in enumerate(self.groups) if label == group]

    def largest(self) -> list[int]:
        sizes = Counter(self.groups)
        return sorted(group for group in sizes if sizes[group] == max(sizes.values()))

    def place(self, group: int, draw: float) -> int | None:
        raise NotImplementedError

    def score(self, group: int, score: float, slot: int) -> float:
        return score

    def after(self) -> None: ...


class PlainReservoir(Plain):
    draws_when_filling = False

    def place(self, group: int, draw: float) -> int | None:
        held = len(self.names)
        if self.seen < self.budget:
            return held
        drawn = int(draw * (self.seen + 1))
        return None if drawn >= self.budget else min(drawn, held)


class PlainClassBalanced(Plain):
    def full(self, group: int) -> bool:
        size, most = len(self.of(group)), len(self.of(self.largest()[0]))
        return size == most or (size == most - 1 and size < self.seen_of[group])

    def place(self, group: int, draw: float) -> int | None:
        if len(self.names) < self.budget:
            return len(self.names)
        if self.full(group):
            drawn = int(draw * (self.seen_of[group] + 1))
            mine = self.of(group)
            return mine[drawn] if drawn < len(mine) else None
        candidates = [slot for label in self.largest() for slot in self.of(label)]
        return candidates[int(draw * len(candidates))]


class PaperClassBalanced(PlainClassBalanced):
    """With the book that the paper keeps: which classes are the largest, or have been."""

    def __init__(self, budget: int, seed: int) -> None:
        super().__init__(budget, seed)
        self.have_been: set[int] = set()

    def full(self, group: int) -> bool:
        return group in self.have_been

    def after(self) -> None:
        if len(self.names) == self.budget:
            self.have_been.update(self.largest())


class PlainRing(Plain):
    draws_when_filling = False

    def offer(self, groups: list[int], scores: list[float] | None = None) -> None:
        for group in groups:
            if len(self.names) < self.budget:
                slot = len(self.names)
            else:
                share = max(1, self.budget // len(self.seen_of.keys() | {group}))
                loser = self.largest()[0] if len(self.of(group)) < share else group
                slot = min(self.of(loser), key=lambda slot: self.names[slot])
            for column, value in ((self.names, self.seen), (self.groups, group), (self.scores, float(self.seen))):
                column[slot : slot + 1] = [value]
            self.seen += 1
            self.seen_of[group] += 1


class PlainHierarchical(Plain):
    def place(self, group: int, draw: float) -> int | None:
        if len(self.names) < self.budget:
            return len(self.names)
        sizes = Counter(self.groups)
        sizes[group] += 1
        candidates = sorted(label for label in sizes if sizes[label] == max(sizes.values()) and self.of(label))
        members = self.of(candidates[0])
        least = [slot for slot in members if self.scores[slot] == min(self.scores[other] for other in members)]
        return least[int(draw * len(least))]

    def score(self, group: int, score: float, slot: int) -> float:
        others = [Fraction(self.scores[other]) for other in self.of(group) if other != slot]
        if math.isnan(score):
            return float(sum(others) / len(others)) if others else 0.0
        return score


PLAIN = {"reservoir": PlainReservoir, "class_balanced": PlainClassBalanced, "ring": PlainRing, "hierarchical": PlainHierarchical}

labels = st.lists(st.sampled_from([0, 0, 0, 0, 1, 1, 7, 7, 3, -2]), max_size=40)
some_scores = st.sampled_from([0.0, 0.1, 0.25, -1.0, 3.0, math.nan])
steps = st.one_of(
    labels.flatmap(
        lambda groups: st.tuples(st.just("offer"), st.just(groups), st.lists(some_scores, min_size=len(groups), max_size=len(groups)))
    ),
    st.tuples(st.just("drop"), st.lists(st.integers(0, 15), min_size=1, max_size=4), st.none()),
    st.tuples(st.just("resize"), st.integers(1, 16), st.none()),
    st.tuples(st.just("replace"), st.integers(0, 15), st.sampled_from([0.0, 0.1, 5.0])),
)


@pytest.mark.parametrize("name", STREAMING)
@settings(deadline=None, max_examples=120)
@given(budget=st.integers(1, 12), seed=st.integers(0, 5), doings=st.lists(steps, max_size=14))
def test_a_streaming_policy_does_what_its_rule_does_sample_by_sample(name: str, budget: int, seed: int, doings: list[Any]) -> None:
    shelf, plain = Shelf(name, budget, seed), PLAIN[name](budget, seed)
    for what, value, scores in doings:
        if what == "offer":
            shelf.offer(value, scores)
            plain.offer(value, scores)
        elif what == "drop":
            shelf.drop(value)
            plain.drop(value)
        elif what == "resize":
            plain.drop(shelf.resize(value))
            plain.budget = value
            plain.generator.set_state(shelf.generator.get_state())
        elif shelf.slots.scores is not None and name == "hierarchical" and value < shelf.slots.held:
            shelf.slots.scores[value] = plain.scores[value] = scores
        assert shelf.names == plain.names and shelf.slots.groups.tolist() == plain.groups
        if name == "hierarchical" and shelf.slots.scores is not None:
            assert shelf.slots.scores.tolist() == plain.scores


@settings(deadline=None, max_examples=200)
@given(budget=st.integers(1, 12), seed=st.integers(0, 5), batches=st.lists(labels, max_size=10))
@example(budget=3, seed=0, batches=[[0, 0, 0, 1, 1, 1, 7, 7, 7, 3, 3, 0, 0, 1, 1, 0, 0, 0]])
def test_class_balanced_needs_no_book_of_the_classes_that_have_been_the_largest(budget: int, seed: int, batches: list[list[int]]) -> None:
    shelf, paper = Shelf("class_balanced", budget, seed), PaperClassBalanced(budget, seed)
    for batch in batches:
        shelf.offer(batch)
        paper.offer(batch)
        assert shelf.names == paper.names


@pytest.mark.parametrize("name", STREAMING)
@settings(deadline=None, max_examples=60)
@given(
    budget=st.integers(1, 12),
    groups=st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 3]), max_size=80),
    sizes=st.lists(st.integers(1, 30), min_size=1),
)
def test_how_the_stream_is_cut_into_batches_makes_no_difference(name: str, budget: int, groups: list[int], sizes: list[int]) -> None:
    whole, parts = Shelf(name, budget), Shelf(name, budget)
    whole.offer(groups)
    start = turn = 0
    while start < len(groups):
        end = start + sizes[turn % len(sizes)]
        parts.offer(groups[start:end])
        start, turn = end, turn + 1
    assert parts.names == whole.names
    if whole.slots.scores is not None and parts.slots.scores is not None:
        assert torch.equal(parts.slots.scores, whole.slots.scores)


@pytest.mark.parametrize("name", STREAMING)
def test_a_policy_that_was_stopped_goes_on_as_if_it_had_not_been(name: str) -> None:
    stream = np.random.default_rng(3).choice(5, 400, p=[0.5, 0.25, 0.15, 0.07, 0.03]).tolist()
    shelf = Shelf(name, 25)
    for start in range(0, 200, 20):
        shelf.offer(stream[start : start + 20])
    again = copy.deepcopy(shelf)
    again.policy, state = policy(name), shelf.policy.state()
    again.policy.restore(copy.deepcopy(state))
    again.slots.version += 1
    for start in range(200, 400, 20):
        shelf.offer(stream[start : start + 20])
        again.offer(stream[start : start + 20])
        assert again.names == shelf.names
    assert len(set(shelf.names)) == 25 and max(shelf.names) >= 200


@pytest.mark.parametrize("name", STREAMING)
def test_no_budget_and_no_samples_are_no_trouble(name: str) -> None:
    shelf = Shelf(name, 0)
    shelf.offer([0, 1, 0])
    shelf.offer([])
    assert shelf.names == [] and shelf.slots.seen == 3
    shelf.resize(2)
    shelf.offer([1, 1])
    assert set(shelf.names) <= {3, 4}


# What the rules are for -------------------------------------------------------------------------------------------------------------


def uniform(held: np.ndarray, rounds: int, kept: float) -> bool:
    """Whether `kept` of these samples, drawn without replacement in each round, may have been held so often; at one in a thousand."""
    share = kept / len(held)
    statistic = ((held - rounds * share) ** 2).sum() / (rounds * share * (1 - share)) * (len(held) - 1) / len(held)
    return chi2.ppf(0.0005, len(held) - 1) < statistic < chi2.ppf(0.9995, len(held) - 1)


def test_the_reservoir_holds_every_sample_with_the_same_probability() -> None:
    held, rounds = np.zeros(120), 1000
    for seed in range(rounds):
        shelf = Shelf("reservoir", 15, seed)
        for start in range(0, 120, 16):
            shelf.offer([0] * min(16, 120 - start))
        held[shelf.names] += 1
    assert uniform(held, rounds, 15)


def test_after_samples_were_removed_the_reservoir_holds_all_others_with_the_probability_that_it_would_have() -> None:
    held, rounds, gone = np.zeros(120), 1500, {0, 7, 30, 31, 32, 59}
    for seed in range(rounds):
        shelf = Shelf("reservoir", 15, seed)
        shelf.offer([0] * 60)
        shelf.drop([slot for slot, name in enumerate(shelf.names) if name in gone])
        for _ in range(4):
            shelf.offer([0] * 15)
        held[shelf.names] += 1
    others = np.array([name not in gone for name in range(120)])
    share = 15 / 120
    assert held[~others].sum() == 0
    # The number held varies with how many were removed, so each sample is looked at for itself: 114 deviations, in units of their own.
    deviations = (held[others] - rounds * share) / math.sqrt(rounds * share * (1 - share))
    assert np.abs(deviations).max() < 4.5 and abs(held.sum() / rounds - share * 114) < 0.1


def long_tail() -> list[int]:
    """90 of class 0, 40 of class 1, 12 of class 2 and 3 of class 3, class 3 late."""
    stream = np.random.default_rng(0).permutation([0] * 90 + [1] * 40 + [2] * 12).tolist()
    return [*stream[:110], 3, *stream[110:120], 3, 3, *stream[120:]]


def test_class_balanced_is_as_balanced_as_the_stream_allows_and_uniform_within_each_class() -> None:
    stream, rounds = np.array(long_tail()), 1200
    held = np.zeros(len(stream))
    for seed in range(rounds):
        shelf = Shelf("class_balanced", 18, seed)
        for start in range(0, len(stream), 29):
            shelf.offer(stream[start : start + 29].tolist())
        assert Counter(shelf.slots.groups.tolist()) == {0: 5, 1: 5, 2: 5, 3: 3}
        held[shelf.names] += 1
    assert all(uniform(held[stream == label], rounds, 5) for label in (0, 1, 2))
    assert (held[stream == 3] == rounds).all()


def test_the_first_class_of_a_stream_is_not_full_for_being_the_first() -> None:
    shelf = Shelf("class_balanced", 10)
    shelf.offer([5] + [0] * 30)
    shelf.offer([5] * 20)
    assert Counter(shelf.slots.groups.tolist()) == {0: 5, 5: 5}


def test_a_class_that_was_erased_or_fell_behind_comes_back() -> None:
    shelf = Shelf("class_balanced", 12)
    shelf.offer([0, 1, 2] * 40)
    shelf.drop([slot for slot, group in enumerate(shelf.slots.groups.tolist()) if group == 1])
    shelf.offer([0, 2] * 20)
    assert Counter(shelf.slots.groups.tolist())[1] == 0
    shelf.offer([1, 0] * 20)
    assert Counter(shelf.slots.groups.tolist()) == {0: 4, 1: 4, 2: 4}
    shelf.resize(24)
    shelf.offer([0] * 30)
    assert Counter(shelf.slots.groups.tolist()) == {0: 16, 1: 4, 2: 4}
    shelf.offer([1, 2] * 30)
    assert Counter(shelf.slots.groups.tolist()) == {0: 8, 1: 8, 2: 8}


def test_the_ring_holds_the_latest_samples_of_each_group() -> None:
    shelf = Shelf("ring", 10)
    shelf.offer([0] * 25)
    assert sorted(shelf.names) == list(range(15, 25))
    shelf.offer([1] * 3 + [0])  # 25 to 27 are of group 1, which lacks two of its five; 28 is of group 0
    assert sorted(shelf.names) == [19, 20, 21, 22, 23, 24, 25, 26, 27, 28]
    shelf.offer([1] * 30)
    assert sorted(shelf.names) == [21, 22, 23, 24, 28, *range(54, 59)]
    shelf.offer([2])  # of two groups of five the one of the lower number gives
    assert sorted(shelf.names) == [22, 23, 24, 28, 54, 55, 56, 57, 58, 59]


def test_the_hierarchical_memory_loses_the_least_important_sample_of_the_largest_class() -> None:
    shelf = Shelf("hierarchical", 4)
    shelf.offer([0, 0, 0, 1], [0.5, 0.2, math.nan, 0.9])
    assert shelf.slots.scores is not None and shelf.slots.scores.tolist() == [0.5, 0.2, 0.35, 0.9]
    shelf.offer([1])  # class 0 loses its 0.2, and the new sample is as important as its class
    assert shelf.names == [0, 4, 2, 3] and shelf.slots.scores.tolist() == [0.5, 0.9, 0.35, 0.9]
    shelf.slots.scores[0] = 0.1
    shelf.offer([2])  # with it each class but the new one has two: the first gives; the first of a class has score 0
    assert shelf.names == [5, 4, 2, 3] and shelf.slots.scores.tolist() == [0.0, 0.9, 0.35, 0.9]
    shelf.offer([1], [-3.0])  # class 1 has the most now, counting the sample that comes, and that one enters however unimportant
    assert sorted(shelf.names) in ([2, 3, 5, 6], [2, 4, 5, 6])


def test_the_classes_of_a_full_hierarchical_memory_differ_by_one_at_most() -> None:
    stream = np.random.default_rng(1).choice(6, 3000, p=[0.5, 0.2, 0.1, 0.1, 0.08, 0.02]).tolist()
    shelf = Shelf("hierarchical", 50)
    for start in range(0, 3000, 64):
        shelf.offer(stream[start : start + 64])
    sizes = Counter(shelf.slots.groups.tolist())
    assert sum(sizes.values()) == 50 and set(sizes.values()) == {8, 9}


def test_hierarchical_scores_are_those_that_the_memory_stores_where_it_stores_float32() -> None:
    shelf = policy("hierarchical")
    slots, generator = Slots(3), torch.Generator().manual_seed(0)
    given = torch.tensor([0.1, 0.2, math.nan])
    shelf.place(torch.tensor([0, 0, 0]), given, slots, generator)
    assert float(given[2]) == np.float32((float(np.float32(0.1)) + float(np.float32(0.2))) / 2)
    slots.held, slots.groups, slots.scores = 3, torch.zeros(3, dtype=torch.int64), given.clone()
    assert shelf.place(torch.tensor([0]), torch.tensor([math.nan]), slots, generator).tolist() == [0]


@pytest.mark.parametrize("name", ["class_balanced", "ring", "hierarchical"])
@settings(deadline=None, max_examples=60)
@given(groups=st.lists(st.integers(0, 4), min_size=1, max_size=30), budget=st.integers(1, 30))
def test_a_smaller_budget_takes_from_the_largest_groups(name: str, groups: list[int], budget: int) -> None:
    shelf = Shelf(name, 30)
    shelf.offer(groups, [float(n * 7 % 5) for n in range(len(groups))])
    before, scores, names = Counter(groups), shelf.slots.scores, list(shelf.names)
    gone = shelf.resize(budget)
    left = before.copy()
    for _ in gone:
        left[min(group for group in left if left[group] == max(left.values()))] -= 1
    assert Counter(shelf.slots.groups.tolist()) == +left
    for slot in gone if scores is not None else ():
        kept = [other for other in range(len(groups)) if other not in gone and groups[other] == groups[slot]]
        if name == "ring":
            assert all(names[slot] < names[other] for other in kept)
        else:
            assert scores is not None and all(scores[slot] <= scores[other] for other in kept)


# Ranking ----------------------------------------------------------------------------------------------------------------------------


def rank(name: str, values: Any, count: int, scores: Any = None, seed: int = 0, **options: Any) -> list[int]:
    features = torch.as_tensor(values)
    given = None if scores is None else torch.as_tensor(scores)
    order = policy(name, **options).rank(features, given, count, torch.Generator().manual_seed(seed))
    assert order.dtype == torch.int64 and order.device.type == "cpu"
    return order.tolist()


def textbook(features: torch.Tensor, count: int, tie: float = 0.0) -> list[int]:
    """Herding as iCaRL states it: at each step the distance of every candidate, in float64."""
    rows = features.double().numpy()
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(lengths < 1e-12, 1, lengths)
    mean, chosen = rows.mean(axis=0), []
    for k in range(1, count + 1):
        distances = np.sqrt(np.sum((mean - (rows + rows[chosen].sum(axis=0)) / k) ** 2, axis=1))
        distances[chosen] = np.inf
        chosen.append(int((distances <= distances.min() + tie / k).argmax()))
    return chosen


@settings(deadline=None, max_examples=150)
@given(
    count=st.integers(1, 60),
    dim=st.integers(2, 40),
    seed=st.integers(0, 1000),
    copies=st.integers(0, 40),
    zeros=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    scale=st.sampled_from([1.0, 1e-6, 1e6, 1e32]),
)
def test_herding_selects_what_the_textbook_selects(
    count: int, dim: int, seed: int, copies: int, zeros: int, dtype: torch.dtype, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(count, dim, generator=generator) + 0.5) * scale
    features = torch.cat([features, features[torch.randint(count, (copies,), generator=generator)], torch.zeros(zeros, dim)])
    features = features[torch.randperm(len(features), generator=generator)].to(dtype)
    wanted = min(len(features), 25)
    expected = textbook(features, wanted, tie=1e-12)  # of the last two each is as near as the other
    assert rank("herding", features, wanted) == expected == herding._plain(features, wanted).tolist()
    assert rank("herding", features, wanted // 2 or 1) == expected[: wanted // 2 or 1]


def test_herding_tells_apart_what_float32_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 64, generator=generator, dtype=torch.float64)
    features = (centres[:, None] + 1e-7 * torch.randn(8, 200, 64, generator=generator, dtype=torch.float64)).flatten(0, 1)
    assert rank("herding", features, 30) == textbook(features, 30)
    wide = torch.randn(3000, 256, generator=generator).relu()
    assert rank("herding", wide, 40) == textbook(wide, 40)


def test_herding_of_equal_or_zero_vectors_takes_the_first() -> None:
    assert rank("herding", torch.ones(6, 4), 6) == list(range(6))
    assert rank("herding", torch.zeros(5, 4), 3) == [0, 1, 2]
    assert rank("herding", torch.tensor([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0]]), 3) == [1, 0, 2]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_herding_gives_row_numbers_on_the_host_wherever_the_features_lie(device: str) -> None:
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    assert rank("herding", features.to(device), 10) == textbook(features, 10)


def test_random_draws_each_sample_equally_often_and_none_twice() -> None:
    held, rounds = np.zeros(30), 1000
    for seed in range(rounds):
        order = rank("random", np.zeros((30, 0)), 6, seed=seed)
        assert len(set(order)) == 6
        held[order] += 1
    assert uniform(held, rounds, 6)


def test_priority_keeps_the_highest_scores_and_of_equal_ones_the_first() -> None:
    assert rank("priority", np.zeros((6, 0)), 4, [0.5, 2.0, 0.5, -1.0, 2.0, 0.5]) == [1, 4, 0, 2]


def test_entropy_by_hand() -> None:
    least = policy("entropy", keep="lowest")
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    by_hand = torch.tensor([0.0, math.log(2), 1.5 * math.log(2)], dtype=torch.float64)
    assert torch.allclose(least.score(rows), by_hand)
    assert torch.allclose(least.score(rows.log()), by_hand)  # logits of the same distributions, -inf among them
    assert torch.allclose(least.score(torch.tensor([[7.0, 7.0, 7.0], [1.0, 1.0, 0.0]]))[0], torch.tensor(math.log(3)).double())
    assert torch.equal(least.score(by_hand), by_hand)
    logits = torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 2.0], [5.0, 5.0], [0.0, 4.0]])
    assert rank("entropy", np.zeros((5, 0)), 3, logits) == [1, 3, 2]
    assert rank("entropy", np.zeros((5, 0)), 3, logits, keep="lowest") == [0, 4, 2]


def test_entropy_goes_by_the_uncertainty_where_priority_goes_by_the_number() -> None:
    numbers = torch.tensor([0.3, 0.1, 0.2])
    assert policy("priority").needs == ("scores",) and policy("entropy").needs == ("logits",)
    assert rank("priority", np.zeros((3, 0)), 3, numbers) == rank("entropy", np.zeros((3, 0)), 3, numbers) == [0, 2, 1]


def test_cluster_picks_one_of_each_blob_the_larger_ones_first() -> None:
    generator = torch.Generator().manual_seed(0)
    centres, sizes = 100 * torch.eye(5, 16) + 1000, [40, 10, 25, 60, 5]
    blobs = [centre + torch.randn(size, 16, generator=generator) for centre, size in zip(centres, sizes, strict=True)]
    features, blob = torch.cat(blobs), torch.repeat_interleave(torch.tensor(sizes))
    order = torch.randperm(len(features), generator=generator)
    features, blob = features[order], blob[order]
    found = rank("cluster", features, 5)
    assert blob[found].tolist() == [3, 0, 2, 1, 4]
    for row in found:
        mine = (blob == blob[row]).nonzero().squeeze(1)
        nearest = mine[(features[mine] - features[mine].mean(dim=0)).square().sum(dim=1).argmin()]
        assert row == int(nearest)
    assert rank("cluster", features, 5) == found


@settings(deadline=None, max_examples=60)
@given(points=st.lists(st.integers(0, 3), min_size=1, max_size=30), count=st.integers(1, 30), seed=st.integers(0, 20))
def test_cluster_keeps_as_many_as_asked_for_also_of_equal_points(points: list[int], count: int, seed: int) -> None:
    count = min(count, len(points))
    features = torch.tensor(points, dtype=torch.float32)[:, None] * torch.tensor([[1.0, -2.0, 0.5]])
    found = rank("cluster", features, count, seed=seed)
    assert len(found) == len(set(found)) == count and all(0 <= row < len(points) for row in found)
