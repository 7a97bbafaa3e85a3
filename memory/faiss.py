"""The memory of a run: exemplars under a budget, class prototypes, analytic statistics, and vector indexes on FAISS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from streamcl.contracts import Memory, SelectionPolicy
from streamcl.options import NonNegativeInt
from streamcl.plugins import find

from .analytic import Analytic
from .exemplars import Exemplars
from .index import FlatIndex
from .prototypes import Prototypes


class Faiss(Memory):
    """`exemplars` is the budget in samples; `select` names the policy, where the strategy's own is not wanted."""

    exemplars: Exemplars
    prototypes: Prototypes
    analytic: Analytic

    def __init__(self, *, exemplars: NonNegativeInt = 200, select: SelectionPolicy | None = None) -> None:
        self.budget, self.select = exemplars, select

    def open(self, seed: int, preferred: str | SelectionPolicy | None, device: torch.device) -> None:
        policy = self.select or preferred or "reservoir"
        if isinstance(policy, str):
            policy = find("policy", policy).load()()
        self.exemplars = Exemplars(self.budget, policy, seed)
        self.prototypes = Prototypes(device)
        self.analytic = Analytic(device)
        self.indexes: dict[str, FlatIndex] = {}

    def index(self, dim: int, name: str = "default") -> FlatIndex:
        return self.indexes.setdefault(name, FlatIndex(dim))

    def remove(self, ids: torch.Tensor) -> dict[str, int]:
        return {"exemplars": self.exemplars.remove(ids), **{f"index {name}": index.remove(ids) for name, index in self.indexes.items()}}

    def nbytes(self) -> int:
        indexes = sum(index.nbytes() for index in self.indexes.values())
        return self.exemplars.nbytes() + self.prototypes.nbytes() + self.analytic.nbytes() + indexes

    def state(self) -> dict[str, Any]:
        return {
            "exemplars": self.exemplars.state(),
            "prototypes": self.prototypes.state(),
            "analytic": self.analytic.state(),
            "indexes": {name: index.state() for name, index in self.indexes.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.exemplars.restore(state["exemplars"])
        self.prototypes.restore(state["prototypes"])
        self.analytic.restore(state["analytic"])
        self.indexes = {}
        for name, saved in state["indexes"].items():
            self.index(saved["dim"], name).restore(saved)
