"""One stream of events: the engine emits them, the sinks write them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamcl.errors import StreamclError


@dataclass(frozen=True)
class Event:
    """Something that happened. `fields` holds JSON values only.

    | kind | fields |
    | --- | --- |
    | run_started | name, directory, seed, device, precision, tasks (or None), parameters, resumed (bool), strategy, scenario |
    | task_started | task, name, samples, classes (new ones' names), seen |
    | progress | task, pass, epoch, epochs, step, steps (in this pass), samples_per_second, loss, lr, and what the strategy logs |
    | scored | task, part (test or validation), row, per_task, metric, final_matrix (list of rows, None where nothing was scored) |
    | any_time | task, samples, accuracy |
    | served | task, name (of its segment), samples, version, counts, accuracy and entropy (or mae), accuracy_frozen (mae_frozen) or None |
    | guard | batch, samples (answered before it), what (restore, bypass, statistics, retry, promoted, rollback, reset), reason, ... |
    | sample | task, step, global_step, question, answer, reward, rewards (by name), length (tokens); picture (base64 PNG) if any |
    | figures | task, and named numbers from Strategy.measure or Context.log |
    | checkpoint | task, path, bytes, seconds |
    | task_finished | task, seconds, memory_bytes, parameters |
    | warning | message |
    | note | message: what was decided on the way, such as the kind of an index |
    | run_finished | status (done, interrupted, failed), scores (the whole of scores.json when done), report (a path or None) |
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)


class Sink(ABC):
    """A plug-in that writes events somewhere. `open` is called before the first event, `close` after the last, whatever happened."""

    def open(self, directory: Path) -> None:
        """`directory` is the run's. Nothing is written outside of it."""
        self.directory = directory

    @abstractmethod
    def write(self, event: Event) -> None: ...

    def close(self) -> None:
        """Everything written so far is on disk after this."""


class Events:
    """Hands each event to every sink. A sink that fails is left out from then on, and the others are told: no log ends a run."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = list(sinks)

    def emit(self, kind: str, **fields: Any) -> None:
        if not self.sinks:
            return
        event, broken = Event(kind, fields), []
        for sink in self.sinks:
            try:
                sink.write(event)
            except (OSError, StreamclError):
                raise  # a full disk, say: the checkpoints would not fit either
            except Exception as error:
                broken.append((sink, error))
        for sink, reason in broken:
            self.sinks.remove(sink)
            self.warn(f"the sink {type(sink).__name__.lower()} failed and writes no more: {type(reason).__name__}: {reason}")

    def warn(self, message: str) -> None:
        self.emit("warning", message=message)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
