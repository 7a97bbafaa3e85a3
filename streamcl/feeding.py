"""New data for a finished run: what arrived becomes the next task of its stream, any number of times."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from streamcl import config
from streamcl.config import plugin_spec
from streamcl.data import MapDataset, SinglePass, Subset, split_by
from streamcl.data_files import source_for
from streamcl.errors import ConfigError, DataError, Interrupted, RunError
from streamcl.learned import check_inputs, described, plain_info
from streamcl.plugins import PluginSpec, plugins
from streamcl.run_folder import RunFolder, fingerprints
from streamcl.seeding import generator
from streamcl.stream import Batch, Dataset, Scenario, Source, SourceData, StreamInfo, Task
from streamcl.writing import write_atomically

if TYPE_CHECKING:
    from streamcl.engine import Engine

TAKEN = ("class", "labels", "value", "mask")  # the kinds of target that data may be delivered with
FED = (*TAKEN, "image")  # those of a run that may be fed: pictures are delivered with the class that is a new concept
FIRST_ID = 2**40  # fed samples are numbered from here, so that ids stay unique over the whole stream
TEST_ID = FIRST_ID // 2  # within a delivery, a test set that it brings: sources may number theirs from 0 again


@dataclass(frozen=True)
class Feed:
    """One delivery, as RUN/fed/0001.json records it: task `index` of its run.

    What follows `holdout` is filled in when it is first read: the classes that occur in it by their names, the samples of each part, the
    files behind it, and the licence of what is learned of it. So the tasks of earlier deliveries are known without reading them again.
    """

    index: int
    name: str
    data: dict[str, Any]
    test: dict[str, Any] | None = None
    holdout: float = 0.0
    classes: list[str] = field(default_factory=list)
    samples: dict[str, int] = field(default_factory=dict)  # train, validation, test
    files: dict[str, list[str]] = field(default_factory=dict)  # data, test
    licence: str = ""  # empty in a record that is older than this field
    compared: bool = False  # what is painted after every later task is compared with its pictures

    @property
    def scored_from(self) -> str:
        """Which of its two sources holds what is scored of it; empty where nothing is."""
        return "" if not self.samples.get("test") else "data" if self.test is None else "test"


class Extended(Scenario):
    """A scenario with the deliveries that came after it. Classes keep their names: a known one is old, any other is new.

    A delivery that is not recorded yet is read and checked whole by `open`. A recorded one is read when it is needed, so what was
    learned long ago may be gone, unless the strategy reads it again. A stream that takes deliveries by itself (`Scenario.take`) makes the
    tasks of them, and says what is scored.
    """

    def __init__(self, first: Scenario, feeds: Sequence[Feed]) -> None:
        super().__init__(transforms=first.transforms, validation=first.validation)
        self.first, self.feeds = first, list(feeds)
        self.start = self.feeds[0].index  # how many tasks the scenario itself has
        self._loaded: dict[tuple[int, str], dict[str, Dataset]] = {}

    def open(self, seed: int) -> StreamInfo:
        self.seed, self.info = seed, self.first.open(seed)
        wanted = self.first.takes()
        self.takes_itself, self.wanted = wanted is not None, self.info if wanted is None else wanted
        if self.wanted.target not in TAKEN or type(self.first).__iter__ is not Scenario.__iter__:
            raise ConfigError(f"a run can be fed when it learns {', '.join(FED)} and its tasks can be read at any time; this one's cannot")
        last = self.first.task(self.start - 1)
        self._names = [last.names.get(label, str(label)) for label in sorted(last.seen)]
        self._reached = [len(self._names)]  # how many classes there were before the first delivery, and after each
        for place, feed in enumerate(self.feeds):
            fresh = not feed.samples
            if fresh:
                data = self._source(feed, "data")
                feed = self.feeds[place] = dataclasses.replace(feed, classes=_occurring(data, feed), licence=data.licence)
            if self.takes_itself:
                count = len(data.train) if fresh else feed.samples["train"]
                self.info = self.first.take(feed.name, feed.classes, Deferred(count, partial(self._part, place, "train")))
            new = [name for name in feed.classes if name not in self._names]
            if new and self.info.target == "mask":
                raise DataError(f"{feed.name} has pixels of {new[0]!r}, and this run's masks are of {', '.join(self._names)}")
            self._names += new
            self._reached.append(len(self._names))
            if fresh:
                self.feeds[place] = self._checked(place)
        self.info = dataclasses.replace(
            self.info,
            tasks=len(self),
            classes=len(self._names),
            class_names=tuple(self._names),
            licence=_licences(self.info.licence, self.feeds),
        )
        return self.info

    def __len__(self) -> int:
        return self.start + len(self.feeds)

    def task(self, index: int) -> Task:
        place = index - self.start
        if place < 0 or self.takes_itself:
            return self.first.task(index)
        feed, numbers = self.feeds[place], self._numbers(place)
        known, reached = self._reached[place : place + 2]
        labels, held = tuple(sorted(numbers[name] for name in feed.classes)), feed.samples["validation"]
        if self.info.target == "value":
            labels = tuple(range(reached))
        once = SinglePass if self.info.passes == 1 else _itself
        return Task(
            index=index,
            name=feed.name,
            train=Deferred(feed.samples["train"], lambda: once(self._part(place, "train"))),
            classes=tuple(label for label in labels if label >= known),
            seen=tuple(range(reached)),
            labels=labels,
            validation=Deferred(held, lambda: self._part(place, "validation")) if held else None,
            names=dict(enumerate(self._names[:reached])),
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        place = task.index - self.start
        if place < 0 or self.takes_itself:
            return self.first.test(task, after)
        return self._part(place, "test") if self.feeds[place].samples["test"] else None

    def judge(self) -> Any:
        self.first.tell = self.tell
        return self.first.judge()

    def files(self) -> list[str]:
        return [*self.first.files(), *(file for feed in self.feeds for files in feed.files.values() for file in files)]

    # -- reading a delivery -----------------------------------------------------------------------------------------------------

    def _numbers(self, place: int) -> dict[str, int]:
        """The classes known once this delivery was learned, by name."""
        return {name: label for label, name in reversed(list(enumerate(self._names[: self._reached[place + 1]])))}

    def _source(self, feed: Feed, which: str) -> SourceData:
        data = _built(feed, which).load()
        check_fit(data, self.wanted, feed.name if which == "data" else f"the test data of {feed.name}")
        return data

    def _part(self, place: int, part: str) -> Dataset:
        """A part of a delivery, which is read when it is first asked for."""
        feed = self.feeds[place]
        which = "test" if part == "test" and feed.test is not None else "data"
        if (place, which) not in self._loaded:
            try:
                self._loaded[place, which] = self._read(place, which)
            except DataError as error:
                raise DataError(f"task {feed.index + 1} ({feed.name}) is needed again: {error}" if feed.samples else str(error)) from error
        return self._loaded[place, which][part]

    def _read(self, place: int, which: str) -> dict[str, Dataset]:
        feed, numbers = self.feeds[place], self._numbers(place)
        data, first_id = self._source(feed, which), FIRST_ID * (place + 1)

        def delivered(dataset: Dataset, rows: Tensor, first: int = first_id) -> Dataset:
            if data.target == "value":
                return _Delivered(dataset, rows, None, first)
            unknown = [name for name in _names(dataset, data, feed.name) if name not in numbers]
            if unknown:
                raise DataError(f"the test data of {feed.name} has classes that nothing was learned of: {', '.join(unknown[:5])}")
            return _Delivered(dataset, rows, _renumbering(data, numbers), first)

        if which == "test":
            test = held_out(data)
            if len(test) == 0:
                raise DataError(f"the test data of {feed.name} holds no sample")
            return {"test": delivered(test, torch.arange(len(test)), first_id + TEST_ID)}
        rows, parts = torch.arange(len(data.train)), {}
        if data.test is not None and len(data.test) and not self.takes_itself:
            if feed.test is not None or feed.holdout:
                raise ConfigError(f"{feed.name} has a test part of its own: leave out {'--test' if feed.test is not None else '--holdout'}")
            parts["test"] = delivered(data.test, torch.arange(len(data.test)), first_id + TEST_ID)
        for part, fraction in (("test", feed.holdout), ("validation", self.validation)):
            if fraction:
                keep, held = split_by(data.target, data.train.targets[rows], fraction, generator(self.seed, part, feed.index))
                if not len(held):
                    what = "sample of each class" if data.target in ("class", "labels") else "sample"
                    raise DataError(f"{feed.name} has one {what}: none can be held out")
                parts[part], rows = delivered(data.train, rows[held]), rows[keep]
        return {**parts, "train": delivered(data.train, rows)}

    def _checked(self, place: int) -> Feed:
        """A delivery that is taken for the first time, read from end to end, with what is recorded of it."""
        feed = self.feeds[place]
        parts = {"train": self._part(place, "train"), **self._loaded[place, "data"]}
        if feed.test is not None:
            parts["test"] = self._part(place, "test")
        begun = self.first.task(0).train
        like, form = begun[torch.tensor([0])], begun.targets.shape[1:]
        for part, dataset in parts.items():
            where = feed.name if part == "train" else f"the {part} data of {feed.name}"
            check_whole(dataset, self.wanted, where)
            if self.info.target in ("value", "mask") and dataset.targets.shape[1:] != form:
                now, before = (" x ".join(map(str, shape)) or "one" for shape in (dataset.targets.shape[1:], form))
                raise DataError(f"{where}: the {self.info.target} of a sample is {now} number(s), and this run's {before}")
            for name, values in dataset[torch.tensor([0])].inputs.items():
                expected = like.inputs[name]
                if isinstance(values, Tensor) and isinstance(expected, Tensor) and values.dtype != expected.dtype:
                    raise DataError(f"{where}: {name} holds {values.dtype}, and the run's first task {expected.dtype}")
        ids = torch.cat([dataset.ids for dataset in parts.values()]) - FIRST_ID * (place + 1)
        if len(ids.unique()) < len(ids) or int(ids.min()) < 0 or int(ids.max()) >= FIRST_ID:
            raise DataError(f"{feed.name}: the ids of its samples must all differ, and be from 0 to below 2**39")
        samples = {part: len(parts[part]) if part in parts else 0 for part in ("train", "validation", "test")}
        if self.takes_itself:
            task = self.first.task(feed.index)
            samples["test"] = len(self.first.test(task, task) or ())
        files = {which: _built(feed, which).files() for which in ("data", "test") if which == "data" or feed.test is not None}
        return dataclasses.replace(feed, samples=samples, files=files, compared=self.takes_itself and samples["test"] > 0)


def _built(feed: Feed, which: str) -> Source:
    return plugin_spec("source", feed.data if which == "data" else feed.test or {}).build()


def _occurring(data: SourceData, feed: Feed) -> list[str]:
    """The classes of a delivery, by name; none where it is of values."""
    if len(data.train) == 0:
        raise DataError(f"{feed.name} holds no sample")
    names = _names(data.train, data, feed.name)
    if not names and data.target == "labels":
        raise DataError(f"{feed.name} has no sample that carries a class")
    return names


def _names(dataset: Dataset, data: SourceData, what: str) -> list[str]:
    """The classes that occur in one of a source's data sets: in label sets those that a sample carries."""
    if data.target == "value":
        return []
    if data.target == "labels":
        there = (dataset.targets == 1).any(dim=0).nonzero().squeeze(1).tolist()
    else:
        there = [label for label in dataset.targets.unique().tolist() if data.target == "class" or label != 255]
    wrong = [label for label in there if not 0 <= label < len(data.class_names)]
    if wrong:
        raise DataError(f"{what}: the label {wrong[0]} is outside of the {len(data.class_names)} classes that its source declares")
    return list(dict.fromkeys(data.class_names[label] for label in there))


def _renumbering(data: SourceData, numbers: Mapping[str, int]) -> Tensor:
    """What `Subset` needs to bring a delivery's classes to the run's numbers."""
    if data.target == "labels":  # a column of the delivery for each class of the run
        column = {name: place for place, name in reversed(list(enumerate(data.class_names)))}
        return torch.tensor([column.get(name, -1) for name in sorted(numbers, key=numbers.__getitem__)])
    return torch.tensor([numbers.get(name, 255 if data.target == "mask" else -1) for name in data.class_names])


def _licences(first: str, feeds: Sequence[Feed]) -> str:
    """The licence of the data that a run began with, and of every delivery: whoever gets the model needs all of them."""
    stated = {"unknown": "none stated", "": "not recorded"}
    named: dict[str, list[str]] = {}
    for feed in feeds:
        named.setdefault(stated.get(feed.licence, feed.licence), []).append(feed.name)
    later = [f"of the deliver{'y' if len(names) == 1 else 'ies'} {', '.join(names)}: {licence}" for licence, names in named.items()]
    return "; ".join([stated.get(first, first), *later])


def _itself(dataset: Dataset) -> Dataset:
    return dataset


class _Delivered(Subset):
    """A part of a delivery under the run's class numbers and with ids of its own."""

    def __init__(self, dataset: Dataset, indices: Tensor, relabel: Tensor | None, first_id: int) -> None:
        super().__init__(dataset, indices, relabel)
        self.first_id, self.ids = first_id, self.ids + first_id

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        return super()._finish(batch, indices).replace(ids=batch.ids + self.first_id)


class Deferred(MapDataset):
    """A data set of known length that is read when it is first asked for more."""

    def __init__(self, length: int, load: Callable[[], Dataset]) -> None:
        self.length, self.load = length, load

    @cached_property
    def dataset(self) -> Dataset:
        found = self.load()
        if len(found) != self.length:
            raise DataError(f"a task of {self.length} samples has {len(found)} now: its data has changed since it was fed")
        self.workers = getattr(found, "workers", 0)
        return found

    def __getattr__(self, name: str) -> Any:
        if name not in ("targets", "ids"):
            raise AttributeError(f"a data set has no {name!r}")
        self.targets, self.ids = self.dataset.targets, self.dataset.ids
        return self.__dict__[name]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, indices: Tensor) -> Batch:
        return self.dataset[indices]

    def read(self, order: Tensor, size: int) -> Iterator[Batch]:
        return self.dataset.read(order, size)


# -- what is given ---------------------------------------------------------------------------------------------------------------


def source_mapping(text: str) -> dict[str, Any]:
    """The source that a person means on the command line, with absolute paths: a file or folder, or a source as YAML names it."""
    value: Any = text
    if text.lstrip().startswith("{"):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text}: this is no source as YAML writes it: {' '.join(str(error).split())}") from None
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{text}: a source is a mapping with a name: {{name: csv, path: new.csv}}")
    elif Path(text).exists() or (text.partition(":")[0] not in plugins("source") and ".py" not in text):
        value = source_for(text)
    return plugin_spec("source", value, Path.cwd()).to_dict()


def held_out(data: SourceData) -> Dataset:
    """What is scored of data that was given for scoring: its test part, or all of it where it has none."""
    return data.test if data.test is not None and len(data.test) else data.train


def check_fit(data: SourceData, info: StreamInfo, what: str) -> None:
    """Raise DataError unless data is of the kind that a run was made with."""
    if data.target != info.target:
        raise DataError(f"{what} is labelled with {data.target}, and this run takes {info.target}")
    same = data.modalities.keys() == info.modalities.keys() and all(
        (given.kind, given.shape, given.high is None) == (wanted.kind, wanted.shape, wanted.high is None)
        for given, wanted in ((data.modalities[name], modality) for name, modality in info.modalities.items())
    )
    if not same:
        raise DataError(f"{what} has {described(data.modalities)}, and this run takes {described(info.modalities)}")
    for name, modality in info.modalities.items():
        high = data.modalities[name].high
        if modality.high is not None and high is not None and high < modality.high:
            raise DataError(f"{what}: the numbers of {name} go up to {high:g}, and this run's to {modality.high:g}: scale them")


def check_whole(dataset: Dataset, info: StreamInfo, what: str) -> None:
    """Read a data set from end to end, as far as to be sure that every sample is one that the run takes."""
    first = 0
    for batch in dataset.batches(1024):
        check_inputs(batch, info, what, first)
        first += len(batch)


# -- the record ------------------------------------------------------------------------------------------------------------------


def read_feeds(run: Path) -> list[Feed]:
    """The deliveries that a run has taken, in order."""
    feeds = []
    for path in sorted((run / "fed").glob("*.json")):
        try:
            feeds.append(Feed(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise RunError(f"{path} is no record of a delivery any more: {error}") from error
    return feeds


def record_of(run: Path, number: int) -> Path:
    """Where delivery `number`, counted from 1, is recorded."""
    return run / "fed" / f"{number:04d}.json"


def advice_without(run: Path, file: str, learned: int) -> str | None:
    """What to do where a file of a run is gone; None where it belongs to deliveries that need not be read again.

    Training data that was learned is not needed (a strategy that reads it again says so then); what is scored after every task is.
    """
    advice: str | None = "put it back"
    for number, feed in enumerate(read_feeds(run), 1):
        used_as = [which for which, files in feed.files.items() if file in files]
        if used_as and feed.compared:
            return f"put it back: what is painted of task {feed.index + 1} ({feed.name}) is compared with its pictures"
        if feed.scored_from in used_as:
            record = record_of(run, number)
            return (
                f'put it back, or give up the scores of task {feed.index + 1} ({feed.name}): write 0 for "test" under "samples" in {record}'
            )
        if "data" in used_as and (feed.index >= learned or feed.samples["validation"]):
            return f"put it back: task {feed.index + 1} ({feed.name}) is made of it"
        if used_as:
            advice = None
    return advice


def known_as(folder: RunFolder, new: Feed) -> tuple[str, bool]:
    """What the run knows this data as already, by its content or, where it has no files, by its source, and whether that is all of it."""
    prints, record = fingerprints(_built(new, "data").files()), folder.files()
    first = config.load(folder.path / "config.yaml").scenario.options.get("data")
    known: list[tuple[str, Any, Sequence[str]]] = []  # as what, its source, its files
    for feed in read_feeds(folder.path):
        task = f"task {feed.index + 1} ({feed.name})"
        known += [(task, feed.data, feed.files["data"]), (f"the test data of {task}", feed.test, feed.files.get("test", []))]
    if isinstance(first, PluginSpec):
        known.append(("what it began with", first.to_dict(), first.build().files()))
    for what, source, files in known:
        held = {record[path]["sha256"]: path for path in map(_absolute, files) if path in record}
        again = [
            # several data sets may lie in one folder: there, the source tells them apart
            held.get(file["sha256"]) is not None and (source == new.data or "files" not in file or held[file["sha256"]] != path)
            for path, file in prints.items()
        ]
        if any(again) or (not prints and source == new.data):
            return what, all(again)
    return "", False


def _absolute(path: str) -> str:
    """As files.json names it."""
    return str(Path(path).absolute())


def feed(
    run: str | Path, data: str, *, test: str | None = None, holdout: float = 0.0, name: str | None = None, again: bool = False
) -> dict[str, Any]:
    """Learn `data` as the next task of a finished run and return its scores.

    Data that the run has already is refused, unless it is to be learned `again`: what was held out of it would be learned then.
    Nothing is recorded before the data was read whole, and a feed that fails before its first checkpoint leaves the run as it was. One
    that is stopped in any other way is finished by `resume`.
    """
    from streamcl import running

    if test is not None and holdout:
        raise ConfigError("--test and --holdout both say what to score: give one of them")
    if not 0 <= holdout < 1:
        raise ConfigError(f"--holdout is {holdout}: a fraction from 0 to below 1 is needed")
    folder = RunFolder.open(Path(run))
    try:
        status = folder.status()
        if status["status"] != "done":
            raise RunError(f"{folder.path} is {status['status']}: finish it first (streamcl resume {run}), then feed it")
        stream = folder.read("info.json")["stream"]
        if stream["test_time"]:
            raise ConfigError(f"{folder.path} serves a test-time stream and learns from no labels: nothing can be fed to it")
        if stream["target"] not in FED:
            raise ConfigError(f"{folder.path} learns {stream['target']}, and only a run that learns {', '.join(FED)} can be fed")
        painted = stream["target"] == "image"
        if painted and (test is not None or holdout):
            raise ConfigError(
                f"{folder.path} paints pictures, and what is scored are the prompts of its concepts: leave out "
                f"{'--holdout' if test is None else '--test'}"
            )
        given = source_mapping(data)
        title = name or Path(str(given.get("path", given["name"]))).stem
        new = Feed(status["cursor"]["tasks_done"], title, given, None if test is None else source_mapping(test), holdout)
        known, whole = ("", False) if painted else known_as(folder, new)  # there, no concept is learned twice
        if known and whole and not again:
            raise RunError(
                f"{title} is in the run already, as {known}: fed again, what was held out of it for scoring would be learned. "
                "To learn it all the same, give --again"
            )
        engine = running.continued(folder, more=[new])
        if known:
            what = title if whole else f"a part of {title}"
            engine.notes.append(f"{what} was in the run already, as {known}: what was held out of it for scoring may now be learned")
        assert isinstance(engine.scenario, Extended)
        if painted:  # what is said of the new concepts is known: what cannot be read is refused here
            try:
                engine.strategy.check(engine.scenario.task(new.index))
            except ConfigError as error:
                told = "A concept that scenario.word does not list has its own name for its class word: another name may be read"
                error.args = (f"{error}\nThe data was not taken: {folder.path} is as it was before. {told}",)
                raise
        if not painted and not engine.scenario.feeds[-1].scored_from:
            engine.notes.append(f"{title} has no test part: nothing is scored of it (--test DATA or --holdout 0.1 would give it one)")
        return _learn(folder, engine, status)
    finally:
        folder.close()


def _learn(folder: RunFolder, engine: Engine, status: Mapping[str, Any]) -> dict[str, Any]:
    """Record the delivery that the engine's stream ends with, and learn it."""
    from streamcl import running

    assert isinstance(engine.scenario, Extended) and engine.checkpoints is not None
    feeds, newest = engine.scenario.feeds, engine.checkpoints.numbers()
    record = record_of(folder.path, len(feeds))
    names = ("status.json", "files.json", "info.json", "report.html")
    before = {name: (folder.path / name).read_text(encoding="utf-8") for name in names if (folder.path / name).is_file()}
    engine.revocable = True
    try:
        # The status comes first and the record last: stopped in between, there is nothing to learn, and `resume` says that it is done.
        folder.set_status("running", cursor=status["cursor"])
        files = [file for which in feeds[-1].files.values() for file in which]
        plugins_of_it = running.plugin_fingerprints(
            plugin_spec("source", source) for source in (feeds[-1].data, feeds[-1].test) if source is not None
        )
        folder.write("files.json", {**plugins_of_it, **folder.files(), **fingerprints(files)})
        folder.write("info.json", {**folder.read("info.json"), "stream": plain_info(engine.info)})
        record.parent.mkdir(exist_ok=True)
        write_atomically(record, json.dumps(dataclasses.asdict(feeds[-1]), indent=1))
        return engine.run(resume=True)
    except Interrupted:
        raise
    except Exception as error:
        if engine.checkpoints.numbers() == newest:  # nothing of it was learned that could be lost
            record.unlink(missing_ok=True)
            for name, text in before.items():
                folder.write(name, text)
            error.args = (f"{error}\nThe data was not taken: {folder.path} is as it was before; after the fix, feed it again",)
        raise
