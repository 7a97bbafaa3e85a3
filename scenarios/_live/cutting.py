"""Where a task ends: after so many records, after so much time, or where what is watched changes."""

from __future__ import annotations

import inspect
import math
from collections import Counter, deque
from typing import Any, Protocol

from streamcl.errors import ConfigError
from streamcl.seeding import derived

from .spool import Cut, Spool

DETECTORS = {"adwin": "ADWIN", "kswin": "KSWIN", "page_hinkley": "PageHinkley"}
ENTROPY_WINDOW = 100  # labels
CHUNK = 4096  # records that are looked at in one go


class Detector(Protocol):
    """What River's detectors share."""

    drift_detected: bool

    def update(self, x: float) -> Any: ...


def make_detector(name: str, options: dict[str, Any], seed: int) -> Detector:
    """One of River's detectors; what it draws at random it draws the same way every time."""
    try:
        from river import drift
    except ImportError:
        raise ConfigError('live: change needs River, which is not installed: pip install "streamcl[live]"') from None
    kind = getattr(drift, DETECTORS[name])
    known = inspect.signature(kind).parameters
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"live: detector: {name} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
    if "seed" in known:
        options = {"seed": derived(seed, "detector") % 2**32, **options}
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"live: detector: {name} cannot be made of {options}: {error}") from None


class Cutter:
    """Goes through the records once and says where the next task ends.

    A task is begun with a new detector, so that where it ends depends on its own records alone, and a stream that was killed is cut as
    one that was not. Every task has a record to learn from: held-out ones alone are no task.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        count: int | None,
        seconds: float | None,
        change: str | None,
        watch: str,
        detector: dict[str, Any],
        seed: int,
    ) -> None:
        self.spool, self.count, self.seconds, self.change, self.watch = spool, count, seconds, change, watch
        self.options, self.seed = detector, seed
        self._begin()

    def _begin(self) -> None:
        self.at = self.start = self.spool.cuts[-1].stop if self.spool.cuts else 0
        self.learnable = 0
        self.began = math.inf
        self.detector = None if self.change is None else make_detector(self.change, self.options, self.seed)
        self.labels: deque[str] = deque()
        self.counts: Counter[str] = Counter()

    def look(self, now: float, ending: bool = False) -> Cut | None:
        """Cut the next task where it has ended by now; with `ending` nothing comes any more, and what there is is the last one."""
        full = self.change is not None and self.spool.full()  # asked before looking: what comes meanwhile belongs to the next look
        while rows := self.spool.after(self.at, CHUNK):
            for number, label, held, arrived, watched in rows:
                reason = self._ends_before(label, arrived, watched)
                if reason is not None:
                    return self._cut(number, reason)
                self.at = number + 1
                self.learnable += not held
                self.began = min(self.began, arrived)
                if self.learnable == self.count and not held:
                    return self._cut(self.at, "count")
        if self.learnable:
            if self.seconds is not None and now >= self.began + self.seconds:
                return self._cut(self.at, "time")
            if ending or full:
                return self._cut(self.at, "end" if ending else "queue")
        return None

    def _ends_before(self, label: str, arrived: float, watched: float | None) -> str | None:
        if self.learnable and self.seconds is not None and arrived >= self.began + self.seconds:
            return "time"
        if self.detector is not None:
            self.detector.update(self._entropy(label) if self.watch == "label_entropy" else watched)  # type: ignore[arg-type]
            if self.detector.drift_detected and self.learnable:
                return "change"
        return None

    def _entropy(self, label: str) -> float:
        """Of the last labels, in bits."""
        self.labels.append(label)
        self.counts[label] += 1
        if len(self.labels) > ENTROPY_WINDOW:
            self.counts[self.labels.popleft()] -= 1
        shares = [count / len(self.labels) for count in self.counts.values() if count]
        return -math.fsum(share * math.log2(share) for share in shares)

    def _cut(self, stop: int, reason: str) -> Cut:
        cut = self.spool.cut(stop, self.learnable, reason)
        self._begin()
        return cut
