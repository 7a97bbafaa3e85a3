"""Few-shot class-incremental learning: a base session rich in data, then sessions of a few new classes with a few samples each.

The protocol of TOPIC (CVPR 2020), as CEC, FACT and TEEN run it: `base` classes with all their samples, then N-way K-shot sessions
(`ways`, `shots`). After every session the test samples of all classes seen are scored, without being told the session. Classes
come in the order of the source, as published; CIFAR-100 and miniImageNet are 60 and 8 sessions of 5 ways and 5 shots, CUB-200 is
100 and 10 of 10 ways and 5 shots. The published work fixes the shots by index lists, which a source reads (`image_list`);
otherwise the seed draws them. `validation` is taken from the base session alone: a session has no sample to spare.

Scored by accuracy (per session, their average, and the performance drop from the first to the last), by the accuracy on base classes
and on new ones, each among all classes seen, by the harmonic mean of these two, and by the shares of base samples that are taken
for new classes and of new samples that are taken for base classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from streamcl.data import Subset, place_in_class, split_by_class
from streamcl.errors import ConfigError, DataError
from streamcl.options import PositiveInt
from streamcl.seeding import generator
from streamcl.stream import Dataset, Scenario, Source, StreamInfo, Task

from ._division import arranged, by_task, listing, need_target, need_test

KIND = "few_shot"


class FewShot(Scenario):
    """`sessions` of `ways` classes with `shots` samples each follow the base; without `sessions` as many as there are classes for.

    `base_shots` limits the samples of each base class too.
    """

    bounded_by_classes = ("base",)

    def __init__(
        self,
        *,
        data: Source,
        base: PositiveInt,
        ways: PositiveInt,
        shots: PositiveInt,
        sessions: PositiveInt | None = None,
        base_shots: PositiveInt | None = None,
        order: Literal["seed", "given", "alphabetical"] | list[str | int] = "given",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.data, self.base, self.ways, self.shots = data, base, ways, shots
        self.sessions, self.base_shots, self.order = sessions, base_shots, order

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_target(loaded, ("class",), KIND, "one class per sample")
        need_test(loaded, KIND)
        assert loaded.test is not None
        self.problems = loaded.problems
        names = loaded.class_names
        room = (len(names) - self.base) // self.ways
        sessions = max(room, 0) if self.sessions is None else self.sessions
        if sessions > room or sessions == 0:
            wanted = f"{sessions} sessions of {self.ways} classes" if sessions else f"a session of {self.ways} classes"
            raise ConfigError(
                f"{KIND}: {self.base} base classes and {wanted} need {self.base + max(sessions, 1) * self.ways} classes, and the source "
                f"has {len(names)}"
            )
        arrival = arranged(names, self.order, seed, KIND)[: self.base + sessions * self.ways]
        self._names = [names[number] for number in arrival]
        self._bounds = [0, *range(self.base, len(arrival) + 1, self.ways)]
        self._relabel = torch.full((len(names),), -1, dtype=torch.int64)
        self._relabel[arrival] = torch.arange(len(arrival))
        self._train, self._test = loaded.train, loaded.test
        self._choose(seed)
        self._test_of = by_task(self._session(self._relabel[loaded.test.targets]), len(self))
        self.info = StreamInfo(
            modalities=loaded.modalities,
            metrics=("accuracy", "harmonic_mean", "base_accuracy", "new_accuracy", "base_as_new", "new_as_base"),
            classes=len(arrival),
            tasks=len(self),
            licence=loaded.licence,
            class_names=tuple(self._names),
        )
        return self.info

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def task(self, index: int) -> Task:
        classes = tuple(range(*self._bounds[index : index + 2]))
        validation = Subset(self._train, self._validation_rows, self._relabel) if self.validation and index == 0 else None
        ways = "base" if index == 0 else f"session {index}"
        return Task(
            index=index,
            name=f"{ways}: {listing([self._names[c] for c in classes])}",
            train=Subset(self._train, self._train_of[index], self._relabel),
            classes=classes,
            seen=tuple(range(classes[-1] + 1)),
            labels=classes,
            validation=validation,
            names=dict(enumerate(self._names[: classes[-1] + 1])),
            about={"shots": self.base_shots if index == 0 else self.shots, "ways": len(classes), "base": index == 0},
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        rows = self._test_of[task.index]
        return Subset(self._test, rows, self._relabel) if len(rows) else None

    def files(self) -> list[str]:
        return self.data.files()

    def _session(self, arrived: torch.Tensor) -> torch.Tensor:
        """The session that brings a class; -1 for those that stay out."""
        later = torch.div(arrived - self.base, self.ways, rounding_mode="floor") + 1
        return torch.where(arrived < 0, -1, torch.where(arrived < self.base, 0, later))

    def _choose(self, seed: int) -> None:
        """The shots of every class, drawn by the seed, in the order of the source."""
        arrived = self._relabel[self._train.targets]
        session = self._session(arrived)
        counts = torch.bincount(arrived[arrived >= 0], minlength=len(self._names))
        wanted = torch.full_like(counts, self.shots)
        wanted[: self.base] = self.base_shots or 1
        short = [f"{self._names[c]} ({counts[c]})" for c in (counts < wanted).nonzero().squeeze(1).tolist()]
        if short:
            told = f"{self.shots} shots" if self.base_shots is None else f"{self.shots} shots ({self.base_shots} in the base)"
            raise DataError(f"{KIND}: {told} are asked for and these classes have fewer training samples: {listing(short)}")
        if self.base_shots is None:
            wanted[: self.base] = counts[: self.base]
        shuffled = torch.randperm(len(arrived), generator=generator(seed, "shots"))
        place = torch.empty_like(arrived)
        place[shuffled] = place_in_class(arrived[shuffled])
        session[place >= torch.cat([wanted, wanted.new_zeros(1)])[arrived]] = -1
        if self.validation:
            base = (session == 0).nonzero().squeeze(1)
            _, held = split_by_class(arrived[base], self.validation, generator(seed, "validation"))
            self._validation_rows = base[held]
            session[self._validation_rows] = -1
        self._train_of = by_task(session, len(self))
