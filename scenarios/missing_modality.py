"""Missing modalities: in every task some samples lack some of their modalities, by a pattern of its own.

`missing` lists the patterns, one per task. A pattern says which share of the samples lacks what: `{text: 0.35, image: 0.35}` leaves
0.3 complete, `{image+audio: 0.2}` lacks both, `{audio: 1.0}` is the structured absence of a whole modality, `{}` is complete. With
`draws: shares` (the default) these are exact counts, drawn without replacement and fixed by the seed, as Lee et al. (missing-aware
prompts, CVPR 2023) fix them: their `both` at 70 % is `{text: 0.35, image: 0.35}`. The protocol of MPLMM (ACL 2024) for three modalities
at 60 % is a share of 0.1 for each of the six incomplete patterns; it draws anew at every access, in testing too, so that its scores
are random, and here the table is fixed. With `draws: independent` a pattern gives each modality's own rate and the samples lose them
independently, given that none loses everything: each modality is absent at the rate that was asked for, which needs rates of which at
least one modality per sample is left ({image: 0.7, text: 0.7} leaves 0.6).

`divide` says what a task's samples are: `samples` (each task its own part of the data, all classes in each: the continual protocol
of CMMM, NAACL 2025), `classes` (each task brings classes), or `all` (each task sees everything again, under its own pattern and
with ids of its own). `test` is the pattern of what is scored: that of the task (`own`), `complete`, or a pattern for all.
`train_complete: true` trains on complete data and leaves modalities out only in testing. Where every task is tested on all test samples,
these copies have ids of their own as well, and the source's id in `extra["source_id"]`.

An absent value cannot be read by accident: it is NaN in numbers, 0 in integers and "" in text, and masked in `Batch.present`. In
`task.missing` stands the pattern, and in `extra["missing"]` of every sample a bit mask of what it lacks, bit i for the i-th modality
in alphabetical order. What the source lacks itself stays absent, on top of the pattern; a sample that would be left with nothing keeps
what the source has of it. `extra` holds nothing else but what the target needs (answers in words, and how they are checked), and in
training an answer that is the absent text itself, word for word, is blank as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data import MapDataset, SinglePass, View, blanked
from streamcl.errors import ConfigError
from streamcl.options import Fraction
from streamcl.plugins import near_name
from streamcl.seeding import generator
from streamcl.stream import Batch, Column, Dataset, Modality, Scenario, Source, StreamInfo, Task

from ._division import arranged, by_task, held_back, listing, need_target, need_test, need_training_samples
from ._targets import all_classes, stream_info
from ._views import Picked, fitted, needed, only

KIND = "missing_modality"
Pattern = dict[str, float]


class MissingModality(Scenario):
    """One pattern of missing modalities per task."""

    def __init__(
        self,
        *,
        data: Source,
        missing: list[dict[str, Fraction]],
        draws: Literal["shares", "independent"] = "shares",
        divide: Literal["samples", "classes", "all"] = "samples",
        test: Literal["own", "complete"] | dict[str, Fraction] = "own",
        train_complete: bool = False,
        order: Literal["seed", "given", "alphabetical"] | list[str | int] = "seed",
        online: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if divide != "classes" and order != "seed":
            raise ConfigError(f"{KIND}: order is that of the classes, and divide: {divide} brings them all at once: leave it out")
        if not missing:
            raise ConfigError(f"{KIND}: missing is empty: one pattern per task is needed; {{}} is a complete one")
        if train_complete and test == "complete":
            raise ConfigError(f"{KIND}: with train_complete and test: complete nothing would be missing anywhere")
        self.data, self.missing, self.draws, self.divide, self.order = data, missing, draws, divide, order
        self.test_pattern, self.train_complete, self.online = test, train_complete, online
        for where, pattern in (
            *((f"missing.{place}", p) for place, p in enumerate(missing)),
            *([("test", test)] if isinstance(test, dict) else []),
        ):
            total = sum(pattern.values())
            if draws == "shares" and total > 1 + 1e-9:
                raise ConfigError(f"{KIND}: {where}: the shares add up to {total:g}, and 1 is all samples")
            if draws == "independent" and any("+" in key for key in pattern):
                raise ConfigError(
                    f"{KIND}: {where}: with draws: independent a rate belongs to one modality, and {', '.join(pattern)} joins some"
                )

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_test(loaded, KIND)
        assert loaded.test is not None
        needs = needed(loaded.target)
        self.problems, self._seed = loaded.problems, seed
        self._loaded = replace(loaded, train=only(loaded.train, needs), test=only(loaded.test, needs))
        self._modalities = sorted(loaded.modalities)
        patterns = [*self.missing, *([self.test_pattern] if isinstance(self.test_pattern, dict) else [])]
        for pattern in patterns:
            self._check(pattern, loaded.modalities)
        tasks = len(self.missing)
        if self.divide == "classes":
            need_target(loaded, ("class",), KIND, "one class per sample (divide: classes)")
            if tasks > len(loaded.class_names):
                raise ConfigError(f"{KIND}: {tasks} patterns and only {len(loaded.class_names)} classes: at most one task for each class")
            arrival = arranged(loaded.class_names, self.order, seed, KIND)
            counts = torch.bincount(loaded.train.targets, minlength=len(arrival))
            need_training_samples(counts, loaded.class_names, KIND, "leave the class out of the source")
            groups = np.array_split(np.array(arrival), tasks)
            own = torch.empty(len(arrival), dtype=torch.int64)
            for index, group in enumerate(groups):
                own[torch.from_numpy(group)] = index
            self._relabel: Tensor | None = torch.empty(len(arrival), dtype=torch.int64)
            self._relabel[arrival] = torch.arange(len(arrival))
            self._names = {place: loaded.class_names[number] for place, number in enumerate(arrival)}
            self._bounds = np.cumsum([0] + [len(group) for group in groups]).tolist()
            self._train_of = by_task(own[loaded.train.targets], tasks)
            self._test_of = by_task(own[loaded.test.targets], tasks)
        else:
            self._relabel, self._names = None, all_classes(loaded)
            self._bounds = [0] + [len(self._names)] * tasks
            everything = torch.arange(len(loaded.test))
            self._test_of = (everything,) * tasks
            if self.divide == "all":
                self._train_of = (torch.arange(len(loaded.train)),) * tasks
            else:
                shuffled = torch.randperm(len(loaded.train), generator=generator(seed, "divide"))
                self._train_of = tuple(part.sort().values for part in shuffled.tensor_split(tasks))
                if tasks > len(shuffled):
                    raise ConfigError(f"{KIND}: {tasks} patterns and only {len(shuffled)} training samples to divide: take fewer tasks")
        self._stride = int(max(dataset.ids.max() for dataset in (loaded.train, loaded.test))) + 1
        self._validation_of: tuple[Tensor, ...] = ()
        if self.validation:
            among = loaded.train.targets if loaded.target in ("class", "text") else None
            self._train_of, self._validation_of = held_back(self._train_of, among, self.validation, seed)
        self.info = stream_info(loaded, tasks=tasks, passes=1 if self.online else None)
        if self.divide == "classes":
            self.info = StreamInfo(**{**vars(self.info), "class_names": tuple(self._names.values())})
        return self.info

    def __len__(self) -> int:
        return len(self.missing)

    def task(self, index: int) -> Task:
        known, reached = self._bounds[index : index + 2]
        pattern: Pattern = {} if self.train_complete else self.missing[index]
        train: Dataset = self._view(self._loaded.train, self._train_of[index], index, pattern, "train")
        validation = None
        if self.validation:
            validation = self._view(self._loaded.train, self._validation_of[index], index, self.missing[index], "validation")
        what = " and ".join(f"{share:.0%} without {name.replace('+', ' and ')}" for name, share in self.missing[index].items() if share)
        new = f", {listing([self._names[c] for c in range(known, reached)])}" if self.divide == "classes" else ""
        return Task(
            index=index,
            name=(what or "complete") + new,
            train=SinglePass(train) if self.online else train,
            classes=tuple(range(known, reached)),
            seen=tuple(range(reached)),
            labels=tuple(range(known, reached)) if self.divide == "classes" else tuple(range(reached)),
            validation=validation,
            names={c: name for c, name in self._names.items() if c < reached},
            about={"missing": dict(self.missing[index]), "modalities": list(self._modalities)},
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        assert self._loaded.test is not None
        rows = self._test_of[task.index]
        pattern: Pattern = self.missing[task.index] if self.test_pattern == "own" else {}
        if isinstance(self.test_pattern, dict):
            pattern = self.test_pattern
        return self._view(self._loaded.test, rows, task.index, pattern, "test") if len(rows) else None

    def files(self) -> list[str]:
        return self.data.files()

    def _check(self, pattern: Pattern, modalities: Mapping[str, Modality]) -> None:
        for key in pattern:
            names = key.split("+")
            unknown = [name for name in names if name not in modalities]
            if unknown:
                hint = near_name(unknown[0], modalities) or f": it has {', '.join(modalities)}"
                raise ConfigError(f"{KIND}: {unknown[0]!r} is no modality of this source{hint}")
            if set(names) == set(modalities):
                raise ConfigError(f"{KIND}: {key} is all that this source has: a sample must keep a modality")
        left = sum(1 - pattern.get(name, 0.0) for name in modalities)
        if self.draws == "independent" and left < 1 - 1e-9:
            raise ConfigError(
                f"{KIND}: the rates {', '.join(f'{name}: {rate:g}' for name, rate in pattern.items())} leave {left:g} of a modality per "
                "sample, and every sample keeps one: lower them until at least 1 is left"
            )

    def _view(self, dataset: Dataset, rows: Tensor, index: int, pattern: Pattern, part: str) -> MapDataset:
        code = fitted(torch.zeros(len(rows), dtype=torch.uint8), 2 ** len(self._modalities))
        lost = self._table(len(rows), pattern, generator(self._seed, "missing", part, index))  # (samples, modalities)
        own: Mapping[str, Tensor] = getattr(dataset, "present", None) or {}
        if own:
            lacking = torch.zeros_like(lost)
            for place, name in enumerate(self._modalities):
                if name in own:
                    lacking[:, place] = ~own[name][rows]
            lost &= ~(lost | lacking).all(dim=1, keepdim=True)
            lost |= lacking
        for place in range(len(self._modalities)):
            code += lost[:, place].to(code.dtype) << place
        tested = part == "test"
        copied = self.divide == "all" or (tested and self.divide == "samples")
        return _Incomplete(
            Picked(dataset, rows, self._relabel), self._modalities, code, index * self._stride if copied else 0, copied and tested
        )

    def _table(self, count: int, pattern: Pattern, draw: torch.Generator) -> Tensor:
        """Which sample lacks which modality."""
        lost = torch.zeros(count, len(self._modalities), dtype=torch.bool)
        place = {name: position for position, name in enumerate(self._modalities)}
        if self.draws == "independent":
            return lost_independently([pattern.get(name, 0.0) for name in self._modalities], count, draw)
        shuffled = torch.randperm(count, generator=draw)
        ends = [0, *(np.cumsum(list(pattern.values())) * count + 0.5).astype(int).tolist()]
        for key, first, last in zip(pattern, ends, ends[1:], strict=False):
            for name in key.split("+"):
                lost[shuffled[first:last], place[name]] = True
        return lost


def lost_independently(rates: list[float], count: int, draw: torch.Generator) -> Tensor:
    """Which sample lacks what  # (count, modalities): each at its rate, independently, given that no sample loses everything.

    Modality m would be lost with p[m]; given that not all are, it is with (p[m] - q) / (1 - q), where q is the product of p. That this be
    rates[m] needs 1 - p[m] = (1 - rates[m]) (1 - q), which leaves one unknown, s = 1 - q: s = 1 - prod(1 - (1 - rates[m]) s).
    """
    keeps = [1 - rate for rate in rates]
    low, high = 0.0, 1.0  # the right side is concave in s and 0 at 0: above s before the solution, and below it after
    while max(keeps) < 1 and (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _any_kept(keeps, middle) >= middle else (low, middle)
    at_edge = high < 1e-12  # the rates leave exactly one: s is 0, and what remains is in which proportion the one is kept
    alone = torch.ones(count, dtype=torch.bool)  # has lost everything so far
    lost = torch.empty(count, len(rates), dtype=torch.bool)
    for place, keep in enumerate(keeps):
        rest = keeps[place:]
        first = float(keep > 0)  # the probability that this one is kept where none was before: for the last it is certain
        if any(rest[1:]):
            first = keep / sum(rest) if at_edge else keep * high / _any_kept(rest, high)
        chance = torch.where(alone, 1 - first, 1 - keep * high)
        lost[:, place] = torch.rand(count, generator=draw, dtype=torch.float64) < chance
        alone &= lost[:, place]
    return lost


def _any_kept(keeps: list[float], s: float) -> float:
    """The probability that any modality is kept, where each is by itself with keep * s."""
    return -math.expm1(sum(math.log1p(-keep * s) if keep * s < 1 else -math.inf for keep in keeps))


class _Incomplete(View):
    """Samples that lack modalities, and a bit mask of which; ids begin at `first`. All that a task holds of its own is the mask.

    `tested`: a copy for testing, which tells the source's id, and of which only the engine sees the answers.
    """

    def __init__(self, dataset: Picked, modalities: list[str], code: Tensor, first: int, tested: bool) -> None:
        super().__init__(dataset)
        self.modalities, self.code, self.first, self.tested = modalities, code, first, tested

    def _ids(self) -> Tensor:
        return super()._ids() + self.first

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        code = self.code.index_select(0, indices).long()
        present = dict(batch.present or {})
        for place, name in enumerate(self.modalities):
            mine = (code >> place) & 1 == 0
            present[name] = mine & present[name] if name in present else mine
        inputs = {name: blanked(values, present.get(name), owned=self.in_memory) for name, values in batch.inputs.items()}
        extra = {name: column if self.tested else self._without_copies(column, batch, present) for name, column in batch.extra.items()}
        if self.tested:
            extra["source_id"] = batch.ids
        return Batch(inputs, batch.target, batch.ids + self.first, present, batch.task, {**extra, "missing": code})

    def _without_copies(self, column: Column, batch: Batch, present: Mapping[str, Tensor]) -> Column:
        """A column of texts without those that repeat a text which is absent."""
        for name, values in batch.inputs.items():
            if isinstance(values, list) and isinstance(column, list) and not bool(present[name].all()):
                rows = zip(column, values, present[name].tolist(), strict=True)
                column = ["" if not there and said == value else said for said, value, there in rows]
        return column
