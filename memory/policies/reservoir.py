"""Reservoir sampling: every sample offered so far is held with the same probability (Vitter's algorithm R, 1985).

Sample number n (from 0) is kept while n is below the budget. After that it takes the place randint(0, n), if that is below the budget.
Where samples were removed, their places stay vacant until one of them is drawn: so all others keep the same probability, budget / n.
A larger budget fills up in the same way, with samples that come from then on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy, Slots


class Reservoir(SelectionPolicy):
    streaming = True

    def place(self, groups: Tensor, scores: Tensor | None, slots: Slots, generator: torch.Generator) -> Tensor:
        count, seen, held, budget = len(groups), slots.seen, slots.held, slots.budget
        room = min(max(0, budget - seen), count)
        placed = torch.empty(count, dtype=torch.int64)
        placed[:room] = torch.arange(held, held + room)
        held += room
        if room < count:
            numbers = torch.arange(seen + room + 1, seen + count + 1)
            drawn = (torch.rand(count - room, generator=generator, dtype=torch.float64) * numbers).long()
            drawn.masked_fill_(drawn >= budget, -1)
            if held < budget:  # each pass of this loop fills a vacant place, or meets one that was filled in this very batch
                for row in (drawn >= held).nonzero().squeeze(1).tolist():
                    if drawn[row] >= held:
                        drawn[row] = held
                        held += 1
            placed[room:] = drawn
        return placed
