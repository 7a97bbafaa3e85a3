"""What changes the model, on disk before it is acknowledged, in the one order in which it will be learned.

An SQLite database with a write-ahead log, in a folder that a single process holds. An entry is a micro-batch of samples to adapt to, or
an order (feedback, promote, rollback). How many entries one update takes is settled here as well (`cut`), so that whoever learns them
again after a kill learns the same batches.

What is committed survives the end of the process, whatever ends it. Orders survive a power cut as well; samples, which carry no label, do
so with `sync`, which waits for the disk at every write, or else from the next state on (`settle`).
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from streamcl.errors import DiskError, RunError
from streamcl.stream import Batch
from streamcl.writing import disk_error

FORMAT = 1
KEYS = 100_000  # of the newest requests, so that one that is sent again is not learned again
TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE entry (number INTEGER PRIMARY KEY, kind TEXT NOT NULL, samples INTEGER NOT NULL, total INTEGER NOT NULL,
  next INTEGER NOT NULL, about TEXT NOT NULL, content BLOB NOT NULL);
CREATE TABLE cut (last INTEGER PRIMARY KEY);
CREATE TABLE key (key TEXT PRIMARY KEY, order_ INTEGER NOT NULL, first INTEGER NOT NULL, samples INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX key_order ON key (order_);
"""


@dataclass(frozen=True)
class Entry:
    """Entry `number`, counted from 1."""

    number: int
    kind: str  # adapt, feedback, promote, rollback
    samples: int
    about: str
    content: bytes
    ready: Batch | None = None  # its samples, where they are still in memory

    def batch(self) -> Batch:
        return unpacked(self.content, self.about) if self.ready is None else self.ready

    def order(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.about)
        return found


class Journal:
    """Every method may be called from any thread."""

    def __init__(self, path: Path, sync: bool = False) -> None:
        self.path, self.sync = path, sync
        self._lock = threading.RLock()
        try:
            self._base = sqlite3.connect(path, isolation_level=None, timeout=5, check_same_thread=False)
            with self._told():
                self._open()
        except sqlite3.DatabaseError as error:
            raise RunError(f"{path} cannot be used: {error}") from error

    def _open(self) -> None:
        run = self._base.execute
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA wal_autocheckpoint = 0")  # `fold` does it, so that no request waits for it
        self._wait_for_disk(self.sync)
        with self._transaction():
            if not run("SELECT 1 FROM sqlite_master").fetchall():
                for statement in TABLES.split(";"):
                    run(statement)
                run("INSERT INTO about VALUES ('format', ?)", (str(FORMAT),))
        about = dict(run("SELECT name, value FROM about").fetchall())
        if int(about["format"]) > FORMAT:
            raise RunError(
                f"{self.path} was made by a newer streamcl (format {about['format']}, this one reads {FORMAT}): upgrade streamcl"
            )
        newest = run("SELECT number, total, next FROM entry ORDER BY number DESC LIMIT 1").fetchone() or (0, 0, 0)
        counts = (max(int(about.get(name, 0)), value) for name, value in zip(("last", "samples", "next"), newest, strict=True))
        self.last, self.samples, self.next = counts  # the newest entry, all samples ever taken in, and what is above their ids
        self.cuts: list[int] = [last for (last,) in run("SELECT last FROM cut ORDER BY last")]
        self._keys = run("SELECT COALESCE(MAX(order_), 0) FROM key").fetchone()[0]

    # -- writing ------------------------------------------------------------------------------------------------------------------

    def adapt(self, batch: Batch, keys: Sequence[tuple[str, int, int]] = (), cut: bool = False) -> Entry:
        """Keep a micro-batch; when this returns it is on disk. `keys` are those of its requests: key, first id, samples.

        With `cut` an update ends with it.
        """
        about, content = packed(batch)
        with self._lock:
            number, samples, after = self.last + 1, self.samples + len(batch), int(batch.ids[-1]) + 1
            with self._told(), self._transaction() if keys or cut else nullcontext():  # one statement is a transaction
                run = self._base.execute
                run("INSERT INTO entry VALUES (?, 'adapt', ?, ?, ?, ?, ?)", (number, len(batch), samples, after, about, content))
                for place, (key, first, count) in enumerate(keys, 1):
                    run("INSERT OR IGNORE INTO key VALUES (?, ?, ?, ?)", (key, self._keys + place, first, count))
                if keys:
                    run("DELETE FROM key WHERE order_ <= ?", (self._keys + len(keys) - KEYS,))
                if cut:
                    run("INSERT OR IGNORE INTO cut VALUES (?)", (number,))
            self.last, self.samples, self.next, self._keys = number, samples, after, self._keys + len(keys)
            return Entry(number, "adapt", len(batch), "", b"", batch)

    def order(self, kind: str, about: dict[str, Any]) -> Entry:
        """Keep an order to the model; when this returns it is on disk."""
        text = json.dumps(about)
        with self._lock:
            number = self.last + 1
            with self._told():
                self._wait_for_disk(True)
                with self._transaction():
                    row = (number, kind, self.samples, self.next, text)
                    self._base.execute("INSERT INTO entry VALUES (?, ?, 0, ?, ?, ?, x'')", row)
                self._wait_for_disk(self.sync)
            self.last = number
            return Entry(number, kind, 0, text, b"")

    def cut(self, last: int) -> None:
        """One update ends with entry `last`; from now on it always does."""
        with self._lock, self._told():
            self._base.execute("INSERT OR IGNORE INTO cut VALUES (?)", (last,))

    def settle(self, last: int, samples: int, next: int) -> None:
        """All that was committed is on the disk when this returns. What a state knows to have been there is not given out again, also where
        a power cut has taken it."""
        with self._lock, self._told():
            if last > self.last:
                self.last, self.samples, self.next = last, max(samples, self.samples), max(next, self.next)
            self._wait_for_disk(True)
            with self._transaction():
                counts = {"last": self.last, "samples": self.samples, "next": self.next}
                rows = [(name, str(count)) for name, count in counts.items()]
                self._base.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", rows)
            self._wait_for_disk(self.sync)

    def _wait_for_disk(self, wait: bool) -> None:
        self._base.execute(f"PRAGMA synchronous = {'FULL' if wait else 'NORMAL'}")

    def fold(self) -> None:
        """Bring what the log holds into the database, by a connection of its own, beside which entries go on being written."""
        with self._told(), closing(sqlite3.connect(self.path, isolation_level=None, timeout=0)) as base:
            base.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def forget(self, upto: int) -> None:
        """Entries up to this one are in every state that is kept."""
        with self._lock, self._told(), self._transaction():
            self._base.execute("DELETE FROM entry WHERE number <= ?", (upto,))
            self._base.execute("DELETE FROM cut WHERE last <= ?", (upto,))

    # -- reading ------------------------------------------------------------------------------------------------------------------

    def known(self, key: str) -> tuple[int, int] | None:
        """First id and number of the samples that came with this key before."""
        with self._lock:
            row = self._base.execute("SELECT first, samples FROM key WHERE key = ?", (key,)).fetchone()
            return None if row is None else (row[0], row[1])

    def after(self, number: int) -> list[Entry]:
        """The entries behind this one, in their order."""
        with self._lock:
            rows = self._base.execute(
                "SELECT number, kind, samples, about, content FROM entry WHERE number > ? ORDER BY number", (number,)
            ).fetchall()
            return [Entry(*row) for row in rows]

    def close(self) -> None:
        with self._lock:
            self._base.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._base.execute("COMMIT")
        except BaseException:
            if self._base.in_transaction:
                self._base.execute("ROLLBACK")
            raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise RunError(f"{self.path} is in use by another process: stop it first") from error
            if "full" in str(error):
                raise disk_error(OSError(28, str(error)), self.path) from error
            raise DiskError(f"{self.path} could not be written ({error}). What was saved before is whole") from error


def packed(batch: Batch) -> tuple[str, bytes]:
    """A raw batch as JSON (its text) and safetensors (its numbers)."""
    tensors = {f"inputs.{name}": values for name, values in batch.inputs.items() if isinstance(values, torch.Tensor)}
    tensors |= {f"present.{name}": mask for name, mask in (batch.present or {}).items()}
    tensors["ids"] = batch.ids
    text = {name: values for name, values in batch.inputs.items() if isinstance(values, list)}
    head, order = _head(tuple((name, values.dtype, values.shape) for name, values in tensors.items()))
    content = b"".join((head, *(tensors[name].numpy().tobytes() for name in order)))
    return json.dumps({"order": list(batch.inputs), "text": text}), content


@lru_cache(maxsize=1024)
def _head(columns: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> tuple[bytes, list[str]]:
    """How safetensors begins for such tensors, and in which order their bytes follow: most of the work, and the same for every request."""
    whole = save({name: torch.zeros(shape, dtype=dtype) for name, dtype, shape in columns})
    head = whole[: 8 + int.from_bytes(whole[:8], "little")]
    told = json.loads(head[8:])
    return head, sorted(told, key=lambda name: told[name]["data_offsets"])


def unpacked(content: bytes, about: str) -> Batch:
    """The reverse of `packed`."""
    told, tensors = json.loads(about), load(content)
    inputs: dict[str, Any] = {name: told["text"][name] if name in told["text"] else tensors[f"inputs.{name}"] for name in told["order"]}
    present = {name.removeprefix("present."): mask for name, mask in tensors.items() if name.startswith("present.")}
    return Batch(inputs, None, tensors["ids"], present or None)
