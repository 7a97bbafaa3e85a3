"""Questions in words, some with a picture, and the answers that verifiers check: from single records to data sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.plugins import near_name, plugins
from streamcl.stream import Column
from streamcl.verifiers.choice import Choice
from streamcl.verifiers.number import Number

from ._dialogue import Picture
from ._listed import Listed, Refused, Standing
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


def parts_of(
    questions: Sequence[Question], fraction: float, split: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[list[Question], list[Question]]:
    """Training and test rows by the records that they come from, so that no dialogue and no picture of one is in both."""
    if not fraction:
        return list(questions), []
    first = {question.origin: question.group for question in reversed(questions)}
    origins = sorted(first)
    number = {name: place for place, name in enumerate(dict.fromkeys(first[origin] for origin in origins))}
    _, held = split(torch.tensor([number[first[origin]] for origin in origins], dtype=torch.int64))
    test = {origins[place] for place in held.tolist()}
    return [q for q in questions if q.origin not in test], [q for q in questions if q.origin in test]


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
