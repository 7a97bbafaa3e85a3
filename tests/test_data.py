"""Batches that are joined and data sets that are read as one: nothing is lost, and the order is the caller's."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcl.data import ArrayDataset, FileDataset, Joined, SinglePass, Subset
from streamcl.errors import DataError
from streamcl.stream import Batch

NAN = math.nan


def batch(ids: list[int], target: Any = None, **extra: Any) -> Batch:
    index = torch.tensor(ids)
    return Batch({"x": index[:, None].float()}, index if target is None else torch.tensor(target), index, extra=extra)


def rows(column: Any) -> list:
    """With None for NaN, so that it can be compared."""
    return [[None if value != value else value for value in row] for row in column.tolist()]


def test_logits_of_fewer_classes_are_widened_with_nan_and_labels_with_minus_one() -> None:
    old = batch([0, 1], [[1, 0], [0, 1]], logits=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ranks=torch.tensor([[5], [6]]))
    new = batch([2], [[0, 0, 1]], logits=torch.tensor([[5.0, 6.0, 7.0]]), ranks=torch.tensor([[7, 8]]))
    for parts in ([old, new], [old[:1], old[1:], new]):
        both = Batch.cat(parts)
        assert both.target is not None and both.target.tolist() == [[1, 0, -1], [0, 1, -1], [0, 0, 1]]
        assert rows(both.extra["logits"]) == [[1, 2, None], [3, 4, None], [5, 6, 7]]
        assert both.extra["ranks"].tolist() == [[5, -1], [6, -1], [7, 8]]  # type: ignore[union-attr]
    plain = Batch.cat([batch([0], [[1]]), batch([1], [[0, 1]])])
    assert plain.target is not None and plain.target.tolist() == [[1, -1], [0, 1]]


def test_a_column_that_only_some_have_is_kept_where_nan_can_say_so() -> None:
    kept = batch([7], logits=torch.tensor([[1.0, 2.0]]), loss=torch.tensor([3.0]), answer=["yes"], rank=torch.tensor([4]))
    both = Batch.cat([batch([1, 2]), kept])
    assert both.extra.keys() == {"logits", "loss"} and both.new is None
    assert rows(both.extra["logits"]) == [[None, None], [None, None], [1, 2]]
    assert Batch.cat([kept, batch([1])]).extra["loss"].isnan().tolist() == [False, True]  # type: ignore[union-attr]
    assert Batch.cat([kept, kept]).extra.keys() == kept.extra.keys()


def test_how_many_are_new_goes_along_to_a_device_and_ends_with_indexing() -> None:
    joined = batch([1, 2, 3]).replace(new=2)
    assert joined.to("cpu").new == joined.to("meta").new == 2 and joined[:2].new is None and Batch.cat([joined, joined]).new is None


def test_inputs_of_different_widths_are_not_widened() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        Batch.cat([batch([1]), Batch({"x": torch.zeros(1, 2)}, torch.tensor([0]), torch.tensor([2]))])


class Decode:
    """Says in which process it ran."""

    def __call__(self, wanted: list[int]) -> dict[str, Any]:
        if 77 in wanted:
            raise DataError("row 77 does not decode")
        return {"process": torch.full((len(wanted),), os.getpid()), "row": torch.tensor(wanted)}


def files(count: int, first: int = 0, workers: int = 2) -> FileDataset:
    return FileDataset(Decode(), torch.arange(count) % 3, torch.arange(count) + first, workers)


def memory(count: int, first: int) -> ArrayDataset:
    columns: dict[str, Any] = {"process": torch.zeros(count, dtype=torch.int64), "row": torch.arange(count)}
    return ArrayDataset(columns, torch.arange(count) % 3, torch.arange(count) + first)


@pytest.mark.parametrize("nested", [False, True], ids=["direct", "subset"])
def test_joined_files_are_decoded_by_workers_in_the_order_asked_for(nested: bool) -> None:
    disk = files(60)
    part = Subset(Subset(disk, torch.arange(59, -1, -1)), torch.arange(40)) if nested else disk
    joined = Joined([part, memory(20, 100), files(0)])
    order = torch.randperm(len(joined), generator=torch.Generator().manual_seed(1))
    read = list(joined.read(order, 16))
    assert [len(b) for b in read] == [16] * (len(order) // 16) + ([len(order) % 16] if len(order) % 16 else [])
    both, plain = Batch.cat(read), joined[order]
    assert torch.equal(both.ids, joined.ids[order]) and torch.equal(both.inputs["row"], plain.inputs["row"])  # type: ignore[arg-type]
    assert both.target is not None and torch.equal(both.target, joined.targets[order])
    processes = both.inputs["process"]
    assert isinstance(processes, Tensor) and set(processes[both.ids >= 100].tolist()) == {0}
    decoding = set(processes[both.ids < 100].tolist())
    assert os.getpid() not in decoding and 1 <= len(decoding) <= 2


def test_without_workers_files_are_decoded_here_and_a_record_that_does_not_decode_is_told_as_it_is() -> None:
    here = Batch.cat(list(Joined([files(20, workers=0), memory(5, 100)]).batches(8))).inputs["process"]
    assert isinstance(here, Tensor) and set(here.tolist()) == {0, os.getpid()}
    with pytest.raises(DataError, match=r"^row 77 does not decode$"):
        list(Joined([memory(20, 100), files(80)]).batches(8))


def test_a_single_pass_is_counted_also_where_it_is_joined() -> None:
    joined = Joined([SinglePass(files(20)), memory(5, 100)])
    assert sum(map(len, joined.batches(8))) == 25
    with pytest.raises(DataError, match="single-pass"):
        list(joined.batches(8))


def test_joined_label_matrices_are_as_wide_as_the_widest() -> None:
    x = {"x": torch.zeros(1)}
    joined = Joined([ArrayDataset(x, torch.tensor([[1]])), ArrayDataset(x, torch.tensor([[0, 1]]))])
    read = joined[torch.tensor([1, 0])].target
    assert joined.targets.tolist() == [[1, -1], [0, 1]] and read is not None and read.tolist() == [[0, 1], [1, -1]]
