"""Two marked cells in a maze: is there a way between them (levels 1 to 3), and how many steps is it (levels 4 and 5).

A maze is a random spanning tree of the grid of cells (Prim's algorithm over random weights, for many mazes at once). Where there
may be no way, one passage of the tree is closed: one of the way itself or one beside it, so that the marks lie equally far apart in
both cases and a maze with a closed passage tells nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dice import Dice, Numbers
from .skill import Drawn, Skill, asking, everywhere, numbers_as_words
from .things import Picture, Words

CELLS = np.array([3, 4, 5, 4, 5])  # across and down, by level
FARTHEST = {4: 7, 5: 9}  # the steps asked for are 2 to this many, equally often
EDGES = 2 * 5 * 4  # of the largest grid
WALL, LIGHT, DARK, START, END = range(5)
PAINT = np.array([[0, 0, 0], [255, 255, 255], [222, 222, 222], [34, 139, 60], [214, 39, 40]], dtype=np.uint8)
GREY = np.array([[0, 0, 0], [255, 255, 255], [222, 222, 222], [120, 120, 120], [120, 120, 120]], dtype=np.uint8)
WAY = {
    True: ("Is there a way from the green cell to the red cell?", "Can one walk from green to red without crossing a wall?"),
    False: ("Is there a way between the two grey cells?", "Can one walk from one grey cell to the other without crossing a wall?"),
}
STEPS = {
    True: (
        "How many steps from cell to cell is the way from green to red?",
        "Walk from the green cell to the red cell. How many steps is it?",
    ),
    False: (
        "How many steps from cell to cell is the way between the grey cells?",
        "Walk from one grey cell to the other. How many steps is it?",
    ),
}
NO = 1


def passages(cells: int) -> tuple[Numbers, Numbers]:
    """The two cells on each side of every place where a passage can be: those across first, then those down."""
    number = np.arange(cells * cells).reshape(cells, cells)
    return np.concatenate([number[:, :-1].ravel(), number[:-1].ravel()]), np.concatenate([number[:, 1:].ravel(), number[1:].ravel()])


class Maze(Skill):
    name = "maze"
    columns = 3 + EDGES, 2

    def throw(self, dice: Dice, level: Numbers, colours: bool) -> Drawn:
        scene, asked = np.zeros((len(level), 3 + EDGES), dtype=np.int64), np.zeros((len(level), 2), dtype=np.int64)
        sound = np.zeros(len(level), dtype=bool)
        for one in np.unique(level).tolist():
            chosen = level == one
            scene[chosen], asked[chosen, 0], sound[chosen] = _mazes(dice.rows(chosen), one)
            asked[chosen, 1] = one >= 4
        if not colours:
            scene[:, 1:3] = np.sort(scene[:, 1:3], axis=1)  # the two marks look the same
        return Drawn(scene, asked, sound)

    def draw(self, scene: Numbers, size: int, colours: bool) -> Picture:
        picture = np.empty((len(scene), 3, size, size), dtype=np.uint8)
        paint = PAINT if colours else GREY
        for cells in np.unique(scene[:, 0]).tolist():
            chosen = scene[:, 0] == cells
            strip = _strips(size, cells)
            blocks = _blocks(scene[chosen, 1:], cells)
            picture[chosen] = paint[blocks].transpose(0, 3, 1, 2)[:, :, strip[:, None], strip]
        return picture

    def questions(self, asked: Numbers, wording: Numbers, colours: bool) -> list[str]:
        rows = zip(asked.tolist(), wording.tolist(), strict=True)
        return [asking((STEPS if steps else WAY)[colours], number) for (_, steps), number in rows]

    def answers(self, scene: Numbers, asked: Numbers, colours: bool) -> tuple[Words, Words, Words]:
        steps = asked[:, 1] == 1
        answer = np.where(steps, numbers_as_words(asked[:, 0]), np.where(asked[:, 0] == NO, everywhere("no", len(asked)), "yes"))
        return answer, np.where(steps, everywhere("", len(asked)), "yes\nno"), np.where(steps, everywhere("number", len(asked)), "choice")


def _mazes(dice: Dice, level: int) -> tuple[Numbers, Numbers, NDArray[np.bool_]]:
    """Scenes, answers, and whether they could be made as the answer asks, of mazes of one level."""
    cells, rows = int(CELLS[level - 1]), np.arange(dice.size)
    start = dice.below(cells * cells)
    opened, depth, parent, way_in = _trees(dice, start, cells)
    wish, last = dice.fractions(cells * cells), FARTHEST.get(level)
    if last is None:
        answer = dice.once(2)
        wish[depth < cells - 1] = -1
    else:
        answer = 2 + dice.once(last - 1)
        wish[depth != answer[:, None]] = -1
    end = wish.argmax(axis=1)
    sound = wish[rows, end] >= 0
    if last is None:
        on_way = np.zeros_like(opened)
        here = end
        for _ in range(cells * cells - 1):
            going = here != start
            on_way[rows[going], way_in[rows, here][going]] = True
            here = parent[rows, here]
        closable = opened & (on_way == (answer == NO)[:, None])
        closed = np.where(closable, dice.fractions(opened.shape[1]), -1).argmax(axis=1)
        sound &= closable.any(axis=1)
        opened[rows, closed] = False
    scene = np.zeros((dice.size, 3 + EDGES), dtype=np.int64)
    scene[:, 0], scene[:, 1], scene[:, 2], scene[:, 3 : 3 + opened.shape[1]] = cells, start, end, opened
    return scene, answer, sound


def _trees(dice: Dice, start: Numbers, cells: int) -> tuple[NDArray[np.bool_], Numbers, Numbers, Numbers]:
    """Random spanning trees: which passages are open, and of each cell its steps from the start, the cell before it and the passage."""
    one, other = passages(cells)
    rows, weight = np.arange(dice.size), dice.fractions(len(one))
    reached = np.zeros((dice.size, cells * cells), dtype=bool)
    reached[rows, start] = True
    opened = np.zeros((dice.size, len(one)), dtype=bool)
    depth, parent, way_in = (np.zeros(reached.shape, dtype=np.int64) for _ in range(3))
    parent[rows, start] = start
    for _ in range(cells * cells - 1):
        passage = np.where(reached[:, one] ^ reached[:, other], weight, 2.0).argmin(axis=1)
        near = np.where(reached[rows, one[passage]], one[passage], other[passage])
        far = one[passage] + other[passage] - near
        depth[rows, far], parent[rows, far], way_in[rows, far] = depth[rows, near] + 1, near, passage
        reached[rows, far] = opened[rows, passage] = True
    return opened, depth, parent, way_in


def _blocks(scene: Numbers, cells: int) -> Numbers:
    """Walls, passages and cells as blocks  # (rows, 2 cells + 1, 2 cells + 1)"""
    one, other = passages(cells)
    rows = np.arange(len(scene))
    tint = np.add.outer(np.arange(cells), np.arange(cells)).ravel() % 2 + LIGHT
    of_cell = np.broadcast_to(tint, (len(scene), cells * cells)).copy()
    of_cell[rows, scene[:, 0]], of_cell[rows, scene[:, 1]] = START, END
    blocks = np.full((len(scene), 2 * cells + 1, 2 * cells + 1), WALL, dtype=np.int64)
    blocks[:, 1::2, 1::2] = of_cell.reshape(-1, cells, cells)
    down, across = one // cells + other // cells + 1, one % cells + other % cells + 1  # a passage lies between its two cells
    blocks[:, down, across] = np.where(scene[:, 2 : 2 + len(one)] > 0, of_cell[:, one], WALL)
    return blocks


def _strips(size: int, cells: int) -> Numbers:
    """To which row or column of blocks each pixel belongs: walls are thin, cells share what is left  # (size,)"""
    wall = max(1, size // 32)
    room = size - (cells + 1) * wall
    widths = np.full(2 * cells + 1, wall)
    widths[1::2] = np.diff(np.arange(cells + 1) * room // cells)
    return np.repeat(np.arange(2 * cells + 1), widths)
