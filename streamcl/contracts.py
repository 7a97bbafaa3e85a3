"""What a memory offers to strategies. The engine and the strategies know these protocols; `memory/` fills them in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from streamcl.stream import Batch, Dataset

Metric = Literal["l2", "ip", "cosine"]


@runtime_checkable
class ExemplarMemory(Protocol):
    """Samples kept from earlier tasks, under a budget: raw, as features (in `extra["features"]`), or both."""

    budget: int  # 0 keeps nothing
    unit: str  # what the budget counts: samples, per_class or bytes
    streaming: bool  # whether samples are placed as they are offered, or ranked a group at a time
    store: str  # what of a sample may be kept: raw, features, both or none
    needs: tuple[str, ...]  # what must be offered with samples: "features", and as `scores` "logits" or "scores"

    def __len__(self) -> int: ...

    def add(self, samples: Batch | Dataset, group: int | None = None, features: Tensor | None = None, scores: Tensor | None = None) -> None:
        """Offer samples; the selection policy decides which stay. One id twice in a call is refused, across calls it is merged.

        The budget is shared out among the classes, or among the `group`s (tasks, concepts) where the caller names them. `scores` is one
        number for each sample, for the policies that go by one. Of a data set only what is kept is read, where the policy can tell
        from labels, features and scores.
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

    def of(self, label: int, most: int | None = None) -> Batch:
        """The samples of one class, the first `most` in the order of the policy's preference where it has one; none of an unknown class.

        Reading from a memory that holds nothing at all is a DataError.
        """
        ...

    def replace(self, ids: Tensor, **columns: Tensor) -> None:
        """Overwrite what is stored beside these samples: `extra` columns such as logits, widened where classes came since; `scores`."""
        ...

    def remove(self, ids: Tensor) -> int:
        """Erase these samples; how many there were."""
        ...

    def resize(self, budget: int) -> None:
        """A new budget; where it is the smaller one, the policy says what goes."""
        ...

    def classes(self) -> dict[int, int]:
        """Samples held per class."""
        ...


@runtime_checkable
class PrototypeMemory(Protocol):
    """Count, mean and covariance per class, in one pass, exact under any splitting of the stream.

    Rows are prototypes in order of first appearance; `labels` says which class each belongs to (a class may have several).
    """

    def configure(
        self,
        covariance: Literal["none", "diagonal", "full", "shared"] = "none",
        per_class: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Empty the prototypes and fix what is kept of a class; no effect when they already have these settings."""
        ...

    def update(self, features: Tensor, labels: Tensor) -> None: ...

    def remove(self, features: Tensor, labels: Tensor) -> None:
        """Take back what `update` took in with the same arguments, exactly up to rounding."""
        ...

    def set(self, label: int, mean: Tensor, count: int, covariance: Tensor | None = None) -> None:
        """Put what was computed elsewhere in the place of a class's prototype."""
        ...

    def means(self) -> Tensor:
        """(prototypes, dim)"""
        ...

    def labels(self) -> Tensor:
        """The class of each row of `means`."""
        ...

    def counts(self) -> Tensor:
        """How many samples each row of `means` stands for."""
        ...

    def covariances(self) -> Tensor:
        """(prototypes, dim) diagonal; (prototypes, dim, dim) full; (dim, dim) shared: pooled within classes. Divided by count - 1."""
        ...

    def nearest(
        self,
        features: Tensor,
        k: int = 1,
        metric: Literal["euclidean", "cosine", "mahalanobis"] = "euclidean",
        shrinkage: tuple[float, float] = (1.0, 1.0),
        correlation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Distances and classes of the k nearest prototypes  # (batch, k) each; fewer columns where there are fewer prototypes

        Mahalanobis: each covariance gets shrinkage[0] times its mean variance on the diagonal and shrinkage[1] times its mean non-zero
        covariance off it (FeCAM); `correlation` divides it by its standard deviations.
        """
        ...

    def shift(self, before: Tensor, after: Tensor, sigma: float = 0.3, floor: float = 0.0, labels: Tensor | None = None) -> None:
        """Move the means (of `labels`, or all) by the mean of after - before, weighted by exp(-|before - mean|^2 / 2 sigma^2) + floor.

        `before` and `after` are features of the same samples, row by row, under the network before and after it learned.
        """
        ...

    def draw(self, count: int, labels: Tensor | None = None, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`count` Gaussian pseudo-features of each class and their labels  # (count x classes, dim), (count x classes,)"""
        ...

    def merge(self, other: PrototypeMemory) -> None:
        """Take in the statistics of another memory, as if its samples had come here."""
        ...

    def clear(self) -> None: ...


@runtime_checkable
class AnalyticStatistics(Protocol):
    """The ridge regression on everything seen so far, in closed form, with classes that grow."""

    def configure(
        self, dim: int, ridge: float, dtype: torch.dtype = torch.float64, form: Literal["accumulated", "recursive"] = "accumulated"
    ) -> None:
        """Empty the statistics and fix their size; no effect when they already have these settings.

        `accumulated` keeps X'X and X'Y and solves when the weights are asked for; `recursive` keeps (X'X + ridge I)^-1 and the weights
        by Woodbury, for streams of a few samples at a time whose weights are asked for after each.
        """
        ...

    def update(self, features: Tensor, labels: Tensor, classes: int) -> None:
        """Take in a batch with labels below `classes` (or targets  # (batch, columns)); exact under any splitting of the stream."""
        ...

    def remove(self, features: Tensor, labels: Tensor) -> None:
        """Take back what `update` took in with the same arguments, exactly up to rounding."""
        ...

    def weights(self, ridge: float | None = None) -> Tensor:
        """(dim, classes): the joint ridge solution on all data so far; at another `ridge` in the accumulated form."""
        ...

    def merge(self, other: AnalyticStatistics) -> None:
        """Take in the statistics of another memory, as if its samples had come here."""
        ...


@runtime_checkable
class FeatureIndex(Protocol):
    """Vectors by sample id, searchable. Tensors in and out, on the device of what is asked.

    Distances are those of the metric: squared Euclidean for `l2` (smaller is nearer), inner products for `ip` and cosines for
    `cosine` (larger is nearer).
    """

    dim: int
    metric: Metric

    def add(self, ids: Tensor, vectors: Tensor) -> None:
        """Ids that are there already, or twice, are refused, and so are NaN and infinite values; then nothing was added."""
        ...

    def remove(self, ids: Tensor) -> int: ...

    def update(self, ids: Tensor, vectors: Tensor) -> None:
        """Exchange the vectors of ids that are there, and add the others."""
        ...

    def search(self, queries: Tensor, k: int, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances and ids  # (queries, k) each; id -1 where there are fewer than k. `where`: among these ids only."""
        ...

    def range_search(self, queries: Tensor, radius: float) -> tuple[Tensor, Tensor, Tensor]:
        """Limits, distances and ids: those of query i are [limits[i]:limits[i + 1]]; nearer than the radius (`ip`, `cosine`: above it)."""
        ...

    def reconstruct(self, ids: Tensor) -> Tensor:
        """The vectors as they are stored (compressed indexes: nearly)  # (ids, dim); an unknown id is a DataError"""
        ...

    def merge(self, other: FeatureIndex) -> None: ...

    def save(self, path: str | Path) -> None: ...

    def nbytes(self) -> int: ...

    def about(self) -> dict[str, Any]:
        """What it is made of and why: `kind`, `why`, `device`, `vectors`, `trained`, and `recall` against exact search where measured."""
        ...

    def __len__(self) -> int: ...


class Slots:
    """What a streaming policy sees of the memory that it places samples in.

    `groups` and `scores` are of the samples held, by slot. They are the memory's own: a policy reads them. `version` changes when
    samples were removed or put back, so that a policy that keeps tables of its own makes them anew.
    """

    __slots__ = ("budget", "groups", "held", "scores", "seen", "seen_of", "version")

    def __init__(self, budget: int = 0) -> None:
        self.budget = budget  # slots there are at most
        self.held = 0  # slots that are taken: the first ones
        self.seen = 0  # samples that were offered before
        self.version = 0
        self.groups: Tensor = torch.empty(0, dtype=torch.int64)  # (held,), only for policies with `by_group`
        self.seen_of: dict[int, int] = {}  # samples of each group that were offered before, only for policies with `by_group`
        self.scores: Tensor | None = None  # (held,), only for policies that are `scored`


class SelectionPolicy:
    """A plug-in that decides which samples a bounded memory keeps.

    A `streaming` policy places each offered sample at once (`place`); any other ranks the samples of one group (a class, where the
    caller names no other), best first (`rank`), and the memory keeps the first of each: equal shares, a prefix when a share shrinks.
    """

    streaming: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()  # "features", "logits" (as `scores`), "scores": what must be offered with the samples
    scored: ClassVar[bool] = False  # a streaming policy that keeps a score of each sample held, offered or its own
    by_group: ClassVar[bool] = False  # a streaming policy that goes by the groups of the samples held
    merges: ClassVar[bool] = False  # a ranking policy: samples held and samples offered of one group are ranked together, by score

    def score(self, scores: Tensor) -> Tensor:
        """One number for each sample, of what was offered as its `scores`  # (batch,)"""
        return scores

    def place(self, groups: Tensor, scores: Tensor | None, slots: Slots, generator: torch.Generator) -> Tensor:
        """The slot of each offered sample, -1 for those dropped  # (batch,)

        `scores` are NaN where none were offered; a policy that needs them may fill these in, in place: so they are then stored.

        As if the samples came one by one: of two in one slot the later stays. Slots are filled in order: the first sample that goes
        into a free one gets the slot `held`, the next `held + 1`.
        """
        raise TypeError(f"{type(self).__name__} ranks groups; it does not place samples one by one")

    def evict(self, count: int, slots: Slots, generator: torch.Generator) -> Tensor:
        """Which slots go when the budget shrinks by `count`  # (count,); any, unless the policy knows better"""
        return torch.randperm(slots.held, generator=generator)[:count]

    def rank(self, features: Tensor, scores: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        """Indices of the `count` samples of a group to keep, in order of preference.

        Both tensors have one row for each sample; `features` has no columns where none were given.
        """
        raise TypeError(f"{type(self).__name__} places samples one by one; it does not rank groups")

    def state(self) -> dict[str, Any]:
        """What it must find again after a stop beside the samples: tensors and JSON values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Memory(ABC):
    """A plug-in that makes the parts of a run's memory. `open` is called once, before the strategy starts."""

    exemplars: ExemplarMemory
    prototypes: PrototypeMemory
    analytic: AnalyticStatistics

    shareable: bool = True  # whether several processes can each hold it: the same samples offered in the same order

    @abstractmethod
    def open(
        self,
        seed: int,
        preferred: str | SelectionPolicy | None,
        device: torch.device,
        folder: Path | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """`preferred` is the strategy's own selection policy, used where the YAML names none; `folder` is where the parts of the run's
        checkpoints lie, if it has any (`streamcl/parts.py`); `log` is told what a person would like to know.
        """

    def begin(self, task: int) -> None:
        """A task begins: what is offered from now on arrived with it."""

    def end(self) -> None:
        """The task is learned: of samples that were only counted in, nothing is left but the sums."""

    @abstractmethod
    def index(self, dim: int, name: str = "default", metric: Metric = "l2") -> FeatureIndex:
        """The index of that name, made when first asked for."""

    @abstractmethod
    def remove(self, ids: Tensor) -> dict[str, int]:
        """Erase samples wherever they are held by id; how many were found in each part. Statistics take samples back by `remove`
        of their own, with the features that they were given.
        """

    @abstractmethod
    def nbytes(self) -> int:
        """All that the memory holds."""

    def about(self) -> dict[str, Any]:
        """What is in it, part by part, for people: JSON values."""
        return {}

    @abstractmethod
    def state(self) -> dict[str, Any]: ...

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None: ...
