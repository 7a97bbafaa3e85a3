"""How the classes of a source are divided into tasks, and in which order they arrive: what the kinds with new classes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data import split_by_class
from streamcl.errors import ConfigError, DataError
from streamcl.options import PositiveInt
from streamcl.plugins import near_name
from streamcl.seeding import generator
from streamcl.stream import Scenario, Source, SourceData


class DividedByClass(Scenario):
    """One of `tasks`, `increment` (with or without `base`) and `classes` says how the classes are divided. Where `tasks` does not
    divide them, the first tasks get one class more; with `increment` the last task may be smaller; classes that `classes` does not
    list are left out of the stream. `order` is the seed's permutation, the order of the source ("given"), that of the names
    ("alphabetical"), or a list of all names.
    """

    kind: ClassVar[str] = "class_incremental"
    usual_order: ClassVar[str] = "seed"
    bounded_by_classes = ("tasks", "base")

    def __init__(
        self,
        *,
        data: Source,
        tasks: PositiveInt | None = None,
        base: PositiveInt | None = None,
        increment: PositiveInt | None = None,
        classes: list[list[str | int]] | None = None,
        order: Literal["seed", "given", "alphabetical"] | list[str | int] = "seed",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        ways = {"tasks": tasks, "increment": increment, "classes": classes}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            told = f"{' and '.join(given)} contradict each other" if given else "nothing says how the classes are divided into tasks"
            raise ConfigError(f"{told}: give one of tasks, increment (with base if the first task is larger), classes")
        if base is not None and increment is None:
            raise ConfigError(f"base belongs to increment, not to {given[0]}: give base and increment, or {given[0]} alone")
        if classes is not None and order != self.usual_order:
            raise ConfigError("classes already says the order: leave out order, or give tasks or increment instead")
        self.data, self.tasks, self.base, self.increment, self.classes, self.order = data, tasks, base, increment, classes, order

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def files(self) -> list[str]:
        return self.data.files()

    def divide(self, loaded: SourceData, seed: int) -> list[str]:
        """Fix which class arrives when: `_names` and `_bounds` by arrival, `_relabel` from the source's numbers, `_own_task` of each."""
        self.problems = loaded.problems
        groups = self._groups(loaded.class_names, seed)
        arrival = [number for group in groups for number in group]
        self._names = [loaded.class_names[number] for number in arrival]
        self._bounds = np.cumsum([0] + [len(group) for group in groups]).tolist()
        self._relabel = torch.full((len(loaded.class_names),), -1, dtype=torch.int64)
        self._relabel[arrival] = torch.arange(len(arrival))
        self._arrival = torch.tensor(arrival, dtype=torch.int64)  # the source's number of each class
        self._own_task = torch.arange(len(groups)).repeat_interleave(torch.tensor(self._bounds).diff())  # of each class, as it arrives
        return self._names

    def new_classes(self, index: int) -> tuple[int, ...]:
        known, reached = self._bounds[index : index + 2]
        return tuple(range(known, reached))

    def names_until(self, index: int) -> dict[int, str]:
        return dict(enumerate(self._names[: self._bounds[index + 1]]))

    def task_of_class(self, targets: Tensor) -> Tensor:
        """The task in which the class of each sample arrives; -1 where the stream leaves the class out."""
        return torch.cat([self._own_task, self._own_task.new_tensor([-1])])[self._relabel[targets]]

    def _groups(self, names: list[str], seed: int) -> list[list[int]]:
        """The classes of each task, as the source numbers them."""
        number = {name: position for position, name in enumerate(names)}
        if self.classes is not None:
            groups = [[numbered(name, number, f"{self.kind}: classes") for name in group] for group in self.classes]
            refuse_repeats([names[n] for group in groups for n in group], f"{self.kind}: classes")
            if not groups or not all(groups):
                raise ConfigError(f"{self.kind}: classes: task {([*groups, []]).index([]) + 1} lists no class: every task needs one")
            return groups
        order = arranged(names, self.order, seed, self.kind)
        if self.tasks is not None:
            if self.tasks > len(names):
                raise ConfigError(f"{self.kind}: tasks is {self.tasks} and there are only {len(names)} classes: at most one task for each")
            return [part.tolist() for part in np.array_split(np.array(order), self.tasks)]
        assert self.increment is not None
        base = self.increment if self.base is None else self.base
        if base > len(names):
            what = "increment" if self.base is None else "base"
            raise ConfigError(f"{self.kind}: {what} is {base} and there are only {len(names)} classes")
        starts = [0, *range(base, len(order), self.increment)]
        return [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]


def arranged(names: Sequence[str], order: str | list[str | int], seed: int, kind: str, what: str = "class") -> list[int]:
    """The classes (or `what` there is) in the order of their arrival, as the source numbers them.

    The seed's permutation is that of NumPy's legacy generator, whose stream is frozen: PyCIL, PILOT and FACIL use the same.
    """
    if order == "seed":
        return np.random.RandomState(seed % 2**32).permutation(len(names)).tolist()
    if order == "given":
        return list(range(len(names)))
    if order == "alphabetical":
        return sorted(range(len(names)), key=lambda number: names[number])
    number = {name: position for position, name in enumerate(names)}
    listed = [numbered(name, number, f"{kind}: order", what) for name in order]
    refuse_repeats([names[n] for n in listed], f"{kind}: order", what)
    if len(listed) < len(names):
        missing = [name for name in names if number[name] not in set(listed)]
        raise ConfigError(f"{kind}: order lacks {listing(missing, what=what)}: it must list every {what} once")
    return listed


def by_task(task: Tensor, count: int) -> tuple[Tensor, ...]:
    """The indices of each task's samples in the order of the source; one sort for all tasks. -1 is in none."""
    counts = torch.bincount(task + 1, minlength=count + 1)
    return task.argsort(stable=True).split(counts.tolist())[1:]


def held_back(parts: Sequence[Tensor], targets: Tensor | None, fraction: float, seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The samples of each task that are trained on, and those that validation gets: of every class alike where there are `targets`.

    Tasks that all see the same samples (the very same tensor) hold back the same ones, and share the answer.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for rows in parts:
        if id(rows) not in made:
            group = torch.zeros(len(rows), dtype=torch.int64) if targets is None else targets[rows]
            mine, theirs = split_by_class(group, fraction, generator(seed, "validation"))
            made[id(rows)] = rows[mine], rows[theirs]
    return tuple(made[id(rows)][0] for rows in parts), tuple(made[id(rows)][1] for rows in parts)


def dealt(task: Tensor, count: int, group: Tensor, validation: float, seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The samples of each task that are trained on, by the `task` of every sample, and those that validation gets: this share of every
    group; nothing where there is no validation."""
    if not validation:
        return by_task(task, count), ()
    _, held = split_by_class(group, validation, generator(seed, "validation"))
    theirs, mine = torch.full_like(task, -1), task.clone()
    theirs[held], mine[held] = task[held], -1
    return by_task(mine, count), by_task(theirs, count)


def need_training_samples(counts: Tensor, names: Sequence[str], kind: str, remedy: str = "leave the class out with `classes`") -> None:
    """Raise DataError for classes, by their arrival, that no training sample has."""
    lacking = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
    if lacking:
        raise DataError(f"{kind}: no training sample of {listing(lacking)}: add some, or {remedy}")


def need_target(loaded: SourceData, targets: tuple[str, ...], kind: str, what: str) -> None:
    if loaded.target not in targets:
        raise ConfigError(f"{kind} needs {what}, and the target of this source is {loaded.target!r}")


def need_test(loaded: SourceData, kind: str) -> None:
    if loaded.test is None or len(loaded.test) == 0:
        raise ConfigError(f"{kind}: the source has no test set: name one (test) or hold a part back (test_fraction: 0.2)")


def numbered(name: str | int, number: dict[str, int], option: str, what: str = "class") -> int:
    if str(name) not in number:
        hint = near_name(str(name), number) or f": there are {listing(list(number), what=what)}"
        raise ConfigError(f"{option} names an unknown {what} {str(name)!r}{hint}")
    return number[str(name)]


def refuse_repeats(names: Sequence[str], option: str, what: str = "class") -> None:
    if len(set(names)) < len(names):
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise ConfigError(f"{option} names {what} {twice!r} twice: every {what} arrives once")


def listing(names: Sequence[str], most: int = 8, what: str = "class") -> str:
    several = what + ("es" if what.endswith("s") else "s")
    return ", ".join(names[:most]) + (f", ... ({len(names)} {several})" if len(names) > most else "")
