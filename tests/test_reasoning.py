"""The reasoning scenario: which rows come in which session and in what order, what is scored, and what it refuses."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.scenarios.reasoning import Reasoning
from streamcl.scenarios.sources.puzzles import Puzzles

from streamcl.data import ArrayDataset, whole
from streamcl.errors import ConfigError, DataError
from streamcl.stream import Modality, Source, SourceData

SKILLS = ["count", "read", "sort"]


class Rows(Source):
    """Rows (skill, difficulty, what it shows); ids of the test set begin at 1000."""

    def __init__(self, train, test=None, names=SKILLS, complexity=None, **changes):
        self.train, self.held, self.names, self.complexity, self.changes = (
            train,
            train if test is None else test,
            names,
            complexity,
            changes,
        )

    def load(self):
        def dataset(rows, first):
            targets = torch.tensor([self.names.index(skill) for skill, *_ in rows], dtype=torch.int64)
            extra = {
                "answer": ["yes"] * len(rows),
                "choices": [""] * len(rows),
                "verifier": ["text"] * len(rows),
                "difficulty": torch.tensor([row[1] for row in rows], dtype=torch.float32),
            }
            if self.complexity is not None:
                extra["complexity"] = torch.tensor(self.complexity[: len(rows)])
            extra = {name: column for name, column in {**extra, **self.changes}.items() if column is not None}
            present = {
                name: torch.tensor([len(row) > 2 and row[2] == name for row in rows], dtype=torch.bool) for name in ("image", "video")
            }
            return ArrayDataset({"text": ["?"] * len(rows)}, targets, first + torch.arange(len(rows)), present, extra)

        modalities = {"text": Modality("text"), "image": Modality("image", (3, 2, 2)), "video": Modality("video", (2, 3, 2, 2))}
        return SourceData(dataset(self.train, 0), dataset(self.held, 1000), self.names, modalities, target="text", licence="CC0")


def opened(source, seed=0, **options):
    scenario = Reasoning(data=source, **options)
    scenario.open(seed)
    return scenario


def ids(dataset):
    return [] if dataset is None else dataset.ids.tolist()


def held_out(scenario):
    tasks = [scenario.task(index) for index in range(len(scenario))]
    return [ids(scenario.test(task, tasks[-1])) for task in tasks]


rows = st.lists(
    st.tuples(st.sampled_from(SKILLS), st.integers(0, 6).map(float), st.sampled_from(["", "image", "video"])), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(train=rows, test=rows, seed=st.integers(0, 2**31), validation=st.sampled_from([0.0, 0.4]), easy_first=st.booleans(), data=st.data())
def test_by_skill_each_row_comes_once_in_the_session_of_its_skill(train, test, seed, validation, easy_first, data):
    there = sorted({skill for skill, *_ in train})
    sessions = data.draw(st.integers(1, len(there)) | st.none())
    scenario = opened(Rows(train, test), seed, skills=there, tasks=sessions, validation=validation, easy_first=easy_first)
    tasks = list(scenario)

    assert len(tasks) == (sessions or len(there)) and sorted(skill for task in tasks for skill in task.skills) == there
    if sessions is None:
        assert [task.name for task in tasks] == list(scenario.info.class_names)
    assert sorted(number for task in tasks for number in ids(task.train) + ids(task.validation)) == list(range(len(train)))
    for task, held in zip(tasks, held_out(scenario), strict=True):
        mine = {place for place, (skill, *_) in enumerate(train) if skill in task.skills}
        assert mine == set(ids(task.train) + ids(task.validation))
        assert held == [1000 + place for place, (skill, *_) in enumerate(test) if skill in task.skills]
        batch = whole(task.train)
        assert [task.names[number] for number in batch.target.tolist()] == [train[number][0] for number in batch.ids.tolist()]
        hard = batch.extra["difficulty"].tolist()
        assert task.difficulty == [min(hard), max(hard)] and task.ordered == easy_first
        assert not easy_first or hard == sorted(hard)
        assert (
            task.seen[-len(task.classes) :] == task.classes == tuple(number for number, name in task.names.items() if name in task.skills)
        )
        assert task.shows == Counter(train[number][2] or "none" for number in ids(task.train))
    assert scenario.info.target == "text" and scenario.info.metrics == ("verified",) and scenario.info.classes == len(there)


@settings(max_examples=80, deadline=None)
@given(train=rows, test=rows, seed=st.integers(0, 2**31), sessions=st.integers(1, 5))
def test_the_ladder_goes_from_easy_to_hard_and_equal_rows_stay_together(train, test, seed, sessions):
    test = [row for row in test if row[0] in {skill for skill, *_ in train}] or train
    hard = np.array([row[1] for row in train])
    ranked = np.sort(hard)
    # By hand: the last row of each session if all were different, and everything as easy as it stays in that session.
    last = [ranked[max(0, place * len(train) // sessions - 1)] for place in range(1, sessions)]
    session = np.array([sum(value > bound for bound in last) for value in hard])
    empty = [number + 1 for number in range(sessions) if not (session == number).any()]
    if empty:
        with pytest.raises(
            ConfigError, match=f"no training row for session {', '.join(map(str, empty))}: .*{len(set(hard))} different values"
        ):
            opened(Rows(train, test), seed, by="difficulty", tasks=sessions)
        return
    scenario = opened(Rows(train, test), seed, by="difficulty", tasks=sessions)
    tasks = list(scenario)
    order = [number for task in tasks for number in ids(task.train)]
    assert sorted(order) == list(range(len(train))) and hard[order].tolist() == ranked.tolist()
    assert [len(task.train) for task in tasks] == np.bincount(session).tolist() and all(task.ordered for task in tasks)
    assert {number: place for place, task in enumerate(tasks) for number in ids(task.train)} == dict(enumerate(session.tolist()))
    starts = [hard[session == number].min() for number in range(sessions)]
    for number, held in enumerate(held_out(scenario)):
        assert held == [1000 + place for place, row in enumerate(test) if sum(row[1] >= start for start in starts[1:]) == number]


def test_bounds_cut_where_they_say_and_complexity_breaks_ties():
    train = [("count", 0.7), ("read", 0.1), ("sort", 0.3), ("count", 0.3), ("read", 0.3), ("sort", 1.0)]
    test = [("count", 0.29), ("read", 0.3), ("read", 0.7), ("sort", 0.69)]
    scenario = opened(Rows(train, test, complexity=[5, 5, 9, 7, 8, 5]), by="difficulty", bounds=[0.3, 0.7])
    assert [ids(task.train) for task in scenario] == [[1], [3, 4, 2], [0, 5]]
    assert held_out(scenario) == [[1000], [1001, 1003], [1002]]
    assert [task.name for task in scenario.past()] == ["difficulty below 0.3", "difficulty from 0.3 to below 0.7", "difficulty from 0.7"]
    with pytest.raises(ConfigError, match=r"no training row for session 2 \(from 0.4 to below 0.6\)"):
        opened(Rows(train, test), by="difficulty", bounds=[0.4, 0.6])


def test_a_skill_that_a_pool_is_too_small_for_is_scored_all_the_same():
    scenario = opened(Rows([("count", 1.0), ("read", 1.0)]), by="pool", pools=[{"count": 2, "read": 1}], size=1)
    (task,) = scenario
    assert (task.skills, task.seen, sorted(scenario.test(task, task).targets.tolist())) == (["count"], (0, 1), [0])
    (kept,) = held_out(opened(Rows([("count", 1.0), ("read", 1.0)]), by="pool", pools=[{"count": 1, "read": 1}], size=1))
    assert kept == [1000, 1001]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(4, 200), sessions=st.integers(1, 4), smooth=st.floats(0.01, 1), seed=st.integers(0, 2**31))
def test_smoothing_moves_rows_a_bounded_way_and_loses_none(count, sessions, smooth, seed):
    source = Rows([("count", float(place)) for place in range(count)])
    plain, smoothed = (list(opened(source, seed, by="difficulty", tasks=sessions, smooth=way)) for way in (0.0, smooth))
    assert [len(task.train) for task in plain] == [len(task.train) for task in smoothed]
    order = [number for task in smoothed for number in ids(task.train)]
    assert sorted(order) == [number for task in plain for number in ids(task.train)] == list(range(count))
    # Two rows can change places only if both ways together reach across: no row is farther off than twice its way.
    assert max(abs(place - number) for place, number in enumerate(order)) <= 2 * smooth * count / sessions
    assert count < 100 or smooth * count / sessions < 5 or order != list(range(count))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_pools_have_their_weights_and_no_row_twice(data, seed):
    train = data.draw(rows)
    test = data.draw(rows)
    have, held = Counter(row[0] for row in train), Counter(row[0] for row in test)
    pools = data.draw(st.lists(st.dictionaries(st.sampled_from(SKILLS), st.integers(1, 3), min_size=1), min_size=1, max_size=3))
    size = data.draw(st.integers(1, 12))
    asked = Counter()
    for pool in pools:
        exact = {skill: size * pool.get(skill, 0) / sum(pool.values()) for skill in SKILLS}
        whole_part = {skill: int(value + 1e-9) for skill, value in exact.items()}
        rest = sorted(SKILLS, key=lambda skill: whole_part[skill] - exact[skill])[: size - sum(whole_part.values())]
        asked.update({skill: whole_part[skill] + (skill in rest) for skill in SKILLS})
    if any(asked[skill] > have[skill] for skill in SKILLS):
        with pytest.raises(ConfigError, match=r"pool \d asks for \d+ rows of .* left of \d+"):
            opened(Rows(train, test), seed, by="pool", pools=pools, size=size)
        return
    scenario = opened(Rows(train, test), seed, by="pool", pools=pools, size=size)
    tasks = list(scenario)
    drawn = [number for task in tasks for number in ids(task.train)]
    assert len(drawn) == len(set(drawn)) == size * len(pools) == sum(asked.values())
    assert Counter(train[number][0] for number in drawn) == +asked
    for pool, task, kept in zip(pools, tasks, held_out(scenario), strict=True):
        given_ = Counter(train[number][0] for number in ids(task.train))
        total = sum(pool.values())
        assert all(abs(given_[skill] - size * pool.get(skill, 0) / total) < 1 for skill in SKILLS)
        found = Counter(test[number - 1000][0] for number in kept)
        assert len(kept) == len(set(kept)) and all(abs(found[skill] - len(kept) * pool.get(skill, 0) / total) < 1 for skill in SKILLS)
        assert all(found[skill] <= held[skill] for skill in SKILLS)
        # As many as there can be: with another row's worth of each weight, some skill has too few.
        assert any((len(kept) + total) * weight / total > held[skill] for skill, weight in pool.items())


@settings(max_examples=40, deadline=None)
@given(
    train=rows,
    seed=st.integers(0, 2**31),
    shares=st.dictionaries(st.sampled_from(["none", "image", "video"]), st.integers(1, 4), min_size=1),
)
def test_a_mix_holds_in_every_session_and_takes_as_many_rows_as_it_can(train, seed, shares):
    have = Counter(row[2] or "none" for row in train)
    if any(not have[kind] for kind in shares):
        with pytest.raises(ConfigError, match=r"mix asks for rows with .* has none"):
            opened(Rows(train), seed, by="difficulty", tasks=1, mix=shares)
        return
    (task,) = opened(Rows(train), seed, by="difficulty", tasks=1, mix=shares)
    found, total = Counter(train[number][2] or "none" for number in ids(task.train)), sum(shares.values())
    assert len(set(ids(task.train))) == len(task.train) and task.shows == found
    assert all(abs(found[kind] - len(task.train) * shares.get(kind, 0) / total) < 1 for kind in ("none", "image", "video"))
    assert any((len(task.train) + total) * share / total > have[kind] for kind, share in shares.items())
    hard = [train[number][1] for number in ids(task.train)]
    assert hard == sorted(hard)


def test_a_mix_in_a_pool_counts_within_each_skill():
    train = [(skill, 1.0, kind) for skill in SKILLS for kind in ("", "image", "video") for _ in range(10)]
    (task,) = opened(Rows(train), by="pool", pools=[{"count": 1, "sort": 2}], size=18, mix={"image": 1, "none": 2})
    assert Counter(train[number][::2] for number in ids(task.train)) == {
        ("count", "image"): 2, ("count", ""): 4, ("sort", "image"): 4, ("sort", ""): 8,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="asks for 12 rows of sort with frames and 10 are left of 10"):
        opened(Rows(train), by="pool", pools=[{"sort": 1}], size=12, mix={"video": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"by": "skill", "validation": 0.2},
        {"by": "difficulty", "tasks": 3, "smooth": 0.3},
        {"by": "pool", "pools": [{"maze": 1}, {"maze": 1, "order": 2}], "size": 15},
    ],
    ids=["skill", "difficulty", "pool"],
)
def test_the_same_seed_gives_the_same_stream_and_another_seed_another(options):
    def stream(seed, workers):
        scenario = opened(Puzzles(count=30, test=6, workers=workers), seed, **options)
        parts = [part for task in scenario for part in (task.train, task.validation, scenario.test(task, task)) if part is not None]
        return [batch for part in parts for batch in part.batches(8)]

    first, other = stream(5, 0), stream(6, 0)
    again = stream(5, 2 if options["by"] == "skill" else 0)  # other processes are slow to start
    assert len(first) == len(again)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.ids, two.ids) and torch.equal(one.target, two.target) and one.inputs["text"] == two.inputs["text"]
        assert all(torch.equal(one.inputs[name], two.inputs[name]) for name in ("image", "video"))
    assert [batch.ids.tolist() for batch in first] != [batch.ids.tolist() for batch in other]


def test_the_stream_goes_on_where_it_was_saved():
    scenario, restored = (opened(Puzzles(count=10, test=2), 4, easy_first=True) for _ in range(2))
    passed = [next(iter(scenario)), next(iter(scenario))]
    restored.restore(scenario.state())
    assert [ids(task.train) for task in restored.past()] == [ids(task.train) for task in passed]
    assert [(task.index, ids(task.train)) for task in restored] == [(task.index, ids(task.train)) for task in scenario]


def test_a_test_set_holds_no_row_that_is_trained_on():
    scenario = opened(Puzzles(count=20, test=8), by="difficulty", tasks=5)
    trained = {number for task in scenario for number in ids(task.train)}
    assert not trained & {number for held in held_out(scenario) for number in held}
    assert [task.difficulty for task in scenario.past()] == [[level, level] for level in (1.0, 2.0, 3.0, 4.0, 5.0)]
    for level, held in enumerate(held_out(scenario), 1):
        assert len(held) == sum(place % 5 + 1 == level for place in range(8)) * 6


def test_skills_are_numbered_as_they_arrive():
    pools = [{"sort": 1}, {"count": 1, "sort": 1}, {"read": 1}]
    scenario = opened(Rows([(skill, 1.0) for skill in SKILLS for _ in range(4)]), by="pool", pools=pools, size=2)
    assert scenario.info.class_names == ("sort", "count", "read")
    assert [(task.classes, task.labels, task.seen) for task in scenario] == [
        ((0,), (0,), (0,)),
        ((1,), (0, 1), (0, 1)),
        ((2,), (2,), (0, 1, 2)),
    ]


def test_an_order_that_is_given_is_kept():
    source = Rows([(skill, 1.0) for skill in SKILLS])
    assert [task.name for task in opened(source, order=["sort", "count", "read"])] == ["sort", "count", "read"]
    assert [task.name for task in opened(source, 7, order="given")] == SKILLS
    orders = {tuple(task.name for task in opened(source, seed)) for seed in range(60)}
    assert len(orders) == 6  # the seed's order is any order


def test_many_rows_are_divided_without_touching_each():
    names = [f"skill {number}" for number in range(1000)]
    source = Rows([(name, float(place)) for place, name in enumerate(names)], names=names)
    scenario = opened(source, by="difficulty", tasks=1000)
    assert [ids(task.train) for task in scenario] == [[place] for place in range(1000)]


PLAIN = [("count", 1.0), ("read", 2.0), ("sort", 3.0)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"by": "difficulty"}, "needs either tasks"),
        ({"by": "difficulty", "tasks": 2, "bounds": [1.0]}, "and not both"),
        ({"by": "difficulty", "bounds": [2.0, 1.0]}, "difficulties that grow"),
        ({"bounds": [2.0]}, "bounds belongs to by: difficulty, and by is skill"),
        ({"by": "pool", "smooth": 0.5}, "smooth belongs to by: difficulty"),
        ({"by": "difficulty", "tasks": 2, "order": "given"}, "order belongs to by: skill"),
        ({"by": "pool", "size": 3}, "needs pools"),
        ({"by": "pool", "pools": [{"read": 1.0}]}, "and size"),
        ({"by": "pool", "pools": [{"read": 1.0}], "size": 1, "tasks": 2}, "leave out tasks"),
        ({"by": "pool", "pools": [{"read": 1.0}, {"read": 0.0}], "size": 1}, "pool 2 is .* weights above 0"),
        ({"mix": {"image": -1.0}}, "mix is .* weights above 0"),
        ({"skills": ["reed"]}, "skills names 'reed': did you mean 'read'"),
        ({"skills": ["zzz"]}, "the source has count, read, sort"),
        ({"by": "pool", "pools": [{"xyz": 1.0}], "size": 1}, "pool 1 names 'xyz'"),
        ({"by": "pool", "pools": [{"read": 1.0}], "size": 2}, "pool 1 asks for 2 rows of read and 1 are left of 1"),
        ({"order": ["count", "read"]}, "list every skill of the stream once"),
        ({"tasks": 4}, "tasks is 4 and there are only 3 skills"),
        ({"by": "difficulty", "tasks": 4}, "no training row for session"),
        ({"mix": {"video": 1.0}}, "mix asks for rows with frames, and session"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_trained(options, told):
    with pytest.raises(ConfigError, match=told):
        opened(Rows(PLAIN), **options)


@pytest.mark.parametrize(
    ("source", "options", "error", "told"),
    [
        (Rows(PLAIN, test=[]), {}, ConfigError, "has no test set"),
        (Rows(PLAIN[:2], PLAIN), {"by": "difficulty", "tasks": 1}, ConfigError, "no training row of sort, and the test set has some"),
        (Rows(PLAIN[:2]), {"skills": SKILLS}, ConfigError, "no training row of sort"),
        (Rows(PLAIN, difficulty=None), {"by": "difficulty", "tasks": 2}, ConfigError, "rows have no difficulty"),
        (
            Rows([*PLAIN, ("read", float("nan"))]),
            {"by": "difficulty", "tasks": 2},
            DataError,
            r"1 training rows have no difficulty .*rows 3\)",
        ),
        (Rows(PLAIN, answer=["yes", " ", ""]), {}, DataError, r"2 training rows have no answer \(rows 1, 2\)"),
        (Rows(PLAIN, verifier=None), {}, ConfigError, "rows name no verifier"),
        (Rows(PLAIN, verifier=["text", "numbr", "text"]), {}, ConfigError, "did you mean 'number'"),
    ],
)
def test_rows_that_cannot_be_used_are_told(source, options, error, told):
    with pytest.raises(error, match=told):
        opened(source, **options)


def test_classes_are_no_answers_in_words():
    class Classes(Rows):
        def load(self):
            return replace(super().load(), target="class")

    with pytest.raises(ConfigError, match="needs answers in words"):
        opened(Classes(PLAIN))
