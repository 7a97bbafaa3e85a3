"""The columns of a batch that is held: what there is of each sample, how large it is, and how samples come to lie where others do."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.errors import DataError
from streamcl.stream import Batch, Column, level

ONE_COLUMN, MORE_COLUMNS = ("target", "ids", "task"), ("inputs", "present", "extra")  # the fields of a batch that is held


def columns(batch: Batch) -> dict[tuple[str, ...], Column]:
    """All that there is of each sample."""
    single = {(name,): getattr(batch, name) for name in ONE_COLUMN if getattr(batch, name) is not None}
    return single | {(field, name): column for field in MORE_COLUMNS for name, column in (getattr(batch, field) or {}).items()}


class Growing:
    """A column that is appended to: `view` is what it holds. A tensor lies in a larger one: each row is copied a few times at most."""

    def __init__(self, column: Column | None = None) -> None:
        self.view: Column = [] if column is None else column
        self.room: Tensor | None = None
        self.begun = column is not None

    def append(self, fresh: Column) -> None:
        if not self.begun:
            self.view, self.begun = fresh[:0] if isinstance(fresh, Tensor) else [], True
        if isinstance(self.view, list):
            assert isinstance(fresh, list)
            self.view.extend(fresh)
            return
        assert isinstance(fresh, Tensor)
        count = len(self.view)
        if self.room is None or len(self.room) < count + len(fresh) or self.room.data_ptr() != self.view.data_ptr():
            self.room = self.view.new_empty((max(count + len(fresh), 2 * count), *self.view.shape[1:]))
            self.room[:count] = self.view
        self.room[count : count + len(fresh)] = fresh
        self.view = self.room[: count + len(fresh)]


def size(column: Column) -> int:
    if isinstance(column, Tensor):
        return column.numel() * column.element_size()
    return sum(len(str(value).encode(errors="surrogatepass")) for value in column)


def row_size(column: Column) -> int:
    assert isinstance(column, Tensor)
    return column[:1].numel() * column.element_size()


def sizes_of(batch: Batch) -> Tensor:
    """The bytes of each sample  # (batch,)"""
    sizes = torch.zeros(len(batch), dtype=torch.int64)
    for column in columns(batch).values():
        sizes += row_size(column) if isinstance(column, Tensor) else torch.tensor([size([value]) for value in column], dtype=torch.int64)
    return sizes


def aligned(held: Batch, incoming: Batch, on_disk: bool = False) -> tuple[Batch, Batch]:
    """Both with the same columns, equally wide, so that each can lie where the other does; inputs and features that lie on disk aside."""
    forms = [(b.extra.keys() - {"features"}, set() if on_disk else b.inputs.keys(), b.task is None) for b in (incoming, held)]
    if forms[0] != forms[1]:
        given, known = (", ".join([*b.inputs, *b.extra, *([] if b.task is None else ["task"])]) for b in (incoming, held))
        raise DataError(f"the samples offered have {given}, and those held have {known}")
    if held.present is not None or incoming.present is not None:
        names = (held.present or {}).keys() | (incoming.present or {}).keys()
        held, incoming = (
            b.replace(present={name: (b.present or {}).get(name, torch.ones_like(b.ids, dtype=torch.bool)) for name in sorted(names)})
            for b in (held, incoming)
        )
    assert held.target is not None and incoming.target is not None
    held.target, incoming.target = level([held.target, incoming.target])
    incoming = incoming.replace(extra=dict(incoming.extra))
    for name, column in held.extra.items():
        fresh = incoming.extra[name]
        if isinstance(column, Tensor) and isinstance(fresh, Tensor) and name != "features":
            held.extra[name], incoming.extra[name] = level([column, fresh])
    return held, incoming


def overwrite(held: Batch, slots: Tensor, incoming: Batch) -> None:
    fresh = columns(incoming)
    for name, column in columns(held).items():
        values = fresh[name]
        if isinstance(column, Tensor) and isinstance(values, Tensor):
            column.index_copy_(0, slots, values)
        else:
            assert isinstance(column, list)
            for slot, value in zip(slots.tolist(), values, strict=True):
                column[slot] = value
