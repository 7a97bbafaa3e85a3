"""Bars with a scale: which is the tallest or the shortest, how high one is, how much higher than another, how high two are together.

Heights are whole numbers from 1 to 6, with a line at each. In colour a bar is called by its colour, in grey by its place.
"""

from __future__ import annotations

import numpy as np

from .dice import Dice, Numbers
from .skill import Drawn, Skill, asking, everywhere, numbers_as_words
from .things import COLOURS, PAPER, Picture, Words, paints

BARS, HIGHEST = 4, 6
PLACES: Words = np.array(["first", "second", "third", "fourth"], dtype=object)
LINE = np.uint8(200)
TALLEST, SHORTEST, HEIGHT, DIFFERENCE, TOGETHER = range(5)
TEMPLATES = {
    TALLEST: ("Which bar is the tallest?", "Which of the bars is the highest one?", "Find the tallest bar. Which one is it?"),
    SHORTEST: ("Which bar is the shortest?", "Which of the bars is the lowest one?", "Find the shortest bar. Which one is it?"),
    HEIGHT: ("How high is the {0} bar, counted in lines?", "Up to which line does the {0} bar reach?", "What is the value of the {0} bar?"),
    DIFFERENCE: ("How many lines higher is the {0} bar than the {1} bar?", "By how much is the {0} bar higher than the {1} bar?"),
    TOGETHER: ("How high are the {0} bar and the {1} bar together?", "What is the sum of the {0} bar and the {1} bar?"),
}


class Chart(Skill):
    name = "chart"
    columns = BARS, 4

    def throw(self, dice: Dice, level: Numbers, colours: bool) -> Drawn:
        bars = np.where(level == 1, 3, BARS)
        upside_down = dice.below(2) * (level == 2)  # the shortest instead of the tallest
        winner = dice.once(bars)
        value, gap, total = 1 + dice.once(HIGHEST), 1 + dice.once(HIGHEST - 1), 3 + dice.once(2 * HIGHEST - 3)
        by = np.select([level <= 2, level == 3, level == 4], [np.where(upside_down == 1, SHORTEST, TALLEST), HEIGHT, DIFFERENCE], TOGETHER)
        pair = dice.orders(BARS)[:, :2]  # the bars that are asked about
        heights = 1 + dice.many(HIGHEST, BARS)
        rows = np.arange(len(level))

        margin = np.where(level == 1, 2, 1)
        top = dice.between(3, HIGHEST)
        below = 1 + dice.many(60, BARS) % (top - margin)[:, None]  # 60: each of 1 to 5 divides it
        below[rows, winner] = top
        heights = np.where((by == TALLEST)[:, None], below, np.where((by == SHORTEST)[:, None], HIGHEST + 1 - below, heights))
        first, second = pair.T
        lower = dice.between(1, HIGHEST - gap)
        part = dice.between(np.maximum(1, total - HIGHEST), np.minimum(HIGHEST, total - 1))
        heights[rows, first] = np.select([by == HEIGHT, by == DIFFERENCE, by == TOGETHER], [value, lower + gap, part], heights[rows, first])
        heights[rows, second] = np.select([by == DIFFERENCE, by == TOGETHER], [lower, total - part], heights[rows, second])
        heights = np.where(np.arange(BARS) < bars[:, None], heights, 0)

        colour = dice.orders(len(COLOURS))[:, :BARS] if colours else np.zeros_like(heights)
        answer = np.select([by <= SHORTEST, by == HEIGHT, by == DIFFERENCE], [winner, value, gap], total)
        scene = np.where(heights > 0, heights + (HIGHEST + 1) * colour, 0)
        called = np.take_along_axis(colour, pair, axis=1) if colours else pair
        return Drawn(scene, np.column_stack([answer, by, called]))

    def draw(self, scene: Numbers, size: int, colours: bool) -> Picture:
        unit = (size - 1) // (HIGHEST + 1)
        above = size - 1 - np.arange(size)  # the height of each row of pixels over the bottom one
        line = above % unit == 0
        slot, within = np.arange(size) * BARS // size, np.arange(size) * BARS % size
        bar = within >= max(BARS, size // 6)  # a gap stands to the left of each bar
        heights = scene % (HIGHEST + 1)
        filled = (above[:, None] <= heights[:, None, slot] * unit) & (above[:, None] > 0) & bar & (heights[:, None, slot] > 0)
        paint = paints(colours)[scene // (HIGHEST + 1)][:, slot].transpose(0, 2, 1)[:, :, None]  # (rows, 3, 1, size)
        ground = np.where(above == 0, np.uint8(0), np.where(line & (above <= HIGHEST * unit), LINE, PAPER))[:, None]
        picture: Picture = np.where((filled & (~line[:, None] | (above[:, None] == heights[:, None, slot] * unit)))[:, None], paint, ground)
        return picture

    def questions(self, asked: Numbers, wording: Numbers, colours: bool) -> list[str]:
        names = COLOURS if colours else PLACES
        rows = zip(asked.tolist(), wording.tolist(), strict=True)
        return [asking(TEMPLATES[by], number, names[first], names[second]) for (_, by, first, second), number in rows]

    def answers(self, scene: Numbers, asked: Numbers, colours: bool) -> tuple[Words, Words, Words]:
        names = self._names(scene, colours)
        choices = names[:, 0] + "\n" + names[:, 1] + "\n" + names[:, 2]
        choices = np.where(scene[:, 3] > 0, choices + "\n" + names[:, 3], choices)
        which = asked[:, 1] <= SHORTEST
        rows = np.arange(len(asked))
        answer = np.where(which, names[rows, np.where(which, asked[:, 0], 0)], numbers_as_words(asked[:, 0]))
        return answer, np.where(which, choices, ""), np.where(which, everywhere("choice", len(rows)), everywhere("number", len(rows)))

    @staticmethod
    def _names(scene: Numbers, colours: bool) -> Words:
        names: Words = COLOURS[scene // (HIGHEST + 1)] if colours else np.broadcast_to(PLACES, scene.shape)
        return names
