"""Exemplars: samples kept from earlier tasks under a budget, raw, one column per field of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy
from streamcl.data import ArrayDataset
from streamcl.errors import ConfigError, DataError
from streamcl.seeding import generator
from streamcl.stream import Batch, Column, Dataset, level


class Exemplars:
    """A streaming policy writes offered samples into fixed slots; a ranking policy keeps, of each class, the first budget // classes
    of an ordered list, so that a smaller budget keeps a prefix of what was kept before.
    """

    def __init__(self, budget: int, policy: SelectionPolicy, seed: int = 0) -> None:
        self.budget, self.policy, self.streaming = budget, policy, policy.streaming
        self.generator = generator(seed, "exemplars")
        self.held: Batch | None = None  # every sample held, on the host
        self.seen = 0
        self.row_of: dict[int, int] = {}  # id -> row
        self.id_of: list[int] = []
        self.plain = False  # nothing but tensors and labels is held

    def __len__(self) -> int:
        return 0 if self.held is None else len(self.held)

    def add(self, samples: Batch | Dataset, group: int | None = None, features: Tensor | None = None, scores: Tensor | None = None) -> None:
        if self.budget == 0 or len(samples) == 0:
            return
        labels = samples.target if isinstance(samples, Batch) else samples.targets
        if labels is None:
            raise DataError("samples without labels were offered to the exemplar memory")
        ids = samples.ids.tolist()
        if len(set(ids)) < len(ids):
            distinct, counts = samples.ids.unique(return_counts=True)
            raise DataError(f"one call offers a sample twice: id {int(distinct[counts > 1][0])}")
        if self.policy.streaming:
            for part in [samples] if isinstance(samples, Batch) else samples.batches(256):
                self._place(part, part.ids.tolist() if part is not samples else ids)
        else:
            self._rank(samples, labels.cpu(), features)

    def _place(self, batch: Batch, ids: list[int]) -> None:
        held = len(self)
        assert batch.target is not None
        slots = self.policy.place(self.seen, held, self.budget, batch.target, self.generator).tolist()
        self.seen += len(ids)
        # Few are kept once the memory is full, so this is plain Python: the later of two samples in one slot stays, as if they had
        # come one by one, and a sample that came back takes its own place, with its new label and values.
        rows = {self.row_of.get(ids[row], slot): row for row, slot in enumerate(slots) if slot >= 0}
        if not rows:
            return
        order = sorted(rows)
        incoming = batch[[rows[slot] for slot in order]].to("cpu")
        if self.held is None:
            self.held = incoming
        else:
            self.held, incoming = _aligned(self.held, incoming)
            known = sum(slot < held for slot in order)
            if known:
                _overwrite(self.held, torch.tensor(order[:known]), incoming if known == len(order) else incoming[:known])
            if known < len(order):
                self.held = Batch.cat([self.held, incoming[known:] if known else incoming])
            order[known:] = range(held, held + len(order) - known)
        self._number(order, incoming.ids.tolist())

    def _number(self, rows: Iterable[int] | None = None, ids: Iterable[int] | None = None) -> None:
        """Keep in mind which sample lies in which row: in these rows, or in all."""
        held = self.held
        self.plain = held is not None and not (held.extra or held.present) and all(isinstance(c, Tensor) for c in held.inputs.values())
        if rows is None or ids is None or not self.row_of or held is None:
            self.id_of = [] if held is None else held.ids.tolist()
            self.row_of = {i: row for row, i in enumerate(self.id_of)}
            return
        for row, i in zip(rows, ids, strict=True):
            if row < len(self.id_of):
                self.row_of.pop(self.id_of[row], None)
                self.id_of[row] = i
            else:
                self.id_of.append(i)
            self.row_of[i] = row

    def _rank(self, samples: Batch | Dataset, labels: Tensor, features: Tensor | None) -> None:
        if features is None and self.policy.needs_features:
            raise DataError(f"the selection policy {type(self.policy).__name__.lower()} ranks features, and none were given")
        values = torch.zeros(len(samples), 1) if features is None else features.detach().cpu()
        groups = self._by_class()
        fresh = labels.unique().tolist()
        classes = len(groups.keys() | set(fresh))
        quota = self.budget // classes
        if quota == 0:
            raise ConfigError(f"memory.exemplars is {self.budget}, less than one sample for each of the {classes} classes")
        for label in fresh:
            rows = (labels == label).nonzero().squeeze(1)
            order = self.policy.rank(values[rows], min(quota, len(rows)), self.generator)
            groups[label] = samples[rows[order]].to("cpu")
        self.held = Batch.cat([group[:quota] for _, group in sorted(groups.items())])
        self._number()

    def _by_class(self) -> dict[int, Batch]:
        if self.held is None:
            return {}
        assert self.held.target is not None
        return {label: self.of(label) for label in self.held.target.unique().tolist()}

    def sample(self, count: int, generator: torch.Generator | None = None) -> Batch:
        return self._all()[self._draw(count, generator)]

    def join(self, batch: Batch, count: int, generator: torch.Generator | None = None) -> Batch:
        held, rows = self._all(), self._draw(count, generator)
        new = len(batch) if batch.new is None else batch.new
        labels = batch.target
        if self.plain and labels is not None and labels.dim() == 1 and batch.present is None and batch.task is None and not batch.extra:
            inputs, cat = held.inputs, torch.cat  # the same without the batch in between: this is the hot path of replay
            joined: dict[str, Column] = {name: cat((values, inputs[name].index_select(0, rows))) for name, values in batch.inputs.items()}  # type: ignore[arg-type, union-attr]
            target, ids = cat((labels, held.target.index_select(0, rows))), cat((batch.ids, held.ids.index_select(0, rows)))  # type: ignore[union-attr]
            return Batch(joined, target, ids, new=new)
        return Batch.cat([batch, held[rows]]).replace(new=new)

    def _all(self) -> Batch:
        if self.held is None:
            raise DataError("the exemplar memory is empty")
        return self.held

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        held = len(self)
        chosen = torch.randperm(held, generator=generator)
        if count < held:
            return chosen[:count]
        return chosen if count == held else torch.cat([chosen, torch.randint(held, (count - held,), generator=generator)])

    def dataset(self) -> ArrayDataset:
        held = self._all()
        if self.policy.streaming or held.extra:  # else it is only ever replaced as a whole
            held = held[:]
        assert held.target is not None
        return ArrayDataset(held.inputs, held.target, held.ids, held.present, held.extra)

    def of(self, label: int) -> Batch:
        if self.held is None or self.held.target is None:
            raise DataError("the exemplar memory is empty")
        return self.held[(self.held.target == label).nonzero().squeeze(1)]

    def replace(self, ids: Tensor, **columns: Tensor) -> None:
        if self.held is None:
            return
        pairs = [(self.row_of[i], n) for n, i in enumerate(ids.tolist()) if i in self.row_of]
        if not pairs:
            return
        rows, source = (torch.tensor(column) for column in zip(*pairs, strict=True))
        for name, values in columns.items():
            column = self.held.extra.get(name)
            if not isinstance(column, Tensor):
                raise DataError(f"the exemplars carry no column {name!r}")
            column, fresh = level([column, values.detach().to("cpu", column.dtype)])
            self.held.extra[name] = column.index_copy_(0, rows, fresh.index_select(0, source))

    def remove(self, ids: Tensor) -> int:
        if self.held is None:
            return 0
        keep = ~torch.isin(self.held.ids, ids)
        gone = int((~keep).sum())
        if gone:
            self.held = self.held[keep.nonzero().squeeze(1)] if bool(keep.any()) else None
            self._number()
        return gone

    def classes(self) -> dict[int, int]:
        if self.held is None or self.held.target is None:
            return {}
        labels, counts = self.held.target.unique(return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))

    def nbytes(self) -> int:
        if self.held is None:
            return 0
        return sum(
            column.numel() * column.element_size() if isinstance(column, Tensor) else sum(len(str(value).encode()) for value in column)
            for column in _columns(self.held).values()
        )

    def state(self) -> dict[str, Any]:
        held = self.held
        fields = None if held is None else {name: getattr(held, name) for name in (*ONE_COLUMN, *MORE_COLUMNS)}
        return {"seen": self.seen, "generator": self.generator.get_state(), "held": fields}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen = int(state["seen"])
        self.generator.set_state(state["generator"])
        self.held = None if state["held"] is None else Batch(**state["held"])
        self._number()


ONE_COLUMN, MORE_COLUMNS = ("target", "ids", "task"), ("inputs", "present", "extra")  # the fields of a batch that is held


def _columns(batch: Batch) -> dict[tuple[str, ...], Column]:
    """All that there is of each sample."""
    single = {(name,): getattr(batch, name) for name in ONE_COLUMN if getattr(batch, name) is not None}
    return single | {(field, name): column for field in MORE_COLUMNS for name, column in (getattr(batch, field) or {}).items()}


def _aligned(held: Batch, incoming: Batch) -> tuple[Batch, Batch]:
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


def _overwrite(held: Batch, slots: Tensor, incoming: Batch) -> None:
    fresh = _columns(incoming)
    for name, column in _columns(held).items():
        values = fresh[name]
        if isinstance(column, Tensor) and isinstance(values, Tensor):
            column.index_copy_(0, slots, values)
        else:
            assert isinstance(column, list)
            for slot, value in zip(slots.tolist(), values, strict=True):
                column[slot] = value
