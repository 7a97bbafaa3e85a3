"""Batches that are joined and data sets that are read as one: nothing is lost, and the order is the caller's."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcl.data import ArrayDataset, FileDataset, Joined, Masked, SinglePass, Subset, Told, Unlabelled, blanked, relabelled
from streamcl.errors import DataError
from streamcl.stream import Batch, Dataset

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


# -- views


def shown(dataset: Dataset) -> Batch:
    """A view as one batch, the same by index and by small batches in any order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(len(dataset)))
    read = Batch.cat(list(dataset.read(order, 3)))[order.argsort()]
    for size in (1, 4, 1000):
        assert exact(Batch.cat(list(dataset.batches(size)))) == exact(read)
    assert exact(dataset[torch.arange(len(dataset))]) == exact(read)
    assert read.ids.tolist() == dataset.ids.tolist()
    return read


def exact(batch: Batch) -> Any:
    def plain(column: Any) -> Any:
        return (column.dtype, tuple(column.shape), column.numpy().tobytes()) if isinstance(column, Tensor) else column

    parts = (batch.inputs, batch.present or {}, batch.extra, {"target": batch.target, "ids": batch.ids, "task": batch.task})
    return [{name: plain(column) for name, column in part.items()} for part in parts]


def mixed(rows: list[int]) -> dict[str, Any]:
    index = torch.tensor(rows, dtype=torch.int64)
    return {"number": index[:, None].float() + 1, "count": (index + 1).to(torch.uint8), "text": [f"row {row}" for row in rows]}


def source(kind: str, count: int = 10, present: dict[str, Tensor] | None = None) -> ArrayDataset | FileDataset:
    targets, ids = torch.arange(count) % 3, torch.arange(count) + 100
    if kind == "memory":
        return ArrayDataset(mixed(list(range(count))), targets, ids, present, extra={"rank": torch.arange(count)})
    return FileDataset(mixed, targets, ids, int(kind), extra={"rank": torch.arange(count)}, present=present)


KINDS = pytest.mark.parametrize("kind", ["memory", "0", "2"])


@KINDS
def test_nothing_can_be_read_of_what_is_masked(kind: str) -> None:
    there = torch.arange(10) % 3 != 1
    batch = shown(Masked(source(kind), {"number": there, "count": ~there, "text": there}))
    assert batch.present is not None and batch.present["number"].tolist() == there.tolist()
    number, count = batch.inputs["number"], batch.inputs["count"]
    assert isinstance(number, Tensor) and isinstance(count, Tensor)
    assert number[~there].isnan().all() and number[there, 0].tolist() == (torch.arange(10)[there] + 1).tolist()
    assert count.dtype == torch.uint8 and not count[there].any() and (count[~there] > 0).all()
    assert batch.inputs["text"] == [f"row {row}" if here else "" for row, here in enumerate(there.tolist())]
    assert batch.extra["rank"].tolist() == list(range(10)) and batch.target is not None  # type: ignore[union-attr]


@KINDS
def test_masking_leaves_the_data_set_itself_as_it_was(kind: str) -> None:
    data = source(kind)
    before = exact(shown(data))
    shown(Masked(data, {"number": torch.zeros(10, dtype=torch.bool)}))
    assert exact(shown(data)) == before


@KINDS
def test_masks_add_up_with_those_of_the_data_set_and_of_a_view_below(kind: str) -> None:
    own, first, second = torch.arange(10) < 8, torch.arange(10) % 2 == 0, torch.arange(10) > 1
    view = Masked(Masked(source(kind, present={"number": own, "text": own}), {"number": first}), {"number": second})
    batch = shown(view)
    assert batch.present is not None and batch.present["number"].tolist() == (own & first & second).tolist()
    assert batch.present["text"].tolist() == own.tolist() and batch.inputs["text"] == [f"row {row}" for row in range(8)] + ["", ""]
    number = batch.inputs["number"]
    assert isinstance(number, Tensor) and torch.equal(number.isnan()[:, 0], ~(own & first & second))
    part = shown(Subset(view, torch.tensor([4, 9, 2, 3])))
    assert part.present is not None and part.present["number"].tolist() == [True, False, True, False]
    outer = shown(Masked(Subset(source(kind), torch.tensor([4, 9, 2, 3])), {"number": torch.tensor([False, True, True, True])}))
    assert outer.present is not None and outer.ids[~outer.present["number"]].tolist() == [104]


def test_blanked_returns_a_column_that_lacks_nothing_as_it_is() -> None:
    column = torch.arange(3)
    assert blanked(column, None) is column and blanked(column, torch.ones(3, dtype=torch.bool)) is column
    assert blanked(torch.ones(2, 2, 2), torch.tensor([False, True])).isnan().tolist() == [[[True] * 2] * 2, [[False] * 2] * 2]  # type: ignore[union-attr]


@KINDS
def test_a_task_is_told_and_targets_are_withheld(kind: str) -> None:
    told = shown(Told(Subset(source(kind), torch.tensor([3, 1, 8, 5])), 7))
    assert told.task is not None and told.task.tolist() == [7] * 4 and told.task.dtype == torch.int64
    assert told.ids.tolist() == [103, 101, 108, 105] and told.target is not None and told.target.tolist() == [0, 1, 2, 2]
    served = Unlabelled(Told(source(kind), 1))
    blind = shown(served)
    assert blind.target is None and blind.inputs["text"] == [f"row {row}" for row in range(10)] and not hasattr(served, "targets")


@KINDS
def test_a_view_may_have_targets_of_its_own(kind: str) -> None:
    rows = torch.tensor([9, 0, 4])
    own = torch.tensor([[1, -1], [0, 1], [-1, 0]], dtype=torch.int8)
    view = Subset(source(kind), rows, targets=own)
    batch = shown(view)
    assert batch.target is not None and torch.equal(batch.target, own) and torch.equal(view.targets, own)
    inner = shown(Subset(view, torch.tensor([2, 0])))
    assert inner.target is not None and inner.target.tolist() == [[-1, 0], [1, -1]] and inner.ids.tolist() == [104, 109]
    renamed = shown(Subset(source(kind), rows, torch.tensor([5, 6, 7])))
    assert renamed.target is not None and renamed.target.tolist() == [5, 5, 6]
    kept = shown(Subset(Subset(source(kind), rows, torch.tensor([2, 0, 1])), torch.tensor([2, 1]), torch.tensor([10, 11, 12])))
    assert kept.target is not None and kept.target.tolist() == [10, 12], "row 4 is class 1, first 0 and then 10; row 0 class 0, 2 and 12"


def test_classes_columns_and_masks_are_renumbered_each_in_its_way() -> None:
    assert relabelled(torch.tensor([0, 2, 1]), torch.tensor([4, -1, 7])).tolist() == [4, 7, -1]
    labels = torch.tensor([[1, 0, -1], [0, 1, 1]], dtype=torch.int8)
    columns = relabelled(labels, torch.tensor([2, -1, 0, 0]))
    assert columns.dtype == torch.int8 and columns.tolist() == [[-1, -1, 1, 1], [1, -1, 0, 0]]
    mask = torch.tensor([[[0, 1], [255, 2]]], dtype=torch.uint8)
    classes = relabelled(mask, torch.tensor([3, -1, 0]))
    assert classes.dtype == torch.uint8 and classes.tolist() == [[[3, 255], [255, 0]]], "what is left out is not annotated"


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="number has 2 rows and the targets have 3"):
        ArrayDataset({"number": torch.zeros(3)}, torch.zeros(3, dtype=torch.int64), present={"number": torch.ones(2, dtype=torch.bool)})
