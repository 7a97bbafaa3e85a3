"""Avalanche's benchmarks as a source, and `to_benchmark`, which makes an Avalanche benchmark of a scenario of ours.

`avalanche:SplitMNIST` is a classic benchmark by its name there; `arguments` go to its function: n_experiences (5 where it must be given
and is not), seed, return_task_id, dataset_root (a relative one may lie under STREAMCL_DATA). Avalanche downloads what it does not find.
A benchmark of your own is `my_file.py:function`, whose function returns one, or in Python the object itself.

All experiences are joined, and `groupings["experience"]` tells them apart, so that `domain_incremental` can go `by: experience`. A test
sample belongs to the experience at its own place in the test stream where the two streams are equally long, else to the one that
brings its class. Where the benchmark tells several task labels, they are `groupings["task_label"]`. The scenario `avalanche` is the
benchmark as a stream, as it is.

A classic benchmark is read without its transforms, pictures as uint8, because preparing them is the backbone's and the scenario's
business; what makes its experiences (rotations, permutations) is frozen there and stays. A benchmark of your own is read as its test
transforms leave it. `transform_group` says otherwise. Where a benchmark numbers classes from zero in each experience, they are the data
set's own classes again. Avalanche is MIT-licensed; each data set has its own licence. Needs `pip install 'streamcl[avalanche]'`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data import ArrayDataset, FileDataset
from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError, StreamclError
from streamcl.options import NonNegativeInt, PositiveInt
from streamcl.plugins import near_name
from streamcl.seeding import derived, random_state, restore_random, seed_everything
from streamcl.stream import Dataset, Grouping, Scenario, Source, SourceData, Task

from ._experiences import Part, Reader, Samples, Scaled
from ._records import EAGER_LIMIT

EXPERIENCES = 5  # of a classic benchmark that must be told and is not
UNTRAINED = "test sample whose class no experience trains"


class Avalanche(Source):
    """`train` and `test` are the names of its streams, where it has others (`train_online`); without a test stream nothing is scored.

    Pictures of several sizes are scaled and cut to `size` x `size`. Samples are read at once (`decode: eager`), when they are asked
    for, by `workers` processes (`lazy`), or at once while they take less than 512 MB (`auto`).
    """

    licence = "the set's own"

    def __init__(
        self,
        *,
        benchmark: str | Any,
        arguments: dict[str, Any] | None = None,
        train: str = "train",
        test: str | None = "test",
        transform_group: Literal["raw", "eval"] | None = None,
        size: PositiveInt | None = None,
        decode: Literal["eager", "lazy", "auto"] = "auto",
        workers: NonNegativeInt = 2,
    ) -> None:
        if not isinstance(benchmark, str) and not hasattr(benchmark, "streams"):
            raise ConfigError(f"avalanche: benchmark is {benchmark!r}: a name (SplitMNIST), my_file.py:function or a benchmark is needed")
        if arguments and not isinstance(benchmark, str):
            raise ConfigError("avalanche: arguments belong to the function that makes a benchmark, and benchmark is one already")
        self.benchmark, self.arguments, self.train, self.test = benchmark, arguments or {}, train, test
        self.transform_group = transform_group
        self.size, self.decode, self.workers = size, decode, workers

    def files(self) -> list[str]:
        named = self._own_function()
        own = [str(named[0])] if named else []
        given = [Path(value).expanduser() for key, value in self.arguments.items() if key.startswith("dataset_root") and value]
        return own + [str(locate(place)) for place in given if _exists(place)]

    def load(self) -> SourceData:
        return self.read(0)

    def read(self, seed: int) -> SourceData:
        """Everything, where `seed` decides what the benchmark leaves to chance."""
        _need_avalanche()
        with _repeatable(seed):
            benchmark = self._made(seed)
            streams = [list(stream) for stream in self._streams(benchmark)]
        parts = [Part.of(stream, f"{self._name}, {name} stream") for stream, name in zip(streams, (self.train, self.test), strict=True)]
        return self._joined(parts, [len(stream) for stream in streams], bool(getattr(benchmark, "class_ids_from_zero_in_each_exp", False)))

    # -- the benchmark ---------------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return self.benchmark if isinstance(self.benchmark, str) else type(self.benchmark).__name__

    def _own_function(self) -> tuple[Path, str] | None:
        """The file and the function that `benchmark` names; None where it is a classic one or an object."""
        if not isinstance(self.benchmark, str) or ".py" not in self.benchmark:
            return None
        file, _, function = self.benchmark.rpartition(":")
        if not file.endswith(".py") or not function.isidentifier():
            raise ConfigError(f"avalanche: benchmark is {self.benchmark!r}: name the function in the file, my_file.py:function")
        return locate(file), function

    def _made(self, seed: int) -> Any:
        if not isinstance(self.benchmark, str):
            return self.benchmark
        own = self._own_function()
        make = _from_file(*own) if own else _classic(self.benchmark)
        taken = inspect.signature(make).parameters
        given = {key: _folder(value) if key.startswith("dataset_root") and value else value for key, value in self.arguments.items()}
        # Without n_experiences a seed is one of a few that a published protocol names (CLEAR), or refused.
        if "seed" in taken and (own or "n_experiences" in taken):
            given.setdefault("seed", seed % 2**32)
        if not own:
            if "n_experiences" in taken and taken["n_experiences"].default is inspect.Parameter.empty:
                given.setdefault("n_experiences", EXPERIENCES)
            if self.transform_group != "eval":
                given = {**{name: None for name in ("train_transform", "eval_transform") if name in taken}, **given}
        try:
            inspect.signature(make).bind(**given)
        except TypeError as error:
            raise ConfigError(f"avalanche: {self._name} and its arguments: {error}; it takes {', '.join(taken) or 'none'}") from None
        try:
            with contextlib.redirect_stdout(sys.stderr):  # downloads print there, and standard output is the command's own
                made = make(**given)
        except StreamclError:
            raise
        except Exception as error:  # a refused value, a missing file and a network that is not there are of many types
            raise _told(error, self._name, own[0] if own else None) from error
        if not hasattr(made, "streams"):
            raise ConfigError(f"avalanche: {self._name} returns {type(made).__name__}: a benchmark of Avalanche is needed")
        return made

    def _streams(self, benchmark: Any) -> list[Any]:
        for option, name in (("train", self.train), ("test", self.test)):
            if name not in benchmark.streams and name not in (None, "test"):
                there = near_name(str(name), benchmark.streams) or f": there are {', '.join(benchmark.streams)}"
                raise ConfigError(f"avalanche: {option}: {self._name} has no stream {name!r}{there}")
        return [benchmark.streams[self.train], benchmark.streams.get(self.test, ())]

    # -- its samples -----------------------------------------------------------------------------------------------------------

    def _joined(self, parts: list[Part], lengths: list[int], from_zero: bool) -> SourceData:
        train, test = parts
        if not len(train.targets):
            raise DataError(f"avalanche: the train stream of {self._name} has no sample")
        names, targets, test_targets = _classes(train, test, from_zero)
        first = np.full(len(names), lengths[0])
        np.minimum.at(first, targets, train.experience)
        trained = first < lengths[0]
        keep = np.flatnonzero(trained[test_targets])
        dropped = len(test_targets) - len(keep)
        belongs = (test.experience if lengths[0] == lengths[1] else first[test_targets])[keep]
        test_targets = test_targets[keep]
        number = np.cumsum(trained) - 1  # of each class among those that are trained
        names = [name for name, there in zip(names, trained, strict=True) if there]

        ours = self.transform_group is None and all(isinstance(leaf, Samples) for part in parts for leaf in part.leaves)
        raw = self.transform_group == "raw" or ours
        readers = [Reader(part, raw, self.size) for part in parts if len(part.targets)]
        modality, name = readers[0].settle(train.leaves[0] if ours else None)
        for reader in readers[1:]:
            reader.like(readers[0])
        ids = _ids(train, test, keep)
        rows = [np.arange(len(targets)), keep]
        labels = [torch.from_numpy(number[t]) for t in (targets, test_targets)]
        data = [
            self._dataset(reader, part_rows, part_targets, part_ids)
            for reader, part_rows, part_targets, part_ids in zip(readers, rows, labels, ids, strict=False)
        ]
        return SourceData(
            data[0],
            data[1] if len(data) > 1 and len(keep) else None,
            names,
            {name: modality},
            licence=train.leaves[0].licence if ours else self.licence,
            problems={UNTRAINED: dropped} if dropped else {},
            groupings=_groupings(train, belongs, test.label[keep], lengths[0]),
            about={"benchmark": self._name},
        )

    def _dataset(self, reader: Reader, rows: np.ndarray, targets: Tensor, ids: Tensor) -> Dataset:
        reader.rows = rows
        if self.decode == "eager" or (self.decode == "auto" and reader.bytes_each * len(rows) <= EAGER_LIMIT):
            return ArrayDataset(reader(range(len(rows))), targets, ids)
        return FileDataset(reader, targets, ids, self.workers)


def _classes(train: Part, test: Part, from_zero: bool) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The names of the classes, and the class of each training and test sample by its place among them."""
    names = list(dict.fromkeys(train.names + test.names))
    own = np.concatenate([np.array([names.index(name) for name in p.names] + [-1], dtype=np.int64)[p.own] for p in (train, test)])
    ids = np.concatenate([train.targets, test.targets])
    cut = len(train.targets)
    pairs = np.unique(np.stack([ids, own], axis=1), axis=0)  # which classes of the data set a number of the benchmark stands for
    once = len(np.unique(pairs[:, 0])) == len(pairs) and bool((pairs[:, 1] >= 0).all())
    if from_zero and not once and bool((own >= 0).all()):
        return names, own[:cut], own[cut:]
    used, numbers = np.unique(ids, return_inverse=True)
    numbers = numbers.reshape(-1)
    if once and len(np.unique(pairs[:, 1])) == len(pairs):
        return [names[place] for place in pairs[:, 1].tolist()], numbers[:cut], numbers[cut:]
    return [str(value) for value in used.tolist()], numbers[:cut], numbers[cut:]


def _groupings(train: Part, belongs: np.ndarray, test_labels: np.ndarray, experiences: int) -> dict[str, Grouping]:
    def grouping(names: list[str], mine: np.ndarray, theirs: np.ndarray) -> Grouping:
        return Grouping(names, torch.from_numpy(mine), torch.from_numpy(theirs) if len(theirs) else None)

    found = {"experience": grouping([str(number) for number in range(experiences)], train.experience, belongs)}
    if len(np.unique(train.label)) > 1:
        told = np.unique(np.concatenate([train.label, test_labels]))
        mine, theirs = (np.searchsorted(told, labels) for labels in (train.label, test_labels))
        found["task_label"] = grouping([str(label) for label in told.tolist()], mine, theirs)
    return found


def _ids(train: Part, test: Part, keep: np.ndarray) -> list[Tensor]:
    """The place of each sample in the streams; in a benchmark made of a scenario of ours, the ids that it has there."""
    leaves = [*train.leaves, *test.leaves]
    if all(isinstance(leaf, Samples) for leaf in leaves):
        ids = [torch.empty(len(part.targets), dtype=torch.int64) for part in (train, test)]
        for part, own in zip((train, test), ids, strict=True):
            for number, leaf in enumerate(part.leaves):
                places = torch.from_numpy(np.flatnonzero(part.leaf == number))
                own[places] = leaf.dataset.ids[torch.from_numpy(part.row)[places]]
        everything = torch.cat(ids)
        if len(everything.unique()) == len(everything):
            return [ids[0], ids[1][torch.from_numpy(keep)]]
    return [torch.arange(len(train.targets)), len(train.targets) + torch.from_numpy(keep)]


def _exists(place: Path) -> bool:
    try:
        return locate(place).exists()
    except DataError:
        return False


def _folder(value: Any) -> Path:
    """A folder of data: under STREAMCL_DATA where only that has it, and else where Avalanche may put what it downloads."""
    place = Path(value).expanduser()
    return locate(place) if _exists(place) else place.absolute()


def _need_avalanche() -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the packages behind it would like to have beside them
            import avalanche.benchmarks  # noqa: F401
    except ModuleNotFoundError as error:
        lacking = "which is not installed" if error.name == "avalanche" else f"which does not import ({error})"
        raise ConfigError(f"this needs Avalanche, {lacking}: pip install 'streamcl[avalanche]'") from None
    except OSError as error:
        raise ConfigError(f"Avalanche cannot be imported: it keeps its settings in ~/.avalanche, and {error}") from None


def _classic(name: str) -> Callable[..., Any]:
    from avalanche.benchmarks import classic

    makers = {n: made for n, made in vars(classic).items() if n[0].isupper() and inspect.isfunction(made)}
    if name not in makers:
        hint = near_name(name, makers) or f": there are {', '.join(sorted(makers))}"
        raise ConfigError(f"avalanche has no classic benchmark {name!r}{hint} (or name a function: my_file.py:function)")
    return makers[name]


def _from_file(path: Path, function: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"streamcl_benchmark_{path.stem}_{derived(0, str(path)):x}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # its classes are looked up there, by worker processes too
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _told(error, path.name, path) from error
    finally:
        sys.path.remove(str(path.parent))
    found = getattr(module, function, None)
    if not callable(found):
        defined = [name for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
        raise ConfigError(f"{path}: there is no function {function!r}{near_name(function, defined) or ': it has ' + ', '.join(defined)}")
    return found


def _told(error: BaseException, name: str, file: Path | None) -> StreamclError:
    """What went wrong while a benchmark was made, in a sentence."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if file is not None:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
        return ConfigError(f"{file}{f':{lines[-1]}' if lines else ''}: {type(error).__name__}: {reason}")
    if isinstance(error, ImportError):
        return ConfigError(f"Avalanche's {name} needs a package that is not installed: {reason}")
    if isinstance(error, (ValueError, AssertionError)):
        return ConfigError(f"Avalanche's {name} refuses its arguments: {reason}")
    return DataError(
        f"Avalanche's {name} could not get its data: {reason}; where there is no network, give the folder that holds it: "
        "arguments: {dataset_root: FOLDER}"
    )


@contextlib.contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """The global generators, which Avalanche draws from, are the seed's in here and what they were afterwards."""
    before = random_state()
    seed_everything(derived(seed, "avalanche"))
    try:
        yield
    finally:
        restore_random(before)


# The other way --------------------------------------------------------------------------------------------------------------------


def to_benchmark(scenario: Scenario, seed: int = 0, modality: str | None = None) -> Any:
    """An Avalanche benchmark with the samples of a scenario: one experience per task, in a train and a test stream.

    Targets are the scenario's own, numbered in order of arrival. Samples are `(x, y, t)` as Avalanche's strategies take them: x is the
    tensor of the scenario's one modality (or of `modality`), whose integers a transform scales to 0..1; t is the number of the task where
    the scenario tells it, else 0. The test stream holds, in order, the test sets of the tasks as they are after the last one; a task
    without one has none there. With `validation` there is a valid stream.
    """
    _need_avalanche()
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels

    info = scenario.open(seed)
    if info.target != "class" or info.test_time:
        what = "is an unlabelled stream that is served" if info.test_time else f"has targets of the kind {info.target!r}"
        raise ConfigError(f"to_benchmark makes benchmarks with one class per sample, and this scenario {what}")
    numeric = [name for name, kind in info.modalities.items() if kind.kind != "text"]
    chosen = modality or (numeric[0] if len(numeric) == 1 and len(info.modalities) == 1 else None)
    if chosen not in numeric:
        raise ConfigError(
            f"to_benchmark: Avalanche's strategies take one tensor per sample: set modality to one of {', '.join(numeric) or 'none'}"
        )
    try:
        tasks = [scenario.task(index) for index in range(len(scenario))]
    except TypeError:
        raise ConfigError(
            "to_benchmark: a live stream does not know its end, and a benchmark has all its experiences from the start"
        ) from None

    def experience(dataset: Dataset, task: Task) -> Any:
        return _experience(Samples(dataset, chosen, info), task.index if info.task_ids else 0)

    tests = [(scenario.test(task, tasks[-1]), task) for task in tasks]
    streams = {
        "train": [experience(task.train, task) for task in tasks],
        "test": [experience(dataset, task) for dataset, task in tests if dataset is not None and len(dataset)],
        "valid": [experience(task.validation, task) for task in tasks if task.validation is not None and len(task.validation)],
    }
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(**{name: parts for name, parts in streams.items() if parts})))


def _experience(samples: Samples, task_label: int) -> Any:
    from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset, TaskLabels, TransformGroups
    from avalanche.benchmarks.utils.flat_data import ConstantSequence

    high = samples.modality.high
    scale = (Scaled(high), None) if high is not None else None
    return TaskAwareSupervisedClassificationDataset(
        [samples],
        data_attributes=[DataAttribute(samples.targets, "targets"), TaskLabels(ConstantSequence(task_label, len(samples)))],
        transform_groups=TransformGroups({"train": scale, "eval": scale}),
    )
