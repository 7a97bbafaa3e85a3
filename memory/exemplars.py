"""Exemplars: samples kept from earlier tasks under a budget, one column per field of a batch; raw, as features, or both."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy, Slots
from streamcl.data import ArrayDataset, MapDataset
from streamcl.errors import ConfigError, DataError
from streamcl.seeding import generator
from streamcl.stream import Batch, Column, Dataset, level

from .columns import MORE_COLUMNS, ONE_COLUMN, aligned, columns, overwrite, row_size, size
from .disk import Disk

Unit = Literal["samples", "per_class", "bytes"]
Store = Literal["raw", "features", "both", "none"]


class Share:
    """A part of the memory that one streaming policy fills: all of it, or that of one class where the budget is one per class."""

    def __init__(self, policy: SelectionPolicy, rows: list[int] | None = None) -> None:
        self.policy, self.slots = policy, Slots()
        self.rows = rows  # the row of each slot; None where they are the same


class Exemplars:
    """A streaming policy writes offered samples into slots; a ranking policy keeps, of each group, an ordered list of which a smaller
    share is a prefix. The budget is a number of samples, of samples per class, or of bytes: then as many samples are held as would fit
    if each were as large as the largest one seen.
    """

    def __init__(
        self,
        budget: int,
        policy: SelectionPolicy,
        seed: int = 0,
        *,
        unit: Unit = "samples",
        store: Store = "raw",
        disk: Disk | None = None,
    ) -> None:
        self.budget = 0 if store == "none" else budget
        self.policy, self.unit, self.streaming = policy, unit, policy.streaming
        self.store: str = store
        self.needs = tuple({*policy.needs, *(("features",) if store in ("features", "both") else ())})
        self.disk = disk  # inputs and features lie there, each under the key in `aside`
        self.generator = generator(seed, "exemplars")
        self.task = 0  # the task that is being learned
        self.largest = 0  # bytes of the largest sample seen, where the budget is in bytes
        self.empty()

    def empty(self) -> None:
        self.held: Batch | None = None  # every sample held, on the host (without what is on disk of it)
        self.aside: dict[str, Tensor] = {}  # what the memory notes of each: `arrived` (the task), `groups`, `scores`, `keys`
        self.row_of: dict[int, int] = {}  # id -> row
        self.id_of: list[int] = []
        self.plain = False  # nothing but tensors and labels is held
        self.shares: dict[int, Share] = {} if self.unit == "per_class" else {0: Share(self.policy)}

    def __len__(self) -> int:
        return 0 if self.held is None else len(self.held)

    # -- offering ---------------------------------------------------------------------------------------------------------------

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
        self._check(samples.ids, features, scores)
        if self.streaming:
            start = 0
            for part in [samples] if isinstance(samples, Batch) else samples.batches(256):
                end = start + len(part)
                mine = ids if part is samples else part.ids.tolist()
                self._offer(
                    part, mine, group, None if features is None else features[start:end], None if scores is None else scores[start:end]
                )
                start = end
        else:
            self._rank(samples, labels.cpu(), group, features, scores)

    def _check(self, ids: Tensor, features: Tensor | None, scores: Tensor | None) -> None:
        policy, needs = type(self.policy).__name__.lower(), self.policy.needs
        if self.store in ("features", "both") and features is None:
            raise DataError(f"memory.store is {self.store}, and samples were offered without their features")
        for name, given in (("features", features), ("scores", scores)):
            if given is None:
                if missing := [n for n in needs if n == name or (n == "logits" and name == "scores")]:
                    raise DataError(f"the selection policy {policy} goes by {missing[0]}, and none were given")
                continue
            if len(given) != len(ids):
                raise DataError(f"{len(ids)} samples were offered with {len(given)} {name}")
            if name == "scores" or name in needs or self.store != "raw":
                bad = ~torch.isfinite(given).flatten(1).all(dim=1) if given.dim() > 1 else ~torch.isfinite(given)
                if bool(bad.any()):
                    shown = ids[bad.cpu()][:5].tolist()
                    raise DataError(f"{int(bad.sum())} samples were offered with {name} that are NaN or infinite (ids {shown})")

    def _kept(self, batch: Batch, features: Tensor | None) -> Batch:
        """What may be kept of samples."""
        batch = batch.to("cpu")
        if self.store == "raw" or features is None:
            return batch
        values = features.detach().to("cpu", torch.float32)
        return batch.replace(inputs={} if self.store == "features" else batch.inputs, extra={**batch.extra, "features": values})

    def _noted(self, scores: Tensor | None, count: int) -> Tensor:
        """The number that is noted of each sample; NaN where none was offered."""
        if scores is None:
            return torch.full((count,), torch.nan, dtype=torch.float64)
        return self.policy.score(scores.detach()).to("cpu", torch.float64, copy=True)

    def _groups(self, labels: Tensor, group: int | None) -> Tensor:
        if group is not None:
            return labels.new_full((len(labels),), group, dtype=torch.int64)
        if labels.dim() != 1:
            raise DataError("the budget is shared out among classes, and these samples have several labels each: name their group")
        return labels

    # -- streaming --------------------------------------------------------------------------------------------------------------

    def _offer(self, batch: Batch, ids: list[int], group: int | None, features: Tensor | None, scores: Tensor | None) -> None:
        assert batch.target is not None
        if group is not None and "groups" not in self.aside and self.held is not None and self.held.target is not None:
            self.aside["groups"] = self._groups(self.held.target, None).clone()
        by_group = self.policy.by_group or self.unit == "per_class" or group is not None or "groups" in self.aside
        groups = self._groups(batch.target.cpu(), group) if by_group else batch.target
        if self.policy.scored or scores is not None or "scores" in self.aside:
            scores = self._noted(scores, len(ids))
        if self.unit == "bytes":
            self._measure(self._kept(batch, features))
        if self.unit != "per_class":
            places = self._place(self.shares[0], groups, scores).tolist()
        else:
            places = [-1] * len(ids)
            self._change_class(batch.ids, groups)
            end = len(self)  # rows that are there, or promised to a class before
            for label in groups.unique().tolist():
                share = self.shares.setdefault(label, Share(copy.deepcopy(self.policy), []))
                rows = (groups == label).nonzero().squeeze(1)
                mine = None if scores is None else scores[rows]
                slots = self._place(share, groups[rows], mine).tolist()
                if scores is not None and mine is not None:
                    scores[rows] = mine
                assert share.rows is not None
                for row, slot in zip(rows.tolist(), slots, strict=True):
                    if slot >= len(share.rows):
                        share.rows.append(end)
                        end += 1
                    places[row] = share.rows[slot] if slot >= 0 else -1
        self._settle(batch, ids, places, groups if by_group else None, features, scores)

    def _place(self, share: Share, groups: Tensor, scores: Tensor | None) -> Tensor:
        slots, rows = share.slots, share.rows
        slots.budget = self.budget if self.unit != "bytes" else self._capacity()
        if rows is None:
            slots.held = len(self)
            if slots.held > slots.budget:
                self._evict(share, slots.held - slots.budget)
        else:
            slots.held = len(rows)
        if share.policy.by_group and self.held is not None and self.held.target is not None:
            held = self.aside.get("groups", self.held.target)
            slots.groups = held if rows is None else held[rows]
        if "scores" in self.aside:
            slots.scores = self.aside["scores"] if rows is None else self.aside["scores"][rows]
        places = share.policy.place(groups, scores, slots, self.generator)
        slots.seen += len(groups)
        if share.policy.by_group:
            labels, counts = groups.unique(return_counts=True)
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
                slots.seen_of[label] = slots.seen_of.get(label, 0) + count
        return places

    def _settle(
        self, batch: Batch, ids: list[int], places: list[int], groups: Tensor | None, features: Tensor | None, scores: Tensor | None
    ) -> None:
        """Put samples where they were placed. Few are kept once the memory is full, so this is plain Python: the later of two samples
        in one place stays, as if they had come one by one, and a sample that came back takes its own place, with its new label and values.
        """
        held, row_of = len(self), self.row_of
        rows = {row_of.get(ids[n], place): n for n, place in enumerate(places) if place >= 0}
        if not rows:
            return
        order = sorted(rows)
        if self.policy.by_group and any(row_of.get(ids[n], place) != place for n, place in enumerate(places) if place >= 0):
            self._disturbed()
        chosen = torch.tensor([rows[place] for place in order])
        incoming = self._kept(batch[chosen], None if features is None else features[chosen.to(features.device)])
        aside = {"arrived": torch.full((len(order),), self.task, dtype=torch.int32)}
        if groups is not None and (self.policy.by_group or "groups" in self.aside or groups is not batch.target):
            aside["groups"] = groups[chosen]
        if scores is not None:
            aside["scores"] = scores[chosen]
        known = sum(place < held for place in order)
        if self.unit == "per_class" and sum(len(share.rows or ()) for share in self.shares.values()) > held + len(order) - known:
            self._renumber(order[known:], held)
        order[known:] = range(held, held + len(order) - known)
        self._write(order, known, incoming, aside)

    def _change_class(self, ids: Tensor, groups: Tensor) -> None:
        """Samples that came back under another label leave the share of the class that they were in."""
        if self.held is None or self.held.target is None:
            return
        mine, theirs = (self.held.ids[:, None] == ids.cpu()).nonzero(as_tuple=True)
        moved = mine[self.aside.get("groups", self.held.target)[mine] != groups[theirs]]
        if len(moved):
            keep = torch.ones(len(self), dtype=torch.bool)
            keep[moved] = False
            self._retain(keep)

    def _renumber(self, promised: list[int], held: int) -> None:
        """Rows that were promised to samples which took places of their own stay free: the shares' rows close up."""
        row = {place: held + n for n, place in enumerate(promised)}
        for share in self.shares.values():
            assert share.rows is not None
            share.rows = [r if r < held else row[r] for r in share.rows if r < held or r in row]
            share.slots.version += 1

    def _disturbed(self) -> None:
        for share in self.shares.values():
            share.slots.version += 1

    def _write(self, rows: list[int], known: int, incoming: Batch, aside: dict[str, Tensor]) -> None:
        """The first `known` rows are overwritten, the others are appended."""
        if self.disk is not None:
            incoming, aside["keys"] = self.disk.store(incoming)
            if known:
                self.disk.drop(self.aside["keys"][rows[:known]])
        if self.held is None:
            self.held, self.aside = incoming, aside
        else:
            self.held, incoming = aligned(self.held, incoming)
            for name in self.aside.keys() | aside.keys():
                if name not in self.aside:
                    self.aside[name] = _missing(name, len(self), self.held)
                if name not in aside:
                    aside[name] = _missing(name, len(rows), incoming)
            if known:
                index = torch.tensor(rows[:known])
                overwrite(self.held, index, incoming if known == len(rows) else incoming[:known])
                for name, column in self.aside.items():
                    column.index_copy_(0, index, aside[name][:known].to(column.dtype))
            if known < len(rows):
                self.held = Batch.cat([self.held, incoming[known:] if known else incoming])
                self.aside = {name: torch.cat([column, aside[name][known:].to(column.dtype)]) for name, column in self.aside.items()}
        self._number(rows, incoming.ids.tolist())
        self._tidy()

    def _tidy(self) -> None:
        if self.disk is not None and (numbers := self.disk.sparse()):
            self.aside["keys"] = self.disk.move(self.aside["keys"], numbers)

    def _number(self, rows: Iterable[int] | None = None, ids: Iterable[int] | None = None) -> None:
        """Keep in mind which sample lies in which row: in these rows, or in all."""
        held = self.held
        self.plain = (
            held is not None
            and not (held.extra or held.present or self.disk)
            and bool(held.inputs)
            and all(isinstance(c, Tensor) for c in held.inputs.values())
        )
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

    def _evict(self, share: Share, count: int) -> None:
        """The policy says which `count` of its samples go."""
        if share.policy.by_group and self.held is not None and self.held.target is not None:
            held = self.aside.get("groups", self.held.target)
            share.slots.groups = held if share.rows is None else held[share.rows]
        if "scores" in self.aside:
            share.slots.scores = self.aside["scores"] if share.rows is None else self.aside["scores"][share.rows]
        share.slots.held = len(self) if share.rows is None else len(share.rows)
        slots = share.policy.evict(count, share.slots, self.generator)
        rows = slots if share.rows is None else torch.tensor(share.rows)[slots]
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[rows] = False
        self._retain(keep)

    # -- budgets in bytes -------------------------------------------------------------------------------------------------------

    def _measure(self, batch: Batch) -> None:
        """Note how large the largest of these samples is."""
        fixed = sum(row_size(column) for column in columns(batch).values() if isinstance(column, Tensor))
        lists = [[len(str(value).encode()) for value in column] for column in columns(batch).values() if isinstance(column, list)]
        text = max((sum(sizes) for sizes in zip(*lists, strict=True)), default=0)
        noted = sum(row_size(_missing(name, 1, batch)) for name in ("arrived", "groups", "scores"))
        self.largest = max(self.largest, fixed + text + noted)

    def _capacity(self) -> int:
        capacity = self.budget // self.largest
        if capacity == 0:
            raise ConfigError(f"memory.exemplars is {self.budget} bytes, and one sample takes {self.largest}: give it more")
        return capacity

    # -- ranking ----------------------------------------------------------------------------------------------------------------

    def _rank(self, samples: Batch | Dataset, labels: Tensor, group: int | None, features: Tensor | None, scores: Tensor | None) -> None:
        of = self._groups(labels, group)
        values = torch.zeros(len(samples), 0) if features is None else features.detach()
        marks = None if scores is None else self.policy.score(scores.detach())
        lists = self._lists()
        fresh = of.unique().tolist()
        groups = len(lists.keys() | set(fresh))
        if self.unit == "bytes":
            self._measure(self._kept(samples[torch.tensor([0])], None if features is None else features[:1]))
        quota = self._quota(groups)
        back = torch.isin(self.held.ids, samples.ids.cpu()) if self.held is not None else torch.zeros(0, dtype=torch.bool)
        chosen: dict[int, Tensor] = {}
        for label in fresh:
            rows = (of == label).nonzero().squeeze(1)
            mine = values[rows.to(values.device)]
            own = None if marks is None else marks[rows.to(marks.device)]
            if self.policy.merges and own is not None and label in lists:
                held = lists[label]
                held = held[~back[held]]
                own = torch.cat([own, self.aside["scores"][held].to(own)])
                order = self.policy.rank(mine.new_zeros(len(own), 0), own, min(quota, len(own)), self.generator).cpu()
                chosen[label] = torch.cat([rows, -1 - held])[order]  # a row that is held already is written as -1 - row
            else:
                chosen[label] = rows[self.policy.rank(mine, own, min(quota, len(rows)), self.generator).cpu()]
        picked = torch.cat([places[places >= 0] for places in chosen.values()])
        every, noted, before = self.held, self.aside, len(self)
        if len(picked):  # else those that are held are preferred to all of these
            incoming = self._kept(samples[picked], None if features is None else features[picked.to(features.device)])
            if self.unit == "bytes":
                self._measure(incoming)
                quota = self._quota(groups)
            fresh_notes = {
                "arrived": torch.full((len(picked),), self.task, dtype=torch.int32),
                "groups": of[picked],
            }
            if marks is not None or "scores" in noted:
                fresh_notes["scores"] = self._noted(None if marks is None else marks[picked.to(marks.device)], len(picked))
            if self.disk is not None:
                incoming, fresh_notes["keys"] = self.disk.store(incoming)
            every = incoming if every is None else Batch.cat(list(aligned(every, incoming)))
            if before and "scores" in fresh_notes and "scores" not in noted:
                noted = {**noted, "scores": self._noted(None, before)}
            noted = {name: torch.cat([noted[name], column]) if before else column for name, column in fresh_notes.items()}
        assert every is not None
        place = {row: before + n for n, row in enumerate(picked.tolist())}
        kept: list[int] = []
        for label in sorted(lists.keys() | chosen.keys()):
            if label in chosen:
                rows_of = [place[row] if row >= 0 else -1 - row for row in chosen[label].tolist()]
            else:  # a sample that came back is judged anew, under the label that it has now
                rows_of = lists[label][~back[lists[label]]].tolist()
            kept += rows_of[:quota]
        index = torch.tensor(kept, dtype=torch.int64)
        if self.disk is not None:
            gone = torch.ones(len(every), dtype=torch.bool)
            gone[index] = False
            self.disk.drop(noted["keys"][gone])
        self.held, self.aside = every[index], {name: column[index] for name, column in noted.items()}
        self._number()
        self._tidy()

    def _trim(self, quota: int) -> None:
        """Each group keeps its first `quota`."""
        keep = torch.zeros(len(self), dtype=torch.bool)
        keep[torch.cat([rows[:quota] for rows in self._lists().values()])] = True
        if not bool(keep.all()):
            self._retain(keep)

    def _quota(self, groups: int) -> int:
        if self.unit == "per_class":
            return self.budget
        quota = (self.budget if self.unit == "samples" else self._capacity()) // groups
        if quota == 0:
            raise ConfigError(
                f"memory.exemplars is {self.budget}{' bytes' if self.unit == 'bytes' else ''}, less than one sample for each of the "
                f"{groups} classes"
            )
        return quota

    def _lists(self) -> dict[int, Tensor]:
        """The rows of each group, in the order of preference."""
        if self.held is None:
            return {}
        groups = self.aside["groups"]
        return {label: (groups == label).nonzero().squeeze(1) for label in groups.unique().tolist()}

    # -- reading ----------------------------------------------------------------------------------------------------------------

    def sample(self, count: int, generator: torch.Generator | None = None) -> Batch:
        self._all()
        return self._take(self._draw(count, generator))

    def join(self, batch: Batch, count: int, generator: torch.Generator | None = None) -> Batch:
        held, rows = self._all(), self._draw(count, generator)
        new = len(batch) if batch.new is None else batch.new
        labels = batch.target
        if self.plain and labels is not None and labels.dim() == 1 and batch.present is None and batch.task is None and not batch.extra:
            inputs, cat = held.inputs, torch.cat  # the same without the batch in between: this is the hot path of replay
            joined: dict[str, Column] = {name: cat((values, inputs[name].index_select(0, rows))) for name, values in batch.inputs.items()}  # type: ignore[arg-type, union-attr]
            target, ids = cat((labels, held.target.index_select(0, rows))), cat((batch.ids, held.ids.index_select(0, rows)))  # type: ignore[union-attr]
            return Batch(joined, target, ids, new=new)
        if self.store == "features":
            raise DataError("memory.store is features: its samples have no raw inputs that could join a batch")
        return Batch.cat([batch, self._take(rows)]).replace(new=new)

    def _take(self, rows: Tensor) -> Batch:
        batch = self._all()[rows]
        return batch if self.disk is None else self.disk.joined(batch, self.aside["keys"][rows])

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

    def dataset(self) -> Dataset:
        held = self._all()
        if self.disk is not None:
            return OnDisk(held[:], self.aside["keys"].clone(), self.disk)
        if self.streaming or held.extra:  # else it is only ever replaced as a whole
            held = held[:]
        assert held.target is not None
        return ArrayDataset(held.inputs, held.target, held.ids, held.present, held.extra)

    def of(self, label: int) -> Batch:
        target = self._all().target
        assert target is not None
        if target.dim() == 1:
            return self._take((target == label).nonzero().squeeze(1))
        return self._take((target[:, label] == 1).nonzero().squeeze(1) if label < target.shape[1] else torch.zeros(0, dtype=torch.int64))

    def classes(self) -> dict[int, int]:
        if self.held is None or self.held.target is None:
            return {}
        if self.held.target.dim() > 1:  # several labels each: a sample counts for every one of them
            return {label: count for label, count in enumerate((self.held.target == 1).sum(dim=0).tolist()) if count}
        labels, counts = self.held.target.unique(return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))

    # -- changing ---------------------------------------------------------------------------------------------------------------

    def replace(self, ids: Tensor, **columns: Tensor) -> None:
        if self.held is None:
            return
        pairs = [(self.row_of[i], n) for n, i in enumerate(ids.tolist()) if i in self.row_of]
        if not pairs:
            return
        rows, source = (torch.tensor(column) for column in zip(*pairs, strict=True))
        for name, values in columns.items():
            if name == "scores":
                self.aside.setdefault("scores", torch.full((len(self),), torch.nan, dtype=torch.float64))
                self.aside["scores"][rows] = values.detach().cpu().double()[source]
                continue
            column = self.held.extra.get(name)
            if not isinstance(column, Tensor):
                raise DataError(f"the exemplars carry no column {name!r}")
            column, fresh = level([column, values.detach().to("cpu", column.dtype)])
            self.held.extra[name] = column.index_copy_(0, rows, fresh.index_select(0, source))

    def remove(self, ids: Tensor) -> int:
        if self.held is None:
            return 0
        keep = ~torch.isin(self.held.ids, ids.cpu())
        gone = int((~keep).sum())
        if gone:
            self._retain(keep, erase=True)
        return gone

    def _retain(self, keep: Tensor, erase: bool = False) -> None:
        """Let all other rows go; with `erase` nothing of them stays on disk either."""
        held, rows = self._all(), keep.nonzero().squeeze(1)
        if self.disk is not None:
            gone = self.aside["keys"][~keep]
            numbers = (gone >> 32).unique().tolist() if erase else []
            kept = self.aside["keys"][rows]
            self.disk.drop(gone)
            self.aside["keys"] = self.aside["keys"].clone()
            self.aside["keys"][rows] = self.disk.move(kept, numbers) if numbers else kept
        where = {row: n for n, row in enumerate(rows.tolist())}
        for share in self.shares.values():
            share.slots.version += 1
            if share.rows is not None:
                share.rows = [where[row] for row in share.rows if row in where]
        self.held = held[rows] if len(rows) else None
        self.aside = {name: column[rows] for name, column in self.aside.items()} if len(rows) else {}
        self._number()
        self._tidy()

    def resize(self, budget: int) -> None:
        self.budget = 0 if self.store == "none" else budget
        if self.budget == 0:
            self._retain(torch.zeros(len(self), dtype=torch.bool)) if self.held is not None else None
        elif self.held is not None and not self.streaming:
            self._trim(self._quota(len(self._lists())))
        elif self.held is not None:
            for share in self.shares.values():
                most = self.budget if self.unit != "bytes" else self._capacity()
                share.slots.budget = most
                over = (len(self) if share.rows is None else len(share.rows)) - most
                if over > 0:
                    self._evict(share, over)

    # -- the record -------------------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What is in it, and what that takes."""
        held, classes = self.held, self.classes()
        arrived = {} if held is None else dict(zip(*(t.tolist() for t in self.aside["arrived"].unique(return_counts=True)), strict=True))
        return {
            "policy": type(self.policy).__name__.lower(),
            "budget": self.budget,
            "unit": self.unit,
            "store": self.store,
            "samples": len(self),
            "bytes": self.nbytes(),
            "bytes_on_disk": 0 if self.disk is None else self.disk.on_disk(),
            "classes": classes,
            "tasks": arrived,
        }

    def bytes_of(self) -> Tensor:
        """The bytes of each sample  # (held,)"""
        if self.held is None:
            return torch.zeros(0, dtype=torch.int64)
        sizes = torch.zeros(len(self), dtype=torch.int64)
        for column in columns(self._take(torch.arange(len(self))) if self.disk is not None else self.held).values():
            sizes += row_size(column) if isinstance(column, Tensor) else torch.tensor([len(str(value).encode()) for value in column])
        return sizes

    def nbytes(self) -> int:
        if self.held is None:
            return 0
        return sum(size(column) for column in [*columns(self.held).values(), *self.aside.values()]) + (
            0 if self.disk is None else self.disk.nbytes()
        )

    def state(self) -> dict[str, Any]:
        held = self.held
        fields = None if held is None else {name: getattr(held, name) for name in (*ONE_COLUMN, *MORE_COLUMNS)}
        return {
            "generator": self.generator.get_state(),
            "held": fields,
            "aside": self.aside,
            "budget": self.budget,
            "largest": self.largest,
            "disk": None if self.disk is None else self.disk.state(),
            "shares": [
                [label, share.slots.seen, dict(share.slots.seen_of), share.rows, share.policy.state()]
                for label, share in self.shares.items()
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.empty()
        self.generator.set_state(state["generator"])
        self.held = None if state["held"] is None else Batch(**state["held"])
        self.aside = dict(state["aside"])
        self.budget, self.largest = int(state["budget"]), int(state["largest"])
        if (self.disk is None) != (state["disk"] is None):
            raise ValueError(
                "the exemplars were kept " + ("in memory" if state["disk"] is None else "on disk") + ": memory.disk has changed"
            )
        if self.disk is not None:
            self.disk.restore(state["disk"], self.aside.get("keys", torch.zeros(0, dtype=torch.int64)))
        for label, seen, seen_of, rows, inner in state["shares"]:
            share = self.shares.setdefault(label, Share(copy.deepcopy(self.policy), []))
            share.slots.seen, share.slots.seen_of, share.slots.version = seen, dict(seen_of), share.slots.version + 1
            share.rows = None if rows is None else list(rows)
            share.policy.restore(inner)
        self._number()


class OnDisk(MapDataset):
    """Exemplars whose inputs are on disk, as they were when this was made; a batch is read when it is asked for."""

    def __init__(self, held: Batch, keys: Tensor, disk: Disk) -> None:
        assert held.target is not None
        self.held, self.keys, self.disk = held, keys, disk
        self.targets, self.ids = held.target, held.ids

    def __getitem__(self, indices: Tensor) -> Batch:
        return self.disk.joined(self.held[indices], self.keys[indices])


def _missing(name: str, count: int, batch: Batch) -> Tensor:
    """What is noted of samples of which nothing was said."""
    if name == "groups":
        return torch.zeros(count, dtype=torch.int64) if batch.target is None or batch.target.dim() > 1 else batch.target[:count].clone()
    if name == "scores":
        return torch.full((count,), torch.nan, dtype=torch.float64)
    return torch.zeros(count, dtype=torch.int32)
