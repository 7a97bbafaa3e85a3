"""The writer: what was taken in, learned in the journal's order, and on disk with the number of the last entry that is in it.

In shadow mode it is a thread of its own, and no request waits for it; inline it is the thread that answers. The state of the loop is saved
now and then in one checkpoint that appears whole or not at all; what the journal has behind its number is learned again after a kill. So
nothing is lost or learned twice.
"""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from streamcl.checkpoint import Checkpoints
from streamcl.errors import DiskError, RunError, StreamclError
from streamcl.serving.deltas import Publisher
from streamcl.serving.journal import Entry, Journal
from streamcl.stream import Batch, Prediction

if TYPE_CHECKING:
    from streamcl.online_loop import OnlineLoop
    from streamcl.serving.service import Limits

STATES = 2  # that are kept; the journal goes back to the older one
FIGURES = ("acknowledged", "learned", "learned_upto", "updates", "replayed", "failed")

Keys = list[tuple[str, int, int]]


class Writer:
    """One loop and the folder that its journal and its states are in, which no other process may have meanwhile.

    `happened` is told what the server's events are, `learned` after each update (True) and each order (False), in the writer's thread.
    """

    def __init__(
        self,
        loop: OnlineLoop,
        folder: Path,
        *,
        model: str,
        limits: Limits,
        publisher: Publisher | None,
        happened: Callable[[str, str], None],
        learned: Callable[[bool], None],
        tell: Callable[[str], None],
    ) -> None:
        self.loop, self.folder, self.model, self.limits, self.publisher = loop, folder, model, limits, publisher
        self.happened, self.learned = happened, learned
        self.replayed = self.failed = self.updates = 0
        self._pending: deque[Entry] = deque()
        self._samples = self._orders = 0  # that are pending
        self._results: dict[int, asyncio.Future[Any]] = {}
        self._alarm: asyncio.TimerHandle | None = None  # when what is pending has waited long enough
        self._taken = self._done = 0  # samples to learn from; the event loop's thread writes the one, the writer's the other
        folder.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = (folder / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunError(f"{folder} is in use by another server; stop it first, or let this one follow it (--follow)") from error
        self.journal = Journal(folder / "journal.db", limits.sync)
        self.states = Checkpoints(folder / "states", keep=STATES)
        self.cursor = self.passed = 0  # the last entry that was learned, and all samples up to it
        self._resume(tell)

    @property
    def inline(self) -> bool:
        return self.loop.mode == "inline"

    @property
    def unlearned(self) -> int:
        """Samples that were taken in and wait to be learned."""
        return self._taken - self._done

    def figures(self) -> dict[str, int]:
        told = (self.journal.samples, self.passed, self.cursor, self.updates, self.replayed, self.failed)
        return dict(zip(FIGURES, told, strict=True))

    # -- the folder ---------------------------------------------------------------------------------------------------------------

    def _resume(self, tell: Callable[[str], None]) -> None:
        """Be as the newest state says, and learn what was acknowledged after it."""
        state = self.states.load(tell)
        if state is not None:
            self.cursor, self.passed = int(state["cursor"]), int(state["passed"])
            self.journal.settle(self.cursor, int(state["samples"]), int(state["next"]))
            if state["model"] == self.model:
                self.loop.restore(state["loop"])
            else:
                self.happened("begun anew", "the run's model or the strategy is another than the state on disk was made with")
        if not self.inline:  # what was taken in since was answered, and is only learned again; inline it is answered again as well
            self.loop.samples += max(0, self.journal.samples - (0 if state is None else int(state["samples"])))
        self._cursors = deque([self.cursor], maxlen=STATES)
        self._saved = (self.cursor, time.monotonic())
        self.next = self.journal.next  # the id of the next sample that is to be learned from
        waiting = self.journal.after(self.cursor)
        if state is None and waiting and waiting[0].number > 1:
            raise RunError(f"{self.folder / 'states'} is gone, and the journal beside it does not go back to the beginning: remove both")
        for entry in waiting:
            self._count(entry, 1)
        self._pending.extend(waiting)
        self._taken = self._samples
        self.journal.cuts = [cut for cut in self.journal.cuts if cut > self.cursor]
        started = time.monotonic()
        while self._pending and (self.inline or self.journal.cuts or self._pending[0].kind != "adapt"):
            self.replayed += len(group := self._group())
            self.apply(group)
        if self.replayed:
            tell(f"learned {self.replayed} entries of the journal again, in {time.monotonic() - started:.1f} s")
        self._publish()

    def save(self) -> None:
        """Write the state, with the number of the last entry that is in it. Only the writer's thread calls this."""
        if self._saved[0] == self.cursor:
            return
        journal, counts = self.journal, {"cursor": self.cursor, "passed": self.passed}
        journal.settle(0, 0, 0)  # the state is never ahead of what the journal knows
        self.states.save({"model": self.model, **counts, "samples": journal.samples, "next": journal.next, "loop": self.loop.state()})
        self._cursors.append(self.cursor)
        self._saved = (self.cursor, time.monotonic())
        journal.forget(self._cursors[0])

    def release(self) -> None:
        """Let others have the folder."""
        self.journal.close()
        self._lock.close()

    # -- taking in ----------------------------------------------------------------------------------------------------------------

    def start(self, pool: ThreadPoolExecutor, disk: ThreadPoolExecutor) -> list[asyncio.Task[None]]:
        """Begin to learn, in `pool`. Called inside of the event loop, to which everything below belongs but `apply` and `keep_now`."""
        self._pool, self._disk, self._due = pool, disk, asyncio.Event()
        self._look()
        return [asyncio.create_task(self._saving()), *(() if self.inline else (asyncio.create_task(self._learning()),))]

    def reserve(self, count: int) -> int:
        """The first of so many new ids, for samples that will be kept; or `dropped`."""
        first, self.next = self.next, self.next + count
        self._taken += count
        return first

    def dropped(self, count: int) -> None:
        """So many samples that have ids will not be kept."""
        self._taken -= count

    async def keep(self, batch: Batch, keys: Keys) -> None:
        """Have samples learned. When this returns they are on disk."""
        if self.journal.sync:
            entry = await asyncio.get_running_loop().run_in_executor(self._disk, self.journal.adapt, batch, keys)
        else:  # without a wait for the disk it is done sooner than another thread would begin
            entry = self.journal.adapt(batch, keys)
        self._add(entry)

    def keep_now(self, batch: Batch, keys: Keys) -> Prediction | Exception | None:
        """Inline: keep samples, and learn them as one update. In the writer's thread."""
        try:
            entry = self.journal.adapt(batch, keys, cut=True)
        except DiskError as error:
            self._done += len(batch)
            return error
        return self.apply([entry])

    async def order(self, kind: str, about: dict[str, Any]) -> Any:
        """Have something done to the model, in its turn, and return what came of it; None where that takes longer than a request may."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()

        def keep() -> Entry:
            entry = self.journal.order(kind, about)
            self._results[entry.number] = result
            return entry

        if self.inline:
            await loop.run_in_executor(self._pool, lambda: self.apply([keep()]))
        else:
            self._add(await loop.run_in_executor(self._disk, keep))
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await result
        except TimeoutError:
            return None

    def _add(self, entry: Entry) -> None:
        self._pending.append(entry)
        self._count(entry, 1)
        self._look()

    def _count(self, entry: Entry, sign: int) -> None:
        self._samples += sign * entry.samples
        self._orders += sign * (entry.kind != "adapt")

    def _look(self) -> None:
        """Wake who learns: now, where there is enough for an update or an order waits, or when the first entry has waited long enough."""
        if self._orders or self._samples >= self.limits.update:
            self._due.set()
        elif self._pending and self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(self.limits.idle, self._due.set)

    # -- learning -----------------------------------------------------------------------------------------------------------------

    async def _learning(self) -> None:
        """Let the writer learn what the journal holds, in its order."""
        loop = asyncio.get_running_loop()
        while True:
            await self._due.wait()
            group = self._group()
            self._due.clear()
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None
            self._look()
            await loop.run_in_executor(self._pool, self.apply, group)

    def _group(self) -> list[Entry]:
        """What one update takes: up to where the journal says that it ended, or all that waits and fits."""
        pending, cuts = self._pending, self.journal.cuts
        group = [pending.popleft()]
        if group[0].kind == "adapt" and cuts:
            last = cuts.pop(0)
            while group[-1].number < last:
                group.append(pending.popleft())
        elif group[0].kind == "adapt":
            samples = group[0].samples
            while pending and pending[0].kind == "adapt" and samples + pending[0].samples <= self.limits.batch:
                samples += pending[0].samples
                group.append(pending.popleft())
        for entry in group:
            self._count(entry, -1)
        return group

    def apply(self, group: Sequence[Entry]) -> Prediction | Exception | None:
        """In the writer's thread: learn one update's entries, or carry out an order. What fails is told, and would fail again."""
        entry = group[-1]
        adapts = entry.kind == "adapt"
        prediction: Prediction | Exception | None = None
        if adapts and not self.inline:
            with suppress(DiskError):  # then it may be learned in other updates after a kill, and still once
                self.journal.cut(entry.number)
        try:
            if adapts:
                batch = Batch.cat([one.batch() for one in group])
                if self.inline:
                    prediction = self.loop(batch)
                else:
                    self.loop.learn(batch)
                self.updates += 1
            else:
                self._told(entry, self._carry_out(entry))
        except Exception as error:
            if not isinstance(error, StreamclError) or adapts:  # an order that cannot be done is its sender's mistake
                self.failed += 1
                self.happened("failed", " ".join(f"{entry.kind} {entry.number}: {type(error).__name__}: {error}".split()))
            prediction = error
            if not adapts:
                self._told(entry, error)
        self.cursor = entry.number
        self._done += (samples := sum(one.samples for one in group))
        self.passed += samples
        self._publish()
        self.learned(adapts)
        return prediction

    def _carry_out(self, entry: Entry) -> Any:
        about, loop = entry.order(), self.loop
        if entry.kind == "feedback":
            return loop.feedback(torch.tensor(about["ids"]), torch.tensor(about["targets"]))
        if entry.kind == "rollback":
            return {"version": loop.rollback(about["version"])}
        return {"version": loop.promote()}

    def _told(self, entry: Entry, outcome: Any) -> None:
        result = self._results.pop(entry.number, None)
        if result is not None:
            result.get_loop().call_soon_threadsafe(settle, result, outcome)

    def _publish(self) -> None:
        if self.publisher is not None:
            try:
                self.publisher.publish(self.loop)
            except DiskError as error:
                self.happened("not published", str(error))

    async def _saving(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(self.limits.save, 1.0))
            with suppress(DiskError, RunError):  # then the next time
                await loop.run_in_executor(self._disk, self.journal.fold)
            if self.cursor != self._saved[0] and time.monotonic() >= self._saved[1] + self.limits.save:
                try:
                    await loop.run_in_executor(self._pool, self.save)
                except DiskError as error:  # the journal holds what the state lacks
                    self.happened("not saved", str(error))
                    self._saved = (self._saved[0], time.monotonic())


def settle(future: asyncio.Future[Any], outcome: Any) -> None:
    """Say what came of it, to whoever still waits."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
        future.exception()  # that nobody waits any more is no error
    else:
        future.set_result(outcome)
