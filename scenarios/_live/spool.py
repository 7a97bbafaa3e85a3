"""The spool: every record that was accepted, on disk before it is acknowledged, with the classes, the tasks and what was put aside.

It is one SQLite database that a single process holds (write-ahead log, synchronous: what is committed survives a kill and a power cut).
One transaction takes in a batch of lines: its records, those put aside, and how far its file was read. So all three are there or none.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcl.errors import ConfigError, DataError, DiskError, RunError
from streamcl.seeding import derived
from streamcl.writing import disk_error, write_atomically

from .records import AGAIN, CHANGED, FIELDS, UNLIKE, Line, Parsed, Problem, Record, Shapes, declared_shapes, told

FORMAT = 1
NEW_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE record (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, label TEXT NOT NULL, held INTEGER NOT NULL, arrived REAL NOT NULL,
  watched REAL, features BLOB, text TEXT, image BLOB, audio BLOB);
CREATE TABLE class (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, first INTEGER NOT NULL);
CREATE TABLE task (number INTEGER PRIMARY KEY, start INTEGER NOT NULL, stop INTEGER NOT NULL, learnable INTEGER NOT NULL,
  reason TEXT NOT NULL, problems TEXT NOT NULL);
CREATE TABLE file (name TEXT PRIMARY KEY, inode INTEGER NOT NULL, offset INTEGER NOT NULL, line INTEGER NOT NULL);
CREATE TABLE problem (number INTEGER PRIMARY KEY, source TEXT NOT NULL, line INTEGER NOT NULL, kind TEXT NOT NULL,
  reason TEXT NOT NULL, content BLOB NOT NULL);
"""


class Full(Exception):
    """The unlearned part is as long as it may be: come again later."""


class Ended(Exception):
    """The stream takes nothing more."""


@dataclass(frozen=True)
class Place:
    """How far a file of a directory was read."""

    name: str
    inode: int
    offset: int
    line: int


@dataclass(frozen=True)
class Receipt:
    """What became of some lines."""

    accepted: int
    duplicates: int
    problems: list[Problem]


@dataclass(frozen=True)
class Cut:
    """A task as it was cut: records from `start` to before `stop`, of which `learnable` are not held out."""

    number: int
    start: int
    stop: int
    learnable: int
    reason: str
    problems: dict[str, int]


class Spool:
    """What a live stream has taken in. `queue` records may wait to be learned; `holdout` of the ids, by their hash, are kept for scoring.

    Records count from 0 in the order in which they were accepted. Every method may be called from any thread.
    """

    def __init__(self, folder: Path, *, queue: int, holdout: float, seed: int, reads: dict[str, Any]) -> None:
        self.folder, self.queue, self.holdout, self.seed = folder, queue, holdout, seed
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        self.changed = threading.Condition(threading.RLock())  # guards everything below; notified when something was taken in
        self.failure: Exception | None = None  # of an intake: the one who waits raises it
        self.news = time.monotonic()  # when something last came in
        self.closed = False
        self.quarantine = folder / "quarantine.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        self.released = False
        self._base = sqlite3.connect(folder / "spool.db", isolation_level=None, timeout=0, check_same_thread=False)
        try:
            with self._told():
                self._open(reads)
        except BaseException:
            self._base.close()
            raise

    def _open(self, reads: dict[str, Any]) -> None:
        run = self._base.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("BEGIN IMMEDIATE")
        if not run("SELECT 1 FROM sqlite_master").fetchall():
            for statement in NEW_TABLES.split(";"):
                run(statement)
            new = {"format": str(FORMAT), "name": uuid.uuid4().hex, "reads": json.dumps(reads, sort_keys=True)}
            if reads["fields"] is not None:
                new["shapes"] = json.dumps(declared_shapes(reads["fields"]))
            self._base.executemany("INSERT INTO about VALUES (?, ?)", new.items())
        run("COMMIT")
        about = dict(run("SELECT name, value FROM about").fetchall())
        if int(about["format"]) > FORMAT:
            raise RunError(
                f"{self.folder} was made by a newer streamcl (format {about['format']}, this one reads {FORMAT}): upgrade streamcl"
            )
        self.name: str = about["name"]
        self.ended = "ended" in about  # by a record that said so
        self.shapes: Shapes | None = json.loads(about["shapes"]) if "shapes" in about else None
        for option, value in json.loads(about["reads"]).items():
            if value != reads[option]:
                raise ConfigError(
                    f"live: {option} is {json.dumps(reads[option])}, and the records in {self.folder} were taken in with "
                    f"{json.dumps(value)}: put that back, or name another spool"
                )
        self.count, self.learnable = run("SELECT COUNT(*), COUNT(*) - COALESCE(SUM(held), 0) FROM record").fetchone()
        self.arrived: float = run("SELECT COALESCE(MAX(arrived), 0) FROM record").fetchone()[0]
        self.classes: dict[str, int] = {name: number for number, name in run("SELECT number, name FROM class ORDER BY number")}
        self.problems: Counter[str] = Counter(dict(run("SELECT kind, COUNT(*) FROM problem GROUP BY kind").fetchall()))
        if "duplicates" in about:
            self.problems[AGAIN] = int(about["duplicates"])
        rows = run("SELECT number, start, stop, learnable, reason, problems FROM task ORDER BY number")
        self.cuts = [
            Cut(number, start, stop, learnable, reason, json.loads(problems)) for number, start, stop, learnable, reason, problems in rows
        ]
        self.learned = 0  # records, without those held out
        self.places: dict[str, Place] = {row[0]: Place(*row) for row in run("SELECT name, inode, offset, line FROM file")}
        self._write_quarantine()

    # -- taking in ------------------------------------------------------------------------------------------------------------------

    def take(self, parsed: Parsed, place: Place | None = None) -> Receipt:
        """Keep what was read. When this returns it is on disk and may be acknowledged. Raises Full or Ended, and then keeps nothing."""
        with self.changed:
            if self.closed or self.ended:
                raise Ended
            if self.full() and parsed.records:
                raise Full
            shapes, classes = self.shapes, dict(self.classes)
            problems, accepted, duplicates, learnable = list(parsed.problems), 0, 0, 0
            self.arrived = max(self.arrived, time.time())
            with self._told(), self._transaction():
                run = self._base.execute
                for record in parsed.records:
                    if shapes is None:
                        shapes = record.shapes
                        run("INSERT INTO about VALUES ('shapes', ?)", (json.dumps(shapes),))
                    if record.shapes != shapes:
                        problems.append(_unlike(record, shapes))
                        continue
                    held = int(self.holdout > 0 and derived(self.seed, "holdout", record.id) < self.holdout * 2**63)
                    number = self.count + accepted
                    new = run(
                        "INSERT INTO record VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                        (number, record.id, record.label, held, self.arrived, record.watched, *map(record.values.get, FIELDS)),
                    ).rowcount
                    accepted += new
                    changed = None if new else self._changed(record)
                    if changed is not None:
                        problems.append(changed)
                    duplicates += not new and changed is None
                    learnable += new * (1 - held)
                    if new and not held and record.label not in classes:
                        classes[record.label] = len(classes)
                        run("INSERT INTO class VALUES (?, ?, ?)", (classes[record.label], record.label, number))
                for problem in problems:
                    run(
                        "INSERT INTO problem (source, line, kind, reason, content) VALUES (?, ?, ?, ?, ?)",
                        (problem.line.source, problem.line.number, problem.kind, problem.reason, problem.line.content),
                    )
                if place is not None:
                    run("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?)", (place.name, place.inode, place.offset, place.line))
                if duplicates:
                    run("INSERT OR REPLACE INTO about VALUES ('duplicates', ?)", (str(self.problems[AGAIN] + duplicates),))
                if parsed.ended:
                    run("INSERT INTO about VALUES ('ended', 'yes')")
            self.shapes, self.classes, self.ended = shapes, classes, parsed.ended
            self.count += accepted
            self.learnable += learnable
            new_problems = Counter(problem.kind for problem in problems) + Counter({AGAIN: duplicates})
            self.problems = self.problems + new_problems  # a new one: others may be reading the old
            if place is not None:
                self.places[place.name] = place
            self._append_quarantine(problems)
            self.news = time.monotonic()
            self.changed.notify_all()
            return Receipt(accepted, duplicates, problems)

    def _changed(self, record: Record) -> Problem | None:
        """What is wrong with a record whose id is known; nothing, where it is the same again."""
        columns = f"label, watched, {', '.join(FIELDS)}"
        known = self._base.execute(f"SELECT {columns} FROM record WHERE id = ?", (record.id,)).fetchone()
        given = (record.label, record.watched, *map(record.values.get, FIELDS))
        names = ("label", "watched number", *FIELDS)
        other = [name for name, old, new in zip(names, known, given, strict=True) if old != new]
        if not other:
            return None
        why = f"the id {record.id!r} is known with other content ({', '.join(other)}), and the first counts"
        return Problem(record.line, CHANGED, f"{why}: give what is new an id of its own")

    @property
    def aside(self) -> int:
        """How many lines were put aside."""
        return sum(self.problems.values()) - self.problems[AGAIN]

    def full(self) -> bool:
        return self.learnable - self.learned >= self.queue

    def begin(self, position: int) -> None:
        """The tasks before `position` are learned."""
        with self.changed:
            self.learned = sum(cut.learnable for cut in self.cuts[:position])
            self.changed.notify_all()

    def close(self) -> None:
        """Take nothing more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def release(self) -> None:
        """Take nothing more and let others have the file; it can still be read. A spool that holds nothing leaves nothing behind."""
        with self.changed:
            self.closed = True
            if not self.released:
                self.released = True
                with self._told():
                    self._base.execute("PRAGMA journal_mode = DELETE")  # one file again, that can be copied
                self._base.close()
                if not self.count and not self.problems:
                    self._remove()

    def _remove(self) -> None:
        for name in ("spool.db", "quarantine.jsonl", "http.json"):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.made:
            if any(path.iterdir()):
                break
            path.rmdir()

    # -- reading --------------------------------------------------------------------------------------------------------------------

    def after(self, number: int, most: int) -> list[tuple[int, str, int, float, float | None]]:
        """Number, label, whether held out, arrival and watched number of the records from `number` on."""
        with self._reading() as base:
            rows = base.execute(
                "SELECT number, label, held, arrived, watched FROM record WHERE number >= ? ORDER BY number LIMIT ?", (number, most)
            )
            return rows.fetchall()

    def cut(self, stop: int, learnable: int, reason: str) -> Cut:
        """Record where the next task ends; from now on it always ends there."""
        with self.changed:
            start = self.cuts[-1].stop if self.cuts else 0
            cut = Cut(len(self.cuts), start, stop, learnable, reason, dict(self.problems))
            row = (cut.number, cut.start, cut.stop, cut.learnable, cut.reason, json.dumps(cut.problems))
            with self._told(), self._transaction():
                self._base.execute("INSERT INTO task VALUES (?, ?, ?, ?, ?, ?)", row)
            self.cuts.append(cut)
            return cut

    def labels(self, start: int, stop: int, held: bool) -> tuple[list[int], list[str]]:
        """Numbers and labels of some records, in their order."""
        with self._reading() as base:
            rows = base.execute(
                "SELECT number, label FROM record WHERE number >= ? AND number < ? AND held = ? ORDER BY number", (start, stop, held)
            ).fetchall()
        return [number for number, _ in rows], [label for _, label in rows]

    def names(self, stop: int) -> list[str]:
        """The classes that arrived before record `stop`, in that order."""
        with self._reading() as base:
            return [name for (name,) in base.execute("SELECT name FROM class WHERE first < ? ORDER BY number", (stop,))]

    def column(self, field: str, start: int, stop: int, held: bool) -> list[Any]:
        """One field of some records, in their order."""
        assert field in FIELDS
        with self._reading() as base:
            rows = base.execute(
                f"SELECT {field} FROM record WHERE number >= ? AND number < ? AND held = ? ORDER BY number", (start, stop, held)
            )
            return [value for (value,) in rows]

    # -- what was put aside, for a person to read ---------------------------------------------------------------------------------------

    def _append_quarantine(self, problems: list[Problem]) -> None:
        if problems:
            try:
                with self.quarantine.open("a", encoding="utf-8") as file:
                    file.write("".join(map(_aside, problems)))
            except OSError as error:
                raise disk_error(error, self.quarantine) from error

    def _write_quarantine(self) -> None:
        """The database is the truth; the file is written anew where a kill came between the two."""
        lines = 0
        if self.quarantine.is_file():
            with self.quarantine.open("rb") as file:
                lines = sum(line.endswith(b"\n") for line in file)
        if lines != self.aside:
            rows = self._base.execute("SELECT source, line, content, kind, reason FROM problem ORDER BY number")
            write_atomically(self.quarantine, "".join(_aside(Problem(Line(*line), kind, reason)) for *line, kind, reason in rows))

    # -- SQLite ---------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self.changed, self._told():
            if not self.released:
                yield self._base
                return
            with closing(sqlite3.connect(f"{(self.folder / 'spool.db').as_uri()}?mode=ro", uri=True, timeout=0)) as base:
                yield base

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
        """What SQLite raises, as a person is told it."""
        try:
            yield
        except sqlite3.Error as error:
            text, path = str(error), self.folder / "spool.db"
            if "locked" in text:
                raise RunError(f"{path} is in use by another process; wait for it, stop it first, or name another spool") from None
            if "full" in text or "I/O" in text or "readonly" in text or "unable to open" in text:
                free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
                raise DiskError(f"{path} could not be written ({text}; {free} bytes are free). What was acknowledged is whole") from error
            raise DataError(f"{path} cannot be read as the spool of a live stream: {text}") from error


def _unlike(record: Record, shapes: Shapes) -> Problem:
    return Problem(record.line, UNLIKE, f"it does not fit the stream: it has {told(record.shapes)}, and the stream has {told(shapes)}")


def _aside(problem: Problem) -> str:
    line = problem.line
    content = line.content.decode("utf-8", "backslashreplace")
    return json.dumps({"source": line.source, "line": line.number, "reason": problem.reason, "content": content}) + "\n"
