"""Taking records in beside the learning: what every way in shares, and standard input."""

from __future__ import annotations

import os
import select
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from .records import LONG, Line, Parsed, Problem, Reader
from .spool import Ended, Full, Place, Receipt, Spool

PAUSE = 0.1  # seconds between two looks at whether there is room, or at whether to stop
READ = 1 << 16  # bytes
LONG_KEPT = 1000  # bytes of a line that is too long
LINES = 512  # that are taken in at once, at most


class Lines:
    """Cuts bytes into lines. Of one that is longer than `limit` only the beginning is kept, as a problem."""

    def __init__(self, source: str, limit: int, number: int = 0, offset: int = 0) -> None:
        self.source, self.limit, self.number, self.offset = source, limit, number, offset  # offset: where the last whole line ended
        self.rest = b""
        self.passed = 0  # bytes of a line that is too long, beyond what is kept in `rest`

    def feed(self, data: bytes) -> Iterator[Line | Problem]:
        """The lines that are complete with `data`."""
        *lines, rest = data.split(b"\n")
        for content in lines:
            yield from self._line(content, 1)
        if len(self.rest) + len(rest) > self.limit:
            kept = (self.rest + rest)[: max(LONG_KEPT, len(self.rest))]
            self.passed += len(self.rest) + len(rest) - len(kept)
            self.rest = kept
        else:
            self.rest += rest

    def end(self) -> Iterator[Line | Problem]:
        """What was left without a line end. A line end that comes later belongs to it."""
        if self.rest:
            yield from self._line(b"", 0)
            self.number -= 1

    def _line(self, content: bytes, terminator: int) -> Iterator[Line | Problem]:
        self.number += 1
        content = self.rest + content
        length = len(content) + self.passed
        self.offset += length + terminator
        self.rest, self.passed = b"", 0
        if length > self.limit:
            why = f"it is longer than {self.limit} bytes (body); only its beginning is kept here"
            yield Problem(Line(self.source, self.number, content[:LONG_KEPT], self.offset), LONG, why)
        elif content:
            yield Line(self.source, self.number, content, self.offset)


class Intake(ABC):
    """One way in. It reads in a thread of its own, so that records arrive while a task is learned, and waits while the queue is full."""

    def __init__(self, spool: Spool, reader: Reader) -> None:
        self.spool, self.reader = spool, reader
        self.size = min(LINES, spool.queue)  # lines that are taken in at once: the queue is overshot by fewer
        self.stopping = False  # at once
        self.finishing = False  # when what is there was taken in
        self.done = False  # nothing more will come this way
        self.thread = threading.Thread(target=self._guarded, name=f"live {type(self).__name__}", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def finish(self) -> None:
        """The stream ends: take in what waited for more of it, and then nothing."""
        self.finishing = True

    def stop(self) -> None:
        self.stopping = True
        if self.thread.is_alive():
            self.thread.join(timeout=5)

    @property
    @abstractmethod
    def where(self) -> str:
        """Where records are to come from, for a message."""

    @abstractmethod
    def run(self) -> None:
        """Read until `stopping`, or until nothing more can come."""

    def pause(self, seconds: float) -> bool:
        """Wait for so long, or until there is a reason not to; True where it is to stop at once."""
        until = time.monotonic() + seconds
        while not self.stopping and not self.finishing and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, PAUSE))
        return self.stopping

    def take(self, lines: list[Line | Problem], folder: Path | None, place: Place | None = None) -> Receipt | None:
        """Read these lines and take in what they hold."""
        parsed = self.reader.lines((line for line in lines if isinstance(line, Line)), folder)
        parsed.problems += [line for line in lines if isinstance(line, Problem)]
        return self.keep(parsed, place)

    def keep(self, parsed: Parsed, place: Place | None = None) -> Receipt | None:
        """Into the spool, as soon as there is room; None where the stream ended before."""
        while not self.stopping:
            try:
                return self.spool.take(parsed, place)
            except Full:
                time.sleep(PAUSE)
            except Ended:
                break
        return None

    def _guarded(self) -> None:
        try:
            self.run()
        except Exception as error:  # the thread has nobody who would hear it
            self.spool.fail(error)
        finally:
            with self.spool.changed:
                self.done = True
                self.spool.changed.notify_all()


class StandardInput(Intake):
    """JSON lines from standard input, or from another file descriptor. Its end is the end of what comes this way."""

    where = "standard input"

    def __init__(self, spool: Spool, reader: Reader, limit: int, descriptor: int = 0) -> None:
        super().__init__(spool, reader)
        self.lines, self.descriptor = Lines("standard input", limit), descriptor

    def run(self) -> None:
        while not self.stopping:
            # A blocking read could not be told to stop, and one through sys.stdin would hold its lock when the program ends.
            ready = select.select([self.descriptor], [], [], PAUSE)[0]
            if not ready and not self.finishing:
                continue
            data = os.read(self.descriptor, READ) if ready else b""
            lines = list(self.lines.feed(data) if data else self.lines.end())
            for start in range(0, len(lines), self.size):
                if self.take(lines[start : start + self.size], Path()) is None:
                    return
            if not data:
                return
