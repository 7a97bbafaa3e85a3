"""Questions in words, some with a picture, and the answers that verifiers check: from single records to data sets."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamcl.errors import ConfigError, DataError
from streamcl.options import Fraction, NonNegativeInt
from streamcl.plugins import near_name, plugins
from streamcl.seeding import generator
from streamcl.stream import Column, SourceData
from streamcl.verifiers.choice import Choice
from streamcl.verifiers.number import Number

from ._dialogue import Picture
from ._listed import Listed, ListedMedia, Refused, Standing
from ._media import Encoded, FileBytes

UNREADABLE = "right answer that its verifier cannot read (kept, not scored)"


@dataclass
class Question:
    """One row. `origin` numbers the record that it comes from: rows of one record stay in one part."""

    text: str
    answer: str
    group: str
    where: str
    origin: int
    pictures: list[Picture]
    verifier: str = ""
    choices: str = ""  # one per line
    difficulty: float = math.nan


class QuestionSource(ListedMedia):
    """What sources of questions share: where pictures lie, who checks an answer, and the part that is held back for testing."""

    def __init__(
        self,
        *,
        images: Path | None = None,
        verifier: str | None = None,
        test_fraction: Fraction = 0.0,
        split_seed: NonNegativeInt = 0,
        **media: Any,
    ) -> None:
        super().__init__(**media)
        check_verifier(verifier)
        self.images, self.verifier, self.test_fraction, self.split_seed = images, verifier, test_fraction, split_seed

    def refuse_both(self, test: Any) -> None:
        if test is not None and self.test_fraction:
            raise ConfigError("test and test_fraction contradict each other: give the test files, or the share to hold back")

    def divided(self, rows: list[Question]) -> tuple[list[Question], list[Question]]:
        return parts_of(rows, self.test_fraction, generator(self.split_seed, "test"))

    def assembled(self, train: list[Question], test: list[Question], names: Sequence[str], refused: Refused) -> SourceData:
        seen = any(question.pictures for question in [*train, *test])
        held = listed(test, names, refused, seen) if test else None
        return self.assemble(listed(train, names, refused, seen), held, names, refused, target="text")


class _Held:
    """Fetches pictures that are in memory, or in files of their own."""

    def __init__(self, pictures: Sequence[Picture | None]) -> None:
        self.pictures = pictures

    def __call__(self, row: int) -> bytes:
        picture = self.pictures[row]
        assert picture is not None
        return picture if isinstance(picture, bytes) else FileBytes([picture])(0)


class SomePictures(Encoded):
    """A column of images in which some rows have none (row -1): black, and masked by `present`."""

    def __init__(self, kind: str, fetch: Callable[[int], bytes], where: Callable[[int], str], rows: np.ndarray) -> None:
        super().__init__(kind, fetch, where, rows)

    def take(self, places: np.ndarray) -> SomePictures:
        taken = SomePictures(self.kind, self.fetch, self.where, self.rows[places])  # type: ignore[arg-type]
        taken.size, taken.seconds, taken.shape, taken.rate = self.size, self.seconds, self.shape, self.rate
        return taken

    def settle(self, skip: bool) -> None:
        held = np.flatnonzero(self.rows >= 0)
        if len(held) or not self.shape:
            there = Encoded(self.kind, self.fetch, self.where, self.rows[held])
            there.size, there.shape = self.size, self.shape
            there.settle(skip)
            self.shape = there.shape

    def one(self, place: int) -> np.ndarray:
        return super().one(place) if self.rows[place] >= 0 else np.zeros(self.shape, dtype=np.uint8)


def listed(questions: Sequence[Question], names: Sequence[str], refused: Refused, with_pictures: bool) -> Listed:
    """The rows of one part; `names` are the groups."""
    number = {name: place for place, name in enumerate(names)}
    columns: dict[str, Column | Encoded] = {"text": [question.text for question in questions]}
    present = {}
    if with_pictures:
        first = [question.pictures[0] if question.pictures else None for question in questions]
        has = np.array([picture is not None for picture in first], dtype=bool)
        where = Standing([question.where for question in questions])
        columns["image"] = SomePictures("image", _Held(first), where, np.where(has, np.arange(len(first)), -1))
        if not has.all():
            present["image"] = torch.from_numpy(has)
    further = sum(len(question.pictures) > 1 for question in questions)
    if further:
        _count(refused, "question with further pictures, of which only the first is used", further)
    group = torch.tensor([number[question.group] for question in questions], dtype=torch.int64)
    extra: dict[str, Column] = {
        "answer": [question.answer for question in questions],
        "verifier": [question.verifier or verifier_for(question.answer, question.choices) for question in questions],
        "choices": [question.choices for question in questions],
        "skill": [question.group for question in questions],
    }
    difficulty = torch.tensor([question.difficulty for question in questions], dtype=torch.float32)
    if not bool(difficulty.isnan().all()):
        extra["difficulty"] = difficulty
    unreadable = _unreadable(extra)
    if unreadable:
        _count(refused, UNREADABLE, unreadable)
    return Listed(columns, group, present=present, extra=extra)


def verifier_for(answer: str, choices: str) -> str:
    """The verifier that fits a right answer: one of the choices or a single capital letter, a number, or text."""
    if choices and Choice().read(answer, choices.split("\n"), True) is not None:
        return "choice"
    if len(answer) == 1 and "A" <= answer <= "Z":
        return "choice"
    return "number" if Number().read(answer, [], True) is not None else "text"


def check_verifier(name: str | None) -> None:
    """ConfigError where rows would name a verifier that there is not."""
    known = plugins("verifier", [])
    if name is not None and name not in known:
        raise ConfigError(f"unknown verifier {name!r}" + (near_name(name, known) or f"; there are {', '.join(sorted(known))}"))


def parts_of(questions: Sequence[Question], fraction: float, draw: torch.Generator) -> tuple[list[Question], list[Question]]:
    """Training and test rows: no record and no picture is in both, and of every group the test part gets `fraction` of the rows.

    Rows of one record, or with one picture, are drawn together, in a random order, each where it brings the test part nearer to what is
    asked for. Of every group there is a row in either part, where that can be.
    """
    if not fraction or not questions:
        return list(questions), []
    number = {name: place for place, name in enumerate(dict.fromkeys(question.group for question in questions))}
    group = torch.tensor([number[question.group] for question in questions], dtype=torch.int64)
    counts = torch.bincount(group)
    up_to = (counts.cumsum(0).double() * fraction + 0.5).floor().long()
    wanted = up_to.diff(prepend=up_to.new_zeros(1)).clamp(min=1).minimum(counts - 1).tolist()
    unit = _drawn_together(questions)
    if max(unit) == 0 and len(questions) > 1:
        raise DataError(f"{questions[0].where}: all rows show the same picture, so that test_fraction can hold none back: give a test file")
    holds: list[Counter[int]] = [Counter() for _ in range(max(unit) + 1)]
    for row, place in enumerate(unit):
        holds[place][int(group[row])] += 1
    taken, left, held = [0] * len(counts), counts.tolist(), set()

    def take(place: int) -> None:
        held.add(place)
        for one, size in holds[place].items():
            taken[one] += size
            left[one] -= size

    def can_go(place: int) -> bool:
        return all(left[one] > size for one, size in holds[place].items())

    shuffled = torch.randperm(len(holds), generator=draw).tolist()
    for place in shuffled:
        gain = sum(abs(taken[one] - wanted[one]) - abs(taken[one] + size - wanted[one]) for one, size in holds[place].items())
        if gain > 0 and can_go(place):
            take(place)
    for one in range(len(counts)):
        free = [place for place in shuffled if place not in held and one in holds[place] and can_go(place)]
        if wanted[one] and not taken[one] and free:
            take(min(free, key=lambda place: holds[place].total()))
    parts: tuple[list[Question], list[Question]] = [], []
    for question, place in zip(questions, unit, strict=True):
        parts[place in held].append(question)
    return parts


def _drawn_together(questions: Sequence[Question]) -> list[int]:
    """A number for each row: the same for rows of one record, and for rows with one picture (its path, or its content)."""
    first: dict[object, int] = {}
    leader = list(range(len(questions)))

    def found(row: int) -> int:
        while leader[row] != row:
            leader[row] = row = leader[leader[row]]
        return row

    for row, question in enumerate(questions):
        for key in (question.origin, *map(_picture_key, question.pictures[:1])):
            one, other = found(first.setdefault(key, row)), found(row)
            leader[max(one, other)] = min(one, other)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(found(row), len(numbers)) for row in range(len(questions))]


def _picture_key(picture: Picture) -> str | bytes:
    return hashlib.sha256(picture).digest() if isinstance(picture, bytes) else str(Path(picture).resolve())


def _unreadable(extra: dict[str, Column]) -> int:
    """How many rows no answer could ever be scored on."""
    names, answers, choices = (extra[name] for name in ("verifier", "answer", "choices"))
    assert isinstance(names, list) and isinstance(answers, list) and isinstance(choices, list)
    count = 0
    for name in dict.fromkeys(names):
        mine = [place for place, other in enumerate(names) if other == name]
        rows: dict[str, Column] = {"answer": [answers[place] for place in mine], "choices": [choices[place] for place in mine]}
        count += int(plugins("verifier", [])[name].load()()([""] * len(mine), rows).isnan().sum())
    return count


def _count(refused: Refused, problem: str, times: int) -> None:
    refused.problems[problem] = refused.problems.get(problem, 0) + times
