"""A run as one HTML page that needs nothing else: scores and settings in, figures drawn here, no script, no network."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from streamcl.comparing import Run, scored
from streamcl.evaluation import forgetting_per_task
from streamcl.pictures import read_sheets
from streamcl.sinks.jsonl import read_events
from streamcl.wording import LOWER, NOTHING, Scale, duration, shortened, size

WIDTH = 920  # of a figure over the whole page
HALF = 448
COLOURS = 6
STEPS = 240  # of a curve over samples: more than that are no longer told apart
NAMED = 40  # segments whose names are written above their bands
TOLD = 50  # rows of the table of what the guard did
AGAINST = {"restore", "bypass", "rollback", "reset"}  # what undoes or stops adapting

NUMBERS = {
    "final": "Final",
    "average_incremental": "Average incremental",
    "final_task_mean": "Final, mean of tasks",
    "forgetting": "Forgetting",
    "backward_transfer": "Backward transfer",
    "forward_transfer": "Forward transfer",
    "learning_accuracy": "Learning accuracy",
    "any_time": "Any-time",
}
RESUMES = {"bitwise": "resumes bit for bit", "statistical": "resumes with the same statistics", "none": "cannot be repeated"}
DIFFERENCES = {"forgetting", "backward_transfer", "forward_transfer"}

STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --ink: #1c2127; --soft: #5a6470; --rule: #d8dce1; --wash: #f5f7f9; --heat: #0a4a83; --on-heat: #fff;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b3588a; --c4: #a87400; --c5: #3a8fc0; }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --ink: #e4e7ea; --soft: #9aa4ae; --rule: #30363d; --wash: #1b1f24; --heat: #86c5f2; --on-heat: #0c1116;
  --c0: #4fb0e8; --c1: #f28c4e; --c2: #38c79c; --c3: #e2a3c6; --c4: #efb944; --c5: #93d4f7; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 var(--serif); }
main { max-width: 1000px; margin: 0 auto; padding: 3rem 2.5rem 4rem; }
h1 { font-size: 1.9rem; font-weight: 600; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.6rem 0 .8rem; }
p { margin: .4rem 0; max-width: 46rem; text-wrap: pretty; }
.facts, figcaption, .note { color: var(--soft); }
.state { border-left: 3px solid var(--c1); padding: .3rem .9rem; margin: 1rem 0; background: var(--wash); }
.lead { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); margin: 1.6rem 0 .4rem;
  border-block: 1px solid var(--rule); }
.lead div { padding: .7rem .2rem .75rem; }
.lead dt { font: .78rem/1.3 var(--sans); color: var(--soft); }
.lead dd { margin: .1rem 0 0; font: 500 1.45rem/1.2 var(--sans); font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
dl { margin: 0; }
figure { margin: 2.4rem 0 0; break-inside: avoid; min-width: 0; }
figure > div { overflow-x: auto; }
figcaption { font-size: .9rem; line-height: 1.45; margin-top: .6rem; max-width: 46rem; text-wrap: pretty; }
figcaption b, caption b { color: var(--ink); font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); column-gap: 1.5rem; }
svg { display: block; max-width: none; font-family: var(--sans); font-variant-numeric: tabular-nums; }
.pair svg { max-width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 11.5px; } svg .soft { fill: var(--soft); }
svg .rule { stroke: var(--rule); stroke-width: 1; } svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .heat { fill: var(--heat); } svg .on { fill: var(--on-heat); } svg .frame { fill: none; stroke: var(--rule); }
.table { overflow-x: auto; break-inside: avoid; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font: .86rem/1.45 var(--sans); font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--soft); font: .9rem/1.45 var(--serif); padding-top: .6rem; }
th, td { padding: .34rem .7rem .34rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
thead th { font-weight: 600; border-bottom-color: var(--soft); } tbody th { font-weight: 500; white-space: nowrap; }
svg .band { fill: var(--wash); } svg .between { stroke: var(--rule); stroke-width: 1; }
svg .against { fill: var(--c3); } svg .other { fill: var(--paper); stroke: var(--c3); stroke-width: 1.4; }
.n { text-align: right; padding-right: 1.4rem; white-space: nowrap; }
thead tr:first-child th { border-top: 1px solid var(--soft); }
details { margin: 1rem 0; border-top: 1px solid var(--rule); padding-top: .7rem; }
summary { cursor: pointer; font-weight: 600; }
pre { font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  background: var(--wash); padding: .9rem 1.1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.definition { color: var(--soft); max-width: 36rem; }
@media print { body { font-size: 10.5pt; } main { padding: 0; max-width: none; } figure svg { max-width: 100%; height: auto; }
  pre { white-space: pre-wrap; } details::details-content { content-visibility: visible; display: block; height: auto; } }
"""


def render(directory: Path, others: Sequence[Path] = ()) -> str:
    """The page of the run in `directory`, beside `others`. A run that did not end is shown as far as it got."""
    run, beside = Run.read(directory), [Run.read(other) for other in others]
    everyone = [run, *(other for other in beside if scored(other.scores))]
    names = _told_apart(everyone)
    scores = run.scores
    title = f"{run.strategy} on {run.scenario}"
    served = read_served(directory)
    body = [f"<h1>{escape(title)}</h1>", *_head(run, served)]
    count, tables = itertools.count(1), itertools.count(1)
    body += _served(count, tables, served, everyone, names)
    if not scores.get("per_task"):
        body.append("<p>Nothing was scored yet.</p>")
    elif not scored(scores):
        body += [
            "<p>Nothing was scored: the stream gave no test samples, so there is no curve and no matrix to show.</p>",
            _memory(count, everyone, names),
            _time(count, scores),
        ]
    else:
        scale = Scale([value for row in [*scores["matrix"], scores["per_task"]] for value in row], metric=scores["metric"])
        few = len(scores["per_task"]) <= 7  # the matrix and the curve stand side by side
        width = HALF if few else WIDTH
        body += [
            *(
                [_segments(tables, run, served, scale)]  # each is scored once: the matrix would be nothing but its diagonal
                if served.blocks
                else [
                    '<div class="pair">' if few else "<div>",
                    _figure(count, _heat_map(scores, scale, width), _matrix_caption(scores, scale)),
                    _figure(count, _curves(everyone, names, scale, width), _curves_caption(scores, everyone)),
                    "</div>",
                ]
            ),
            '<div class="pair">',
            _forgetting(count, scores, scale),
            _memory(count, everyone, names),
            "</div>",
            _classes(count, scores, scale, "in the last segment" if served.blocks else "after the last task"),
            _painted(count, directory),
            _time(count, scores),
            _side_by_side(tables, everyone, names) if len(everyone) > 1 else "",
            _opinions(tables, scores, scale),
            _numbers(tables, scores, scale),
        ]
    body += ["<h2>Record</h2>", _tasks(scores), _settings(run), _environment(run)]
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{chr(10).join(part for part in body if part)}
</main>
</body>
</html>
"""
    return page.encode("utf-8", "replace").decode()  # a file name may hold what is no Unicode


# -- what is said --------------------------------------------------------------------------------------------------------------


def _head(run: Run, served: Served) -> list[str]:
    scores, environment = run.scores, run.environment
    tasks, classes = scores.get("tasks") or [], ((scores.get("per_class") or {}).get("classes")) or []
    learned = len(scores.get("per_task") or ())
    samples = served.samples if served.blocks else scores.get("samples_seen")
    resume = scores.get("resume") or {}
    unit = "segment" if served.blocks else "task"
    adapted = f", {_spaced(served.adapted)} of them adapted to" if served.blocks else ""
    facts = [
        f"{learned} {unit}{'s' * (learned != 1)}" if learned else None,
        f"{len(classes)} classes" if classes else None,
        f"{sum(note.get('test') or 0 for note in tasks):,} test samples".replace(",", " ") if tasks else None,
        f"{_spaced(samples)} samples {'served' if served.blocks else 'learned'}{adapted}" if samples else None,
        f"{scores['parameters']:,} parameters".replace(",", " ") if scores.get("parameters") else None,
        f"seed {run.seed}" if run.seed is not None else None,
        str(environment["device"]) if environment.get("device") else None,
        f"{RESUMES[resume['kind']]} ({resume['why']})" if resume else None,
    ]
    lines = [f'<p class="facts">{escape(" · ".join(fact for fact in facts if fact))}</p>']
    if not run.finished:
        lines.append(f'<p class="state">This run is not finished ({escape(run.status)}): what follows is how far it got.</p>')
    if scored(scores):
        scale = Scale(scores["per_task"], metric=scores["metric"])
        deployed = (scores.get("heads") or {}).get("frozen")
        lead = [
            (f"Final {scores['metric']}", scale.score(scores["final"])),
            *([("As deployed", scale.score(deployed["final"]))] if deployed else []),
            ("Average incremental", scale.score(scores["average_incremental"])),
            *([] if served.blocks else [("Forgetting", scale.difference(scores["forgetting"]))]),
            ("Memory", size(scores.get("memory_bytes"))),
            ("Time", duration((scores.get("seconds") or {}).get("total"))),
        ]
        lines.append(f'<dl class="lead">{"".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in lead)}</dl>')
    return lines


def _matrix_caption(scores: dict[str, Any], scale: Scale) -> str:
    return (
        f"<b>{escape(str(scores['metric']).capitalize())}{' in %' if scale.percent else ''}.</b> Each row is a time: after learning that "
        "task. Each column is the test set of one task, so that reading down a column shows what becomes of it. The column set apart is "
        "the score on all classes seen so far, every sample weighing the same."
    )


def _curves_caption(scores: dict[str, Any], everyone: Sequence[Run]) -> str:
    against = " This run is the bold line." if len(everyone) > 1 else ""
    return f"<b>{escape(str(scores['metric']).capitalize())} on all classes seen so far</b>, after each task.{against}"


def _figure(count: Iterator[int], drawing: str, caption: str) -> str:
    return f"<figure><div>{drawing}</div><figcaption>Figure {next(count)}. {caption}</figcaption></figure>" if drawing else ""


def _forgetting(count: Iterator[int], scores: dict[str, Any], scale: Scale) -> str:
    drops = forgetting_per_task(scores["matrix"], lower=str(scores["metric"]) in LOWER)
    if not any(value is not None for value in drops):
        return ""
    drawing = _bars(drops, [str(j + 1) for j in range(len(drops))], Scale(drops, percent=scale.percent), HALF, 220, "task", colour=1)
    unit = ", in points" if scale.percent else ""
    return _figure(
        count, drawing, f"<b>Forgetting per task{unit}:</b> the best score that a task had before the last one was learned, minus its last."
    )


def _memory(count: Iterator[int], everyone: Sequence[Run], names: Sequence[str]) -> str:
    series = [(name, [float(v) for v in run.scores.get("memory_per_task") or []]) for run, name in zip(everyone, names, strict=True)]
    if not any(series[0][1]):
        return ""
    drawing = _lines(series, HALF, 220, size, "tasks learned", from_zero=True)
    return _figure(
        count, drawing, "<b>Memory</b> kept between tasks beyond the first model: exemplars, statistics, teachers, added parameters."
    )


def _classes(count: Iterator[int], scores: dict[str, Any], scale: Scale, when: str) -> str:
    per_class = scores.get("per_class")
    if not per_class:
        return ""
    names, last = per_class["classes"], per_class["matrix"][-1]
    known = sorted(((value, name) for value, name in zip(last, names, strict=True) if value is not None), key=lambda pair: pair[0])
    if not known:
        return ""
    caption = f"<b>{escape(str(scores['metric']).capitalize())} per class{' in %' if scale.percent else ''}</b> {when}."
    if len(names) > 10:
        listed = [", ".join(f"{escape(shortened(n, 24))} ({scale.number(v)})" for v, n in part) for part in (known[:3], known[:-4:-1])]
        caption += f" Lowest: {listed[0]}. Highest: {listed[1]}."
    return _figure(count, _bars(last, names, scale, WIDTH, 210, "class, in order of arrival", colour=0, top=scale.high), caption)


def _painted(count: Iterator[int], directory: Path) -> str:
    """What a text-to-image model painted after each task: pictures/after-*.png of the run, a row for each concept."""
    sheets = read_sheets(directory)
    if not sheets:
        return ""
    edge, shown = 26, max(count for sheet in sheets for _, count in sheet.rows.values())
    gap, top, names = 3, 18, list(dict.fromkeys(name for sheet in sheets for name in sheet.rows))
    label = 14 + max(7 * len(shortened(name, 24)) for name in names)
    block = shown * edge + 18
    abreast = max(1, int((WIDTH - label) // block))
    pieces: list[str] = []
    y = 0.0
    for start in range(0, len(sheets), abreast):
        part = sheets[start : start + abreast]
        rows = [name for name in names if any(name in sheet.rows for sheet in part)]
        for place, sheet in enumerate(part):
            x = label + place * block
            pieces.append(_text(x, y + 12, f"after task {sheet.after}", kind="soft"))
            for row, name in enumerate(rows):
                if name in sheet.rows:
                    (uri, pictures), above = sheet.rows[name], y + top + row * (edge + gap)
                    pieces.append(
                        f'<image x="{x:.1f}" y="{above:.1f}" width="{pictures * edge}" height="{edge}" preserveAspectRatio="none" '
                        f'style="image-rendering:pixelated" href="{uri}"/>'
                    )
        pieces += [_text(label - 10, y + top + row * (edge + gap) + 17, shortened(name, 24), "end") for row, name in enumerate(rows)]
        y += top + len(rows) * (edge + gap) + 12
    caption = (
        f"<b>Painted after each task</b>, the first {shown} pictures for each concept, and for each two that a prompt names. The noise "
        "that a picture is painted from is the same after every task: what changes between two blocks of a row was forgotten, or learned."
    )
    return _figure(count, _svg(WIDTH, y, pieces, "Painted pictures"), caption)


def _time(count: Iterator[int], scores: dict[str, Any]) -> str:
    seconds = scores.get("seconds")
    if not seconds or not seconds.get("total"):
        return ""
    parts = {name: seconds.get(name) or 0.0 for name in ("learn", "evaluate", "checkpoint")}
    parts["other"] = max(0.0, seconds["total"] - sum(parts.values()))
    whole = sum(parts.values()) or 1.0
    pieces, x = [], 0.0
    for number, (name, value) in enumerate(parts.items()):
        width = WIDTH * value / whole
        pieces.append(f'<rect x="{x:.1f}" y="0" width="{max(0.0, width - 1.5):.1f}" height="22" fill="{_paint(number, name)}"/>')
        x += width
    x = 0.0
    for number, (name, value) in enumerate(parts.items()):
        label = f"{name} {duration(value)} ({100 * value / whole:.0f} %)"
        pieces.append(f'<rect x="{x:.1f}" y="36" width="10" height="10" fill="{_paint(number, name)}"/>{_text(x + 16, 45, label)}')
        x += 40 + 7 * len(label)
    return _figure(
        count, _svg(WIDTH, 52, pieces, "Where the time went"), f"<b>Where the time went:</b> {escape(duration(seconds['total']))} in all."
    )


def _paint(number: int, name: str) -> str:
    return "var(--rule)" if name == "other" else f"var(--c{number})"


def _row_of(name: str, scores: dict[str, Any], scale: Scale) -> list[str]:
    return [
        name,
        scale.number(scores.get("final")),
        scale.number(scores.get("average_incremental")),
        scale.number(scores.get("final_task_mean")),
        scale.number(scores.get("forgetting")),
    ]


HEADINGS = ["final", "average incremental", "mean of tasks", "forgetting"]


def _side_by_side(count: Iterator[int], everyone: Sequence[Run], names: Sequence[str]) -> str:
    scale = Scale((value for run in everyone for value in run.scores["per_task"]), metric=everyone[0].scores["metric"])
    rows = []
    for run, name in zip(everyone, names, strict=True):
        seconds = (run.scores.get("seconds") or {}).get("total")
        rows.append([*_row_of(name, run.scores, scale), size(run.scores.get("memory_bytes")), duration(seconds)])
    caption = f"<b>The runs side by side</b>{', scores in %' if scale.percent else ''}."
    return _table(count, ["run", *HEADINGS, "memory", "time"], rows, caption)


def _opinions(count: Iterator[int], scores: dict[str, Any], scale: Scale) -> str:
    """A row for each protocol and head beside the main one, and for each further metric."""
    rows = []
    several = scores.get("protocols")
    for protocol, under in (several or {"": scores}).items():
        name = protocol.replace("_", "-")
        rows.append(_row_of(name or "the decision", under, scale))
        rows += [_row_of(f"{name}{', ' if name else ''}head: {head}", of, scale) for head, of in (under.get("heads") or {}).items()]
    rows += [_row_of(name, of, Scale(of["per_task"], metric=name)) for name, of in (scores.get("metrics") or {}).items()]
    caption = f"<b>The same run by each protocol, head and metric</b>{', in %' if scale.percent else ''}."
    if several:
        caption += (
            " Class-incremental decides among all classes seen, task-incremental among those of the sample's own task, which is told; "
            "the two are not comparable."
        )
    return _table(count, ["", *HEADINGS], rows, caption) if len(rows) > 1 else ""


def _numbers(count: Iterator[int], scores: dict[str, Any], scale: Scale) -> str:
    definitions = scores.get("definitions") or {}
    rows = []
    for key, name in NUMBERS.items():
        value = scores.get(key)
        if value is not None:
            said = scale.difference(value) if key in DIFFERENCES else scale.score(value)
            rows.append(
                f'<tr><th>{name}</th><td class="n">{escape(said)}</td><td class="definition">{escape(definitions.get(key, ""))}</td></tr>'
            )
    rows += [
        f'<tr><th>{name}</th><td></td><td class="definition">{escape(definitions[key])}</td></tr>'
        for key, name in {"matrix": "Matrix R", "per_task": "Scores on all seen, S", "per_class": "Per class"}.items()
        if key in definitions
    ]
    caption = "<b>The numbers and what they mean.</b> Toolboxes differ; these are ours. In the formulas tasks count from 0."
    return (
        '<div class="table"><table><thead><tr><th>number</th><th class="n">value</th><th>definition</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody>{_caption(count, caption)}</table></div>"
    )


def _table(count: Iterator[int], headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    head = "".join(f"<th{' class=n' if c else ''}>{escape(heading)}</th>" for c, heading in enumerate(headings))
    lines = [f"<tr><th>{escape(row[0])}</th>{''.join(f'<td class=n>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows]
    return (
        f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody>{_caption(count, caption)}</table></div>'
    )


def _caption(count: Iterator[int], caption: str) -> str:
    return f"<caption>Table {next(count)}. {caption}</caption>"


def _tasks(scores: dict[str, Any]) -> str:
    notes = scores.get("tasks")
    if not notes:
        return ""
    rows = []
    for note in notes:
        listed = shortened(", ".join(note["classes"]), 160) or "no new class"
        counts = "".join(f'<td class="n">{NOTHING if note.get(k) is None else note[k]}</td>' for k in ("train", "validation", "test"))
        rows.append(f'<tr><td class="n">{note["index"] + 1}</td><td>{escape(str(note["name"]))}</td>{counts}<td>{escape(listed)}</td></tr>')
    head = "".join(f'<th class="n">{name}</th>' for name in ("train", "validation", "test"))
    return (
        f'<details><summary>Tasks</summary><div class="table"><table><thead><tr><th class="n">task</th><th>name</th>{head}'
        f"<th>new classes</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _settings(run: Run) -> str:
    return f"<details><summary>Settings (config.yaml)</summary><pre>{escape(run.config_text)}</pre></details>"


def _environment(run: Run) -> str:
    if not run.environment:
        return ""
    plain = {key: value for key, value in run.environment.items() if not isinstance(value, dict) and value is not None}
    packages = run.environment.get("packages") or {}
    lines = [f"{key}: {value}" for key, value in plain.items()] + [f"{name} {version}" for name, version in packages.items()]
    return f"<details><summary>Environment</summary><pre>{escape(chr(10).join(lines))}</pre></details>"


def _told_apart(runs: Sequence[Run]) -> list[str]:
    """The strategies' names; with seed or folder where two runs share one."""
    names = [run.strategy for run in runs]
    for mark in (lambda run: f" seed {run.seed}", lambda run: f" ({run.directory.name})"):
        names = [name + mark(run) if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]
    return names


# -- what was served -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Figures of the samples from `start` up to `end` of a test-time stream. A figure that is not known is None."""

    start: int
    end: int
    score: float | None  # accuracy, or the mean absolute error of values
    deployed: float | None
    entropy: float | None
    adapted: int  # samples adapted to since the stream began


@dataclass
class Served:
    """What was served of a test-time stream, and what the guard did. All empty of another stream."""

    blocks: list[Block] = field(default_factory=list)
    segments: list[tuple[int, str, int, int]] = field(default_factory=list)  # number, name, and from which sample up to which
    guard: list[dict[str, Any]] = field(default_factory=list)
    metric: str = "accuracy"

    @property
    def samples(self) -> int:
        return self.blocks[-1].end

    @property
    def adapted(self) -> int:
        return self.blocks[-1].adapted

    def segment(self, sample: int | None) -> int | None:
        """The place in `segments` of the one that this sample is in."""
        return next((i for i, (_, _, start, end) in enumerate(self.segments) if sample is not None and start <= sample < end), None)


def read_served(directory: Path) -> Served:
    """From the events. A run that was resumed in a segment serves the segment again: of what it said twice the later counts."""
    names: dict[int, str] = {}
    told: dict[int, list[dict[str, Any]]] = {}
    acts: dict[int, list[dict[str, Any]]] = {}
    waiting: list[dict[str, Any]] = []  # what the guard did since the last event that named its segment
    begun, current = False, 0
    for event in read_events(directory / "events.jsonl"):
        fields = event.fields
        if event.kind == "run_started":
            waiting, begun = [], True
        elif event.kind == "guard":
            waiting.append(fields)
        elif event.kind in ("task_started", "served", "scored", "task_finished"):
            current = fields["task"]
            if begun:
                told, acts = ({task: kept for task, kept in found.items() if task < current} for found in (told, acts))
                begun = False
            acts.setdefault(current, []).extend(waiting)
            waiting = []
            if event.kind == "task_started":
                names[current] = str(fields["name"])
            elif event.kind == "served":
                told.setdefault(current, []).append(fields)
    if not begun:
        acts.setdefault(current, []).extend(waiting)
    served, at = Served(guard=[act for task in sorted(acts) for act in acts[task]]), 0
    for task in sorted(told):
        first = at
        for one in told[task]:
            served.metric = "mae" if "mae" in one else "accuracy"
            figures = one[served.metric], one[f"{served.metric}_frozen"], one.get("entropy")
            served.blocks.append(Block(at, one["samples"], *figures, (one.get("counts") or {}).get("adapted", 0)))
            at = one["samples"]
        served.segments.append((task, names.get(task, f"segment {task + 1}"), first, at))
    return served


def _pooled(served: Served) -> list[Block]:
    """At most about STEPS blocks: neighbours of one segment are drawn as one where there are more."""
    size = math.ceil(len(served.blocks) / STEPS)
    if size < 2:
        return served.blocks
    pooled = []
    for _, _, start, end in served.segments:
        inside = [block for block in served.blocks if start <= block.start < end]
        pooled += [_joined(inside[i : i + size]) for i in range(0, len(inside), size)]
    return pooled


def _joined(blocks: Sequence[Block]) -> Block:
    def mean(of: Callable[[Block], float | None]) -> float | None:
        known = [(value, block.end - block.start) for block in blocks if (value := of(block)) is not None]
        whole = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / whole if whole else None

    return Block(
        blocks[0].start,
        blocks[-1].end,
        mean(lambda block: block.score),
        mean(lambda block: block.deployed),
        mean(lambda block: block.entropy),
        blocks[-1].adapted,
    )


def _served(count: Iterator[int], tables: Iterator[int], served: Served, everyone: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Over the samples served: the score beside the deployed model's, entropy, how many were adapted to, and what the guard did."""
    did = _guard(tables, served)
    if not served.blocks:
        return [did]
    blocks = _pooled(served)
    beside = [
        (name, _pooled(other))
        for run, name in zip(everyone[1:], names[1:], strict=True)
        if (other := read_served(run.directory)).blocks and other.metric == served.metric
    ]
    series = [
        Line(names[0], [(block.start, block.end, block.score) for block in blocks], 0),
        Line("as deployed", [(block.start, block.end, block.deployed) for block in blocks], 1),
        *(Line(name, [(b.start, b.end, b.score) for b in other], 2 + i) for i, (name, other) in enumerate(beside)),
    ]
    labels, common = _segment_names(served)
    shares = served.metric == "accuracy"
    scale, what = Scale([], digits=0, percent=shares), "Accuracy" if shares else "Mean absolute error"
    each = max(block.end - block.start for block in blocks)
    caption = f"<b>{what} of what was served</b>{'' if shares else ' (less is better)'}, a step for each {_spaced(each)} samples"
    caption += (
        ", and of the model as it was deployed on the same samples." if series[1].known else "; the deployed model was not run beside."
    )
    numbered = ", by their numbers" if len(labels) > NAMED else ""
    caption += f" The bands are the segments of the stream{escape(common)}{numbered}." if len(labels) > 1 else ""
    if any(act.get("samples") is not None for act in served.guard):
        caption += " Below: where the guard undid or stopped adapting (triangles), and what else it did (rings)."
    certain = [Line("", [(block.start, block.end, block.entropy) for block in blocks], 0)]
    learned = [
        Line("adapted to", [(0, 0, 0.0), *((block.end, block.end, float(block.adapted)) for block in blocks)], 0, steps=False),
        Line("served", [(0, 0, 0.0), (served.samples, served.samples, float(served.samples))], 1, steps=False),
    ]
    top = 1.0 if shares else None
    drawn = _over_samples(series, served, WIDTH, 270, scale.score, what, labels=labels, from_zero=not shares, ceiling=top)
    parts = [_figure(count, drawn, caption)]
    parts.append('<div class="pair">')
    told = "<b>Mean entropy</b> of the answers, in nats: low where the model is certain, rightly or not."
    parts.append(_figure(count, _over_samples(certain, served, HALF, 170, lambda value: f"{value:.3g}", "Entropy", from_zero=True), told))
    told = "<b>Samples adapted to</b>, of those served."
    parts.append(_figure(count, _over_samples(learned, served, HALF, 170, _spaced, "Samples adapted to", from_zero=True), told))
    return [*parts, "</div>", did]


def _segment_names(served: Served) -> tuple[list[str], str]:
    """The segments' names, and what was left out of them because it is the same in all that have it."""
    names = [name for _, name, _, _ in served.segments]
    ends = {name.partition(", ")[2] for name in names} - {""}
    if len(names) < 2 or len(ends) != 1:
        return names, ""
    return [name.partition(", ")[0] for name in names], f" ({ends.pop()})"


def _segments(count: Iterator[int], run: Run, served: Served, scale: Scale) -> str:
    """What was reached in each segment, as it was served."""
    if not served.blocks:
        return ""
    reached, deployed = run.scores["per_task"], ((run.scores.get("heads") or {}).get("frozen") or {}).get("per_task") or []
    rows = []
    for task, name, start, end in served.segments:
        ours, theirs = (values[task] if task < len(values) else None for values in (reached, deployed))
        gain = None if ours is None or theirs is None else ours - theirs
        rows.append([name, _spaced(end - start), scale.number(ours), scale.number(theirs), scale.number(gain)])
    table = _table(
        count,
        ["segment", "samples", "as served", "as deployed", "difference"],
        rows,
        f"<b>{escape(str(run.scores['metric']).capitalize())} in each segment{', in %' if scale.percent else ''}.</b>",
    )
    return table if len(rows) <= 20 else f"<details><summary>Segments</summary>{table}</details>"


def _guard(count: Iterator[int], served: Served) -> str:
    if not served.guard:
        return ""
    rows, labels = [], _segment_names(served)[0]
    for act in served.guard[:TOLD]:
        sample = act.get("samples")
        at, inside = NOTHING if sample is None else _spaced(sample), served.segment(sample)
        cells = [NOTHING if inside is None else labels[inside], str(act["what"]), str(act["reason"]), _then(act)]
        rows.append(f'<tr><td class="n">{at}</td>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>')
    kinds = Counter(str(act["what"]) for act in served.guard)
    left = len(served.guard) - len(rows)
    listed = ", ".join(f"{number} × {what}" for what, number in kinds.most_common())
    caption = f"<b>What the guard did,</b> after how many samples, why, and what was served then: {escape(listed)}."
    caption += f" The first {len(rows)} are shown; {_spaced(left)} more are in events.jsonl." if left else ""
    head = '<th class="n">samples</th><th>segment</th><th>what</th><th>reason</th><th>then</th>'
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>{_caption(count, caption)}</table></div>'


def _then(act: dict[str, Any]) -> str:
    """What is served after it, where that is said."""
    if act.get("serves") is not None:
        return "as\u00a0deployed" if act["serves"] == "frozen" else "what\u00a0adapts"
    return NOTHING if act.get("version") is None else f"version\u00a0{act['version']}"


def _spaced(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ")


# -- what is drawn -------------------------------------------------------------------------------------------------------------


def _svg(width: float, height: float, pieces: Sequence[str], label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img" aria-label="{escape(label)}">{"".join(pieces)}</svg>'
    )


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "", more: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}{more}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _heat_map(scores: dict[str, Any], scale: Scale, page: int) -> str:
    """Darker is more. Numbers have tenths where there is room, none where there is little, and go where there is none."""
    matrix, seen = scores["matrix"], scores["per_task"]
    columns = len(matrix[0]) if matrix else 0
    left, top = 58, 44
    width = min(62.0, (page - left - 12) / (columns + 1.4))
    height = min(36.0, max(width * 0.62, 17.0 if width >= 16 else 3.0))
    gap = 0.4 * width
    shown = Scale([value for row in matrix for value in row], digits=1 if width >= 36 else 0, percent=scale.percent)
    font = min(12.5, width * (0.34 if shown.digits else 0.46))
    every = math.ceil((4 + 7 * len(str(columns))) / width)
    pieces = [
        _text(left, 12, "test set of task", kind="soft"),
        _text(left + columns * width + gap + width / 2, 12, "all", "middle", "soft"),
        _text(left + columns * width + gap + width / 2, 26, "seen", "middle", "soft"),
        _text(0, top - 8, "after", kind="soft"),
    ]
    for j in range(0, columns, every):
        pieces.append(_text(left + (j + 0.5) * width, top - 8, str(j + 1), "middle", "soft"))
    every = max(1, math.ceil(14 / height))
    for i, row in enumerate(matrix):
        y = top + i * height
        if i % every == 0:
            pieces.append(_text(left - 10, y + height / 2 + 4, str(i + 1), "end", "soft"))
        for j, value in enumerate([*row, seen[i]]):
            if value is None:
                continue
            x = left + j * width + (gap if j == columns else 0)
            depth = scale.share(value) ** 2  # the squares tell high scores apart
            what = f"after task {i + 1}, {'all seen' if j == columns else f'task {j + 1}'}: {scale.score(value)}"
            cell = _shade(x, y, width - min(1, width / 5), height - min(1, height / 5), depth)
            if width < 16:
                pieces.append(cell)
            else:
                style = f' style="font-size:{font:.1f}px"'
                ink = "on" if depth > 0.6 else ""
                number = _text(x + width / 2, y + height / 2 + font * 0.36, shown.number(value), "middle", ink, style)
                pieces.append(f"<g><title>{escape(what)}</title>{cell}{number}</g>")
    bottom = top + len(matrix) * height
    steps, length = 40, 160
    for step in range(steps):
        pieces.append(_shade(left + step * length // steps, bottom + 14, length // steps, 7, (step / (steps - 1)) ** 2))
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        mark = Scale([scale.low, scale.high], digits=0, percent=scale.percent).score(scale.low + share * (scale.high - scale.low))
        pieces.append(_text(left + share * length, bottom + 35, mark, anchor, "soft"))
    total = max(left + columns * width + gap + width + 12, left + length + 12)
    return _svg(total, bottom + 40, pieces, f"{scores['metric']} after each task on each task's test set")


def _shade(x: float, y: float, width: float, height: float, depth: float) -> str:
    box = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect {box} class="heat" fill-opacity="{0.05 + 0.95 * depth:.3f}"/>'


def _curves(everyone: Sequence[Run], names: Sequence[str], scale: Scale, width: int) -> str:
    series = [(name, list(run.scores["per_task"])) for run, name in zip(everyone, names, strict=True)]
    shared = Scale([value for _, values in series for value in values], digits=0, percent=scale.percent)
    return _lines(series, width, 300 if width == WIDTH else 250, shared.score, "tasks learned", ceiling=1.0 if scale.percent else None)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose low to high; whole per cents where the range is at least five of them."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, last + 1)]


def _lines(
    series: Sequence[tuple[str, Sequence[float | None]]],
    width: int,
    height: int,
    say: Callable[[float], str],
    below: str,
    from_zero: bool = False,
    ceiling: float | None = None,
) -> str:
    """Lines over tasks, each named at its end; the first is the one that matters."""
    known = [value for _, values in series for value in values if value is not None]
    low, high = (0.0 if from_zero else min(known)), max(known)
    ticks = _ticks(low if ceiling is None else min(low, high - 0.05), high, 5)
    if ceiling is not None:
        ticks = [tick for tick in ticks if tick <= ceiling + 1e-9]
    longest = max(len(values) for _, values in series)
    named = len(series) > 1
    left, top, bottom = 62, 12, 46
    right = min(190, 24 + 7 * max(len(shortened(name, 24)) for name, _ in series)) if named else 24
    inner, tall = width - left - right, height - top - bottom

    def at(i: int, value: float) -> tuple[float, float]:
        x = left + inner * (i / (longest - 1) if longest > 1 else 0.5)
        return x, top + tall * (1 - (value - ticks[0]) / ((ticks[-1] - ticks[0]) or 1.0))

    pieces = []
    for tick in ticks:
        y = at(0, tick)[1]
        pieces += [_line(left, y, left + inner, y, "rule"), _text(left - 9, y + 4, say(tick), "end", "soft")]
    every = max(1, math.ceil(longest * 26 / inner))
    pieces += [_text(at(i, ticks[0])[0], height - 26, str(i + 1), "middle", "soft") for i in range(0, longest, every)]
    pieces.append(_text(left + inner / 2, height - 5, below, "middle", "soft"))
    ends = []
    for number, (name, values) in reversed(list(enumerate(series))):  # the first is drawn over the others
        points = [at(i, value) for i, value in enumerate(values) if value is not None]
        if not points:
            continue
        paint = f"var(--c{number % COLOURS})"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{("6 3", "2 3", "8 3 2 3")[(number - 1) % 3]}"' if number else ""
        stroke = f'stroke="{paint}" stroke-width="{1.6 if number else 2.4}" stroke-linejoin="round"{dashes}'
        pieces.append(f'<polyline points="{path}" fill="none" {stroke}/>')
        if len(points) <= 30:
            pieces += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3.2 if number == 0 else 2.4}" fill="{paint}"/>' for x, y in points]
        ends.append((points[-1][1], points[-1][0], name, number))
    if named:
        floor = -math.inf
        for y, x, name, number in sorted(ends):
            floor = max(y, floor + 15)
            weight = ";font-weight:600" if number == 0 else ""
            pieces.append(_text(x + 10, floor + 4, shortened(name, 24), more=f' style="fill:var(--c{number % COLOURS}){weight}"'))
    return _svg(width, height, pieces, f"{', '.join(name for name, _ in series)} over tasks")


@dataclass(frozen=True)
class Line:
    """Values over samples, each from one sample up to another; those of a line without steps stand at a point."""

    name: str
    values: Sequence[tuple[int, int, float | None]]
    colour: int
    steps: bool = True

    @property
    def known(self) -> list[float]:
        return [value for _, _, value in self.values if value is not None]


def _over_samples(
    series: Sequence[Line],
    served: Served,
    width: int,
    height: int,
    say: Callable[[float], str],
    label: str,
    labels: Sequence[str] = (),
    from_zero: bool = False,
    ceiling: float | None = None,
) -> str:
    """Lines over the samples served, on bands that are the segments; with `labels` the segments are named, and the guard's acts marked."""
    series = [line for line in series if line.known]
    if not series:
        return ""
    values = [value for line in series for value in line.known]
    low, high = (0.0 if from_zero else min(values)), max(values)
    ticks = _ticks(low if ceiling is None else min(low, high - 0.05), high, 5 if labels else 4)
    if ceiling is not None:
        ticks = [tick for tick in ticks if tick <= ceiling + 1e-9]
    named = len(series) > 1
    left, right = 62, min(190, 24 + 7 * max(len(shortened(line.name, 24)) for line in series)) if named else 24
    inner = width - left - right
    marks = [act for act in served.guard if act.get("samples") is not None] if labels else []
    total = max([line.values[-1][1] for line in series] + [act["samples"] for act in marks])
    widest = max((6.4 * len(name) for name in labels), default=0.0)
    flat = all(
        6.4 * len(name) + 8 <= inner * (end - start) / total for name, (_, _, start, end) in zip(labels, served.segments, strict=False)
    )
    spoken = len(served.segments) <= NAMED
    top = 12 + (0 if not labels or len(labels) < 2 else 14 if flat or not spoken else 10 + 0.65 * widest)
    lane = 16 if marks else 0
    height = int(height + top + lane)
    tall = height - top - lane - 46

    def across(sample: float) -> float:
        return left + inner * sample / (total or 1)

    def up(value: float) -> float:
        return top + tall * (1 - (value - ticks[0]) / ((ticks[-1] - ticks[0]) or 1.0))

    pieces = []
    every = math.ceil(len(served.segments) * (8 + 7 * len(str(len(served.segments)))) / inner)
    for place, (number, name, start, end) in enumerate(served.segments):
        x, wide = across(start), across(end) - across(start)
        box = f'x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
        shade = 'class="band"' if place % 2 else 'fill="transparent"'
        pieces.append(f"<g><title>{escape(f'{name}: samples {_spaced(start)} to {_spaced(end)}')}</title><rect {box} {shade}/></g>")
        if place and wide >= 12:
            pieces.append(_line(x, top, x, top + tall, "between"))
        if len(labels) < 2:
            continue
        middle = x + wide / 2
        if flat:
            pieces.append(_text(middle, top - 7, labels[place], "middle", "soft"))
        elif spoken:
            pieces.append(_text(middle, top - 7, labels[place], kind="soft", more=f' transform="rotate(-40 {middle:.1f} {top - 7:.1f})"'))
        elif place % every == 0:
            pieces.append(_text(middle, top - 7, str(number + 1), "middle", "soft"))
    for tick in ticks:
        pieces += [_line(left, up(tick), left + inner, up(tick), "rule"), _text(left - 9, up(tick) + 4, say(tick), "end", "soft")]
    foot = height - 26
    for tick in _ticks(0.0, total, 6 if width == WIDTH else 4):
        if tick <= total:
            pieces.append(_text(across(tick), foot, _spaced(tick), "middle", "soft"))
    pieces.append(_text(left + inner / 2, height - 5, "samples served", "middle", "soft"))
    for line in reversed(series):  # the first is drawn over the others
        path, pen = [], False
        for start, end, value in line.values:
            if value is None:
                pen = False
                continue
            to = f"{across(start):.1f} {up(value):.1f}"
            path.append((f"L{to}" if pen else f"M{to}") + (f"H{across(end):.1f}" if line.steps else ""))
            pen = True
        first = line is series[0]
        dashes = "" if first else f' stroke-dasharray="{("6 3", "2 3", "8 3 2 3")[(line.colour - 1) % 3]}"'
        stroke = f'stroke="var(--c{line.colour % COLOURS})" stroke-width="{2 if first else 1.6}" stroke-linejoin="round"{dashes}'
        pieces.append(f'<path d="{"".join(path)}" fill="none" {stroke}/>')
    if named:
        floor = -math.inf
        for y, line in sorted(((up(line.known[-1]), line) for line in series), key=lambda pair: pair[0]):
            floor = max(y, floor + 15)
            weight = ";font-weight:600" if line is series[0] else ""
            style = f' style="fill:var(--c{line.colour % COLOURS}){weight}"'
            pieces.append(_text(left + inner + 10, floor + 4, shortened(line.name, 24), more=style))
    pieces += _marks(marks, across, top + tall + 9)
    return _svg(width, height, pieces, f"{label} over samples served")


def _marks(acts: Sequence[dict[str, Any]], across: Callable[[float], float], y: float) -> list[str]:
    """What the guard did, where it did it; what lies too close together is one mark that says all of it."""
    places: dict[int, list[dict[str, Any]]] = {}
    for act in acts:
        places.setdefault(round(across(act["samples"]) / 9), []).append(act)
    pieces = []
    for together in places.values():
        x = across(together[0]["samples"])
        told = [f"after {_spaced(act['samples'])} samples, {act['what']}: {act['reason']}" for act in together[:5]]
        told += [f"and {len(together) - 5} more"] if len(together) > 5 else []
        if any(act["what"] in AGAINST for act in together):
            shape = f'<path d="M{x - 5:.1f} {y + 4:.1f}h10l-5 -9z" class="against"/>'
        else:
            shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" class="other"/>'
        pieces.append(f"<g><title>{escape(chr(10).join(told))}</title>{shape}</g>")
    return pieces


def _bars(
    values: Sequence[float | None],
    names: Sequence[str],
    scale: Scale,
    width: int,
    height: int,
    below: str,
    colour: int,
    top: float | None = None,
) -> str:
    """Upright bars from zero, with numbers and names as far as there is room."""
    known = [value for value in values if value is not None]
    ticks = _ticks(min(0.0, *known), max(0.05 if scale.percent else 0.0, *known) if top is None else top, 5)
    each = (width - 94) / max(len(values), 1)
    longest = max(len(shortened(name, 14)) for name in names)
    fits = 7 * longest <= max(each, 24)
    slanted = not fits and len(names) <= 60
    left, above, under = (70 if slanted else 46), 18, (20 + 4.6 * longest + 14 if slanted else 46)
    tall = height - above - 46
    height = int(above + tall + under)
    each = min(each, 86.0)
    inner = each * len(values)
    whole = Scale(known, digits=0, percent=scale.percent)
    numbers = Scale(known, digits=1 if each >= 34 else 0, percent=scale.percent)

    def at(value: float) -> float:
        return above + tall * (1 - (value - ticks[0]) / ((ticks[-1] - ticks[0]) or 1.0))

    pieces = []
    for tick in ticks:
        pieces += [_line(left, at(tick), left + inner, at(tick), "rule"), _text(left - 9, at(tick) + 4, whole.number(tick), "end", "soft")]
    every = 1 if slanted else max(1, math.ceil(24 / each))
    for j, (value, name) in enumerate(zip(values, names, strict=True)):
        x = left + (j + 0.5) * each
        if value is not None:
            y, base = min(at(value), at(0.0)), at(0.0)
            thick = max(1.0, min(each * 0.64, 34.0))
            box = f'x="{x - thick / 2:.1f}" y="{y:.1f}" width="{thick:.1f}" height="{max(0.6, abs(at(value) - base)):.1f}"'
            pieces.append(f'<g><title>{escape(f"{name}: {numbers.number(value)}")}</title><rect {box} fill="var(--c{colour})"/></g>')
            if each >= 24:
                pieces.append(_text(x, y - 5, numbers.number(value), "middle"))
        if j % every == 0:
            label = shortened(name, 14) if fits or slanted else str(j + 1)
            y = above + tall + 16
            turn = f' transform="rotate(-40 {x:.1f} {y:.1f})"' if slanted else ""
            pieces.append(_text(x + (4 if slanted else 0), y, label, "end" if slanted else "middle", "soft", turn))
    pieces += [_line(left, at(0.0), left + inner, at(0.0), "axis"), _text(left + inner / 2, height - 5, below, "middle", "soft")]
    return _svg(left + inner + 24, height, pieces, f"{below}: {len(known)} values")
