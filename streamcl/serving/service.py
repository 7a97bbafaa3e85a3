"""The model behind the server: concurrent requests become micro-batches, and one writer learns from them in one order.

    request -> queue -> answered together -> each gets its rows
                  \\-> journalled together -> learned by the writer, in the journal's order

In shadow mode answering and learning are two threads, so that no request waits for an update; inline they are one. What is acknowledged
is in the journal. The state of the loop is saved now and then with the number of the last entry that is in it, both in one checkpoint that
appears whole or not at all; what the journal has behind that number is learned again after a kill. So nothing is lost or learned twice.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.checkpoint import Checkpoints
from streamcl.errors import DataError, DiskError, RunError, StreamclError
from streamcl.learned import Learned
from streamcl.serving.deltas import Follower, Publisher
from streamcl.serving.inputs import Refused
from streamcl.serving.journal import Entry, Journal
from streamcl.stream import Batch, Prediction

if TYPE_CHECKING:
    from streamcl.online_loop import OnlineLoop

STATES = 2  # that are kept; the journal goes back to the older one
PATIENCE = 0.05  # seconds in the queue after which it is asked whether the client is still there
RETRY = {"Retry-After": "1"}
NOBODY = -1  # the id of samples that are only answered
NEWEST = 256  # samples over which figures of the answers are averaged
QUICK = 0.001  # seconds: a model that answers faster is not handed to another thread, for the way there would take as long
FRESH = 0.25  # seconds that the figures on the page may be old

Order = Literal["feedback", "promote", "rollback"]


@dataclass(frozen=True)
class Limits:
    """What the server takes. `queue` samples may wait for an answer, and as many for the writer; a micro-batch has up to `batch`.

    An update is made of all that waits as soon as that are `update` samples, or `idle` seconds after the first of them came.
    """

    body: int = 8 << 20  # bytes
    most: int = 512  # samples in one request
    batch: int = 256
    queue: int = 4096
    timeout: float = 10.0  # seconds until a request is given up
    update: int = 64
    idle: float = 0.5
    wait: float = 0.0  # seconds that a request waits for others to be answered with it; those that come while the model is busy are anyway
    save: float = 30.0  # seconds between two states on disk
    sync: bool = False  # whether samples survive a power cut before they are acknowledged, at the price of a wait for the disk


@dataclass
class Answer:
    """The rows of one request: what is predicted, by which version, and from which id on its samples are numbered where they are kept."""

    predictions: list[Any]
    confidences: list[float] | None
    scores: Tensor | None
    version: int
    made: str
    first: int | None = None
    again: bool = False  # its key was known: nothing was learned from it this time


@dataclass(eq=False)
class Waiting:
    """A request in the queue."""

    batch: Batch
    adapts: bool
    key: str | None
    gone: Callable[[], Awaitable[bool]] | None
    since: float = field(default_factory=time.monotonic)
    predicted: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    kept: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    given_up: bool = False


class Service:
    """One model, its loop and its folder. `start` and everything after it belong to one event loop; `close` leaves the state on disk."""

    def __init__(
        self,
        learned: Learned,
        loop: OnlineLoop,
        folder: Path,
        *,
        model: str,
        limits: Limits | None = None,
        publisher: Publisher | None = None,
        follower: Follower | None = None,
        shown: int = 0,
        tell: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.learned, self.loop, self.folder, self.model = learned, loop, folder, model
        self.limits, self.publisher, self.follower, self.tell = limits or Limits(), publisher, follower, tell
        self.inputs: deque[tuple[Batch, Answer]] = deque(maxlen=shown)
        self.replayed = self.failed = self.dropped = self.updates = 0
        self.events: deque[dict[str, Any]] = deque(maxlen=50)  # of the server's own; those of the loop are in its status
        self.closing = False
        self._queue: deque[Waiting] = deque()
        self._to_keep: deque[Waiting] = deque()
        self._pending: deque[tuple[Entry, Batch | None]] = deque()
        self._results: dict[int, asyncio.Future[Any]] = {}
        self._keys: set[str] = set()
        self.queued = 0  # samples
        self._cost = 10 * QUICK  # seconds that a micro-batch takes
        self.entropy: float | None = None  # of the newest answers, in nats, averaged over some hundred samples
        self.confidence: float | None = None
        self._taken = self._done = 0  # samples to learn from; the event loop's thread writes the one, the writer's the other
        self._lock: IO[str] | None = None
        self.journal: Journal | None = None
        self.cursor = self.passed = 0  # the last entry that was learned, and all samples up to it
        self._status: dict[str, Any] = loop.status()
        self._status_at = time.monotonic()
        if follower is None:
            self._open()
            self._refresh(0)

    @property
    def inline(self) -> bool:
        return self.loop.mode == "inline"

    @property
    def unlearned(self) -> int:
        """Samples that were taken in and wait for the writer."""
        return self._taken - self._done

    # -- the folder ---------------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Take the folder, be as its newest state says, and learn what was acknowledged after it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunError(f"{self.folder} is in use by another server; stop it first, or let this one follow it (--follow)") from error
        self.journal = Journal(self.folder / "journal.db", self.limits.sync)
        self.states = Checkpoints(self.folder / "states", keep=STATES)
        state = self.states.load(self.tell)
        if state is not None:
            self.cursor, self.passed = int(state["cursor"]), int(state["passed"])
            self.journal.settle(self.cursor, int(state["samples"]), int(state["next"]))
            if state["model"] == self.model:
                self.loop.restore(state["loop"])
            else:
                self._happened("begun anew", "the run's model or the strategy is another than the state on disk was made with")
        if not self.inline:  # what was taken in since was answered, and is only learned again; inline it is answered again as well
            self.loop.samples += max(0, self.journal.samples - (0 if state is None else int(state["samples"])))
        self._cursors = deque([self.cursor], maxlen=STATES)
        self._saved = (self.cursor, time.monotonic())
        self.next = self.journal.next  # the id of the next sample that is to be learned from
        waiting = self.journal.after(self.cursor)
        if state is None and waiting and waiting[0].number > 1:
            raise RunError(f"{self.folder / 'states'} is gone, and the journal beside it does not go back to the beginning: remove both")
        self._pending.extend((entry, None) for entry in waiting)
        self._taken = sum(entry.samples for entry in waiting)
        self.journal.cuts = [cut for cut in self.journal.cuts if cut > self.cursor]
        started = time.monotonic()
        while self._pending and (self.inline or self.journal.cuts or self._pending[0][0].kind != "adapt"):
            self.replayed += len(group := self._group())
            self._apply(group)
        if self.replayed:
            self.tell(f"learned {self.replayed} entries of the journal again, in {time.monotonic() - started:.1f} s")
        self._publish()

    def save(self) -> None:
        """Write the state, with the number of the last entry that is in it. Only the writer's thread calls this."""
        if self.journal is None or self._saved[0] == self.cursor:
            return
        journal, counts = self.journal, {"cursor": self.cursor, "passed": self.passed}
        journal.settle(0, 0, 0)  # the state is never ahead of what the journal knows
        self.states.save({"model": self.model, **counts, "samples": journal.samples, "next": journal.next, "loop": self.loop.state()})
        self._cursors.append(self.cursor)
        self._saved = (self.cursor, time.monotonic())
        self.journal.forget(self._cursors[0])

    # -- starting and stopping ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to answer. Called inside of the event loop."""
        self._arrived, self._to_write, self._to_learn = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._model = ThreadPoolExecutor(1, "model")
        self._writer = self._model if self.inline or self.follower is not None else ThreadPoolExecutor(1, "writer")
        self._disk = ThreadPoolExecutor(1, "journal")
        self._tasks = [asyncio.create_task(self._answering())]
        if self.follower is not None:
            self._tasks.append(asyncio.create_task(self._following()))
        elif not self.inline:
            self._tasks += [asyncio.create_task(self._keeping()), asyncio.create_task(self._learning())]
        if self.journal is not None:
            self._tasks.append(asyncio.create_task(self._saving()))
        if self._pending:
            self._to_learn.set()

    async def close(self) -> None:
        """Finish what was taken in and save; what the writer has not learned stays in the journal."""
        self.closing = True
        deadline = time.monotonic() + self.limits.timeout
        while (self._queue or self._to_keep or self._keys) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        loop = asyncio.get_running_loop()
        if self.journal is not None:
            with suppress(DiskError):  # what is not in the state is in the journal
                await loop.run_in_executor(self._writer, self.save)
        for pool in (self._model, self._writer, self._disk):
            pool.shutdown(wait=True)
        self.release()

    def release(self) -> None:
        """Let others have the folder."""
        if self.journal is not None:
            self.journal.close()
        if self._lock is not None:
            self._lock.close()

    # -- asking -------------------------------------------------------------------------------------------------------------------

    async def ask(self, batch: Batch, *, adapts: bool, key: str | None = None, gone: Callable[[], Awaitable[bool]] | None = None) -> Answer:
        """Answer a checked batch, and keep it to be learned from; `key` is that of a request which may be sent again."""
        limits = self.limits
        if self.closing:
            raise Refused(503, "the server is stopping: ask again in a moment", RETRY)
        if self.queued + len(batch) > limits.queue:
            raise Refused(503, f"{self.queued} samples wait to be answered (--queue): ask again in a moment", RETRY)
        first = None
        if adapts:
            self.check_writable()
            if key is not None:
                if key in self._keys:
                    raise Refused(409, "a request with this Idempotency-Key is being answered: ask again in a moment", RETRY)
                assert self.journal is not None
                known = self.journal.known(key)
                if known is not None:
                    if known[1] != len(batch):
                        raise Refused(422, f"this Idempotency-Key came with {known[1]} samples before, and now with {len(batch)}")
                    adapts, first = False, known[0]
            if adapts and self.unlearned + len(batch) > limits.queue:
                raise Refused(429, f"{self.unlearned} samples wait to be learned (--queue): send it again in a moment", RETRY)
        ids = torch.from_numpy(np.arange(self.next, self.next + len(batch)) if adapts else np.full(len(batch), NOBODY))
        waiting = Waiting(batch.replace(ids=ids), adapts, key if adapts else None, gone)
        self.queued += len(batch)
        if adapts:
            first, self.next = self.next, self.next + len(batch)
            self._taken += len(batch)
            if key is not None:
                self._keys.add(key)
            if not self.inline:
                self._to_keep.append(waiting)
                self._to_write.set()
        self._queue.append(waiting)
        self._arrived.set()
        try:
            async with asyncio.timeout(limits.timeout):
                answer = await waiting.predicted
                if adapts:
                    await waiting.kept
        except TimeoutError:
            raise Refused(503, f"it took longer than {limits.timeout:g} s: ask again in a moment", RETRY) from None
        finally:
            waiting.given_up = True
            if key is not None and adapts:
                self._keys.discard(key)
        answer.first, answer.again = first, first is not None and not adapts
        if self.inputs.maxlen:
            self.inputs.append((batch, answer))
        return answer

    async def order(self, kind: Order, about: dict[str, Any]) -> Any:
        """Have something done to the model, in its turn, and return what came of it; None where that takes longer than a request may."""
        self.check_writable()
        if self.closing:
            raise Refused(503, "the server is stopping: ask again in a moment", RETRY)
        journal, loop = self.journal, asyncio.get_running_loop()
        assert journal is not None
        result: asyncio.Future[Any] = loop.create_future()

        def keep() -> Entry:
            entry = journal.order(kind, about)
            self._results[entry.number] = result
            return entry

        if self.inline:
            await loop.run_in_executor(self._writer, lambda: self._apply([(keep(), None)]))
        else:
            self._pending.append((await loop.run_in_executor(self._disk, keep), None))
            self._to_learn.set()
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await result
        except TimeoutError:
            return None

    def check_writable(self) -> None:
        """Raise Refused where another server adapts."""
        if self.follower is not None:
            raise Refused(409, f"this replica follows {self.follower.folder}: ask the one that adapts")

    # -- answering ----------------------------------------------------------------------------------------------------------------

    async def _answering(self) -> None:
        """Take what waits, as much as one micro-batch holds, and answer it."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self.limits.wait)
            group = await self._next()
            if not self._queue:
                self._arrived.clear()
            if group:
                if self.inline:
                    outcomes = await loop.run_in_executor(self._model, self._answer_inline, group)
                elif self._cost < QUICK:
                    outcomes = self._timed(group)
                else:
                    outcomes = await loop.run_in_executor(self._model, self._timed, group)
                for waiting, outcome in zip(group, outcomes, strict=True):
                    settle(waiting.predicted, outcome)

    async def _next(self) -> list[Waiting]:
        """The next micro-batch, without those who have hung up before anything was done for them."""
        group: list[Waiting] = []
        samples = 0
        while self._queue and (not group or samples + len(self._queue[0].batch) <= self.limits.batch):
            waiting = self._queue.popleft()
            self.queued -= len(waiting.batch)
            if await self._left(waiting):
                self.dropped += 1
                if waiting.adapts and self.inline:
                    self._taken -= len(waiting.batch)
                waiting.predicted.cancel()
                continue
            group.append(waiting)
            samples += len(waiting.batch)
        return group

    async def _left(self, waiting: Waiting) -> bool:
        """Whether nobody waits for this request any more, and nothing has been kept of it yet."""
        if waiting.kept.done():
            return False
        if not waiting.given_up and waiting.gone is not None and time.monotonic() - waiting.since > PATIENCE:
            waiting.given_up = await waiting.gone()
        return waiting.given_up

    def _timed(self, group: Sequence[Waiting]) -> list[Answer | Exception]:
        """`_answer`, and how long it takes: from that it is known whether another thread is worth the way there."""
        clock = time.thread_time if self.loop.context.device.type == "cpu" else time.perf_counter  # other threads' turns do not count
        began = clock()
        outcomes = self._answer(group)
        self._cost += 0.2 * (clock() - began - self._cost)
        return outcomes

    def _answer(self, group: Sequence[Waiting]) -> list[Answer | Exception]:
        """One forward pass for all; where that fails, each alone, so that no request pays for another."""
        try:
            return self._rows(self.loop.predict(Batch.cat([waiting.batch for waiting in group])), group)
        except Exception as error:
            return [error] if len(group) == 1 else [self._answer([waiting])[0] for waiting in group]

    def _answer_inline(self, group: Sequence[Waiting]) -> list[Answer | Exception]:
        """In the model's thread, which is the writer's: those who adapt first, as one batch of the journal, then the others."""
        adapting, asking = [w for w in group if w.adapts], [w for w in group if not w.adapts]
        outcomes: dict[Waiting, Answer | Exception] = {}
        if adapting:
            try:
                assert self.journal is not None
                batch, keys = together(adapting)
                entry = self.journal.adapt(batch, keys, cut=True)
            except DiskError as error:
                outcomes |= dict.fromkeys(adapting, error)
                self._done += sum(len(waiting.batch) for waiting in adapting)
            else:
                prediction = self._apply([(entry, entry.batch())])
                answers = [prediction] * len(adapting) if isinstance(prediction, Exception) else self._rows(prediction, adapting)
                outcomes |= dict(zip(adapting, answers, strict=True))
                for waiting in adapting:
                    waiting.kept.get_loop().call_soon_threadsafe(settle, waiting.kept, True)
        if asking:
            outcomes |= dict(zip(asking, self._answer(asking), strict=True))
        return [outcomes[waiting] for waiting in group]

    def _rows(self, prediction: Prediction | None, group: Sequence[Waiting]) -> list[Answer | Exception]:
        """What each request of a micro-batch is told."""
        scores = None if prediction is None else prediction.scores
        if prediction is None or scores is None:
            raise DataError("this model answers with something else than scores, and is not served")
        scores = scores.detach().float().cpu()
        given, sure = named(self.learned, scores, prediction.threshold), None
        if self.learned.info.target == "class":
            sure = self._watched(scores.numpy())
        answers: list[Answer | Exception] = []
        at = 0
        for waiting in group:
            rows = slice(at, at + len(waiting.batch))
            at = rows.stop
            version = prediction.version or 0
            answers.append(Answer(given[rows], None if sure is None else sure[rows], scores[rows], version, prediction.made))
        return answers

    def _watched(self, scores: np.ndarray) -> list[float]:
        """How sure the model is of each answer; and what the page shows of it."""
        with np.errstate(all="ignore"):
            log = scores - scores.max(axis=1, keepdims=True)
            log -= np.log(np.exp(log).sum(axis=1, keepdims=True))
            probabilities = np.exp(log)
            entropy = -float(np.where(probabilities > 0, probabilities * log, 0).sum(axis=1).mean())
        sure: list[float] = probabilities.max(axis=1).tolist()
        share = min(1.0, len(sure) / NEWEST)
        for name, value in (("entropy", entropy), ("confidence", sum(sure) / len(sure))):
            before = getattr(self, name)
            if math.isfinite(value):
                setattr(self, name, value if before is None else before + share * (value - before))
        return sure

    # -- keeping and learning -----------------------------------------------------------------------------------------------------

    async def _keeping(self) -> None:
        """Write what is to be learned from into the journal, all that waits in one go."""
        loop, journal = asyncio.get_running_loop(), self.journal
        assert journal is not None
        while True:
            await self._to_write.wait()
            group: list[Waiting] = []
            samples = 0
            while self._to_keep and (not group or samples + len(self._to_keep[0].batch) <= self.limits.batch):
                waiting = self._to_keep.popleft()
                if await self._left(waiting):
                    self._taken -= len(waiting.batch)
                    continue
                group.append(waiting)
                samples += len(waiting.batch)
            if not self._to_keep:
                self._to_write.clear()
            if not group:
                continue
            batch, keys = together(group)
            try:
                # Without a wait for the disk it is done sooner than another thread would begin.
                entry = await loop.run_in_executor(self._disk, journal.adapt, batch, keys) if journal.sync else journal.adapt(batch, keys)
            except Exception as error:
                self._taken -= samples
                for waiting in group:
                    settle(waiting.kept, error)
                continue
            for waiting in group:
                settle(waiting.kept, True)
            await asyncio.wait([waiting.predicted for waiting in group], timeout=self.limits.timeout)  # no answer has seen its own batch
            self._pending.append((entry, None))
            self._to_learn.set()

    async def _learning(self) -> None:
        """Let the writer learn what the journal holds, in its order."""
        loop = asyncio.get_running_loop()
        since: float | None = None
        while True:
            if not self._pending:
                self._to_learn.clear()
                await self._to_learn.wait()
            since = time.monotonic() if since is None else since
            if not self._ripe() and (left := self.limits.idle - (time.monotonic() - since)) > 0:
                self._to_learn.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._to_learn.wait()
                continue
            since = None
            await loop.run_in_executor(self._writer, self._apply, self._group())

    def _ripe(self) -> bool:
        """Whether there is enough for an update, or an order waits."""
        samples = 0
        for entry, _ in self._pending:
            samples += entry.samples
            if entry.kind != "adapt" or samples >= self.limits.update:
                return True
        return False

    def _group(self) -> list[tuple[Entry, Batch | None]]:
        """What one update takes: up to where the journal says that it ended, or all that waits and fits."""
        assert self.journal is not None
        group = [self._pending.popleft()]
        if group[0][0].kind != "adapt":
            return group
        cuts = self.journal.cuts
        if cuts:
            last = cuts.pop(0)
            while group[-1][0].number < last:
                group.append(self._pending.popleft())
            return group
        samples = group[0][0].samples
        while self._pending and self._pending[0][0].kind == "adapt" and samples + self._pending[0][0].samples <= self.limits.batch:
            samples += self._pending[0][0].samples
            group.append(self._pending.popleft())
        return group

    def _apply(self, group: Sequence[tuple[Entry, Batch | None]]) -> Prediction | Exception | None:
        """In the writer's thread: learn one update's entries, or carry out an order. What fails is told, and would fail again."""
        entry, journal = group[-1][0], self.journal
        prediction: Prediction | Exception | None = None
        assert journal is not None
        if entry.kind == "adapt" and not self.inline:
            with suppress(DiskError):  # then it may be learned in other updates after a kill, and still once
                journal.cut(entry.number)
        try:
            if entry.kind == "adapt":
                batch = Batch.cat([one.batch() if ready is None else ready for one, ready in group])
                if self.inline:
                    prediction = self.loop(batch)
                else:
                    self.loop.learn(batch)
                self.updates += 1
            else:
                self._told(entry, self._carry_out(entry))
        except Exception as error:
            if not isinstance(error, StreamclError) or entry.kind == "adapt":  # an order that cannot be done is its sender's mistake
                self.failed += 1
                self._happened("failed", " ".join(f"{entry.kind} {entry.number}: {type(error).__name__}: {error}".split()))
            prediction = error
            if entry.kind != "adapt":
                self._told(entry, error)
        self.cursor = entry.number
        self._done += (samples := sum(one.samples for one, _ in group))
        self.passed += samples
        self._publish()
        self._refresh(FRESH if entry.kind == "adapt" else 0)
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

    async def _saving(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(self.limits.save, 1.0))
            with suppress(DiskError, RunError):  # then the next time
                assert self.journal is not None
                await loop.run_in_executor(self._disk, self.journal.fold)
            if self.cursor != self._saved[0] and time.monotonic() >= self._saved[1] + self.limits.save:
                try:
                    await loop.run_in_executor(self._writer, self.save)
                except DiskError as error:  # the journal holds what the state lacks
                    self._happened("not saved", str(error))
                    self._saved = (self._saved[0], time.monotonic())

    # -- replicas -----------------------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        if self.publisher is not None:
            try:
                self.publisher.publish(self.loop)
            except DiskError as error:
                self._happened("not published", str(error))

    async def _following(self) -> None:
        """Look for what the one that adapts has published, and serve it from the next micro-batch on."""
        loop, follower = asyncio.get_running_loop(), self.follower
        assert follower is not None
        while True:
            try:
                found = await loop.run_in_executor(self._disk, follower.look)
                if found is not None:
                    await loop.run_in_executor(self._model, follower.take, self.loop, found)
            except StreamclError as error:
                if not self.events or self.events[-1]["why"] != str(error):
                    self._happened("not followed", str(error))
            await asyncio.sleep(follower.every)

    # -- figures ------------------------------------------------------------------------------------------------------------------

    def _happened(self, what: str, why: str) -> None:
        self.events.append({"time": round(time.time(), 3), "what": what, "why": why})
        self.tell(f"{what}: {why}")

    def _refresh(self, age: float = FRESH) -> None:
        now = time.monotonic()
        if now - self._status_at >= age:
            self._status, self._status_at = self.loop.status(), now

    async def status(self) -> dict[str, Any]:
        """What the loop and the server have done so far, as JSON values."""
        if not self.closing and time.monotonic() - self._status_at >= FRESH:  # a busy writer does it by itself
            await asyncio.wait([asyncio.get_running_loop().run_in_executor(self._writer, self._refresh)], timeout=FRESH)
        return {
            **self._status,
            "version": self.loop.version,
            "model": self.model,
            "mode": self.loop.mode,
            "entropy": self.entropy,
            "confidence": self.confidence,
            "follows": None if self.follower is None else str(self.follower.folder),
            "server": {
                "queued": self.queued,
                "unlearned": self.unlearned,
                "acknowledged": 0 if self.journal is None else self.journal.samples,
                "learned": self.passed,
                "learned_upto": self.cursor,
                "updates": self.updates,
                "replayed": self.replayed,
                "failed": self.failed,
                "dropped": self.dropped,
                "events": list(self.events),
            },
        }


def settle(future: asyncio.Future[Any], outcome: Any) -> None:
    """Say what came of it, to whoever still waits."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
        future.exception()  # that nobody waits any more is no error
    else:
        future.set_result(outcome)


def together(group: Sequence[Waiting]) -> tuple[Batch, list[tuple[str, int, int]]]:
    """Requests as one batch, and the ids of those with a key."""
    keys = [(waiting.key, int(waiting.batch.ids[0]), len(waiting.batch)) for waiting in group if waiting.key is not None]
    return Batch.cat([waiting.batch for waiting in group]), keys


def named(learned: Learned, scores: Tensor, threshold: float | None) -> list[Any]:
    """Scores by the names of the classes; a list of names where a sample may have several, values where there are no classes."""
    target = learned.info.target
    if target == "class":
        return [learned.classes[label] for label in scores.numpy().argmax(axis=1).tolist()]
    if target == "labels":
        rows = (scores.sigmoid() > (learned.info.threshold if threshold is None else threshold)).tolist()
        return [[name for name, there in zip(learned.classes, row, strict=False) if there] for row in rows]
    return scores.squeeze(1).tolist() if scores.dim() == 2 and scores.shape[1] == 1 else scores.tolist()
