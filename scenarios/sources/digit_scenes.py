"""Scenes of several of scikit-learn's real handwritten digits on one canvas, made on the spot: multi-label, dense, and in words.

The digits are those of the source `digits` (UCI "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, 1998, CC BY
4.0), enlarged by whole factors. Training scenes hold only digits of its training part, test scenes only of its test part. A scene
depends on the seed and its own number alone, so that a longer stream begins with the same scenes. Every class is equally likely at
every place, whatever its share of the set.

`as` says what the samples are. labels: which digits are there. masks: the class of every pixel (at least a quarter of full ink; where
two digits meet, that of the darker one), with the background as the last class. value: a number, the sum for instance. captions: a true
sentence about each scene, to be found again; `pair` in extra is the same number where the same sentence was said of several scenes, and
`about["coinciding_captions"]` counts those for which that holds within their domain. dialogues: a question, groups by its kind (count,
sum, largest, present, position); positions are thirds of the canvas by the centre of the digit, and the difficulty is how many
steps an answer takes: one for each digit there is, and one for each addition.

Every scene has its digits' boxes in extra: `boxes` (left, upper, right and lower edge, the latter two just outside) and `box_labels`, both
-1 where there are fewer digits than the most. The looks (plain, inverted, coloured, noisy, striped) are ours; they are the grouping
`domain`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import Fraction, NonNegativeInt, PositiveInt
from streamcl.stream import Column, Dataset, Grouping, Modality, Source, SourceData

from ._drawn import Draws, drawn
from ._scene_texts import KINDS, captions, dialogues
from ._scenes import SIDE, Layout, Painter, cells, compose
from .digits import Digits

_LOOKS = ("plain", "inverted", "coloured", "noisy")


class DigitScenes(Source):
    """`scenes` of `size` x `size` pixels for training and `test_scenes` for testing, with `digits` (fewest, most) on each.

    `digits` is 1 to 4 where it is not given, and 3 to 4 for captions, which then are nearly all different; `scale` is the largest
    enlargement. `domains` are the looks, dealt out in turn: plain alone where they are not given, and four of them for captions. Scenes
    have three channels where a look is coloured, and one elsewhere. `draw` makes scenes at once, when they are read, or at once while they
    take less than 512 MB (`auto`).
    """

    licence = "CC BY 4.0"
    class_count: ClassVar = {"labels": 10, "masks": 11, "dialogues": 5}

    def __init__(
        self,
        *,
        as_: Literal["labels", "masks", "captions", "dialogues", "value"] = "labels",
        value: Literal["sum", "mean", "largest", "count"] | None = None,
        scenes: PositiveInt = 2000,
        test_scenes: PositiveInt = 500,
        size: PositiveInt = 32,
        digits: tuple[PositiveInt, PositiveInt] | None = None,
        scale: PositiveInt = 2,
        overlap: bool = False,
        domains: list[Literal["plain", "inverted", "coloured", "noisy", "striped"]] | None = None,
        seed: NonNegativeInt = 0,
        test_fraction: Fraction = 0.3,
        split_seed: NonNegativeInt = 0,
        draw: Literal["eager", "lazy", "auto"] = "auto",
    ) -> None:
        least, most = digits or ((3, 4) if as_ == "captions" else (1, 4))
        if least > most:
            raise ConfigError(f"digit_scenes: digits is [{least}, {most}]: the fewest come first, then the most")
        if value is not None and as_ != "value":
            raise ConfigError(f"digit_scenes: value belongs to `as: value`, and as is {as_}: leave one of them out")
        side = SIDE * scale
        if size < side:
            raise ConfigError(f"digit_scenes: a digit of scale {scale} takes {side} pixels, and size is {size}: at least {side} is needed")
        if not overlap and size // cells(most) < side:
            need = side * cells(most)
            raise ConfigError(
                f"digit_scenes: {most} digits of scale {scale} find no room apart from each other on {size} pixels: "
                f"give size: {need}, fewer digits, a smaller scale, or overlap: true"
            )
        if as_ == "dialogues" and overlap:
            raise ConfigError("digit_scenes: questions about digits that hide each other have no certain answer: leave out overlap")
        if as_ == "dialogues" and most > 10:
            raise ConfigError(f"digit_scenes: digits goes up to {most}; questions for a digit's position need different ones: at most 10")
        if not test_fraction:
            raise ConfigError("digit_scenes: test_fraction is 0, and test scenes need digits of their own: 0.3 is usual")
        looks = list(domains or (_LOOKS if as_ == "captions" else ("plain",)))
        if len(set(looks)) < len(looks):
            raise ConfigError(f"digit_scenes: domains lists one twice: {', '.join(looks)}")
        self.as_, self.value, self.size, self.digits, self.scale, self.overlap = as_, value, size, (least, most), scale, overlap
        self.scenes, self.test_scenes, self.domains, self.seed, self.draw = scenes, test_scenes, looks, seed, draw
        self.test_fraction, self.split_seed = test_fraction, split_seed

    def load(self) -> SourceData:
        digits = Digits(test_fraction=self.test_fraction, split_seed=self.split_seed).load()
        about: dict[str, Any] = {"coinciding_captions": {}} if self.as_ == "captions" else {}
        data, domain = self._part("train", digits.train, self.scenes, 0, about)
        test, test_domain = self._part("test", digits.test, self.test_scenes, self.scenes, about)
        numerals = [str(digit) for digit in range(10)]
        names = {"masks": [*numerals, "background"], "captions": self.domains, "dialogues": list(KINDS), "value": []}
        modalities = {"image": Modality("image", (3 if "coloured" in self.domains else 1, self.size, self.size), high=255)}
        if self.as_ in ("captions", "dialogues"):
            modalities["text"] = Modality("text")
        targets = {"labels": "labels", "masks": "mask", "value": "value"}
        return SourceData(
            data,
            test,
            names.get(self.as_, numerals),
            modalities,
            targets.get(self.as_, "text"),
            self.licence,
            groupings={"domain": Grouping(self.domains, domain, test_domain)},
            about=about,
        )

    def _part(self, part: str, digits: Any, count: int, first_id: int, about: dict[str, Any]) -> tuple[Dataset, Tensor]:
        draws, rows = Draws(self.seed, "digit_scenes", part), np.arange(count)
        kinds = len(KINDS) if self.as_ == "dialogues" else 1
        kind = rows % kinds
        layout = compose(
            draws,
            rows,
            digits.targets.numpy(),
            size=self.size,
            digits=self.digits,
            scale=self.scale,
            overlap=self.overlap,
            domain=rows // kinds % len(self.domains),
            distinct=(kind == KINDS.index("position")) & (self.as_ == "dialogues"),
        )
        painter = Painter(draws, layout, digits.inputs["image"], self.size, self.scale, self.domains)
        extra: dict[str, Column] = {"boxes": layout.boxes(), "box_labels": torch.from_numpy(layout.classes.astype(np.int64))}
        text: list[str] | None = None
        domain = torch.from_numpy(layout.domain)
        if self.as_ == "labels":
            targets = _labels(layout)
        elif self.as_ == "value":
            targets = _value(layout, self.value or "sum")
        elif self.as_ == "masks":
            targets = _masks(painter, rows)
        elif self.as_ == "captions":
            text, targets = captions(layout, self.size, self.scale, self.domains), domain
            pair = np.unique(np.array(text), return_inverse=True)[1]
            extra |= {"caption": text, "answer": text, "pair": torch.from_numpy(pair.astype(np.int64))}
            _, group, times = np.unique(pair * len(self.domains) + layout.domain, return_inverse=True, return_counts=True)
            about["coinciding_captions"][part] = int((times[group] > 1).sum())
        else:
            said, targets = dialogues(draws, rows, layout, kind, self.size), torch.from_numpy(kind)
            text = said.questions
            extra |= {
                "answer": said.answers,
                "verifier": said.verifiers,
                "choices": said.choices,
                "difficulty": torch.from_numpy(said.difficulty),
                "skill": [KINDS[number] for number in kind.tolist()],
            }
        return drawn(_Drawing(painter, text), targets, first_id, self.draw, extra), domain


class _Drawing:
    """The inputs of some scenes."""

    def __init__(self, painter: Painter, text: list[str] | None) -> None:
        self.painter, self.text = painter, text

    def __call__(self, rows: np.ndarray) -> dict[str, Column]:
        inputs: dict[str, Column] = {"image": self.painter.images(rows, *self.painter.ink(rows))}
        if self.text is not None:
            inputs["text"] = [self.text[row] for row in rows.tolist()]
        return inputs


def _labels(layout: Layout) -> Tensor:
    held = np.zeros((len(layout.classes), 11), dtype=np.int8)
    np.put_along_axis(held, np.where(layout.used, layout.classes, 10).astype(np.int64), 1, axis=1)  # column 10 takes the empty places
    return torch.from_numpy(held[:, :10].copy())


def _value(layout: Layout, value: str) -> Tensor:
    classes, count = np.where(layout.used, layout.classes, 0).astype(np.float32), layout.used.sum(axis=1).astype(np.float32)
    values = {"sum": classes.sum(axis=1), "mean": classes.sum(axis=1) / count, "largest": classes.max(axis=1), "count": count}
    return torch.from_numpy(values[value])


def _masks(painter: Painter, rows: np.ndarray) -> Tensor:
    parts = np.array_split(rows, range(1024, len(rows), 1024))
    return torch.cat([painter.mask(part, *painter.ink(part)) for part in parts])
