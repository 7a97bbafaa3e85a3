"""Reservoir sampling: every sample offered so far is held with the same probability (Vitter, 1985).

Sample number n (from 0) takes slot n while there is room, and after that the slot randint(0, n), if that is below the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy


class Reservoir(SelectionPolicy):
    streaming = True

    def place(self, seen: int, held: int, budget: int, labels: Tensor, generator: torch.Generator) -> Tensor:
        room = min(max(0, budget - seen), len(labels))
        slots = torch.empty(len(labels), dtype=torch.int64)
        slots[:room] = torch.arange(seen, seen + room)
        if room < len(labels):
            numbers = torch.arange(seen + room + 1, seen + len(labels) + 1)
            drawn = (torch.rand(len(numbers), generator=generator, dtype=torch.float64) * numbers).long()
            slots[room:] = drawn.masked_fill_(drawn >= budget, -1)
        return slots
