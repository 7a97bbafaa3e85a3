"""Four frames in a row: which way a thing moves, which way first, in which order things appear, and all its moves in order.

Played backwards, every one of these has another answer; the frames one by one tell none.
"""

from __future__ import annotations

import numpy as np

from .dice import Dice, Numbers
from .skill import Drawn, Skill, asking, everywhere
from .things import COLOURS, PLACES, SHAPES, SIDE, Picture, Words, draw_grid, thing

FRAMES = 4
WAYS: Words = np.array(["left", "right", "up", "down"], dtype=object)
STEP = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])  # across, down
STRAIGHT, FIRST, THREE, FOUR, MOVES = range(1, 6)  # by level
TEMPLATES = {
    STRAIGHT: ("Which way does the thing move: left, right, up or down?", "Does the thing move left, right, up or down?"),
    FIRST: ("Which way does the thing move first: left, right, up or down?", "Is the first move left, right, up or down?"),
    THREE: ("In which order do the {0} appear?", "Name the {0} in the order in which they appear."),
    MOVES: ("Which moves does the thing make, in order?", "Name the three moves in order: left, right, up or down."),
}


class Order(Skill):
    name = "order"
    modality = "video"
    columns = FRAMES, 1 + FRAMES

    def throw(self, dice: Dice, level: Numbers, colours: bool) -> Drawn:
        first = dice.once(4)
        second = (2 - first // 2 * 2) + dice.below(2)  # at a right angle to the first
        third = (first // 2 * 2) + dice.below(2)
        early = dice.below(2) == 1  # whether the turn comes after one step or after two
        middle = np.select([level == STRAIGHT, level == FIRST], [first, np.where(early, second, first)], second)
        last = np.select([level == STRAIGHT, level == FIRST], [first, second], third)
        steps = STEP[np.stack([first, middle, last], axis=1)]  # (rows, moves, 2)
        path = np.concatenate([np.zeros((len(level), 1, 2), dtype=np.int64), steps.cumsum(axis=1)], axis=1)
        path -= path.min(axis=1, keepdims=True)
        room = SIDE - path.max(axis=1)
        path += np.stack([dice.below(room[:, 0]), dice.below(room[:, 1])], axis=1)[:, None]
        moving = path[..., 1] * SIDE + path[..., 0]  # (rows, frames)

        # `doubled` of three things stays for two frames; of four each has its own.
        doubled = dice.below(3)
        turn = np.where((level == THREE)[:, None], np.arange(FRAMES) - (np.arange(FRAMES) > doubled[:, None]), np.arange(FRAMES))
        appears = (level == THREE) | (level == FOUR)
        kinds = COLOURS if colours else SHAPES
        order = _once_in_order(dice, len(kinds))
        other = dice.many(len(SHAPES) if colours else 1, FRAMES)
        spots = dice.many(PLACES, FRAMES)
        kind, rest = np.take_along_axis(order, turn, axis=1), np.take_along_axis(other, turn, axis=1)
        shown = thing(kind, rest) if colours else thing(np.zeros_like(kind), kind)
        one = thing(dice.below(len(COLOURS)) if colours else np.zeros_like(first), dice.below(len(SHAPES)))
        place = np.where(appears[:, None], np.take_along_axis(spots, turn, axis=1), moving)
        scene = place * (1 + len(COLOURS) * len(SHAPES)) + np.where(appears[:, None], shown, one[:, None])

        words = np.where(appears[:, None], order[:, :FRAMES], np.stack([first, second, third, third], axis=1))
        return Drawn(scene, np.column_stack([level, words]))

    def draw(self, scene: Numbers, size: int, colours: bool) -> Picture:
        kinds = 1 + len(COLOURS) * len(SHAPES)
        grid = np.zeros((scene.size, PLACES), dtype=np.int64)
        grid[np.arange(scene.size), scene.ravel() // kinds] = scene.ravel() % kinds
        return draw_grid(grid, size, colours).reshape(len(scene), FRAMES, 3, size, size)

    def questions(self, asked: Numbers, wording: Numbers, colours: bool) -> list[str]:
        what = "colours" if colours else "shapes"
        rows = zip(asked[:, 0].tolist(), wording.tolist(), strict=True)
        return [asking(TEMPLATES[THREE if level == FOUR else level], number, what) for level, number in rows]

    def answers(self, scene: Numbers, asked: Numbers, colours: bool) -> tuple[Words, Words, Words]:
        level, words = asked[:, 0], asked[:, 1:]
        kinds = COLOURS if colours else SHAPES
        appears = (level == THREE) | (level == FOUR)
        named = np.where(appears[:, None], kinds[np.where(appears[:, None], words, 0)], WAYS[np.where(appears[:, None], 0, words)])
        three = named[:, 0] + ", " + named[:, 1] + ", " + named[:, 2]
        answer = np.select([level <= FIRST, level == FOUR], [named[:, 0], three + ", " + named[:, 3]], three)
        one = level <= FIRST
        choices = np.where(one, everywhere("\n".join(WAYS), len(level)), "")
        return answer, choices, np.where(one, everywhere("choice", len(level)), "sequence")


def _once_in_order(dice: Dice, kinds: int) -> Numbers:
    """Which kinds appear, in order, thrown once: every order is equally frequent  # (rows, FRAMES)"""
    left = np.broadcast_to(np.arange(kinds), (dice.size, kinds)).copy()
    rows = np.arange(dice.size)
    for place in range(FRAMES):
        pick = place + dice.once(kinds - place)
        left[rows, place], left[rows, pick] = left[rows, pick], left[rows, place]
    return left[:, :FRAMES]
