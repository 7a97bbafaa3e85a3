"""Live: tasks from data that is still coming, from a directory that fills up, standard input, or an HTTP push.

A record is one JSON object on a line, `{"id": "a1", "label": "cat", "features": [0.1, 0.2]}`, with one or several of `features` (numbers),
`text`, `image` and `audio` (base64, or a file's path where the record does not come over HTTP). In a directory, an image or a WAV file in a
sub-folder is a record of the class that the folder names. Classes are numbered as they arrive.

Every record is on disk, in the run's spool, before it is acknowledged, and counts once however often it is sent: an `id` that is known is
a duplicate, which is counted. Where a task ends is on disk before it is learned. So a run that is killed at any moment goes on with the
same tasks: it loses no record that was acknowledged and learns none twice. Senders are held back while `queue` records wait to be learned.
A line that is no record, or a known id with other content, is put aside in `quarantine.jsonl` with the reason, and counted.

A task ends after `count` records, after `seconds`, or where a detector of River sees what is watched change (`change`), whichever comes
first. Each task has a new detector; the record at which it reports the change begins the next task.

ADWIN: Bifet and Gavaldà, Learning from Time-Changing Data with Adaptive Windowing, SDM 2007. KSWIN: Raab, Heusinger and Schleif, Reactive
Soft Prototype Computing for Concept Drift Streams, Neurocomputing 2020. Page-Hinkley: Page, Continuous Inspection Schemes, Biometrika 1954.
The guide is docs/live.md. The licence of the data is its owner's to say.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from streamcl.data import ArrayDataset, Subset, split_by_class
from streamcl.errors import ConfigError, DataError, Interrupted
from streamcl.options import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from streamcl.seeding import generator
from streamcl.stream import Dataset, Scenario, StreamInfo, Task

from ._live.cutting import Cutter, make_detector
from ._live.directory import Directory
from ._live.http import Push
from ._live.intake import PAUSE, Intake, StandardInput
from ._live.records import AGAIN, Reader, modalities
from ._live.samples import Shelf, Spooled, read_test_file
from ._live.spool import Spool


class Live(Scenario):
    """Where records come from: `directory`, `stdin`, `port` (0 for any free one) at `host`, or several of them. A line or a request body
    may have `body` bytes.

    When a task ends: `count`, `seconds`, `change` by what it is to `watch`: "features" (their mean), "label_entropy" (of the last 100
    labels), or a field of the records that holds a number; `detector` holds River's own options.

    When the stream ends: at a record `{"end": true}`, at the end of standard input where that is all there is, after `idle` seconds without
    news, or after `tasks` tasks.

    `fields` declares what records hold, `{features: 64}`, `{text: true}`, `{image: 32}` (pixels a side, to which images are scaled) or
    `{audio: {seconds: 1.0, rate: 16000}}`; else the first record says, and the run waits up to `wait` seconds for it. `holdout` of the
    records, chosen by their ids, are for scoring; or `test` is a file of labelled records. `spool` is where records are kept, by default
    inside the run.
    """

    def __init__(
        self,
        *,
        directory: Path | None = None,
        stdin: bool = False,
        port: NonNegativeInt | None = None,
        host: str = "127.0.0.1",
        body: PositiveInt = 8_388_608,
        queue: PositiveInt = 10_000,
        count: PositiveInt | None = None,
        seconds: PositiveFloat | None = None,
        change: Literal["adwin", "kswin", "page_hinkley"] | None = None,
        watch: str = "features",
        detector: dict[str, Any] = {},  # noqa: B006
        tasks: PositiveInt | None = None,
        idle: PositiveFloat | None = None,
        wait: PositiveFloat = 600.0,
        fields: dict[str, Any] | None = None,
        holdout: Fraction = 0.0,
        test: Path | None = None,
        spool: Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if directory is None and not stdin and port is None:
            raise ConfigError("live: nothing says where records come from: give directory, stdin: true or port")
        if count is None and seconds is None and change is None:
            raise ConfigError("live: nothing says when a task ends: give count, seconds or change")
        if count is not None and count > queue:
            raise ConfigError(f"live: count is {count} and only {queue} records may wait (queue): a task would never be full")
        if detector and change is None:
            raise ConfigError("live: detector holds the options of a change detector, and none is named: give change: adwin")
        if holdout == 1 or (holdout and test is not None):
            raise ConfigError("live: holdout leaves nothing to learn from" if holdout == 1 else "live: give holdout or test, not both")
        self.directory, self.stdin, self.port, self.host, self.body, self.queue = directory, stdin, port, host, body, queue
        self.count, self.seconds, self.change, self.watch, self.detector = count, seconds, change, watch, dict(detector)
        self.tasks, self.idle, self.wait, self.fields = tasks, idle, wait, fields
        self.holdout, self.test_file, self.spool = holdout, test, spool
        self._reader = Reader(fields, watch if change is not None else None)
        declared = self._reader.declared
        if change is not None and watch == "features" and declared is not None and not declared.keys() - {"text"}:
            raise ConfigError("live: watch: features needs numbers, and fields declares text: watch label_entropy, or a field of its own")

    # -- opening ------------------------------------------------------------------------------------------------------------------

    def open(self, seed: int) -> StreamInfo:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("live: a stream that is still coming has one reader, and several processes were started: start one")
        if self.change is not None:
            make_detector(self.change, self.detector, seed)  # what is wrong with it is told before anything is waited for
        self.seed = seed
        folder = self.spool or self.workdir
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="streamcl-live-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        reads = {"fields": self.fields, "watch": self._reader.watch}
        self._spool = Spool(folder, queue=self.queue, holdout=self.holdout, seed=seed, reads=reads)
        self.problems = self._spool.problems
        self._told = self._told_again = 0  # of what was put aside, and of the duplicates
        self._shelf = Shelf()
        self._intakes = self._ways_in()
        self._started = False
        weakref.finalize(self, _stop, self._intakes, self._spool)
        try:
            self._cutter = Cutter(
                self._spool,
                count=self.count,
                seconds=self.seconds,
                change=self.change,
                watch=self.watch,
                detector=self.detector,
                seed=seed,
            )
            shapes = self._spool.shapes or self._first_shapes()
            self._test = self._test_set(shapes)
        except BaseException:
            _stop(self._intakes, self._spool)
            raise
        self.info = StreamInfo(modalities=modalities(shapes))
        return self.info

    def _ways_in(self) -> list[Intake]:
        ways: list[Intake] = []
        if self.directory is not None:
            ways.append(Directory(self._spool, self._reader, self.directory, self.body))
        if self.stdin:
            ways.append(StandardInput(self._spool, self._reader, self.body))
        if self.port is not None:
            ways.append(Push(self._spool, self._reader, self.host, self.port, self.body))
        return ways

    def _start(self) -> None:
        """Begin to take in: not before it is needed, so that a run that is only looked at opens no port."""
        if not self._started:
            self._started = True
            for intake in self._intakes:
                intake.start()
            self.tell(f"live: records come from {' and '.join(intake.where for intake in self._intakes)}")

    def _first_shapes(self) -> dict[str, list[int]]:
        """What the first good record holds."""
        self._start()
        spool, until = self._spool, time.monotonic() + self.wait
        self.tell(f"live: waiting up to {self.wait:g} s for the first record, which says what the records hold (or declare it: fields)")
        while spool.shapes is None:
            self._check()
            aside = f"; {spool.aside} lines were put aside in {spool.quarantine}" if spool.aside else ""
            if spool.ended or all(intake.done for intake in self._intakes):
                raise DataError(f"live: the stream ended before its first good record{aside}")
            if time.monotonic() >= until:
                raise DataError(f"live: no good record came within {self.wait:g} s (wait){aside}: send one, or declare fields")
            with spool.changed:
                spool.changed.wait(PAUSE)
        return spool.shapes

    def _test_set(self, shapes: dict[str, list[int]]) -> tuple[ArrayDataset, list[str]] | None:
        if self.test_file is None:
            return None
        inputs, labels = read_test_file(self.test_file, self._reader, shapes)
        ids = -1 - torch.arange(len(labels))  # those of the stream count upwards from 0
        return ArrayDataset(inputs, torch.zeros(len(labels), dtype=torch.int64), ids), labels

    # -- the tasks ----------------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Task]:
        while self.tasks is None or self.position < self.tasks:
            self._spool.begin(self.position)
            if self._spool.released and self.position >= len(self._spool.cuts):
                break
            self._start()
            if self.position >= len(self._spool.cuts) and not self._next_cut():
                break
            self._report(duplicates=True)
            self.position += 1
            yield self.task(self.position - 1)
        self._end()

    def _next_cut(self) -> bool:
        """Wait until the next task is whole; False where the stream has ended."""
        spool, since, finishing = self._spool, time.monotonic(), False
        while True:
            self._check()
            ended = spool.ended or all(intake.done for intake in self._intakes)
            if ended:
                spool.close()
            if self._cutter.look(time.time(), ending=ended) is not None:
                return True
            if ended:
                return False
            now = time.monotonic()
            if spool.full():  # what was held back is no silence
                since = now
            if self.idle is not None and not finishing and now >= max(since, spool.news) + self.idle:
                finishing = True
                for intake in self._intakes:
                    intake.finish()
            with spool.changed:
                spool.changed.wait(PAUSE)

    def _check(self) -> None:
        """Raise what went wrong with an intake, and where the run is to stop."""
        self._report()
        if self._spool.failure is not None:
            raise self._spool.failure
        if self.interrupted():
            _stop(self._intakes, self._spool)
            raise Interrupted("interrupted while it waited for records")

    def _report(self, duplicates: bool = False) -> None:
        """Tell what was put aside since the last time; duplicates only where a task was cut or the stream ends, for there may be many."""
        self.problems = problems = self._spool.problems
        again = problems[AGAIN]
        aside = sum(problems.values()) - again
        if aside > self._told:
            counts = ", ".join(f"{count} x {kind}" for kind, count in problems.items() if kind != AGAIN)
            self.tell(f"live: put aside in {self._spool.quarantine}: {counts}")
            self._told = aside
        if duplicates and again > self._told_again:
            self.tell(f"live: passed over: {again} x {AGAIN}")
            self._told_again = again

    def _end(self) -> None:
        self._report(duplicates=True)
        left = self._spool.learnable - sum(cut.learnable for cut in self._spool.cuts[: self.position])
        _stop(self._intakes, self._spool)
        if left:
            self.tell(f"live: {left} records were taken in and not learned; they are kept in {self._spool.folder}")

    def task(self, index: int) -> Task:
        if index >= len(self._spool.cuts):
            raise DataError(f"live: task {index + 1} has not come yet: the spool in {self._spool.folder} knows {len(self._spool.cuts)}")
        cut = self._spool.cuts[index]
        names, known = self._spool.names(cut.stop), len(self._spool.names(cut.start))
        number = {name: position for position, name in enumerate(names)}
        train: Dataset = Spooled(self._spool, self._reader, self._shelf, cut.start, cut.stop, False, number)
        labels = tuple(train.targets.unique().tolist())
        validation: Dataset | None = None
        if self.validation:
            keep, held = split_by_class(train.targets, self.validation, generator(self.seed, "validation", index))
            train, validation = Subset(train, keep), Subset(train, held)
        return Task(
            index=index,
            name=f"records {cut.start + 1} to {cut.stop}",
            train=train,
            classes=tuple(range(known, len(names))),
            seen=tuple(range(len(names))),
            labels=labels,
            validation=validation,
            names=dict(enumerate(names)),
            about={"ended_by": cut.reason, "problems": dict(cut.problems)},
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        number = {name: label for label, name in after.names.items()}
        if self._test is not None:
            data, labels = self._test
            new = {task.names[label] for label in task.classes}
            rows = [row for row, label in enumerate(labels) if label in new]
            return Subset(data, torch.tensor(rows), targets=torch.tensor([number[labels[row]] for row in rows])) if rows else None
        cut = self._spool.cuts[task.index]
        if not self.holdout:
            return None
        held = Spooled(self._spool, self._reader, self._shelf, cut.start, cut.stop, True, number)
        known = (held.targets >= 0).nonzero().squeeze(1)  # a class that was only held out so far has no number yet
        return Subset(held, known, targets=held.targets[known]) if len(known) else None

    def files(self) -> list[str]:
        return [] if self.test_file is None else [str(self.test_file)]

    # -- stopping and going on ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "spool": self._spool.name}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["spool"] != self._spool.name or int(state["position"]) > len(self._spool.cuts):
            raise DataError(
                f"live: the spool in {self._spool.folder} is not the one that this run has learned from: put it back, records and all"
            )
        self.position = int(state["position"])
        self._spool.begin(self.position)


def _stop(intakes: list[Intake], spool: Spool) -> None:
    spool.close()
    for intake in intakes:
        intake.stop()
    spool.release()
