"""A coloured shape, a sentence and a tone, made on the spot: three modalities of which one sets how much each one tells.

Our own, for missing modalities, imbalance between modalities and complementary ones. A sample has a class (its shape, or its shape and
colour) and three parts between -1 and 1. The image shows the shape in its colour, its size the first part (a circle's radius is 17 to
35 % of the side). The sentence names shape and colour, and its adjective the second part, in seven steps from awful to splendid. The
tone has the shape as its pitch (150 Hz for the first, and half an octave up for each next one) and the colour as its overtones; it falls
or rises by up to a fifth of its pitch, which is the third part.

`noise` is the rate at which a modality shows another sample's class and part, drawn from all there are, the right one among them: of
six shapes a modality with a rate of 0.3 shows a wrong one in a quarter of the samples. `tells` lists which of shape and colour a
modality shows at all: the others are random in image and tone and not said in the sentence. With `image: [colour], text: [shape]` no
modality alone tells the class, and two do. `grain` is plain additive noise, as a share of the full range.

The target is the class; the value, a score between -3 and 3 composed of the three parts by `weights` (like the sentiment of CMU-MOSI; equal
weights where they are not given, and the size alone with `image: 1`); or the mask, the class of every pixel that the shape covers by half
at least, with the background as the last class. Targets are always the sample's own, whatever a modality shows. The backgrounds are the
grouping `domain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from streamcl.stream import Column, Dataset, Grouping, Modality, SourceData

from ._drawn import Draws, drawn
from ._scenes import COLOURS, PALETTE
from ._sound import Hearing, SoundOptions, tones

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
Sense = Literal["image", "text", "audio"]
SENSES: tuple[Sense, ...] = ("image", "text", "audio")
RATE = 8000
PITCH = 150.0
MOODS = ("an awful", "a poor", "a weak", "a plain", "a decent", "a good", "a splendid")
SENTENCES = ("This is {}.", "Here we have {}.", "Look at {}.", "It shows {}.")


class Shapes(SoundOptions):
    """`samples` for training and `test_samples` for testing, images of `size` x `size` pixels and tones of `seconds`.

    `domains` are the backgrounds, dealt out in turn. `grain` is 0.05 for image and audio where it is not given. `draw` makes samples at
    once, when they are read, or at once while they take less than 512 MB (`auto`).
    """

    licence = "none: made on the spot"
    class_count: ClassVar = {"shape": len(SHAPES), "shape_colour": len(SHAPES) * len(COLOURS)}

    def __init__(
        self,
        *,
        classes: Literal["shape", "shape_colour"] = "shape",
        target: Literal["class", "value", "mask"] = "class",
        samples: PositiveInt = 2000,
        test_samples: PositiveInt = 500,
        size: PositiveInt = 32,
        seconds: PositiveFloat = 0.5,
        noise: dict[Literal["image", "text", "audio"], Fraction] | None = None,
        grain: dict[Literal["image", "audio"], NonNegativeFloat] | None = None,
        tells: dict[Literal["image", "text", "audio"], list[Literal["shape", "colour"]]] | None = None,
        weights: dict[Literal["image", "text", "audio"], NonNegativeFloat] | None = None,
        domains: list[Literal["dark", "light", "stripes", "checks"]] | None = None,
        seed: NonNegativeInt = 0,
        draw: Literal["eager", "lazy", "auto"] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if size < 16:
            raise ConfigError(f"shapes: size is {size}: below 16 pixels the shapes cannot be told apart")
        if weights is not None and (target != "value" or not any(weights.values())):
            told = "all of them are 0" if target == "value" else f"they belong to `target: value`, and target is {target}"
            raise ConfigError(f"shapes: weights compose the value, and {told}")
        backgrounds: list[str] = list(domains or ("dark", "light", "stripes", "checks"))
        if len(set(backgrounds)) < len(backgrounds):
            raise ConfigError(f"shapes: domains lists one twice: {', '.join(backgrounds)}")
        self.classes, self.target, self.size, self.seconds, self.seed, self.draw = classes, target, size, seconds, seed, draw
        self.samples, self.test_samples, self.domains = samples, test_samples, backgrounds
        self.noise = {sense: float((noise or {}).get(sense, 0)) for sense in SENSES}
        self.grain = {"image": 0.05, "audio": 0.05, **(grain or {})}
        self.tells = {sense: set((tells or {}).get(sense, ["shape", "colour"])) for sense in SENSES}
        self.weights = [float(weights.get(sense, 0)) if weights else 1.0 for sense in SENSES]

    def load(self) -> SourceData:
        names = list(SHAPES) if self.classes == "shape" else [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
        hearing = self.hearing(RATE, round(self.seconds * RATE))
        train, test = self._part("train", self.samples, 0, hearing), self._part("test", self.test_samples, self.samples, hearing)
        domain = [torch.arange(count) % len(self.domains) for count in (self.samples, self.test_samples)]
        return SourceData(
            train,
            test,
            {"class": names, "mask": [*names, "background"], "value": []}[self.target],
            {"image": Modality("image", (3, self.size, self.size), high=255), "text": Modality("text"), "audio": hearing.modality()},
            self.target,
            self.licence,
            groupings={"domain": Grouping(self.domains, *domain)},
            about={"audio": hearing.about},
        )

    def _part(self, part: str, count: int, first_id: int, hearing: Hearing) -> Dataset:
        draws, rows = Draws(self.seed, "shapes", part), np.arange(count)
        own = _drawn_facts(draws, rows, "own")
        shown = {sense: self._shown(sense, draws, rows, own) for sense in SENSES}
        canvas = _Canvas(draws, shown["image"], self.size, self.domains, self.grain["image"])
        number = own.shape if self.classes == "shape" else own.shape * len(COLOURS) + own.colour
        if self.target == "class":
            targets = torch.from_numpy(number)
        elif self.target == "value":
            weights = np.array(self.weights)
            targets = torch.from_numpy((3 * (own.parts * weights).sum(axis=1) / weights.sum()).astype(np.float32))
        else:
            background = len(SHAPES) * (1 if self.classes == "shape" else len(COLOURS))
            parts = np.array_split(rows, range(1024, count, 1024))
            covered = np.concatenate([canvas.cover(some) >= 0.5 for some in parts])
            targets = torch.from_numpy(np.where(covered, number[:, None, None], background).astype(np.uint8))
        words = self._sentences(draws, rows, shown["text"])
        return drawn(_Drawing(draws, canvas, words, shown["audio"], self.grain["audio"], hearing), targets, first_id, self.draw)

    def _shown(self, sense: Sense, draws: Draws, rows: np.ndarray, own: _Facts) -> _Facts:
        """What one modality shows of each sample."""
        astray = draws.uniform(rows, f"{sense} astray", 1)[:, 0] < self.noise[sense]
        other = _drawn_facts(draws, rows, sense)
        return _Facts(
            np.where(astray | ("shape" not in self.tells[sense]), other.shape, own.shape),
            np.where(astray | ("colour" not in self.tells[sense]), other.colour, own.colour),
            np.where(astray[:, None], other.parts, own.parts),
        )

    def _sentences(self, draws: Draws, rows: np.ndarray, shown: _Facts) -> list[str]:
        said = self.tells["text"]
        colours = [f" {colour}" if "colour" in said else "" for colour in COLOURS]
        nouns = [f" {shape}" if "shape" in said else " shape" for shape in SHAPES]
        frames = [frame.format(f"{mood}{colour}{noun}") for frame in SENTENCES for mood in MOODS for colour in colours for noun in nouns]
        frame = draws.whole(rows, "sentence", 1, len(SENTENCES))[:, 0]
        mood = np.rint((shown.parts[:, 1] + 1) * 3).astype(np.int64)
        place = ((frame * len(MOODS) + mood) * len(colours) + shown.colour) * len(nouns) + shown.shape
        return np.array(frames, dtype=object)[place].tolist()


@dataclass
class _Facts:
    """What there is to show of every sample."""

    shape: np.ndarray  # int64 (samples,)
    colour: np.ndarray  # int64 (samples,)
    parts: np.ndarray  # float64 (samples, 3): of image, text and audio, from -1 to 1


def _drawn_facts(draws: Draws, rows: np.ndarray, whose: str) -> _Facts:
    parts = 2 * draws.uniform(rows, f"{whose} parts", 3) - 1
    parts[:, 1] = draws.whole(rows, f"{whose} mood", 1, len(MOODS))[:, 0] / 3 - 1
    shape = draws.whole(rows, f"{whose} shape", 1, len(SHAPES))[:, 0]
    return _Facts(shape, draws.whole(rows, f"{whose} colour", 1, len(COLOURS))[:, 0], parts)


class _Drawing:
    """The inputs of some samples."""

    def __init__(self, draws: Draws, canvas: _Canvas, words: list[str], heard: _Facts, grain: float, hearing: Hearing) -> None:
        self.draws, self.canvas, self.words, self.heard, self.grain, self.hearing = draws, canvas, words, heard, grain, hearing

    def __call__(self, rows: np.ndarray) -> dict[str, Column]:
        heard, hearing = self.heard, self.hearing
        pitch, glide = PITCH * 2 ** (heard.shape[rows] / 2), 0.2 * heard.parts[rows, 2]
        waves = tones(self.draws, rows, pitch, heard.colour[rows], self.grain, hearing.rate, hearing.samples, glide)
        return {"image": self.canvas(rows), "text": [self.words[row] for row in rows.tolist()], "audio": hearing(waves)}


class _Canvas:
    """Draws the shapes of some samples."""

    def __init__(self, draws: Draws, shown: _Facts, size: int, domains: list[str], grain: float) -> None:
        self.draws, self.shown, self.size, self.domains, self.grain = draws, shown, size, domains, grain

    def cover(self, rows: np.ndarray) -> np.ndarray:
        """How much of each pixel the shape covers, by the distance to its edge  # float32 (rows, size, size)"""
        size, kinds = self.size, self.shown.shape[rows]
        place = self.draws.uniform(rows, "place", 3).astype(np.float32)
        radius = (size * (0.26 + 0.09 * self.shown.parts[rows, 0])).astype(np.float32)
        margin = radius + 1
        y, x = (margin + place[:, axis] * (size - 2 * margin) for axis in (0, 1))
        turn = (place[:, 2] - 0.5) * np.float32(0.5)
        steps = np.arange(size, dtype=np.float32) + np.float32(0.5)
        down, right = (steps - y[:, None])[:, :, None], (steps - x[:, None])[:, None, :]
        cosine, sine = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
        across, up = cosine * right + sine * down, sine * right - cosine * down
        cover = np.empty((len(rows), size, size), np.float32)
        for number, name in enumerate(SHAPES):
            mine = np.flatnonzero(kinds == number)
            if len(mine):
                cover[mine] = (0.5 - _distance(name, across[mine], up[mine], radius[mine, None, None])).clip(0, 1)
        return cover

    def __call__(self, rows: np.ndarray) -> Tensor:
        """uint8 (rows, 3, size, size)"""
        size = self.size
        cover = self.cover(rows)[:, None]
        ground = np.empty((len(rows), 1, size, size), np.float32)
        light = self.draws.uniform(rows, "light", 1).astype(np.float32)[:, :, None]
        shift = self.draws.whole(rows, "shift", 2, 8)[:, :, None]
        down, right = np.arange(size)[:, None] + shift[:, :1], np.arange(size) + shift[:, 1:]
        for number, name in enumerate(self.domains):
            mine = rows % len(self.domains) == number
            if name == "stripes":
                pattern = 60 + 80 * ((down[mine] + right[mine]) % 8 < 4)
            elif name == "checks":
                pattern = 60 + 80 * ((down[mine] // 4 + right[mine] // 4) % 2)
            else:
                pattern = np.full((int(mine.sum()), size, size), 20 if name == "dark" else 205)
            ground[mine, 0] = pattern + 40 * (light[mine] - 0.5)
        colour = PALETTE[self.shown.colour[rows]][:, :, None, None]
        images = ground + cover * (colour - ground)
        if self.grain:
            noise = self.draws.noise(rows, "grain", 3 * size * size).reshape(images.shape)
            images += np.float32(255 * self.grain) * noise
        return torch.from_numpy(np.rint(images).clip(0, 255).astype(np.uint8))


def _distance(name: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How far a point lies outside of a shape around the origin, negative inside, in pixels."""
    if name == "circle":
        return np.hypot(x, y) - radius
    if name == "ring":
        return np.abs(np.hypot(x, y) - 0.78 * radius) - 0.22 * radius
    if name == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8 * radius
    if name == "cross":
        long, short = 0.95 * radius, 0.28 * radius
        upright = np.maximum(np.abs(x) - short, np.abs(y) - long)
        return np.minimum(upright, np.maximum(np.abs(x) - long, np.abs(y) - short))
    if name == "triangle":
        slant = np.float32(np.sqrt(0.75)) * np.abs(x) + 0.5 * y
        return np.maximum(slant, -y) - radius / 2
    fifth = np.float32(2 * np.pi / 5)
    angle = np.abs((np.arctan2(x, y) + fifth / 2) % fifth - fifth / 2)  # from the nearest tip; the first points up
    far = np.hypot(x, y)
    notch = 0.42 * np.exp(1j * np.pi / 5)  # between two tips, beside a tip at 1
    normal = np.array([notch.imag, 1 - notch.real], dtype=np.float32) / np.float32(abs(1 - notch))
    return normal[0] * (far * np.cos(angle) - radius) + normal[1] * far * np.sin(angle)
