"""Which of two kinds of things there are more of, or whether there are equally many.

The kinds are colours or shapes. From level to level the difference shrinks and the numbers grow; at level 5 there are others beside.
The three answers are equally frequent at every level.
"""

from __future__ import annotations

import numpy as np

from .dice import Dice, Numbers
from .skill import Drawn, Skill, asking, chosen, everywhere
from .things import COLOURS, PLACES, PLURALS, SHAPES, Picture, Words, draw_grid, thing

FEWER = np.array([[1, 3], [2, 4], [2, 5], [3, 6], [3, 5]])  # how many there are of the rarer kind, at least and at most, by level
DIFFERENCE = np.array([[3, 4], [2, 3], [1, 2], [1, 1], [1, 1]])
OTHERS = np.array([[0, 0], [0, 0], [0, 0], [0, 0], [2, 5]])
EQUAL = 2
TEMPLATES = (
    "Are there more {0} or more {1}, or equally many?",
    "Which are there more of: {0}, {1}, or equally many?",
    "What do you see more of, {0} or {1}? Or equally many?",
)


class Comparing(Skill):
    name = "comparing"
    columns = PLACES, 3

    def throw(self, dice: Dice, level: Numbers, colours: bool) -> Drawn:
        answer = dice.once(3)
        by_shape = (dice.below(2) if colours else np.ones_like(answer)) == 1
        fewer, more_by = dice.between(*FEWER[level - 1].T), dice.between(*DIFFERENCE[level - 1].T)
        both = fewer + dice.below(more_by + 1)  # of each kind where there are equally many: what the sum of all tells stays little
        first = np.select([answer == EQUAL, answer == 0], [both, fewer + more_by], fewer)
        second = np.select([answer == EQUAL, answer == 1], [both, fewer + more_by], fewer)
        others = dice.between(*OTHERS[level - 1].T)

        colour, shape = dice.orders(len(COLOURS)), dice.orders(len(SHAPES))
        rank = dice.orders(PLACES)
        ends = np.stack([first, first + second, first + second + others], axis=1)
        kind = (rank[..., None] >= ends[:, None]).sum(axis=2)  # of each place: the first kind, the second, another, none
        rest_colour, rest_shape = 2 + dice.many(len(COLOURS) - 2, PLACES), 2 + dice.many(len(SHAPES) - 2, PLACES)
        own_colour = np.take_along_axis(colour, np.where(kind < 2, kind, rest_colour), axis=1)
        own_shape = np.take_along_axis(shape, np.where(kind < 2, kind, rest_shape), axis=1)
        any_colour, any_shape = dice.many(len(COLOURS), PLACES), dice.many(len(SHAPES), PLACES)
        drawn_colour = np.where(by_shape[:, None], any_colour, own_colour) if colours else np.zeros_like(rank)
        scene = np.where(kind < 3, thing(drawn_colour, np.where(by_shape[:, None], own_shape, any_shape)), 0)
        names = np.where(by_shape[:, None], len(COLOURS) + shape[:, :2], colour[:, :2])
        return Drawn(scene, np.concatenate([answer[:, None], names], axis=1))

    def draw(self, scene: Numbers, size: int, colours: bool) -> Picture:
        return draw_grid(scene, size, colours)

    def questions(self, asked: Numbers, wording: Numbers, colours: bool) -> list[str]:
        rows = zip(asked.tolist(), wording.tolist(), strict=True)
        return [asking(TEMPLATES, number, KINDS[first], KINDS[second]) for (_, first, second), number in rows]

    def answers(self, scene: Numbers, asked: Numbers, colours: bool) -> tuple[Words, Words, Words]:
        first, second, equal = KINDS[asked[:, 1]], KINDS[asked[:, 2]], everywhere("equally many", len(asked))
        choices = first + "\n" + second + "\n" + equal
        return chosen(asked[:, 0], first, second, equal), choices, everywhere("choice", len(asked))


KINDS: Words = np.concatenate([COLOURS + " things", PLURALS])
