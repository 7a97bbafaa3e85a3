"""A teacher that answers: a slow copy of what is adapted, which follows the student (CoTTA, RoTTA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamcl.adapting import AdaptingStrategy, copied
from streamcl.nn.norms import with_values
from streamcl.stream import Batch


class Taught(AdaptingStrategy):
    """The teacher is there from the first time on that it differs from the source."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.teacher: dict[str, Tensor] = {}  # what it answers by; empty while that is the source

    def beside(self) -> dict[str, Tensor]:
        """What else of the model the teacher has of its own, as the source has it, by the model's names."""
        return {}

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad(), with_values(self.model, self.teacher):
            return self.model(batch)

    def weights(self) -> dict[str, Tensor]:
        """The teacher's."""
        return self.teacher or {**super().weights(), **self.beside()}

    def begin_teaching(self) -> None:
        if not self.teacher:
            self.teacher = copied({**self.source, **self.beside()})

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """The teacher moves by `share` towards the student."""
        self.begin_teaching()
        students = [value.data for value in self.adapted.values()]
        torch._foreach_lerp_([self.teacher[name] for name in self.adapted], students, share)

    def correct(self, batch: Batch) -> None:
        """As the template, for the teacher: its gradient, its step. The student is changed by as much."""
        self.begin_teaching()
        before = copied(self.teacher)
        with with_values(self.model, self.teacher):
            super().correct(batch)
        for name, value in self.adapted.items():
            value.data.add_(self.teacher[name] - before[name])
