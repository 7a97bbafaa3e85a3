"""Test time: an unlabelled stream that drifts, served to a model that was trained before.

Each task is a segment with one domain: a corruption of images (the 15 common ones of Hendrycks and Dietterich, ICLR 2019), of sounds (the
six of Kinetics50-C and VGGSound-C, READ, ICLR 2024), of both at once, a modality that is absent, or all of them mixed. The settings of
the literature are options: `shift: abrupt` in one pass is the continual setting of CoTTA (CVPR 2022), `gradual` goes through
the severities 1 2 3 4 5 4 3 2 1 in every domain, `rounds` lets all domains come back, `mixed` shuffles them into one segment as SAR (ICLR
2023) does; `labels: dirichlet` is the correlated stream of RoTTA (CVPR 2023), `blocks` SAR's shift of labels, `ordered` sorts by class;
`combine` corrupts several modalities one after another (`each`), in turns (`interleaved`), at once in every combination (`together`),
or weakly and strongly as SuMi (ICLR 2025): first one modality, then all at once, then each absent. Mixed, half of such a stream is weakly
shifted, a quarter has all corrupted, and a quarter lacks a modality; SuMi's own shares are not published.

The samples are those of the source's test part. A task's `train` has no targets and no other column beside the inputs. Its labelled
twin, which only the engine gets and which exists while the task is the current one, has the same samples in the same order, with
their `domain`, `severity` and `strength` (clean, weak: one modality is corrupted, strong: several are or one is absent), and the source's
own id (`source_id`). The stream numbers its samples by itself, segment after segment, so that no two ever have the same id.

The order of the samples is part of the stream: read them in order, without shuffling. Corruptions are drawn for blocks of 64 positions,
each with random numbers of its own, so that the stream is the same, byte for byte, in batches of any size and after a restart.
Integers stay integers of the same scale, rounded to the nearest, halves to even. Where we differ from the published code: SAR draws
its blocks of labels with replacement, here all samples of a class come before one comes again; the order of the domains is as
listed unless `domains: seed`. What the corruptions themselves do differently: see `streamcl/corruptions/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.corruptions import SEVERITIES
from streamcl.data import Masked, Unlabelled
from streamcl.errors import ConfigError
from streamcl.options import Fraction, PositiveFloat, PositiveInt
from streamcl.seeding import generator
from streamcl.stream import Column, Dataset, Scenario, Source, SourceData, StreamInfo, Task

from ._division import arranged, need_target, need_test
from ._shifts import absence, arrival, choice
from ._shifts.domains import CLEAN, GRADUAL, STRENGTHS, Combine, Segment, Shift, dealt, domains, segments
from ._shifts.served import Corruptor, Served
from ._targets import all_classes, stream_info
from ._views import Picked, fitted

MOST = 2**40  # ids from here on are those of samples that are fed to a run


class TestTime(Scenario):
    """`corruptions` is all (of every image, video and sound), none, a list of names, or lists by modality, `{image: [fog], audio: all}`;
    text and vectors pass untouched. `severity` is one from 1 to 5 (5 by default) or the schedule that each domain goes through. `table`
    says whose parameters images get, by their size where it is not given. The corruptions run on `device`.

    `samples` are served per segment (all of the part by default; more than there are come again), the stream begins with a segment
    without any shift of the share `clean` of that, and `batch` tells the loop how many arrive together. `labels` says how their classes
    are distributed over time: `iid`; `ordered`; `dirichlet`, with `alpha` (0.1 by default) over `slots` (as many as classes, at most 100);
    `blocks`, with one dominant class `ratio` times (500000) as probable as any other.

    `missing` takes modalities away: a share of the samples by modality, `{audio: 0.3}` at random places, 1 for all of them,
    `{audio: {burst: 0.3}}` in one stretch. A list gives the patterns of the segments in turn, over and over. A sample keeps at least one.

    `order` is how the classes are numbered, as in the scenario that trained the model: the default is that of `class_incremental`.
    """

    __test__ = False  # pytest: a scenario, not a test

    def __init__(
        self,
        *,
        data: Source,
        part: Literal["test", "train"] = "test",
        corruptions: Literal["all", "none"] | list[str] | dict[str, Literal["all"] | list[str]] = "all",
        severity: int | list[int] | None = None,
        table: Literal["imagenet", "cifar"] | None = None,
        shift: Literal["abrupt", "gradual", "mixed"] = "abrupt",
        rounds: PositiveInt = 1,
        domains: Literal["listed", "seed"] = "listed",
        combine: Literal["each", "interleaved", "together", "weak_and_strong"] = "each",
        missing: dict[str, float | dict[str, float]] | list[dict[str, float | dict[str, float]]] | None = None,
        labels: Literal["iid", "ordered", "dirichlet", "blocks"] = "iid",
        alpha: PositiveFloat | None = None,
        slots: PositiveInt | None = None,
        ratio: PositiveFloat | None = None,
        samples: PositiveInt | None = None,
        clean: Fraction = 0.0,
        batch: PositiveInt = 64,
        order: Literal["seed", "given", "alphabetical"] | list[str | int] = "seed",
        device: str = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.validation:
            raise ConfigError("test_time: nothing is trained on labels here: leave out validation")
        for name, value, needed in (("alpha", alpha, "dirichlet"), ("slots", slots, "dirichlet"), ("ratio", ratio, "blocks")):
            if value is not None and labels != needed:
                raise ConfigError(f"test_time: {name} belongs to labels: {needed}, and labels is {labels}")
        if ratio is not None and ratio < 1:
            raise ConfigError(
                f"test_time: ratio is {ratio:g}: the dominant class is at least as probable as another one, so 1 or more is needed"
            )
        if shift == "mixed" and domains == "seed":
            raise ConfigError("test_time: shift: mixed has all domains in one segment: leave out domains")
        self.severities = _severities(severity, shift)
        choice.check_names(corruptions)
        self.missing: list[absence.Pattern] = [missing] if isinstance(missing, Mapping) else list(missing or [])
        for number, pattern in enumerate(self.missing):
            absence.check(pattern, self._pattern(number))
        if combine == "weak_and_strong" and self.missing:
            raise ConfigError("test_time: combine: weak_and_strong takes modalities away itself: leave out missing")
        self.data, self.part, self.corruptions, self.table = data, part, corruptions, table
        self.shift, self.rounds, self.domains, self.combine = shift, rounds, domains, combine
        self.labels, self.samples, self.clean, self.batch, self.order = labels, samples, clean, batch, order
        self.alpha, self.slots, self.ratio = alpha or 0.1, slots, ratio or 500_000.0
        self.device = _device(device)

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_target(loaded, ("class", "labels", "value", "mask"), "test_time", "classes, labels, values or masks to score by")
        if loaded.target != "class" and self.labels != "iid":
            raise ConfigError(
                f"test_time: labels: {self.labels} needs one class per sample, and the target of this source is {loaded.target!r}"
            )
        if self.part == "test":
            need_test(loaded, "test_time")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"test_time: device is {self.device}, and there is no such device here: set device: cpu")
        chosen = choice.chosen(self.corruptions, loaded.modalities)
        if self.combine != "each" and len(chosen) < 2:
            raise ConfigError(
                f"test_time: combine: {self.combine} needs corruptions of two modalities or more, and there are those of {len(chosen)}"
            )
        for number, pattern in enumerate(self.missing):
            absence.check_modalities(pattern, list(loaded.modalities), self._pattern(number))
        self._served = loaded.test if self.part == "test" and loaded.test is not None else loaded.train
        self._unseen = loaded.train
        if len(self._served) == 0:
            raise ConfigError("test_time: the source has no training sample: leave out part")
        self._modalities, self._target = loaded.modalities, loaded.target
        self._corrupted = {name: loaded.modalities[name] for name in chosen}
        self._rates = {name: choice.rate(loaded, name) for name, modality in self._corrupted.items() if modality.kind == "audio"}
        self._seed, self.problems = seed, loaded.problems
        self._renumber(loaded, seed)
        self._segments = self._planned(chosen, seed)
        if len(self._segments) * self._count > MOST:
            raise ConfigError(
                f"test_time: {len(self._segments)} segments of {self._count} samples are more than the {MOST} that can be numbered: "
                "take fewer samples or rounds"
            )
        self._last: tuple[int, _Arranged] | None = None
        self._by_class: Tensor | None = None
        self.info = replace(
            stream_info(loaded, tasks=len(self._segments), passes=1, test_time=True), class_names=tuple(self._names.values())
        )
        return self.info

    def __len__(self) -> int:
        return len(self._segments)

    def task(self, index: int) -> Task:
        segment, arranged = self._segments[index], self._arranged(index)
        classes = tuple(self._names)
        return Task(
            index=index,
            name=segment.name,
            train=Unlabelled(self._view(index, arranged)),
            classes=classes if index == 0 else (),
            seen=classes,
            labels=tuple(arranged.samples.targets.unique().tolist()) if self._target == "class" else classes,
            names=self._names,
            about={
                "domain": segment.domain,
                "severity": segment.severity,
                "missing": {name: 1 - float(mask.double().mean()) for name, mask in arranged.masks.items()},
                "batch": self.batch,
                **({"round": segment.round} if self.rounds > 1 else {}),
                **({"domains": list(dict.fromkeys(shift.domain for shift in segment.shifts))} if len(segment.shifts) > 1 else {}),
            },
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        if after.index != task.index:
            return None
        arranged = self._arranged(task.index)
        return self._view(task.index, arranged, _Told(self._segments[task.index].shifts, arranged.which, arranged.masks))

    def unshifted(self) -> Dataset | None:
        """The training part, with classes as the stream numbers them; None where that is what is served."""
        if self.part == "train" or len(self._unseen) == 0:
            return None
        return Picked(self._unseen, torch.arange(len(self._unseen)), self._relabel)

    def files(self) -> list[str]:
        return self.data.files()

    # -- what is planned ---------------------------------------------------------------------------------------------------------

    def _planned(self, chosen: Mapping[str, Sequence[str]], seed: int) -> list[Segment]:
        combine: Combine = self.combine
        planned = segments(
            domains(chosen, combine),
            self.severities,
            mixed=self.shift == "mixed",
            halved=self.combine == "weak_and_strong",
            rounds=self.rounds,
            shuffle=seed if self.domains == "seed" else None,
        )
        return [Segment("clean", (CLEAN,)), *planned] if round(self.clean * self._count) else planned

    def _renumber(self, loaded: SourceData, seed: int) -> None:
        """Classes as the model's scenario numbered them; values and masks are as the source has them."""
        self._names, self._relabel = all_classes(loaded), None
        self._count = self.samples or len(self._served)
        if loaded.target in ("class", "labels"):
            arrive = arranged(loaded.class_names, self.order, seed, "test_time")
            self._names = dict(enumerate(loaded.class_names[number] for number in arrive))
            self._relabel = torch.tensor(arrive) if loaded.target == "labels" else torch.tensor(arrive).argsort()
        elif self.order != "seed":
            raise ConfigError(f"test_time: order numbers classes, and the target of this source is {loaded.target!r}: leave it out")

    def _pattern(self, number: int) -> str:
        return "test_time: missing" + (f", pattern {number + 1}" if len(self.missing) > 1 else "")

    # -- what is served ----------------------------------------------------------------------------------------------------------

    def _arranged(self, index: int) -> _Arranged:
        """The last one is kept: the engine asks for the test set of the task that it was just given."""
        if self._last is None or self._last[0] != index:
            segment = self._segments[index]
            rows = self._ordered(index, self._count if segment.place is not None else round(self.clean * self._count))
            which = dealt(segment, len(rows), generator(self._seed, "shifts", index))
            masks = self._presence(index, len(rows), which)
            samples = Picked(self._served, rows.int() if len(self._served) < 2**31 else rows, self._relabel)
            self._last = index, _Arranged(samples, None if which is None else fitted(which, len(segment.shifts)), masks)
        return self._last[1]

    def _view(self, index: int, arranged: _Arranged, told: _Told | None = None) -> Dataset:
        """The samples of a segment in the order in which they are served."""
        shifts = self._segments[index].shifts
        touched = {name: m for name, m in self._corrupted.items() if any(name in shift.corruptions for shift in shifts)}
        corruptor = Corruptor(shifts, touched, self._rates, self.table, self.device, self._seed, index) if touched else None
        served = Served(arranged.samples, corruptor, arranged.which, told, first=index * self._count)
        return Masked(served, arranged.masks) if arranged.masks else served

    def _ordered(self, index: int, count: int) -> Tensor:
        """The rows of the source that are served, in their order."""
        purpose = ("serve", index)
        if self.labels == "blocks":
            return self._in_blocks(count, purpose)
        picked = arrival.independent(len(self._served), count, self._seed, purpose)
        if self.labels == "iid":
            return picked
        assert self._relabel is not None
        numbers, classes = self._relabel[self._served.targets[picked]], len(self._names)
        if self.labels == "ordered":
            return picked[arrival.sorted_by_class(numbers)]
        return picked[arrival.correlated(numbers, classes, self.alpha, self.slots or min(classes, 100), self._seed, purpose)]

    def _in_blocks(self, count: int, purpose: arrival.Purpose) -> Tensor:
        assert self._relabel is not None
        if self._by_class is None:  # the source is put in order once for all segments
            numbers = self._relabel[self._served.targets]
            self._by_class, self._counts = numbers.argsort(stable=True), torch.bincount(numbers, minlength=len(self._names))
        wanted = arrival.in_blocks(self._counts.nonzero().squeeze(1), count, self.ratio, self._seed, purpose)
        starts = self._counts.cumsum(0) - self._counts
        return self._by_class[starts[wanted] + arrival.one_of_each(wanted, self._counts, self._seed, purpose)]

    def _presence(self, index: int, count: int, which: Tensor | None) -> dict[str, Tensor]:
        """Which positions have a modality, for those that the stream takes away."""
        segment = self._segments[index]
        taken = sorted({name for shift in segment.shifts for name in shift.absent})
        if taken:
            lacks = torch.tensor([[name in shift.absent for name in taken] for shift in segment.shifts])  # (shifts, modalities)
            absent = lacks[torch.zeros(count, dtype=torch.int64) if which is None else which]
            return {name: ~absent[:, place] for place, name in enumerate(taken)}
        if not self.missing or segment.place is None:
            return {}
        pattern = self.missing[segment.place % len(self.missing)]
        return absence.presence(pattern, len(self._modalities), count, generator(self._seed, "missing", index))


@dataclass(frozen=True)
class _Arranged:
    """The samples of a segment in their order, which of its shifts each has, and who lacks which modality."""

    samples: Picked
    which: Tensor | None
    masks: dict[str, Tensor]


class _Told:
    """What is said of the samples at some positions to who may see their labels."""

    def __init__(self, shifts: Sequence[Shift], which: Tensor | None, masks: Mapping[str, Tensor]) -> None:
        self.names, self.which, self.masks = [shift.domain for shift in shifts], which, masks
        self.severities = torch.tensor([shift.severity or 0 for shift in shifts])
        self.impaired = torch.tensor([len(shift.corruptions) for shift in shifts])

    def __call__(self, positions: Tensor) -> dict[str, Column]:
        shift = torch.zeros_like(positions) if self.which is None else self.which[positions].long()
        strength = self.impaired[shift].clamp(max=2)
        for mask in self.masks.values():
            strength = strength.masked_fill(~mask[positions], 2)
        return {
            "domain": [self.names[number] for number in shift.tolist()],
            "severity": self.severities[shift],
            "strength": [STRENGTHS[number] for number in strength.tolist()],
        }


def _severities(severity: int | list[int] | None, shift: str) -> tuple[int, ...]:
    if severity is None:
        return GRADUAL if shift == "gradual" else (5,)
    if shift == "gradual" and not isinstance(severity, list):
        raise ConfigError(
            "test_time: shift: gradual goes through severities: give a list of them, or leave out severity for 1 2 3 4 5 4 3 2 1"
        )
    schedule = tuple(severity) if isinstance(severity, list) else (severity,)
    if not schedule or any(one not in SEVERITIES for one in schedule):
        raise ConfigError(f"test_time: severity is {severity}: a whole number from 1 to 5 is needed, or a list of these")
    return schedule


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"test_time: device is {name!r}: cpu, cuda or cuda:NUMBER is needed") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"test_time: device is {name!r}: cpu, cuda or cuda:NUMBER is needed")
    return device
