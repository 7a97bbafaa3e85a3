"""Visual puzzles drawn on the spot whose answers can be checked: counting, comparing, spatial relations, charts, mazes, frames in order.

Nothing is downloaded or stored: the puzzles are made here, and free of any licence (CC0-1.0). A row is thrown from
(`made_with`, split, skill, its number in the skill) alone, so that it stays the same whatever else is asked for, and is drawn when it is
read, at any `size`. Every puzzle has five levels; a row's difficulty is its level, and the levels take turns.

The test set is held out by what a picture shows: one in four of all pictures that a skill can draw belongs to the test set, for every
seed and size, so no picture of the training set is ever asked about in a test, be it in other words. Answers are balanced: among the
questions of one kind at one level every possible answer is equally frequent.

Each row has its question in words, a picture or (`order`) four frames, the answer in words, its choices where there are some, the
verifier that checks it (`number`, `choice` or `sequence`), its difficulty and its skill. In grey (`colours: false`) things are told
apart by their shapes and bars by their places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from streamcl.data import FileDataset
from streamcl.errors import ConfigError
from streamcl.options import NonNegativeInt, PositiveInt
from streamcl.plugins import near_name
from streamcl.seeding import derived
from streamcl.stream import Column, Grouping, Modality, Source, SourceData

from ._puzzles.chart import Chart
from ._puzzles.comparing import Comparing
from ._puzzles.counting import Counting
from ._puzzles.dice import Dice, fingerprint
from ._puzzles.maze import Maze
from ._puzzles.order import FRAMES, Order
from ._puzzles.skill import Skill
from ._puzzles.spatial import Spatial
from ._puzzles.things import Words

SKILLS: dict[str, Skill] = {skill.name: skill for skill in (Counting(), Comparing(), Spatial(), Chart(), Maze(), Order())}
LEVELS, SMALLEST = 5, 24
HELD_OUT = 4  # one in so many pictures belongs to the test set
ATTEMPTS = 1000
NUMBERED = 10**9  # ids of one skill and split begin at a multiple of it


class Puzzles(Source):
    """`skills` lists some of the six, or gives each a weight; each gets `count` rows for training on average (equal weights: exactly),
    and `test` for the test set. `difficulty` is the first and the last level, `size` the width of a picture in pixels.
    """

    licence = "CC0-1.0"

    def __init__(
        self,
        *,
        skills: list[str] | dict[str, float] | None = None,
        count: PositiveInt = 200,
        test: PositiveInt = 50,
        size: PositiveInt = 28,
        difficulty: tuple[int, int] = (1, 5),
        made_with: NonNegativeInt = 0,
        colours: bool = True,
        workers: NonNegativeInt = 0,
    ) -> None:
        weights = dict.fromkeys(SKILLS, 1.0) if skills is None else skills if isinstance(skills, dict) else dict.fromkeys(skills, 1.0)
        for name in weights:
            if name not in SKILLS:
                raise ConfigError(f"puzzles: skills names {name!r}{near_name(name, SKILLS) or ': there are ' + ', '.join(SKILLS)}")
        if not weights or (isinstance(skills, list) and len(weights) < len(skills)):
            raise ConfigError(f"puzzles: skills is {skills}: name at least one skill, and each once")
        if not all(0 < weight < float("inf") for weight in weights.values()):
            raise ConfigError("puzzles: the weights of skills must be above 0: leave out a skill that is not wanted")
        low, high = difficulty
        if not 1 <= low <= high <= LEVELS:
            raise ConfigError(f"puzzles: difficulty is [{low}, {high}]: the first and the last level, from 1 to {LEVELS}, are needed")
        if size < SMALLEST:
            raise ConfigError(f"puzzles: size is {size}: below {SMALLEST} pixels a puzzle cannot be read")
        for option, rows in (("count", count * len(weights)), ("test", test)):
            if rows >= NUMBERED:
                raise ConfigError(f"puzzles: {option} asks for {rows} rows: at most {NUMBERED - 1} are possible")
        self.weights, self.count, self.held, self.size = weights, count, test, size
        self.levels, self.made_with, self.colours, self.workers = (low, high), made_with, colours, workers

    def load(self) -> SourceData:
        counts = _shares(list(self.weights.values()), self.count * len(self.weights))
        for name, rows in zip(self.weights, counts, strict=True):
            if rows == 0:
                raise ConfigError(f"puzzles: the weight of {name} leaves it no row: raise the weight or count")
        modalities = {"text": Modality("text")}
        kinds = {SKILLS[name].modality for name in self.weights}
        if "image" in kinds:
            modalities["image"] = Modality("image", (3, self.size, self.size), 255)
        if "video" in kinds:
            modalities["video"] = Modality("video", (FRAMES, 3, self.size, self.size), 255)
        names = list(self.weights)
        train = self._dataset(
            [self._page(SKILLS[name], "train", rows) for name, rows in zip(names, counts, strict=True)], modalities, False
        )
        test = self._dataset([self._page(SKILLS[name], "test", self.held) for name in names], modalities, True)
        return SourceData(
            train,
            test,
            names,
            modalities,
            target="text",
            licence=self.licence,
            groupings={"skill": Grouping(names, train.targets, test.targets)},
            about={"levels": list(self.levels)},
        )

    def _page(self, skill: Skill, split: str, count: int) -> _Page:
        """Puzzles of one skill; a row whose picture belongs to the other split is thrown again."""
        low, high = self.levels
        rows = np.arange(count)
        level = low + rows % (high - low + 1)
        key = derived(self.made_with, "puzzles", split, skill.name)
        scene, asked = np.empty((count, skill.columns[0]), np.int16), np.empty((count, skill.columns[1]), np.int16)
        waiting = rows
        for attempt in range(ATTEMPTS):
            drawn = skill.throw(Dice(key, waiting, attempt), level[waiting], self.colours)
            held_out = fingerprint(drawn.scene, list(SKILLS).index(skill.name)) % np.uint64(HELD_OUT) == 0
            mine = held_out == (split == "test")
            if drawn.sound is not None:
                mine &= drawn.sound
            scene[waiting[mine]], asked[waiting[mine]] = drawn.scene[mine], drawn.asked[mine]
            waiting = waiting[~mine]
            if not len(waiting):
                wording = Dice(derived(key, "wording"), rows, 0).below(2**15).astype(np.int16)
                return _Page(skill, level, scene, asked, wording)
        raise ConfigError(f"puzzles: {skill.name} has no {split} puzzle at level {level[waiting[0]]}")

    def _dataset(self, pages: list[_Page], modalities: dict[str, Modality], test: bool) -> FileDataset:
        sizes = [len(page.level) for page in pages]
        number = torch.arange(len(pages)).repeat_interleave(torch.tensor(sizes))  # of each row's skill
        first_id = torch.tensor([(2 * list(SKILLS).index(page.skill.name) + test) * NUMBERED for page in pages])
        answer, choices, verifier = zip(*(page.answers(self.colours) for page in pages), strict=True)
        extra: dict[str, Column] = {
            "answer": np.concatenate(answer).tolist(),
            "choices": np.concatenate(choices).tolist(),
            "verifier": np.concatenate(verifier).tolist(),
            "difficulty": torch.from_numpy(np.concatenate([page.level for page in pages])).float(),
            "skill": np.array([page.skill.name for page in pages], dtype=object)[number.numpy()].tolist(),
        }
        present = {
            name: torch.tensor([name in ("text", page.skill.modality) for page in pages])[number]
            for name in modalities
            if len(modalities) > 2
        }
        return FileDataset(
            _Reader(pages, self.size, self.colours, modalities),
            number,
            first_id[number] + torch.cat([torch.arange(rows) for rows in sizes]),
            self.workers,
            extra,
            present or None,
        )


@dataclass
class _Page:
    """The puzzles of one skill, as numbers: a few bytes for each."""

    skill: Skill
    level: NDArray[np.int64]
    scene: NDArray[np.int16]
    asked: NDArray[np.int16]
    wording: NDArray[np.int16]

    def answers(self, colours: bool) -> tuple[Words, Words, Words]:
        return self.skill.answers(self.scene.astype(np.int64), self.asked.astype(np.int64), colours)


class _Reader:
    """Asks and draws the rows that are read, all of one skill at once."""

    def __init__(self, pages: list[_Page], size: int, colours: bool, modalities: dict[str, Modality]) -> None:
        self.pages, self.size, self.colours, self.modalities = pages, size, colours, modalities
        self.ends = np.cumsum([len(page.level) for page in pages])

    def __call__(self, rows: list[int]) -> dict[str, Column]:
        wanted = np.asarray(rows, dtype=np.int64)
        owner = np.searchsorted(self.ends, wanted, side="right")
        text = np.empty(len(wanted), dtype=object)
        drawn = {
            name: np.zeros((len(wanted), *modality.shape), dtype=np.uint8) for name, modality in self.modalities.items() if modality.shape
        }
        for number in np.unique(owner).tolist():
            page, mine = self.pages[number], np.flatnonzero(owner == number)
            place = wanted[mine] - (self.ends[number] - len(page.level))
            text[mine] = page.skill.questions(page.asked[place], page.wording[place], self.colours)
            drawn[page.skill.modality][mine] = page.skill.draw(page.scene[place].astype(np.int64), self.size, self.colours)
        columns: dict[str, Column] = {name: torch.from_numpy(values) for name, values in drawn.items()}
        return {"text": text.tolist(), **columns}


def _shares(weights: list[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to the weights: the largest remainders are rounded up."""
    exact = np.array(weights) * (total / sum(weights))
    floor = np.floor(exact).astype(np.int64)
    floor[np.argsort(floor - exact, kind="stable")[: total - floor.sum()]] += 1
    return [int(share) for share in floor]
