"""Class-balancing reservoir sampling, CBRS (Chrysakis & Moens, Online Continual Learning from Imbalanced Data, ICML 2020).

While there is room every sample is kept. From then on a class that is the largest, or has been, is full. A sample of a class that is
not full takes the place of a random one of the largest class; of several, each is as likely. A sample of a full class is kept with
probability stored / seen of its class, in the place of a random one of its own. So all classes of which there were enough samples come
to the same number, give or take one, and what is held of a class is a uniform sample of what was seen of it.

Two choices. A class counts as the largest only while the memory is full: the first sample of a stream is the largest class by itself,
and were that class full from there on, it could never grow. And whether a class has been the largest is read off the counts: a full
class holds as many as the largest, or one fewer, and then it has lost some; a class that has never been the largest has lost none.
Unless samples are removed or the budget grows this is the paper's rule, step by step (a test compares them). Then it lets a
class that fell behind catch up, and places that became free take the next samples, whatever their class.
"""

from __future__ import annotations

from bisect import insort

import numpy as np
import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy, Slots

from ._groups import Integers, Sizes, from_largest, runs


class ClassBalanced(SelectionPolicy):
    streaming = True
    by_group = True

    def __init__(self) -> None:
        self.members: dict[int, list[int]] = {}  # the slots of each class, in order
        self.sizes = Sizes()
        self.made_for = (-1, -1)  # the version and the number of the samples that the tables stand for

    def place(self, groups: Tensor, scores: Tensor | None, slots: Slots, generator: torch.Generator) -> Tensor:
        arrived = groups.numpy()
        count, held = len(arrived), slots.held
        drawn = torch.rand(count, generator=generator, dtype=torch.float64).numpy()  # one for each sample, needed or not
        room = min(max(0, slots.budget - held), count)
        placed = np.full(count, -1, dtype=np.int64)
        placed[:room] = np.arange(held, held + room)
        if room == count:
            return torch.from_numpy(placed)
        if room or self.made_for != (slots.version, held):
            self._tabulate(np.concatenate([slots.groups.numpy(), arrived[:room]]))
            self.made_for = slots.version, held + room

        # Sample number n of its class draws a number below n, and takes the slot of that number among its class if there is one.
        order, starts, counts = runs(arrived)
        labels = arrived[order[starts]].tolist()
        seen = [slots.seen_of.get(label, 0) for label in labels]
        full = [self._full(label, before) for label, before in zip(labels, seen, strict=True)]
        limits = [self.sizes.of.get(label, 0) if there else np.inf for label, there in zip(labels, full, strict=True)]
        numbers = np.arange(1, count + 1) + np.repeat(np.array(seen) - starts, counts)
        eventful = not all(full)
        scaled = drawn[order] * numbers
        chosen = ((scaled < np.repeat(limits, counts)) & (order >= room)).nonzero()[0]
        if eventful:
            chosen = chosen[order[chosen].argsort()]
        # A full class only ever shrinks, so whoever is not chosen here would not be later. Few are, in the long run.
        rows = order[chosen]
        for row, label, number, place, draw in zip(
            rows.tolist(), arrived[rows].tolist(), numbers[chosen].tolist(), scaled[chosen].tolist(), drawn[rows].tolist(), strict=True
        ):
            if not eventful or self._full(label, number - 1):
                if place < self.sizes.of.get(label, 0):
                    placed[row] = self.members[label][int(place)]
            else:
                placed[row] = self._make_way(label, draw)
        return torch.from_numpy(placed)

    def _full(self, label: int, seen: int) -> bool:
        size, most = self.sizes.of.get(label, 0), self.sizes.most
        return size == most or (size == most - 1 and size < seen)

    def _make_way(self, label: int, draw: float) -> int:
        """A random slot of the largest classes goes over to this one."""
        most, largest = self.sizes.most, self.sizes.largest
        place = int(draw * most * len(largest))
        loser = largest[place // most]
        slot = self.members[loser].pop(place % most)
        insort(self.members.setdefault(label, []), slot)
        self.sizes.move(loser, label)
        return slot

    def _tabulate(self, groups: Integers) -> None:
        order, starts, _ = runs(groups)
        parts = np.split(order, starts[1:])
        self.members = {int(groups[part[0]]): part.tolist() for part in parts if len(part)}
        self.sizes = Sizes({label: len(members) for label, members in self.members.items()})

    def evict(self, count: int, slots: Slots, generator: torch.Generator) -> Tensor:
        return from_largest(slots.groups, torch.randperm(slots.held, generator=generator), count)
