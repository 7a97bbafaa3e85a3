"""What finished runs reached, side by side: a table of text and a picture. Runs that differ only in their seed are one row."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from streamcl.errors import RunError
from streamcl.listing import as_yaml
from streamcl.run_folder import runs_inside
from streamcl.wording import NOTHING, Scale, aligned, size, spans

# settings that change nothing in what a run reaches, or that are named in a column of their own
BESIDE = {"seed", "log", "name", "out"}

Column = tuple[Literal["test", "validation"], str, str]  # the part that was scored, the key in scores.json, and the title
TEST: tuple[Column, ...] = (
    ("test", "final", "final"),
    ("test", "average_incremental", "average incremental"),
    ("test", "forgetting", "forgetting"),
)
DIFFERENCES = {"forgetting", "backward_transfer", "forward_transfer"}  # of two scores; every other figure is one
WIDTH = 100  # of a table's lines
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by colour-blind readers
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Run:
    """What a run's folder says about it. The scores of a run that is not finished are put together from its events."""

    directory: Path
    config: dict[str, Any]
    scores: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    status: str = "done"
    config_text: str = ""

    @classmethod
    def read(cls, directory: Path) -> Run:
        directory = Path(directory)
        if not (directory / "config.yaml").is_file():
            raise RunError(f"{directory} is no run: it holds no config.yaml{runs_inside(directory)}")
        text = (directory / "config.yaml").read_text(encoding="utf-8")
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RunError(f"{directory / 'config.yaml'} cannot be read: {error}") from error
        status = _json(directory / "status.json").get("status", "done")
        scores = _json(directory / "scores.json")
        if status != "done" and (partial := _from_events(directory)) is not None:
            scores = partial
        return cls(directory, config if isinstance(config, dict) else {}, scores, _json(directory / "environment.json"), status, text)

    @property
    def finished(self) -> bool:
        return self.status == "done" and bool(self.scores)

    @property
    def seed(self) -> int | None:
        return self.config.get("seed", self.environment.get("seed"))

    @property
    def strategy(self) -> str:
        """Its name, and the terms that it carries: er + ewc."""
        given = self.config.get("strategy")
        terms = given.get("with") if isinstance(given, dict) else None
        return " + ".join([_name(given), *map(_name, terms or ())])

    @property
    def scenario(self) -> str:
        """Its name and its data: class_incremental of digits."""
        given = self.config.get("scenario")
        data = given.get("data") if isinstance(given, dict) else None
        return _name(given) + (f" of {_name(data)}" if data is not None else "")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What makes runs comparable: every option by its dotted key, without the seed."""
        return dict(_dotted({key: value for key, value in self.config.items() if key not in BESIDE}))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}


def _from_events(directory: Path) -> dict[str, Any] | None:
    """The scores so far of a run that did not end; what was learned again after a resume counts once."""
    from streamcl.evaluation import DEFINITIONS, summarise
    from streamcl.sinks.jsonl import read_events

    rows: dict[int, dict[str, Any]] = {}
    tasks: dict[int, dict[str, Any]] = {}
    for event in read_events(directory / "events.jsonl"):
        if event.kind == "scored" and event.fields["part"] == "test":
            rows[event.fields["task"]] = event.fields
        elif event.kind == "task_finished":
            tasks[event.fields["task"]] = event.fields
    if not rows:
        return None
    order = range(max(rows) + 1)
    matrix = [rows[i]["row"] if i in rows else None for i in order]
    seen = [rows[i]["per_task"] if i in rows else None for i in order]
    memory = [tasks[i]["memory_bytes"] for i in sorted(tasks)]
    seconds = tasks[max(tasks)]["seconds"] if tasks else None
    return {
        "metric": rows[max(rows)]["metric"],
        **summarise(matrix, seen),
        "memory_per_task": memory,
        "memory_bytes": memory[-1] if memory else None,
        "seconds": seconds if isinstance(seconds, dict) else None,
        "definitions": DEFINITIONS,
    }


def _name(given: Any) -> str:
    """The name of a plug-in as the YAML gives it; of a class in a file, the class."""
    name = given.get("name") if isinstance(given, dict) else given
    return str(name).rsplit(":", 1)[-1] if ".py:" in str(name) else str(name or "?")


def _dotted(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _dotted(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


@dataclass(frozen=True)
class Group:
    """Finished runs with the same settings and different seeds."""

    runs: list[Run]
    label: str

    def seeds(self) -> list[list[Run]]:
        """The runs of each seed: a seed that was run again tells nothing about chance, so its runs count as one."""
        found: dict[int | None, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.seed, []).append(run)
        return list(found.values())

    def each(self, figure: Callable[[Run], float | None]) -> list[float]:
        """A figure for each seed that has it: the mean over its runs."""
        known = [[value for run in runs if (value := figure(run)) is not None] for runs in self.seeds()]
        return [math.fsum(values) / len(values) for values in known if values]

    def values(self, key: str, part: str = "test") -> list[float]:
        """One figure of every seed that has it."""
        return self.each(lambda run: (run.scores if part == "test" else run.scores.get("validation") or {}).get(key))

    def seconds(self) -> list[float]:
        """The whole time for every seed that knows it."""
        return self.each(lambda run: (run.scores.get("seconds") or {}).get("total"))


@dataclass(frozen=True)
class Estimate:
    """The mean over n seeds, its standard deviation (n - 1), and half the width of its 95 % confidence interval by Student's t.

    Two seeds have no interval: it would be thirteen times their distance wide, and say nothing.
    """

    mean: float
    deviation: float | None = None
    half_width: float | None = None
    n: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        if not values:
            return None
        n, mean = len(values), math.fsum(values) / len(values)
        if n == 1:
            return cls(mean)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        if n == 2:
            return cls(mean, deviation, None, n)
        from scipy.special import stdtrit

        return cls(mean, deviation, float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n), n)

    def interval(self, low: float = -math.inf, high: float = math.inf) -> tuple[float, float] | None:
        """The confidence interval, as far as it lies between what is possible."""
        if self.half_width is None:
            return None
        return max(low, self.mean - self.half_width), min(high, self.mean + self.half_width)

    def text(self, scale: Scale, low: float = -math.inf, high: float = math.inf) -> str:
        """91.2 ± 0.8, and [90.4, 92.0] on a line below"""
        if self.deviation is None:
            return scale.number(self.mean)
        ends = self.interval(low, high)
        below = f"\n[{scale.number(ends[0])}, {scale.number(ends[1])}]" if ends else ""
        return f"{scale.number(self.mean)} ± {scale.number(self.deviation)}{below}"


def possible(key: str, scale: Scale) -> tuple[float, float]:
    """Between what a figure can lie: a share between 0 and 1, a difference of shares between -1 and 1."""
    return (-math.inf, math.inf) if not scale.percent else (-1.0, 1.0) if key in DIFFERENCES else (0.0, 1.0)


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by their settings, in the order of first appearance, with labels that tell the groups apart."""
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(json.dumps(run.settings, sort_keys=True, default=str), []).append(run)
    found = list(by_settings.values())
    keys = sorted({key for members in found for key in members[0].settings})
    named = {"strategy", "strategy.name", "scenario", "scenario.name", "scenario.data", "scenario.data.name"}
    labels = []
    for members in found:
        alike = [other[0] for other in found if other[0].strategy == members[0].strategy and other[0].scenario == members[0].scenario]
        mine = members[0].settings
        differs = [key for key in keys if key not in named and len({str(one.settings.get(key)) for one in alike}) > 1]
        set_to = (f"{shortest_key(key, keys)}={as_yaml(mine[key]) if key in mine else NOTHING}" for key in differs)
        labels.append(", ".join([members[0].strategy, *set_to]))
    return [Group(members, label) for members, label in zip(found, labels, strict=True)]


def shortest_key(key: str, keys: Sequence[str]) -> str:
    """The last part of a dotted key where no other key ends in it."""
    last = key.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in keys) == 1 else key


def _read(directories: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs, and a line about each of the others."""
    runs = [Run.read(directory) for directory in directories]
    left_out = [f"left out: {run.directory} ({run.status if run.status != 'done' else 'no scores'})" for run in runs if not run.finished]
    return [run for run in runs if run.finished], left_out


def table(directories: Sequence[Path]) -> str:
    """The finished runs among `directories`, one line for each group of seeds; the others are named below and left out."""
    runs, left_out = _read(directories)
    if not runs:
        return "\n".join(["none of these runs is finished", *left_out])
    found = groups(runs)
    validated = any(group.values("final", "validation") for group in found)
    validation: list[Column] = [("validation", "final", "validation")] if validated else []
    figures, notes = figure_rows(found, [*TEST, *validation])
    scenarios = list(dict.fromkeys(group.runs[0].scenario for group in found))
    names = [group.label + (f" on {group.runs[0].scenario}" if len(scenarios) > 1 else "") for group in found]
    starts = [["strategy", "seeds"]]
    for name, group in zip(names, found, strict=True):
        seeds = [run.seed for run in group.runs if run.seed is not None]
        starts.append([name, spans(sorted(set(seeds)))])
        again = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if again:
            notes.append(f"{name} was run several times with seed {spans(again)}: the mean of such repeats counts as one seed")
    rows = [[*start, *row] for start, row in zip(starts, figures, strict=True)]
    runs_of = [f"runs of {name}: {', '.join(str(run.directory) for run in group.runs)}" for name, group in zip(names, found, strict=True)]
    told = [*([f"all on {scenarios[0]}"] if len(scenarios) == 1 else []), *notes]
    for line in runs_of:
        told += textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([*ruled(rows, left=2), "", *told, *left_out])


def figure_rows(found: Sequence[Group], columns: Sequence[Column]) -> tuple[list[list[str]], list[str]]:
    """A header and a row for each group, of the columns, memory and seconds; and the lines that say what the numbers are."""
    scales = {
        (part, key): Scale(
            (value for group in found for value in [*group.values("final", part), *group.values(key, part)]),
            metric=next((str(run.scores["metric"]) for group in found for run in group.runs), None),
        )
        for part, key, _ in columns
    }
    rows = [["\n".join(textwrap.wrap(title, 12)) for title in [*(title for _, _, title in columns), "memory", "seconds"]]]
    for group in found:
        cells = []
        for part, key, _ in columns:
            estimate = Estimate.of(group.values(key, part))
            scale = scales[part, key]
            cells.append(NOTHING if estimate is None else estimate.text(scale, *possible(key, scale)))
        memory, seconds = Estimate.of(group.values("memory_bytes")), Estimate.of(group.seconds())
        rows.append([*cells, size(memory.mean if memory else None), f"{seconds.mean:.1f}" if seconds else NOTHING])
    metrics = sorted({str(run.scores["metric"]) for group in found for run in group.runs})
    unit = " in %" if all(scale.percent for scale in scales.values()) else ""
    notes = [f"{' and '.join(metrics)}{unit}; forgetting{' in points' if unit else ''}; memory and seconds are means"]
    if any(len(group.seeds()) > 1 for group in found):
        notes.append("several seeds: mean ± standard deviation [from three on, 95 % confidence interval by Student's t]")
    return rows, notes


def ruled(rows: Sequence[Sequence[str]], left: int, label: int = 0) -> list[str]:
    """The lines of a table with a rule under its header. A cell may have several lines; what column `label` says is written in as many
    as keep the table within WIDTH."""
    cells = [[cell.split("\n") for cell in row] for row in rows]
    others = sum(2 + max(len(line) for row in cells for line in row[column]) for column in range(len(rows[0])) if column != label)
    room = max(16, WIDTH - others)
    for row in cells:
        row[label] = textwrap.wrap(" ".join(row[label]), room, break_on_hyphens=False) or [""]
    height = max(map(len, cells[0]))
    header = [[""] * (height - len(cell)) + cell for cell in cells[0]]
    lines = aligned(
        [[cell[i] if i < len(cell) else "" for cell in row] for row in [header, *cells[1:]] for i in range(max(map(len, row)))], left
    )
    return [*lines[:height], "-" * max(map(len, lines)), *lines[height:]]


def page(directories: Sequence[Path], path: Path) -> None:
    """The report of the first run, with the others beside it."""
    from streamcl.report_page import render
    from streamcl.writing import write_atomically

    write_atomically(path, render(directories[0], directories[1:]))


def picture(directories: Sequence[Path], path: Path) -> None:
    """A PNG: the score on all classes seen after each task, and what is forgotten against what is reached in the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs, _ = _read(directories)
    if not runs:
        raise RunError("none of these runs is finished: there is nothing to draw")
    if not any(value is not None for run in runs for value in run.scores["per_task"]):
        raise RunError("nothing was scored in these runs: there is nothing to draw. Give their streams test samples")
    found = groups(runs)
    scale = Scale((value for run in runs for value in run.scores["per_task"]), metric=runs[0].scores["metric"])
    factor = 100 if scale.percent else 1
    unit = " (%)" if scale.percent else ""
    metric = runs[0].scores["metric"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, group in enumerate(found):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        length = max(len(run.scores["per_task"]) for run in group.runs)
        at = [Estimate.of(group.each(lambda run, i=i: (run.scores["per_task"][i : i + 1] or [None])[0])) for i in range(length)]  # type: ignore[misc]
        known = [(i + 1, e.mean, e.interval(*possible("final", scale)) or (e.mean, e.mean)) for i, e in enumerate(at) if e is not None]
        if not known:
            continue
        x, y, ends_of = (list(column) for column in zip(*known, strict=True))
        curves.plot(x, [m * factor for m in y], label=group.label, linewidth=1.6, markersize=4, **style)
        if any(low < high for low, high in ends_of):
            low, high = ([side * factor for side in sides] for sides in zip(*ends_of, strict=True))
            curves.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        final, forgetting = (Estimate.of(group.values(key)) for key in ("final", "forgetting"))
        if final is not None and forgetting is not None:
            bars = {}
            for axis, key, estimate in (("xerr", "forgetting", forgetting), ("yerr", "final", final)):
                sides = estimate.interval(*possible(key, scale)) or (estimate.mean, estimate.mean)
                bars[axis] = [[abs(side - estimate.mean) * factor] for side in sides]
            ends.errorbar(forgetting.mean * factor, final.mean * factor, elinewidth=1, **bars, **style)
    curves.set(xlabel="tasks learned", ylabel=f"{metric} on all classes seen{unit}")
    curves.xaxis.get_major_locator().set_params(integer=True)
    ends.set(xlabel=f"forgetting{' (points)' if scale.percent else ''}", ylabel=f"final {metric}{unit}")
    for axes in (curves, ends):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    curves.legend(frameon=False, fontsize="small")
    if any(len(group.seeds()) > 2 for group in found):
        curves.set_title("bands and bars: 95 % confidence interval over seeds", fontsize="small", loc="left")
    figure.savefig(path, dpi=160)


def scored(scores: Mapping[str, Any]) -> bool:
    """Whether there is any score: a stream that gives no test samples leaves none."""
    return any(value is not None for row in [*(scores.get("matrix") or []), scores.get("per_task") or []] for value in row)


def matrix_cells(scores: dict[str, Any], width: int) -> tuple[str, list[str], list[list[str]], list[list[float | None]], Scale]:
    """The matrix for lines of `width`: a title, a header, the rows as text, their values without the first column, and the scale.

    Tenths where they fit, else whole numbers; where those do not fit either there are no rows, and the last one is in the title.
    """
    matrix, seen = scores["matrix"], scores["per_task"]
    if not scored(scores):
        return "nothing was scored", [], [], [], Scale([])
    columns = len(matrix[0])
    room = (width - 6) // (columns + 1)
    scale = Scale((value for row in [*matrix, seen] for value in row), digits=1 if room >= 7 else 0, metric=scores["metric"])
    title = f"{scores['metric']}{' in %' if scale.percent else ''} after each task (down) on the test set of each task (across)"
    header = ["", *(str(j + 1) for j in range(columns)), "all seen"]
    if room < 5:
        return f"{title}\n  after task {len(matrix)}: {' '.join(map(scale.number, matrix[-1]))}", [], [], [], scale
    values = [[*row, seen[i]] for i, row in enumerate(matrix)]
    cells = [[str(i + 1), *("" if v is None else scale.number(v) for v in row)] for i, row in enumerate(values)]
    return title, header, cells, values, scale


def matrix_text(scores: dict[str, Any], width: int = 160) -> str:
    """The accuracy matrix as aligned text; of a stream that was served the domains."""
    if was_served(scores):
        return _domains_text(scores)
    title, header, cells, _, _ = matrix_cells(scores, width)
    return "\n".join([title, *("  " + line for line in aligned([header, *cells], left=0) if cells)])


def was_served(scores: Mapping[str, Any]) -> bool:
    """Whether each task was scored once, while it was at hand, as a test-time stream is: then the matrix is its diagonal alone."""
    matrix = scores.get("matrix") or []
    lone = all(value is None for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j)
    return scored(scores) and lone and (len(matrix) > 1 or scores.get("final_task_mean") is None)


def _domains_text(scores: Mapping[str, Any]) -> str:
    """Each domain with its score, beside the deployed model's where that was scored; the segments where nothing names a domain."""
    deployed, by_domain = (scores.get("heads") or {}).get("frozen"), scores.get("per_domain")
    labels = list(by_domain or (task["name"] for task in scores.get("tasks") or ()))
    if not by_domain and len(labels) != len(scores["per_task"]):  # a run that did not end does not say their names
        labels = [str(number + 1) for number in range(len(scores["per_task"]))]

    def column(of: Mapping[str, Any]) -> list[float | None]:
        return list(of["per_domain"].values() if by_domain else of["per_task"])

    ours, theirs = column(scores), column(deployed) if deployed else []
    scale = Scale([*ours, *theirs], metric=scores["metric"])
    rows = [["domain" if by_domain else "segment", "as served"]]
    rows += [[label, scale.number(value)] for label, value in zip(labels, ours, strict=True)]
    if theirs:
        rows[0] += ["as deployed", "difference"]
        for row, mine, other in zip(rows[1:], ours, theirs, strict=True):
            row += [scale.number(other), scale.number(None if mine is None or other is None else mine - other)]
    title = f"{scores['metric']}{' in %' if scale.percent else ''} in each {rows[0][0]}, as it was served"
    return "\n".join([title, *(f"  {line}" for line in aligned(rows))])
