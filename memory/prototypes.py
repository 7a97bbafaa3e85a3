"""Class prototypes: how many samples of each class were seen and their mean, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamcl.errors import DataError


class Prototypes:
    """Rows are classes in order of first appearance; `labels` says which."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        self._labels = torch.empty(0, dtype=torch.int64, device=self.device)
        self._counts = torch.empty(0, dtype=torch.int64, device=self.device)
        self._means: Tensor | None = None

    def update(self, features: Tensor, labels: Tensor) -> None:
        bad = ~torch.isfinite(features).all(dim=1)
        if bool(bad.any()):
            raise DataError(f"{int(bad.sum())} features are NaN or infinite (rows {bad.nonzero().squeeze(1)[:5].tolist()})")
        features, labels = features.detach().to(self.device), labels.to(self.device)
        rows = self._rows(labels, features)
        assert self._means is not None
        counts = torch.bincount(rows, minlength=len(self._labels)).to(self._counts)
        sums = torch.zeros_like(self._means).index_add_(0, rows, features.to(self._means))
        fresh = counts > 0
        total = self._counts + counts
        weight = (counts[fresh].double() / total[fresh]).to(self._means)[:, None]
        old = self._means[fresh]
        batch_means = sums[fresh] / counts[fresh][:, None]
        self._means[fresh] = old + (batch_means - old) * weight
        self._counts = total

    def _rows(self, labels: Tensor, features: Tensor) -> Tensor:
        fresh = labels.unique()
        fresh = fresh[~torch.isin(fresh, self._labels)]
        if self._means is None:
            self._means = torch.zeros(0, features.shape[1], dtype=features.dtype, device=features.device)
        if features.shape[1] != self._means.shape[1]:
            raise DataError(f"features have {features.shape[1]} dimensions and the prototypes {self._means.shape[1]}")
        if len(fresh):
            self._labels = torch.cat([self._labels, fresh])
            self._counts = torch.cat([self._counts, torch.zeros_like(fresh)])
            self._means = torch.cat([self._means, self._means.new_zeros(len(fresh), features.shape[1])])
        order = self._labels.argsort()
        return order[torch.searchsorted(self._labels[order], labels)]

    def set(self, label: int, mean: Tensor, count: int) -> None:
        row = self._rows(torch.tensor([label], device=self.device), mean[None].to(self.device))
        assert self._means is not None
        self._means[row], self._counts[row] = mean.detach().to(self._means), count

    def means(self) -> Tensor:
        if self._means is None:
            raise DataError("there is no prototype yet")
        return self._means

    def labels(self) -> Tensor:
        return self._labels

    def counts(self) -> Tensor:
        return self._counts

    def nearest(self, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        means = self.means()
        distances, rows = torch.cdist(features.to(means), means).topk(min(k, len(means)), largest=False)
        return distances, self._labels[rows]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._labels, self._counts, self._means) if t is not None)

    def state(self) -> dict[str, Any]:
        return {"labels": self._labels, "counts": self._counts, "means": self._means}

    def restore(self, state: Mapping[str, Any]) -> None:
        means = state["means"]
        self._labels, self._counts = state["labels"].to(self.device), state["counts"].to(self.device)
        self._means = None if means is None else means.to(self.device)
