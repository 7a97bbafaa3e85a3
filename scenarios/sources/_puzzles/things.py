"""Things on a grid: what kinds there are, what they are called, and how they are drawn.

A thing is a number: 0 is an empty place, and 1 + colour * 4 + shape a thing of this colour and shape. In grey every colour is ignored
and stays 0, so that what looks the same is the same number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dice import Numbers

Picture = NDArray[np.uint8]
Words = NDArray[np.object_]

SIDE = 4  # the grid has SIDE x SIDE places: at 24 pixels each has 6
PLACES = SIDE * SIDE
COLOURS: Words = np.array(["red", "green", "blue", "yellow", "purple", "black"], dtype=object)
SHAPES: Words = np.array(["square", "ring", "triangle", "cross"], dtype=object)
PLURALS: Words = np.array(["squares", "rings", "triangles", "crosses"], dtype=object)
PAINT = np.array([[214, 39, 40], [34, 139, 60], [50, 90, 220], [240, 190, 0], [150, 70, 190], [25, 25, 25]], dtype=np.uint8)
GREY = np.full((len(COLOURS), 3), 60, dtype=np.uint8)
PAPER = np.uint8(255)


def thing(colour: Numbers, shape: Numbers) -> Numbers:
    return 1 + colour * len(SHAPES) + shape


def paints(colours: bool) -> Picture:
    """The paint of each colour  # (colours, 3)"""
    return PAINT if colours else GREY


def stamps(side: int) -> NDArray[np.bool_]:
    """Which pixels of a place of `side` x `side` pixels each kind of thing covers, the empty place first  # (1 + shapes, side, side)

    Between two things there is always paper, one pixel at least.
    """
    inner = side - max(1, side // 6)
    line = ((2 * np.arange(inner) + 1) / inner - 1).round(6)  # rounded, or a shape could differ from its own mirror image
    across, down = np.abs(line)[None, :], line[:, None]
    radius = across**2 + down**2
    arm = np.abs(down) <= 0.34
    drawn = np.stack(
        [
            np.ones((inner, inner), dtype=bool),
            (radius <= 1.0) & (radius > 0.35),
            across <= ((down + 1.2) / 2).round(6),
            arm | (across <= 0.34),
        ]
    )
    before = (side - inner) // 2
    margins = (before, side - inner - before)
    return np.pad(drawn, ((1, 0), margins, margins))


def draw_grid(scene: NDArray[np.integer], size: int, colours: bool) -> Picture:
    """Pictures of SIDE x SIDE things each, `size` pixels wide  # (rows, 3, size, size)"""
    side = size // SIDE
    kind = scene.astype(np.int64).reshape(-1, SIDE, SIDE)
    shape = np.where(kind > 0, (kind - 1) % len(SHAPES) + 1, 0)
    paint = paints(colours)[np.maximum(kind - 1, 0) // len(SHAPES)]  # (rows, SIDE, SIDE, 3)
    covered = stamps(side)[shape][:, None]  # (rows, 1, SIDE, SIDE, side, side)
    cells = np.where(covered, paint.transpose(0, 3, 1, 2)[..., None, None], PAPER)
    drawn = cells.transpose(0, 1, 2, 4, 3, 5).reshape(len(scene), 3, SIDE * side, SIDE * side)
    before = (size - SIDE * side) // 2
    margins = (before, size - SIDE * side - before)
    return np.pad(drawn, ((0, 0), (0, 0), margins, margins), constant_values=PAPER)
