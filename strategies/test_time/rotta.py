"""RoTTA: robust batch statistics, a small balanced memory of what was served, and a slow teacher that answers; for correlated streams.

Yuan, Xie and Li, CVPR 2023, arXiv 2303.13899. A stream whose neighbours are of one class spoils both the statistics of a batch and what
is learned from it. So

    normalisation  statistics move by alpha towards those of what is trained on, and gradients go through them (`_robust`)
    memory         `capacity` samples, at most capacity / C of a class by the teacher's labels, sorted out by
                   h(age, u) = lambda_t / (1 + exp(-age / capacity)) + lambda_u * u / ln C,    u the entropy of the teacher's answer
    learning       after every `every` samples, on the whole memory:
                   L = mean_k w(age_k) * CE(teacher(x_k), student(augment(x_k))),    w(a) = exp(-a / capacity) / (1 + exp(-a / capacity))
                   one step on the affine weights of normalisation; then teacher <- (1 - nu) teacher + nu student

A newcomer whose class is below capacity / C goes where there is room, else it takes the place of the worst of the classes that are held
most; one whose class has its share takes the place of the worst of its own. In both cases only if that one's h is higher than its own.
The answer is that of the teacher before it learned: by its weights and its own statistics, none of the batch, so that batches of one are
served as well as any.

Which sample takes whose place depends on every sample before it. This is decided on the host, on what the teacher said of the whole batch
(one read); the samples themselves are then copied at once.

Teacher and student gather statistics of their own (the teacher from the memory, the student from its augmented views), as released.
There every parameter is averaged into the teacher; here those that can differ. Dropout stays off. `augment: false` trains on the samples
as they are: for streams without images.

Evidence: small real data
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from streamcl.adapting import copied, entropy
from streamcl.context import Context
from streamcl.nn.norms import with_values
from streamcl.options import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from streamcl.stream import Batch, StreamInfo

from ._augmenting import Pixels, strong
from ._robust import robust, statistics_of
from ._teacher import Taught


@dataclass
class _Held:
    """What is known of the samples in the memory, on the host and in their order."""

    labels: list[int]
    uncertainties: list[float]
    ages: list[int]


class Rotta(Taught):
    """`capacity` of the memory; `every` so many samples it is learned from; `alpha` moves statistics, `nu` the teacher; `lambda_t` and
    `lambda_u` say how much age and uncertainty count against a sample. `augment` the student's samples (images), mirrored with probability
    `flip`; `mean` and `std` are what images were normalised by, where the stream's preparation does not say it."""

    batch_statistics: ClassVar[bool] = False

    def __init__(
        self,
        *,
        capacity: PositiveInt = 64,
        every: PositiveInt = 64,
        alpha: Fraction = 0.05,
        nu: Fraction = 0.001,
        lambda_t: NonNegativeFloat = 1.0,
        lambda_u: NonNegativeFloat = 1.0,
        augment: bool = True,
        flip: Fraction = 0.5,
        mean: list[float] = [],  # noqa: B006
        std: list[PositiveFloat] = [],  # noqa: B006
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.capacity, self.every, self.alpha, self.nu = capacity, every, alpha, nu
        self.lambda_t, self.lambda_u = lambda_t, lambda_u
        self.augment, self.flip, self.mean, self.std = augment, flip, mean, std
        self.held, self.since = _Held([], [], []), 0  # since: samples since it was last learned from
        self.samples: Batch | None = None  # those held, in the order of `held`
        self.student: dict[str, Tensor] = {}  # the student's statistics

    def start(self, info: StreamInfo, context: Context) -> None:
        if self.augment:
            self.pixels = Pixels("rotta (augment: false goes without)", info, context, self.mean, self.std)
        super().start(info, context)

    # -- serving ------------------------------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> Tensor:
        logits = self.forward(batch)
        labels, uncertainties = torch.stack([logits.argmax(dim=1).double(), entropy(logits.float()).double()]).tolist()
        first = 0
        while first < len(batch):  # learning comes after every so many samples, also in the middle of a batch
            last = min(len(batch), first + self.every - self.since)
            self.remember(batch[first:last], labels[first:last], uncertainties[first:last], logits.shape[1])
            self.since += last - first
            if self.since == self.every:
                self.since = 0
                self.learn_memory()
            first = last
        return self.again(batch) if self.answer == "after" else logits

    # -- the memory ---------------------------------------------------------------------------------------------------------------

    def remember(self, batch: Batch, labels: list[float], uncertainties: list[float], classes: int) -> None:
        """Offer samples in their order, and keep those that the rule takes in."""
        held, known = self.held, len(self.held.ages)
        rows = list(range(known))  # which sample lies in each place: of the memory, then of the batch
        for number, (label, uncertainty) in enumerate(zip(labels, uncertainties, strict=True), known):
            place = self.place(int(label), uncertainty, classes) if math.isfinite(uncertainty) else None
            if place is not None:
                for column in (rows, held.labels, held.uncertainties, held.ages):
                    del column[place : place + 1]
                rows.append(number)
                held.labels.append(int(label))
                held.uncertainties.append(uncertainty)
                held.ages.append(0)
            held.ages[:] = [age + 1 for age in held.ages]
        taken = sum(row >= known for row in rows)
        self.count("kept", taken)
        if taken:
            bare = Batch(batch.inputs, None, batch.ids, batch.present)
            self.samples = (bare if self.samples is None else Batch.cat([self.samples, bare]))[rows]

    def place(self, label: int, uncertainty: float, classes: int) -> int | None:
        """Whose place a newcomer takes: one that is held, a new one (as many as are held), or None where it is not taken in."""
        held, share = self.held, self.capacity / classes
        counts: dict[int, int] = {}
        for other in held.labels:
            counts[other] = counts.get(other, 0) + 1
        if counts.get(label, 0) < share:
            if len(held.labels) < self.capacity:
                return len(held.labels)
            most = max(counts.values())
            among = {other for other, count in counts.items() if count == most}
        else:
            among = {label}
        score, place = max(
            (self.badness(held.ages[i], held.uncertainties[i], classes), i) for i, other in enumerate(held.labels) if other in among
        )
        return place if score > self.badness(0, uncertainty, classes) else None

    def badness(self, age: int, uncertainty: float, classes: int) -> float:
        """h(age, u)"""
        return self.lambda_t / (1 + math.exp(-age / self.capacity)) + self.lambda_u * uncertainty / math.log(max(classes, 2))

    # -- learning -----------------------------------------------------------------------------------------------------------------

    def learn_memory(self) -> None:
        """One step on what is held; then the teacher follows."""
        if not self.held.ages or self.samples is None:
            self.count("skipped")
            return
        self.begin_teaching()
        ages = torch.tensor(self.held.ages, device=self.context.device) / self.capacity
        with torch.no_grad(), with_values(self.model, self.teacher), robust(self.layers, self.teacher, self.alpha):
            taught = self.model(self.samples).softmax(dim=1)
        seen = self.samples
        if self.augment:
            seen = self.pixels.augmented(seen, lambda values, generator: strong(values, generator, self.flip), self.context.generator)
        with robust(self.layers, self.student, self.alpha):
            each = cross_entropy(self.model(seen), taught, reduction="none")
        self.step(((-ages).sigmoid() * each).mean())  # exp(-a) / (1 + exp(-a))
        self.follow(self.nu)

    def beside(self) -> dict[str, Tensor]:
        return statistics_of(self.layers)

    def begin_teaching(self) -> None:
        if not self.teacher:
            self.student = copied(self.beside())
        super().begin_teaching()

    # -- going back ---------------------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        samples = self.samples
        return {
            "teacher": dict(self.teacher),
            "student": dict(self.student),
            "since": self.since,
            "held": {"labels": list(self.held.labels), "uncertainties": list(self.held.uncertainties), "ages": list(self.held.ages)},
            "inputs": None if samples is None else dict(samples.inputs),
            "present": None if samples is None or samples.present is None else dict(samples.present),
        }

    def own_restore(self, state: Mapping[str, Any]) -> None:
        self.teacher, self.student, self.since = dict(state["teacher"]), dict(state["student"]), int(state["since"])
        held = state["held"]
        self.held = _Held(list(held["labels"]), list(held["uncertainties"]), list(held["ages"]))
        inputs = state["inputs"]
        places = torch.arange(len(self.held.ages), device=self.context.device)
        self.samples = None if inputs is None else Batch(dict(inputs), None, places, state["present"])
