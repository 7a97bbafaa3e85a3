"""What every kind of puzzle says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .dice import Dice, Numbers
from .things import Picture, Words


@dataclass
class Drawn:
    """Puzzles as numbers. `scene` is all that the picture shows, and the only thing that it shows; `asked` is the question and
    its answer."""

    scene: Numbers  # (rows, columns of the skill), non-negative
    asked: Numbers  # (rows, columns of the skill)
    sound: NDArray[np.bool_] | None = None  # rows that make a puzzle; the others are thrown again


class Skill(ABC):
    """One kind of puzzle: throws it, draws it, and asks in words. Everything works on many rows at once, and in colour or in grey."""

    name: ClassVar[str]
    modality: ClassVar[str] = "image"
    columns: ClassVar[tuple[int, int]]  # how many numbers a scene has, and a question

    @abstractmethod
    def throw(self, dice: Dice, level: Numbers, colours: bool) -> Drawn:
        """A puzzle for each row. The answer is thrown once, so that a row that is thrown again keeps it."""

    @abstractmethod
    def draw(self, scene: Numbers, size: int, colours: bool) -> Picture:
        """The pictures, (rows, 3, size, size), or frames, (rows, frames, 3, size, size)."""

    @abstractmethod
    def questions(self, asked: Numbers, wording: Numbers, colours: bool) -> list[str]:
        """The question of each row; `wording` is any number and picks among the ways to ask."""

    @abstractmethod
    def answers(self, scene: Numbers, asked: Numbers, colours: bool) -> tuple[Words, Words, Words]:
        """The answer, the choices joined by line breaks ("" where there are none), and the verifier's name, of each row."""


def asking(templates: tuple[str, ...], number: int, *words: object) -> str:
    return templates[number % len(templates)].format(*words)


def numbers_as_words(numbers: Numbers) -> Words:
    return np.array([str(number) for number in range(int(numbers.max(initial=0)) + 1)], dtype=object)[numbers]


def everywhere(word: str, rows: int) -> Words:
    return np.full(rows, word, dtype=object)


def chosen(code: Numbers, *options: Words) -> Words:
    """Of each row the option that `code` numbers."""
    picked: Words = np.stack(options)[code, np.arange(len(code))]
    return picked
