"""The puzzles: every answer is read off the pixels anew, the test pictures are held out, and no answer is a better guess than another."""

from collections import Counter
from itertools import pairwise
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label
from streamcl.scenarios.sources.puzzles import Puzzles

from streamcl.data import whole
from streamcl.errors import ConfigError
from streamcl.plugins import find

SIX = ["counting", "comparing", "spatial", "chart", "maze", "order"]
PAINT = {
    (214, 39, 40): "red",
    (34, 139, 60): "green",
    (50, 90, 220): "blue",
    (240, 190, 0): "yellow",
    (150, 70, 190): "purple",
    (25, 25, 25): "black",
}
BOTH = pytest.mark.parametrize("colours", [True, False], ids=["colours", "grey"])


def rows(skill, part="train", **options):
    loaded = Puzzles(**{"skills": [skill], "count": 60, "test": 60, **options}).load()
    return whole(getattr(loaded, part))


def things(picture):
    """What lies on white paper, found as connected regions of one colour: (colour, shape, row, column) of each."""
    pixels = picture.permute(1, 2, 0).numpy().astype(int)
    found = []
    for paint in np.unique(pixels[(pixels != 255).any(axis=2)], axis=0):
        regions, count = label((pixels == paint).all(axis=2), structure=np.ones((3, 3)))
        for number in range(1, count + 1):
            down, across = np.nonzero(regions == number)
            top, left = down.min(), across.min()
            box = regions[top : down.max() + 1, left : across.max() + 1] == number
            found.append((PAINT.get(tuple(paint.tolist()), "grey"), shape_of(box), (top + down.max()) / 2, (left + across.max()) / 2))
    return found


def shape_of(box):
    """A square is full, a ring has an empty centre, a cross has empty corners, and a triangle has its lower ones."""
    if box.all():
        return "square"
    height, width = box.shape
    if not box[height // 2, width // 2]:
        return "ring"
    return "triangle" if box[-1, 0] and box[-1, -1] else "cross"


def matching(found, words):
    """How many things the words fit: `red squares`, `blue things`, `rings`, `things`."""
    plural = {"squares": "square", "rings": "ring", "triangles": "triangle", "crosses": "cross"}
    wanted = words.split()
    colours = [word for word in wanted if word in PAINT.values()]
    shapes = [plural[word] for word in wanted if word in plural]
    return sum((not colours or colour in colours) and (not shapes or shape in shapes) for colour, shape, *_ in found)


def count(question, picture):
    told = question.removeprefix("How many ").removeprefix("Count the ").removeprefix("What is the number of ")
    return str(matching(things(picture), told.split(" are there")[0].split(" do you")[0].split(" in the")[0].rstrip(".")))


def compare(choices, picture):
    first, second, equal = choices.split("\n")
    one, other = (matching(things(picture), name) for name in (first, second))
    return equal if one == other else first if one > other else second


def direction(question, picture):
    words = question.replace(",", "").replace(":", "").replace(".", "").split()
    found, named = things(picture), []
    for place, word in enumerate(words):
        if word in {"square", "ring", "triangle", "cross"}:
            colour = words[place - 1] if words[place - 1] in PAINT.values() else None
            (where,) = [(down, across) for paint, shape, down, across in found if shape == word and colour in (None, paint)]
            named.append(where)
    (down, across), (seen_down, seen_across) = named if question.startswith("Where") else named[::-1]
    upright = "above" if down < seen_down else "below" if down > seen_down else ""
    return f"{upright} {'left' if across < seen_across else 'right' if across > seen_across else ''}".strip()


def walk(question, picture):
    """The mazes: cells are regions of one tint; two of them are neighbours where they touch."""
    pixels = picture.permute(1, 2, 0).numpy().astype(int)
    wall = (pixels == 0).all(axis=2)
    marked = [np.argwhere((pixels == paint).all(axis=2)) for paint in ((34, 139, 60), (214, 39, 40))]
    grey, count = label((pixels == 120).all(axis=2))
    assert count in (0, 2)
    ends = [np.argwhere(grey == number)[0] for number in (1, 2)] if count else [places[0] for places in marked]
    if question.startswith(("Is", "Can")):
        open_regions = label(~wall)[0]
        return "yes" if open_regions[tuple(ends[0])] == open_regions[tuple(ends[1])] else "no"
    cells = np.zeros(wall.shape, dtype=int)
    for tint in np.unique(pixels[~wall], axis=0):
        regions, _ = label((pixels == tint).all(axis=2))
        cells += np.where(regions > 0, regions + cells.max(), 0)
    steps, edge = {cells[tuple(ends[0])]: 0}, [cells[tuple(ends[0])]]
    touching = {
        (int(a), int(b))
        for one, other in ((cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:]))
        for a, b in [*zip(one.ravel(), other.ravel(), strict=True), *zip(other.ravel(), one.ravel(), strict=True)]
        if a and b and a != b
    }
    while edge:
        here = edge.pop(0)
        for a, b in touching:
            if a == here and b not in steps:
                steps[b] = steps[here] + 1
                edge.append(b)
    return str(steps[cells[tuple(ends[1])]])


def read_chart(question, picture):
    """Bars from left to right: a bar's height is the number of lines that its top reaches, counted from the ground."""
    pixels = picture.permute(1, 2, 0).numpy().astype(int)
    lines = np.flatnonzero((pixels == 200).all(axis=2)[:, 0])[::-1]
    bars = (~((pixels == 255) | (pixels == 200)).all(axis=2))[:-1]  # without the ground
    starts, number = label(bars.any(axis=0))
    bar = {}
    for place in range(1, number + 1):
        down, across = np.argwhere(bars & (starts == place))[0]
        name = PAINT.get(tuple(pixels[down, across].tolist()), ["first", "second", "third", "fourth"][place - 1])
        bar[name] = 1 + int(np.flatnonzero(lines == down)[0])
    if "tallest" in question or "highest" in question:
        return max(bar, key=bar.__getitem__)
    if "shortest" in question or "lowest" in question:
        return min(bar, key=bar.__getitem__)
    asked = [bar[word] for word in question.replace(",", "").split() if word in bar]
    return str(sum(asked) if "together" in question or "sum" in question else asked[0] - asked[1] if len(asked) > 1 else asked[0])


def watch(question, frames):
    """Frames one after another; works for any order of them."""
    seen = [found for (found,) in map(things, frames)]
    if "appear" in question:
        return ", ".join(dict.fromkeys(colour if "colours" in question else shape for colour, shape, *_ in seen))
    steps = []
    for (*_, down, across), (*_, next_down, next_across) in pairwise(seen):
        assert (down == next_down) != (across == next_across)
        steps.append("left" if next_across < across else "right" if next_across > across else "up" if next_down < down else "down")
    return ", ".join(steps) if "moves" in question else steps[0]


SOLVERS = {"counting": count, "comparing": compare, "spatial": direction, "chart": read_chart, "maze": walk, "order": watch}


@BOTH
@pytest.mark.parametrize("size", [24, 37, 64])
@pytest.mark.parametrize("skill", SIX)
def test_every_answer_can_be_read_off_the_pixels(skill, size, colours):
    for part in ("train", "test"):
        batch = rows(skill, part, size=size, colours=colours, made_with=size)
        shown = batch.inputs["video" if skill == "order" else "image"]
        told = batch.extra["choices"] if skill == "comparing" else batch.inputs["text"]
        answers = [SOLVERS[skill](question, picture) for question, picture in zip(told, shown, strict=True)]
        assert answers == batch.extra["answer"]


@BOTH
def test_frames_played_backwards_have_another_answer(colours):
    batch = rows("order", count=300, colours=colours)
    for question, frames, answer in zip(batch.inputs["text"], batch.inputs["video"], batch.extra["answer"], strict=True):
        assert watch(question, frames) == answer != watch(question, frames.flip(0))


@settings(max_examples=25, deadline=None)
@given(
    skill=st.sampled_from(SIX),
    colours=st.booleans(),
    level=st.integers(1, 5),
    made_with=st.integers(0, 2**40),
    other=st.integers(0, 2**40),
)
def test_no_picture_of_the_test_set_is_trained_on_with_any_seed(skill, colours, level, made_with, other):
    options = {"colours": colours, "difficulty": (level, level), "size": 24, "count": 200, "test": 100}
    column = "video" if skill == "order" else "image"
    train = {picture.numpy().tobytes() for picture in rows(skill, made_with=made_with, **options).inputs[column]}
    test = {picture.numpy().tobytes() for picture in rows(skill, "test", made_with=other, **options).inputs[column]}
    assert train and test and not train & test


def test_no_numbers_behind_a_picture_are_in_both_splits():
    """The same at a scale where pictures would be slow: the scenes determine the picture, and with the question the answer."""
    loaded = Puzzles(count=4000, test=1000).load()
    for trained, held in zip(loaded.train.decode.pages, loaded.test.decode.pages, strict=True):
        seen, kept = ({scene.tobytes() for scene in page.scene} for page in (trained, held))
        assert not seen & kept
        answers = {}
        for scene, asked in zip(trained.scene, trained.asked, strict=True):
            answers.setdefault(scene.tobytes(), set()).add(asked.tobytes())
        assert len(answers) > 400  # and there is much to learn from


def bounds(trials, chance):
    """The most and fewest successes that chance allows but for one time in a million on each side."""
    term, below, low, high = (1 - chance) ** trials if trials < 500 else None, 0.0, None, None
    if term is None:  # the normal law: 4.9 standard deviations
        spread = 4.9 * (trials * chance * (1 - chance)) ** 0.5
        return trials * chance - spread, trials * chance + spread
    for successes in range(trials + 1):
        below += comb(trials, successes) * chance**successes * (1 - chance) ** (trials - successes)
        if low is None and below > 1e-6:
            low = successes
        if high is None and below > 1 - 1e-6:
            high = successes
    return low, trials if high is None else high


@BOTH
@pytest.mark.parametrize("skill", SIX)
@pytest.mark.parametrize("part", ["train", "test"])
def test_no_answer_is_a_better_guess_than_another(skill, part, colours):
    ways = {  # how many answers there are at each level
        "counting": [6] * 5,
        "spatial": [4, 4, 4, 8, 8],
        "chart": [None, None, 6, 5, 9],
        "maze": [2, 2, 2, 6, 8],
        "order": [4, 4, None, None, 16],
    }
    loaded = Puzzles(skills=[skill], count=5000, test=2500, colours=colours).load()
    data = getattr(loaded, part)
    extra = data.extra
    for level in range(1, 6):
        mine = [place for place, hard in enumerate(extra["difficulty"].tolist()) if hard == level]
        offered = {extra["choices"][place].count("\n") + 1 for place in mine}
        if offered != {1}:  # the place among the choices
            (number,) = offered
            given = Counter(extra["choices"][place].split("\n").index(extra["answer"][place]) for place in mine)
            low, high = bounds(len(mine), 1 / number)
            assert all(low <= given[place] <= high for place in range(number)), (level, given)
        if number := ways.get(skill, [None] * 5)[level - 1]:
            given = Counter(extra["answer"][place] for place in mine)
            low, high = bounds(len(mine), 1 / number)
            assert len(given) == number and all(low <= times <= high for times in given.values()), (level, given)


def test_the_order_of_what_appears_is_any_order():
    answers = Counter(Puzzles(skills=["order"], difficulty=(4, 4), count=7200, colours=False).load().train.extra["answer"])
    low, high = bounds(7200, 1 / 24)
    assert len(answers) == 24 and all(low <= times <= high for times in answers.values())


@BOTH
def test_each_verifier_accepts_the_answer_and_no_other(colours):
    loaded = Puzzles(count=50, test=1, colours=colours).load()
    extra = loaded.train.extra
    for name in set(extra["verifier"]):
        mine = [place for place, verifier in enumerate(extra["verifier"]) if verifier == name]
        columns = {key: [extra[key][place] for place in mine] for key in ("answer", "choices")}
        verifier = find("verifier", name).load()()
        assert verifier(columns["answer"], columns).tolist() == [1.0] * len(mine)
        assert verifier([f"<answer>{answer}</answer>" for answer in columns["answer"]], columns).tolist() == [1.0] * len(mine)
        others = [
            next(other for other in columns["answer"] if other != answer)
            if not choices
            else next(other for other in choices.split("\n") if other != answer)
            for answer, choices in zip(columns["answer"], columns["choices"], strict=True)
        ]
        assert verifier(others, columns).tolist() == [0.0] * len(mine)


def test_a_row_is_the_same_whatever_is_asked_for_beside_it():
    every = Puzzles(count=70, test=20).load()
    few = Puzzles(skills=["maze", "order"], count=30, test=10).load()
    for part in ("train", "test"):
        large, small = whole(getattr(every, part)), whole(getattr(few, part))
        place = {number: position for position, number in enumerate(large.ids.tolist())}
        found = large[[place[number] for number in small.ids.tolist()]]
        assert len(set(large.ids.tolist())) == len(large)
        for name in ("image", "video"):
            assert torch.equal(found.inputs[name], small.inputs[name])
            assert torch.equal(found.present[name], small.present[name])
        assert found.inputs["text"] == small.inputs["text"]
        assert {name: list(column) for name, column in found.extra.items()} == {name: list(column) for name, column in small.extra.items()}


def test_rows_do_not_depend_on_how_they_are_read():
    data = Puzzles(count=20, test=1).load().train
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(3))
    together, workers = data[order], Puzzles(count=20, test=1, workers=2).load().train
    for size, dataset in ((1, data), (7, data), (50, workers)):
        pieces = list(dataset.read(order, size))
        assert [text for piece in pieces for text in piece.inputs["text"]] == together.inputs["text"]
        for name in ("image", "video"):
            assert torch.equal(torch.cat([piece.inputs[name] for piece in pieces]), together.inputs[name])
    assert not torch.equal(Puzzles(count=20, test=1, made_with=1).load().train[order].inputs["image"], together.inputs["image"])


@settings(max_examples=20, deadline=None)
@given(weights=st.dictionaries(st.sampled_from(SIX), st.floats(0.5, 5), min_size=1), count=st.integers(12, 40), size=st.integers(24, 70))
def test_shapes_counts_and_levels(weights, count, size):
    loaded = Puzzles(skills=weights, count=count, test=7, size=size, difficulty=(2, 4)).load()
    train = whole(loaded.train)
    shown = {"order": "video"}
    assert len(train) == count * len(weights) and len(loaded.test) == 7 * len(weights)
    for number, (name, weight) in enumerate(weights.items()):
        mine = (train.target == number).nonzero().squeeze(1).tolist()
        assert loaded.class_names[number] == name and {train.extra["skill"][place] for place in mine} == {name}
        assert abs(len(mine) - count * len(weights) * weight / sum(weights.values())) <= 1
        assert train.extra["difficulty"][mine].tolist() == [2.0 + place % 3 for place in range(len(mine))]
        for modality in {"image", "video"} & set(train.inputs):
            has = shown.get(name, "image") == modality
            assert train.present is None or train.present[modality][mine].tolist() == [has] * len(mine)
            assert bool((train.inputs[modality][mine].flatten(1) > 0).any(1).all() if has else (train.inputs[modality][mine] == 0).all())
    for name, values in train.inputs.items():
        if name != "text":
            assert values.dtype == torch.uint8 and values.shape[1:] == loaded.modalities[name].shape
            assert values.shape[-3:] == (3, size, size)
    assert set(train.inputs) == set(loaded.modalities)


def test_there_are_several_ways_to_ask_and_the_wording_is_filled_in():
    batch = whole(Puzzles(count=400, test=1).load().train)
    for skill in SIX:
        begins = {text.split()[0] for text, own in zip(batch.inputs["text"], batch.extra["skill"], strict=True) if own == skill}
        assert len(begins) > 1
    assert not any("{" in text for text in batch.inputs["text"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"skills": ["countin"]}, "skills names 'countin': did you mean 'counting'"),
        ({"skills": []}, "name at least one skill"),
        ({"skills": ["maze", "maze"]}, "each once"),
        ({"skills": {"maze": 0.0}}, "above 0"),
        ({"difficulty": (0, 3)}, "from 1 to 5"),
        ({"difficulty": (4, 3)}, "from 1 to 5"),
        ({"size": 23}, "below 24 pixels"),
        ({"count": 10**9}, "at most 999999999"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(options, told):
    with pytest.raises(ConfigError, match=told):
        Puzzles(**options)


def test_a_weight_that_leaves_a_skill_nothing_is_refused():
    with pytest.raises(ConfigError, match="the weight of chart leaves it no row"):
        Puzzles(skills={"maze": 100, "chart": 0.1}, count=10).load()
