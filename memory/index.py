"""Vectors by sample id on FAISS: any `index_factory` string, exact until an index that must be trained has seen enough.

`Flat` and all that is not trained yet lies in one tensor (`chunked.py`) and is searched exactly where it lies; anything else is a FAISS
index, told to search as far as recall@10 against exact search asks for. That is measured by queries that lie about the vectors held:
queries unlike any of them may be answered less well. `auto` stays exact while that is the cheaper one. Cosine is the inner product of
vectors brought to length one on the way in, which is also what `reconstruct` returns; a vector of zeros stays what it is and has cosine 0
with all.

Ids are any int64 but -1. Inside, a vector has a row: FAISS numbers vectors on its own, and most of its kinds know no ids. What is removed
is overwritten at once. HNSW cannot take a node out of its graph: the node stays as a signpost with the vector of a neighbour, no search
returns it, and the graph is built anew when a third of its nodes are such.

On one thread, and under torch's deterministic algorithms, the same calls build the same index, also across `state` and `restore`; several
threads link an HNSW graph in an order of their own. What runs on a GPU was tested on a CPU only, with FAISS's GPU functions replaced.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import faiss as typed_faiss
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from streamcl.checkpoint import flatten, unflatten
from streamcl.contracts import FeatureIndex, Metric
from streamcl.errors import ConfigError, DataError
from streamcl.seeding import derived
from streamcl.writing import disk_error

from .chunked import FEW, Part, Vectors, among, engine_for, faiss_gpus, in_order, nearest, resources, within

faiss: Any = typed_faiss  # its stubs leave out half of what is used here

POINTS = 39  # per centroid: what FAISS asks for before it trains without a warning
RECALL, NEIGHBOURS, SAMPLED = 0.95, 10, 64  # what a search must find of the true neighbours, measured on so many held vectors
# Exact search or an index, as `tools/bench/memory_index.py --thresholds` measured it on one core at 512 dimensions. Below 20,000 vectors
# exact search of a batch costs at most 0.2 ms a query. Building an index costs what 13,000 to 23,000 queries do, so the searches must have
# come to as much. Up to 200,000 vectors a graph answers in a quarter of the time or less whatever the features are like; from there on
# lists find as much as it does and take new vectors in at a tenth of its cost (0.02 against 0.2 ms).
AUTO_VECTORS, AUTO_QUERIES, AUTO_IVF = 20_000, 20_000, 200_000
ONE_BY_ONE = 7  # a query that comes alone costs exact search as much as so many in a batch
NSG_LEAST = 1000  # vectors: its graph is made of the neighbours of each, which must be there
REFINED = 10  # candidates for each neighbour that `...,RFlat` compares exactly; FAISS's own default compares none beyond the k
LONGEST = 1e37  # squared length: distances between longer vectors do not fit float32
BLOCK = 65_536  # vectors that are read from a FAISS index at once


class Rows:
    """Which sample lies in which row. A hash table in NumPy, so that a batch is looked up and entered as a whole.

    Ids that only grow need no look-up to be known as new: their rows enter the table when it is next asked.
    """

    def __init__(self) -> None:
        self.of = np.full(1, -1, np.int64)  # the id of each row; -1 in rows that hold nothing, and always at the end, where row -1 looks
        self.count = 0  # rows in use or given up
        self.held = 0
        self.highest = -1  # no id was ever higher
        self.free = np.empty(0, np.int64)  # rows to use again
        self.keys, self.row_at = np.full(64, -1, np.int64), np.full(64, -1, np.int32)
        self.taken = 0  # keys ever entered: one that is gone keeps its place
        self.entered = 0  # rows from this one on are not in the table yet
        self.same = 0  # rows before this one have kept their ids since someone set it
        self._before = 0, self.free

    def _home(self, ids: np.ndarray) -> np.ndarray:
        shift = np.uint64(65 - len(self.keys).bit_length())
        return ((ids.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> shift).view(np.int64)

    def _seek(self, ids: np.ndarray) -> np.ndarray:
        """Where each id stands in the table, or could."""
        self._catch_up()
        at = self._home(ids)
        keys = self.keys[at]
        astray = np.flatnonzero((keys != ids) & (keys != -1))
        while len(astray):
            at[astray] = (at[astray] + 1) & (len(self.keys) - 1)
            keys = self.keys[at[astray]]
            astray = astray[(keys != ids[astray]) & (keys != -1)]
        return at

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The row of each id, -1 where there is none."""
        at = self._seek(ids)
        return np.where(self.keys[at] == ids, self.row_at[at], -1).astype(np.int64)

    def _catch_up(self) -> None:
        if self.entered < self.count:
            rows = np.arange(self.entered, self.count)
            self.entered = self.count
            places = self._places(self.of[rows])
            self.row_at[places] = rows

    def _places(self, ids: np.ndarray) -> np.ndarray:
        """A place in the table for each id: its own, or one made for it."""
        if 2 * (self.taken + len(ids)) > len(self.keys):
            self._rehash(len(ids))
        self.taken += len(ids)
        places, todo, at = np.empty(len(ids), np.int64), np.arange(len(ids)), self._home(ids)
        while len(todo):
            wanted = ids[todo]
            empty = self.keys[at] == -1
            self.keys[at[empty]] = wanted[empty]  # of several that want one place, one gets it
            settled = self.keys[at] == wanted
            places[todo[settled]] = at[settled]
            todo, at = todo[~settled], (at[~settled] + 1) & (len(self.keys) - 1)
        return places

    def _rehash(self, more: int) -> None:
        rows = np.flatnonzero(self.of[: self.entered] != -1)
        size = max(64, 1 << (4 * (len(rows) + more) - 1).bit_length() - 1)
        self.keys, self.row_at, self.taken = np.full(size, -1, np.int64), np.full(size, -1, np.int32), 0
        places = self._places(self.of[rows])
        self.row_at[places] = rows

    def enter(self, ids: np.ndarray) -> np.ndarray:
        """Rows for new ids; all of them or, where one is held or comes twice, none."""
        self._before = first, free = self.count, self.free
        if ids[0] > self.highest and not len(free) and bool((ids[1:] > ids[:-1]).all()):
            self._make_room(first + len(ids))
            self.of[first : first + len(ids)] = ids
            self.same, self.highest = min(self.same, first), int(ids[-1])
            rows = np.arange(first, first + len(ids))
        else:
            if (ids == -1).any():
                raise DataError("id -1 stands for no sample: any other number can be one")
            rows = np.concatenate([free[: len(ids)], np.arange(first, first + max(0, len(ids) - len(free)))])
            self._catch_up()
            places = self._places(ids)
            known = self.row_at[places] >= 0
            if known.any():
                raise DataError(f"{_some(ids[known])} in the index already: remove or update them")
            self.row_at[places] = rows
            twice = self.row_at[places] != rows
            if twice.any():
                self.row_at[places] = -1
                raise DataError(f"{_some(ids[twice])} twice in one call")
            self._make_room(first + len(ids))
            self._name(rows, ids)
            self.free, self.highest = free[len(ids) :], max(self.highest, int(ids.max()))
            self.entered = first + max(0, len(ids) - len(free))
        self.count = first + max(0, len(ids) - len(free))
        self.held += len(ids)
        return rows

    def _make_room(self, count: int) -> None:
        if count >= len(self.of):
            self.of = np.concatenate([self.of, np.full(max(count + 1, 2 * len(self.of)) - len(self.of), -1)])

    def _name(self, rows: np.ndarray, ids: np.ndarray | int) -> None:
        self.of[rows] = ids
        self.same = min(self.same, int(rows.min(initial=self.same)))

    def undo(self, rows: np.ndarray) -> None:
        """As before the last `enter`, which gave these rows."""
        self.leave(rows)
        self.count, self.free = self._before
        self.entered = self.count

    def leave(self, rows: np.ndarray, reuse: bool = False) -> None:
        at = self._seek(self.of[rows])
        self.row_at[at] = -1
        self._name(rows, -1)
        self.held -= len(rows)
        if reuse:
            self.free = np.sort(np.concatenate([self.free, rows]))

    def close(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give up these rows; the last ones move into the holes: which holes, and which moved."""
        self.leave(rows)
        left = self.held
        holes, movers = np.sort(rows[rows < left]), left + np.flatnonzero(self.of[left : self.count] != -1)
        self._name(holes, self.of[movers])
        at = self._seek(self.of[holes])
        self.row_at[at] = holes
        self.of[left : self.count] = -1
        self.count = self.entered = left
        return holes, movers

    def fill(self, ids: np.ndarray) -> None:
        """These ids in rows 0, 1, ...; -1 for a row that holds nothing."""
        self.of, self.same = np.append(ids, np.int64(-1)), 0
        self.count = self.entered = len(ids)
        self.held, self.free, self.highest = int((ids != -1).sum()), np.empty(0, np.int64), int(ids.max(initial=-1))
        self._rehash(0)

    def live(self) -> np.ndarray:
        return np.flatnonzero(self.of[: self.count] != -1)


class Structure:
    """A FAISS index whose entries are numbered by row.

    `family` says how it gives up a row: `lists` (IVF) forget it, of a `graph` (HNSW) it stays as a signpost, `packed` ones close the gap;
    the `rigid` rest is filled anew. `place` is the GPU that it is searched on, "all" of them, or None: it lies there or here, not in both.
    """

    def __init__(self, kind: str, dim: int, metric: Metric, place: torch.device | str | None = None, float16: bool = False) -> None:
        self.kind, self.metric, self.place, self.float16 = kind, metric, place, float16
        self.width = 0  # how many lists or nodes a search visits; 0: the kind has nothing to choose
        self.gpu: Any = None
        self.index: Any  # this and the next four: None while it lies on a GPU
        self.core: Any  # without the transforms before it
        self.storage: Any  # where a graph keeps its vectors
        self.lists: Any  # where IVF keeps its
        self.wide: Any  # the part that a width can be chosen for
        self.trained = torch.empty(0, dtype=torch.uint8)  # what it is when it is trained and empty
        self._adopt(made(kind, dim, metric))
        self.enough = points_to_train(self.index, dim)  # how many vectors it must have seen
        self.least = self.enough if isinstance(self.core, faiss.IndexNSG) else 0  # how many it must hold
        if self.index.is_trained:
            self.trained = _serialized(self.index)

    def _adopt(self, index: Any) -> None:
        self.owner, self.index = index, faiss.downcast_index(index)  # what is downcast does not keep the other alive
        self.core = self.index
        while isinstance(self.core, faiss.IndexPreTransform):
            self.core = faiss.downcast_index(self.core.index)
        self.storage = faiss.downcast_index(self.core.storage) if isinstance(self.core, faiss.IndexHNSW) else None
        self.lists = faiss.downcast_InvertedLists(self.core.invlists) if isinstance(self.core, faiss.IndexIVF) else None
        if self.lists is not None:
            self.family = "lists"
        elif isinstance(self.storage, faiss.IndexFlatCodes) and not isinstance(self.storage, faiss.Index2Layer):
            self.family = "graph"
        else:
            self.family = "packed" if _removes(self.index) else "rigid"
        self.wide = self.core
        while isinstance(self.wide, faiss.IndexRefine | faiss.IndexPreTransform):
            inner = self.wide.base_index if isinstance(self.wide, faiss.IndexRefine) else self.wide.index
            self.wide = faiss.downcast_index(inner)
        if isinstance(self.index, faiss.IndexRefine):
            self.index.k_factor = REFINED
        self.width_name = "nprobe" if isinstance(self.wide, faiss.IndexIVF) else "efSearch"
        self.widest = self.wide.nlist if isinstance(self.wide, faiss.IndexIVF) else 2048 if isinstance(self.wide, faiss.IndexHNSW) else 0
        if self.width:
            self.widen(self.width)

    def widen(self, width: int) -> None:
        self.host()
        self.width = width
        if isinstance(self.wide, faiss.IndexIVF):
            self.wide.nprobe = width
        else:
            self.wide.hnsw.efSearch = width

    def fits_gpu(self) -> bool:
        return isinstance(self.core, faiss.IndexIVFFlat | faiss.IndexIVFPQ | faiss.IndexIVFScalarQuantizer | faiss.IndexFlat)

    def host(self) -> None:
        """Bring it back to where it can be read and changed."""
        if self.gpu is not None:
            gpu, self.gpu = self.gpu, None
            self._adopt(faiss.index_gpu_to_cpu(gpu))

    def serving(self) -> Any:
        """The index to search: on the GPU where it has one."""
        if self.place is None:
            return self.index
        if self.gpu is None:
            options = faiss.GpuMultipleClonerOptions() if self.place == "all" else faiss.GpuClonerOptions()
            options.useFloat16 = self.float16
            if isinstance(self.place, str):
                self.gpu = faiss.index_cpu_to_all_gpus(self.index, options)
            else:
                self.gpu = faiss.index_cpu_to_gpu(resources(self.place), self.place.index or 0, self.index, options)
            self.owner = self.index = self.core = self.storage = self.lists = self.wide = None
        elif isinstance(self.place, torch.device):
            resources(self.place)
        return self.gpu

    def train(self, values: np.ndarray) -> None:
        try:
            self.index.train(values)
        except RuntimeError as error:
            raise ConfigError(f"index: {self.kind}: FAISS cannot train it on {len(values)} vectors: {_reason(error)}") from error
        self.trained = _serialized(self.index)

    def add(self, values: Tensor, rows: np.ndarray) -> None:
        if self.gpu is not None and isinstance(self.place, torch.device) and self.family == "lists":
            keys = torch.from_numpy(rows).to(values.device)
            at = faiss.cast_integer_to_float_ptr(values.data_ptr()), faiss.cast_integer_to_idx_t_ptr(keys.data_ptr())
            self.serving().add_with_ids_c(len(values), *at)
            return
        self.host()
        numbers = values.cpu().numpy()
        if self.family == "lists":
            self.index.add_with_ids(numbers, rows)
        elif isinstance(self.wide, faiss.IndexHNSW):
            self._link(numbers)
        elif isinstance(self.core, faiss.IndexNSG) and self.index.ntotal:
            self.fill(torch.cat([self.vectors(np.arange(self.index.ntotal)), torch.from_numpy(numbers)]))
        else:
            self.index.add(numbers)

    def _link(self, values: np.ndarray) -> None:
        # FAISS does not save where its generator stands: one made for each call lets a restored graph grow like the first.
        self.wide.hnsw.rng = faiss.RandomGenerator(derived(0, "hnsw", self.index.ntotal) % 2**31)
        threads = faiss.omp_get_max_threads()
        alone = torch.are_deterministic_algorithms_enabled() and threads > 1
        if alone:
            faiss.omp_set_num_threads(1)
        try:
            self.index.add(values)
        finally:
            if alone:
                faiss.omp_set_num_threads(threads)

    def fill(self, values: Tensor) -> None:
        """Empty it, keep what it learned, and add these."""
        self.host()
        self.index.reset()
        if len(values):
            self.add(values, np.arange(len(values)))

    def forget(self, rows: np.ndarray, of: np.ndarray) -> None:
        """Give up these rows, which `of` already calls empty."""
        self.host()
        if self.family == "lists":
            if isinstance(self.lists, faiss.BlockInvertedLists):
                self.core.set_direct_map_type(faiss.DirectMap.NoMap)
            mapped = self.core.direct_map.type == faiss.DirectMap.Hashtable
            self.index.remove_ids(faiss.IDSelectorArray(rows) if mapped else faiss.IDSelectorBatch(rows))
        elif self.family == "graph":
            self._bury(rows, of)
        elif self.family == "packed":
            self.index.remove_ids(faiss.IDSelectorBatch(rows))
        else:
            self.fill(self.vectors(np.delete(np.arange(self.index.ntotal), rows)))

    def _bury(self, rows: np.ndarray, of: np.ndarray) -> None:
        """Overwrite the vectors of these nodes with one of a neighbour that stays, so that the graph still leads past them."""
        links, offsets, nearest_level = self._links()
        around = links[offsets[rows][:, None] + np.arange(nearest_level)]  # (rows, neighbours), -1 for none
        stays = (around >= 0) & (of[around] != -1)
        first = around[np.arange(len(rows)), stays.argmax(axis=1)]
        some = np.flatnonzero(of[: self.index.ntotal] != -1)[0]
        codes = self._codes()
        codes[rows] = codes[np.where(stays.any(axis=1), first, some)]

    def _links(self) -> tuple[np.ndarray, np.ndarray, int]:
        hnsw = self.core.hnsw
        links = faiss.rev_swig_ptr(hnsw.neighbors.data(), hnsw.neighbors.size())
        return links, faiss.vector_to_array(hnsw.offsets).astype(np.int64), hnsw.cum_nb_neighbors(1)

    def _codes(self) -> np.ndarray:
        """What a graph or a packed index stores of each row, as it lies there  # (rows, bytes)"""
        flat = self.storage if self.storage is not None else self.core
        size = flat.ntotal * flat.code_size
        return faiss.rev_swig_ptr(flat.codes.data(), size).reshape(-1, flat.code_size) if size else np.empty((0, flat.code_size), np.uint8)

    def vectors(self, rows: np.ndarray) -> Tensor:
        self.host()
        if self.family == "lists" and self.core.direct_map.type == faiss.DirectMap.NoMap:
            self.core.set_direct_map_type(faiss.DirectMap.Hashtable)
        return torch.from_numpy(self.index.reconstruct_batch(rows))

    def search(self, queries: Tensor, k: int, only: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Distances and rows; `only` is a bitmap of the rows to find, which no GPU knows."""
        if self.place is None and not queries.is_cuda:
            distances, rows = self.search_here(queries.numpy(), k, only)
            return torch.from_numpy(distances), torch.from_numpy(rows)
        if self.place is None or only is not None:
            distances, rows = self.search_here(queries.cpu().numpy(), k, only)
        elif isinstance(self.place, str):
            distances, rows = self.serving().search(queries.numpy(), k)
        else:
            near = torch.empty(len(queries), k, device=queries.device)
            found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
            asked, out = (faiss.cast_integer_to_float_ptr(t.data_ptr()) for t in (queries, near))
            self.serving().search_c(len(queries), asked, k, out, faiss.cast_integer_to_idx_t_ptr(found.data_ptr()))
            return near, found
        return torch.from_numpy(distances).to(queries.device), torch.from_numpy(rows).to(queries.device)

    def search_here(
        self, queries: np.ndarray, k: int, only: np.ndarray | None = None, width: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.host()
        if only is None and width is None:
            return self.index.search(queries, k)
        chosen = None if only is None else faiss.IDSelectorBitmap(only)
        if self.family == "lists":
            settings = faiss.SearchParametersIVF(sel=chosen, nprobe=width or self.core.nprobe)
        else:
            settings = faiss.SearchParametersHNSW(sel=chosen, efSearch=self.core.hnsw.efSearch)
        if self.core is not self.index:
            settings = faiss.SearchParametersPreTransform(index_params=settings)
        return self.index.search(queries, k, params=settings)

    def state(self) -> dict[str, Any]:
        """What it learned, apart from what it holds by row: the first never changes, and the second changes where a row does."""
        self.host()
        state: dict[str, Any] = {"trained": self.trained, "digest": _digest(self.trained)}
        if isinstance(self.lists, faiss.ArrayInvertedLists):
            return {**state, **self._lists()}
        if self.family == "graph":
            hnsw = self.core.hnsw
            levels, links = (torch.from_numpy(faiss.vector_to_array(v).copy()) for v in (hnsw.levels, hnsw.neighbors))
            graph = {"levels": levels, "links": links, "entry": hnsw.entry_point, "top": hnsw.max_level}
            return {**state, "codes": torch.from_numpy(self._codes().copy()), **graph}
        if isinstance(self.core, faiss.IndexFlatCodes):
            return {**state, "codes": torch.from_numpy(self._codes().copy())}
        whole = _serialized(self.index)
        return {"whole": whole, "digest": _digest(whole), "trained": self.trained}

    def _lists(self) -> dict[str, Tensor]:
        core = self.core
        lists = [
            (faiss.rev_swig_ptr(self.lists.get_ids(i), size), faiss.rev_swig_ptr(self.lists.get_codes(i), size * core.code_size))
            if (size := self.lists.list_size(i))
            else (np.empty(0, np.int64), np.empty(0, np.uint8))
            for i in range(core.nlist)
        ]
        order = np.concatenate([rows for rows, _ in lists])
        codes = np.zeros((int(order.max(initial=-1)) + 1, core.code_size), np.uint8)
        for rows, stored in lists:
            codes[rows] = stored.reshape(-1, core.code_size)
        sizes = np.array([len(rows) for rows, _ in lists], np.int32)
        return {"codes": torch.from_numpy(codes), "order": torch.from_numpy(order.astype(np.int32)), "sizes": torch.from_numpy(sizes)}

    def restore(self, state: Mapping[str, Any], rows: int, held: int) -> None:
        """What `state` gave; it is checked before FAISS sees it, which trusts what it reads."""
        blob = state["whole" if "whole" in state else "trained"]
        _demand(_digest(blob) == state["digest"], "what FAISS stored of it does not have its checksum")
        self.trained = state["trained"].cpu().clone()
        self._adopt(faiss.deserialize_index(blob.cpu().numpy()))
        if "whole" in state:
            _demand(self.index.ntotal == held, f"it holds {self.index.ntotal} vectors in the place of {held}")
            return
        codes = state["codes"].cpu().contiguous().numpy()
        if self.family == "lists":
            order, sizes = state["order"].cpu().numpy().astype(np.int64), state["sizes"].cpu().numpy()
            _demand(len(sizes) == self.core.nlist and int(sizes.sum()) == len(order), "its lists are not whole")
            _demand(len(np.unique(order)) == len(order) and order.max(initial=-1) < min(rows, len(codes)), "its lists are not whole")
            _demand(codes.shape[1:] == (self.core.code_size,) and order.min(initial=0) >= 0, "its vectors are not whole")
            start = 0
            for i in np.flatnonzero(sizes):
                part = order[start : start + sizes[i]]
                stored = np.ascontiguousarray(codes[part])
                self.lists.add_entries(int(i), len(part), faiss.swig_ptr(part), faiss.swig_ptr(stored))
                start += sizes[i]
            self.index.ntotal = self.core.ntotal = len(order)
            return
        flat = self.storage if self.storage is not None else self.core
        _demand(codes.shape == (rows, flat.code_size), "its vectors are not whole")
        faiss.copy_array_to_vector(codes.reshape(-1), flat.codes)
        if self.storage is not None:
            self._restore_links(state, rows)
        self.index.ntotal = self.core.ntotal = flat.ntotal = rows

    def _restore_links(self, state: Mapping[str, Any], rows: int) -> None:
        hnsw = self.core.hnsw
        levels, links = state["levels"].cpu().numpy(), state["links"].cpu().numpy()
        whole = len(levels) == rows and levels.min(initial=1) >= 1 and levels.max(initial=1) < 64
        _demand(whole and links.min(initial=-1) >= -1 and links.max(initial=-1) < rows, "its graph is not whole")
        sizes = np.array([hnsw.cum_nb_neighbors(level) for level in range(int(levels.max(initial=0)) + 1)])
        offsets = np.concatenate([[0], np.cumsum(sizes[levels])]).astype(np.uint64)
        entry, top = int(state["entry"]), int(state["top"])
        _demand(int(offsets[-1]) == len(links), "its graph is not whole")
        _demand(-1 <= entry < rows and (entry < 0 or top == levels[entry] - 1), "its graph is not whole")
        for values, vector in ((levels, hnsw.levels), (links, hnsw.neighbors), (offsets, hnsw.offsets)):
            faiss.copy_array_to_vector(np.ascontiguousarray(values), vector)
        hnsw.entry_point, hnsw.max_level = entry, top

    def nbytes(self) -> int:
        """What `state` holds, in bytes."""
        self.host()
        size = self.trained.numel()
        if isinstance(self.lists, faiss.ArrayInvertedLists):
            rows = max((int(faiss.rev_swig_ptr(self.lists.get_ids(i), n).max()) + 1 for i, n in self._list_sizes() if n), default=0)
            return size + rows * self.core.code_size + 4 * (self.core.ntotal + self.core.nlist)
        if self.family == "graph":
            hnsw = self.core.hnsw
            return size + self.storage.ntotal * self.storage.code_size + 4 * (hnsw.levels.size() + hnsw.neighbors.size())
        if isinstance(self.core, faiss.IndexFlatCodes):
            return size + self.core.ntotal * self.core.code_size
        return size + len(_serialized(self.index))

    def _list_sizes(self) -> Iterator[tuple[int, int]]:
        return ((i, self.lists.list_size(i)) for i in range(self.core.nlist))


class Index:
    """A FAISS index over the vectors of samples, by id.

    `kind` is an `index_factory` string or `auto`; `device` is `auto` (where the first vectors come from), a torch device, or `all`
    (every GPU that FAISS has). On a GPU, IVF and flat indexes run on FAISS's GPU part; where it has none, or the kind has no GPU version,
    exact search takes its place there. `float16` stores in half precision what lies flat or on a GPU. `width` is IVF's nprobe or HNSW's
    efSearch where it should not be measured. `log` gets a line whenever the index changes what it is.
    """

    def __init__(
        self,
        dim: int,
        metric: Metric = "l2",
        kind: str = "auto",
        device: str | torch.device = "auto",
        float16: bool = False,
        log: Callable[[str], None] | None = None,
        width: int | None = None,
    ) -> None:
        if dim < 1:
            raise ConfigError(f"an index of {dim} dimensions holds no vectors: at least 1")
        if metric not in ("l2", "ip", "cosine"):
            raise ConfigError(f"unknown metric {metric!r}: l2, ip or cosine")
        if width is not None and width < 1:
            raise ConfigError(f"an index cannot search {width} wide: at least 1")
        self.dim, self.metric, self.float16, self.log, self.width = dim, metric, float16, log, width
        self.kind = kind if kind == "auto" else _plain(kind)
        self.asked = str(device)
        self.adaptive = kind == "auto" and self.asked != "all"
        self.device: torch.device | None = None  # until the first vectors come
        self.rows = Rows()
        self.flat: Vectors | None = None  # what is not in `built`
        self.built: Structure | None = None
        self.exact_only = ""  # why nothing but exact search is possible here
        self.why = "nothing was added yet"
        self.recall: float | None = None  # against exact search, when `measured` vectors were held
        self.measured = 0
        self.lossy = False  # what was given cannot be had back from what is stored
        self.tuned = 0  # vectors held when the width was last chosen
        self.sized = 0  # vectors held when `auto` built what it has
        self.queries = 0  # searched since the last change of kind, in queries of a batch
        self.later = AUTO_VECTORS  # how many vectors must be held for an index to be tried
        self._mirror: Tensor | None = None  # `rows.of` on a GPU, right up to row `rows.same`
        if self.kind not in ("auto", "Flat"):
            Structure(self.kind, dim, metric)  # a string that FAISS does not know is refused now, not when the first vector comes
        if self.asked != "auto":
            self._settle(torch.device("cpu"))

    # Where it lies

    def _settle(self, came_from: torch.device) -> None:
        """Fix the device, and what is kept there."""
        if self.device is not None:
            return
        place: torch.device | str | None = None
        if self.asked == "all":
            if not faiss_gpus():
                raise ConfigError("index_device: all: FAISS finds no GPU here: choose auto, cpu or cuda")
            self.device, place = torch.device("cpu"), "all"
        else:
            try:
                self.device = came_from if self.asked == "auto" else torch.device(self.asked)
            except RuntimeError as error:
                raise ConfigError(f"index_device: {self.asked}: no such device: auto, cpu, cuda, cuda:0 and the like, or all") from error
            if self.device.type == "cuda" and self.asked != "auto" and not torch.cuda.is_available():
                self.device = None
                raise ConfigError(f"index_device: {self.asked}: torch finds no GPU here: choose auto or cpu")
            if self.device.type == "cuda" and self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
        if self.device.type != "cpu":
            place = self.device
            if self.kind not in ("auto", "Flat") and not (faiss_gpus() and Structure(self.kind, self.dim, self.metric).fits_gpu()):
                reason = "has no GPU version" if faiss_gpus() else "runs on a CPU only: FAISS has no GPU here"
                self.exact_only = f"{self.kind} {reason}; exact search runs on {self.device} in its place"
        if self.kind not in ("auto", "Flat") and not self.exact_only:
            self.built = Structure(self.kind, self.dim, self.metric, place, self.float16)
        elif place == "all":
            self.built = Structure("Flat", self.dim, self.metric, place, self.float16)
        if self.built is None or self.built.enough:
            self._lay_flat()
        self._explain()

    def _lay_flat(self) -> None:
        assert self.device is not None
        self.flat = Vectors(self.dim, self.device, torch.float16 if self.float16 else torch.float32)

    def _explain(self) -> None:
        """Why it is what it is, from what is held and asked."""
        if self.built is not None and self.flat is None:
            if self.kind != "auto":
                self.why = f"{self.kind} was asked for"
        elif self.exact_only:
            self.why = self.exact_only
        elif self.built is not None:
            self.why = f"{self.kind} trains itself at {self.built.enough:,} vectors; until then search is exact"
        elif self.kind == "Flat":
            self.why = "Flat was asked for"
        elif self.device is not None and self.device.type != "cpu":
            self.why = f"exact search of everything on {self.device}"
        elif len(self) < AUTO_VECTORS:
            self.why = f"below {AUTO_VECTORS:,} vectors exact search is the cheaper one"
        elif len(self) < self.later:
            self.why = f"no index found {RECALL:.0%} of the neighbours in less time; tried again at {self.later:,} vectors"
        else:
            self.why = f"fewer searches than building an index would cost ({self.queries:,} of {AUTO_QUERIES:,} queries)"

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log(f"index: {text}")

    # What comes in

    def _shaped(self, vectors: Tensor) -> Tensor:
        """Float32 rows on the index's device."""
        if not isinstance(vectors, Tensor) or vectors.dim() != 2 or vectors.shape[1] != self.dim:
            shape = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise DataError(f"vectors of shape {shape} do not fit an index of {self.dim} dimensions: (vectors, {self.dim})")
        device = self.device or vectors.device
        if vectors.dtype == torch.float32 and vectors.device == device and not vectors.requires_grad and vectors.is_contiguous():
            return vectors
        return vectors.detach().to(device, torch.float32).contiguous()

    def _checked(self, vectors: Tensor, keys: np.ndarray | None = None) -> Tensor:
        """Finite float32 rows on the index's device, of length one for `cosine`."""
        values = self._shaped(vectors)
        # On a CPU in NumPy: torch's threads, once woken, spin for a while and would halve what FAISS's threads get done after them.
        numbers = values.numpy() if values.device.type == "cpu" else values
        line = numbers.reshape(-1)
        if isinstance(line, np.ndarray):
            with np.errstate(over="ignore", invalid="ignore"):
                fine = bool(np.dot(line, line) < LONGEST)  # one pass; not so where a value is NaN, infinite, or too large
        else:
            fine = bool(line.square().sum() < LONGEST)
        if not fine:
            self._refuse(values, keys)
        return self._unit(values, numbers, fine) if self.metric == "cosine" and len(numbers) else values

    def _unit(self, values: Tensor, numbers: np.ndarray | Tensor, fine: bool) -> Tensor:
        """Rows of length one."""
        if isinstance(numbers, np.ndarray):
            lengths: Any = np.sqrt(np.einsum("ij,ij->i", numbers, numbers))[:, None] if fine else None
        else:
            lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        if not fine or float(lengths.min()) < 1e-15:  # too long or too short to be squared in float32
            precise = values.double()
            lengths = torch.linalg.vector_norm(precise, dim=1, keepdim=True)
            return (precise / torch.where(lengths > 0, lengths, 1)).float()
        return torch.from_numpy(numbers / lengths) if isinstance(numbers, np.ndarray) else values / lengths

    def _refuse(self, values: Tensor, keys: np.ndarray | None) -> None:
        """Name the vectors that are not finite, or so long that distances to them are not."""

        def named(bad: Tensor) -> str:
            rows = bad.nonzero().squeeze(1).cpu().numpy()
            return _some(rows, "query", "queries") if keys is None else _some(keys[rows], "the vector of id", "the vectors of ids")

        bad = ~torch.isfinite(values).all(dim=1)
        if bool(bad.any()):
            raise DataError(f"{named(bad)} NaN or infinite")
        bad = values.double().square().sum(dim=1) > LONGEST
        if self.metric != "cosine" and bool(bad.any()):
            raise DataError(f"{named(bad)} too long: squared distances must fit float32")

    def _keys(self, ids: Tensor, vectors: Tensor) -> np.ndarray:
        keys = _ids(ids)
        if isinstance(vectors, Tensor) and vectors.shape[:1] != keys.shape:
            raise DataError(f"{len(keys)} ids came with vectors of shape {tuple(vectors.shape)}: one id for each")
        return keys

    def add(self, ids: Tensor, vectors: Tensor) -> None:
        keys = self._keys(ids, vectors)
        if self.device is None and isinstance(vectors, Tensor):
            self._settle(vectors.device)
        self._insert(keys, self._checked(vectors, keys))

    def _insert(self, keys: np.ndarray, values: Tensor) -> None:
        if not len(keys):
            return
        self._fits_half(keys, values)
        rows = self.rows.enter(keys)
        try:
            if self.flat is not None:
                self.flat.append(values)
            else:
                assert self.built is not None
                self.built.add(values, rows)
        except Exception:
            self.rows.undo(rows)
            raise
        if self.flat is not None and self.built is not None and self.rows.held >= self.built.enough:
            self._train()

    def _fits_half(self, keys: np.ndarray, values: Tensor) -> None:
        if self.float16 and bool((values.abs() > 65504).any()):
            bad = (values.abs() > 65504).any(dim=1).nonzero().squeeze(1).cpu().numpy()
            raise DataError(f"{_some(keys[bad], 'the vector of id', 'the vectors of ids')} too large for float16 (65504): float16: false")

    def _train(self) -> None:
        """From flat to what was asked for."""
        assert self.flat is not None and self.built is not None
        flat = self.flat.view().float()
        if not self.built.index.is_trained:
            self.built.train(flat.cpu().numpy())
        self.built.add(flat, np.arange(len(flat)))
        lying = self.flat
        truth = self._truth(lambda: lying.parts(SAMPLED, self.metric), self._of_flat)
        few = np.arange(min(len(flat), SAMPLED))
        self.lossy = not torch.allclose(self.built.vectors(few), flat[: len(few)].cpu(), rtol=1e-3, atol=1e-5)
        if self.built.widest:
            self._tune(self.built, self.built.widest)
        self.recall, self.measured = self._found(self.built, *truth, self._of_flat), self.rows.held
        self.flat = None
        self._explain()
        self._say(f"{self.kind} trained itself on {len(self):,} vectors; {self._figures()}")

    def update(self, ids: Tensor, vectors: Tensor) -> None:
        keys = self._keys(ids, vectors)
        if self.device is None and isinstance(vectors, Tensor):
            self._settle(vectors.device)
        values = self._checked(vectors, keys)
        distinct, times = np.unique(keys, return_counts=True)
        if len(distinct) < len(keys):
            raise DataError(f"{_some(distinct[times > 1])} twice in one call")
        self._fits_half(keys, values)
        rows = self.rows.find(keys)
        known, new = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
        if self.flat is not None:
            if len(known):
                self.flat.put(self._on_device(rows[known]), values[self._on_device(known)])
            self._insert(keys[new], values[self._on_device(new)])
        else:
            self._erase(rows[known])
            self._insert(keys, values)

    def remove(self, ids: Tensor) -> int:
        rows = np.unique(self.rows.find(_ids(ids)))
        rows = rows[rows >= 0]
        self._erase(rows)
        return len(rows)

    def _erase(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        if self.flat is not None:
            holes, movers = self.rows.close(rows)
            self.flat.drop(self._on_device(holes), self._on_device(movers), self.rows.count)
            return
        assert self.built is not None
        family = self.built.family
        self.rows.leave(rows, reuse=family == "lists")
        if not self.rows.held:
            self._start_over()
            return
        if self.rows.held < self.built.least:
            self._lay_down()
            return
        self.built.forget(rows, self.rows.of)
        if family in ("packed", "rigid"):
            self.rows.fill(self.rows.of[self.rows.live()])
        elif family == "graph" and self.rows.held < 2 * (self.rows.count - self.rows.held):
            self._rebuild()

    def _start_over(self) -> None:
        assert self.built is not None
        self.rows = Rows()
        self.tuned = 0
        if self.adaptive:
            self._to_flat("it was emptied")
        elif self.built.least:
            self._lay_down()
        else:
            self.built.fill(torch.empty(0, self.dim))

    def _lay_down(self) -> None:
        """Flat again, until there is enough for what was asked."""
        assert self.built is not None and self.device is not None
        kept = self.rows.live()
        vectors = self.built.vectors(kept) if len(kept) else torch.empty(0, self.dim)
        self.built.fill(torch.empty(0, self.dim))
        self._lay_flat()
        assert self.flat is not None
        self.flat.append(vectors.to(self.device))
        self.rows.fill(self.rows.of[kept])
        self.tuned, self.recall = 0, None

    def _rebuild(self) -> None:
        """A graph without the nodes that were removed; `auto` earns a new one first."""
        assert self.built is not None
        if self.adaptive:
            self._to_flat("a third of its graph was removed")
            return
        kept = self.rows.live()
        self.built.fill(self.built.vectors(kept))
        self.rows.fill(self.rows.of[kept])

    # Searching

    def search(self, queries: Tensor, k: int, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not hasattr(k, "__index__") or k < 1:
            raise DataError(f"a search for {k} neighbours finds none: k is a whole number from 1")
        asked = self._checked(queries)
        chosen = None if where is None else self._chosen(where)
        most, count = min(k, self.rows.held if chosen is None else len(chosen)), asked.shape[0]
        if most and count:
            self._ready(count)
            if self.flat is not None:
                distances, found = nearest(self.flat, asked, most, self.metric, None if chosen is None else self._on_device(chosen))
            else:
                distances, found = self._search_built(asked, most, chosen)
            ids = self._ids_of(found)
        else:
            distances, ids = asked.new_empty(count, 0), torch.empty(count, 0, dtype=torch.int64, device=asked.device)
        if most < k:
            distances = pad(distances, (0, k - most), value=float("inf") if self.metric == "l2" else float("-inf"))
            ids = pad(ids, (0, k - most), value=-1)
        return (distances, ids) if queries.device == asked.device else (distances.to(queries.device), ids.to(queries.device))

    def _search_built(self, asked: Tensor, k: int, chosen: np.ndarray | None) -> tuple[Tensor, Tensor]:
        built = self.built
        assert built is not None
        if chosen is not None and (len(chosen) * 8 < self.rows.held or built.family not in ("lists", "graph")):
            return self._exact(asked, k, chosen)  # a search that meets few of them on its way would miss the most
        dead = built.family == "graph" and self.rows.held < self.rows.count
        try:
            distances, found = built.search(asked, k, self._bitmap(chosen) if dead or chosen is not None else None)
        except RuntimeError:
            if chosen is None:
                raise
            return self._exact(asked, k, chosen)  # IVF of additive quantizers selects nothing
        last = found[:, -1] if found.is_cuda else found.numpy()[:, -1]
        if last.min() < 0:  # the lists or nodes that were visited held fewer than k
            short = (found[:, -1] < 0).nonzero().squeeze(1)
            if built.family == "lists":
                only = None if chosen is None else self._bitmap(chosen)
                again: Iterable[Tensor] = map(torch.from_numpy, built.search_here(asked[short].cpu().numpy(), k, only, built.core.nlist))
            else:
                again = self._exact(asked[short].cpu(), k, self.rows.live() if chosen is None else chosen)
            distances[short], found[short] = (values.to(asked.device) for values in again)
        return distances, found

    def _exact(self, asked: Tensor, k: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        assert self.built is not None
        distances, found = among(self._parts(rows, self.built), asked.cpu(), k, self.metric, "faiss")
        return distances.to(asked.device), found.to(asked.device)

    def _parts(self, rows: np.ndarray, built: Structure) -> Iterator[Part]:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            yield torch.from_numpy(block), built.vectors(block), None

    def _chosen(self, where: Tensor) -> np.ndarray:
        """The rows of these ids, each once; ids that are not held match nothing."""
        rows = self.rows.find(_ids(where))
        there = np.zeros(self.rows.count, bool)
        there[rows[rows >= 0]] = True
        return np.flatnonzero(there)

    def _bitmap(self, chosen: np.ndarray | None) -> np.ndarray:
        if chosen is None:
            there = self.rows.of[: self.rows.count] != -1
        else:
            there = np.zeros(self.rows.count, bool)
            there[chosen] = True
        return np.packbits(there, bitorder="little")

    def _on_device(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.device)

    def _ids_of(self, found: Tensor) -> Tensor:
        return self._mirrored(found) if found.is_cuda else torch.from_numpy(self.rows.of[found.numpy()])

    def _mirrored(self, found: Tensor) -> Tensor:
        """The ids of these rows without a copy to the host."""
        count = self.rows.count
        if self._mirror is None or len(self._mirror) < count:
            self._mirror = torch.empty(count * 3 // 2, dtype=torch.int64, device=found.device)
            self.rows.same = 0
        if self.rows.same < count:
            self._mirror[self.rows.same : count] = torch.from_numpy(self.rows.of[self.rows.same : count])
        self.rows.same = count
        return torch.where(found < 0, found, self._mirror[found.clamp(min=0)])

    def range_search(self, queries: Tensor, radius: float) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest of each query first. An IVF index looks in the lists that a search visits; all others search exactly."""
        if radius != radius:
            raise DataError("the radius is NaN: a number")
        asked = self._checked(queries)
        if not self.rows.held or not len(asked):
            nothing = torch.zeros(len(asked) + 1, dtype=torch.int64, device=queries.device)
            return nothing, asked.new_empty(0).to(queries.device), nothing[:0]
        if self.flat is not None:
            limits, distances, found = within(self.flat.parts(len(asked), self.metric), asked, radius, self.metric)
        else:
            limits, distances, found = self._range_built(asked, radius)
        return limits.to(queries.device), distances.to(queries.device), self._ids_of(found).to(queries.device)

    def _range_built(self, asked: Tensor, radius: float) -> tuple[Tensor, Tensor, Tensor]:
        built = self.built
        assert built is not None
        self._ready(len(asked))
        asked = asked.cpu()
        built.host()
        if built.family == "lists":
            try:
                limits, distances, rows = built.index.range_search(asked.numpy(), radius)
                query = np.repeat(np.arange(len(asked)), limits[1:].astype(np.int64) - limits[:-1].astype(np.int64))
                hits = (torch.from_numpy(query), torch.from_numpy(distances), torch.from_numpy(rows))
                return in_order(*hits, len(asked), self.metric)
            except RuntimeError:
                pass  # FAISS has none for this kind of list
        return within(self._parts(self.rows.live(), built), asked, radius, self.metric)

    def reconstruct(self, ids: Tensor) -> Tensor:
        keys = _ids(ids)
        rows = self.rows.find(keys)
        if (rows < 0).any():
            raise DataError(f"{_some(keys[rows < 0])} not in the index")
        if not len(rows):
            return torch.empty(0, self.dim, device=ids.device)
        return self._stored(rows).to(ids.device)

    def _stored(self, rows: np.ndarray) -> Tensor:
        if self.flat is not None:
            return self._of_flat(self._on_device(rows))
        assert self.built is not None
        return self.built.vectors(rows)

    def _stored_tensor(self, rows: Tensor) -> Tensor:
        return self._stored(rows.cpu().numpy())

    def _of_flat(self, rows: Tensor) -> Tensor:
        assert self.flat is not None
        return self.flat.buffer[rows].float()

    # What it should be

    def _ready(self, queries: int) -> None:
        """Before a search: become what pays, and search as far as needed. What nobody searches costs nothing but its place."""
        if self.flat is None:
            assert self.built is not None
            if self.adaptive and self.built.family == "lists" and self.rows.held >= 4 * self.sized:
                self._to_flat("it grew fourfold")
                self._build()
            elif self.built.widest and self.rows.held >= 2 * self.tuned:
                self._tune(self.built, self._widest(self.built) if self.adaptive else self.built.widest)
        elif self.adaptive and self.device is not None and self.device.type == "cpu":
            self.queries += queries if queries >= FEW else ONE_BY_ONE * queries
            if self.rows.held >= self.later and self.queries >= AUTO_QUERIES:
                self._build()

    def _build(self) -> None:
        """A FAISS index in the place of exact search, if one finds enough of the neighbours at less cost."""
        assert self.flat is not None
        held, stored = self.rows.held, "SQfp16" if self.float16 else "Flat"
        kind = f"HNSW32,{stored}" if held < AUTO_IVF else f"IVF{min(int(4 * held**0.5), held // POINTS)},{stored}"
        built, flat = Structure(kind, self.dim, self.metric), self.flat.view().float()
        if not built.index.is_trained:
            built.core.cp.max_points_per_centroid = 2 * POINTS  # more of them hardly move a centroid
            built.train(flat.numpy())
        built.add(flat, np.arange(held))
        share = self._tune(built, self._widest(built))
        exact, self.queries = f"exact search of {held:,} vectors had cost {self.queries:,} queries", 0
        if share < RECALL:
            self.later, self.recall = 2 * held, None
            self._explain()
            self._say(f"{exact}; {kind} found only {share:.1%} of the {NEIGHBOURS} nearest in less time, so search stays exact")
            return
        self.built, self.flat, self.sized = built, None, held
        self.why = f"{exact}, more than building {kind} does"
        self._say(f"{kind} from now on: {self.why}; {self._figures()}")

    def _widest(self, built: Structure) -> int:
        """How far a search may go before exact search of a batch is the faster one, as measured."""
        return max(16, self.rows.held // 256) if built.family == "graph" else max(1, built.core.nlist // 16)

    def _to_flat(self, reason: str) -> None:
        assert self.built is not None
        left = self.built.kind
        self._lay_down()
        self.built, self.queries, self.sized, self.later = None, 0, 0, AUTO_VECTORS
        self._explain()
        self._say(f"exact search in the place of {left}: {reason}")

    def _tune(self, built: Structure, most: int) -> float:
        """The smallest width that finds enough of what exact search finds among what is stored; the share that it finds."""
        self.tuned = self.rows.held
        built.host()
        mapped = built.family == "lists" and built.core.direct_map.type != faiss.DirectMap.NoMap

        def stored(rows: Tensor) -> Tensor:
            return built.vectors(rows.cpu().numpy())

        truth = self._truth(lambda: self._parts(self.rows.live(), built), stored)
        width = self.width or (16 if isinstance(built.wide, faiss.IndexHNSW) else 1)
        built.widen(width)
        while (share := self._found(built, *truth, stored)) < RECALL and width < most and self.width is None:
            width = min(2 * width, most)
            built.widen(width)
        if built.family == "lists" and not mapped:
            built.core.set_direct_map_type(faiss.DirectMap.NoMap)  # it costs 40 bytes for each vector
        if not self.lossy:
            self.recall, self.measured = share, self.rows.held
        return share

    def _truth(self, parts: Callable[[], Iterable[Part]], stored: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Queries to measure a search by, and the distance of the tenth neighbour of each.

        They lie beyond vectors that are held, half as far again as from their fifth neighbours: vectors that an index holds are found
        more easily than new ones, and these about as well.
        """
        draw = np.random.default_rng(derived(0, "recall", self.rows.held))
        held = stored(torch.from_numpy(np.sort(draw.choice(self.rows.live(), min(SAMPLED, self.rows.held), replace=False))))
        engine = engine_for(held.device, held.dtype)
        fifth = among(parts(), held, min(6, self.rows.held), "l2", engine)[1][:, -1]
        asked = held + (held - stored(fifth)) / 2
        if self.metric == "cosine":
            asked = torch.nn.functional.normalize(asked)
        found = among(parts(), asked, min(NEIGHBOURS, self.rows.held), self.metric, engine)[1]
        distances = self._distances(asked, found, stored)
        return asked, distances.amax(dim=1, keepdim=True) if self.metric == "l2" else distances.amin(dim=1, keepdim=True)

    def _found(self, built: Structure, asked: Tensor, bar: Tensor, stored: Callable[[Tensor], Tensor]) -> float:
        """The share of the true neighbours that a search finds. What is as near as the tenth counts: equals have no order."""
        there = min(NEIGHBOURS, self.rows.held)
        dead = built.family == "graph" and self.rows.held < self.rows.count
        rows = torch.from_numpy(built.search_here(asked.cpu().numpy(), there, self._bitmap(None) if dead else None)[1]).to(asked.device)
        some = int(self.rows.live()[0])  # in the place of what was not found
        distances = self._distances(asked, torch.where(rows < 0, some, rows), stored)
        near = distances <= bar + 1e-5 * bar.abs() if self.metric == "l2" else distances >= bar - 1e-5 * bar.abs()
        return round(int((near & (rows >= 0)).sum()) / (len(rows) * there), 4)

    def _distances(self, asked: Tensor, found: Tensor, stored: Callable[[Tensor], Tensor]) -> Tensor:
        """Distances to the rows that were found, one by one."""
        vectors, asked = stored(found.reshape(-1)).view(*found.shape, self.dim), asked[:, None]
        return (vectors - asked).square().sum(dim=2) if self.metric == "l2" else (vectors * asked).sum(dim=2)

    def measure_recall(self) -> float:
        """Recall@10 of the index as it is, against exact search, on a sample of held vectors; it stands in `about` from then on.

        Of a compressed index, whose vectors are gone, it is what was measured when it was trained.
        """
        if self.flat is None and self.built is not None and self.rows.held and not self.lossy:
            stored, built = self._stored_tensor, self.built
            truth = self._truth(lambda: self._parts(self.rows.live(), built), stored)
            self.recall, self.measured = self._found(built, *truth, stored), self.rows.held
        return 1.0 if self.recall is None else self.recall

    def _figures(self) -> str:
        assert self.built is not None
        wide = f" with {self.built.width_name} {self.built.width}" if self.built.width else ""
        return f"recall@{NEIGHBOURS} {self.recall:.3f}{wide}" if self.recall is not None else wide.strip()

    # What there is

    def __len__(self) -> int:
        return self.rows.held

    def about(self) -> dict[str, Any]:
        """Of what it is made, and why; `recall` is recall@10, found when `recall_of` vectors were held (None: not measured yet)."""
        exact = self.built is None or self.flat is not None
        self._explain()
        about: dict[str, Any] = {
            "kind": "Flat" if exact or self.built is None else self.built.kind,
            "asked": self.kind,
            "why": self.why,
            "device": self._device_name(),
            "metric": self.metric,
            "dim": self.dim,
            "vectors": self.rows.held,
            "trained": self.built is None or self.flat is None,
            "recall": 1.0 if exact else self.recall,
            "recall_of": self.rows.held if exact else self.measured,
            "bytes": self.nbytes(),
        }
        if not exact and self.built is not None:
            if self.built.width:
                about[self.built.width_name] = self.built.width
            if self.built.family == "graph":
                about["removed_nodes"] = self.rows.count - self.rows.held
        return about

    def _device_name(self) -> str:
        """Where the vectors lie, and what searches them."""
        if self.device is None:
            return f"{self.asked}: where the first vectors come from"
        if self.flat is not None:
            return f"{self.device} ({'torch' if self.flat.engine == 'torch' else 'FAISS'})"
        assert self.built is not None
        return f"{faiss_gpus()} GPUs (FAISS)" if self.built.place == "all" else f"{self.built.place or 'cpu'} (FAISS)"

    def nbytes(self) -> int:
        """What is kept of the samples and what was learned from them; not the room to grow, nor the table that finds an id."""
        if self.flat is not None:
            return 8 * self.rows.count + self.flat.nbytes()
        return 8 * self.rows.count + (self.built.nbytes() if self.built is not None else 0)

    def merge(self, other: FeatureIndex) -> None:
        """Add what another index holds, as it is stored there; nothing is added where an id is in both."""
        if not isinstance(other, Index):
            raise DataError(f"an index merges with another of its kind, not with a {type(other).__name__}")
        if (other.dim, other.metric) != (self.dim, self.metric):
            mine, its = f"{self.metric} of {self.dim}", f"{other.metric} of {other.dim}"
            raise DataError(f"an index by {mine} dimensions cannot take in one by {its}: both must be the same")
        live = other.rows.live()
        keys = other.rows.of[live]
        held = self.rows.find(keys) >= 0
        if held.any():
            raise DataError(f"{_some(keys[held])} in both indexes: remove them from one")
        if not len(live):
            return
        if self.device is None:
            self._settle(other.device or torch.device("cpu"))
        parts = [slice(start, start + BLOCK) for start in range(0, len(live), BLOCK)]
        if self.float16:
            for part in parts:
                self._fits_half(keys[part], other._stored(live[part]))
        for part in parts:
            self._insert(keys[part], other._stored(live[part]).to(self.device))

    # What is kept

    def state(self) -> dict[str, Any]:
        """A copy of all that it holds, as tensors and JSON values; what does not change from call to call stays the same byte for byte."""
        state: dict[str, Any] = {
            **{name: getattr(self, name) for name in SETTINGS},
            "device": str(self.device) if self.device is not None else None,
            **{name: getattr(self, name) for name in PROGRESS},
            "of": torch.from_numpy(self.rows.of[: self.rows.count].copy()),
        }
        if self.flat is not None:
            state["vectors"] = self.flat.view().clone()
        elif self.built is not None:
            state["built"] = {"kind": self.built.kind, "width": self.built.width, **self.built.state()}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was taken of; it must have been made with the same settings."""
        try:
            for name in SETTINGS:
                if state[name] != getattr(self, name):
                    raise DataError(f"the saved index has {name} {state[name]}, and this one {getattr(self, name)}: they must be the same")
            fresh = Index(self.dim, self.metric, self.kind, self.asked, self.float16, self.log, self.width)
            fresh._fill(state)
        except ConfigError:
            raise
        except DAMAGE as error:
            raise DataError(f"the saved index is damaged: {error if isinstance(error, _Damaged) else _reason(error)}") from error
        self.__dict__.update(fresh.__dict__)

    def _fill(self, state: Mapping[str, Any]) -> None:
        was = state["device"]
        if was is not None:
            there = was == "cpu" or torch.cuda.is_available()
            self._settle(torch.device(was if there else "cpu"))
        of = state["of"].cpu().contiguous().numpy()
        _demand(of.dtype == np.int64 and of.ndim == 1, "its ids are not whole")
        live = of[of != -1]
        _demand(len(np.unique(live)) == len(live), "one of its ids occurs twice")
        if "built" in state:
            saved = state["built"]
            place = self.built.place if self.built is not None else None
            self.built = Structure(saved["kind"], self.dim, self.metric, place, self.float16)
            self.built.restore(saved, len(of), len(live))
            if saved["width"]:
                self.built.widen(int(saved["width"]))
            self.flat = None
        elif "vectors" in state:
            vectors = state["vectors"]
            _demand(tuple(vectors.shape) == (len(of), self.dim), f"{len(of)} ids and vectors of shape {tuple(vectors.shape)}")
            assert self.flat is not None
            self.flat.append(vectors.to(self.device))
        else:
            _demand(not len(of), "its vectors are missing")
        self.rows.fill(of)
        if self.flat is None and self.built is not None and self.built.family == "lists":
            self.rows.free = np.flatnonzero(of == -1)
        for name in PROGRESS:
            setattr(self, name, state[name])

    def save(self, path: str | Path) -> None:
        """One file: safetensors with a checksum of every tensor. It holds all of the index, or what it held before."""
        path = Path(path)
        tree, tensors = flatten(self.state())
        tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
        told = {"tree": json.dumps(tree, allow_nan=False), "sums": json.dumps({name: _sum(name, value) for name, value in tensors.items()})}
        aside = path.with_name(f".{path.name}.writing")
        try:
            save_file(tensors, aside, metadata={**told, "format": FORMAT, "check": _check(told)})
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise disk_error(error, path) from error
        except SafetensorError as error:  # its way of passing an OSError on
            aside.unlink(missing_ok=True)
            full = "os error 28" in str(error) or "No space left" in str(error)
            raise disk_error(OSError(errno.ENOSPC if full else errno.EIO, str(error)), path) from error

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "auto", log: Callable[[str], None] | None = None) -> Index:
        """What `save` wrote, whole."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: there is no index")
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                _demand(told.get("format") == FORMAT, f"it is no index of format {FORMAT}")
                _demand(told["check"] == _check(told), "it does not have its checksum")
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            sums = json.loads(told["sums"])
            _demand({name: _sum(name, value) for name, value in tensors.items()} == sums, "it does not have its checksum")
            state = unflatten(json.loads(told["tree"]), tensors)
            index = cls(state["dim"], state["metric"], state["kind"], device, state["float16"], log, state["width"])
            index.restore(state)
        except (*DAMAGE, SafetensorError) as error:
            raise DataError(f"{path} holds no whole index: {_reason(error)}") from error
        return index


FORMAT = "streamcl index 1"
SETTINGS = ("dim", "metric", "kind", "float16", "width")
PROGRESS = ("recall", "measured", "lossy", "tuned", "sized", "queries", "later", "why")


class _Damaged(Exception):
    pass


DAMAGE = (_Damaged, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, AssertionError, OSError, MemoryError)


def _demand(condition: object, otherwise: str) -> None:
    if not condition:
        raise _Damaged(otherwise)


def _sum(name: str, tensor: Tensor) -> str:
    """The checksum of a tensor: its name, type and shape count as well."""
    sha = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _check(told: Mapping[str, str]) -> str:
    return hashlib.sha256(f"{told['tree']}\n{told['sums']}".encode()).hexdigest()


def _digest(blob: Tensor) -> str:
    return _sum("", blob)


def _serialized(index: Any) -> Tensor:
    return torch.from_numpy(faiss.serialize_index(index))


def _plain(kind: str) -> str:
    """Ids are kept here: FAISS's own maps of them are left out."""
    plain = re.sub(r"^(IDMap2?,)+|(,IDMap2?)+$", "", kind.strip())
    return "Flat" if plain.lower() == "flat" else plain


def made(kind: str, dim: int, metric: Metric) -> Any:
    """What `index_factory` makes, where it can hold vectors and search them by this metric."""
    wanted = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        index = faiss.index_factory(dim, kind, wanted)
    except RuntimeError as error:
        example = "auto, Flat, HNSW32, IVF1024,Flat or IVF4096,PQ64"
        raise ConfigError(
            f"index: {kind!r} is no FAISS index for {metric} and {dim} dimensions ({_reason(error)}): something like {example}"
        ) from error
    core = index
    while isinstance(core, faiss.IndexPreTransform):
        core = faiss.downcast_index(core.index)
    if isinstance(core, faiss.IndexLSH | faiss.IndexIVFFlatDedup):
        what = "gives Hamming distances only" if isinstance(core, faiss.IndexLSH) else "gives no vectors back"
        raise ConfigError(f"index: {kind!r} {what}, which is not enough for a memory: choose another kind")
    if index.metric_type != wanted or core.metric_type != wanted:
        raise ConfigError(f"index: {kind!r} knows no {metric}, only l2: choose another kind or the metric l2")
    return index


def points_to_train(part: Any, dim: int) -> int:
    """How many vectors it asks for: FAISS's 39 for each centroid, ten for each dimension of a rotation. 0: it needs none."""
    index: Any = faiss.downcast_index(part)
    if isinstance(index, faiss.IndexNSG):
        return NSG_LEAST
    if index.is_trained:
        return 0
    needed = []
    if isinstance(index, faiss.IndexPreTransform):
        chain = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
        untrained = [step for step in chain if not step.is_trained]
        needed += [max(10 * dim, 256 * POINTS if isinstance(step, faiss.OPQMatrix) else 0) for step in untrained]
    if isinstance(index, faiss.IndexIVF):
        quantizer: Any = faiss.downcast_index(index.quantizer)
        multi = isinstance(quantizer, faiss.MultiIndexQuantizer)
        needed.append(POINTS * (quantizer.pq.ksub if multi else index.nlist))
    for name in ("index", "base_index", "refine_index", "storage"):
        if getattr(index, name, None) is not None:
            needed.append(points_to_train(getattr(index, name), dim))
    for name in ("pq", "rq", "lsq", "prq", "plsq", "aq", "sq"):
        coder = getattr(index, name, None)
        if coder is not None:
            bits = 8 if name == "sq" else coder.nbits if name == "pq" else faiss.vector_to_array(coder.nbits).max(initial=0)
            needed.append(POINTS * 2 ** int(bits))
    return max(needed, default=1000)


def _removes(index: Any) -> bool:
    try:
        index.remove_ids(faiss.IDSelectorRange(0, 0))
    except RuntimeError:
        return False
    return True


def _reason(error: Exception) -> str:
    """What FAISS says without the place in its source."""
    text = re.sub(r"^Error in .* at \S+:\d+: (Error: '.*' failed: ?)?", "", str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__


def _ids(ids: Tensor) -> np.ndarray:
    whole = isinstance(ids, Tensor) and ids.dim() == 1 and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole:
        what = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError(f"ids come as one row of whole numbers, not as {what}")
    return ids.detach().to("cpu", torch.int64).contiguous().numpy()


def _some(values: np.ndarray, one: str = "id", many: str = "ids") -> str:
    """'id 4 is', 'ids 4, 7 are', 'ids 4, 7, 8, 9, 10 and 3 more are'"""
    names = ", ".join(str(value) for value in values[:5])
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return f"{one} {names} is" if len(values) == 1 else f"{many} {names}{more} are"
