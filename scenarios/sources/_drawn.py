"""Samples that are made on the spot: randomness that depends on the seed and the sample alone, and data sets of what it draws.

A generator that is read in order would make a sample depend on those drawn before it. Here every number is a hash of (seed, purpose,
sample, place): the finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), once for the sample and once for the place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data import ArrayDataset, FileDataset
from streamcl.seeding import derived
from streamcl.stream import Column, Dataset, join

from ._records import EAGER_LIMIT

CHUNK = 512  # samples that are drawn together: what a chunk needs stays small
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

Make = Literal["eager", "lazy", "auto"]


def _mix(state: np.ndarray) -> np.ndarray:
    """Scatter counters over all 64 bits, in place."""
    state ^= state >> np.uint64(30)
    state *= _FIRST
    state ^= state >> np.uint64(27)
    state *= _SECOND
    state ^= state >> np.uint64(31)
    return state


class Draws:
    """Random numbers for the samples `rows` of one part of a source, `count` of them for each."""

    def __init__(self, seed: int, *part: object) -> None:
        self.seed, self.part = seed, part

    def bits(self, rows: np.ndarray, purpose: str, count: int) -> np.ndarray:
        """uint64 (rows, count)"""
        key = np.uint64(derived(self.seed, *self.part, purpose))
        state = _mix(rows.astype(np.uint64) * _STEP + key)
        return _mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _STEP)

    def uniform(self, rows: np.ndarray, purpose: str, count: int) -> np.ndarray:
        """Numbers from 0 to below 1, float64 (rows, count)"""
        return (self.bits(rows, purpose, count) >> np.uint64(11)) * 2.0**-53

    def whole(self, rows: np.ndarray, purpose: str, count: int, below: int | np.ndarray) -> np.ndarray:
        """Whole numbers from 0 to below `below`, int64 (rows, count)"""
        return (self.uniform(rows, purpose, count) * below).astype(np.int64)

    def noise(self, rows: np.ndarray, purpose: str, count: int) -> np.ndarray:
        """Noise with mean 0 and deviation 1, float32 (rows, count): sums of four 16-bit numbers, normal up to 3.46 deviations."""
        values = np.empty((len(rows), count), np.float32)
        for start in range(0, len(rows), 16):  # few enough to stay in the processor's cache
            lanes = self.bits(rows[start : start + 16], purpose, count).view(np.uint16).reshape(-1, count, 4)
            np.add(lanes[..., 0], lanes[..., 1], out=values[start : start + 16], dtype=np.float32)
            values[start : start + 16] += lanes[..., 2]
            values[start : start + 16] += lanes[..., 3]
        values -= np.float32(2 * 65535)
        values *= np.float32(np.sqrt(3 / (65536**2 - 1)))
        return values


class _Decode:
    """Hands row numbers on as an array."""

    def __init__(self, draw: Callable[[np.ndarray], dict[str, Column]]) -> None:
        self.draw = draw

    def __call__(self, rows: list[int]) -> dict[str, Column]:
        return self.draw(np.asarray(rows, dtype=np.int64))


def drawn(
    draw: Callable[[np.ndarray], dict[str, Column]],
    targets: Tensor,
    first_id: int,
    make: Make,
    extra: dict[str, Column] | None = None,
) -> Dataset:
    """What `draw` makes of row numbers as a data set: at once, or when it is read; `auto` asks how large it would become."""
    ids = first_id + torch.arange(len(targets))
    first = draw(np.arange(min(1, len(targets))))
    nbytes = sum(column.nbytes for column in first.values() if isinstance(column, Tensor)) * len(targets)
    if make == "lazy" or (make == "auto" and nbytes > EAGER_LIMIT):
        return FileDataset(_Decode(draw), targets, ids, workers=0, extra=extra)
    chunks = [draw(rows) for rows in np.array_split(np.arange(len(targets)), range(CHUNK, len(targets), CHUNK))]
    return ArrayDataset({name: join([chunk[name] for chunk in chunks]) for name in first}, targets, ids, extra=extra)
