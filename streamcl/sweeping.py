"""Many runs of one configuration: every combination of some options, each run a process, in one table ranked on validation.

A sweep's folder holds a folder for each run, named by its combination, with what it printed beside it (`NAME.log`), `sweep.json`
(which settings each run was made from), and the table as `table.md` and `table.json`. The same call again goes on: finished runs
are kept, all others resumed. A combination is ranked by the mean over its seeds on the validation parts that
`scenario.validation` holds out of the training data, never on a test set.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import os
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from streamcl import config as configuration
from streamcl.comparing import TEST, Column, Estimate, Group, Run, figure_rows, ruled, shortest_key
from streamcl.config import RunConfig
from streamcl.errors import ConfigError, Interrupted, RunError, StreamclError
from streamcl.listing import as_yaml, problems, raise_together
from streamcl.plugins import near_name
from streamcl.wording import LOWER, Scale, duration, shortened

if TYPE_CHECKING:
    from streamcl.run_folder import RunFolder

RANKS = ("average_incremental", "final", "final_task_mean", "learning_accuracy", "backward_transfer", "forgetting")
MOST_RUNS = 10_000
REDRAW = 0.5  # seconds between two looks at where the runs stand

Combination = dict[str, str]  # a key of the configuration -> its value, as one would write them on the command line


@dataclass(frozen=True)
class Swept:
    """What came of a sweep. `exit_code` is that of the first run that failed, 0 where none did."""

    table: str
    exit_code: int


def sweep(
    config: str | Path,
    overrides: Sequence[str] = (),
    over: Sequence[str] = (),
    *,
    workers: int | None = None,
    out: str | Path | None = None,
) -> Swept:
    """Run every combination of `over` (`seed=0..4`, `strategy=er,icarl`) and of the configuration's own `sweep` block.

    `workers` runs go on at a time and divide the cores among them; by default there is one for each core. On two cores eight runs
    of a second took 10 s with two workers of one thread and 12 s with one of two: small models gain little from more threads.
    """
    config = str(config)
    combinations, rank, title = _combinations(config, overrides, over)
    settings = dict(zip(_names(combinations), _checked(config, overrides, combinations), strict=True))
    out = Path(out) if out else Path("runs") / f"{title}-sweep"
    with closing(_take(out, settings)):
        waiting = [name for name in settings if not _finished(out / name)]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(workers or cores, max(1, len(waiting)))
        threads = max(1, cores // workers)
        runs = dict(zip(settings, combinations, strict=True))
        jobs = {}
        for name in waiting:
            shared = [f"name={name}", "sweep=null", *([] if settings[name].engine.threads else [f"engine.threads={threads}"])]
            jobs[name] = Job(name, config, (*_in_order(overrides, runs[name]), *shared), str(out / name))
        failed = _go_through(jobs, workers, threads, total=len(runs))
        if any(code == Interrupted.exit_code for code, _ in failed.values()):
            done = sum(_finished(out / name) for name in runs)
            raise Interrupted(
                f"the sweep was interrupted: {done} of {len(runs)} runs are finished; the same command goes on with the others"
            )
        found = _Found(out, title, runs, rank, {name: message for name, (_, message) in failed.items()})
        found.write()
    return Swept(found.text(), next((code for code, _ in failed.values()), 0))


# What is swept ------------------------------------------------------------------------------------------------------------------


def _combinations(config: str, overrides: Sequence[str], over: Sequence[str]) -> tuple[list[Combination], str, str]:
    """Every combination of the command line's values and of the `sweep` block; what they are ranked by; and the sweep's title."""
    grid = _over(over)
    set_too = [key for key in grid if key in {text.partition("=")[0].strip() for text in overrides}]
    if set_too:
        raise ConfigError(f"{set_too[0]} is set and swept: leave out one of the two")
    first = {key: values[0] for key, values in grid.items()}
    try:
        settings = configuration.load(config, _in_order(overrides, first))
    except ConfigError:
        _checked(config, overrides, list(_product(grid)))  # the problems of all combinations at once
        raise
    block = settings.sweep
    if block is None and not grid:
        raise ConfigError(f"there is nothing to sweep: give --over KEY=A,B,C, or write a `sweep:` block into {config}")
    listed: list[Combination] = [{}]
    if block is not None:
        if block.rank not in RANKS:
            raise ConfigError(f"sweep.rank: must be one of {', '.join(RANKS)}, got {block.rank!r}{near_name(block.rank, RANKS)}")
        grid = {key: _values(f"sweep.over.{key}", map(as_yaml, values)) for key, values in (block.over or {}).items()} | grid
        listed = [{key: as_yaml(value) for key, value in run.items()} for run in block.runs or [{}]]
    count = len(listed) * math.prod(map(len, grid.values()))
    if count > MOST_RUNS:
        raise ConfigError(f"these are {count} runs: a sweep has at most {MOST_RUNS}")
    if "name" in grid or any("name" in run for run in listed):
        raise ConfigError("name cannot be swept: each run is named by its combination")
    found = dict.fromkeys(tuple({**run, **combination}.items()) for run in listed for combination in _product(grid))
    return [dict(items) for items in found], block.rank if block else RANKS[0], settings.name or Path(config).stem


def _over(texts: Sequence[str]) -> dict[str, list[str]]:
    """`seed=0..4` and `strategy=er,icarl` as the values of each key."""
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not key or not values:
            raise ConfigError(f"--over {text!r}: must be KEY=A,B,C or KEY=FIRST..LAST, such as strategy=er,icarl or seed=0..4")
        if key in grid:
            raise ConfigError(f"--over {text!r}: {key} is swept already: name all of its values at once")
        grid[key] = _values(f"--over {text!r}", _split(values))
    return grid


def _split(text: str) -> list[str]:
    """The parts between the commas that stand outside of brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not parts[-1].strip():
            quote = letter
        depth += 0 if quote else (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _values(where: str, texts: Iterable[str]) -> list[str]:
    """The values with ranges (`0..4`, both ends among them) written out."""
    values: list[str] = []
    for text in texts:
        ends = re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})", text)
        first, last = (int(ends[1]), int(ends[2])) if ends else (0, 0)
        if not text or first > last:
            raise ConfigError(f"{where}: {f'{text} is an empty range' if text else 'a value between two commas is empty'}")
        if last - first >= MOST_RUNS:
            raise ConfigError(f"{where}: {text} are {last - first + 1} runs: a sweep has at most {MOST_RUNS}")
        values += map(str, range(first, last + 1)) if ends else [text]
    return values


def _product(grid: Mapping[str, Sequence[str]]) -> Iterator[Combination]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _in_order(overrides: Sequence[str], combination: Combination) -> list[str]:
    """Overrides of a whole plug-in come before those of its options, whichever of them is swept."""
    texts = [*overrides, *(f"{key}={value}" for key, value in combination.items())]
    return sorted(texts, key=lambda text: text.partition("=")[0].count("."))


def _checked(config: str, overrides: Sequence[str], combinations: Sequence[Combination]) -> list[RunConfig]:
    """The settings of every combination; the problems of all of them at once where there are any."""
    found: list[StreamclError] = []
    settings = []
    for combination in combinations:
        try:
            settings.append(configuration.load(config, _in_order(overrides, combination)))
            found += problems(settings[-1])
        except ConfigError as error:
            found += map(ConfigError, error.problems)
    raise_together(found)
    return settings


def _label(combination: Mapping[str, str], keys: Sequence[str], between: str) -> str:
    return between.join(f"{shortest_key(key, keys)}={value}" for key, value in combination.items())


def _names(combinations: Sequence[Combination]) -> list[str]:
    """A folder's name for each combination: readable, safe on any file system, and no two alike."""
    keys = sorted({key for combination in combinations for key in combination})
    labels = [_label(combination, keys, ",") for combination in combinations]
    bare = [re.sub(r"[\s{}\[\]'\"]", "", re.sub(r":\s+", "=", label)) for label in labels]  # {lr: 0.1} becomes lr=0.1
    safe = [re.sub(r"[^\w.=,+-]+", "-", label).lstrip("-.") for label in bare]
    return [
        name if len(name) <= 80 and safe.count(name) == 1 else f"{name[:70]}-{sha256(label.encode()).hexdigest()[:8]}"
        for name, label in zip(safe, labels, strict=True)
    ]


# The folder ---------------------------------------------------------------------------------------------------------------------


def _take(out: Path, settings: Mapping[str, RunConfig]) -> RunFolder:
    """The sweep's folder, kept from other processes; refused where its runs were made from something else."""
    from streamcl.run_folder import RunFolder

    record = out / "sweep.json"
    if out.exists() and not record.is_file() and (not out.is_dir() or any(entry.name != ".lock" for entry in out.iterdir())):
        raise RunError(f"{out} is not empty and holds no sweep; name another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made ({error.strerror}); name another folder with --out") from error
    folder = RunFolder(out)
    folder.lock()
    try:
        before = json.loads(record.read_text(encoding="utf-8"))["runs"] if record.is_file() else {}
        digests = {name: dataclasses.replace(one, name=None, sweep=None).digest() for name, one in settings.items()}
        changed = [name for name, digest in digests.items() if before.get(name, digest) != digest]
        if changed or (before and not before.keys() & digests.keys()):
            raise RunError(
                f"{out} holds a sweep of another configuration{_difference(out, changed, settings)}; name another folder with --out"
            )
        folder.write("sweep.json", {"format": 1, "runs": {**before, **digests}})
    except (ValueError, KeyError, TypeError) as error:
        folder.close()
        raise RunError(f"{record} cannot be read ({error}); name another folder with --out") from error
    except BaseException:
        folder.close()
        raise
    return folder


def _difference(out: Path, changed: Sequence[str], settings: Mapping[str, RunConfig]) -> str:
    """What a run was made with and what it is now, for the first run whose folder tells."""
    for name in changed:
        if (out / name / "config.yaml").is_file():
            old, new = Run.read(out / name).settings, Run(out, dataclasses.replace(settings[name], sweep=None).to_dict(), {}).settings
            differs = [key for key in {**old, **new} if old.get(key) != new.get(key) and key != "engine.threads"]
            if differs:
                was, now = (as_yaml(settings.get(differs[0])) for settings in (old, new))
                return f" ({name} had {differs[0]}={was}, and would now have {now})"
    return ""


def _finished(folder: Path) -> bool:
    return _status(folder).get("status") == "done" and (folder / "scores.json").is_file()


def _status(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# Running ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run, in plain values: all that another process needs to do it."""

    name: str
    config: str
    overrides: tuple[str, ...]
    folder: str

    @property
    def log(self) -> str:
        return f"{self.folder}.log"


Happened = tuple[str, int | None, str]  # to the job of this name: its exit code (None: it begins), and what went wrong


def execute(job: Job) -> tuple[int, str]:
    """Do a job, or go on with it, in this very process; its exit code, and what went wrong."""
    from streamcl import running

    try:
        if _status(Path(job.folder)):
            running.resume(job.folder)
        else:
            shutil.rmtree(job.folder, ignore_errors=True)  # what a run leaves that was stopped before it began
            running.run(job.config, job.overrides, job.folder)
    except StreamclError as error:
        print(f"streamcl: {error}", file=sys.stderr)
        return error.exit_code, str(error)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {error} (unexpected: its traceback is in the output)"
    return 0, ""


def locally(jobs: Sequence[Job], workers: int, threads: int) -> Generator[Happened | None, None, None]:
    """Do the jobs on this machine's cores, and tell what happens to them, or None when for a while nothing did.

    The runs are forked from one process that has imported what all of them need: a run on a small data set takes a second, and
    these imports four. When the pipe to that process closes, for whatever reason, the runs save their state and stop.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-P", "-c", "from streamcl.sweeping import _serve; _serve()"]
        # a session of its own: Ctrl-C reaches the sweep alone, which then closes the pipe
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True, text=True
        )
        assert server.stdin is not None and server.stdout is not None
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=_pass_on, args=(server.stdout, lines), daemon=True)
        reader.start()
        left = {job.name for job in jobs}
        try:
            server.stdin.write(json.dumps({"workers": workers, "jobs": [dataclasses.astuple(job) for job in jobs]}) + "\n")
            server.stdin.flush()
            while left:
                try:
                    line = lines.get(timeout=REDRAW)
                except queue.Empty:
                    yield None
                    continue
                if not line:
                    break
                name, code, message = json.loads(line)
                left -= {name} if code is not None else set()
                yield name, code, message
        except BrokenPipeError:
            pass
        finally:
            with suppress(BrokenPipeError):
                server.stdin.close()
            try:
                server.wait()
            except KeyboardInterrupt:  # the second one: at once, and what was not saved is lost
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
            reader.join()
            server.stdout.close()
        if left:
            errors.seek(0)
            told = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise RunError(f"the process that starts the runs ended with exit code {server.returncode}: {told or 'it said nothing'}")


def _pass_on(stream: Any, lines: queue.SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _serve() -> None:
    """What the process that forks the runs does: so many at a time, until there is none left or nobody who wants to know."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an import prints is no answer

    def tell(name: str, code: int | None, message: str) -> None:
        print(json.dumps([name, code, message]), file=answers, flush=True)

    from streamcl import running  # noqa: F401
    from streamcl.metrics import classes  # noqa: F401

    gc.freeze()  # the runs share all this memory as long as nobody counts references in it
    order = json.loads(sys.stdin.readline())
    waiting = [Job(name, config, tuple(overrides), folder) for name, config, overrides, folder in order["jobs"]]
    going: dict[int, tuple[Job, int]] = {}
    while waiting or going:
        while waiting and len(going) < order["workers"] and not select.select([0], [], [], 0)[0]:
            job = waiting.pop(0)
            tell(job.name, None, "")
            outcome, report = os.pipe()
            process = os.fork()
            if process == 0:
                os.close(outcome)
                answers.close()
                _forked(job, report)
            os.close(report)
            going[process] = job, outcome
        if not going:
            break
        process, status = os.wait()
        job, outcome = going.pop(process)
        with os.fdopen(outcome, encoding="utf-8", errors="replace") as read:
            message = read.read()
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGTERM:  # it came before the run listened to it
            code, message = Interrupted.exit_code, "interrupted"
        elif code < 0:
            code, message = 1, f"killed by {signal.Signals(-code).name}"
        tell(job.name, code, message or (f"ended with exit code {code}" if code else ""))


def _forked(job: Job, report: int) -> NoReturn:
    """The life of a run's process."""
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_stop_when_nobody_waits, daemon=True).start()
    code, message = execute(job)
    os.write(report, message.encode()[:8000])  # it is read when the run has ended: what a pipe holds is all there is room for
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an orderly end would go through all that is shared, and copy it


def _stop_when_nobody_waits() -> None:
    os.read(0, 1)  # returns when the sweep has closed its end
    os.kill(os.getpid(), signal.SIGTERM)


def _go_through(jobs: Mapping[str, Job], workers: int, threads: int, total: int) -> dict[str, tuple[int, str]]:
    """Do the jobs and show how they get on; the exit codes and messages of those that failed."""
    failed: dict[str, tuple[int, str]] = {}
    if not jobs:
        return failed
    with closing(_Board(total, total - len(jobs))) as board, _stopped_like_by_ctrl_c():
        try:
            with closing(locally(list(jobs.values()), workers, threads)) as happenings:
                for happened in happenings:
                    if happened is None:
                        board.draw()
                        continue
                    name, code, message = happened
                    if code is None:
                        board.begun(jobs[name])
                        continue
                    if code == 0 and not _finished(Path(jobs[name].folder)):
                        code, message = 1, "the process ended and the run had not"
                    board.ended(jobs[name], message)
                    if code:
                        failed[name] = code, message
        except KeyboardInterrupt:
            failed[""] = Interrupted.exit_code, "interrupted"
    return failed


@contextmanager
def _stopped_like_by_ctrl_c() -> Iterator[None]:
    """SIGTERM and a lost terminal stop a sweep in the same way."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Board:
    """Where a sweep stands, on standard error: a line for each run that ends, and in a terminal one that says which are going on."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.kept, self.started = total, done, done, math.inf
        self.going: dict[str, tuple[Job, float]] = {}
        self.live: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}", style="dim", markup=False)
            self.live = Progress(*columns, console=Console(stderr=True, highlight=False), auto_refresh=False, transient=True)
            self.bar = self.live.add_task("", total=total, completed=done)
            self.live.start()
        if done:
            self._say(f"{done} of {total} runs are finished already")

    def begun(self, job: Job) -> None:
        self.going[job.name] = job, time.monotonic()
        self.started = min(self.started, time.monotonic())
        self.draw()

    def ended(self, job: Job, message: str) -> None:
        _, started = self.going.pop(job.name)
        self.done += 1
        what = f"failed: {shortened(message.splitlines()[0], 90)}" if message else _reached(job)
        self._say(f"{self.done:{len(str(self.total))}}/{self.total}  {job.name}  {what}  ({duration(time.monotonic() - started)})")
        self.draw()

    def draw(self) -> None:
        if self.live is None:
            return
        stand = [
            f"{name}: {_status(Path(job.folder)).get('cursor', {}).get('tasks_done', 0)} tasks" for name, (job, _) in self.going.items()
        ]
        ended, left = self.done - self.kept, self.total - self.done
        if ended and left:
            stand.insert(0, f"{duration((time.monotonic() - self.started) / ended * left)} left")
        text = shortened(" · ".join(stand) or "starting", max(20, self.live.console.width - 40))
        self.live.update(self.bar, completed=self.done, description=text)
        self.live.refresh()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()

    def _say(self, text: str) -> None:
        if self.live is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.live.console.print(text, markup=False, soft_wrap=True)


def _reached(job: Job) -> str:
    scores = Run.read(Path(job.folder)).scores
    return f"final {scores['metric']} {Scale(scores['per_task'], metric=scores['metric']).score(scores['final'])}"


# The table ----------------------------------------------------------------------------------------------------------------------


class _Found:
    """What the runs of a sweep reached: a group for each combination without its seed, the best first where they can be ranked."""

    def __init__(self, out: Path, title: str, runs: Mapping[str, Combination], rank: str, failed: Mapping[str, str]) -> None:
        self.out, self.rank, self.failed = out, rank, failed
        keys = sorted({key for combination in runs.values() for key in combination})
        members: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for name, combination in runs.items():
            members.setdefault(tuple((key, value) for key, value in combination.items() if key != "seed"), []).append(name)
        self.groups: list[tuple[Group, Combination, list[str]]] = []
        for rest, names in members.items():
            finished_runs = [Run.read(out / name) for name in names if name not in failed]
            self.groups.append((Group(finished_runs, _label(dict(rest), keys, ", ") or title), dict(rest), names))
        finished = [group for group, _, _ in self.groups if group.runs]
        self.ranked = len(finished) > 1 and all(len(group.values(rank, "validation")) == len(group.seeds()) for group in finished)
        if self.ranked:
            self.groups.sort(key=lambda entry: self._place(entry[0]))

    def _place(self, group: Group) -> float:
        estimate = Estimate.of(group.values(self.rank, "validation"))
        less = self.rank == "forgetting" or any(run.scores["metric"] in LOWER for run in group.runs)
        return math.inf if estimate is None else estimate.mean if less else -estimate.mean

    def rows(self) -> tuple[list[list[str]], list[str]]:
        """The table's header and rows, and the lines below it."""
        found = [group for group, _, _ in self.groups]
        notes = [f"failed: {name}: {message}\n  its output: {self.out / name}.log" for name, message in self.failed.items()]
        notes += [f"made with another {file} than there is now: {', '.join(names)}" for file, names in self._outdated().items()]
        if not any(group.runs for group in found):
            return [], ["no run is finished", *notes]
        words = self.rank.replace("_", " ")
        validation: list[Column] = [("validation", self.rank, f"validation {words}")] if self.ranked else []
        figures, meaning = figure_rows(found, [*validation, *TEST])
        rows = [[*(["rank"] if self.ranked else []), "combination", "seeds"]]
        for place, (group, _, names) in enumerate(self.groups, 1):
            count = f"{len(group.runs)}{'' if len(group.runs) == len(names) else f' of {len(names)}'}"
            rows.append([*([str(place) if group.runs else ""] if self.ranked else []), group.label, count])
        if self.ranked:
            meaning.append(f"ranked by the mean {words} on validation; the other columns are of the test sets")
        elif len(found) > 1:
            meaning.append("not ranked: nothing is held out to rank on, as scenario.validation=0.1 would")
        return [[*start, *row] for start, row in zip(rows, figures, strict=True)], [*meaning, *notes]

    def _outdated(self) -> dict[str, list[str]]:
        """The runs that were finished before a plug-in in a person's own file changed, by that file: the same sweep again keeps them."""
        from streamcl.run_folder import RunFolder, changed_plugins

        found: dict[str, list[str]] = {}
        for group, _, _ in self.groups:
            for run in group.runs:
                for file in changed_plugins(RunFolder(run.directory)):
                    found.setdefault(Path(file).name, []).append(run.directory.name)
        return found

    def text(self) -> str:
        rows, notes = self.rows()
        return "\n".join(
            [
                *([*ruled(rows, left=3 if self.ranked else 2, label=int(self.ranked)), ""] if rows else []),
                *notes,
                f"table: {self.out / 'table.md'}",
            ]
        )

    def write(self) -> None:
        """`table.md` for people and `table.json` for programs."""
        from streamcl.writing import write_atomically

        rows, notes = self.rows()
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        if lines:
            lines.insert(1, "|" + " --- |" * len(rows[0]))
        write_atomically(self.out / "table.md", "\n".join([*lines, "", *(f"- {note}" for note in notes), ""]))
        table = {"rank": self.rank if self.ranked else None, "combinations": self._records()}
        write_atomically(self.out / "table.json", json.dumps(table, indent=1))

    def _records(self) -> list[dict[str, Any]]:
        records = []
        for group, combination, names in self.groups:
            figures: dict[str, list[float]] = {key: group.values(key) for key in (*(key for _, key, _ in TEST), "memory_bytes")}
            figures["seconds"] = group.seconds()
            if self.ranked:
                figures["validation"] = group.values(self.rank, "validation")
            estimates = {key: Estimate.of(values) for key, values in figures.items()}
            records.append(
                {
                    "combination": combination,
                    "runs": names,
                    "finished": len(group.runs),
                    **{key: None if estimate is None else dataclasses.asdict(estimate) for key, estimate in estimates.items()},
                    "failed": {name: self.failed[name] for name in names if name in self.failed},
                }
            )
        return records
