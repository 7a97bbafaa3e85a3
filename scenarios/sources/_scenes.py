"""Scenes of several small pictures on one canvas: composed for all rows at once, drawn a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ._drawn import Draws

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (70, 110, 255),
    "yellow": (240, 220, 40),
    "purple": (190, 70, 220),
    "orange": (255, 140, 20),
}
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
SIDE = 8  # pixels of a digit
BACKGROUND = 10  # the class of a pixel on which there is no digit
TOGETHER = 16384  # scenes that are composed at a time: their random numbers take more room than what is kept of them
VISIBLE = 64  # of 255: a pixel with at least this much ink belongs to the digit


@dataclass
class Layout:
    """What lies where in every scene. Places that a scene does not use hold -1."""

    classes: np.ndarray  # int8 (scenes, places)
    pictures: np.ndarray  # int64 (scenes, places): rows of the pictures that this part may use
    scale: np.ndarray  # int16 (scenes, places)
    y: np.ndarray  # int16 (scenes, places): the upper edge
    x: np.ndarray  # int16 (scenes, places): the left edge
    colour: np.ndarray  # int8 (scenes, places)
    domain: np.ndarray  # int64 (scenes,)

    @property
    def used(self) -> np.ndarray:
        return self.classes >= 0

    def boxes(self) -> Tensor:
        """Left, upper, right and lower edge, the latter two just outside  # int16 (scenes, places, 4)"""
        side = SIDE * self.scale
        edges = np.stack([self.x, self.y, self.x + side, self.y + side], axis=-1)
        return torch.from_numpy(np.where(self.used[..., None], edges, -1).astype(np.int16))


def compose(
    draws: Draws,
    rows: np.ndarray,
    targets: np.ndarray,
    *,
    size: int,
    digits: tuple[int, int],
    scale: int,
    overlap: bool,
    domain: np.ndarray,
    distinct: np.ndarray,
) -> Layout:
    """Choose the digits and their places. `targets` are the classes of the pictures at hand; rows that are `distinct` repeat no class.

    Without overlap every digit lies somewhere in a cell of its own, in the coarsest grid that has enough of them.
    """
    parts = [
        _composed(draws, some, targets, size, digits, scale, overlap, distinct[some])
        for some in np.array_split(rows, range(TOGETHER, len(rows), TOGETHER))
    ]
    classes, pictures, factor, top, left, colour = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Layout(classes, pictures, factor, top, left, colour, domain)


def _composed(
    draws: Draws,
    rows: np.ndarray,
    targets: np.ndarray,
    size: int,
    digits: tuple[int, int],
    scale: int,
    overlap: bool,
    distinct: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """The columns of a layout but for the domain."""
    least, most = digits
    count = least + draws.whole(rows, "count", 1, most - least + 1)
    used = np.arange(most) < count
    classes = draws.whole(rows, "classes", most, 10)
    if distinct.any():
        shuffled = draws.uniform(rows[distinct], "order", 10).argsort(axis=1)
        classes[distinct] = shuffled[:, :most]  # all ten where there are more places
    order, counts = targets.argsort(kind="stable"), np.bincount(targets, minlength=10)
    member = draws.whole(rows, "member", most, counts[classes])
    pictures = order[(counts.cumsum() - counts)[classes] + member]
    factor = 1 + draws.whole(rows, "scale", most, scale)
    side = SIDE * factor
    y, x = draws.uniform(rows, "y", most), draws.uniform(rows, "x", most)
    if overlap:
        top, left = (y * (size - side + 1)).astype(np.int64), (x * (size - side + 1)).astype(np.int64)
    else:
        grid = cells(most)
        cell = size // grid
        place = draws.uniform(rows, "cell", grid * grid).argsort(axis=1)[:, :most]
        margin = draws.whole(rows, "margin", 2, size - grid * cell + 1)
        top = margin[:, :1] + place // grid * cell + (y * (cell - side + 1)).astype(np.int64)
        left = margin[:, 1:] + place % grid * cell + (x * (cell - side + 1)).astype(np.int64)
    colour = draws.whole(rows, "colour", most, len(COLOURS))

    def kept(values: np.ndarray, dtype: type) -> np.ndarray:
        return np.where(used, values, -1).astype(dtype)

    return (
        kept(classes, np.int8),
        kept(pictures, np.int64),
        kept(factor, np.int16),
        kept(top, np.int16),
        kept(left, np.int16),
        kept(colour, np.int8),
    )


def cells(most: int) -> int:
    """The side of the coarsest square grid with a cell for each digit."""
    return int(np.ceil(np.sqrt(most)))


class Painter:
    """Draws the scenes of a layout from the pictures of its part."""

    def __init__(self, draws: Draws, layout: Layout, pictures: Tensor, size: int, scale: int, domains: list[str]) -> None:
        self.draws, self.layout, self.size, self.domains = draws, layout, size, domains
        self.channels = 3 if "coloured" in domains else 1
        ink = pictures.float() * (255 / 16)  # (pictures, 1, 8, 8)
        self.tables = {
            factor: interpolate(ink, scale_factor=factor, mode="bilinear")[:, 0].round().to(torch.uint8).numpy()
            for factor in range(1, scale + 1)
        }

    def ink(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How much ink each pixel has, and the place of the digit that it is of (the darker one where two meet); -1 for none."""
        layout, size = self.layout, self.size
        ink = np.zeros((len(rows), size, size), np.uint8)
        owner = np.full((len(rows), size, size), -1, np.int8)
        scale, top, left = layout.scale[rows], layout.y[rows], layout.x[rows]
        pictures = layout.pictures[rows]
        for place in range(scale.shape[1]):
            for factor, table in self.tables.items():
                mine = np.flatnonzero(scale[:, place] == factor)
                steps = np.arange(SIDE * factor)
                where = (mine[:, None, None], (top[mine, place, None] + steps)[:, :, None], (left[mine, place, None] + steps)[:, None, :])
                patch, before = table[pictures[mine, place]], ink[where]
                more = patch > before
                ink[where] = np.where(more, patch, before)
                owner[where] = np.where(more, place, owner[where])
        return ink, owner

    def images(self, rows: np.ndarray, ink: np.ndarray, owner: np.ndarray) -> Tensor:
        """The scenes in the look of their domains  # uint8 (rows, channels, size, size)"""
        images = np.empty((len(rows), self.channels, self.size, self.size), np.uint8)
        domain = self.layout.domain[rows]
        for number, name in enumerate(self.domains):
            mine = np.flatnonzero(domain == number)
            if len(mine):
                images[mine] = self._look(name, rows[mine], ink[mine], owner[mine])
        return torch.from_numpy(images)

    def mask(self, rows: np.ndarray, ink: np.ndarray, owner: np.ndarray) -> Tensor:
        """The class of every pixel  # uint8 (rows, size, size)"""
        classes = self.layout.classes[rows].astype(np.uint8)
        found = np.take_along_axis(classes, owner.clip(0).reshape(len(rows), -1).astype(np.int64), axis=1).reshape(owner.shape)
        return torch.from_numpy(np.where(ink >= VISIBLE, found, np.uint8(BACKGROUND)))

    def _look(self, name: str, rows: np.ndarray, ink: np.ndarray, owner: np.ndarray) -> np.ndarray:
        if name == "plain":
            return ink[:, None]
        if name == "inverted":
            return 255 - ink[:, None]
        share = ink[:, None].astype(np.float32) / 255
        if name == "coloured":
            colour = self.layout.colour[rows]
            own = np.take_along_axis(colour, owner.clip(0).reshape(len(rows), -1).astype(np.int64), axis=1)
            ground = PALETTE[self.draws.whole(rows, "ground", 1, len(COLOURS))[:, 0]][:, :, None, None] * np.float32(0.2)
            front = PALETTE[own].reshape(*owner.shape, 3).transpose(0, 3, 1, 2)
            return (ground + share * (front - ground)).astype(np.uint8)
        if name == "noisy":
            noise = self.draws.noise(rows, "noise", self.size**2).reshape(len(rows), 1, self.size, self.size)
            return (80 + share * 130 + noise * 25).clip(0, 255).astype(np.uint8)
        # striped: diagonal stripes, 8 pixels from one to the next
        across = np.add.outer(np.arange(self.size), np.arange(self.size)) + self.draws.whole(rows, "stripes", 1, 8)[:, :, None]
        ground = np.where(across % 8 < 4, np.float32(90), np.float32(20))[:, None]
        return (ground + share * (255 - ground)).astype(np.uint8)
