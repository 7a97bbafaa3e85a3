"""Exact search among vectors that lie in one tensor, on the device where they are: FAISS on a CPU, FAISS or chunked torch on a GPU.

The FAISS of a machine may know no GPU (its GPU build needs CUDA 12 libraries). There torch multiplies queries with one block of vectors
after another and keeps the best k of each: nothing is copied to the host on the way. What runs on a GPU here is written to the
documented interfaces of FAISS and torch and was tested on a CPU only, with FAISS's GPU functions replaced; nothing was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import faiss as typed_faiss
import numpy as np
import torch
from torch import Tensor

from streamcl.contracts import Metric

faiss: Any = typed_faiss  # its stubs leave out half of what is used here

Engine = Literal["faiss", "faiss gpu", "torch"]
Part = tuple[Tensor | int, Tensor, Tensor | None]  # rows (or the first of consecutive ones), vectors, their squared lengths if known

SCORES = 2**24  # distances that a block computes at once: 64 MB of them
QUERIES = 4096  # searched at once by torch
FEW = 20  # FAISS takes fewer queries than this one by one, reading only what is selected, and more by matrix product
GPU_FUNCTIONS = ("StandardGpuResources", "GpuDistanceParams", "GpuClonerOptions", "bfKnn", "index_cpu_to_gpu", "index_gpu_to_cpu")
GPU_MOST = 2048  # neighbours that FAISS finds on a GPU


def faiss_gpus() -> int:
    """How many GPUs FAISS can use here: none where it was built without them, or where their libraries or driver are missing."""
    if not all(hasattr(faiss, name) for name in GPU_FUNCTIONS):
        return 0
    try:
        return int(faiss.get_num_gpus())
    except Exception:  # whatever a half-installed CUDA raises: there is no GPU for FAISS then
        return 0


def engine_for(device: torch.device, dtype: torch.dtype) -> Engine:
    if dtype != torch.float32:
        return "torch"  # FAISS would round the queries to the type of the vectors
    if device.type == "cpu":
        return "faiss"
    return "faiss gpu" if device.type == "cuda" and faiss_gpus() > (device.index or 0) else "torch"


class Vectors:
    """Rows of one growing tensor. What is dropped is overwritten."""

    def __init__(self, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self.buffer = torch.empty(0, dim, device=device, dtype=dtype)
        self.count = 0
        self.engine = engine_for(device, dtype)
        self.squares = torch.empty(0, device=device)  # squared lengths, of the first `known` rows
        self.known = 0

    def view(self) -> Tensor:
        return self.buffer[: self.count]

    def append(self, values: Tensor) -> None:
        needed = self.count + values.shape[0]
        if needed > self.buffer.shape[0]:
            # Room for as many again, so that adding bit by bit copies each vector a few times at most. On a CPU, room that nothing was
            # written to takes no memory; on a GPU it does.
            room = self.count * 2 if self.buffer.device.type == "cpu" else self.count * 3 // 2
            grown = self.buffer.new_empty(max(needed, room), self.buffer.shape[1])
            grown[: self.count] = self.view()
            self.buffer = grown
        if self.engine == "faiss":
            self.buffer.numpy()[self.count : needed] = values.numpy()  # wakes no threads that FAISS would have to wait for
        else:
            self.buffer[self.count : needed] = values
        self.count = needed

    def put(self, rows: Tensor, values: Tensor) -> None:
        self.buffer[rows] = values.to(self.buffer.dtype)
        self.known = min(self.known, int(rows.min()))

    def drop(self, holes: Tensor, movers: Tensor, count: int) -> None:
        """Keep `count` rows: the last ones (`movers`) go where the `holes` are."""
        if len(holes):
            self.buffer[holes] = self.buffer[movers]
            self.known = min(self.known, int(holes.min()))
        if 4 * count < len(self.buffer):
            self.buffer = self.buffer[:count].clone()
        else:
            self.buffer[count : self.count] = 0
        self.count, self.known = count, min(self.known, count)

    def lengths(self) -> Tensor:
        """The squared length of each row, computed once."""
        if self.known < self.count:
            if len(self.squares) < self.count:
                self.squares = torch.cat([self.squares[: self.known], self.squares.new_empty(len(self.buffer) - self.known)])
            size = _rows_at_once(self.buffer.shape[1])
            for start in range(self.known, self.count, size):
                stop = min(start + size, self.count)
                if self.engine == "faiss":  # in its own threads, to the last bit what it would compute in each search
                    at = (faiss.cast_integer_to_float_ptr(part[start:].data_ptr()) for part in (self.squares, self.buffer))
                    faiss.fvec_norms_L2sqr(*at, self.buffer.shape[1], stop - start)
                else:
                    self.squares[start:stop] = self.buffer[start:stop].float().square().sum(dim=1)
            self.known = self.count
        return self.squares

    def parts(self, queries: int, metric: Metric) -> Iterator[Part]:
        """Blocks of consecutive rows."""
        squares, size = self.lengths() if metric == "l2" else None, _rows_at_once(queries)
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            yield start, self.buffer[start:stop], None if squares is None else squares[start:stop]

    def chosen(self, rows: Tensor, queries: int) -> Iterator[Part]:
        """Blocks of these rows, copied."""
        for block in rows.split(_rows_at_once(max(queries, self.buffer.shape[1]))):
            yield block, self.buffer[block], None

    def nbytes(self) -> int:
        return self.count * self.buffer.shape[1] * self.buffer.element_size()


def nearest(vectors: Vectors, queries: Tensor, k: int, metric: Metric, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances and rows of the k nearest, of which there are as many, among `rows` where they are given  # (queries, k) each"""
    engine: Engine = "torch" if vectors.engine == "faiss gpu" and k > GPU_MOST else vectors.engine
    if engine == "faiss" and (rows is None or queries.shape[0] < FEW):
        squares = vectors.lengths() if metric == "l2" and queries.shape[0] >= FEW else None
        return _by_faiss(queries, vectors.buffer, vectors.count, k, metric, rows, squares)
    if engine == "faiss gpu" and rows is None:
        return _by_faiss_gpu(queries, vectors.view(), k, metric)
    if len(queries) > QUERIES:
        several = [nearest(vectors, part, k, metric, rows) for part in queries.split(QUERIES)]
        return torch.cat([found[0] for found in several]), torch.cat([found[1] for found in several])
    return among(vectors.parts(len(queries), metric) if rows is None else vectors.chosen(rows, len(queries)), queries, k, metric, engine)


def among(parts: Iterable[Part], queries: Tensor, k: int, metric: Metric, engine: Engine = "torch") -> tuple[Tensor, Tensor]:
    """The k nearest over all parts; row -1 where there are fewer."""
    worst = float("inf") if metric == "l2" else float("-inf")
    distances = queries.new_full((len(queries), k), worst)
    found = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    for rows, vectors, squares in parts:
        most = min(k, len(vectors))
        if engine == "faiss":
            near, columns = _by_faiss(queries, vectors, len(vectors), most, metric, None, squares)
        elif engine == "faiss gpu":
            near, columns = _by_faiss_gpu(queries, vectors, most, metric)
        else:
            with _exactly(queries.device):
                near, columns = _scores(queries, vectors, squares, metric).topk(most, largest=metric != "l2")
                if metric == "l2":
                    near = _squared(queries, near)
        columns = columns + rows if isinstance(rows, int) else rows[columns]
        distances, order = torch.cat([distances, near], dim=1).topk(k, largest=metric != "l2")
        found = torch.cat([found, columns], dim=1).gather(1, order)
    return distances, found


def within(parts: Iterable[Part], queries: Tensor, radius: float, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """Limits, distances and rows of everything nearer than the radius, the nearest of each query first."""
    asked, distances, found = [], [], []
    with _exactly(queries.device):
        for rows, vectors, squares in parts:
            scores = _scores(queries, vectors, squares, metric)
            if metric == "l2":
                scores = _squared(queries, scores)
            query, column = torch.nonzero(scores < radius if metric == "l2" else scores > radius, as_tuple=True)
            asked.append(query)
            distances.append(scores[query, column])
            found.append(column + rows if isinstance(rows, int) else rows[column])
    if not asked:
        none = torch.empty(0, dtype=torch.int64, device=queries.device)
        return torch.zeros(len(queries) + 1, dtype=torch.int64, device=queries.device), queries.new_empty(0), none
    return in_order(torch.cat(asked), torch.cat(distances), torch.cat(found), len(queries), metric)


def in_order(asked: Tensor, distances: Tensor, found: Tensor, queries: int, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """The hits of many queries as limits, distances and rows, the nearest of each query first."""
    order = distances.sort(descending=metric != "l2", stable=True).indices
    order = order[asked[order].sort(stable=True).indices]
    limits = torch.zeros(queries + 1, dtype=torch.int64, device=asked.device)
    limits[1:] = torch.bincount(asked, minlength=queries).cumsum(0)
    return limits, distances[order], found[order]


def _rows_at_once(columns: int) -> int:
    return max(1, SCORES // max(columns, 1))


@contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """Full float32 products, whatever a training loop around has chosen."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def _scores(queries: Tensor, vectors: Tensor, squares: Tensor | None, metric: Metric) -> Tensor:
    """Inner products; for `l2` squared distances less the squared length of the query, which orders them alike."""
    vectors = vectors.float()
    if metric != "l2":
        return queries @ vectors.T
    squares = vectors.square().sum(dim=1) if squares is None else squares
    return torch.addmm(squares, queries, vectors.T, alpha=-2)


def _squared(queries: Tensor, scores: Tensor) -> Tensor:
    return (scores + queries.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def _by_faiss(
    queries: Tensor, vectors: Tensor, count: int, k: int, metric: Metric, rows: Tensor | None, squares: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The functions that FAISS's flat index calls, on the first `count` vectors where they lie."""
    number, dim = queries.shape
    distances, found = np.empty((number, k), np.float32), np.empty((number, k), np.int64)
    asked, held = (faiss.cast_integer_to_float_ptr(tensor.data_ptr()) for tensor in (queries, vectors))
    sizes, out = (dim, number, count, k), (faiss.swig_ptr(distances), faiss.swig_ptr(found))
    lengths = None if squares is None else faiss.cast_integer_to_float_ptr(squares.data_ptr())
    only = None if rows is None else faiss.IDSelectorArray(rows.shape[0], faiss.cast_integer_to_idx_t_ptr(rows.data_ptr()))
    if metric == "l2":
        faiss.knn_L2sqr(asked, held, *sizes, *out, lengths, only)
    else:
        faiss.knn_inner_product(asked, held, *sizes, *out, only)
    return torch.from_numpy(distances), torch.from_numpy(found)


_resources: dict[int, Any] = {}  # FAISS's workspace on each GPU: making one takes long


def resources(device: torch.device) -> Any:
    """FAISS's workspace on a GPU, in step with torch's stream there."""
    number = device.index or 0
    if number not in _resources:
        _resources[number] = faiss.StandardGpuResources()
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        _resources[number].setDefaultStream(number, faiss.cast_integer_to_cudastream_t(stream))
    return _resources[number]


def _by_faiss_gpu(queries: Tensor, vectors: Tensor, k: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """FAISS's brute force on a GPU, on the tensors themselves."""
    distances = torch.empty(len(queries), k, device=queries.device)
    found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    asked = faiss.GpuDistanceParams()
    asked.metric = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    asked.k, asked.dims, asked.device = k, vectors.shape[1], queries.device.index or 0
    asked.vectors, asked.numVectors, asked.vectorsRowMajor = faiss.cast_integer_to_void_ptr(vectors.data_ptr()), len(vectors), True
    asked.queries, asked.numQueries, asked.queriesRowMajor = faiss.cast_integer_to_void_ptr(queries.data_ptr()), len(queries), True
    asked.vectorType = asked.queryType = faiss.DistanceDataType_F32
    asked.outDistances = faiss.cast_integer_to_float_ptr(distances.data_ptr())
    asked.outIndices, asked.outIndicesType = faiss.cast_integer_to_void_ptr(found.data_ptr()), faiss.IndicesDataType_I64
    faiss.bfKnn(resources(queries.device), asked)
    return distances, found
