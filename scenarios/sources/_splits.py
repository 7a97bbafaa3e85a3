"""The test part of sources that have none of their own: a stratified fraction, fixed by its seed."""

from __future__ import annotations

from torch import Tensor

from streamcl.data import ArrayDataset, split_by_class
from streamcl.seeding import generator
from streamcl.stream import Column, take


def split_columns(inputs: dict[str, Column], targets: Tensor, fraction: float, seed: int) -> tuple[ArrayDataset, ArrayDataset | None]:
    """Columns in memory as a training set and a test set with `fraction` of every class (None where the fraction is 0).

    The id of a sample is its row among them all.
    """
    if fraction == 0:
        return ArrayDataset(inputs, targets), None
    train, test = split_by_class(targets, fraction, generator(seed, "test"), at_least=1)
    return (
        ArrayDataset({name: take(values, train) for name, values in inputs.items()}, targets[train], ids=train),
        ArrayDataset({name: take(values, test) for name, values in inputs.items()}, targets[test], ids=test),
    )
