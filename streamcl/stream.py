"""What flows through streamcl: batches, data sets, tasks, predictions, and the scenario that emits the tasks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

Column = Tensor | list  # one value per sample: a tensor whose first dimension is the batch, or a list (text)


def take(column: Column, indices: Tensor) -> Column:
    """The rows `indices` of a column, in that order."""
    if isinstance(column, list):
        return [column[i] for i in indices.tolist()]
    return column.index_select(0, indices)


def join(columns: list[Column]) -> Column:
    """Columns one after another."""
    if isinstance(columns[0], list):
        return [value for column in columns for value in column]
    return torch.cat([c for c in columns if isinstance(c, Tensor)])


def level(columns: list[Tensor]) -> list[Tensor]:
    """Columns with one value per class, made equally wide: a class that came later has NaN in floats, and -1 in integers."""
    widths = {column.shape[1] for column in columns if column.dim() == 2 and column.dtype.is_signed}
    if len(widths) < 2:
        return columns
    return [
        pad(column, (0, max(widths) - column.shape[1]), value=math.nan if column.is_floating_point() else -1)
        if column.dim() == 2 and column.dtype.is_signed
        else column
        for column in columns
    ]


@dataclass(slots=True)
class Batch:
    """A few samples at once.

    `inputs` maps a modality to its values; the first dimension of everything is the batch. `target` holds classes by their number
    in order of arrival (multi-label: one column per class seen, 1, 0, or -1 for not annotated). `present` says which samples have
    a modality; a value that is absent is NaN in floats, 0 in integers and "" in text. `task` is there only under a
    task-incremental protocol. `extra` carries what a method keeps beside a sample (stored logits, prompts, answers). `new` is how
    many of the first samples are the stream's own where a memory has joined others to them; None elsewhere, and after indexing.

    Classes grow, so label matrices and two-dimensional columns of `extra` may have fewer columns in older samples. Wherever such
    samples come together the narrower are widened: with NaN in floats, with -1 in (signed) integers.
    """

    inputs: dict[str, Column]
    target: Tensor | None
    ids: Tensor  # (batch,) int64, stable over the whole stream
    present: dict[str, Tensor] | None = None
    task: Tensor | None = None
    extra: dict[str, Column] = field(default_factory=dict)
    new: int | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, indices: Tensor | slice | list[int]) -> Batch:
        if isinstance(indices, Tensor):
            index = indices if indices.device == self.ids.device else indices.to(self.ids.device)
        elif isinstance(indices, slice):
            index = torch.arange(len(self), device=self.ids.device)[indices]
        else:
            index = torch.tensor(indices, dtype=torch.int64, device=self.ids.device)
        return Batch(
            {name: take(values, index) for name, values in self.inputs.items()},
            None if self.target is None else self.target.index_select(0, index),
            self.ids.index_select(0, index),
            None if self.present is None else {name: mask.index_select(0, index) for name, mask in self.present.items()},
            None if self.task is None else self.task.index_select(0, index),
            {name: take(values, index) for name, values in self.extra.items()} if self.extra else {},
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; itself when it is there already."""
        if self.ids.device == device or self.ids.device == torch.device(device):
            return self

        def move(column: Any) -> Any:
            return column.to(device, non_blocking=True) if isinstance(column, Tensor) else column

        return Batch(
            {name: move(values) for name, values in self.inputs.items()},
            move(self.target),
            move(self.ids),
            None if self.present is None else {name: move(mask) for name, mask in self.present.items()},
            move(self.task),
            {name: move(values) for name, values in self.extra.items()},
            self.new,
        )

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields exchanged."""
        return replace(self, **changes)

    @staticmethod
    def cat(batches: list[Batch]) -> Batch:
        """Batches one after another. A field survives where every batch has it; a modality that only some have is an error.

        A floating-point column of `extra` survives where any has it, with NaN for the samples without; a mask of `present` as well,
        with True.
        """
        first = batches[0]
        if len(batches) == 1:
            return first
        if len(batches) == 2 and (both := _plainly_joined(first, batches[1])) is not None:
            return both
        if any(b.inputs.keys() != first.inputs.keys() for b in batches):
            raise ValueError(f"batches of different modalities cannot be joined: {[sorted(b.inputs) for b in batches]}")
        masks = [b.present for b in batches if b.present is not None]
        tasks = [b.task for b in batches if b.task is not None]
        targets = [b.target for b in batches if b.target is not None]
        return Batch(
            {name: join([b.inputs[name] for b in batches]) for name in first.inputs},
            torch.cat(level(targets)) if len(targets) == len(batches) else None,
            torch.cat([b.ids for b in batches]),
            {
                name: torch.cat([(b.present or {}).get(name, torch.ones_like(b.ids, dtype=torch.bool)) for b in batches])
                for name in dict.fromkeys(name for mask in masks for name in mask)
            }
            if masks
            else None,
            torch.cat(tasks) if len(tasks) == len(batches) else None,
            _joined_extra(batches),
        )


def _joined_extra(batches: list[Batch]) -> dict[str, Column]:
    joined: dict[str, Column] = {}
    for name, like in {name: column for b in reversed(batches) for name, column in b.extra.items()}.items():
        columns = [b.extra.get(name) for b in batches]
        if isinstance(like, Tensor) and like.is_floating_point():
            columns = [
                like.new_full((len(b), *like.shape[1:]), math.nan) if column is None else column
                for b, column in zip(batches, columns, strict=True)
            ]
        if isinstance(like, Tensor) and all(isinstance(column, Tensor) for column in columns):
            joined[name] = torch.cat(level(columns))  # type: ignore[arg-type]
        elif all(isinstance(column, list) for column in columns):
            joined[name] = join(columns)  # type: ignore[arg-type]
    return joined


def _plainly_joined(a: Batch, b: Batch) -> Batch | None:
    """Two batches of labelled samples with nothing else to them: what replay joins at every step."""
    if a.present is not None or b.present is not None or a.task is not None or b.task is not None or a.extra or b.extra:
        return None
    if a.target is None or b.target is None or a.target.dim() > 1 or a.inputs.keys() != b.inputs.keys():
        return None
    other = b.inputs
    return Batch(
        {name: join([values, other[name]]) for name, values in a.inputs.items()}, torch.cat((a.target, b.target)), torch.cat((a.ids, b.ids))
    )


@runtime_checkable
class Dataset(Protocol):
    """Samples by index, a batch at a time. A live source has only `batches`."""

    targets: Tensor  # (samples,), or (samples, ...): see SourceData
    ids: Tensor  # (samples,)

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> Batch: ...

    def read(self, order: Tensor, size: int) -> Iterator[Batch]:
        """The samples at these indices, in this order, `size` at a time; what is on disk reads ahead."""
        ...

    def batches(self, size: int, shuffle: bool = False, generator: torch.Generator | None = None) -> Iterator[Batch]: ...


@dataclass(slots=True)
class Prediction:
    """What a strategy answers: `scores` (batch, classes seen so far; or values for regression), `texts`, or `images`.

    `heads` holds second opinions that are scored beside it: scores, or of texts several for each sample, of which one that is right is
    enough. Where a sample may have several labels, scores are logits and `threshold`
    is the probability from which a label is given. In the online loop `made` says whether it was made before or after the update, and
    `version` by which version of the model: 0 is the model as it was deployed.
    """

    scores: Tensor | None = None
    texts: list[str] | None = None
    images: Tensor | None = None
    heads: dict[str, Tensor | list[list[str]]] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # modality -> (batch, dim), where a stream is scored by retrieval
    threshold: float | None = None
    made: str = "before"
    version: int | None = None
    ids: Tensor | None = None  # of the samples, in the online loop: what labels that come late are known by

    def labels(self) -> Tensor | list[str]:
        """The decision: the class with the highest score, for several labels which of them are given, or the text."""
        if self.scores is not None and self.threshold is not None:
            return self.scores.sigmoid() > self.threshold  # (batch, classes)
        if self.scores is not None:
            return self.scores.argmax(dim=-1)
        if self.texts is not None:
            return self.texts
        raise ValueError("a prediction of images has no labels")


@dataclass(frozen=True)
class Modality:
    """One kind of input. `kind` is image, video, audio, vector or text; `shape` is one sample's; integers run from 0 to `high`."""

    kind: str
    shape: tuple[int, ...] = ()
    high: float | None = None  # the largest value that raw integers take: 255 for ordinary images


@dataclass(frozen=True)
class StreamInfo:
    """What is known of a stream before its first task."""

    modalities: Mapping[str, Modality]
    target: str = "class"  # class | labels (multi-label) | value | mask | text | image
    metrics: tuple[str, ...] = ("accuracy",)  # the first is the one that fills the matrix
    classes: int | None = None  # None where the stream does not know
    tasks: int | None = None
    passes: int | None = None  # how often a task's data may be read; 1 in an online stream, None for no limit
    task_ids: bool = False  # the task is told with every batch
    test_time: bool = False  # an unlabelled stream that is served, not trained on
    licence: str = "unknown"
    class_names: tuple[str, ...] = ()  # in order of arrival, as far as known
    threshold: float = 0.5  # multi-label: the probability from which a label counts as given
    asks: tuple[str, ...] = ()  # the modalities that a test batch holds, where these are not all: a prompt has no picture
    words: tuple[str, ...] = ()  # the word that stands for each class in a prompt, in order of arrival, where pictures are painted
    nouns: tuple[str, ...] = ()  # beside each of these words: that of its class, which may be empty
    told: tuple[str, ...] = ("choices", "missing")  # what of a test batch's `extra` is told to `predict`: the rest may hold the answer


def asked(batch: Batch, info: StreamInfo) -> Batch:
    """A test batch as it is put to a strategy: without its targets, and without what else may tell them."""
    return batch.replace(target=None, extra={name: batch.extra[name] for name in info.told if name in batch.extra})


@dataclass
class Task:
    """One step of the stream. Classes are numbered in order of arrival.

    `classes` are new here, `labels` occur here, `seen` have arrived so far, this task's included. What a kind of scenario adds
    (`domain`, `missing`, `concept`, `shots`) lies in `about` and reads as an attribute: `task.domain`.
    """

    index: int
    name: str
    train: Dataset
    classes: tuple[int, ...]
    seen: tuple[int, ...]
    labels: tuple[int, ...] = ()
    validation: Dataset | None = None
    names: Mapping[int, str] = field(default_factory=dict)  # a class's own name, for every class seen
    about: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        about = self.__dict__.get("about", {})
        if name in about:
            return about[name]
        raise AttributeError(f"task {self.__dict__.get('name', '?')!r} has no {name!r}; this scenario adds {sorted(about) or 'nothing'}")


@dataclass
class Grouping:
    """A way to divide a source's samples beside their classes: by domain, speaker, alphabet, skill."""

    names: list[str]
    train: Tensor  # (training samples,) int64
    test: Tensor | None = None  # (test samples,) int64


@dataclass
class SourceData:
    """What a source loads: everything there is, with classes numbered as the source numbers them.

    What `targets` of its data sets hold depends on `target`. class: the number of the class. labels: (samples, classes) int8 of 1, 0,
    or -1 for not annotated. value: (samples,) or (samples, values) float32. mask: (samples, height, width) uint8, 255 where nothing is
    annotated. text: the number of the row's group, whose names are `class_names`; the words of the answer lie in `extra["answer"]`.
    """

    train: Dataset
    test: Dataset | None
    class_names: list[str]
    modalities: dict[str, Modality]
    target: str = "class"
    licence: str = "unknown"
    problems: dict[str, int] = field(default_factory=dict)  # what was left out and why, counted
    groupings: dict[str, Grouping] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # facts that a kind of scenario may need, as JSON values


class Source(ABC):
    """A plug-in that loads data. Its options are its constructor's keyword arguments; nothing is read before `load`."""

    licence: str = "unknown"
    class_count: ClassVar[int | dict[str, int] | None] = None  # where it is always the same, or by the first option: for `streamcl check`

    @abstractmethod
    def load(self) -> SourceData:
        """Read the data. A record that is wrong raises DataError with the file and the row."""

    def files(self) -> list[str]:
        """The local files and folders that this source reads, for the run's record of what it used."""
        return []


class Transform(ABC):
    """A plug-in that changes one modality of a whole batch, on the device: `(batch, ...)` in, `(batch, ...)` out.

    Per-sample randomness comes from `generator`, drawn for the whole batch at once.
    """

    kinds: tuple[str, ...] = ("image",)  # which kinds of modality it applies to

    @abstractmethod
    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor: ...


class Scenario(ABC):
    """A plug-in that emits tasks, one after another, the same way for the same seed, and can go on from any of them.

    A map-style scenario fills in `open`, `task` and `__len__`; a live one overrides `__iter__`, `state` and `restore` as well.
    `transforms` replaces the backbone's own preprocessing; `validation` is the fraction of each task's training data that
    only sweeps and early stopping see.
    """

    info: StreamInfo
    workdir: Path | None = None  # a folder of the run for a live stream's own files; set before `open`, None without a run
    interrupted: Callable[[], bool] = staticmethod(lambda: False)  # whether the run is to stop: asked by a stream that waits
    tell: Callable[[str], None] = staticmethod(lambda message: None)  # says something to the person who runs the stream
    problems: Mapping[str, int] = {}  # what the data had wrong and was left out, counted; known once it is open
    bounded_by_classes: ClassVar[tuple[str, ...]] = ()  # options that cannot be above the number of classes: for `streamcl check`

    def __init__(self, *, transforms: dict[str, list[Transform]] | None = None, validation: float = 0.0) -> None:
        if not 0 <= validation < 1:
            raise ValueError(f"validation is {validation}: a fraction from 0 to below 1 is needed")
        self.transforms, self.validation = transforms, validation
        self.position = 0

    @abstractmethod
    def open(self, seed: int) -> StreamInfo:
        """Load what is behind the stream, fix its order by `seed`, and say what is known of it."""

    @abstractmethod
    def task(self, index: int) -> Task:
        """Task `index`, always the same."""

    def __len__(self) -> int:
        raise TypeError("this stream does not know its length")

    def __iter__(self) -> Iterator[Task]:
        while self.position < len(self):
            self.position += 1
            yield self.task(self.position - 1)

    def past(self) -> list[Task]:
        """The tasks that were emitted, for scoring after a resume."""
        return [self.task(index) for index in range(self.position)]

    @abstractmethod
    def test(self, task: Task, after: Task) -> Dataset | None:
        """What to score of `task` once `after` was learned. Only the engine asks."""

    def unshifted(self) -> Dataset | None:
        """Labelled data of the source before any shift, of a test-time stream: what a model was trained on, or could have been."""
        return None

    def judge(self) -> Any:
        """Who scores pictures that are painted (streamcl.judging.Judge), made when it is first asked for; None of other streams."""
        return None

    def takes(self) -> StreamInfo | None:
        """What delivered data must be like, of an open stream that makes tasks of it by itself (`take`); None of any other."""
        return None

    def take(self, name: str, classes: Sequence[str], train: Dataset) -> StreamInfo:
        """Let delivered samples of these classes be one more task, and say what is known of the stream now.

        Their ids are the run's own, and their targets number the classes on from those before, in this order. They are read when they
        are needed. Classes that the stream has already may be refused with a DataError.
        """
        raise TypeError("this stream takes no deliveries")

    def files(self) -> list[str]:
        """The local files and folders behind the stream."""
        return []

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        return {"position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.position = int(state["position"])
