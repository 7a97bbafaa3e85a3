"""The memory of a run: exemplars under a budget, class prototypes, analytic statistics, and vector indexes on FAISS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from streamcl.contracts import Memory, Metric, SelectionPolicy
from streamcl.errors import ConfigError
from streamcl.options import NonNegativeInt
from streamcl.plugins import find

from .analytic import Analytic
from .disk import Disk
from .exemplars import Exemplars
from .prototypes import Prototypes

if TYPE_CHECKING:
    from .index import Index


class Faiss(Memory):
    """`exemplars` is the budget: in samples, or by `unit` in samples per class or in bytes. `select` names the selection policy, where
    the strategy's own is not wanted. `store` says what of a sample may be kept. With `disk` the raw inputs lie in memory-mapped files.
    `index` is `auto` or a factory string of FAISS (`Flat`, `HNSW32`, `IVF1024,Flat`); `index_device` and `float16` say where and how
    its vectors are held.
    """

    exemplars: Exemplars
    prototypes: Prototypes
    analytic: Analytic

    def __init__(
        self,
        *,
        exemplars: NonNegativeInt = 200,
        unit: Literal["samples", "per_class", "bytes"] = "samples",
        select: SelectionPolicy | None = None,
        store: Literal["raw", "features", "both", "none"] = "raw",
        disk: bool = False,
        index: str = "auto",
        index_device: Literal["auto", "cpu", "cuda", "all"] = "auto",
        float16: bool = False,
    ) -> None:
        self.budget, self.unit, self.select, self.store, self.disk = exemplars, unit, select, store, disk
        self.kind, self.index_device, self.float16 = index, index_device, float16
        self.shareable = not disk  # several processes cannot write one set of files

    def open(
        self,
        seed: int,
        preferred: str | SelectionPolicy | None,
        device: torch.device,
        folder: Path | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        policy = self.select or preferred or "reservoir"
        if isinstance(policy, str):
            policy = find("policy", policy).load()()
        disk = Disk(folder) if self.disk else None
        self.exemplars = Exemplars(self.budget, policy, seed, unit=self.unit, store=self.store, disk=disk)
        self.prototypes = Prototypes(device)
        self.analytic = Analytic(device)
        self.indexes: dict[str, Index] = {}
        self.log = log

    def begin(self, task: int) -> None:
        self.exemplars.task = task

    def end(self) -> None:
        self.analytic.settle()

    def index(self, dim: int, name: str = "default", metric: Metric = "l2") -> Index:
        if self.store == "none":
            raise ConfigError("memory.store is none, and an index holds the features of samples: set it to features or raw")
        found = self.indexes.get(name)
        if found is None:
            from .index import Index  # FAISS is loaded where it is used

            found = self.indexes[name] = Index(dim, metric, self.kind, device=self.index_device, float16=self.float16, log=self.log)
        if (found.dim, found.metric) != (dim, metric):
            raise ConfigError(f"the index {name!r} holds {found.dim} dimensions by {found.metric}, and {dim} by {metric} were asked for")
        return found

    def remove(self, ids: torch.Tensor) -> dict[str, int]:
        return {"exemplars": self.exemplars.remove(ids), **{f"index {name}": index.remove(ids) for name, index in self.indexes.items()}}

    def nbytes(self) -> int:
        indexes = sum(index.nbytes() for index in self.indexes.values())
        return self.exemplars.nbytes() + self.prototypes.nbytes() + self.analytic.nbytes() + indexes

    def about(self) -> dict[str, Any]:
        return {
            "exemplars": self.exemplars.about(),
            "prototypes": self._prototypes(),
            "analytic": {"bytes": self.analytic.nbytes()} if self.analytic.nbytes() else {},
            "indexes": {name: index.about() for name, index in self.indexes.items()},
        }

    def _prototypes(self) -> dict[str, Any]:
        labels = self.prototypes.labels()
        if len(labels) == 0:
            return {}
        return {
            "classes": len(labels.unique()),
            "means": len(labels),
            "samples": int(self.prototypes.counts().sum()),
            "covariance": self.prototypes.covariance,
            "bytes": self.prototypes.nbytes(),
        }

    def state(self) -> dict[str, Any]:
        return {
            "exemplars": self.exemplars.state(),
            "prototypes": self.prototypes.state(),
            "analytic": self.analytic.state(),
            "indexes": {name: [index.dim, index.metric, index.state()] for name, index in self.indexes.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.exemplars.restore(state["exemplars"])
        self.prototypes.restore(state["prototypes"])
        self.analytic.restore(state["analytic"])
        self.indexes = {}
        for name, (dim, metric, saved) in state["indexes"].items():
            self.index(dim, name, metric).restore(saved)
