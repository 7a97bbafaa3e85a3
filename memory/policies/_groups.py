"""The groups of the samples held, for policies that go by them: how many each has, which are the largest, and who goes first."""

from __future__ import annotations

from bisect import insort

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]


class Sizes:
    """How many samples each group holds, with the largest groups at hand."""

    def __init__(self, of: dict[int, int] | None = None) -> None:
        self.of = of or {}
        self._find()

    def _find(self) -> None:
        self.most = max(self.of.values(), default=0)
        self.largest = sorted(group for group, size in self.of.items() if size == self.most)

    def add(self, group: int) -> None:
        size = self.of[group] = self.of.get(group, 0) + 1
        if size > self.most:
            self.most, self.largest = size, [group]
        elif size == self.most:
            insort(self.largest, group)

    def move(self, loser: int, winner: int) -> None:
        """A slot passes from one group to another."""
        self.add(winner)
        size = self.of[loser] = self.of[loser] - 1
        if size + 1 == self.most:
            self.largest.remove(loser)
            if not self.largest:
                self._find()


def runs(groups: Integers) -> tuple[Integers, Integers, Integers]:
    """The rows sorted by group, in order within each; where each group begins among them; and how many it has."""
    order = groups.argsort(kind="stable")
    ranked = groups[order]
    starts = np.concatenate([[0], (ranked[1:] != ranked[:-1]).nonzero()[0] + 1])[: len(groups)].astype(np.int64)
    return order, starts, np.diff(starts, append=len(groups))


def from_largest(groups: Tensor, order: Tensor, count: int) -> Tensor:
    """The `count` slots that go when each time the largest group loses one, of several the one of the lowest number.

    `order` holds all slots; of a group the first in it goes first.
    """
    of = groups.numpy()[order.numpy()]
    by_group, starts, counts = runs(of)
    level = np.repeat(counts + starts, counts) - np.arange(len(of))  # how many its group has when its turn comes
    turns = np.lexsort((of[by_group], -level))
    return order[torch.from_numpy(by_group[turns[:count]])]
