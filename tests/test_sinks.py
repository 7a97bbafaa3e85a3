"""What the sinks write, and what is made of a run's folder afterwards: the report, the table, the picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamcl.comparing import Estimate, Run, matrix_text, page, picture, table
from streamcl.errors import DiskError, RunError
from streamcl.evaluation import DEFINITIONS, summarise
from streamcl.events import Event, Sink
from streamcl.report_page import render
from streamcl.sinks.jsonl import Jsonl, read_events
from streamcl.sinks.progress import Progress
from streamcl.sinks.report import Report
from streamcl.sinks.tensorboard import Tensorboard
from streamcl.wording import Scale, aligned, duration, size, spans

MATRIX: list[list[float | None]] = [[1.0, None], [0.75, 0.5]]
SEEN = [1.0, 0.6]


def made_up_scores(
    matrix: Sequence[Any] = MATRIX, seen: Sequence[float] = SEEN, names: Sequence[str] = ("a", "b", "c", "d")
) -> dict[str, Any]:
    summary: dict[str, Any] = {"metric": "accuracy", **summarise(matrix, seen)}
    heads = {"nearest_mean": summary}
    half = len(names) // 2
    return {
        **summary,
        "metrics": None,
        "per_class": {"classes": list(names), "matrix": [[1.0] * half + [None] * (len(names) - half), [0.5] * len(names)]},
        "per_domain": None,
        "any_time": None,
        "tasks": [{"index": i, "name": f"task {i}", "classes": list(names), "train": 4, "test": 4, "validation": None} for i in range(2)],
        "protocols": {
            "class_incremental": {**summary, "heads": heads},
            "task_incremental": {"metric": "accuracy", **summarise([[1.0], [1.0, 1.0]], [1.0, 1.0])},
        },
        "heads": heads,
        "validation": None,
        "definitions": DEFINITIONS,
        "memory_bytes": 51200,
        "memory_per_task": [25600, 51200],
        "parameters": 1000,
        "trainable_parameters": 1000,
        "seconds": {"learn": 2.0, "evaluate": 1.0, "checkpoint": 0.5, "total": 4.0},
        "samples_seen": 800,
        "resume": {"kind": "bitwise", "why": "float32 on cpu"},
    }


def made_up_run(
    folder: Path, strategy: str = "er", seed: int = 0, scores: dict[str, Any] | None = None, status: str = "done", **options: Any
) -> Path:
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "scenario": {"name": "class_incremental", "data": {"name": "digits"}},
        "strategy": {"name": strategy, **options},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"seed": seed, "device": "cpu", "packages": {"torch": "2.11"}}))
    (folder / "status.json").write_text(json.dumps({"status": status}))
    if status == "done":
        (folder / "scores.json").write_text(json.dumps(scores or made_up_scores()))
    return folder


def events(folder: Path, end: str = "done") -> list[Event]:
    """What the engine says during a run of two tasks."""
    written = [
        Event(
            "run_started",
            {
                "name": "run",
                "directory": str(folder),
                "seed": 0,
                "device": "cpu",
                "precision": "float32",
                "tasks": 2,
                "parameters": 12000,
                "resumed": False,
                "strategy": "er",
                "scenario": "class_incremental",
            },
        )
    ]
    for i in range(2):
        step = {"task": i, "pass": "train", "epoch": 1, "epochs": 4, "step": 5, "steps": 10, "global_step": 100 * i + 15}
        written += [
            Event("task_started", {"task": i, "name": f"task {i}", "samples": 4, "classes": ["[red]", "b"], "seen": 2 * i + 2}),
            Event("progress", {**step, "samples_per_second": 1234.0, "loss": 0.5, "lr": 0.1}, 10.0 * i),
            Event("progress", {**step, "samples_per_second": 1234.0, "loss": math.nan, "lr": 0.1}, 10.0 * i + 0.5),
            Event(
                "scored",
                {
                    "task": i,
                    "part": "test",
                    "row": MATRIX[i][: i + 1],
                    "per_task": SEEN[i],
                    "metric": "accuracy",
                    "final_matrix": MATRIX[: i + 1],
                    "warning": "3 of 4 samples had no finite scores" if i else None,
                },
            ),
            Event(
                "task_finished", {"task": i, "seconds": {"learn": 1.0, "total": 1.5}, "memory_bytes": 25600 * (i + 1), "parameters": 12000}
            ),
        ]
    done = end == "done"
    written.append(
        Event("run_finished", {"status": end, "scores": made_up_scores() if done else None, "report": str(folder / "report.html")})
    )
    return written


def play(sink: Sink, folder: Path, what: Sequence[Event]) -> None:
    sink.open(folder)
    for event in what:
        sink.write(event)
    sink.close()


# -- jsonl ---------------------------------------------------------------------------------------------------------------------


def test_jsonl_writes_every_event_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    play(Jsonl(progress_every=0), tmp_path, events(tmp_path))
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == [event.kind for event in events(tmp_path)]
    assert [line["fields"]["loss"] for line in lines if line["kind"] == "progress"] == [0.5, None, 0.5, None]
    assert not any({"final_matrix", "scores"} & line["fields"].keys() for line in lines)  # said by other lines and by scores.json


def test_jsonl_thins_progress_and_nothing_else(tmp_path: Path) -> None:
    play(Jsonl(progress_every=1.0), tmp_path, events(tmp_path))
    kinds = [event.kind for event in read_events(tmp_path / "events.jsonl")]
    assert kinds.count("progress") == 2
    assert kinds.count("scored") == 2


def test_an_event_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    sink = Jsonl()
    sink.open(tmp_path)
    sink.write(Event("warning", {"message": "ä"}))
    assert [event.fields for event in read_events(tmp_path / "events.jsonl")] == [{"message": "ä"}]
    sink.close()


def test_a_line_torn_by_a_kill_is_skipped_and_the_next_run_begins_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    play(Jsonl(), tmp_path, [Event("warning", {"message": "one"}), Event("warning", {"message": "two"})])
    path.write_bytes(path.read_bytes()[:-9])
    play(Jsonl(), tmp_path, [Event("warning", {"message": "three"})])
    assert [event.fields["message"] for event in read_events(path)] == ["one", "three"]


def test_a_full_disk_is_said_in_one_message(tmp_path: Path) -> None:
    sink = Jsonl()
    sink.open(tmp_path)
    sink.close()
    with Path("/dev/full").open("ab", buffering=0) as full:
        sink.file = full
        with pytest.raises(DiskError, match=r"disk is full.*events\.jsonl"):
            sink.write(Event("warning", {"message": "one"}))


def test_reading_no_file_gives_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "events.jsonl")) == []


# -- progress ------------------------------------------------------------------------------------------------------------------


def test_without_a_terminal_progress_prints_plain_lines_and_the_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").write_text("")
    play(Progress(), tmp_path, events(tmp_path))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines() == [
        "er on class_incremental",
        "  2 tasks · 12 000 parameters before the first class · cpu · float32 · seed 0",
        "task 1/2: 4 samples of [red], b",
        "task 1/2: epoch 2/4, loss 0.5, 1234 samples/s",
        "task 1/2: accuracy 100.0 % on all seen, 100.0 % on this task",
        "task 2/2: 4 samples of [red], b",
        "warning: 3 of 4 samples had no finite scores",
        "task 2/2: accuracy  60.0 % on all seen,  50.0 % on this task",
        "",
        "accuracy in % after each task (down) on the test set of each task (across)",
        "         1     2  all seen",
        "  1  100.0           100.0",
        "  2   75.0  50.0      60.0",
        "",
        "final 60.0 % · average incremental 80.0 % · forgetting 25.0 points · memory 51.2 kB · 4.0 s",
        f"report  {tmp_path / 'report.html'}",
    ]


def test_progress_names_no_report_that_was_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(Progress(), tmp_path, events(tmp_path))
    assert "report" not in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_progress_is_live_and_markup_in_names_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    play(Progress(), tmp_path, events(tmp_path))
    out = screen.getvalue()
    assert "━" in out  # the bar
    assert "[red], b" in out
    assert "48;2;" in out  # the matrix is shaded
    assert "final 60.0 %" in out


def test_a_run_that_was_stopped_ends_without_a_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(Progress(), tmp_path, events(tmp_path, end="interrupted"))
    assert "all seen)" not in capsys.readouterr().out


@pytest.mark.parametrize(("tasks", "expected"), [(20, "100.0"), (25, "100 "), (60, "after task 60: 100 100")])
def test_a_matrix_too_wide_for_the_lines_loses_its_tenths_and_then_its_rows(
    tasks: int, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = Progress()
    sink.open(tmp_path)
    scores = made_up_scores([[1.0] * (i + 1) for i in range(tasks)], [1.0] * tasks)
    sink.write(Event("run_finished", {"status": "done", "scores": scores, "report": None}))
    lines = capsys.readouterr().out.splitlines()
    assert any(expected in line for line in lines)
    assert tasks == 60 or max(map(len, lines)) <= 165


# -- tensorboard ---------------------------------------------------------------------------------------------------------------


def test_tensorboard_holds_losses_over_steps_and_scores_over_tasks(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    play(Tensorboard(), tmp_path, events(tmp_path))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    points = {tag: [(point.step, round(point.value, 6)) for point in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert points["train/loss"] == [(15, 0.5), (115, 0.5)]
    assert points["test/accuracy/seen"] == [(1, 1.0), (2, 0.6)]
    assert points["test/accuracy/task 1"] == [(1, 1.0), (2, 0.75)]
    assert points["run/memory_bytes"] == [(1, 25600), (2, 51200)]


# -- report --------------------------------------------------------------------------------------------------------------------


def test_the_report_is_one_file_that_asks_for_nothing_else(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run")
    play(Report(), folder, events(folder))
    page = (folder / "report.html").read_text()
    assert page == render(folder)  # it can be rebuilt from the folder at any time
    for asks in ("<script", "<link", "<img", "src=", "@import", "url(", 'href="'):
        assert asks not in page
    assert page.count("http") == page.count('xmlns="http://www.w3.org/2000/svg"') + page.count("http-equiv")
    for said in (
        "er on class_incremental of digits",
        ">75.0<",
        "60.0 %",
        "25.0 points",
        "51.2 kB",
        "task-incremental",
        "nearest_mean",
        "Chaudhry",
    ):
        assert said in page


def test_what_users_named_is_harmless_in_the_report(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    scores = made_up_scores(names=[evil, "a & b", '"quoted"', "\udcff"])
    scores["protocols"]["class_incremental"]["heads"][evil] = scores["protocols"]["task_incremental"]
    folder = made_up_run(tmp_path / "run", strategy=evil, scores=scores)
    other = made_up_run(tmp_path / "other", strategy=evil + "2")
    page = render(folder, [other])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a &amp; b" in page
    page.encode("utf-8")


def test_a_run_that_failed_is_reported_as_far_as_it_was_scored(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", status="failed")
    log = [event for event in events(folder, end="failed") if event.fields.get("task") != 1]
    play(Jsonl(), folder, log)
    play(Jsonl(), folder, log)  # resumed, and failed again: what happened twice counts once
    play(Report(), folder, log)
    page = (folder / "report.html").read_text()
    assert "This run is not finished (failed)" in page
    assert "100.0 %" in page
    assert Run.read(folder).scores["matrix"] == [[1.0]]


def test_a_run_that_failed_before_anything_was_scored_gets_no_report(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", status="failed")
    play(Report(), folder, [Event("run_finished", {"status": "failed", "scores": None, "report": None})])
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("tasks", [1, 2, 50, 120])
def test_the_report_takes_any_number_of_tasks_with_holes_in_the_matrix(tasks: int, tmp_path: Path) -> None:
    matrix = [[None if j % 7 == 3 else 0.5 for j in range(i + 1)] for i in range(tasks)]
    scores = made_up_scores(matrix, [0.5] * tasks)
    scores["memory_per_task"] = [1000 * i for i in range(tasks)]
    page = render(made_up_run(tmp_path / "run", scores=scores), [made_up_run(tmp_path / "other")])
    assert "nan" not in page
    assert page.count("<svg") >= 4


# -- comparing -----------------------------------------------------------------------------------------------------------------


def scored(final: float) -> dict[str, Any]:
    return made_up_scores([[1.0], [final, final]], [1.0, final])


def test_seeds_are_one_row_with_mean_deviation_and_students_interval(tmp_path: Path) -> None:
    runs = [made_up_run(tmp_path / f"er{seed}", seed=seed, scores=scored(final)) for seed, final in enumerate((0.80, 0.90, 0.85))]
    runs.append(made_up_run(tmp_path / "icarl", "icarl", scores=scored(0.95)))
    lines = table(runs).splitlines()
    # mean 85, deviation 5 (n - 1), t(2 degrees, 97.5 %) = 4.3027: half width 4.3027 * 5 / sqrt(3) = 12.42
    assert lines[3].split()[:5] == ["er", "0–2", "85.0", "±", "5.0"] and lines[4].split()[:2] == ["[72.6,", "97.4]"]
    assert lines[5].split()[:3] == ["icarl", "0", "95.0"] and "all on class_incremental of digits" in lines
    estimate = Estimate.of([0.8, 0.9, 0.85])
    assert estimate is not None and estimate.half_width == pytest.approx(0.1242, abs=1e-4) and estimate.n == 3
    words = " ".join(" ".join(lines).split())
    assert f"runs of er: {runs[0]}, {runs[1]}, {runs[2]} runs of icarl: {runs[3]}" in words


def test_an_interval_ends_at_what_is_possible_and_two_seeds_have_none(tmp_path: Path) -> None:
    two = [made_up_run(tmp_path / f"two{seed}", seed=seed, scores=scored(final)) for seed, final in enumerate((0.90, 0.98))]
    assert "94.0 ± 5.7" in table(two) and "[" not in table(two).partition("accuracy")[0]
    lines = table([*two, made_up_run(tmp_path / "three", seed=2, scores=scored(0.99))]).splitlines()
    # mean 95.67, deviation 4.93, half width 12.25: to 107.9 without an end; forgetting goes to 16.6 and may be below 0
    assert "[83.4, 100.0]" in lines[4] and "[-7.9, 16.6]" in lines[4]


def test_a_seed_that_was_run_again_counts_once(tmp_path: Path) -> None:
    finals = {"a": (0, 0.8), "b": (1, 0.9), "c": (1, 0.9), "d": (1, 0.9)}
    runs = [made_up_run(tmp_path / name, seed=seed, scores=scored(final)) for name, (seed, final) in finals.items()]
    text = table(runs)
    assert "85.0 ± 7.1" in text and "[" not in text.partition("accuracy")[0]
    assert "er was run several times with seed 1: the mean of such repeats counts as one seed" in text
    assert "±" not in table(runs[1:]).partition("accuracy")[0]


def test_a_table_fits_into_a_hundred_columns(tmp_path: Path) -> None:
    options = {"optimizer": {"momentum": None}, "a_rather_long_option": [1, 2, 3]}
    runs = [made_up_run(tmp_path / f"a{seed}", seed=seed, scores=scored(0.8 + seed / 50), **options) for seed in range(3)]
    other = {"optimizer": {"momentum": 0.9}, "a_rather_long_option": [4, 5, 6]}
    runs += [made_up_run(tmp_path / f"b{seed}", seed=seed, scores=scored(0.8 + seed / 40), **other) for seed in range(3)]
    for validation in (None, made_up_scores()):
        for run in runs:
            scores = json.loads((run / "scores.json").read_text())
            (run / "scores.json").write_text(json.dumps({**scores, "validation": validation}))
        text = table(runs)
        assert max(map(len, text.partition("accuracy")[0].splitlines())) <= 100
        words = " ".join(text.split())
        assert "None" not in words and "momentum=null" in words and "runs of er, a_rather_long_option=[1, 2, 3], momentum=null: " in words


def test_runs_of_one_strategy_are_told_apart_by_the_settings_that_differ(tmp_path: Path) -> None:
    runs = [made_up_run(tmp_path / str(epochs), epochs=epochs, batch=32) for epochs in (5, 10)]
    lines = table(runs).splitlines()
    assert lines[3].startswith("er, epochs=5 ")
    assert lines[4].startswith("er, epochs=10 ")


def test_runs_that_are_not_finished_are_named_and_left_out(tmp_path: Path) -> None:
    done, broken = made_up_run(tmp_path / "done"), made_up_run(tmp_path / "broken", status="interrupted")
    text = table([done, broken])
    assert f"left out: {broken} (interrupted)" in text
    assert len([line for line in text.splitlines() if line.startswith("er ")]) == 1
    assert "none of these runs is finished" in table([broken])
    with pytest.raises(RunError, match="nothing to draw"):
        picture([broken], tmp_path / "p.png")


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no run: it holds no config\.yaml"):
        table([tmp_path])
    made_up_run(tmp_path / "inside")
    with pytest.raises(RunError, match=rf"is no run: it holds no config\.yaml; the runs in it are {tmp_path}/inside"):
        table([tmp_path])


def test_the_page_of_several_runs_is_the_report_of_the_first_with_the_others_beside_it(tmp_path: Path) -> None:
    runs = [made_up_run(tmp_path / name, name) for name in ("icarl", "er", "finetune")]
    page(runs, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == render(runs[0], runs[1:])
    assert (tmp_path / "page.html").read_text().count("<polyline") == 6  # the curve and the memory of each


def test_scores_without_a_row_are_said_to_be_none() -> None:
    assert matrix_text(made_up_scores([], [])) == "nothing was scored"


@pytest.mark.parametrize("matrix", [[[], []], [[None], [None, None]]])
def test_a_run_in_which_nothing_was_scored_has_a_report_that_says_so(
    matrix: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = {**made_up_scores(), **summarise(matrix, [None, None]), "per_class": None, "protocols": None, "heads": None}
    folder, other = made_up_run(tmp_path / "live", scores=none), made_up_run(tmp_path / "icarl", "icarl")
    end = Event("run_finished", {"status": "done", "scores": none, "report": str(folder / "report.html")})
    play(Report(), folder, [end])
    play(Progress(), folder, [end])
    written = (folder / "report.html").read_text()
    assert "Nothing was scored: the stream gave no test samples" in written and "name: class_incremental" in written
    assert written.count("<polyline") == 1 and "Where the time went" in written, "memory and time are known without scores"
    printed = capsys.readouterr().out
    assert "nothing was scored" in printed and f"report  {folder / 'report.html'}" in printed
    assert matrix_text(none) == "nothing was scored"
    assert "Nothing was scored" in render(folder, [other]) and render(other, [folder]).count("<polyline") == 2
    assert [line.split()[:3] for line in table([folder, other]).splitlines()[3:5]] == [["er", "0", "–"], ["icarl", "0", "60.0"]]
    with pytest.raises(RunError, match="nothing was scored in these runs"):
        picture([folder], tmp_path / "p.png")
    picture([folder, other], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    runs = [made_up_run(tmp_path / f"er{seed}", seed=seed, scores=scored(0.8 + seed / 10)) for seed in (0, 1)]
    picture([*runs, made_up_run(tmp_path / "icarl", "icarl")], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# -- wording -------------------------------------------------------------------------------------------------------------------


def test_numbers_are_written_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 51200, 7_340_000_000, None)] == ["0 B", "999 B", "1 kB", "51.2 kB", "7.34 GB", "–"]
    assert [duration(s) for s in (0.04, 9.99, 61, 3725, None)] == ["0.0 s", "10 s", "1 min 1 s", "1 h 2 min", "–"]
    assert [spans(n) for n in ([], [4], [0, 1], [3, 0, 1, 2, 7])] == ["", "4", "0, 1", "0–3, 7"]
    assert aligned([["a", "1"], ["bb", "22"]]) == ["a    1", "bb  22"]


def test_shares_are_per_cent_and_other_values_stand_as_they_are() -> None:
    share, plain = Scale([0.123, None]), Scale([12.0, 0.5])
    assert (share.score(0.123), share.score(None), share.difference(-0.05), share.number(-0.0001)) == ("12.3 %", "–", "-5.0 points", "0.0")
    assert (plain.score(12.3456), plain.difference(1.0)) == ("12.3", "1")
