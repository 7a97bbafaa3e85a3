"""What can be said and asked about scenes of digits, all of it true by construction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._drawn import Draws
from ._scenes import COLOURS, SIDE, Layout

POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
KINDS = ("count", "sum", "largest", "present", "position")
VERIFIERS = ("number", "number", "number", "choice", "choice")  # of each kind
_SIZES = {1: ("",), 2: ("small ", "large "), 3: ("small ", "medium-sized ", "large ")}


def positions(layout: Layout, size: int) -> np.ndarray:
    """The number in POSITIONS of each digit's centre, by thirds of the canvas  # int64 (scenes, places)"""
    half = SIDE * layout.scale.astype(np.int64) / 2
    row, column = ((edge + half) * 3 // size for edge in (layout.y, layout.x))
    return np.where(layout.used, row * 3 + column, -1).astype(np.int64)


def captions(layout: Layout, size: int, scale: int, domains: list[str]) -> list[str]:
    """A sentence for each scene that names every digit, in the order in which one reads."""
    sizes = _SIZES.get(scale) or tuple(f"{factor}-fold " for factor in range(1, scale + 1))
    colours = ["", *(f"{name} " for name in COLOURS)]
    places = [f"{'in' if name == 'centre' else 'at'} the {name}" for name in POSITIONS]
    phrases = np.array(
        [
            f"{_article(f'{size_}{colour}{digit}')} {size_}{colour}{digit} {place}"
            for size_ in sizes
            for colour in colours
            for digit in range(10)
            for place in places
        ],
        dtype=object,
    )
    coloured = np.array([name == "coloured" for name in domains])[layout.domain]
    colour = np.where(coloured[:, None], layout.colour.astype(np.int64) + 1, 0)
    where = positions(layout, size)
    phrase = (((layout.scale.astype(np.int64) - 1) * len(colours) + colour) * 10 + layout.classes) * len(places) + where
    order = np.where(layout.used, where * len(phrases) + phrase, np.iinfo(np.int64).max).argsort(axis=1, kind="stable")
    words = phrases[np.take_along_axis(np.where(layout.used, phrase, 0), order, axis=1)].tolist()
    return [_listed(row[:count]) for row, count in zip(words, layout.used.sum(axis=1).tolist(), strict=True)]


def _listed(phrases: list[str]) -> str:
    text = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return f"{text[0].upper()}{text[1:]}."


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou8" else "a"


@dataclass
class Dialogues:
    """A question about each scene, with what an answer is checked against."""

    questions: list[str]
    answers: list[str]
    verifiers: list[str]
    choices: list[str]
    difficulty: np.ndarray  # float32 (scenes,)


def dialogues(draws: Draws, rows: np.ndarray, layout: Layout, kind: np.ndarray, size: int) -> Dialogues:
    """`kind` is the number in KINDS of each scene's question; the scenes asked for a position must repeat no class."""
    used, classes = layout.used, layout.classes.astype(np.int64)
    count = used.sum(axis=1)
    total = np.where(used, classes, 0).sum(axis=1)
    held = np.zeros((len(rows), 11), dtype=bool)
    np.put_along_axis(held, np.where(used, classes, 10), True, axis=1)  # column 10 takes the empty places
    held = held[:, :10]

    place = draws.whole(rows, "asked", 1, count[:, None])  # one of the digits that are there
    shown = np.take_along_axis(classes, place, axis=1)[:, 0]
    yes = (draws.uniform(rows, "yes", 1)[:, 0] < 0.5) | held.all(axis=1)
    absent = np.where(held, 2.0, draws.uniform(rows, "absent", 10)).argmin(axis=1)
    asked = np.where(yes, shown, absent)
    where = np.take_along_axis(positions(layout, size), place, axis=1)[:, 0]

    numbers = np.array([str(number) for number in range(9 * classes.shape[1] + 1)], dtype=object)
    named = np.array(["a 0", *(f"{_article(str(digit))} {digit}" for digit in range(1, 10))], dtype=object)
    present = np.array([f"Is there {name} in the picture?" for name in named], dtype=object)
    located = np.array([f"In which part of the picture is the {digit}?" for digit in range(10)], dtype=object)
    plain = ("How many digits are in the picture?", "What is the sum of the digits?", "What is the largest value among the digits?")
    questions = np.select(
        [kind == 0, kind == 1, kind == 2, kind == 3],
        [*(np.full(len(rows), text, object) for text in plain), present[asked]],
        located[shown],
    )
    answers = np.select(
        [kind == 0, kind == 1, kind == 2, kind == 3],
        [numbers[count], numbers[total], numbers[classes.max(axis=1)], np.where(yes, "yes", "no").astype(object)],
        np.array(POSITIONS, dtype=object)[where],
    )
    of_kind = np.array(["", "", "", "yes\nno", "\n".join(POSITIONS)], dtype=object)
    return Dialogues(
        questions.tolist(),
        answers.tolist(),
        np.array(VERIFIERS, dtype=object)[kind].tolist(),
        of_kind[kind].tolist(),
        np.where(kind == 1, 2 * count - 1, count).astype(np.float32),
    )
