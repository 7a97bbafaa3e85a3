"""Where one thing is, seen from another: left, right, above, below; from level 4 on also between these.

Other things stand in the way, more of them from level to level; at level 5 they share the colour or the shape of the two.
"""

from __future__ import annotations

import numpy as np

from .dice import Dice, Numbers
from .skill import Drawn, Skill, asking, everywhere
from .things import COLOURS, PLACES, SHAPES, SIDE, Picture, Words, draw_grid, thing

DIRECTIONS: Words = np.array(["left", "right", "above", "below", "above left", "above right", "below left", "below right"], dtype=object)
STEP = np.array([[-1, 0], [1, 0], [0, -1], [0, 1], [-1, -1], [1, -1], [-1, 1], [1, 1]])  # across, down
OTHERS = np.array([0, 3, 6, 3, 8])  # by level
FOUR, EIGHT = "\n".join(DIRECTIONS[:4]), "\n".join(DIRECTIONS)
TEMPLATES = (
    "Where is the {0}, seen from the {1}: {2}?",
    "Seen from the {1}, is the {0} {2}?",
    "Look from the {1} to the {0}. Which way is it: {2}?",
)


class Spatial(Skill):
    name = "spatial"
    columns = PLACES, 4

    def throw(self, dice: Dice, level: Numbers, colours: bool) -> Drawn:
        answer = dice.once(np.where(level >= 4, 8, 4))
        reach = 1 + dice.many(SIDE - 1, 2)  # how far across and down
        away = STEP[answer] * reach  # (rows, 2)
        room = SIDE - np.abs(away)
        start = np.stack([dice.below(room[:, 0]), dice.below(room[:, 1])], axis=1) + np.maximum(-away, 0)
        place_from, place_of = start[:, 1] * SIDE + start[:, 0], (start + away)[:, 1] * SIDE + (start + away)[:, 0]

        colour, shape = dice.orders(len(COLOURS))[:, :2], dice.orders(len(SHAPES))
        other_shape = dice.many(len(SHAPES), PLACES)
        if colours:
            hard = (level == 5)[:, None]
            shared = dice.many(2, PLACES)  # which of the two another thing is like: in colour, or else in shape
            like, turn = dice.many(2, PLACES) == 1, 1 + dice.many(len(SHAPES) - 1, PLACES)
            unlike = _beside(colour, dice.many(len(COLOURS) - 2, PLACES))  # neither of the two colours
            kind_colour, kind_shape = np.take_along_axis(colour, shared, axis=1), np.take_along_axis(shape, shared, axis=1)
            drawn_colour = np.where(hard & like, kind_colour, unlike)
            drawn_shape = np.where(hard, np.where(like, (kind_shape + turn) % len(SHAPES), kind_shape), other_shape)
        else:
            colour = np.zeros_like(colour)
            drawn_colour = np.zeros_like(other_shape)
            drawn_shape = np.take_along_axis(shape, 2 + other_shape % (len(SHAPES) - 2), axis=1)
        two = thing(colour, shape[:, :2])
        rank = dice.orders(PLACES).astype(np.float64)
        rows = np.arange(len(answer))
        rank[rows, place_from] = rank[rows, place_of] = np.inf
        other = rank.argsort(axis=1).argsort(axis=1) < OTHERS[level - 1][:, None]
        scene = np.where(other, thing(drawn_colour, drawn_shape), 0)
        scene[rows, place_of], scene[rows, place_from] = two[:, 0], two[:, 1]
        return Drawn(scene, np.concatenate([answer[:, None], two, (level >= 4)[:, None]], axis=1))

    def draw(self, scene: Numbers, size: int, colours: bool) -> Picture:
        return draw_grid(scene, size, colours)

    def questions(self, asked: Numbers, wording: Numbers, colours: bool) -> list[str]:
        ways = [_listed(DIRECTIONS[:4]), _listed(DIRECTIONS)]
        rows = zip(asked.tolist(), wording.tolist(), strict=True)
        return [
            asking(TEMPLATES, number, _called(of, colours), _called(seen, colours), ways[eight]) for (_, of, seen, eight), number in rows
        ]

    def answers(self, scene: Numbers, asked: Numbers, colours: bool) -> tuple[Words, Words, Words]:
        choices = np.array([FOUR, EIGHT], dtype=object)[asked[:, 3]]
        return DIRECTIONS[asked[:, 0]], choices, everywhere("choice", len(asked))


def _beside(two: Numbers, number: Numbers) -> Numbers:
    """The colour with this number when two are left out."""
    low, high = np.sort(two, axis=1)[:, :1], np.sort(two, axis=1)[:, 1:]
    number = number + (number >= low)
    return number + (number >= high)


def _called(number: int, colours: bool) -> str:
    shape = SHAPES[(number - 1) % len(SHAPES)]
    return f"{COLOURS[(number - 1) // len(SHAPES)]} {shape}" if colours else str(shape)


def _listed(names: Words) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
