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


def size(column: Column) -> int:
    if isinstance(column, Tensor):
        return column.numel() * column.element_size()
    return sum(len(str(value).encode()) for value in column)


def row_size(column: Column) -> int:
    assert isinstance(column, Tensor)
    return column[:1].numel() * column.element_size()


def aligned(held: Batch, incoming: Batch) -> tuple[Batch, Batch]:
    """Both with the same columns, equally wide, so that each can lie where the other does."""
    if (incoming.extra.keys(), incoming.inputs.keys(), incoming.task is None) != (held.extra.keys(), held.inputs.keys(), held.task is None):
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
    for name, column in held.extra.items():
        fresh = incoming.extra[name]
        if isinstance(column, Tensor) and isinstance(fresh, Tensor):
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
