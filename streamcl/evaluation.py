"""What is scored after a task, and the accuracy matrix that it fills."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.errors import ConfigError, DataError, PluginError
from streamcl.metrics import METRICS, Answer, Metric, Room
from streamcl.stream import Batch, Dataset, Prediction, StreamInfo, Task

Row = Sequence[float | None] | None
Part = Literal["test", "validation"]
Columns = Sequence[tuple[Task, Dataset]]

PROTOCOLS = ("class_incremental", "task_incremental")
UNSCORED = "none"  # of a stream that names no metric: the strategy's own figures are all there is
DECISION = ""  # the head that Prediction.scores is, beside the named second opinions

DEFINITIONS = {
    "matrix": "R[i][j]: the metric on the test set of task j after learning task i, tasks numbered 0 to T-1; null where nothing "
    "was scored. Metrics of label sets (map, cf1, of1, macro_f1) count by class: R[i][j] is over the classes that task j brought, on all "
    "that is scored after task i.",
    "lower": "Of mae and rmse less is better; every difference (forgetting, transfer, drop) is taken with the sign turned, so that it "
    "says the same.",
    "per_task": "S[i]: the metric on the union of the test sets of tasks 0..i after learning task i, every sample weighing the same. "
    "Several toolboxes take the mean of R[i][0..i] instead, which is the same only for test sets of equal size.",
    "average_incremental": "(1/T) sum over i of S[i]; a large first task is one term like any other. As PyCIL averages its top-1 curve.",
    "final": "S[T-1]. PyCIL and the survey of class-incremental learning call it the last accuracy.",
    "performance_drop": "S[0] minus S[T-1], as few-shot class-incremental learning reports it (PD).",
    "final_task_mean": "(1/T) sum over j of R[T-1][j], every task weighing the same. Often called the average accuracy A_T.",
    "forgetting": "1/(T-1) sum over j < T-1 of (max over l < T-1 of R[l][j], minus R[T-1][j]), as Chaudhry et al. (2018); tasks without a "
    "test set are left out. Mammoth and PyCIL take the maximum over all rows, the last one too (never negative); Continuum over l >= j; "
    "Avalanche takes R[j][j] for the maximum, which is minus the backward transfer.",
    "backward_transfer": "1/(T-1) sum over j < T-1 of (R[T-1][j] minus R[j][j]), as GEM (2017). Continuum and CapyMOA average "
    "R[i][j] minus R[j][j] over all pairs i > j.",
    "forward_transfer": "1/(T-1) sum over j > 0 of (R[j-1][j] minus b[j]), b[j] being the metric of the untrained model on task j, as GEM "
    "(2017) and Mammoth. Continuum leaves b[j] out; CapyMOA averages the upper triangle. In class-incremental streams, whose coming "
    "classes have no scores yet, it says little.",
    "learning_accuracy": "(1/T) sum over j of R[j][j]: each task just after it was learned.",
    "any_time": "The area under the metric over the number of samples learned, by the trapezoid rule, divided by the span: sum over k of "
    "(n[k+1] - n[k]) (a[k] + a[k+1]) / 2, over n[last] - n[first]. i-Blurry takes the plain mean of a[k].",
    "per_class": "matrix[i][c]: the share of the samples of class c that were right after task i, over the union of the test sets of tasks "
    "0..i; null where there was no sample. The classes' own names stand under `classes`, by the number of their arrival.",
    "per_domain": "The metric on the union of the test sets of each domain among tasks 0..T-1, after the last task.",
    "metrics": "The same keys for each further metric of the stream; a figure that the strategy measures itself has per_task, its mean and "
    "its last value.",
    "served": "Of a test-time stream S[i] is the score of segment i alone, as it was answered; final is the mean over the segments, every "
    "sample weighing the same, and so is each entry of per_domain over the segments of that domain. Figures that compare a segment with "
    "another, forgetting above all, do not apply.",
    "protocols": "The same keys under each protocol. class_incremental: the decision is among all classes seen so far. task_incremental: "
    "only among the classes of the sample's own task, which is told. The two are not comparable.",
    "heads": "The same keys for each second opinion of the strategy, from the same predictions.",
    "validation": "The same keys on the validation parts that were held out of the tasks' training data, never of a test set.",
}


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers among `values`; None where there is none."""
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


def _minus(a: float | None, b: float | None, sign: float = 1.0) -> float | None:
    return None if a is None or b is None else sign * (a - b)


def summarise(rows: Sequence[Row], per_task: Sequence[float | None], baseline: Row = None, lower: bool = False) -> dict[str, Any]:
    """The figures that follow from a matrix and from the scores on all that was seen; DEFINITIONS says how.

    Rows may be of unequal length, and None where nothing was scored; T-1 is the last row that was. With `lower` less is better.
    """
    width = max((len(row) for row in rows if row is not None), default=0)
    matrix = [[*(row or ()), *[None] * (width - len(row or ()))] for row in rows]
    scored = [i for i, row in enumerate(rows) if row is not None and any(value is not None for value in row)]
    summary: dict[str, Any] = {
        "matrix": matrix,
        "per_task": list(per_task),
        "average_incremental": mean(per_task),
        "final": next((value for value in reversed(per_task) if value is not None), None),
        "performance_drop": None,
        "final_task_mean": None,
        "forgetting": None,
        "backward_transfer": None,
        "forward_transfer": None,
        "learning_accuracy": None,
    }
    known = [value for value in per_task if value is not None]
    summary["performance_drop"] = _minus(known[0], known[-1], -1.0 if lower else 1.0) if known else None
    if not scored:
        return summary
    last = scored[-1]
    sign = -1.0 if lower else 1.0
    diagonal = [matrix[j][j] if j < width else None for j in range(last + 1)]
    summary["final_task_mean"] = mean(matrix[last][: last + 1])
    summary["forgetting"] = mean(forgetting_per_task(matrix, last, lower))
    summary["backward_transfer"] = mean(_minus(matrix[last][j], diagonal[j], sign) for j in range(min(last, width)))
    summary["learning_accuracy"] = mean(diagonal)
    if baseline is not None:
        ahead = range(1, min(last + 1, width, len(baseline)))
        summary["forward_transfer"] = mean(_minus(matrix[j - 1][j], baseline[j], sign) for j in ahead)
    return summary


def forgetting_per_task(matrix: Sequence[Sequence[float | None]], last: int | None = None, lower: bool = False) -> list[float | None]:
    """How far each task before the last fell below the best that it ever had before row `last` (the last one by default)."""
    last = len(matrix) - 1 if last is None else last
    if last < 0:
        return []
    drops: list[float | None] = []
    for j in range(min(last, len(matrix[last]))):
        best = (min if lower else max)((value for row in matrix[:last] if (value := row[j]) is not None), default=None)
        drops.append(_minus(best, matrix[last][j], -1.0 if lower else 1.0))
    return drops


class Evaluation:
    """Scores a strategy's predictions after each task, and keeps every score of the run.

    Each data set is predicted once, whatever the protocols, heads and metrics. Over several processes each one predicts every
    `world`-th sample and the counts are added up on `device`, so that the numbers are those of one process.
    """

    def __init__(
        self,
        info: StreamInfo,
        protocols: Sequence[str] = ("class_incremental",),
        batch: int = 512,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        judge: Callable[[], Any] = lambda: None,  # who scores pictures, where the stream has some painted
    ) -> None:
        self.metrics, self.protocols = tuple(info.metrics) or (UNSCORED,), tuple(dict.fromkeys(protocols))
        for kind, given, known in (("metric", info.metrics, tuple(METRICS)), ("protocol", protocols, PROTOCOLS)):
            unknown = [name for name in given if name not in known]
            if unknown or not (given or kind == "metric"):
                raise ConfigError(f"{kind} {', '.join(map(repr, unknown)) or 'none'}: one or more of {', '.join(known)} are needed")
        for name in info.metrics:
            if info.target not in METRICS[name].targets:
                fitting = ", ".join(other for other, entry in METRICS.items() if info.target in entry.targets)
                raise ConfigError(f"metric {name!r} does not score a stream whose target is {info.target}: {fitting or 'nothing'} does")
        if info.target != "class" and self.protocols != ("class_incremental",):
            raise ConfigError(
                f"evaluate.protocols: task_incremental decides among the classes of a sample's own task, and the target of this stream is "
                f"{info.target}: set evaluate.protocols=[class_incremental]"
            )
        self.target, self.threshold, self.served = info.target, info.threshold, info.test_time
        self.batch, self.rank, self.world, self.device = batch, rank, world, device
        self.judge = judge
        self._class_names = dict(enumerate(info.class_names))
        self._tasks: dict[int, dict[str, Any]] = {}
        self._rows: dict[str, dict[int, Any]] = {"test": {}, "validation": {}}
        self._baseline: Any = None
        self._any_time: dict[int, float] = {}
        self._figures: dict[int, dict[str, float]] = {}

    # -- scoring ---------------------------------------------------------------------------------------------------------------

    def score(
        self,
        after: Task,
        columns: Columns,
        predict: Callable[[Batch], Prediction],
        part: Part = "test",
        between: Callable[[], None] | None = None,
        batch: int | None = None,
    ) -> dict[str, Any]:
        """Fill row `after.index`: every column by itself, and the union of those up to `after`. Returns the `scored` event's fields.

        `predict` takes raw batches on the host, `batch` samples at a time where that is part of the stream. `between` is called after
        each of them; what it raises leaves no half row behind.
        """
        self._note(after)
        for task, dataset in columns:
            self._note(task)[part] = len(dataset)
        record, warning = self._measure(after.index, columns, predict, between, batch)
        self._rows[part][after.index] = record
        first = record[self.protocols[0]][DECISION][self.metrics[0]]
        rows = [self._look(row, self.protocols[0], DECISION, self.metrics[0], "row") for row in self._in_order(self._rows[part])]
        return {
            "task": after.index,
            "part": part,
            "row": first["row"],
            "per_task": first["seen"],
            "metric": self.metrics[0],
            "final_matrix": summarise(rows, ())["matrix"],
            "warning": warning,
        }

    def any_time(
        self,
        samples: int,
        after: Task,
        columns: Columns,
        predict: Callable[[Batch], Prediction],
        between: Callable[[], None] | None = None,
    ) -> float | None:
        """Score the union of the columns up to `after` once `samples` were learned, and return that score."""
        record, _ = self._measure(after.index, [c for c in columns if c[0].index <= after.index], predict, between)
        value: float | None = record[self.protocols[0]][DECISION][self.metrics[0]]["seen"]
        if value is not None:
            self._any_time[samples] = value
        return value

    def baseline(self, columns: Columns, predict: Callable[[Batch], Prediction], between: Callable[[], None] | None = None) -> None:
        """What the model reaches on each column before it learns anything: b[j] of the forward transfer."""
        self._baseline, _ = self._measure(-1, columns, predict, between)

    def figures(self, after: Task, mapping: Mapping[str, float]) -> None:
        """Keep what Strategy.measure returned after a task; it is reported under `metrics`."""
        self._note(after)
        for name, value in mapping.items():
            if name in self.metrics:
                raise PluginError(f"the strategy measures {name!r}, which is a metric of the stream already: another name is needed")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise PluginError(f"the strategy measures {name!r} and returns a {type(value).__name__}: a number is needed")
        self._figures[after.index] = {name: float(value) for name, value in mapping.items()}

    def _note(self, task: Task) -> dict[str, Any]:
        """What the report says of a task."""
        self._class_names.update(task.names)
        note = self._tasks.setdefault(task.index, {"test": None, "validation": None})
        try:
            train = len(task.train)
        except TypeError:  # a live source does not know
            train = None
        classes = [self._class_names.get(c, str(c)) for c in task.classes]
        note.update(index=task.index, name=task.name, classes=classes, train=train)
        return note

    def _measure(
        self,
        upto: int,
        columns: Columns,
        predict: Callable[[Batch], Prediction],
        between: Callable[[], None] | None,
        size: int | None = None,
    ) -> tuple[dict[str, Any], str | None]:
        """Predict every column once; protocol -> head -> metric -> {row, seen, per_class, domains}, and a warning or None."""
        from streamcl.metrics import classes as counting

        columns = [(task, dataset) for task, dataset in columns if len(dataset)]
        if columns and self.metrics == (UNSCORED,):
            raise PluginError("the scenario gives a test set and names no metric in its StreamInfo: one is needed to score it")
        settings: dict[str, Any] = {"distributed_available_fn": lambda: self.world > 1}
        needed = {METRICS[name].reads for name in self.metrics if name in METRICS}
        room = Room(
            max((_classes(task, dataset, self.target) for task, dataset in columns), default=0),
            {task.index: task.classes for task, _ in columns if task.index <= upto},
            self.threshold,
            self.judge() if columns and "images" in needed else None,
        )
        tally: dict[tuple[str, str, str, str], Metric] = {}
        not_finite = counting.total(settings["distributed_available_fn"], self.device)
        samples = sum(len(dataset) for _, dataset in columns)

        def metric(*key: Any) -> Metric:
            if key not in tally:
                tally[key] = METRICS[key[2]].load()(room, **settings).to(self.device)
            return tally[key]

        arriving = all(task.classes for task, _ in columns)  # else a column is a task's own samples, by whatever metric
        by_class = {name for name in self.metrics if name in METRICS and METRICS[name].by_class and arriving}
        heads = {DECISION}
        for task, dataset in columns:
            own = sorted(task.classes or task.labels)
            among = getattr(dataset, "among", None)
            mine = torch.arange(self.rank, len(dataset), self.world)
            for batch in dataset.read(mine, size or self.batch):
                if batch.target is None and self.target != "text":
                    raise DataError(f"the test set of task {task.name!r} has no targets: every sample that is scored needs one")
                prediction = predict(batch)
                embeddings = room.judge.look(batch, prediction.images) if "images" in needed else prediction.embeddings
                for head, given in {DECISION: prediction.scores, **prediction.heads}.items():
                    heads.add(head)
                    scores = None
                    texts = given if isinstance(given, list) else prediction.texts
                    if "scores" in needed:
                        scores, bad = _answers(given, batch, head, self.target)  # type: ignore[arg-type]
                        if among is not None:
                            scores = _only(scores, among)
                        if head == DECISION:
                            not_finite.update(bad.to(self.device))
                    for protocol in self.protocols:
                        offered = scores if scores is None or protocol == "class_incremental" else _only(scores, own)
                        answer = Answer(batch, offered, texts, embeddings, prediction.threshold)
                        for name, place in itertools.product(self.metrics, _places(task, upto)):
                            if not place.startswith("column") or name not in by_class:
                                metric(protocol, head, name, place).update(answer)
                        for domain, part in _domains(task, upto, answer):
                            for name in self.metrics:
                                metric(protocol, head, name, f"domain {domain}").update(part)
                if between is not None:
                    between()

        if self.world > 1:  # a process without a sample has seen no head, and everyone must add up the same counts
            everyone: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(everyone, sorted(heads))
            heads = {head for one in everyone for head in one}

        def computed(of: Any) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The ``compute`` method")  # a share may be empty
                return of.compute()

        width = 1 + max((task.index for task, _ in columns), default=-1)
        domains = dict.fromkeys(
            str(domain)
            for task, _ in columns
            if task.index <= upto and "domain" in task.about
            for domain in task.about.get("domains", [task.about["domain"]])
        )
        record: dict[str, Any] = {}
        if self.metrics == (UNSCORED,):
            nothing: dict[str, Any] = {"row": [None] * width, "seen": None, "per_class": None, "domains": {}}
            return {protocol: {DECISION: {UNSCORED: nothing}} for protocol in self.protocols}, None
        for protocol, head, name in itertools.product(self.protocols, sorted(heads), self.metrics):
            row: list[float | None] = [None] * width
            seen = computed(metric(protocol, head, name, "seen"))
            for task, _ in columns:
                if name in by_class:
                    row[task.index] = (seen.per_task or {}).get(task.index)
                else:
                    row[task.index] = computed(metric(protocol, head, name, f"column {task.index}")).value
            record.setdefault(protocol, {}).setdefault(head, {})[name] = {
                "row": row,
                "seen": seen.value,
                "per_class": seen.per_class,
                "domains": {domain: computed(metric(protocol, head, name, f"domain {domain}")).value for domain in domains},
            }
        count = int(computed(not_finite))
        warning = f"{count} of {samples} samples had scores that are not finite (NaN or infinite); they count as wrong" if count else None
        return record, warning

    # -- what came of it -------------------------------------------------------------------------------------------------------

    def scores(self) -> dict[str, Any]:
        """The keys of scores.json that come from scoring; null where one does not apply."""
        return {
            **self._part("test"),
            "any_time": self._area(),
            "tasks": [self._tasks[index] for index in sorted(self._tasks)],
            "validation": self._part("validation") if self._rows["validation"] else None,
            "definitions": {"protocol": f"All figures are under {self.protocols[0]} where nothing else is said.", **DEFINITIONS},
        }

    def _part(self, part: str) -> dict[str, Any]:
        rows = self._in_order(self._rows[part])
        several = len(self.protocols) > 1
        return {
            **self._protocol(rows, self.protocols[0], part),
            "protocols": {protocol: self._protocol(rows, protocol, part) for protocol in self.protocols} if several else None,
        }

    def _protocol(self, rows: Sequence[Any], protocol: str, part: str) -> dict[str, Any]:
        heads = sorted({head for row in rows if row for head in row[protocol]} - {DECISION})
        return {
            **self._head(rows, protocol, DECISION, part),
            "heads": {head: self._head(rows, protocol, head, part) for head in heads} or None,
        }

    def _head(self, rows: Sequence[Any], protocol: str, head: str, part: str) -> dict[str, Any]:
        first, *further = self.metrics
        named = {name: self._figures_of(rows, protocol, head, name, part) for name in further}
        if part == "test" and head == DECISION:
            for name in sorted({name for figures in self._figures.values() for name in figures}):
                named[name] = summarise((), [figures.get(name) for figures in self._in_order(self._figures, empty={})])
        return {"metric": first, **self._figures_of(rows, protocol, head, first, part), "metrics": named or None}

    def _figures_of(self, rows: Sequence[Any], protocol: str, head: str, name: str, part: str) -> dict[str, Any]:
        def each(field: str) -> list[Any]:
            return [self._look(row, protocol, head, name, field) for row in rows]

        known = part == "test" and self._baseline is not None
        baseline = self._look(self._baseline, protocol, head, name, "row") if known else None
        per_class = each("per_class")
        classes = max((len(row) for row in per_class if row), default=0)
        domains = [row or {} for row in each("domains")]
        summary = summarise(each("row"), each("seen"), baseline, lower=name in METRICS and METRICS[name].lower)
        whole = {domain: value for row in domains for domain, value in row.items()}
        if self.served and part == "test":
            samples = [(self._tasks.get(index) or {}).get("test") or 0 for index in range(len(rows))]
            whole = {domain: _weighted([row.get(domain) for row in domains], samples) for domain in whole}
            nothing = dict.fromkeys(("final_task_mean", "performance_drop", "forgetting", "backward_transfer", "forward_transfer"))
            summary |= nothing | {"final": _weighted(each("seen"), samples)}
        return {
            **summary,
            "per_class": {
                "classes": [self._class_names.get(c, str(c)) for c in range(classes)],
                "matrix": [[*(row or ()), *[None] * (classes - len(row or ()))] for row in per_class],
            }
            if classes
            else None,
            "per_domain": whole or None,
        }

    def _area(self) -> float | None:
        points = sorted(self._any_time.items())
        if len(points) < 2:
            return points[0][1] if points else None
        area = math.fsum((n - m) * (a + b) / 2 for (m, a), (n, b) in itertools.pairwise(points))
        return area / (points[-1][0] - points[0][0])

    @staticmethod
    def _in_order(by_index: Mapping[int, Any], empty: Any = None) -> list[Any]:
        return [by_index.get(index, empty) for index in range(max(by_index, default=-1) + 1)]

    @staticmethod
    def _look(record: Any, protocol: str, head: str, name: str, field: str) -> Any:
        """A field of a row; None where that row, or this head in it, was not scored."""
        return None if record is None or head not in record[protocol] else record[protocol][head][name][field]

    # -- resuming --------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Every score so far, as JSON values."""
        return {
            "tasks": _with_keys(str, self._tasks),
            "class_names": _with_keys(str, self._class_names),
            "rows": {part: _with_keys(str, rows) for part, rows in self._rows.items()},
            "baseline": self._baseline,
            "any_time": _with_keys(str, self._any_time),
            "figures": _with_keys(str, self._figures),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._tasks = {index: dict(note) for index, note in _with_keys(int, state["tasks"]).items()}
        self._class_names = _with_keys(int, state["class_names"])
        self._rows = {part: _with_keys(int, rows) for part, rows in state["rows"].items()}
        self._baseline = state["baseline"]
        self._any_time = _with_keys(int, state["any_time"])
        self._figures = _with_keys(int, state["figures"])


def _weighted(values: Sequence[float | None], samples: Sequence[int]) -> float | None:
    """The mean of what is there, every sample weighing the same."""
    known = [(value, count) for value, count in zip(values, samples, strict=True) if value is not None and count]
    return math.fsum(value * count for value, count in known) / sum(count for _, count in known) if known else None


def _with_keys(kind: type, mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """JSON knows no numbers as keys."""
    return {kind(key): value for key, value in mapping.items()}


def _places(task: Task, upto: int) -> list[str]:
    """Which tallies a column of the matrix counts for."""
    places = [f"column {task.index}"]
    if task.index <= upto:
        places.append("seen")
        if "domain" in task.about and "domains" not in task.about:
            places.append(f"domain {task.about['domain']}")
    return places


def _domains(task: Task, upto: int, answer: Answer) -> Iterable[tuple[str, Answer]]:
    """The parts of a batch by the domain of each sample, where a task mixes several."""
    named = answer.batch.extra.get("domain")
    if task.index > upto or "domains" not in task.about or not isinstance(named, list):
        return
    for domain in dict.fromkeys(named):
        rows = torch.tensor([place for place, other in enumerate(named) if other == domain])
        scores = None if answer.scores is None else answer.scores[rows.to(answer.scores.device)]
        texts = None if answer.texts is None else [answer.texts[place] for place in rows.tolist()]
        embeddings = {name: values[rows.to(values.device)] for name, values in answer.embeddings.items()}
        yield str(domain), Answer(answer.batch[rows], scores, texts, embeddings, answer.threshold)


def _classes(task: Task, dataset: Dataset, target: str) -> int:
    """How many classes (values, groups) there must be room for to count this data set."""
    given = dataset.targets
    if target == "labels":
        return given.shape[1] if given.dim() > 1 else 1
    if target == "value":
        return given[0].numel()
    if target == "mask":
        return max(max(task.seen, default=0) + 1, int(given[given != 255].max()) + 1 if bool((given != 255).any()) else 1)
    if given.dim() > 1 or given.is_floating_point():
        raise DataError(f"the test set of task {task.name!r} has targets of shape {tuple(given.shape)}, and the stream says {target!r}")
    if int(given.min()) < 0:
        row = int((given < 0).nonzero()[0])
        raise DataError(f"the test set of task {task.name!r} has no class in row {row}: every sample that is scored needs one")
    return int(given.max()) + 1


def _answers(given: Tensor | None, batch: Batch, head: str, target: str) -> tuple[Tensor, Tensor]:
    """Scores with at least one class, rows that hold NaN or infinity emptied to -inf; and how many of these there were."""
    which = f"head {head!r}" if head else "scores"
    if given is None:
        raise PluginError("the strategy's predict returned no scores, and this stream's metrics need them")
    dims = {"value": (1, 2), "mask": (4,)}.get(target, (2,))
    if given.dim() not in dims or len(given) != len(batch):
        wanted = {"value": "(samples, values)", "mask": "(samples, classes, height, width)"}.get(target, "(samples, classes)")
        raise PluginError(
            f"the strategy's predict returned {which} of shape {tuple(given.shape)} for {len(batch)} samples: {wanted} is needed"
        )
    scores = given.detach() if given.is_floating_point() else given.double()
    if target == "value":  # there is no class to leave out: what is not finite stays, and the error of the metric with it
        return scores, (~scores.reshape(len(batch), -1).isfinite().all(dim=1)).sum()
    if scores.shape[1] == 0:
        return scores.new_full((len(scores), 1, *scores.shape[2:]), -math.inf), torch.zeros((), device=scores.device)
    bad = ~scores.amax(dim=1).flatten(1).isfinite().all(dim=1) if scores.dim() > 2 else ~scores.amax(dim=1).isfinite()
    # amax passes NaN on; a few -inf are classes that the strategy does not offer
    return scores.masked_fill(bad.view(-1, *[1] * (scores.dim() - 1)), -math.inf), bad.sum()


def _only(scores: Tensor, classes: Sequence[int]) -> Tensor:
    """The scores with every class but these masked."""
    own = torch.tensor([c for c in classes if c < scores.shape[1]], dtype=torch.int64, device=scores.device)
    masked = torch.full_like(scores, -math.inf)
    masked[:, own] = scores[:, own]
    return masked
