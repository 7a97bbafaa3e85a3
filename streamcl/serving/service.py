"""The model behind the server: concurrent requests become micro-batches, and one writer learns from them in one order.

    request -> queue -> answered together -> journalled together -> each gets its rows
                                                    \\-> learned by the writer, in the journal's order

In shadow mode answering and learning are two threads, so that no request waits for an update; inline they are one. What is acknowledged
is in the journal. What becomes of it there is in `writer.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.errors import DataError, DiskError, StreamclError
from streamcl.learned import Learned
from streamcl.serving.deltas import Follower, Publisher
from streamcl.serving.inputs import Refused
from streamcl.serving.journal import Journal
from streamcl.serving.writer import FIGURES, Keys, Writer, settle
from streamcl.stream import Batch, Prediction

if TYPE_CHECKING:
    from streamcl.online_loop import OnlineLoop

PATIENCE = 0.05  # seconds in the queue after which it is asked whether the client is still there
RETRY = {"Retry-After": "1"}
NOBODY = -1  # the id of samples that are only answered
NEWEST = 256  # samples over which figures of the answers are averaged
QUICK = 0.001  # seconds: a model that answers faster is not handed to another thread, for the way there would take as long
SELDOM = 16  # micro-batches of which one is timed while they are quick: a thread's own time is a call into the kernel
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
    scores: np.ndarray
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
    answered: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    answer: Answer | None = None  # which is told when its samples are kept
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
        self.limits, self.follower, self.tell = limits or Limits(), follower, tell
        self.inputs: deque[tuple[Batch, Answer]] = deque(maxlen=shown)
        self.dropped = 0
        self.events: deque[dict[str, Any]] = deque(maxlen=50)  # of the server's own; those of the loop are in its status
        self.closing = False
        self._queue: deque[Waiting] = deque()
        self._to_keep: deque[Waiting] = deque()
        self._keys: set[str] = set()
        self.queued = 0  # samples
        self._cost = 10 * QUICK  # seconds that a micro-batch takes
        self._rounds = 0
        self._newest: deque[np.ndarray] = deque()  # scores of the newest answers
        self._rows_kept = 0  # how many they are
        self._status: dict[str, Any] = loop.status()
        self._status_at = time.monotonic()
        self.writer: Writer | None = None
        if follower is None:
            self.writer = Writer(
                loop,
                folder,
                model=model,
                limits=self.limits,
                publisher=publisher,
                happened=self._happened,
                learned=lambda adapted: self._refresh(FRESH if adapted else 0),
                tell=tell,
            )
            self._refresh(0)

    @property
    def inline(self) -> bool:
        return self.loop.mode == "inline"

    @property
    def journal(self) -> Journal | None:
        return None if self.writer is None else self.writer.journal

    @property
    def unlearned(self) -> int:
        """Samples that were taken in and wait for the writer."""
        return 0 if self.writer is None else self.writer.unlearned

    # -- starting and stopping ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to answer. Called inside of the event loop."""
        self._arrived, self._to_write = asyncio.Event(), asyncio.Event()
        self._model = ThreadPoolExecutor(1, "model")
        self._learner = self._model if self.inline or self.writer is None else ThreadPoolExecutor(1, "writer")
        self._disk = ThreadPoolExecutor(1, "journal")
        self._tasks = [asyncio.create_task(self._answering())]
        if self.writer is None:
            self._tasks.append(asyncio.create_task(self._following()))
        else:
            self._tasks += self.writer.start(self._learner, self._disk)
            if self.limits.sync:
                self._tasks.append(asyncio.create_task(self._keeping()))

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
        if self.writer is not None:
            with suppress(DiskError):  # what is not in the state is in the journal
                await loop.run_in_executor(self._learner, self.writer.save)
        for pool in (self._model, self._learner, self._disk):
            pool.shutdown(wait=True)
        self.release()

    def release(self) -> None:
        """Let others have the folder."""
        if self.writer is not None:
            self.writer.release()

    # -- asking -------------------------------------------------------------------------------------------------------------------

    async def ask(self, batch: Batch, *, adapts: bool, key: str | None = None, gone: Callable[[], Awaitable[bool]] | None = None) -> Answer:
        """Answer a checked batch, and keep it to be learned from; `key` is that of a request which may be sent again."""
        limits = self.limits
        if self.closing:
            raise Refused(503, "the server is stopping: ask again in a moment", RETRY)
        if self.queued + len(batch) > limits.queue:
            raise Refused(503, f"{self.queued} samples wait to be answered (--queue): ask again in a moment", RETRY)
        first, writer = None, self.writer
        if adapts:
            self.check_writable()
            assert writer is not None
            if key is not None:
                if key in self._keys:
                    raise Refused(409, "a request with this Idempotency-Key is being answered: ask again in a moment", RETRY)
                known = writer.journal.known(key)
                if known is not None:
                    if known[1] != len(batch):
                        raise Refused(422, f"this Idempotency-Key came with {known[1]} samples before, and now with {len(batch)}")
                    adapts, first = False, known[0]
            if adapts and writer.unlearned + len(batch) > limits.queue:
                raise Refused(429, f"{writer.unlearned} samples wait to be learned (--queue): send it again in a moment", RETRY)
        if adapts:
            assert writer is not None
            first = writer.reserve(len(batch))
            if key is not None:
                self._keys.add(key)
            ids = np.arange(first, first + len(batch))
        else:
            ids = np.full(len(batch), NOBODY)
        batch.ids = torch.from_numpy(ids)
        waiting = Waiting(batch, adapts, key if adapts else None, gone)
        self.queued += len(batch)
        self._queue.append(waiting)
        self._arrived.set()
        try:
            async with asyncio.timeout(limits.timeout):
                answer = await waiting.answered
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
        assert self.writer is not None
        return await self.writer.order(kind, about)

    def check_writable(self) -> None:
        """Raise Refused where another server adapts."""
        if self.follower is not None:
            raise Refused(409, f"this replica follows {self.follower.folder}: ask the one that adapts")

    # -- answering ----------------------------------------------------------------------------------------------------------------

    async def _answering(self) -> None:
        """Take what waits, as much as one micro-batch holds, answer it, and have it kept."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self.limits.wait)
            group = await self._next()
            if not self._queue:
                self._arrived.clear()
            if not group:
                continue
            if self.inline:
                outcomes = await loop.run_in_executor(self._model, self._answer_inline, group)
            elif self._cost < QUICK:
                outcomes = self._timed(group)
            else:
                outcomes = await loop.run_in_executor(self._model, self._timed, group)
            kept = []
            for waiting, outcome in zip(group, outcomes, strict=True):
                if waiting.adapts and not self.inline and not isinstance(outcome, Exception):
                    waiting.answer = outcome
                    kept.append(waiting)
                    continue
                if not self.inline:
                    self._dropped(waiting)
                settle(waiting.answered, outcome)
            if kept and self.limits.sync:  # while that waits for the disk, others are answered
                self._to_keep.extend(kept)
                self._to_write.set()
            elif kept:
                await self._keep(kept)

    async def _next(self) -> list[Waiting]:
        """The next micro-batch, without those who have hung up before anything was done for them."""
        group: list[Waiting] = []
        samples = 0
        while self._queue and (not group or samples + len(self._queue[0].batch) <= self.limits.batch):
            waiting = self._queue.popleft()
            self.queued -= len(waiting.batch)
            if waiting.given_up or (time.monotonic() - waiting.since > PATIENCE and waiting.gone is not None and await waiting.gone()):
                self.dropped += 1
                self._dropped(waiting)
                waiting.answered.cancel()
                continue
            group.append(waiting)
            samples += len(waiting.batch)
        return group

    async def _keeping(self) -> None:
        """Keep what was answered, all that waits in one go."""
        while True:
            await self._to_write.wait()
            group = [self._to_keep.popleft()]
            samples = len(group[0].batch)
            while self._to_keep and samples + len(self._to_keep[0].batch) <= self.limits.batch:
                samples += len(self._to_keep[0].batch)
                group.append(self._to_keep.popleft())
            if not self._to_keep:
                self._to_write.clear()
            await self._keep(group)

    async def _keep(self, group: list[Waiting]) -> None:
        """Have the samples of these requests learned, and tell their answers as soon as that is sure."""
        assert self.writer is not None
        for waiting in [waiting for waiting in group if waiting.given_up]:  # it was told so
            self._dropped(waiting)
            group.remove(waiting)
        if not group:
            return
        try:
            await self.writer.keep(*together(group))
        except Exception as error:
            for waiting in group:
                self._dropped(waiting)
                settle(waiting.answered, error)
        else:
            for waiting in group:
                settle(waiting.answered, waiting.answer)

    def _dropped(self, waiting: Waiting) -> None:
        """Nothing will be learned from this request."""
        if waiting.adapts and self.writer is not None:
            self.writer.dropped(len(waiting.batch))

    def _timed(self, group: Sequence[Waiting]) -> list[Answer | Exception]:
        """`_answer`, and how long it takes: from that it is known whether another thread is worth the way there."""
        self._rounds += 1
        if self._cost < QUICK and self._rounds % SELDOM:
            return self._answer(group)
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
            assert self.writer is not None
            prediction = self.writer.keep_now(*together(adapting))
            answers = [prediction] * len(adapting) if isinstance(prediction, Exception) else self._rows(prediction, adapting)
            outcomes |= dict(zip(adapting, answers, strict=True))
        if asking:
            outcomes |= dict(zip(asking, self._answer(asking), strict=True))
        return [outcomes[waiting] for waiting in group]

    def _rows(self, prediction: Prediction | None, group: Sequence[Waiting]) -> list[Answer | Exception]:
        """What each request of a micro-batch is told."""
        scores = None if prediction is None else prediction.scores
        if prediction is None or scores is None:
            raise DataError("this model answers with something else than scores, and is not served")
        scores = scores.detach().float().cpu()
        given, values = named(self.learned, scores, prediction.threshold), scores.numpy()
        sure: list[float] | None = None
        if self.learned.info.target == "class":
            with np.errstate(all="ignore"):
                sure = (1 / np.exp(values - values.max(axis=1, keepdims=True)).sum(axis=1)).tolist()
            self._newest.append(values)
            self._rows_kept += len(values)
            while self._rows_kept - len(self._newest[0]) >= NEWEST:
                self._rows_kept -= len(self._newest.popleft())
        answers: list[Answer | Exception] = []
        at, version = 0, prediction.version or 0
        for waiting in group:
            rows = slice(at, at + len(waiting.batch))
            at = rows.stop
            answers.append(Answer(given[rows], None if sure is None else sure[rows], values[rows], version, prediction.made))
        return answers

    # -- replicas -----------------------------------------------------------------------------------------------------------------

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

    def certainty(self) -> dict[str, float | None]:
        """Mean entropy, in nats, and mean confidence of the newest answers."""
        found: dict[str, float | None] = {"entropy": None, "confidence": None}
        scores = [torch.from_numpy(one) for one in self._newest.copy()]
        if scores:
            logs = torch.cat([one.log_softmax(dim=1) for one in scores if one.shape[1] == scores[-1].shape[1]])
            entropy = torch.special.entr(logs.exp()).sum(dim=1)
            sound = entropy.isfinite()
            if bool(sound.any()):
                found = {"entropy": float(entropy[sound].mean()), "confidence": float(logs.amax(dim=1)[sound].exp().mean())}
        return found

    async def status(self) -> dict[str, Any]:
        """What the loop and the server have done so far, as JSON values."""
        if not self.closing and time.monotonic() - self._status_at >= FRESH:  # a busy writer does it by itself
            await asyncio.wait([asyncio.get_running_loop().run_in_executor(self._learner, self._refresh)], timeout=FRESH)
        return {
            **self._status,
            "version": self.loop.version,
            "model": self.model,
            "mode": self.loop.mode,
            **self.certainty(),
            "follows": None if self.follower is None else str(self.follower.folder),
            "server": {
                "queued": self.queued,
                "unlearned": self.unlearned,
                **(dict.fromkeys(FIGURES, 0) if self.writer is None else self.writer.figures()),
                "dropped": self.dropped,
                "events": list(self.events),
            },
        }


def together(group: Sequence[Waiting]) -> tuple[Batch, Keys]:
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
