"""Hierarchical: the memory of PL-FMS (ICCV 2023), which is that of CLIB (ICLR 2022): every sample enters, the least important one goes.

When the memory is full, the class with most samples, counting the one that comes, loses its sample of the smallest score; of several
such classes the one of the lowest number, which is the one that appeared first, and of several such samples one at random. A sample
that comes without a score gets the mean of its class, once the other has gone; 0 if it is the first. Strategies keep the scores up to
date (`exemplars.replace(ids, scores=...)`). The numbers of the classes of which there are enough samples differ by one at most.

The official code gives the first sample of a class the mean of all scores where it replaces another, and 0 where it does not; and of
equal scores the oldest goes. A score lives with its sample in the memory, so there is no other state.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort

import numpy as np
import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy, Slots

from ._groups import Integers, Sizes, from_largest, runs

UNIT = 2**1074  # every finite float is a multiple of 1 / UNIT


def exact(score: float) -> int:
    """In multiples of 1 / UNIT: sums of these do not depend on the order, so a mean is the same however the stream came in batches."""
    over, under = score.as_integer_ratio()
    return over * (UNIT // under)


class Hierarchical(SelectionPolicy):
    streaming = True
    by_group = True
    scored = True

    def __init__(self) -> None:
        self.sizes = Sizes()
        self.members: dict[int, Integers] = {}  # the slots of each class that was not touched since these were made
        self.ranked: dict[int, list[tuple[float, int]]] = {}  # those of the others by score, with their score
        self.totals: dict[int, int] = {}
        self.scores = np.zeros(0)  # by slot, as this policy knows them
        self.version = -1

    def place(self, groups: Tensor, scores: Tensor | None, slots: Slots, generator: torch.Generator) -> Tensor:
        assert scores is not None
        given, drawn = scores.numpy(), torch.rand(len(groups), generator=generator, dtype=torch.float64).tolist()
        known = np.zeros(0) if slots.scores is None else slots.scores.numpy()
        if self.version != slots.version or not np.array_equal(known, self.scores):  # removed or put back; or the scores were replaced
            self._tabulate(slots.groups.numpy()[: slots.held], known)
            self.version = slots.version
        held, budget, sizes = slots.held, slots.budget, self.sizes
        placed = []
        for row, (group, draw) in enumerate(zip(groups.tolist(), drawn, strict=True)):
            if held < budget:
                slot, held = held, held + 1
                sizes.add(group)
            elif budget:
                loser = self._loser(group)
                slot = self._pop(loser, draw)
                if loser != group:
                    sizes.move(loser, group)
            else:
                placed.append(-1)
                continue
            placed.append(slot)
            ranked = self._ranked(group)
            score = float(given[row])
            if math.isnan(score):
                given[row] = self.totals[group] / (len(ranked) * UNIT) if ranked else 0
                score = float(given[row])  # as it is stored, which may be in float32
            insort(ranked, (score, slot))
            self.totals[group] += exact(score)
        places = np.array(placed, dtype=np.int64)
        self.scores = np.concatenate([known, np.zeros(held - slots.held, known.dtype)])
        if budget:
            self.scores[places] = given  # of two in one slot NumPy lets the later stay, too
        return torch.from_numpy(places)

    def _loser(self, group: int) -> int:
        size, most, first = self.sizes.of.get(group, 0), self.sizes.most, self.sizes.largest[0]
        own = size == most or (0 < size == most - 1 and group < first)
        return group if own else first

    def _pop(self, group: int, draw: float) -> int:
        ranked = self._ranked(group)
        equal = bisect_right(ranked, (ranked[0][0], math.inf))
        score, slot = ranked.pop(int(draw * equal))
        self.totals[group] -= exact(score)
        return slot

    def _ranked(self, group: int) -> list[tuple[float, int]]:
        if group not in self.ranked:
            members = self.members.get(group, np.zeros(0, dtype=np.int64))
            self.ranked[group] = sorted(zip(self.scores[members].tolist(), members.tolist(), strict=True))
            self.totals[group] = sum(exact(score) for score, _ in self.ranked[group])
        return self.ranked[group]

    def _tabulate(self, groups: Integers, scores: np.ndarray) -> None:
        order, starts, _ = runs(groups)
        parts = np.split(order, starts[1:])
        self.members = {int(groups[part[0]]): part for part in parts if len(part)}
        self.sizes = Sizes({group: len(part) for group, part in self.members.items()})
        self.ranked, self.totals, self.scores = {}, {}, scores.copy()

    def evict(self, count: int, slots: Slots, generator: torch.Generator) -> Tensor:
        assert slots.scores is not None
        shuffled = torch.randperm(slots.held, generator=generator)
        return from_largest(slots.groups, shuffled[slots.scores[shuffled].argsort(stable=True)], count)
