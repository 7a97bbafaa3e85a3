"""How many things there are: all of them, those of a colour or a shape, or those of a colour and a shape.

The answer is 1 to 6 at every level; what grows is the number of other things, and how like the counted ones they are.
"""

from __future__ import annotations

import numpy as np

from .dice import Dice, Numbers
from .skill import Drawn, Skill, asking, everywhere, numbers_as_words
from .things import COLOURS, PLACES, PLURALS, SHAPES, Picture, Words, draw_grid, thing

MOST = 6
OTHERS = np.array([[0, 0], [1, 3], [2, 6], [4, 8], [6, 10]])  # fewest and most of them, by level
ALL, COLOUR, SHAPE, BOTH = range(4)
TEMPLATES = ("How many {} are there?", "How many {} do you see?", "Count the {}.", "What is the number of {} in the picture?")


class Counting(Skill):
    name = "counting"
    columns = PLACES, 4

    def throw(self, dice: Dice, level: Numbers, colours: bool) -> Drawn:
        count = 1 + dice.once(MOST)
        by_shape = dice.below(2) if colours else np.ones_like(count)
        by = np.select([level == 1, level <= 3], [ALL, np.where(by_shape == 1, SHAPE, COLOUR)], BOTH if colours else SHAPE)
        colour, shape = dice.below(len(COLOURS)) if colours else np.zeros_like(count), dice.below(len(SHAPES))
        others = dice.between(*OTHERS[level - 1].T)
        rank = dice.orders(PLACES)  # of each place; the first ones hold what is counted, the next ones the others
        counted, other = rank < count[:, None], (rank >= count[:, None]) & (rank < (count + others)[:, None])

        any_colour, any_shape = dice.many(len(COLOURS), PLACES), dice.many(len(SHAPES), PLACES)
        different_colour = (colour[:, None] + 1 + dice.many(len(COLOURS) - 1, PLACES)) % len(COLOURS)
        different_shape = (shape[:, None] + 1 + dice.many(len(SHAPES) - 1, PLACES)) % len(SHAPES)
        alike = dice.many(2, PLACES) == 1  # by both: the other things share the colour, or else the shape
        kind = by[:, None]
        other_colour = np.select(
            [kind == COLOUR, (kind == BOTH) & alike, kind == BOTH], [different_colour, colour[:, None], different_colour], any_colour
        )
        other_shape = np.select(
            [kind == SHAPE, (kind == BOTH) & alike, kind == BOTH], [different_shape, different_shape, shape[:, None]], any_shape
        )
        own_colour = np.where((kind == COLOUR) | (kind == BOTH), colour[:, None], any_colour)
        own_shape = np.where((kind == SHAPE) | (kind == BOTH), shape[:, None], any_shape)
        if not colours:
            own_colour, other_colour = np.zeros_like(own_colour), np.zeros_like(other_colour)
        scene = np.where(counted, thing(own_colour, own_shape), np.where(other, thing(other_colour, other_shape), 0))
        return Drawn(scene, np.stack([count, by, colour, shape], axis=1))

    def draw(self, scene: Numbers, size: int, colours: bool) -> Picture:
        return draw_grid(scene, size, colours)

    def questions(self, asked: Numbers, wording: Numbers, colours: bool) -> list[str]:
        rows = zip(asked.tolist(), wording.tolist(), strict=True)
        return [asking(TEMPLATES, number, _what(by, colour, shape)) for (_, by, colour, shape), number in rows]

    def answers(self, scene: Numbers, asked: Numbers, colours: bool) -> tuple[Words, Words, Words]:
        return numbers_as_words(asked[:, 0]), everywhere("", len(asked)), everywhere("number", len(asked))


def _what(by: int, colour: int, shape: int) -> str:
    return ("things", f"{COLOURS[colour]} things", PLURALS[shape], f"{COLOURS[colour]} {PLURALS[shape]}")[by]
