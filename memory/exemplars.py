"""Exemplars: samples kept from earlier tasks under a budget, one column per field of a batch; raw, as features, or both."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy, Slots
from streamcl.data import ArrayDataset, MapDataset
from streamcl.errors import ConfigError, DataError
from streamcl.seeding import generator
from streamcl.stream import Batch, Column, Dataset, level

from .columns import MORE_COLUMNS, ONE_COLUMN, Growing, aligned, columns, overwrite, row_size, size, sizes_of
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
    share is a prefix. The budget is a number of samples, of samples per class, or of bytes. A held sample that is offered again stays
    where it is, with its new label and values; of several labels those that are not annotated now keep what was known.
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
        self.policy, self.streaming = policy, policy.streaming
        self.unit: str = unit
        self.store: str = store
        self.marks = policy.scored or policy.merges  # whether it goes by a score that is kept with each sample
        self.needs = tuple({*policy.needs, *(("features",) if store in ("features", "both") else ())})
        self.disk = disk  # inputs and features lie there, each under the key in `aside`
        self.generator = generator(seed, "exemplars")
        self.task = 0  # the task that is being learned
        self.configured = [budget, unit, store, type(policy).__name__.lower(), "disk" if disk is not None else "memory"]
        self.offered = [0, 0]  # bytes and number of the samples seen, where the budget is in bytes
        self.too_large = 0  # samples that alone are larger than it
        self.form: dict[str, list[Any]] = {}  # of the inputs and features: the type and the shape of one sample's
        self.empty()

    def empty(self) -> None:
        self.held: Batch | None = None  # every sample held, on the host (without what is on disk of it)
        self.aside: dict[str, Tensor] = {}  # what the memory notes of each: `arrived` (the task), `groups`, `scores`, `sizes`, `keys`
        self.row_of: dict[int, int] = {}  # id -> row
        self.id_of: list[int] = []
        self.plain = False  # nothing but tensors and labels is held
        self.columns: dict[tuple[str, ...], Growing] = {}  # what the columns of `held` and `aside` are the beginnings of
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
        if labels.is_floating_point() or (labels.dim() == 1 and bool((labels < 0).any())):
            raise DataError("samples were offered with labels that are no class: whole numbers from 0 are wanted")
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

    def _check_form(self, inputs: Mapping[str, Column], features: Tensor | None, ids: Tensor) -> None:
        """All samples are of one form, whatever is kept of them."""
        given: dict[str, Column] = {} if self.store == "features" else dict(inputs)
        if self.store != "raw" and features is not None:
            given["features"] = features
        form: dict[str, list[Any]] = {
            name: [str(column.dtype).removeprefix("torch."), list(column.shape[1:])] if isinstance(column, Tensor) else ["list", []]
            for name, column in given.items()
        }
        if "features" in form:
            form["features"][0] = "float32"  # as it is stored
        if not self.form or self.held is None:
            self.form = form
        for name in form if form != self.form and form.keys() == self.form.keys() else ():
            if form[name] != self.form[name]:
                now, before = (f"{kind} {shape}" if kind != "list" else "a list" for kind, shape in (form[name], self.form[name]))
                raise DataError(f"samples were offered (id {int(ids[0])}) whose {name} is {now}, and those held have {before}")
        if form.keys() != self.form.keys():
            raise DataError(f"the samples offered have {', '.join(form) or 'no input'}, and those held have {', '.join(self.form)}")
        if self.disk is not None:
            for name, column in given.items():
                if isinstance(column, list) and not all(isinstance(value, str) for value in column):
                    raise DataError(f"{name} holds what is neither text nor a tensor: memory.disk cannot keep it, memory.disk=false can")

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
        self._check_form(batch.inputs, features, batch.ids)
        if group is not None and "groups" not in self.aside and self.held is not None and self.held.target is not None:
            self.aside["groups"] = self._groups(self.held.target, None).clone()
        by_group = self.policy.by_group or self.unit == "per_class" or group is not None or "groups" in self.aside
        groups = self._groups(batch.target.cpu(), group) if by_group else None
        scores = self._noted(scores, len(ids)) if self.marks else None
        sizes = self._sizes(self._kept(batch, features)) if self.unit == "bytes" else None
        if self.unit == "per_class" and groups is not None:
            self._change_class(batch.ids, groups)
        back = [n for n, i in enumerate(ids) if i in self.row_of]
        new = [n for n, i in enumerate(ids) if i not in self.row_of] if back else range(len(ids))
        if sizes is not None:
            large = (sizes > self.budget).nonzero().squeeze(1).tolist()
            self.too_large += len(large)
            back, new = ([n for n in rows if n not in large] for rows in (back, new))
        if back:
            places = [self.row_of[ids[n]] for n in back]
            self._settle(batch, back, places, groups, features, scores, sizes)
            for share in self.shares.values():
                share.slots.version += 1  # a sample may be of another class now
        if not new:
            return
        chosen = torch.tensor(new)
        mine = scores[chosen] if scores is not None else None
        of = groups[chosen] if groups is not None else batch.target[chosen.to(batch.target.device)] if len(new) < len(ids) else batch.target
        if sizes is not None:
            self.offered = [self.offered[0] + int(sizes[chosen].sum()), self.offered[1] + len(new)]
        if self.unit != "per_class":
            places = self._place(self.shares[0], of, mine).tolist()
        else:
            places = [-1] * len(new)
            end = len(self)  # rows that are there, or promised to a class before
            for label in of.unique().tolist():
                share = self.shares.setdefault(label, Share(copy.deepcopy(self.policy), []))
                rows = (of == label).nonzero().squeeze(1)
                marks = None if mine is None else mine[rows]
                slots = self._place(share, of[rows], marks).tolist()
                if mine is not None and marks is not None:
                    mine[rows] = marks
                assert share.rows is not None
                for row, slot in zip(rows.tolist(), slots, strict=True):
                    if slot >= len(share.rows):
                        share.rows.append(end)
                        end += 1
                    places[row] = share.rows[slot] if slot >= 0 else -1
        if scores is not None and mine is not None:
            scores[chosen] = mine
        self._settle(batch, new, places, groups, features, scores, sizes)
        self._fit()

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
        self,
        batch: Batch,
        offered: Sequence[int],
        places: list[int],
        groups: Tensor | None,
        features: Tensor | None,
        scores: Tensor | None,
        sizes: Tensor | None,
    ) -> None:
        """Put these samples of a batch where they were placed. Few are kept once the memory is full, so this is plain Python: the later
        of two samples in one place stays, as if they had come one by one.
        """
        held = len(self)
        rows = {place: n for n, place in zip(offered, places, strict=True) if place >= 0}
        if not rows:
            return
        order = sorted(rows)
        chosen = torch.tensor([rows[place] for place in order])
        incoming = self._kept(batch[chosen], None if features is None else features[chosen.to(features.device)])
        aside = {"arrived": torch.full((len(order),), self.task, dtype=torch.int32)}
        for name, noted in (("groups", groups), ("scores", scores), ("sizes", sizes)):
            if noted is not None and (name != "groups" or self.policy.by_group or name in self.aside or noted is not batch.target):
                aside[name] = noted[chosen]
        known = sum(place < held for place in order)
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

    def _write(self, rows: list[int], known: int, incoming: Batch, aside: dict[str, Tensor]) -> None:
        """The first `known` rows are overwritten, the others are appended."""
        if self.held is not None:
            self.held, incoming = self._levelled(incoming)
        if self.disk is not None:
            incoming, aside["keys"] = self.disk.store(incoming)
            if known:
                self.disk.drop(self.aside["keys"][rows[:known]])
        if self.held is None:
            self.held, self.aside = incoming, aside
        else:
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
                self._append(incoming[known:] if known else incoming, {name: column[known:] for name, column in aside.items()})
        self._number(rows, incoming.ids.tolist())
        self._tidy()

    def _levelled(self, incoming: Batch) -> tuple[Batch, Batch]:
        """What is held and what comes, equally wide; what was known of a sample's labels stays where nothing is said of them now."""
        held = self._all()
        wide = sum(row_size(column) for column in columns(held).values() if isinstance(column, Tensor))
        held, incoming = aligned(held, incoming, self.disk is not None)
        if "sizes" in self.aside:  # classes came since
            self.aside["sizes"] += sum(row_size(column) for column in columns(held).values() if isinstance(column, Tensor)) - wide
        assert held.target is not None and incoming.target is not None
        if held.target.dim() == 2 and not incoming.target.is_floating_point():
            back = [(n, self.row_of[i]) for n, i in enumerate(incoming.ids.tolist()) if i in self.row_of]
            if back:
                those, rows = (torch.tensor(column) for column in zip(*back, strict=True))
                now = incoming.target[those]
                incoming.target = incoming.target.index_copy(0, those, torch.where(now == -1, held.target[rows], now))
        return held, incoming

    def _append(self, incoming: Batch, aside: dict[str, Tensor]) -> None:
        held = self._all()
        here: dict[tuple[str, ...], Column] = {**columns(held), **{("aside", name): column for name, column in self.aside.items()}}
        fresh: dict[tuple[str, ...], Column] = {**columns(incoming), **{("aside", name): column for name, column in aside.items()}}
        for key, column in here.items():
            growing = self.columns.get(key)
            if growing is None or growing.view is not column:
                growing = self.columns[key] = Growing(column)
            more = fresh[key]
            growing.append(more.to(column.dtype) if isinstance(more, Tensor) and isinstance(column, Tensor) else more)
            if key[0] == "aside":
                self.aside[key[1]] = growing.view  # type: ignore[assignment]
            elif len(key) == 1:
                setattr(held, key[0], growing.view)
            else:
                getattr(held, key[0])[key[1]] = growing.view

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

    def _sizes(self, batch: Batch) -> Tensor:
        """The bytes of each of these samples, with what is noted of it."""
        names = [
            "arrived",
            "sizes",
            *(["groups"] if self.policy.by_group or not self.streaming else []),
            *(["scores"] if self.marks else []),
        ]
        return sizes_of(batch) + sum(row_size(_missing(name, 1, batch)) for name in names)

    def _capacity(self) -> int:
        """As many samples as fit, as large as those seen are on the average."""
        total, count = self.offered
        return max(1, self.budget * count // max(1, total))

    def _fit(self) -> None:
        """Samples go until what is held fits into the budget."""
        while self.unit == "bytes" and self.held is not None and (over := int(self.aside["sizes"].sum()) - self.budget) > 0:
            self._evict(self.shares[0], min(len(self), max(1, over * len(self) // int(self.aside["sizes"].sum()))))

    # -- ranking ----------------------------------------------------------------------------------------------------------------

    def _rank(self, samples: Batch | Dataset, labels: Tensor, group: int | None, features: Tensor | None, scores: Tensor | None) -> None:
        of = self._groups(labels, group)
        values = torch.zeros(len(samples), 0) if features is None else features.detach()
        marks = None if scores is None else self.policy.score(scores.detach())
        lists = self._lists()
        fresh = of.unique().tolist()
        groups = len(lists.keys() | set(fresh))
        if self.unit == "bytes":
            first = self._sizes(self._kept(samples[torch.tensor([0])], None if features is None else features[:1]))
            self.offered = [self.offered[0] + int(first[0]), self.offered[1] + 1]
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
                own = torch.cat([self.aside["scores"][held].to(own), own])
                order = self.policy.rank(mine.new_zeros(len(own), 0), own, min(quota, len(own)), self.generator).cpu()
                chosen[label] = torch.cat([-1 - held, rows])[order]  # a row that is held already is written as -1 - row
            else:
                chosen[label] = rows[self.policy.rank(mine, own, min(quota, len(rows)), self.generator).cpu()]
        picked = torch.cat([places[places >= 0] for places in chosen.values()])
        every, noted, before = self.held, self.aside, len(self)
        if len(picked):  # else those that are held are preferred to all of these
            incoming = self._kept(samples[picked], None if features is None else features[picked.to(features.device)])
            self._check_form(incoming.inputs, incoming.extra.get("features"), incoming.ids)  # type: ignore[arg-type]
            fresh_notes = {
                "arrived": torch.full((len(picked),), self.task, dtype=torch.int32),
                "groups": of[picked],
            }
            if self.marks:
                fresh_notes["scores"] = self._noted(None if marks is None else marks[picked.to(marks.device)], len(picked))
            if self.unit == "bytes":
                fresh_notes["sizes"] = self._sizes(incoming)
                self.offered = [self.offered[0] + int(fresh_notes["sizes"].sum()), self.offered[1] + len(picked)]
            if every is not None:
                every, incoming = self._levelled(incoming)
                noted = self.aside
            if self.disk is not None:
                incoming, fresh_notes["keys"] = self.disk.store(incoming)
            every = incoming if every is None else Batch.cat([every, incoming])
            noted = {name: torch.cat([noted[name], column]) if before else column for name, column in fresh_notes.items()}
        assert every is not None
        place = {row: before + n for n, row in enumerate(picked.tolist())}
        lined_up: list[list[int]] = []
        for label in sorted(lists.keys() | chosen.keys()):
            if label in chosen:
                rows_of = [place[row] if row >= 0 else -1 - row for row in chosen[label].tolist()]
            else:  # a sample that came back is judged anew, under the label that it has now
                rows_of = lists[label][~back[lists[label]]].tolist()
            lined_up.append(rows_of)
        index = self._within(lined_up, quota, noted.get("sizes"))
        if self.disk is not None:
            gone = torch.ones(len(every), dtype=torch.bool)
            gone[index] = False
            self.disk.drop(noted["keys"][gone])
        self.held, self.aside = every[index], {name: column[index] for name, column in noted.items()}
        self._number()
        self._tidy()

    def _within(self, lined_up: list[list[int]], quota: int, sizes: Tensor | None) -> Tensor:
        """The first `quota` rows of each group, fewer where they are too large for the budget together."""
        while True:
            index = torch.tensor([row for rows in lined_up for row in rows[:quota]], dtype=torch.int64)
            if self.unit != "bytes" or sizes is None or (total := int(sizes[index].sum())) <= self.budget:
                return index
            if quota == 1:
                raise ConfigError(f"memory.exemplars is {self.budget} bytes, and one sample of each class takes {total}: give it more")
            quota = max(1, min(quota - 1, quota * self.budget // total))

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
        if held > 50_000 and count < held // 100:  # a permutation of all would take longer than all that is done with a few
            drawn = torch.randint(held, (count + count // 10 + 10,), generator=generator).unique()
            if len(drawn) >= count:
                return drawn[torch.randperm(len(drawn), generator=generator)[:count]]
        chosen = torch.randperm(held, generator=generator)
        if count < held:
            return chosen[:count]
        return chosen if count == held else torch.cat([chosen, torch.randint(held, (count - held,), generator=generator)])

    def dataset(self) -> Dataset:
        held = self._all()
        if self.disk is not None:
            return OnDisk(held[:], self.aside["keys"].clone(), self.disk.frozen())
        if self.streaming or held.extra:  # else it is only ever replaced as a whole
            held = held[:]
        assert held.target is not None
        return ArrayDataset(held.inputs, held.target, held.ids, held.present, held.extra)

    def of(self, label: int, most: int | None = None) -> Batch:
        target = self._all().target
        assert target is not None
        if target.dim() == 1:
            rows = (target == label).nonzero().squeeze(1)
        else:
            rows = (target[:, label] == 1).nonzero().squeeze(1) if label < target.shape[1] else torch.zeros(0, dtype=torch.int64)
        return self._take(rows[:most])

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
            if len(values) != len(ids):
                raise DataError(f"{len(values)} {name} were given for {len(ids)} samples")
            if name == "scores":
                if not self.marks:
                    raise DataError(f"the selection policy {type(self.policy).__name__.lower()} keeps no scores")
                self.aside["scores"][rows] = values.detach().cpu().double()[source]
                continue
            column = self.held.extra.get(name)
            if not isinstance(column, Tensor):
                on_disk = self.disk is not None and name == "features"
                raise DataError(f"the exemplars carry no column {name!r}" + (" in memory: offer the samples anew" if on_disk else ""))
            before = row_size(column)
            column, fresh = level([column, values.detach().to("cpu", column.dtype)])
            if column.shape[1:] != fresh.shape[1:] or (name == "features" and row_size(column) != before):
                raise DataError(f"{name} of {list(values.shape[1:])} cannot replace {name} of {list(self.held.extra[name].shape[1:])}")  # type: ignore[union-attr]
            self.held.extra[name] = column.index_copy_(0, rows, fresh.index_select(0, source))
            if "sizes" in self.aside:
                self.aside["sizes"] += row_size(column) - before
        self._fit_all()

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

    def _fit_all(self) -> None:
        if self.streaming:
            self._fit()
        elif self.unit == "bytes" and self.held is not None:
            keep = torch.zeros(len(self), dtype=torch.bool)
            keep[self._within([rows.tolist() for rows in self._lists().values()], len(self), self.aside["sizes"])] = True
            if not bool(keep.all()):
                self._retain(keep)

    def resize(self, budget: int) -> None:
        if self.store == "none":
            return
        if not self.streaming and self.unit == "samples" and 0 < budget < len(self._lists()):
            raise ConfigError(f"a budget of {budget} is less than one sample for each of the {len(self._lists())} classes")
        self.budget = budget
        if self.budget == 0:
            self._retain(torch.zeros(len(self), dtype=torch.bool)) if self.held is not None else None
        elif self.unit == "bytes":
            self._fit_all()
        elif self.held is not None and not self.streaming:
            self._trim(self._quota(len(self._lists())))
        elif self.held is not None:
            for share in self.shares.values():
                share.slots.budget = self.budget
                over = (len(self) if share.rows is None else len(share.rows)) - self.budget
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
            "too_large": self.too_large,
            "bytes": self.nbytes(),
            "bytes_on_disk": 0 if self.disk is None else self.disk.on_disk(),
            "classes": classes,
            "tasks": arrived,
        }

    def bytes_of(self) -> Tensor:
        """The bytes of each sample  # (held,)"""
        if self.held is None:
            return torch.zeros(0, dtype=torch.int64)
        return sizes_of(self.held) + (0 if self.disk is None else self.disk.sizes(self.aside["keys"]))

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
            "configured": self.configured,
            "offered": self.offered,
            "too_large": self.too_large,
            "form": self.form,
            "disk": None if self.disk is None else self.disk.state(),
            "shares": [
                [label, share.slots.seen, dict(share.slots.seen_of), share.rows, share.policy.state()]
                for label, share in self.shares.items()
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned; under a budget that was changed since, as far as it goes."""
        for option, was, now in zip(("unit", "store", "select", "disk"), state["configured"][1:], self.configured[1:], strict=True):
            if was != now:
                raise ConfigError(f"memory.{option} was {was} when this run was begun, and is {now}: set it back, or begin a new run")
        self.empty()
        self.generator.set_state(state["generator"])
        self.held = None if state["held"] is None else Batch(**state["held"])
        self.aside = dict(state["aside"])
        self.offered, self.too_large = list(state["offered"]), state["too_large"]
        self.form = {name: list(form) for name, form in state["form"].items()}
        if self.disk is not None:
            self.disk.restore(state["disk"], self.aside.get("keys", torch.zeros(0, dtype=torch.int64)))
        for label, seen, seen_of, rows, inner in state["shares"]:
            share = self.shares.setdefault(label, Share(copy.deepcopy(self.policy), []))
            share.slots.seen, share.slots.seen_of, share.slots.version = seen, dict(seen_of), share.slots.version + 1
            share.rows = None if rows is None else list(rows)
            share.policy.restore(inner)
        self._number()
        configured, self.budget = self.budget, int(state["budget"])
        if self.configured[0] != state["configured"][0]:
            self.resize(configured)


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
    return torch.zeros(count, dtype=torch.int32 if name == "arrived" else torch.int64)
