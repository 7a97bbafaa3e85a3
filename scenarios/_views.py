"""Views that many tasks may hold at once: what can be looked up is looked up, not copied, and only what may be read is handed on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamcl.data import ArrayDataset, FileDataset, View, relabelled
from streamcl.stream import Batch, Dataset, StreamInfo

_ANSWERED = ("answer", "verifier", "choices", "difficulty", "skill", "pair")  # what a target in words is learned and scored by


def needed(target: str) -> tuple[str, ...]:
    """The columns of `extra` that a target of this kind needs; any other may tell what is not to be read: the labels, or a modality."""
    return (*StreamInfo.told, *(_ANSWERED if target == "text" else ()))


def only(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """A data set without the columns of `extra` that are not named; what lies in memory is shared."""
    if isinstance(dataset, ArrayDataset | FileDataset):
        kept = {name: column for name, column in dataset.extra.items() if name in names}
        if len(kept) == len(dataset.extra):
            return dataset
        if type(dataset) is ArrayDataset:
            return ArrayDataset(dataset.inputs, dataset.targets, dataset.ids, dataset.present, kept)
        if type(dataset) is FileDataset:
            return FileDataset(dataset.decode, dataset.targets, dataset.ids, dataset.workers, kept, dataset.present)
    return _Only(dataset, names)


class _Only(View):
    """The same of a data set that is itself a view."""

    def __init__(self, dataset: Dataset, names: Sequence[str]) -> None:
        super().__init__(dataset)
        self.names, self.present = frozenset(names), getattr(dataset, "present", None)

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        return batch.replace(extra={name: column for name, column in batch.extra.items() if name in self.names})


def fitted(numbers: Tensor, below: int) -> Tensor:
    """Whole numbers from 0 to under `below` in the smallest type that holds them; to index by them, make them long again."""
    dtype = next((d for d in (torch.uint8, torch.int16, torch.int32) if below <= torch.iinfo(d).max + 1), torch.int64)
    return numbers.to(dtype)


class Picked(View):
    """Some samples of a data set in a given order, with their classes renumbered by `relabel`: a `Subset` that holds no targets and no ids,
    so that a task of a million samples costs what its row numbers do."""

    def __init__(self, dataset: Dataset, rows: Tensor, relabel: Tensor | None = None) -> None:
        super().__init__(dataset, rows)
        self.relabel = relabel

    def _targets(self) -> Tensor:
        own = super()._targets()
        return own if self.relabel is None else relabelled(own, self.relabel)

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        if self.relabel is None or batch.target is None:
            return batch
        return batch.replace(target=relabelled(batch.target, self.relabel))
