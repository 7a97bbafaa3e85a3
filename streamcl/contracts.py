"""What a memory offers to strategies. The engine and the strategies know these protocols; `memory/` fills them in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from streamcl.stream import Batch, Dataset


@runtime_checkable
class ExemplarMemory(Protocol):
    """Samples kept from earlier tasks, under a budget."""

    budget: int
    streaming: bool  # whether samples are placed as they are offered, or ranked a class at a time

    def __len__(self) -> int: ...

    def add(self, samples: Batch | Dataset, group: int | None = None, features: Tensor | None = None, scores: Tensor | None = None) -> None:
        """Offer samples; the selection policy decides which stay. One id twice in a call is refused, across calls it is merged.

        Of a data set only what is kept is read, where the policy can tell from labels and features.
        """
        ...

    def sample(self, count: int, generator: torch.Generator | None = None) -> Batch:
        """`count` samples drawn uniformly, without repeats while there are enough."""
        ...

    def join(self, batch: Batch, count: int, generator: torch.Generator | None = None) -> Batch:
        """The batch with `sample(count)` appended: what replay does at every step. Its `new` says where these begin."""
        ...

    def dataset(self) -> Dataset:
        """Everything held, as a data set (a snapshot)."""
        ...

    def of(self, label: int) -> Batch:
        """The samples of one class, in the order of the policy's preference where it has one."""
        ...

    def replace(self, ids: Tensor, **columns: Tensor) -> None:
        """Overwrite what is stored beside these samples (`extra` columns such as logits), widened where classes came since."""
        ...

    def remove(self, ids: Tensor) -> int:
        """Erase these samples; how many there were."""
        ...

    def classes(self) -> dict[int, int]:
        """Samples held per class."""
        ...


@runtime_checkable
class PrototypeMemory(Protocol):
    """Count and mean per class, one pass."""

    def update(self, features: Tensor, labels: Tensor) -> None: ...

    def set(self, label: int, mean: Tensor, count: int) -> None:
        """Put a mean that was computed elsewhere in its place."""
        ...

    def means(self) -> Tensor:
        """(classes, dim), in order of first appearance; `labels` says which row is which class."""
        ...

    def labels(self) -> Tensor:
        """The class of each row of `means`."""
        ...

    def nearest(self, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Distances and classes of the k nearest means  # (batch, k) each"""
        ...

    def clear(self) -> None: ...


@runtime_checkable
class AnalyticStatistics(Protocol):
    """The ridge regression on everything seen so far, kept up to date in closed form, with classes that grow."""

    def configure(self, dim: int, ridge: float, dtype: torch.dtype = torch.float64) -> None:
        """Empty the statistics and fix their size; no effect when they already have these settings."""
        ...

    def update(self, features: Tensor, labels: Tensor, classes: int) -> None:
        """Take in a batch with labels below `classes`; exact under any splitting of the stream."""
        ...

    def weights(self) -> Tensor:
        """(dim, classes): the joint ridge solution on all data so far."""
        ...


@runtime_checkable
class FeatureIndex(Protocol):
    """Vectors by sample id, searchable."""

    def add(self, ids: Tensor, vectors: Tensor) -> None: ...

    def remove(self, ids: Tensor) -> int: ...

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances and ids  # (queries, k) each; id -1 where there are fewer than k"""
        ...

    def __len__(self) -> int: ...


class SelectionPolicy:
    """A plug-in that decides which samples a bounded memory keeps.

    A `streaming` policy places each offered sample at once (`place`); any other ranks the samples of one class, best first
    (`rank`), and the memory keeps the first budget // classes of each.
    """

    streaming: bool = False
    needs_features: bool = False

    def place(self, seen: int, held: int, budget: int, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The slot of each offered sample, -1 for those dropped  # (batch,); `seen` samples were offered before"""
        raise TypeError(f"{type(self).__name__} ranks classes; it does not place samples one by one")

    def rank(self, features: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Indices of the `count` samples of a class to keep, in order of preference."""
        raise TypeError(f"{type(self).__name__} places samples one by one; it does not rank classes")


class Memory(ABC):
    """A plug-in that makes the parts of a run's memory. `open` is called once, before the strategy starts."""

    exemplars: ExemplarMemory
    prototypes: PrototypeMemory
    analytic: AnalyticStatistics

    @abstractmethod
    def open(self, seed: int, preferred: str | SelectionPolicy | None, device: torch.device) -> None:
        """`preferred` is the strategy's own selection policy, used where the YAML names none."""

    @abstractmethod
    def index(self, dim: int, name: str = "default") -> FeatureIndex:
        """The index of that name, made when first asked for."""

    @abstractmethod
    def remove(self, ids: Tensor) -> dict[str, int]:
        """Erase samples everywhere; how many were found in each part."""

    @abstractmethod
    def nbytes(self) -> int:
        """All that the memory holds."""

    @abstractmethod
    def state(self) -> dict[str, Any]: ...

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None: ...
