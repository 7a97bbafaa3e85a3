"""Random numbers by counter: what a row draws depends on its key, its own number and the attempt, never on the rows beside it.

The mixer is SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014; public domain), applied to a whole column at once.
"""

from __future__ import annotations

from copy import copy

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def fingerprint(scene: NDArray[np.integer], salt: int) -> NDArray[np.uint64]:
    """One number per row of a scene, the same wherever and whenever the scene is drawn  # (rows,)"""
    code = mixed(np.full(len(scene), salt, dtype=np.uint64) + GOLDEN)
    for column in scene.T:
        code = mixed(code * GOLDEN + column.astype(np.uint64))
    return code


class Dice:
    """A column of throws at a time, one for each row. `once` throws the same in every attempt, the others anew."""

    def __init__(self, key: int, rows: Numbers, attempt: int) -> None:
        self.size = len(rows)
        self._once = mixed(mixed(np.full(self.size, key, dtype=np.uint64)) + rows.astype(np.uint64) * GOLDEN)
        self._again = mixed(self._once + np.uint64(attempt + 1))
        self._throws = 0

    def rows(self, chosen: NDArray[np.bool_]) -> Dice:
        """The dice of some of the rows, as they stand now."""
        part = copy(self)
        part.size, part._once, part._again = int(chosen.sum()), self._once[chosen], self._again[chosen]
        return part

    def _words(self, source: NDArray[np.uint64], width: int) -> NDArray[np.uint64]:
        self._throws += width
        counters = np.arange(self._throws - width + 1, self._throws + 1, dtype=np.uint64) * GOLDEN
        return mixed(source[:, None] + counters)  # (rows, width)

    def once(self, below: int | Numbers) -> Numbers:
        """A whole number from 0 to below `below`: what must keep its balance, whatever else is thrown again."""
        return (self._words(self._once, 1)[:, 0] % np.asarray(below).astype(np.uint64)).astype(np.int64)

    def below(self, below: int | Numbers) -> Numbers:
        return (self._words(self._again, 1)[:, 0] % np.asarray(below).astype(np.uint64)).astype(np.int64)

    def between(self, low: int | Numbers, high: int | Numbers) -> Numbers:
        """A whole number from `low` to `high`, both included."""
        low, high = np.asarray(low, dtype=np.int64), np.asarray(high, dtype=np.int64)
        return low + self.below(high - low + 1)

    def fractions(self, width: int) -> NDArray[np.float64]:
        """Numbers from 0 to below 1  # (rows, width)"""
        return (self._words(self._again, width) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def many(self, below: int, width: int) -> Numbers:
        """Whole numbers from 0 to below `below`  # (rows, width)"""
        return (self._words(self._again, width) % np.uint64(below)).astype(np.int64)

    def orders(self, width: int) -> Numbers:
        """Permutations of 0 to `width` - 1  # (rows, width)"""
        return self._words(self._again, width).argsort(axis=1, kind="stable")
