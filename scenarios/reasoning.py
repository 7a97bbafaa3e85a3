"""Reasoning: questions about pictures and frames whose answers can be checked, in sessions: by skill, by difficulty, or by pools.

`by: skill` gives every skill its session (with `tasks`, several share one). `by: difficulty` is the ladder of Observe-R1 (NeuraLadder;
arXiv 2505.12432): rows from easy to hard, cut into sessions at quantiles (`tasks`) or at `bounds`; rows of equal difficulty stay together
and stand in an order drawn from the seed, or in that of their `complexity` (the paper's length of an answer) where the source has it. The
paper samples smoothly between levels by a rule that was never released; ours: `smooth` moves every row up or down the ladder by a random
way of at most this share of a session's mean size, before it is cut. The paper's difficulty is 1 - the pass rate of a reference model:
any number that is larger for what is harder will do. `by: pool` draws each session from weights over the skills
(`pools: [{counting: 1}, {counting: 1, maze: 3}]`, `size: 500`), no row twice in the stream.

A session of the ladder keeps its rows from easy to hard, and so does every other one with `easy_first`: `task.ordered` says so, and what
learns from it may keep that order. `mix` makes every session consist of rows with a picture, with frames and with neither in these
shares, and leaves out the rows that are over. The test sets have no mix and no smoothing: of a session by skill all held-out rows of its
skills, by difficulty all within its bounds, of a pool as many as its weights allow, drawn from the seed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.data import Subset, split_by_class
from streamcl.errors import ConfigError, DataError
from streamcl.options import Fraction, PositiveInt
from streamcl.plugins import find, near_name
from streamcl.seeding import generator
from streamcl.stream import Dataset, Scenario, Source, SourceData, StreamInfo, Task

from ._division import by_task, need_target, need_test

KINDS = ("none", "image", "video")  # what a row shows
BELONGS = {"order": "skill", "bounds": "difficulty", "smooth": "difficulty", "pools": "pool", "size": "pool"}


class Reasoning(Scenario):
    """Sessions of questions; one group of the source (a skill) is one class, numbered in order of arrival.

    `skills` leaves out all others. `order` is that of the skills: drawn from the seed, that of the source, or a list of all. `bounds` are
    the difficulties from which the second session, the third and so on begin.
    """

    def __init__(
        self,
        *,
        data: Source,
        by: Literal["skill", "difficulty", "pool"] = "skill",
        tasks: PositiveInt | None = None,
        skills: list[str] | None = None,
        order: Literal["seed", "given"] | list[str] = "seed",
        bounds: list[float] | None = None,
        smooth: Fraction = 0.0,
        pools: list[dict[str, float]] | None = None,
        size: PositiveInt | None = None,
        easy_first: bool = False,
        mix: dict[Literal["none", "image", "video"], float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        given = {
            "order": order != "seed",
            "bounds": bounds is not None,
            "smooth": smooth > 0,
            "pools": bool(pools),
            "size": size is not None,
        }
        for option, way in BELONGS.items():
            if given[option] and by != way:
                raise ConfigError(f"reasoning: {option} belongs to by: {way}, and by is {by}: leave it out or change by")
        if by == "difficulty" and (tasks is None) == (bounds is None):
            raise ConfigError("reasoning: by: difficulty needs either tasks (sessions of about equal size) or bounds, and not both")
        if bounds is not None and (not bounds or any(low >= high for low, high in pairwise(bounds))):
            raise ConfigError(f"reasoning: bounds is {bounds}: difficulties that grow are needed, such as [0.25, 0.5, 0.75]")
        if by == "pool":
            if not pools or size is None:
                raise ConfigError("reasoning: by: pool needs pools (weights of skills for each session) and size (rows in a session)")
            if tasks is not None or skills is not None:
                raise ConfigError(
                    f"reasoning: pools already says the {'sessions: leave out tasks' if tasks else 'skills: leave out skills'}"
                )
            for place, pool in enumerate(pools, 1):
                _refuse_weights(pool, f"pool {place}")
        if mix is not None:
            _refuse_weights(mix, "mix")
        self.data, self.by, self.tasks, self.skills, self.order = data, by, tasks, skills, order
        self.bounds, self.smooth, self.pools, self.size = bounds, smooth, pools, size
        self.easy_first = easy_first or by == "difficulty"
        self._mix: dict[str, float] = {str(kind): share for kind, share in (mix or {}).items()}

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_target(loaded, ("text",), "reasoning", "answers in words")
        need_test(loaded, "reasoning")
        assert loaded.test is not None
        self._loaded, self._train, self._test = loaded, loaded.train, loaded.test
        for part, dataset in (("training", self._train), ("test", self._test)):
            _refuse_rows(dataset, part)
        if self.by == "difficulty" or self.easy_first:
            self._difficulty = _column(self._train, "difficulty", "training")
        self._kind = _kinds(loaded, self._train)
        divide = {"skill": self._by_skill, "difficulty": self._by_difficulty, "pool": self._by_pool}[self.by]
        train, self._test_of, self._titles = divide(seed)
        if self.pools is None:
            self._number([self._train.targets[rows] for rows in train])
        else:  # a skill arrives with the pool that names it, though its share may round to no row
            self._number([torch.tensor([loaded.class_names.index(name) for name in pool]) for pool in self.pools])
        if self._mix and self.by != "pool":
            train = [self._mixed(rows, title, seed) for rows, title in zip(train, self._titles, strict=True)]
        if self.easy_first and self.by != "difficulty":
            train = [self._ladder(rows, seed, session) for session, rows in enumerate(train)]
        self._train_of, self._validation_of = self._hold_back(train, seed)
        self.info = StreamInfo(
            modalities=loaded.modalities,
            target="text",
            metrics=("verified",),
            classes=len(self._names),
            tasks=len(train),
            licence=loaded.licence,
            class_names=tuple(self._names),
        )
        self.problems = loaded.problems
        return self.info

    def task(self, index: int) -> Task:
        rows = self._train_of[index]
        train: Dataset = Subset(self._train, rows, self._relabel)
        held = self._validation_of[index] if self.validation else None
        validation = None if held is None else Subset(self._train, held, self._relabel)
        labels = set(train.targets.unique().tolist()) | set([] if validation is None else validation.targets.unique().tolist())
        seen = int(self._seen[index])
        extra = getattr(self._train, "extra", {})
        difficulty = extra["difficulty"][rows] if isinstance(extra.get("difficulty"), Tensor) and len(rows) else None
        counts = torch.bincount(self._kind[rows], minlength=len(KINDS)).tolist()
        return Task(
            index=index,
            name=self._titles[index],
            train=train,
            classes=tuple(range(int(self._seen[index - 1]) if index else 0, seen)),
            seen=tuple(range(seen)),
            labels=tuple(sorted(labels)),
            validation=validation,
            names=dict(enumerate(self._names[:seen])),
            about={
                "skills": [self._names[label] for label in sorted(labels)],
                "difficulty": None if difficulty is None else [float(difficulty.min()), float(difficulty.max())],
                "ordered": self.easy_first,
                "shows": {kind: count for kind, count in zip(KINDS, counts, strict=True) if count},
            },
        )

    def __len__(self) -> int:
        return len(self._titles)

    def test(self, task: Task, after: Task) -> Dataset | None:
        rows = self._test_of[task.index]
        return Subset(self._test, rows, self._relabel) if len(rows) else None

    def files(self) -> list[str]:
        return self.data.files()

    def _by_skill(self, seed: int) -> tuple[list[Tensor], list[Tensor], list[str]]:
        names = self._loaded.class_names
        wanted = self._wanted()
        if self.order == "seed":
            wanted = wanted[torch.randperm(len(wanted), generator=generator(seed, "order of skills"))]
        elif self.order != "given":
            order = [self._skill(name, "order") for name in self.order]
            if sorted(order) != wanted.tolist():
                raise ConfigError(f"reasoning: order is {self.order}: it must list every skill of the stream once")
            wanted = torch.tensor(order)
        if self.tasks is not None and self.tasks > len(wanted):
            raise ConfigError(f"reasoning: tasks is {self.tasks} and there are only {len(wanted)} skills: at most one session for each")
        groups = torch.tensor_split(wanted, self.tasks or len(wanted))
        session = torch.full((len(names),), -1)
        session[wanted] = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
        train, test = (list(by_task(session[dataset.targets], len(groups))) for dataset in (self._train, self._test))
        return train, test, [", ".join(names[number] for number in group.tolist()) for group in groups]

    def _by_difficulty(self, seed: int) -> tuple[list[Tensor], list[Tensor], list[str]]:
        wanted = self._wanted()
        mine = torch.zeros(len(self._loaded.class_names), dtype=torch.bool)
        mine[wanted] = True
        ladder = self._ladder(mine[self._train.targets].nonzero().squeeze(1), seed)
        ranked = self._difficulty[ladder]
        if self.bounds is not None:
            starts = torch.tensor(self.bounds, dtype=ranked.dtype)
        else:
            assert self.tasks is not None
            last = torch.arange(1, self.tasks) * len(ranked) // self.tasks - 1  # the last of each session if all were different
            # A session begins above the hardest row of the one before it, so that equal ones stay together.
            place = torch.searchsorted(ranked, ranked[last.clamp(min=0)], right=True)
            starts = torch.where(place < len(ranked), ranked[place.clamp(max=len(ranked) - 1)], torch.inf)
        counts = torch.bincount(torch.bucketize(ranked, starts, right=True), minlength=len(starts) + 1)
        ends = [-torch.inf, *starts.tolist(), torch.inf]
        empty = [
            f"{place + 1} ({_range(ends[place], ends[place + 1])})" if self.bounds else str(place + 1)
            for place in (counts == 0).nonzero().squeeze(1).tolist()
        ]
        if empty:
            raise ConfigError(
                f"reasoning: no training row for session {', '.join(empty)}: the difficulties run from {ranked[0]:g} to {ranked[-1]:g} "
                f"with {len(ranked.unique_consecutive())} different values: take fewer tasks or other bounds"
            )
        if self.smooth:
            way = (2 * torch.rand(len(ladder), generator=generator(seed, "smooth ladder"), dtype=torch.float64) - 1) * self.smooth
            ladder = ladder[(torch.arange(len(ladder)) + way * len(ladder) / len(counts)).argsort(stable=True)]
        test_hard = _column(self._test, "difficulty", "test")
        test_bucket = torch.bucketize(test_hard, starts, right=True)
        test_bucket[~mine[self._test.targets]] = -1
        titles = [f"difficulty {_range(low, high)}" for low, high in pairwise(ends)]
        return list(ladder.split(counts.tolist())), list(by_task(test_bucket, len(counts))), titles

    def _by_pool(self, seed: int) -> tuple[list[Tensor], list[Tensor], list[str]]:
        assert self.pools is not None and self.size is not None
        names, width = self._loaded.class_names, len(KINDS) if self._mix else 1
        drawer = self._train.targets * width + (self._kind if self._mix else 0)  # rows of one skill, and of one kind where there is a mix
        shuffled = torch.randperm(len(drawer), generator=generator(seed, "pools"))
        drawers = by_task(drawer[shuffled], len(names) * width)
        test_drawers = by_task(self._test.targets, len(names))
        taken = [0] * len(drawers)
        train, test, titles = [], [], []
        for place, pool in enumerate(self.pools):
            skills = sorted((self._skill(name, f"pool {place + 1}"), weight) for name, weight in pool.items())
            kinds = [(KINDS.index(kind), share) for kind, share in sorted(self._mix.items())] or [(0, 1.0)]
            shares = [(number * width + kind, weight * share) for number, weight in skills for kind, share in kinds]
            rows = []
            for (number, _), wanted in zip(shares, _shares(_weights([share for _, share in shares]), self.size).tolist(), strict=True):
                left = len(drawers[number]) - taken[number]
                if wanted > left:
                    what = names[number // width] + (f" with {_shown(KINDS[number % width])}" if self._mix else "")
                    raise ConfigError(
                        f"reasoning: pool {place + 1} asks for {wanted} rows of {what} and {left} are left of {len(drawers[number])} "
                        "(no row comes twice in the stream): take a smaller size or other weights"
                    )
                rows.append(shuffled[drawers[number][taken[number] : taken[number] + wanted]])
                taken[number] += wanted
            drawn = torch.cat(rows)
            train.append(drawn[torch.randperm(len(drawn), generator=generator(seed, "pool", place))])
            held = [test_drawers[number] for number, _ in skills]
            of = torch.cat([torch.full_like(part, number) for number, part in enumerate(held)])
            kept = _drawn(torch.cat(held), of, _weights([weight for _, weight in skills]), generator(seed, "test of pool", place))
            test.append(kept.sort().values)
            whole = sum(pool.values())
            titles.append(f"pool {place + 1}: " + ", ".join(f"{name} {weight / whole:.0%}" for name, weight in pool.items()))
        return train, test, titles

    def _mixed(self, rows: Tensor, title: str, seed: int) -> Tensor:
        """As many of a session's rows as the mix allows, in their order."""
        kind = self._kind[rows]
        lacking = [_shown(name) for name in self._mix if not bool((kind == KINDS.index(name)).any())]
        if lacking:
            raise ConfigError(f"reasoning: mix asks for rows with {' and with '.join(lacking)}, and session {title!r} has none")
        return _drawn(rows, kind, _weights([self._mix.get(name, 0.0) for name in KINDS]), generator(seed, "mix", title))

    def _ladder(self, rows: Tensor, seed: int, *purpose: object) -> Tensor:
        """Training rows from easy to hard; equal ones in the order of their complexity, or else as the seed has it."""
        order = rows[torch.randperm(len(rows), generator=generator(seed, "ladder", *purpose))]
        complexity = getattr(self._train, "extra", {}).get("complexity")
        for column in ([complexity] if isinstance(complexity, Tensor) else []) + [self._difficulty]:
            order = order[column[order].argsort(stable=True)]
        return order

    def _wanted(self) -> Tensor:
        """The skills of the stream, as the source numbers them."""
        names = self._loaded.class_names
        have, held = (torch.bincount(dataset.targets, minlength=len(names)) for dataset in (self._train, self._test))
        if self.skills is None:
            lacking, why = (have == 0) & (held > 0), ", and the test set has some"
            wanted = have > 0
        else:
            wanted = torch.zeros(len(names), dtype=torch.bool)
            wanted[[self._skill(name, "skills") for name in self.skills]] = True
            lacking, why = wanted & (have == 0), ""
        if bool(lacking.any()) or not bool(wanted.any()):
            missing = [name for name, missed in zip(names, lacking.tolist(), strict=True) if missed]
            raise ConfigError(f"reasoning: no training row of {', '.join(missing) or 'any skill'}{why}: name others under skills")
        return wanted.nonzero().squeeze(1)

    def _skill(self, name: str, option: str) -> int:
        names = self._loaded.class_names
        if name not in names:
            raise ConfigError(f"reasoning: {option} names {name!r}{near_name(name, names) or ': the source has ' + ', '.join(names)}")
        return names.index(name)

    def _number(self, arriving: list[Tensor]) -> None:
        """Number the skills as they arrive: by their first session, then as the source does."""
        first = torch.full((len(self._loaded.class_names),), len(arriving))
        for session in reversed(range(len(arriving))):
            first[arriving[session]] = session
        arrival = first.argsort(stable=True)[: int((first < len(arriving)).sum())]
        self._names = [self._loaded.class_names[number] for number in arrival.tolist()]
        self._relabel = torch.full_like(first, -1)
        self._relabel[arrival] = torch.arange(len(arrival))
        self._seen = torch.bincount(first[arrival], minlength=len(arriving)).cumsum(0)

    def _hold_back(self, train: list[Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """The rows of each session that are trained on, and those for validation: their part of each skill; in the session's order."""
        if not self.validation:
            return train, []
        sizes = torch.tensor([len(rows) for rows in train])
        rows = torch.cat(train)
        session = torch.arange(len(train)).repeat_interleave(sizes)
        group = session * len(self._names) + self._relabel[self._train.targets[rows]]
        kept, held = split_by_class(group, self.validation, generator(seed, "validation"))
        return tuple(list(rows[part].split(torch.bincount(session[part], minlength=len(train)).tolist())) for part in (kept, held))  # type: ignore[return-value]


def _weights(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _shares(weights: Tensor, total: int) -> Tensor:
    """Whole numbers that sum to `total`, in proportion to the weights: the largest remainders are rounded up."""
    exact = weights * (total / weights.sum())
    shares = (exact + 1e-9).floor()
    shares[(shares - exact).argsort(stable=True)[: total - int(shares.sum())]] += 1
    return shares.long()


def _drawn(rows: Tensor, group: Tensor, weights: Tensor, draw: torch.Generator) -> Tensor:
    """As many rows as there can be with these weights of their groups, drawn without replacement, in their order."""
    have = torch.bincount(group, minlength=len(weights)).double()
    asked = weights > 0
    most = int(((have / weights)[asked].min() * weights.sum() + 1e-9).floor())
    while most and bool((_shares(weights, most) > have).any()):  # a share rounded up may be one too many
        most -= 1
    shuffled = torch.randperm(len(rows), generator=draw)
    wanted = _shares(weights, most)
    parts = by_task(group[shuffled], len(weights))
    return rows[torch.cat([shuffled[part[:size]] for part, size in zip(parts, wanted.tolist(), strict=True)]).sort().values]


def _kinds(loaded: SourceData, dataset: Dataset) -> Tensor:
    """What each row shows, as KINDS numbers it  # (rows,)"""
    present: dict[str, Tensor] = getattr(dataset, "present", None) or {}
    kind = torch.zeros(len(dataset), dtype=torch.int64)
    for number, name in enumerate(KINDS[1:], 1):
        for modality in (key for key, value in loaded.modalities.items() if value.kind == name):
            kind[present.get(modality, torch.ones(len(dataset), dtype=torch.bool))] = number
    return kind


def _column(dataset: Dataset, name: str, part: str) -> Tensor:
    column = getattr(dataset, "extra", {}).get(name)
    if not isinstance(column, Tensor):
        raise ConfigError(f"reasoning: the {part} rows have no {name}: give the source a column of it, or take sessions by: skill")
    _refuse_first(~torch.isfinite(column), f"have no {name} that is a number", part)
    return column.float()


def _refuse_rows(dataset: Dataset, part: str) -> None:
    extra = getattr(dataset, "extra", {})
    for name in ("answer", "verifier"):
        if not isinstance(extra.get(name), list):
            raise ConfigError(f"reasoning: the {part} rows name no {name}: the source must say it for each")
        if not all(value.strip() for value in set(extra[name])):
            _refuse_first(torch.tensor([not value.strip() for value in extra[name]]), f"have no {name}", part)
    for name in sorted(set(extra["verifier"])):
        find("verifier", name)


def _refuse_first(bad: Tensor, what: str, part: str) -> None:
    rows = bad.nonzero().squeeze(1).tolist()
    if rows:
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise DataError(f"reasoning: {len(rows)} {part} rows {what} (rows {shown}): mend them or take them out")


def _refuse_weights(weights: dict[Any, float], where: str) -> None:
    if not weights or not all(0 < weight < float("inf") for weight in weights.values()):
        raise ConfigError(f"reasoning: {where} is {weights}: weights above 0 are needed; leave out what is not wanted")


def _range(low: float, high: float) -> str:
    if low == -torch.inf:
        return f"below {high:g}" if high < torch.inf else "any"
    return f"from {low:g}" + (f" to below {high:g}" if high < torch.inf else "")


def _shown(kind: str) -> str:
    return {"none": "neither picture nor frames", "image": "a picture", "video": "frames"}[kind]
