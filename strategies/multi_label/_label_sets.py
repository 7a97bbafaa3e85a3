"""What the methods for sets of labels share: how a label that is not annotated is read, and what the baselines are trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from streamcl.errors import DataError
from streamcl.options import Optimizer, PositiveInt, Schedule
from streamcl.strategy import GradientStrategy
from streamcl.stream import Dataset, Task


class LabelSets(GradientStrategy):
    """Gradient training on sets of labels, with the settings of KRT's code: 20 epochs, batch 64, Adam at 1e-4, a cosine after warm-up."""

    targets: ClassVar[tuple[str, ...]] = ("labels",)
    selection = "reservoir"

    def __init__(
        self,
        *,
        epochs: PositiveInt = 20,
        batch: PositiveInt = 64,
        optimizer: Optimizer = Optimizer(name="adam", lr=1e-4, weight_decay=1e-4),  # noqa: B008
        schedule: Schedule = Schedule(name="cosine", warmup=0.2),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, schedule=schedule, **options)

    def enter_task(self, task: Task) -> None:
        check_labels(task)


def check_labels(task: Task) -> None:
    """Refuse annotations that say nothing of the classes seen so far."""
    targets = getattr(task.train, "targets", None)
    if targets is None:
        return
    classes = max(task.seen) + 1
    if targets.dim() != 2 or targets.is_floating_point():
        raise DataError(f"{task.name}: a matrix of labels is needed, and the targets are {targets.dtype} of shape {tuple(targets.shape)}")
    if targets.shape[1] > classes:
        raise DataError(
            f"{task.name}: the labels have {targets.shape[1]} columns, and {classes} classes have arrived: one for each is needed"
        )
    wrong = ((targets < -1) | (targets > 1)).any(dim=1).nonzero().squeeze(1)
    if len(wrong):
        raise DataError(
            f"{task.name}: sample {int(task.train.ids[wrong[0]])} has labels other than 1 (there), 0 (not there) and -1 (not annotated)"
        )


def widened(target: Tensor, classes: int, value: int = -1) -> Tensor:
    """With a column for each of so many classes."""
    return pad(target, (0, classes - target.shape[1]), value=value) if target.shape[1] < classes else target


def together(datasets: list[Dataset], classes: int, complete: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Where each sample of data sets one after another comes first, and all that any of them says of its labels  # (samples, classes)

    What a data set annotates is 0 for the samples that are not in it, but in others, where both are `complete`: then it holds every
    sample that carries one of its classes.
    """
    ids = torch.cat([data.ids for data in datasets])
    targets = torch.cat([widened(data.targets, classes) for data in datasets])
    distinct, of = ids.unique(return_inverse=True)
    said = targets.new_full((len(distinct), classes), -1)
    said = said.scatter_reduce(0, of[:, None].expand_as(targets), targets, "amax")
    whole = [data for data, is_complete in zip(datasets, complete, strict=True) if is_complete]
    anywhere = torch.isin(distinct, torch.cat([data.ids for data in whole])) if whole else torch.zeros_like(distinct, dtype=torch.bool)
    for data in whole:
        columns = (data.targets >= 0).any(dim=0).nonzero().squeeze(1)
        rows = (anywhere & ~torch.isin(distinct, data.ids)).nonzero().squeeze(1)
        block = said[rows[:, None], columns]
        said[rows[:, None], columns] = torch.where(block == -1, 0, block)
    first = torch.full((len(distinct),), len(ids)).scatter_reduce(0, of, torch.arange(len(ids)), "amin")
    order = first.argsort()
    return first[order], said[order]
