"""A flat FAISS index over vectors, by sample id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcl.errors import DataError


class FlatIndex:
    """Exact search by Euclidean distance."""

    def __init__(self, dim: int) -> None:
        import faiss

        self.dim = dim
        self.index = faiss.IndexIDMap2(faiss.IndexFlatL2(dim))

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def _checked(self, vectors: Tensor) -> np.ndarray:
        values = vectors.detach().to("cpu", torch.float32).contiguous().numpy()
        if values.ndim != 2 or values.shape[1] != self.dim:
            raise DataError(f"vectors of shape {tuple(values.shape)} do not fit an index of {self.dim} dimensions")
        if not np.isfinite(values).all():
            raise DataError(f"{int((~np.isfinite(values).all(axis=1)).sum())} vectors are NaN or infinite")
        return values

    def ids(self) -> np.ndarray:
        import faiss

        return faiss.vector_to_array(self.index.id_map)

    def add(self, ids: Tensor, vectors: Tensor) -> None:
        values, keys = self._checked(vectors), ids.cpu().numpy().astype(np.int64)
        if len(np.unique(keys)) != len(keys) or np.isin(keys, self.ids()).any():
            raise DataError("an id is in the index already, or twice in one call")
        self.index.add_with_ids(values, keys)

    def remove(self, ids: Tensor) -> int:
        return int(self.index.remove_ids(ids.cpu().numpy().astype(np.int64)))  # type: ignore[arg-type]

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, found = self.index.search(self._checked(queries), k)
        return torch.from_numpy(distances), torch.from_numpy(found)

    def nbytes(self) -> int:
        return len(self) * (self.dim * 4 + 8)

    def state(self) -> dict[str, Any]:
        vectors = self.index.index.reconstruct_n(0, len(self)) if len(self) else np.zeros((0, self.dim), np.float32)
        return {"dim": self.dim, "ids": torch.from_numpy(self.ids().copy()), "vectors": torch.from_numpy(vectors)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.index.reset()
        if len(state["ids"]):
            self.add(state["ids"], state["vectors"])
