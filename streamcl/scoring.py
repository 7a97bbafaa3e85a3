"""Scores a run's newest model, on its own test sets or on data that is given. The run's folder is only read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamcl.config import RunConfig, plugin_spec
from streamcl.data import Subset
from streamcl.errors import ConfigError, DataError
from streamcl.evaluation import Columns, Evaluation
from streamcl.feeding import check_fit, held_out, source_mapping
from streamcl.learned import Learned, check_inputs
from streamcl.run_folder import RunFolder
from streamcl.stream import Batch, Prediction, Task
from streamcl.wording import Scale, aligned


def score(run: str | Path, data: str | None = None) -> dict[str, Any]:
    """What the newest checkpoint's model reaches, under `overall`, `tasks` and `per_class`, and the same under `heads` and `protocols`.

    On the run's own test sets, or on `data`: its test part, or all of it where it has none. Classes are matched by their names; those
    that the model does not know are counted under `unknown`, and are wrong.
    """
    from streamcl import running

    warnings: list[str] = []
    learned, settings, state = running.restored(run, warn=warnings.append)
    folder = RunFolder(Path(run))
    unknown: dict[str, int] = {}
    if data is None:
        (columns, judge), protocols = _own(folder, settings, state), settings.evaluate.protocols
    else:
        (columns, unknown), judge = _given(data, learned), _nobody
        protocols = ["class_incremental"]
    evaluation = Evaluation(learned.info, protocols, batch=settings.evaluate.batch, judge=judge)

    def predict(batch: Batch) -> Prediction:
        check_inputs(batch, learned.info, data or "the test set")
        return learned.answer(batch)

    after = columns[-1][0]
    fields = evaluation.score(after, columns, predict)
    if fields["warning"]:
        warnings.append(fields["warning"])
    scores = evaluation.scores()
    names = {label: name for task, _ in columns for label, name in task.names.items()}
    counts: Counter[str] = Counter()
    for _, dataset in columns:
        counts.update({names[label]: count for label, count in _per_class(dataset.targets, learned.info.target)})
    return {
        "run": str(run),
        "data": data,
        "learned": len(state["memory_per_task"]),
        "metric": scores["metric"],
        "samples": sum(len(dataset) for _, dataset in columns),
        "task_names": [task.name for task, _ in columns],
        "task_samples": [len(dataset) for _, dataset in columns],
        "class_samples": {name: counts[name] for name in names.values() if name in counts},
        **_figures(scores, columns),
        "heads": _each(scores["heads"], columns),
        "protocols": _each(scores["protocols"], columns),
        "unknown": unknown,
        "warnings": warnings,
    }


def _per_class(targets: Tensor, target: str) -> Iterator[tuple[int, int]]:
    """How many samples carry each class; nothing where samples have no classes."""
    if target in ("class", "text", "image"):
        labels, samples = targets.unique(return_counts=True)
        yield from zip(labels.tolist(), samples.tolist(), strict=True)
    elif target == "labels":
        yield from enumerate((targets == 1).sum(0).tolist())


def _figures(scores: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The last row of the matrix, and what goes with it."""
    row = scores["matrix"][-1]
    per_class = scores["per_class"]
    last = dict(zip(per_class["classes"], per_class["matrix"][-1], strict=True)) if per_class else {}
    return {
        "overall": scores["final"],
        "tasks": [row[task.index] for task, _ in columns],
        "per_class": {name: value for name, value in last.items() if value is not None},
    }


def _each(several: Mapping[str, Any] | None, columns: Columns) -> dict[str, Any] | None:
    if several is None:
        return None
    return {name: _figures(scores, columns) | {"heads": _each(scores.get("heads"), columns)} for name, scores in several.items()}


def _own(folder: RunFolder, settings: RunConfig, state: Mapping[str, Any]) -> tuple[Columns, Callable[[], Any]]:
    """The test sets of the tasks that were learned, and who judges pictures."""
    from streamcl import running

    running.check_files(folder)
    scenario = running.stream_of(settings, folder)
    scenario.open(settings.seed)
    scenario.restore(state["scenario"])
    tasks = scenario.past()
    # a checkpoint from within the scoring of a task holds what was learned of it, and its stream stands before it
    tasks += [next(iter(scenario)) for _ in range(len(state["memory_per_task"]) - len(tasks))]
    columns = [(task, data) for task in tasks if (data := scenario.test(task, tasks[-1])) is not None and len(data)]
    if not columns:
        raise DataError(f"{folder.path} has no test set of its own: give labelled data to score")
    return columns, scenario.judge


def _nobody() -> None:
    """Of given data no pictures are judged."""


def _given(text: str, learned: Learned) -> tuple[Columns, dict[str, int]]:
    """Given data as one column, and how many samples it has of each class that the model does not know."""
    if learned.info.target != "class":
        raise ConfigError(
            f"data can be given to score for a model of classes, and the target of this run is {learned.info.target}: without DATA its own "
            "test sets are scored"
        )
    data = plugin_spec("source", source_mapping(text)).build().load()
    check_fit(data, learned.info, text)
    chosen = held_out(data)
    if len(chosen) == 0:
        raise DataError(f"{text} holds no sample")
    names = list(learned.classes)
    present, counts = chosen.targets.unique(return_counts=True)
    relabel = torch.full((len(data.class_names),), -1, dtype=torch.int64)
    unknown = {}
    for label, count in zip(present.tolist(), counts.tolist(), strict=True):
        name = data.class_names[label]
        if name not in names:
            unknown[name] = count
            names.append(name)
        relabel[label] = names.index(name)
    dataset = Subset(chosen, torch.arange(len(chosen)), relabel)
    labels = tuple(dataset.targets.unique().tolist())
    return [(Task(0, Path(text).stem, dataset, labels, labels, labels, names=dict(enumerate(names))), dataset)], unknown


def table(result: Mapping[str, Any]) -> str:
    """What `score` returned, as text."""
    views = _views(result, result["metric"])
    values = [value for view in views.values() for value in (view["overall"], *view["tasks"], *view["per_class"].values())]
    scale = Scale(values, metric=result["metric"])
    what = result["data"] or "its own test sets"
    lines = [f"{result['run']} after {result['learned']} tasks, {result['samples']} samples of {what}", ""]

    def block(title: str, rows: Sequence[tuple[str, int, list[float | None]]]) -> list[str]:
        head = [title, "samples", *views]
        return aligned([head, *([name, str(count), *map(scale.score, values)] for name, count, values in rows)])

    everything = ("all", result["samples"], [view["overall"] for view in views.values()])
    tasks = zip(result["task_names"], result["task_samples"], strict=True)
    by_task = [(name, count, [view["tasks"][place] for view in views.values()]) for place, (name, count) in enumerate(tasks)]
    by_class = [(name, count, [view["per_class"].get(name) for view in views.values()]) for name, count in result["class_samples"].items()]
    lines += block("task", [*by_task, everything]) if result["data"] is None else block("data", [everything])
    lines += ["", *block("class", by_class)] if by_class else []
    if result["unknown"]:
        named = ", ".join(f"{name} ({count})" for name, count in result["unknown"].items())
        lines += ["", f"{sum(result['unknown'].values())} samples are of classes that the model does not know, and count as wrong: {named}"]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in result["warnings"])])


def _views(result: Mapping[str, Any], title: str) -> dict[str, Mapping[str, Any]]:
    """Every set of figures by the title of its column: the decision, the other heads, and these again under each further protocol."""
    views = {title: result, **{f"{title}, {name}": head for name, head in (result.get("heads") or {}).items()}}
    for protocol, figures in list((result.get("protocols") or {}).items())[1:]:
        views |= _views(figures, protocol.replace("_", "-"))
    return views
