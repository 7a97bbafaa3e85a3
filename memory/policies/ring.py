"""Ring: of each class, or of each group that the caller names, the latest samples: first in, first out (GEM, NIPS 2017).

The share of a group is budget // groups seen so far, one at least. While there is room every sample is kept. From then on a sample of
a group below its share takes the place of the oldest sample of the largest group (of several, the one of the lowest number), and any
other that of the oldest of its own. So the shares even out as groups come, and places that no share claims are used all the same.
The score that is kept with a sample is the number of its arrival: age survives removal, and there is no other state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy, Slots

from ._groups import Integers, Sizes, from_largest, runs


@dataclass
class _Queues:
    """The slots of each group, side by side in one array; the oldest of a group lies at its head, and after the last comes the first."""

    slots: Integers  # (held,)
    groups: Integers  # (groups,), sorted
    starts: Integers
    counts: Integers
    heads: Integers
    made_for: tuple[int, int]  # the version and the number of the samples that this stands for


class Ring(SelectionPolicy):
    streaming = True
    by_group = True
    scored = True

    def __init__(self) -> None:
        self.queues: _Queues | None = None

    def place(self, groups: Tensor, scores: Tensor | None, slots: Slots, generator: torch.Generator) -> Tensor:
        assert scores is not None
        arrivals = torch.arange(slots.seen, slots.seen + len(groups))
        scores.copy_(arrivals)
        arrived, held = groups.numpy(), slots.held
        room = min(max(0, slots.budget - held), len(arrived))
        fresh = np.arange(held, held + room)
        if room == len(arrived) or slots.budget == 0:
            return torch.from_numpy(np.concatenate([fresh, np.full(len(arrived) - room, -1)]))
        queues = self.queues
        if queues is None or room or queues.made_for != (slots.version, held):
            ages = arrivals[:room].double().numpy()
            if held:
                assert slots.scores is not None
                ages = np.concatenate([slots.scores.double().numpy(), ages])
            queues = _queues(np.concatenate([slots.groups.numpy()[:held], arrived[:room]]), ages, (slots.version, held + room))
        rest = arrived[room:]
        donors = _donors(rest, queues, set(slots.seen_of) | set(arrived[:room].tolist()), slots.budget)
        order, starts, counts = runs(rest)
        if donors is None:
            places = _popped(rest, order, starts, counts, order, rest, queues)
            position = np.searchsorted(queues.groups, rest[order[starts]])
            queues.heads[position] = (queues.heads[position] + counts) % queues.counts[position]
            self.queues = queues
        else:
            places = _popped(donors, *runs(donors), order, rest, queues)
            self.queues = None  # groups have grown and shrunk
        return torch.from_numpy(np.concatenate([fresh, places]))

    def evict(self, count: int, slots: Slots, generator: torch.Generator) -> Tensor:
        assert slots.scores is not None
        return from_largest(slots.groups, slots.scores.argsort(stable=True), count)


def _queues(groups: Integers, ages: np.ndarray, made_for: tuple[int, int]) -> _Queues:
    by_age = ages.argsort(kind="stable")
    order, starts, counts = runs(groups[by_age])
    slots = by_age[order]
    return _Queues(slots, groups[slots[starts]], starts, counts, np.zeros_like(starts), made_for)


def _donors(arrived: Integers, queues: _Queues, known: set[int], budget: int) -> Integers | None:
    """The group that loses its oldest sample to each arrival; None where each is its own."""
    of = dict(zip(queues.groups.tolist(), queues.counts.tolist(), strict=True))
    here = set(arrived.tolist())
    share = max(1, budget // max(1, len(known)))
    crowded = budget < len(known | here)  # with one place a group at most, even those that have theirs may lose it
    small = here if crowded else {group for group in here if of.get(group, 0) < share}
    if not small:
        return None
    sizes, donors = Sizes(of), arrived.copy()
    # No group that has its share falls below it, and a share never grows: only those that lack something now can take.
    for row in np.isin(arrived, list(small)).nonzero()[0].tolist():
        group = int(arrived[row])
        if group not in known:
            known.add(group)
            share = max(1, budget // len(known))
        if sizes.of.get(group, 0) < share:
            donors[row] = sizes.largest[0]
            sizes.move(sizes.largest[0], group)
    return donors


def _popped(
    donors: Integers, by_donor: Integers, starts: Integers, counts: Integers, by_group: Integers, arrived: Integers, queues: _Queues
) -> Integers:
    """The slot that each arrival gets: number k to lose a place in a group is number k of those that were there and then came to it."""
    turn = np.empty(len(donors), dtype=np.int64)
    turn[by_donor] = np.arange(len(donors)) - np.repeat(starts, counts)
    position = np.searchsorted(queues.groups, donors).clip(max=len(queues.groups) - 1)
    there = np.where(queues.groups[position] == donors, queues.counts[position], 0)
    known = turn < there
    places = np.full(len(donors), -1, dtype=np.int64)
    at = position[known]
    places[known] = queues.slots[queues.starts[at] + (queues.heads[at] + turn[known]) % queues.counts[at]]
    waiting = (~known).nonzero()[0]
    if len(waiting):  # it gets the place of a sample that came in this very batch, which got that of another, and so on
        first = np.searchsorted(arrived[by_group], donors[waiting])
        before = np.zeros(len(donors), dtype=np.int64)
        before[waiting] = by_group[first + turn[waiting] - there[waiting]]
        while len(waiting):
            places[waiting] = places[before[waiting]]
            waiting = waiting[places[waiting] < 0]
            before[waiting] = before[before[waiting]]
    return places
