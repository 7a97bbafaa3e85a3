"""What a person sees while a run goes on: a live line in a terminal, plain lines anywhere else, and the accuracy matrix at the end.

Of a test-time stream it is a line for each domain.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from streamcl.comparing import matrix_cells, matrix_text, scored, was_served
from streamcl.events import Event, Sink
from streamcl.options import NonNegativeFloat
from streamcl.wording import Scale, duration, shortened, size


class Progress(Sink):
    """Prints where the run stands: task, epoch, loss, samples per second, time left; every scored task; the matrix at the end.

    Of a test-time stream it says what is served: accuracy beside the deployed model's, entropy, the version, how many samples were
    adapted to, and all that the guard does. Where the output is no terminal it prints plain lines, one on the way at most every
    `plain_every` seconds.
    """

    def __init__(self, *, plain_every: NonNegativeFloat = 10.0) -> None:
        self.plain_every = plain_every
        self.live: Any = None
        self.report: str | None = None

    def open(self, directory: Path) -> None:
        super().open(directory)
        self.started = time.monotonic()
        self.tasks: int | None = None
        self.first_share: float | None = None
        self.next_line = -math.inf
        self.name = self.classes = ""
        self.size: int | None = None  # samples of this task
        self.served: int | None = None  # samples before this task; None where they were served by a process before this one
        self.latest = 0
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Live

            # without a thread of its own: it is drawn when an event comes
            self.live = Live(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}", style="dim"),
                console=Console(highlight=False),
                auto_refresh=False,
                transient=True,
            )
            self.bar = self.live.add_task("", total=1.0, figures="", visible=False)
            self.live.start()

    def write(self, event: Event) -> None:
        handle = getattr(self, f"_{event.kind}", None)
        if handle is not None:
            handle(event.fields)

    def close(self) -> None:
        """Says where the report is: every sink has written what it had to by now."""
        if self.live is not None:
            self.live.stop()
        if self.report is not None and Path(self.report).exists():
            self._say(f"report  {self.report}", "bold")
        self.live = self.report = None

    # -- events ----------------------------------------------------------------------------------------------------------------

    def _run_started(self, fields: dict[str, Any]) -> None:
        self.tasks = fields["tasks"]
        self.served = None if fields["resumed"] else 0
        self._say(f"{fields['strategy']} on {fields['scenario']}", "bold")
        count = f"{self.tasks} tasks" if self.tasks else "tasks as they come"
        facts = [
            count,
            f"{fields['parameters']:,} parameters".replace(",", " ") + ("" if fields["resumed"] else " before the first class"),
            fields["device"],
            fields["precision"],
            f"seed {fields['seed']}",
        ]
        self._say("  " + " · ".join([*facts, *(["resumed"] if fields["resumed"] else [])]), "dim")

    def _task_started(self, fields: dict[str, Any]) -> None:
        names = fields["classes"] or [fields["name"]]
        listed = ", ".join(names[:6]) + (f", … ({len(names)} classes)" if len(names) > 6 else "")
        self.name, self.classes = self._task(fields["task"]), shortened(listed, 40)
        self.size, self.served = fields["samples"], self.latest if self.latest else self.served
        if self.live is None:
            samples = "" if fields["samples"] is None else f"{fields['samples']} samples of "
            self._say(f"{self.name}: {samples}{self.classes}")
        else:
            self.live.update(self.bar, description=self.name, completed=0.0, figures="", visible=True)
            self.live.refresh()

    def _progress(self, fields: dict[str, Any]) -> None:
        within = (fields["epoch"] + (fields["step"] / fields["steps"] if fields["steps"] else 0.0)) / max(1, fields["epochs"])
        figures = [f"epoch {min(fields['epoch'] + 1, fields['epochs'])}/{fields['epochs']}"]
        if fields.get("loss") is not None:
            figures.append(f"loss {fields['loss']:.3g}")
        figures.append(f"{fields['samples_per_second']:.0f} samples/s")
        left = self._left(fields["task"] + within)
        figures += [f"{duration(left)} left"] if left is not None else []
        if self.live is not None:
            self.live.update(self.bar, completed=within, figures="  ".join(figures))
            self.live.refresh()
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + self.plain_every
            self._say(f"{self.name}: {', '.join(figures)}")

    def _served(self, fields: dict[str, Any]) -> None:
        self.name, self.latest = self._task(fields["task"]), fields["samples"]
        metric = "mae" if "mae" in fields else "accuracy"
        scale, beside = Scale([], percent=metric == "accuracy"), fields[f"{metric}_frozen"]
        figures = [
            f"{self.latest} served",
            f"{metric} {scale.score(fields[metric])}" + ("" if beside is None else f" ({scale.score(beside)} as deployed)"),
            *([f"entropy {fields['entropy']:.3g}"] if "entropy" in fields else []),
            f"version {fields['version']}",
            f"{fields['counts'].get('adapted', 0)} adapted to",
        ]
        within = None
        if self.size and self.served is not None:
            within = min(1.0, (self.latest - self.served) / self.size)
            left = self._left(fields["task"] + within)
            figures += [f"{duration(left)} left"] if left is not None else []
        if self.live is not None:
            self.live.update(self.bar, description=self.name, completed=within, figures="  ".join(figures), visible=True)
            self.live.refresh()
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + self.plain_every
            self._say(f"{self.name}: {', '.join(figures)}")

    def _guard(self, fields: dict[str, Any]) -> None:
        what, reason = fields["what"], fields["reason"]
        told = reason if reason.startswith(what) else f"{what}: {reason}"
        version = f", version {fields['version']}" if what in ("promoted", "rollback") else ""
        style = "yellow" if what in ("restore", "bypass") else ""
        self._say(f"guard after {fields['samples']} samples, {told}{version}", style)

    def _scored(self, fields: dict[str, Any]) -> None:
        if fields.get("warning"):
            self._warning({"message": fields["warning"]})
        if fields["part"] != "test":
            return
        row, task = fields["row"], fields["task"]
        scale = Scale([*row, fields["per_task"]], metric=fields["metric"])
        new = row[task] if task < len(row) else None
        text = (
            f"{self._task(task)}: {fields['metric']} {scale.score(fields['per_task']):>7} on all seen, {scale.score(new):>7} on this task"
        )
        self._say(f"  {text}   [{self.classes}]" if self.live is not None else text)

    def _sample(self, fields: dict[str, Any]) -> None:
        reward = "no reward" if fields["reward"] is None else f"reward {fields['reward']:.3g}"
        question, answer = (shortened(" ".join(fields[name].split()), 60) for name in ("question", "answer"))
        self._say(f"  {question} -> {answer or '(nothing)'}   [{reward}, {fields['length']} tokens]", "dim")

    def _warning(self, fields: dict[str, Any]) -> None:
        self._say(f"warning: {fields['message']}", "yellow")

    def _note(self, fields: dict[str, Any]) -> None:
        self._say(fields["message"])

    def _run_finished(self, fields: dict[str, Any]) -> None:
        if self.live is not None:
            self.live.update(self.bar, visible=False)
            self.live.refresh()
        scores = fields["scores"]
        if not scores or not scores["per_task"]:
            return
        self.report = fields["report"]
        if not scored(scores):
            self._say(f"nothing was scored: the stream gave no test samples · {duration(scores['seconds']['total'])}", "bold")
            return
        per_task = scores["per_task"]
        scale = Scale((value for row in [*scores["matrix"], per_task] for value in row), metric=scores["metric"])
        self._matrix(scores)
        if was_served(scores):
            deployed = (scores.get("heads") or {}).get("frozen")
            beside = [f"as deployed {scale.score(deployed['final'])}"] if deployed else []
        else:
            beside = [
                f"average incremental {scale.score(scores['average_incremental'])}",
                f"forgetting {scale.difference(scores['forgetting'])}",
            ]
        summary = [
            f"final {scale.score(scores['final'])}",
            *beside,
            f"memory {size(scores['memory_bytes'])}",
            duration(scores["seconds"]["total"]),
        ]
        self._say("")
        self._say(" · ".join(summary), "bold")

    # -- what is printed -------------------------------------------------------------------------------------------------------

    def _task(self, index: int) -> str:
        return f"task {index + 1}/{self.tasks}" if self.tasks else f"task {index + 1}"

    def _left(self, tasks_done: float) -> float | None:
        """Seconds, by the pace since this process began; None before there is a pace."""
        if not self.tasks:
            return None
        share = tasks_done / self.tasks
        if self.first_share is None:
            self.first_share, self.started = share, time.monotonic()
        if share - self.first_share < 0.01:
            return None
        return (time.monotonic() - self.started) * max(0.0, 1 - share) / (share - self.first_share)

    def _matrix(self, scores: dict[str, Any]) -> None:
        self._say("")
        if self.live is None or was_served(scores):
            self._say(matrix_text(scores))
            return
        title, header, cells, values, scale = matrix_cells(scores, shutil.get_terminal_size((100, 24)).columns)
        self._say(title)
        if not cells:
            return
        from rich.text import Text

        console = self.live.console
        coloured = console.color_system in ("256", "truecolor")
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        console.print(Text("  " + "  ".join(f"{name:>{w}}" for name, w in zip(header, widths, strict=True)), "dim"))
        for names, row in zip(cells, values, strict=True):
            shaded = Text()
            shaded.append(f"  {names[0]:>{widths[0]}} ", "dim")
            for value, text, w in zip(row, names[1:], widths[1:], strict=True):
                shaded.append(f" {text:>{w}} ", _heat(scale.share(value)) if coloured and value is not None else "")
            console.print(shaded)

    def _say(self, text: str, style: str = "") -> None:
        if self.live is None:
            print(text, flush=True)
        else:
            self.live.console.print(text, style=style, markup=False, soft_wrap=True)


def _heat(share: float) -> str:
    """From near white to deep blue, with ink that stands out on it."""
    pale, deep = (239, 243, 250), (18, 78, 148)
    depth = share**2  # the squares tell high scores apart
    red, green, blue = (round(a + (b - a) * depth) for a, b in zip(pale, deep, strict=True))
    return f"{'white' if depth > 0.6 else 'black'} on rgb({red},{green},{blue})"
