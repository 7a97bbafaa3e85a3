"""Analytic statistics: the ridge regression on all data so far, kept up to date by recursive least squares in float64.

State: R = (X'X + ridge I)^-1 and W = R X'Y over everything seen. A batch costs one solve of its own size (Woodbury), or one of the
feature size where the batch is the larger; the result is the joint solution, whatever the order, the splitting and the mix of
classes (G-ACIL, NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from streamcl.errors import DataError


class Analytic:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inverse: Tensor | None = None  # R  # (dim, dim)
        self.solution: Tensor | None = None  # W  # (dim, classes)
        self.ridge = 0.0

    def configure(self, dim: int, ridge: float, dtype: torch.dtype = torch.float64) -> None:
        if self.inverse is not None and self.inverse.shape[0] == dim and self.ridge == ridge and self.inverse.dtype == dtype:
            return
        if ridge <= 0:
            raise DataError(f"the ridge is {ridge}: it must be above 0")
        self.ridge = ridge
        self.inverse = torch.eye(dim, dtype=dtype, device=self.device) / ridge
        self.solution = torch.zeros(dim, 0, dtype=dtype, device=self.device)

    def update(self, features: Tensor, labels: Tensor, classes: int) -> None:
        if self.inverse is None or self.solution is None:
            raise DataError("the analytic statistics were not configured with their size")
        x = features.detach().to(self.inverse)  # (batch, dim)
        if not bool(torch.isfinite(x).all()):
            raise DataError("features are NaN or infinite")
        if classes > self.solution.shape[1]:
            self.solution = torch.cat([self.solution, self.solution.new_zeros(len(self.solution), classes - self.solution.shape[1])], dim=1)
        y = one_hot(labels.to(self.device), self.solution.shape[1]).to(x)  # (batch, classes)
        r = self.inverse
        if len(x) <= len(r):
            xr = x @ r
            gain = torch.eye(len(x), dtype=x.dtype, device=x.device) + xr @ x.T
            r = r - xr.T @ torch.linalg.solve(gain, xr)
        else:
            r = torch.linalg.inv(torch.linalg.inv(r) + x.T @ x)
        self.inverse = (r + r.T) / 2
        self.solution = self.solution + self.inverse @ (x.T @ (y - x @ self.solution))

    def weights(self) -> Tensor:
        if self.solution is None:
            raise DataError("the analytic statistics were not configured with their size")
        return self.solution

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.inverse, self.solution) if t is not None)

    def state(self) -> dict[str, Any]:
        return {"inverse": self.inverse, "solution": self.solution, "ridge": self.ridge}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.ridge = float(state["ridge"])
        self.inverse, self.solution = (None if state[k] is None else state[k].to(self.device) for k in ("inverse", "solution"))
