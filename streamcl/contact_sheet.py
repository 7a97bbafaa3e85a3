"""A contact sheet: rows of samples of any modality, drawn to be looked at, each a group of cells with lines of text below it."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.stream import Batch, Column, Modality
from streamcl.writing import disk_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
MOST = 8  # samples of a task
FRAMES = 6  # of a video
BARS = 64  # of a vector; a longer one is drawn as the range of each stretch of it

# Lengths in inches; text in points.
WIDTH, MARGIN, GAP, INSIDE = 10.0, 0.18, 0.14, 0.05
ROOM = WIDTH - 2 * MARGIN
TALL, LABEL = 1.05, 0.13  # a cell, and the name of its modality below it
NARROW = 0.62  # a cell that stays empty in all samples of a task
LARGER = 1.5  # at most so many times, where there is room for it
TEXT_WIDTH = 2.15  # at least, of a sample with text in it
TITLE, TEXT, SMALL = 10.0, 7.8, 6.8
DPI = 140
TALLEST = 65_000  # pixels: the largest side that can be drawn

INK, FAINT, GROUND, EDGE = "#1a1a1a", "#6a6a6a", "#f3f3f0", "#c4c4c0"
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5a5", "#d6b000", "#f032e6", "#7a4b1e", "#6c8f00", "#003c80")


@dataclass
class Line:
    """A line below a sample, before it is wrapped."""

    text: str
    colour: str = INK
    bold: bool = False
    mark: str = ""  # the colour of a square before it


@dataclass
class Row:
    """A task as it is drawn: what is said of it, some of its samples, and what is said of each of these."""

    title: str
    facts: list[str]
    group: Group
    batch: Batch | None = None
    captions: list[list[Line]] = field(default_factory=list)
    masks: Tensor | None = None  # (samples, height, width)


def colour_of(label: int) -> str:
    return COLOURS[label % len(COLOURS)]


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def plain_line(value: Any) -> str:
    """Text on one line, without what no font can draw."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


# Values as pictures -------------------------------------------------------------------------------------------------------------


def pixels(image: Tensor, low: float, high: float) -> np.ndarray:
    """An image as matplotlib takes it: (height, width) or (height, width, 3), from 0 to 1 between `low` and `high`."""
    values = ((image.double() - low) / ((high - low) or 1.0)).nan_to_num(0.5).clamp(0, 1)
    if values.dim() == 2:
        return values.numpy()
    return values[0].numpy() if len(values) not in (3, 4) else values[:3].permute(1, 2, 0).numpy()


def value_range(values: Tensor, high: float | None) -> tuple[float, float]:
    """From where to where values run: whole numbers from 0 to `high` (255 where nobody says), floats from 0 to 1 or as far as they go."""
    if not values.is_floating_point():
        return 0.0, high or 255.0
    known = values[values.isfinite()]
    if not len(known):
        return 0.0, 1.0
    low, top = float(known.min()), float(known.max())
    return (0.0, 1.0) if low >= 0 and top <= 1 else (low, top)


def is_waveform(shape: Sequence[int]) -> bool:
    """Whether a sound of this shape is samples over time, in one channel or a few; else it is bands by frames."""
    return len(shape) == 1 or (len(shape) == 2 and shape[0] <= 2 and shape[1] >= 64 * shape[0])


def spectrogram(sound: Tensor) -> Tensor:
    """Of a waveform, the power in decibels below its loudest, down to -80  # (frequencies, frames)"""
    wave = sound.float().nan_to_num(0.0).reshape(-1, sound.shape[-1]).mean(dim=0)
    size = 2 ** min(9, max(3, int(math.log2(len(wave) / 16)) if len(wave) > 16 else 3))
    wave = torch.nn.functional.pad(wave, (0, max(0, size - len(wave))))
    power = torch.stft(wave, size, size // 4, window=torch.hann_window(size), pad_mode="constant", return_complex=True).abs().square()
    return (10 * torch.log10(power.clamp_min(1e-20) / power.max().clamp_min(1e-20))).clamp_min(-80)


def stretches(vector: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value, 0 among them, of each of at most BARS stretches of a vector."""
    parts = np.array_split(vector.double().nan_to_num(0.0).numpy(), min(BARS, len(vector)))
    return np.array([min(0.0, part.min()) for part in parts]), np.array([max(0.0, part.max()) for part in parts])


# The sheet ----------------------------------------------------------------------------------------------------------------------


class Group:
    """How much room each modality of a task's samples takes, and so how many of these are shown; what all of them lack takes little."""

    def __init__(self, modalities: Mapping[str, Modality], least: int = 1, lacking: Collection[str] = ()) -> None:
        self.texts = [name for name, modality in modalities.items() if modality.kind == "text"]
        seen = {name: modality for name, modality in modalities.items() if modality.kind != "text"}
        widths = {name: NARROW if name in lacking else _width(modality) for name, modality in seen.items()}
        self.boxed, self.labelled = len(modalities) > 1 or bool(self.texts), len(widths) > 1
        self.labelled |= any(modality.kind == "video" for modality in modalities.values())
        self.pad = INSIDE if self.boxed else 0.0
        between = INSIDE * (len(widths) - 1)
        needed = max(sum(widths.values()) + between, TEXT_WIDTH if self.texts else 0.0) + 2 * self.pad
        self.abreast = max(1, min(MOST, int((ROOM + GAP) / (needed + GAP))))
        self.samples = self.abreast * max(1, min(math.ceil(least / self.abreast), MOST // self.abreast))
        self.width = (ROOM + GAP) / self.abreast - GAP
        self.inner = self.width - 2 * self.pad
        grown = min(LARGER, (self.inner - between) / sum(widths.values())) if widths else 1.0
        self.cells = [(name, modalities[name], width * grown) for name, width in widths.items()]
        self.tall = TALL * grown if widths else 0.0  # of the cells
        self.below = self.tall + (LABEL if self.labelled else 0.0)


def _width(modality: Modality) -> float:
    """Of a cell, by the shape of what it shows."""
    shape = modality.shape
    match modality.kind:
        case "image":
            return TALL * min(2.0, max(0.6, shape[-1] / shape[-2])) if len(shape) >= 2 and shape[-2] else TALL
        case "video":
            frames = min(FRAMES, shape[0]) if shape else FRAMES
            ratio = min(2.0, max(0.6, shape[-1] / shape[-2])) if len(shape) >= 2 and shape[-2] else 1.0
            return 0.8 * ratio * frames + 0.04 * (frames - 1)
    return 1.4


class _Ruler:
    """How wide text is, by the widths of its characters."""

    def __init__(self) -> None:
        from matplotlib.backends.backend_agg import RendererAgg
        from matplotlib.font_manager import FontProperties

        renderer = RendererAgg(16, 16, 72)

        @cache
        def width(text: str, bold: bool) -> float:
            return renderer.get_text_width_height_descent(text, FontProperties(size=100, weight="bold" if bold else "normal"), False)[0]

        @cache
        def advance(character: str, bold: bool) -> float:
            return width(f"|{character}|", bold) - width("||", bold)

        self.advance = advance

    def width(self, text: str, size: float, bold: bool = False) -> float:
        return sum(self.advance(character, bold) for character in text) * size / 7200

    def wrapped(self, text: str, room: float, size: float, most: int, bold: bool = False) -> list[str]:
        """Lines that fit; where there are more than `most`, the last one ends in an ellipsis."""
        lines: list[str] = []
        for paragraph in text.split("\n"):
            line = ""
            for word in plain_line(paragraph).split(" "):
                longer = f"{line} {word}" if line else word
                if self.width(longer, size, bold) <= room:
                    line = longer
                    continue
                lines += [line] if line else []
                while len(word) > 1 and self.width(word, size, bold) > room:
                    cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or self.width(word[:n], size, bold) <= room)
                    cut = max((n for n in range(1, cut + 1) if word[n - 1] in "/_-,"), default=cut)
                    lines.append(word[:cut])
                    word = word[cut:]
                line = word
                if len(lines) > most:
                    break
            lines += [line] if line else []
            if len(lines) > most:
                break
        if len(lines) > most:
            last = lines[most - 1]
            while last and self.width(f"{last}…", size, bold) > room:
                last = last[:-1]
            lines = [*lines[: most - 1], f"{last.rstrip()}…"]
        return lines


class Sheet:
    """One set of axes in inches, downwards, on which rows are put one below another."""

    def __init__(self, title: str, facts: Sequence[str]) -> None:
        from matplotlib.figure import Figure

        self.ruler = _Ruler()
        self._figure = Figure(figsize=(WIDTH, 1.0), dpi=DPI, facecolor="white")
        self._figure.suppressComposite = True  # else SVG and PDF melt all pictures into one
        self.axes: Axes = self._figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.set_axis_off()
        self.y = MARGIN
        self.y += self._lines([Line(title, bold=True)], MARGIN, self.y, ROOM, TITLE + 2, 2)
        self.y += self._lines([Line("  ·  ".join(facts), FAINT)], MARGIN, self.y, ROOM, TEXT, 2) + 0.08

    def figure(self) -> Figure:
        height = self.y + MARGIN
        if height * DPI > TALLEST:
            raise ConfigError(
                f"--tasks: a picture of this many tasks is {height:.0f} inches tall, and {TALLEST // DPI} can be drawn: ask for fewer"
            )
        self._figure.set_size_inches(WIDTH, height)
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        return self._figure

    def add(self, row: Row) -> None:
        room = ROOM
        self.axes.plot([MARGIN, WIDTH - MARGIN], [self.y, self.y], color=EDGE, linewidth=0.8)
        self.y += 0.09
        self.y += self._lines([Line(row.title, bold=True)], MARGIN, self.y, room, TITLE, 2)
        self.y += self._lines([Line("  ·  ".join(row.facts), FAINT)], MARGIN, self.y, room, TEXT, 3) + 0.05
        if row.batch is None:
            self.y += 0.05
            return
        ranges = {name: self._range(row.batch, name, m) for name, m, _ in row.group.cells}
        for start in range(0, len(row.batch), row.group.abreast):
            line = range(start, min(start + row.group.abreast, len(row.batch)))
            tallest = max(self._sample(row, sample, self._left(row, sample - start), ranges) for sample in line)
            for sample in line if row.group.boxed else ():
                self._rectangle(self._left(row, sample - start), self.y, row.group.width, tallest, GROUND, "none", zorder=-1)
            self.y += tallest + 0.14

    def _left(self, row: Row, place: int) -> float:
        return MARGIN + place * (row.group.width + GAP)

    def _range(self, batch: Batch, name: str, modality: Modality) -> tuple[float, float]:
        """Over the samples that are shown, so that they can be compared."""
        values = batch.inputs.get(name)
        if not isinstance(values, Tensor):
            return 0.0, 1.0
        mask = (batch.present or {}).get(name)
        return value_range(values if mask is None else values[mask], modality.high)

    def _sample(self, row: Row, sample: int, left: float, ranges: Mapping[str, tuple[float, float]]) -> float:
        """Draw one sample, and say how tall it is."""
        batch, group = row.batch, row.group
        assert batch is not None
        x, y = left + group.pad, self.y + group.pad
        room, masks = group.inner, row.masks
        for name, modality, width in group.cells:
            values = batch.inputs.get(name)
            if not isinstance(values, Tensor) or not _there(batch, name, sample):
                self._missing(x, y, width, group.tall, "" if group.labelled else name)
            else:
                mask = masks[sample] if masks is not None and modality.kind == "image" else None
                self._cell(values[sample], modality, (x, y, width, group.tall), ranges[name], mask)
                masks = None if mask is not None else masks
            if group.labelled:
                self._text(x + width / 2, y + group.tall + 0.1, _label(name, modality, values), SMALL, FAINT, ha="center")
            x += width + INSIDE
        x, y = left + group.pad, y + group.below + (0.04 if group.cells else 0.0)
        for name in group.texts:
            column = batch.inputs.get(name)
            text = str(column[sample]) if isinstance(column, list) else ""
            if not isinstance(column, list) or not _there(batch, name, sample):
                self._missing(x, y + 0.02, room, 0.22, name)
                y += 0.28
                continue
            label = f"{name}: " if len(group.texts) > 1 else ""
            y += self._lines(
                [Line(f"{label}{text}" if text.strip() else f"{label}(empty)", INK if text.strip() else FAINT)], x, y, room, TEXT, 7
            )
        y += self._lines(row.captions[sample], x, y, room, TEXT, 3)
        return y + group.pad - self.y

    def _cell(
        self,
        value: Tensor,
        modality: Modality,
        box: tuple[float, float, float, float],
        between: tuple[float, float],
        mask: Tensor | None,
    ) -> None:
        x, y, width, height = box
        if modality.kind == "video" and value.dim() == 4:
            frames = evenly(len(value), FRAMES)
            each = (width - 0.04 * (len(frames) - 1)) / len(frames)
            for place, frame in enumerate(frames):
                self._image(pixels(value[frame], *between), (x + place * (each + 0.04), y, each, height))
        elif modality.kind == "audio" and is_waveform(value.shape):
            self._image(((spectrogram(value) + 80) / 80).flip(0).numpy(), box, "magma", fit=False)
        elif modality.kind == "audio" or (modality.kind == "vector" and value.dim() == 2):
            low, high = between if modality.kind == "vector" else value_range(value[value.isfinite()], modality.high)
            shown = value.flip(0) if modality.kind == "audio" else value.T
            self._image(pixels(shown, low, high), box, "magma" if modality.kind == "audio" else "viridis", fit=False)
        elif value.dim() in (2, 3):
            drawn = self._image(pixels(value, *between), box)
            if mask is not None:
                self._overlay(mask, drawn)
        else:
            self._bars(value.flatten(), box, between)

    def _image(
        self, values: np.ndarray, box: tuple[float, float, float, float], colours: str = "gray", fit: bool = True
    ) -> tuple[float, float, float, float]:
        """In the middle of the box, as large as its proportions allow; the box that it takes."""
        x, y, width, height = box
        if fit:
            scale = min(width / values.shape[1], height / values.shape[0])
            w, h = values.shape[1] * scale, values.shape[0] * scale
            x, y, width, height = x + (width - w) / 2, y + (height - h) / 2, w, h
        self.axes.imshow(
            values, cmap=colours, vmin=0, vmax=1, extent=(x, x + width, y + height, y), aspect="auto", interpolation="antialiased"
        )
        self._rectangle(x, y, width, height, "none", EDGE)
        return x, y, width, height

    def _overlay(self, mask: Tensor, box: tuple[float, float, float, float]) -> None:
        from matplotlib.colors import to_rgba

        palette = np.array([to_rgba(colour_of(label), 0.5) for label in range(255)] + [(0.0, 0.0, 0.0, 0.0)])
        x, y, width, height = box
        self.axes.imshow(palette[mask.long().numpy()], extent=(x, x + width, y + height, y), aspect="auto", interpolation="nearest")

    def _bars(self, vector: Tensor, box: tuple[float, float, float, float], between: tuple[float, float]) -> None:
        from matplotlib.collections import PolyCollection

        x, y, width, height = box
        low, high = min(0.0, between[0]), max(0.0, between[1])
        self._rectangle(x, y, width, height, "white", EDGE)
        lows, highs = stretches(vector)
        at = y + height * (high - np.stack([highs, lows])) / ((high - low) or 1.0)  # (2, bars)
        edges = np.linspace(x, x + width, len(lows) + 1)
        corners = [[(a, top), (b, top), (b, bottom), (a, bottom)] for a, b, top, bottom in zip(edges, edges[1:], *at, strict=False)]
        self.axes.add_collection(PolyCollection(corners, facecolors="#3b6ea8", edgecolors="white", linewidths=0.2, zorder=3), autolim=False)

    def _missing(self, x: float, y: float, width: float, height: float, name: str) -> None:
        self._rectangle(x, y, width, height, "white", "#a05050", dashed=True)
        words = [word for word in (name, "missing") if word]
        lines = words if height > 0.4 else [" ".join(words)]
        for number, line in enumerate(lines):
            middle = y + height / 2 + 0.04 + 0.14 * (number - (len(lines) - 1) / 2)
            self._text(x + width / 2, middle, line, TEXT, "#a05050", ha="center")

    def _rectangle(
        self, x: float, y: float, width: float, height: float, face: str, edge: str, zorder: float = 2, dashed: bool = False
    ) -> None:
        from matplotlib.patches import Rectangle

        line = (0, (4, 3)) if dashed else "solid"
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=edge, linewidth=0.7, linestyle=line, zorder=zorder))

    def _lines(self, lines: Sequence[Line], x: float, y: float, room: float, size: float, most: int) -> float:
        """Draw paragraphs, each of at most so many lines, and say how tall they are."""
        step, start = 1.3 * size / 72, y
        for line in lines:
            indent = 0.13 if line.mark else 0.0
            for number, text in enumerate(self.ruler.wrapped(line.text, room - indent, size, most, line.bold)):
                if line.mark and number == 0:
                    self._rectangle(x, y + 0.24 * step, 0.09, 0.09, line.mark, "none")
                y += step
                self._text(x + indent, y - 0.25 * step, text, size, line.colour, bold=line.bold)
        return y - start

    def _text(self, x: float, y: float, text: str, size: float, colour: str = INK, bold: bool = False, ha: str = "left") -> None:
        weight = "bold" if bold else "normal"
        self.axes.text(x, y, text, fontsize=size, color=colour, weight=weight, ha=ha, va="baseline", parse_math=False, zorder=4)


def _label(name: str, modality: Modality, values: Column | None) -> str:
    frames = values.shape[1] if modality.kind == "video" and isinstance(values, Tensor) else 0
    return f"{name}, {FRAMES} of {frames} frames" if frames > FRAMES else name


def _there(batch: Batch, name: str, sample: int) -> bool:
    mask = (batch.present or {}).get(name)
    return mask is None or bool(mask[sample])


def write(figure: Figure, path: Path, dpi: int, **how: Any) -> None:
    """The file holds the whole figure or what it held before; the same figure is always the same bytes."""
    import matplotlib

    ending = path.suffix.lower().removeprefix(".")
    unsaid: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "streamcl"}):
        figure.savefig(content, format=ending, dpi=dpi, metadata=unsaid[ending], **how)
    aside = path.with_name(f".{path.name}.writing")
    try:
        aside.write_bytes(content.getvalue())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise disk_error(error, path) from error
