"""Analytic statistics: the ridge regression on all data so far, in closed form, the same however the stream is cut.

accumulated: X'X and X'Y are summed, and W = (X'X + ridge I)^-1 X'Y is solved by Cholesky when the weights are asked for, once until the
    next update. Rows are gathered until there are `GATHER` of them, so that a stream of small batches costs what large ones cost; X'X is
    therefore summed over the same runs of rows whatever the batches were. Asking for weights leaves the sums as they are. The rows not
    yet summed (fewer than `GATHER`) are part of the state.
recursive: R = (X'X + ridge I)^-1 and W are kept. A batch X, Y costs one factorisation of its own size,
    L L' = I + X R X'    V = L^-1 X R    R <- R - V'V    W <- W + V' L^-1 (Y - X W)
    (Woodbury), or two of the features' size where it has more rows than features. Taking back is the same with I - X R X' and the signs
    turned. Rounding grows with the condition of X'X: in float32 only for well-conditioned features and short streams.

Symmetric matrices are kept as the upper half (`Symmetric`). Everything stays on the device of the memory; what is read back from it per
update is whether the features are finite and the labels in range. (The code has no branch for a GPU, and was not run on one.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from streamcl.contracts import AnalyticStatistics
from streamcl.errors import ConfigError, DataError

Form = Literal["accumulated", "recursive"]
Method = TypeVar("Method", bound=Callable[..., Any])

GATHER = 128  # rows: more bring no speed, on features of any size measured
PIECE = 4096  # rows at a time of a large batch, so that its copy in float64 stays small


def in_full(method: Method) -> Method:
    """Statistics are ordinary tensors of their own precision, also where the caller is under autocast or in inference mode."""

    @wraps(method)
    def plainly(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled(self.device.type):
            return method(self, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, plainly)


class Symmetric:
    """A symmetric matrix as the bands of its upper half: little more than half of the memory, and half of the work, of the whole."""

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dim = dim
        height = max(128, -(-dim // 128) * 8)  # 16 bands at most: lower ones cost calls, higher ones work done twice
        self.bands = [_zeros(min(height, dim - start), dim - start, dtype, device) for start in range(0, dim, height)]

    def _places(self) -> Iterator[tuple[int, int, Tensor]]:
        start = 0
        for band in self.bands:
            yield start, start + len(band), band
            start += len(band)

    def add(self, x: Tensor, times: float = 1.0) -> None:
        """Add times * x'x, in place  # x (rows, dim)"""
        for start, end, band in self._places():
            band.addmm_(x[:, start:end].T, x[:, start:], alpha=times)

    def plus(self, other: Symmetric, times: float = 1.0) -> None:
        for band, theirs in zip(self.bands, other.bands, strict=True):
            band.add_(theirs.to(band), alpha=times)

    def scale(self, factor: float) -> None:
        for band in self.bands:
            band.mul_(factor)

    def put(self, whole: Tensor) -> None:
        """Become this matrix, of which the upper half is read."""
        for start, end, band in self._places():
            band.copy_(whole[start:end, start:])

    def whole(self) -> Tensor:
        """(dim, dim), symmetric to the last bit"""
        out = self.bands[0].new_empty(self.dim, self.dim)
        for start, end, band in self._places():
            out[start:end, start:] = band
            out[start:, start:end] = band.T
            block = band[:, : end - start]
            out[start:end, start:end] = block.triu() + block.triu(1).T
        return out

    def diagonal(self) -> Tensor:
        return torch.cat([band.diagonal() for band in self.bands])

    def left(self, x: Tensor) -> Tensor:
        """x times the matrix  # (rows, dim)"""
        out = torch.zeros_like(x)
        for start, end, band in self._places():
            out[:, start:].addmm_(x[:, start:end], band)
            out[:, start:end].addmm_(x[:, end:], band[:, end - start :].T)
        return out

    def nbytes(self) -> int:
        return sum(band.untyped_storage().nbytes() for band in self.bands)

    def state(self) -> list[Tensor]:
        return [band.clone() for band in self.bands]

    def restore(self, bands: list[Tensor]) -> None:
        for band, saved in zip(self.bands, bands, strict=True):
            band.copy_(saved)


def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows that lie a little further apart than they are long: at distances of a power of two they drive each other out of the caches."""
    return torch.zeros(rows, columns + 8, dtype=dtype, device=device)[:, :columns]


def refuse_not_finite(values: Tensor, what: str = "features") -> None:
    """A DataError that names the rows with NaN or infinite values. Where all is well it costs one sum."""
    if math.isfinite(values.sum().item()):  # one NaN or infinity among the terms never sums to a finite number
        return
    bad = ~torch.isfinite(values).flatten(1).all(dim=1)
    if bool(bad.any()):
        raise DataError(f"{int(bad.sum())} {what} are NaN or infinite (rows {bad.nonzero().squeeze(1)[:5].tolist()})")


class Analytic:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._empty()

    def _empty(self) -> None:
        self.form: Form | None = None
        self.dim = 0
        self.ridge = 0.0
        self.count = 0  # samples taken in
        self.dtype = torch.float64
        self._matrix: Symmetric | None = None  # accumulated: X'X without the rows still gathered; recursive: R
        self._columns = torch.empty(0, 0, device=self.device)  # accumulated: (X'Y)'; recursive: W'  # (classes, dim)
        self._gathered = torch.empty(
            0, 0, device=self.device
        )  # accumulated: rows to be summed  # (GATHER, dim), of which the first `_rows`
        self._rows = 0
        self._solved: tuple[float, Tensor] | None = None  # the ridge that was asked for last, and the weights at it

    @in_full
    def configure(self, dim: int, ridge: float, dtype: torch.dtype = torch.float64, form: Form = "accumulated") -> None:
        if dim < 1:
            raise ConfigError(f"the analytic statistics need at least one feature: dim is {dim}")
        _check_ridge(ridge)
        if dtype not in (torch.float64, torch.float32):
            raise ConfigError(f"the analytic statistics are kept in float64 or float32, not in {dtype}")
        if form not in ("accumulated", "recursive"):
            raise ConfigError(f"unknown form '{form}' of the analytic statistics: accumulated or recursive")
        if (self.dim, self.ridge, self.dtype, self.form) != (dim, ridge, dtype, form):
            self._make(dim, ridge, dtype, form)

    def _make(self, dim: int, ridge: float, dtype: torch.dtype, form: Form) -> None:
        self.dim, self.ridge, self.dtype, self.form = dim, float(ridge), dtype, form
        self.count = self._rows = 0
        self._solved = None
        self._matrix = Symmetric(dim, dtype, self.device)
        if form == "recursive":
            self._matrix.put(torch.eye(dim, dtype=dtype, device=self.device) / ridge)
        self._columns = torch.zeros(0, dim, dtype=dtype, device=self.device)
        self._gathered = _zeros(GATHER if form == "accumulated" else 0, dim, dtype, self.device)

    def _statistics(self) -> Symmetric:
        if self._matrix is None:
            raise DataError("the analytic statistics were not configured with their size")
        return self._matrix

    @property
    def classes(self) -> int:
        return len(self._columns)

    # -- taking in and taking back ---------------------------------------------------------------------------------------------

    @in_full
    def update(self, features: Tensor, labels: Tensor, classes: int) -> None:
        """Labels are below `classes`; targets  # (batch, columns) are taken as numbers, and 0 in the columns that they lack."""
        matrix = self._statistics()
        features, labels = self._checked(features, labels, classes)
        self._widen(classes)
        if self.form == "recursive":
            self._recurse(matrix, features, labels, taken=1)
        else:
            start = 0
            while start < len(features):
                take = min(GATHER - self._rows, len(features) - start)
                x = self._gathered[self._rows : self._rows + take]
                x.copy_(features[start : start + take])
                self._cross(x, labels[start : start + take], taken=1)
                self._rows += take
                start += take
                if self._rows == GATHER:
                    self._sum_gathered(matrix)
        self.count += len(features)
        self._solved = None

    @in_full
    def remove(self, features: Tensor, labels: Tensor) -> None:
        matrix = self._statistics()
        features, labels = self._checked(features, labels, self.classes)
        if len(features) > self.count:
            raise DataError(f"{len(features)} samples cannot be taken back from analytic statistics of {self.count}")
        if len(features) == self.count:  # what nothing is left of is known without rounding
            columns = self.classes
            self._make(self.dim, self.ridge, self.dtype, self.form or "accumulated")
            self._widen(columns)
            return
        if self.form == "recursive":
            self._recurse(matrix, features, labels, taken=-1)
        else:
            self._sum_gathered(matrix)
            self._gathered.zero_()  # nothing of a sample that was taken back stays
            for x, y in _pieces(features, labels, self.dtype, PIECE):
                matrix.add(x, -1.0)
                self._cross(x, y, taken=-1)
        self.count -= len(features)
        self._solved = None

    @in_full
    def settle(self) -> None:
        """Sum what is still gathered: nothing is left of single samples."""
        if self.form == "accumulated" and self._rows:
            self._sum_gathered(self._statistics())
            self._gathered.zero_()
            self._solved = None

    def _sum_gathered(self, matrix: Symmetric) -> None:
        matrix.add(self._gathered[: self._rows])
        self._rows = 0

    def _cross(self, x: Tensor, targets: Tensor, taken: int) -> None:
        if targets.dim() == 1:
            self._columns.index_add_(0, targets, x, alpha=taken)
        else:
            self._columns[: targets.shape[1]].addmm_(targets.to(x).T, x, alpha=taken)

    def _recurse(self, matrix: Symmetric, features: Tensor, targets: Tensor, taken: int) -> None:
        rows = max(PIECE, self.dim + 1)
        kept = (matrix.state(), self._columns) if len(features) > rows else None
        try:
            for x, y in _pieces(features, targets, self.dtype, rows):
                self._step(matrix, x, y, taken)
        except DataError:
            if kept is not None:  # all the pieces or none
                matrix.restore(kept[0])
                self._columns = kept[1]
            raise

    def _step(self, matrix: Symmetric, x: Tensor, targets: Tensor, taken: int) -> None:
        residual = -(x @ self._columns.T)  # (batch, classes)
        if targets.dim() == 1:
            residual[torch.arange(len(x), device=x.device), targets] += 1
        else:
            residual[:, : targets.shape[1]] += targets.to(x)
        if len(x) <= self.dim:
            xr = matrix.left(x)
            gain = (xr @ x.T) * taken  # (batch, batch)
            gain.diagonal().add_(1)
            factor = self._factor(gain)
            v = torch.linalg.solve_triangular(factor, xr, upper=False)
            matrix.add(v, -taken)
            step = torch.linalg.solve_triangular(factor, residual, upper=False).T @ v  # (classes, dim)
        else:
            squares = torch.cholesky_inverse(self._factor(matrix.whole()))
            squares.addmm_(x.T, x, alpha=taken)
            factor = self._factor(squares)
            matrix.put(torch.cholesky_inverse(factor))
            step = torch.cholesky_solve(x.T @ residual, factor).T
        self._columns = self._columns + taken * step

    def _factor(self, matrix: Tensor, ridge: float | None = None) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            raise DataError(
                f"the analytic statistics of {self.count} samples cannot be solved at ridge {self.ridge if ridge is None else ridge:g} in "
                f"{_plain(self.dtype)}: a larger ridge or float64 is needed, or samples are taken back that never came in"
            )
        return factor

    # -- what it says ----------------------------------------------------------------------------------------------------------

    @in_full
    def weights(self, ridge: float | None = None) -> Tensor:
        matrix = self._statistics()
        wanted = self.ridge if ridge is None else float(ridge)
        _check_ridge(wanted)
        if self.form == "recursive" and wanted != self.ridge:
            raise ConfigError(
                f"the recursive form holds the solution at ridge {self.ridge:g} alone: the accumulated form can be asked for {wanted:g}"
            )
        if self._solved is None or self._solved[0] != wanted:
            solution = self._columns.T
            if self.form == "accumulated" and self.classes and self.count:
                solution = torch.cholesky_solve(solution, self._factor(self._squares(matrix, wanted), wanted))
            self._solved = wanted, solution.contiguous()
        return self._solved[1]

    @property
    def inverse(self) -> Tensor:
        """R = (X'X + ridge I)^-1  # (dim, dim): the recursion's own matrix, and worked out in the accumulated form."""
        matrix = self._statistics()
        if self.form == "recursive":
            return matrix.whole()
        return torch.cholesky_inverse(self._factor(self._squares(matrix, self.ridge)))

    def _squares(self, matrix: Symmetric, ridge: float) -> Tensor:
        """X'X + ridge I of everything, the rows still gathered among it."""
        gathered = self._gathered[: self._rows]
        squares = matrix.whole()
        squares.addmm_(gathered.T, gathered)
        squares.diagonal().add_(ridge)
        return squares

    @in_full
    def merge(self, other: AnalyticStatistics) -> None:
        """Exact where both are accumulated. What is recursive is turned into sums first: exact up to the rounding of an inverse."""
        matrix = self._statistics()
        if not isinstance(other, Analytic):
            raise ConfigError(f"analytic statistics merge with their own kind, not with {type(other).__name__}")
        theirs = other._statistics()
        if other.dim != self.dim:
            raise DataError(f"analytic statistics of {other.dim} features do not merge with those of {self.dim}")
        columns = other.classes
        self._widen(columns)
        if self.form == "accumulated":
            if other.form == "accumulated":
                rows, cross = other._gathered[: other._rows].to(self._gathered), other._columns.to(self._columns)
                matrix.plus(theirs)
                matrix.add(rows)
            else:
                squares, cross = other._sums(theirs)
                again = Symmetric(self.dim, self.dtype, self.device)
                again.put(squares)
                matrix.plus(again)
            self._columns[:columns].add_(cross.to(self._columns))
        else:
            squares, cross = self._sums(matrix)
            their_squares, their_cross = other._sums(theirs)
            squares.add_(their_squares.to(squares)).diagonal().add_(self.ridge)
            cross[:columns].add_(their_cross.to(cross))
            factor = self._factor(squares)
            matrix.put(torch.cholesky_inverse(factor))
            self._columns = torch.cholesky_solve(cross.T, factor).T.contiguous()
        self.count += other.count
        self._solved = None

    def _sums(self, matrix: Symmetric) -> tuple[Tensor, Tensor]:
        """X'X and (X'Y)' of everything, each a copy."""
        if self.form == "accumulated":
            return self._squares(matrix, 0.0), self._columns.clone()
        squares = torch.cholesky_inverse(self._factor(matrix.whole()))
        cross = self._columns @ squares
        squares.diagonal().sub_(self.ridge)
        return squares, cross

    # -- checks, and the state -------------------------------------------------------------------------------------------------

    def _checked(self, features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        features, labels = features.detach().to(self.device), labels.detach().to(self.device)
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise DataError(f"features are {tuple(features.shape)}, and the analytic statistics take (batch, {self.dim})")
        if labels.dim() not in (1, 2) or len(labels) != len(features):
            raise DataError(f"{len(features)} features have labels of {tuple(labels.shape)}: one label, or one row of targets, for each")
        refuse_not_finite(features)
        whole = not (labels.is_floating_point() or labels.is_complex())
        if labels.dim() == 2:
            if labels.shape[1] > classes:
                raise DataError(f"targets have {labels.shape[1]} columns, more than the {classes} classes")
            refuse_not_finite(labels, "targets")
            if whole and bool((labels < 0).any()):
                rows = (labels < 0).any(dim=1).nonzero().squeeze(1)
                raise DataError(
                    f"{len(rows)} targets have -1, not annotated (rows {rows[:5].tolist()}): the regression needs a number in every "
                    "column (give targets that are numbers as floats)"
                )
        elif not whole:
            raise DataError(f"labels are whole numbers, not {_plain(labels.dtype)} (targets have one column for each class)")
        elif len(labels):
            labels = labels.long()
            if int(labels.min()) < 0 or int(labels.max()) >= classes:
                unknown = labels[(labels < 0) | (labels >= classes)].unique()[:5].tolist()
                raise DataError(f"labels {unknown} are not among the {classes} classes: labels go from 0 to {classes - 1}")
        return features, labels

    def _widen(self, classes: int) -> None:
        """Columns for new classes: zeros, which is what they have in common with all that came before."""
        more = classes - self.classes
        if more > 0:
            self._columns = torch.cat([self._columns, self._columns.new_zeros(more, self.dim)])
            self._solved = None

    def nbytes(self) -> int:
        tensors = sum(tensor.untyped_storage().nbytes() for tensor in (self._columns, self._gathered))
        return tensors + (self._matrix.nbytes() if self._matrix else 0)

    def state(self) -> dict[str, Any]:
        """A copy of what must be found again; the solution is not among it, since it follows from the rest."""
        if self._matrix is None:
            return {"form": None}
        return {
            "form": self.form,
            "dim": self.dim,
            "ridge": self.ridge,
            "dtype": _plain(self.dtype),
            "count": self.count,
            "matrix": self._matrix.state(),
            "columns": self._columns.clone(),
            "gathered": self._gathered[: self._rows].clone(),
        }

    @in_full
    def restore(self, state: Mapping[str, Any]) -> None:
        form: Form | None = state["form"]
        if form is None:
            self._empty()
            return
        if self.form not in (None, form):
            raise ConfigError(
                f"the saved analytic statistics are of the {form} form and cannot go on in the {self.form} form: configure form='{form}'"
            )
        self._make(int(state["dim"]), float(state["ridge"]), getattr(torch, state["dtype"]), form)
        self._statistics().restore(state["matrix"])
        self._columns = state["columns"].to(self.device, copy=True)
        self.count, self._rows = int(state["count"]), len(state["gathered"])
        self._gathered[: self._rows] = state["gathered"].to(self.device)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_ridge(ridge: float) -> None:
    if not 0 < ridge < float("inf"):
        raise ConfigError(f"the ridge is {ridge}: it must be above 0")


def _pieces(features: Tensor, labels: Tensor, dtype: torch.dtype, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in zip(features.split(rows), labels.split(rows), strict=True):
        yield x.to(dtype), y
