"""Class prototypes: count, mean and covariance per class in one pass, in float64 inside, answers in the precision asked for.

Batches are merged by Chan's rule: a batch of n samples with mean m and scatter s (squares about m) joins N, M, S as

    M <- M + (m - M) n / (N + n)        S <- S + s + (m - M)(m - M)' N n / (N + n)

so every splitting and order of a stream gives the two-pass result up to the rounding of float64, however far the mean is from zero.
`remove` is the same rule solved for what was there before. `shared` keeps one scatter, about each sample's own mean, divided by samples
less prototypes. `full` keeps the upper half of each class's scatter: in float64 that is what a whole matrix in float32 takes.

Several prototypes per class: a class's first samples seed them by k-means++ (its draws seeded by the label) and ten rounds of Lloyd; a
later sample joins the nearest prototype of its class, as the prototypes stood before the batch. Counts and the mean over a class's
prototypes stay exact, and every prototype has the exact mean and covariance of the samples that joined it; which those are depends on
order and splitting, and is not kept, so samples cannot be taken back.

Nearest neighbours by Euclidean and cosine distance go through matrix products about the middle of the prototypes, in FAISS where it is
faster, and the distances to the few nearest are then worked out from differences. FeCAM's rule is `metric="mahalanobis"` with its
shrinkage and correlation (its power transform and normalisation are the caller's); SLDA's is that over `covariance="shared"`: its
(1 - e) C + e I ranks classes as shrinkage (e / ((1 - e) mean variance), 0) does. What has been factorised is kept until the next update.

On a GPU the tensors stay there, FAISS is not used, and an update reads back which labels are present and whether all is finite; sums come
out the same each time where torch.use_deterministic_algorithms is on. It was not run on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from streamcl.contracts import PrototypeMemory
from streamcl.errors import ConfigError, DataError

from .analytic import Symmetric, in_full, refuse_not_finite

Covariance = Literal["none", "diagonal", "full", "shared"]

PIECE = 2**22  # numbers of a large batch that are worked on at a time, in float64
TABLE = 2**21  # distances that are worked out at a time
FEW = 16  # of the nearest, whose distances are worked out from differences: a product loses the small ones
LLOYD = 10  # rounds
NO_SPREAD = "mahalanobis distance needs a class with two samples that differ, and there is none yet"


class _Groups(NamedTuple):
    """Samples, by the prototype that they join or leave."""

    rows: Tensor  # (groups,) the prototypes, each once
    member: Tensor  # (batch,) the group of each sample
    sizes: Tensor  # (groups,)


class _Points(NamedTuple):
    """Prototypes made ready for a search."""

    points: Tensor  # (prototypes, dim) less the middle
    middle: Tensor  # (dim,) of the prototypes: products of what is far from zero would lose the differences
    halves: Tensor  # (prototypes,) half the squared length, and a half more for those without a direction
    zero: Tensor | None  # (prototypes,) which have no direction, where that matters and there are some


class Prototypes:
    """Rows are prototypes in order of first appearance; `labels` says which class each belongs to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.covariance: Covariance = "none"
        self.per_class = 1
        self.dtype: torch.dtype | None = None  # of the answers; until it is configured, that of the first features
        self.clear()

    def configure(self, covariance: Covariance = "none", per_class: int = 1, dtype: torch.dtype = torch.float32) -> None:
        if covariance not in ("none", "diagonal", "full", "shared"):
            raise ConfigError(f"unknown covariance '{covariance}' of prototypes: none, diagonal, full or shared")
        if per_class < 1:
            raise ConfigError(f"a class has at least one prototype: per_class is {per_class}")
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"prototypes are answered in float32 or float64, not in {dtype}")
        if (self.covariance, self.per_class, self.dtype) != (covariance, per_class, dtype):
            self.covariance, self.per_class, self.dtype = covariance, per_class, dtype
            self.clear()

    def clear(self) -> None:
        self._labels: list[int] = []  # of each row
        self._rows: dict[int, list[int]] = {}  # label -> its rows
        self._counts = torch.empty(0, dtype=torch.int64, device=self.device)
        self._tables: dict[str, Tensor] = {}  # means, and under diagonal their scatter  # (rows and some to spare, dim)
        self._scatters: list[Symmetric] = []  # under full, of each row; under shared, the one
        self._freedom = 0  # what the shared scatter is divided by
        self._made: dict[str, Any] = {}  # what follows from the statistics, until they change

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def dim(self) -> int | None:
        return self._tables["means"].shape[1] if self._tables else None

    def _table(self, name: str = "means") -> Tensor:
        return self._tables[name][: len(self)]

    # -- taking in and taking back ---------------------------------------------------------------------------------------------

    @in_full
    def update(self, features: Tensor, labels: Tensor) -> None:
        features, labels = self._features(features), self._classes(labels, len(features))
        if not len(features):
            return
        self._begin(features.shape[1], features.dtype)
        self._made.clear()
        for x, y in self._pieces(features, labels):
            present, member = y.unique(return_inverse=True)
            known = present.tolist()
            lacking = [i for i, label in enumerate(known) if len(self._rows.get(label, ())) < self.per_class]
            if lacking:
                first = torch.full_like(present, len(y)).scatter_reduce_(0, member, torch.arange(len(y), device=y.device), "amin")
                lacking.sort(key=first.tolist().__getitem__)
            if self.per_class == 1:
                self._append([known[i] for i in lacking])
                rows = self._tensor(self._rows[label][0] for label in known)
            else:
                for i in lacking:
                    self._seed(known[i], x[member == i])
                rows, member = self._nearest_of_class(x, known, member).unique(return_inverse=True)
            self._absorb(x, _Groups(rows, member, member.bincount(minlength=len(rows))))
            if lacking and self.per_class > 1:
                self._drop_empty()

    def _absorb(self, x: Tensor, groups: _Groups) -> None:
        means, centred = self._within(x, groups)
        way, before = self._move(groups.rows, means, groups.sizes)
        self._scatter(centred, way, groups, 1.0)
        if self.covariance == "shared":
            self._freedom += len(x) - int((before == 0).sum())

    def _within(self, x: Tensor, groups: _Groups) -> tuple[Tensor, Tensor]:
        """The mean of each group, and that of each sample less the sample (only where a covariance is kept: it goes by the squares)."""
        means = x.new_zeros(len(groups.sizes), x.shape[1]).index_add_(0, groups.member, x).div_(groups.sizes[:, None])
        return means, x[:0] if self.covariance == "none" else means[groups.member].sub_(x)

    def _move(self, rows: Tensor, means: Tensor, coming: Tensor) -> tuple[Tensor, Tensor]:
        """Let samples with these means join the rows: each way, weighted so that its square is what the scatter grows by; the counts."""
        before = self._counts[rows]
        n, m = before.double()[:, None], coming.double()[:, None]
        way = means.sub_(self._table()[rows])  # in place, here and below: of these temporaries the time of an update is made
        if self.covariance == "none":
            self._table().index_add_(0, rows, way.mul_(m / (n + m)))
        else:
            self._table().index_add_(0, rows, way * (m / (n + m)))
            way.mul_((n * m / (n + m)).sqrt_())
        self._counts[rows] = before + coming
        return way, before

    def _scatter(self, centred: Tensor, way: Tensor, groups: _Groups, times: float) -> None:
        """Add the squares of the centred samples, and of one row for each group that stands for the way of its mean."""
        if self.covariance == "diagonal":
            squares = way.square_().index_add_(0, groups.member, centred.square_())
            self._table("scatter").index_add_(0, groups.rows, squares, alpha=times)
        elif self.covariance == "shared":
            self._scatters[0].add(torch.cat([centred, way]), times)
        elif self.covariance == "full":
            owner = torch.cat([groups.member, torch.arange(len(way), device=way.device)])
            rows = torch.cat([centred, way])[owner.argsort(stable=True)]
            for row, part in zip(groups.rows.tolist(), rows.split((owner.bincount()).tolist()), strict=True):
                self._scatters[row].add(part, times)

    @in_full
    def remove(self, features: Tensor, labels: Tensor) -> None:
        """A class whose last sample goes is gone. Not exact for a class whose mean was moved by `shift` or `set` in between."""
        if self.per_class > 1:
            raise ConfigError(
                "samples cannot be taken back from several prototypes per class: which of them each sample joined is not kept (per_class=1)"
            )
        features, labels = self._features(features), self._classes(labels, len(features))
        asked, sizes = (part.tolist() for part in labels.unique(return_counts=True))
        counts = self._counts.tolist()
        held = [counts[self._rows[label][0]] if label in self._rows else 0 for label in asked]
        over = [f"{size} of class {label}, which has {has}" for label, size, has in zip(asked, sizes, held, strict=True) if size > has]
        if over:
            raise DataError(f"more samples would be taken back than the prototypes stand for: {', '.join(over[:5])}")
        self._made.clear()
        for x, y in self._pieces(features, labels):
            present, member = y.unique(return_inverse=True)
            rows = self._tensor(self._rows[label][0] for label in present.tolist())
            self._release(x, _Groups(rows, member, member.bincount(minlength=len(rows))))
        self._drop_empty()

    def _release(self, x: Tensor, groups: _Groups) -> None:
        means, centred = self._within(x, groups)
        rows, going = groups.rows, groups.sizes
        before = self._counts[rows]
        left = before - going
        n, m, rest = before.double()[:, None], going.double()[:, None], left.double()[:, None].clamp(min=1)
        way = means - self._table()[rows]
        self._table()[rows] -= way * (m / rest)
        self._counts[rows] = left
        self._scatter(centred, torch.where(left[:, None] > 0, way * (n * m / rest).sqrt(), 0.0), groups, -1.0)
        if self.covariance == "diagonal":  # rounding may leave less than nothing, and one sample has no scatter
            self._table("scatter")[rows] = torch.where(left[:, None] > 1, self._table("scatter")[rows].clamp(min=0), 0.0)
        elif self.covariance == "full":
            for row in rows[left == 1].tolist():
                self._scatters[row].scale(0.0)
        elif self.covariance == "shared":
            self._freedom -= len(x) - int((left == 0).sum())
            if self._freedom == 0:
                self._scatters[0].scale(0.0)

    @in_full
    def set(self, label: int, mean: Tensor, count: int, covariance: Tensor | None = None) -> None:
        """In the place of all prototypes of the class. Without `covariance` the class keeps the one that it has."""
        mean = self._features(mean[None])[0]
        self._classes(torch.tensor([label]), 1)
        rows, dim = self._rows.get(label, []), len(mean)
        if count < 1:
            raise DataError(f"the prototype of class {label} cannot stand for {count} samples: at least one")
        if covariance is not None:
            covariance = self._given(covariance, label, dim)
        elif self.covariance in ("diagonal", "full") and len(rows) != 1:
            raise DataError(f"the prototypes keep a {self.covariance} covariance: class {label} cannot be set without one")
        self._begin(dim, mean.dtype)
        self._made.clear()
        if len(rows) > 1:
            self._counts[self._tensor(rows[1:])] = 0
            self._drop_empty()
        elif not rows:
            self._append([label])
        row = self._rows[label][0]
        again = (count - 1) / max(int(self._counts[row]) - 1, 1)
        self._table()[row] = mean.double()
        self._counts[row] = count
        if self.covariance == "diagonal":
            self._table("scatter")[row] = self._table("scatter")[row] * again if covariance is None else covariance * (count - 1)
        elif self.covariance == "full" and covariance is None:
            self._scatters[row].scale(again)
        elif self.covariance == "full" and covariance is not None:
            self._scatters[row].put(covariance * (count - 1))
        elif self.covariance == "shared" and covariance is not None:
            own = Symmetric(dim, torch.float64, self.device)
            own.put(covariance * (count - 1))
            self._scatters[0].plus(own)
            self._freedom += count - 1

    def _given(self, covariance: Tensor, label: int, dim: int) -> Tensor:
        if self.covariance == "none":
            raise ConfigError("these prototypes keep no covariance: configure covariance='diagonal', 'full' or 'shared' to set one")
        if self.covariance == "shared" and label in self._rows:
            raise ConfigError(f"class {label} is part of the shared covariance already, and its own part is not kept: set it without one")
        shape = (dim,) if self.covariance == "diagonal" else (dim, dim)
        if covariance.shape != shape:
            raise DataError(f"the covariance of class {label} is {tuple(covariance.shape)}, and these prototypes take {shape}")
        refuse_not_finite(covariance.detach().reshape(-1, dim), "rows of the covariance")
        return covariance.detach().to(self.device, torch.float64)

    @in_full
    def merge(self, other: PrototypeMemory) -> None:
        """Exact. With several prototypes per class, each of the other's joins the nearest of its class once there are enough."""
        if not isinstance(other, Prototypes):
            raise ConfigError(f"prototypes merge with their own kind, not with {type(other).__name__}")
        if (self.covariance, self.per_class) != (other.covariance, other.per_class):
            raise ConfigError(
                f"prototypes with covariance {other.covariance} and {other.per_class} per class do not merge with those with covariance "
                f"{self.covariance} and {self.per_class} per class"
            )
        if other.dim is None or other.dtype is None or not len(other):
            return
        if self.dim not in (None, other.dim):
            raise DataError(f"prototypes of {other.dim} dimensions do not merge with those of {self.dim}")
        self._begin(other.dim, other.dtype)
        self._made.clear()
        means, counts = other._table().to(self.device, copy=True), other._counts.to(self.device, copy=True)
        held = [(label, list(rows)) for label, rows in other._rows.items()]
        for turn in range(self.per_class):  # one of each class at a time
            labels = [label for label, rows in held if len(rows) > turn]
            if not labels:
                break
            theirs = [rows[turn] for _, rows in held if len(rows) > turn]
            lacking = {label for label in labels if len(self._rows.get(label, ())) < self.per_class}
            self._append([label for label in labels if label in lacking])
            chosen, member = self._tensor(theirs), self._tensor(range(len(labels)))
            rows = self._nearest_of_class(means[chosen], labels, member)
            new = self._tensor(self._rows[label][-1] if label in lacking else -1 for label in labels)
            rows = torch.where(new < 0, rows, new)
            way, before = self._move(rows, means[chosen], counts[chosen])
            self._scatter(way[:0], way, _Groups(rows, member[:0], torch.zeros_like(rows)), 1.0)
            if self.covariance == "shared":
                self._freedom += int((before > 0).sum())
            elif self.covariance == "diagonal":
                self._table("scatter").index_add_(0, rows, other._table("scatter").to(self.device)[chosen])
            elif self.covariance == "full":
                for row, their in zip(rows.tolist(), theirs, strict=True):
                    self._scatters[row].plus(other._scatters[their])
        if self.covariance == "shared":
            self._scatters[0].plus(other._scatters[0])
            self._freedom += other._freedom

    @in_full
    def shift(self, before: Tensor, after: Tensor, sigma: float = 0.3, floor: float = 0.0, labels: Tensor | None = None) -> None:
        """Scatters stay as they are. SDC: floor 0; SSIAT: floor 1e-5. Where all weights vanish, the nearest sample has it all."""
        if not sigma > 0 or not floor >= 0:
            raise ConfigError(f"sigma is above 0 and floor at least 0, not {sigma:g} and {floor:g}")
        self.means()
        before, after = self._features(before).double(), self._features(after).double()
        if before.shape != after.shape or not len(before):
            raise DataError(f"a shift is seen on the same samples, row by row: there are {len(before)} before and {len(after)} after")
        chosen = self._chosen(labels)
        rows = self._tensor(row for label in chosen for row in self._rows[label])
        move, middle = after - before, before.mean(dim=0)
        before = before - middle
        lengths = before.square().sum(dim=1)
        low = torch.tensor(floor, dtype=torch.float64, device=self.device).log()
        self._made.clear()
        for part in rows.split(max(1, TABLE // len(before))):
            points = self._table()[part] - middle
            squares = torch.addmm(lengths, points, before.T, alpha=-2).add_(points.square().sum(dim=1, keepdim=True)).clamp_(min=0)
            logs = squares.div_(-2 * sigma**2)  # (prototypes, samples)
            top = torch.maximum(logs.amax(dim=1, keepdim=True), low)  # so that the largest weight is 1
            weights = (logs - top).exp_() + (low - top).exp()
            self._table()[part] += (weights @ move) / weights.sum(dim=1, keepdim=True)

    # -- several prototypes per class ------------------------------------------------------------------------------------------

    def _seed(self, label: int, samples: Tensor) -> None:
        """Prototypes that the class lacks, from samples of it: k-means++, and Lloyd's rounds where it is new."""
        random = torch.Generator().manual_seed(label)
        centres = self._table()[self._tensor(self._rows.get(label, ()))]
        new = not len(centres)
        if new:
            centres = samples[int(torch.randint(len(samples), (1,), generator=random))][None]
        nearest = torch.cdist(samples, centres, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).square()
        while len(centres) < self.per_class and bool((nearest > 0).any()):
            sums = nearest.cumsum(0)
            drawn = torch.rand(1, generator=random, dtype=torch.float64).to(sums.device) * sums[-1]
            index = int(torch.searchsorted(sums, drawn, right=True).clamp(max=int(nearest.nonzero()[-1])))
            centres = torch.cat([centres, samples[index : index + 1]])
            nearest = torch.minimum(nearest, (samples - samples[index]).square().sum(dim=1))
        for _ in range(LLOYD if new else 0):
            member = torch.cdist(samples, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
            sizes = member.bincount(minlength=len(centres))[:, None]
            sums = torch.zeros_like(centres).index_add_(0, member, samples)
            centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        begun, had = len(self), len(self._rows.get(label, ()))
        self._append([label] * (len(centres) - had))
        self._table()[begun:] = centres[had:]

    def _nearest_of_class(self, x: Tensor, labels: Sequence[int], member: Tensor) -> Tensor:
        """The row of its class that is nearest to each sample, which is of class labels[member]  # (batch,)"""
        slots = max(len(self._rows[label]) for label in labels)
        padded = [self._rows[label] + self._rows[label][:1] * (slots - len(self._rows[label])) for label in labels]
        rows = torch.tensor(padded, device=self.device)  # (classes, slots)
        best, chosen = x.new_full((len(x),), torch.inf), rows[member, 0]
        for slot in range(slots if slots > 1 else 0):
            candidate = rows[member, slot]
            distance = (x - self._table()[candidate]).square_().sum(dim=1)
            chosen = torch.where(distance < best, candidate, chosen)
            best = torch.minimum(best, distance)
        return chosen

    # -- what it says ----------------------------------------------------------------------------------------------------------

    @in_full
    def means(self) -> Tensor:
        if not len(self):
            raise DataError("there is no prototype yet")
        if "means" not in self._made:
            self._made["means"] = self._table().to(self.dtype, copy=True)
        return self._made["means"]

    @in_full
    def labels(self) -> Tensor:
        if "labels" not in self._made:
            self._made["labels"] = self._tensor(self._labels)
        return self._made["labels"]

    @in_full
    def counts(self) -> Tensor:
        return self._counts.clone()

    @in_full
    def covariances(self) -> Tensor:
        """A class of one sample has a covariance of 0."""
        self.means()
        if self.covariance == "shared":
            return self._shared().to(self.dtype)
        if self.covariance == "full":
            return torch.stack([self._covariance(row).to(self.dtype) for row in range(len(self))])
        return self._variances().to(self.dtype)

    def _variances(self) -> Tensor:
        if self.covariance != "diagonal":
            raise ConfigError("these prototypes keep no covariance: configure covariance='diagonal', 'full' or 'shared'")
        return self._table("scatter") / (self._counts - 1).clamp(min=1)[:, None]

    def _covariance(self, row: int) -> Tensor:
        return self._scatters[row].whole().div_(max(int(self._counts[row]) - 1, 1))

    def _shared(self) -> Tensor:
        return self._scatters[0].whole().div_(max(self._freedom, 1))

    @in_full
    def draw(self, count: int, labels: Tensor | None = None, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Of several prototypes of a class each is drawn from as often as samples joined it, on average.

        A covariance without a Cholesky factor (fewer samples than dimensions) is factorised by its eigenvalues: nothing is added to it,
        and what is drawn lies where the samples did.
        """
        if count < 1:
            raise ConfigError(f"{count} pseudo-features cannot be drawn: at least one")
        means = self.means()
        if self.covariance == "none":
            raise ConfigError("these prototypes keep no covariance to draw with: configure covariance='diagonal', 'full' or 'shared'")
        chosen = self._chosen(labels)
        place = generator.device if generator else self.device
        slots = max(len(self._rows[label]) for label in chosen)
        padded = torch.tensor([self._rows[label] + [-1] * (slots - len(self._rows[label])) for label in chosen], device=self.device)
        if slots == 1:
            rows = padded.expand(-1, count).reshape(-1)
        else:
            shares = torch.where(padded < 0, 0, self._counts[padded]).double().to(place)
            rows = padded.gather(1, shares.multinomial(count, replacement=True, generator=generator).to(self.device)).reshape(-1)
        noise = torch.randn(len(rows), means.shape[1], dtype=means.dtype, device=place, generator=generator).to(self.device)
        if self.covariance == "diagonal":
            noise *= self._variances().sqrt().to(means.dtype)[rows]
        elif self.covariance == "shared":
            noise = noise @ self._root(-1).T
        else:
            order = rows.argsort(stable=True)
            used, sizes = rows[order].unique_consecutive(return_counts=True)
            for row, places in zip(used.tolist(), order.split(sizes.tolist()), strict=True):
                noise[places] = noise[places] @ self._root(row).T
        return noise + means[rows], self._tensor(chosen).repeat_interleave(count)

    def _root(self, row: int) -> Tensor:
        """A matrix whose square is the covariance of a row, or the shared one."""
        roots = self._made.setdefault("roots", {})
        if row not in roots:
            covariance = self._shared() if self.covariance == "shared" else self._covariance(row)
            root, failed = torch.linalg.cholesky_ex(covariance)
            if bool(failed):
                values, vectors = torch.linalg.eigh(covariance)
                root = vectors * values.clamp(min=0).sqrt()
            roots[row] = root.to(self.dtype)
        return roots[row]

    # -- the nearest -----------------------------------------------------------------------------------------------------------

    @in_full
    def nearest(
        self,
        features: Tensor,
        k: int = 1,
        metric: Literal["euclidean", "cosine", "mahalanobis"] = "euclidean",
        shrinkage: tuple[float, float] = (1.0, 1.0),
        correlation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Cosine distance is 1 - cosine; that to or from a zero vector is 1. Mahalanobis distance is the root of FeCAM's.

        Under mahalanobis a class without spread (of one sample, say) is measured with the covariance pooled over all.
        """
        if k < 1:
            raise ConfigError(f"the {k} nearest prototypes cannot be found: at least one")
        means = self.means()
        queries, k = self._features(features).to(means.dtype), min(k, len(means))
        if metric == "mahalanobis":
            distances, rows = self._by_mahalanobis(queries, k, (float(shrinkage[0]), float(shrinkage[1])), correlation)
        elif metric == "cosine":
            unit = normalize(queries, dim=1)
            distances, rows = _closest(unit, self._points("cosine"), k, (~unit.any(dim=1)).to(unit))
        elif metric == "euclidean":
            distances, rows = _closest(queries, self._points("euclidean"), k)
            distances = distances.mul_(2).sqrt_()
        else:
            raise ConfigError(f"unknown metric '{metric}' of prototypes: euclidean, cosine or mahalanobis")
        return distances, self.labels()[rows]

    def _points(self, metric: str) -> _Points:
        if metric not in self._made:
            table = self._table()
            zero = None
            if metric == "cosine":
                table = normalize(table, dim=1)
                zero = (~table.any(dim=1)).to(self.dtype)
            self._made[metric] = _ready(
                table, table.mean(dim=0), self.means().dtype, zero if zero is not None and bool(zero.any()) else None
            )
        return self._made[metric]

    def _by_mahalanobis(self, queries: Tensor, k: int, shrinkage: tuple[float, float], correlation: bool) -> tuple[Tensor, Tensor]:
        if not all(0 <= number < float("inf") for number in shrinkage):
            raise ConfigError(f"shrinkage is two numbers of at least 0, not {shrinkage}")
        key, made = self._made.get("mahalanobis", (None, None))
        if key != (shrinkage, correlation):
            made = self._whitened(shrinkage, correlation)
            self._made["mahalanobis"] = (shrinkage, correlation), made
        if self.covariance == "shared":
            middle, whitening, points = made
            halves, rows = _closest((queries - middle) @ whitening.T, points, k)
            return halves.mul_(2).sqrt_(), rows
        if self.covariance == "diagonal":
            return _closest_scaled(queries, made, k)
        means, parts = self.means(), []
        for x in queries.split(4096):
            table = x.new_empty(len(x), len(means))
            step = max(1, PIECE // max(1, x.numel()))
            for start in range(0, len(means), step):
                part = slice(start, start + step)
                white = torch.bmm(x[None] - means[part, None], made[part].mT)  # (classes, batch, dim)
                table[:, part] = torch.linalg.vector_norm(white, dim=-1).T
            parts.append(_smallest(table, k))
        return _joined(parts)

    def _whitened(self, shrinkage: tuple[float, float], correlation: bool) -> Any:
        """shared: the middle, a matrix W with W'W the inverse, and the whitened prototypes; diagonal: the middle, prototypes and inverse
        variances in float64; full: W of each row  # (prototypes, dim, dim)
        """
        table, dtype = self._table(), self.means().dtype
        middle = table.mean(dim=0)
        if self.covariance == "none":
            raise ConfigError("mahalanobis distance needs a covariance: configure covariance='diagonal', 'full' or 'shared'")
        rounding = 1e-28 * table.square().mean(dim=1)  # a variance of no more than that is none
        highest = float(rounding.max())
        if self.covariance == "shared":
            whitening = self._inverse_root(self._shared(), highest, shrinkage, correlation, "the shared covariance")
            points = (table - middle) @ whitening.T
            return middle.to(dtype), whitening.to(dtype), _ready(points, torch.zeros_like(middle), dtype)
        many = int((self._counts - 1).clamp(min=0).sum())
        if self.covariance == "diagonal":
            variances = self._variances()
            pooled = self._table("scatter").sum(dim=0) / max(many, 1)
            own = variances.mean(dim=1) > rounding
            if not bool(own.all()) and not float(pooled.mean()) > highest:
                raise DataError(NO_SPREAD)
            variances = torch.where(own[:, None], variances, pooled)
            variances = variances + shrinkage[0] * variances.mean(dim=1, keepdim=True)
            flat = (variances <= 0).any(dim=1).nonzero().squeeze(1)
            if len(flat):
                raise self._singular(f"the covariance of class {self._labels[int(flat[0])]}", shrinkage)
            return middle, table - middle, torch.ones_like(variances) if correlation else 1 / variances
        out = torch.empty(len(self), table.shape[1], table.shape[1], dtype=dtype, device=self.device)
        common = None
        for row, low in enumerate(rounding.tolist()):
            covariance = self._covariance(row)
            if float(covariance.diagonal().mean()) > low:
                out[row] = self._inverse_root(covariance, low, shrinkage, correlation, f"the covariance of class {self._labels[row]}")
                continue
            if common is None:
                total = Symmetric(table.shape[1], torch.float64, self.device)
                for scatter in self._scatters:
                    total.plus(scatter)
                pooled = total.whole() / max(many, 1)
                common = self._inverse_root(pooled, highest, shrinkage, correlation, "the covariance pooled over all classes")
            out[row] = common
        return out

    def _inverse_root(self, covariance: Tensor, rounding: float, shrinkage: tuple[float, float], correlation: bool, what: str) -> Tensor:
        """W with W'W the inverse of the covariance, shrunk as FeCAM does."""
        variances = covariance.diagonal().clone()
        if not float(variances.mean()) > rounding:
            raise DataError(NO_SPREAD)
        apart = covariance - variances.diag()
        between = apart.sum() / apart.count_nonzero().clamp(min=1)
        shrunk = apart.add_(shrinkage[1] * between)
        shrunk.diagonal().copy_(variances + shrinkage[0] * variances.mean())
        variances = shrunk.diagonal().clone()
        if not bool((variances > 0).all()):
            raise self._singular(what, shrinkage)
        if correlation:
            deviations = variances.sqrt()
            shrunk.div_(deviations).div_(deviations[:, None])
            variances = torch.ones_like(variances)
        root, failed = torch.linalg.cholesky_ex(shrunk)
        own = root.diagonal().square() / variances  # what of each variance the dimensions before it do not explain
        if bool(failed) or not bool((own > 1e-15 * len(own)).all()):
            raise self._singular(what, shrinkage)
        return torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype, device=root.device), upper=False)

    def _singular(self, what: str, shrinkage: tuple[float, float]) -> ConfigError:
        return ConfigError(
            f"{what} cannot be inverted with shrinkage ({shrinkage[0]:g}, {shrinkage[1]:g}), in {self.dim} dimensions: raise the first of "
            "the two, which adds to the variances"
        )

    # -- checks, rows, and the state -------------------------------------------------------------------------------------------

    def _features(self, features: Tensor) -> Tensor:
        features = features.detach().to(self.device)
        if features.dim() != 2 or not features.shape[1]:
            raise DataError(f"features are {tuple(features.shape)}, and prototypes take (batch, dimensions)")
        if self.dim not in (None, features.shape[1]):
            raise DataError(f"features have {features.shape[1]} dimensions and the prototypes {self.dim}")
        refuse_not_finite(features)
        return features

    def _classes(self, labels: Tensor, count: int) -> Tensor:
        labels = labels.detach().to(self.device)
        if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
            raise DataError(f"{count} features need as many labels, whole numbers: these are {tuple(labels.shape)} of {labels.dtype}")
        labels = labels.long()
        if bool((labels < 0).any()):
            rows = (labels < 0).nonzero().squeeze(1)
            raise DataError(f"{len(rows)} labels are below 0 (rows {rows[:5].tolist()}): a class is numbered from 0")
        return labels

    def _chosen(self, labels: Tensor | None) -> list[int]:
        if labels is None:
            return list(self._rows)
        asked: list[int] = labels.reshape(-1).tolist()
        unknown = [label for label in asked if label not in self._rows]
        if unknown or not asked:
            raise DataError(f"classes {unknown[:5]} have no prototype" if unknown else "no class was named")
        return asked

    def _pieces(self, features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rows = max(1, PIECE // features.shape[1])
        for x, y in zip(features.split(rows), labels.split(rows), strict=True):
            yield x.double(), y

    def _tensor(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self.device)

    def _begin(self, dim: int, dtype: torch.dtype) -> None:
        self.dtype = self.dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        for name in () if self._tables else ("means", "scatter") if self.covariance == "diagonal" else ("means",):
            self._tables[name] = torch.zeros(0, dim, dtype=torch.float64, device=self.device)
        if self.covariance == "shared" and not self._scatters:
            self._scatters = [Symmetric(dim, torch.float64, self.device)]

    def _append(self, labels: Sequence[int]) -> None:
        """Rows for prototypes that are new, of no sample yet."""
        for row, label in enumerate(labels, len(self)):
            self._rows.setdefault(label, []).append(row)
        self._labels.extend(labels)
        self._counts = torch.cat([self._counts, self._counts.new_zeros(len(labels))])
        for name, table in self._tables.items():
            if len(table) < len(self):  # twice as many, so that classes that come one by one do not copy them all each time
                wider = table.new_zeros(max(len(self), 2 * len(table)), table.shape[1])
                wider[: len(table)] = table
                self._tables[name] = wider
        if self.covariance == "full":
            self._scatters += [Symmetric(self._tables["means"].shape[1], torch.float64, self.device) for _ in labels]

    def _drop_empty(self) -> None:
        kept = self._counts > 0
        if bool(kept.all()):
            return
        rows = kept.nonzero().squeeze(1)
        for name in self._tables:
            self._tables[name] = self._table(name)[rows]
        self._counts = self._counts[rows]
        left = rows.tolist()
        if self.covariance == "full":
            self._scatters = [self._scatters[row] for row in left]
        self._number([self._labels[row] for row in left])

    def _number(self, labels: list[int]) -> None:
        self._labels, self._rows = labels, {}
        for row, label in enumerate(labels):
            self._rows.setdefault(label, []).append(row)

    def nbytes(self) -> int:
        """The statistics; what is made of them and kept until they change is not counted, and not saved."""
        tables = sum(self._table(name).numel() for name in self._tables)
        return 8 * (tables + 2 * len(self)) + sum(scatter.nbytes() for scatter in self._scatters)

    def state(self) -> dict[str, Any]:
        """A copy; the scatters of a full covariance each on their own, so that those of classes that rest stay the same on disk."""
        return {
            "covariance": self.covariance,
            "per_class": self.per_class,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "labels": torch.tensor(self._labels, dtype=torch.int64),
            "counts": self._counts.clone(),
            "tables": {name: self._table(name).clone() for name in self._tables},
            "scatters": [scatter.state() for scatter in self._scatters],
            "freedom": self._freedom,
        }

    @in_full
    def restore(self, state: Mapping[str, Any]) -> None:
        self.covariance, self.per_class = state["covariance"], int(state["per_class"])
        self.dtype = None if state["dtype"] is None else getattr(torch, state["dtype"])
        self.clear()
        self._number(state["labels"].tolist())
        self._counts = state["counts"].to(self.device, copy=True)
        self._tables = {name: table.to(self.device, copy=True) for name, table in state["tables"].items()}
        for bands in state["scatters"]:
            self._scatters.append(Symmetric(bands[0].shape[1], torch.float64, self.device))
            self._scatters[-1].restore(bands)
        self._freedom = int(state["freedom"])


def _ready(table: Tensor, middle: Tensor, dtype: torch.dtype, zero: Tensor | None = None) -> _Points:
    points = table - middle
    halves = points.square().sum(dim=1) / 2
    return _Points(points.to(dtype), middle.to(dtype), (halves if zero is None else halves + zero / 2).to(dtype), zero)


def _closest(queries: Tensor, ready: _Points, k: int, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Half the squared distances to the k nearest, smallest first, and their rows; a half more for each of the two without a direction."""
    points, middle, halves, flat = ready
    queries = queries - middle
    if flat is None and _suits_faiss(queries):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())  # FAISS has a number of threads of its own
        found = faiss.knn(queries.numpy(), points.numpy(), k)
        values, rows = torch.from_numpy(found[0]).div_(2), torch.from_numpy(found[1])
    else:
        pieces = queries.split(max(1, TABLE // len(points)))
        values, rows = _joined([_smallest(torch.addmm(halves, x, points.T, alpha=-1), k) for x in pieces])
        values += queries.square().sum(dim=1, keepdim=True).div_(2)
    few = rows[:, :FEW]
    values[:, :FEW] = _from_differences(queries, points, few).div_(2)
    if flat is not None:
        values[:, :FEW] += flat[few] / 2
    if zero is not None:
        values += zero[:, None] / 2
    return _sorted(values.clamp_(min=0), rows)


def _closest_scaled(queries: Tensor, ready: tuple[Tensor, Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The same with a scale for each dimension of each prototype; in float64, since the squares of two numbers are apart here."""
    middle, points, scale = ready
    dtype, queries = queries.dtype, queries.double() - middle
    scaled = points * scale
    lengths = (scaled * points).sum(dim=1)
    pieces = queries.split(max(1, TABLE // len(points)))
    values, rows = _joined([_smallest(torch.addmm(lengths, x, scaled.T, alpha=-2).addmm_(x.square(), scale.T), k) for x in pieces])
    values[:, :FEW] = _from_differences(queries, points, rows[:, :FEW], scale)
    distances, rows = _sorted(values.clamp_(min=0), rows)
    return distances.sqrt_().to(dtype), rows


def _from_differences(queries: Tensor, points: Tensor, rows: Tensor, scale: Tensor | None = None) -> Tensor:
    """Squared distances of the rows found  # (batch, k)"""
    piece = max(1, PIECE // max(1, rows.shape[1] * points.shape[1]))
    if len(queries) > piece:
        pairs = zip(queries.split(piece), rows.split(piece), strict=True)
        return torch.cat([_from_differences(x, points, chosen, scale) for x, chosen in pairs])
    squares = points[rows].sub_(queries[:, None]).square_()
    return (squares if scale is None else squares.mul_(scale[rows])).sum(dim=-1)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([values for values, _ in parts]), torch.cat([rows for _, rows in parts])


def _smallest(table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k == 1:
        values, rows = table.min(dim=1, keepdim=True)
    else:
        values, rows = table.topk(k, largest=False)
    return values, rows


def _sorted(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    if values.shape[1] == 1:
        return values, rows
    values, order = values.sort(dim=1, stable=True)
    return values, rows.gather(1, order)


def _suits_faiss(queries: Tensor) -> bool:
    """Where FAISS was measured to be faster than a product of matrices: a few queries, and as many as it makes products of itself."""
    if queries.device.type != "cpu" or queries.dtype != torch.float32:
        return False
    return 1 <= len(queries) <= 4 or queries.numel() >= 2**17
