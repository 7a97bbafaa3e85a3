"""Every event as a line of events.jsonl: `{"kind": ..., "time": ..., "fields": {...}}`, on disk as soon as it happened."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from streamcl.events import Event, Sink
from streamcl.options import NonNegativeFloat

# what other lines or scores.json hold already: each `scored` event repeats all rows before it, `run_finished` the whole of the scores
REPEATED = {"final_matrix", "scores"}


class Jsonl(Sink):
    """Appends to `events.jsonl` in the run's folder, one JSON object per line; NaN and infinity are written as null.

    A run that was killed while it wrote may leave a torn line behind: the next process begins a new one, and `read_events` skips
    what is torn. `progress` events are written at most every `progress_every` seconds.
    """

    def __init__(self, *, progress_every: NonNegativeFloat = 1.0) -> None:
        self.progress_every = progress_every
        self.file: BinaryIO | None = None
        self.next_progress = -math.inf

    def open(self, directory: Path) -> None:
        super().open(directory)
        self.path = directory / "events.jsonl"
        self.file = self.path.open("a+b", buffering=0)
        self.torn = False
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            self.torn = self.file.read(1) != b"\n"

    def write(self, event: Event) -> None:
        if event.kind == "progress":
            if event.time < self.next_progress:
                return
            self.next_progress = event.time + self.progress_every
        assert self.file is not None, "open comes before write"
        fields = {name: value for name, value in event.fields.items() if name not in REPEATED}
        line = (b"\n" if self.torn else b"") + _encode({"kind": event.kind, "time": event.time, "fields": fields}) + b"\n"
        self.torn = True  # until the whole line is there
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            from streamcl.writing import disk_error

            raise disk_error(error, self.path) from error
        self.torn = False

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _encode(value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_events(path: Path) -> Iterator[Event]:
    """The events of a run, oldest first, without those whose line is torn; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                yield Event(record["kind"], record["fields"], record["time"])
            except (ValueError, KeyError, TypeError):
                continue
