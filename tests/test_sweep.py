"""Sweeps: what is run, that it is run once and goes on, and how it is ranked."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import comparable, small_run

from streamcl import running, sweeping
from streamcl.cli import main
from streamcl.errors import ConfigError, RunError
from streamcl.run_folder import RunFolder
from streamcl.sweeping import Happened, Job, execute, sweep

MOODY = '''"""Fine-tuning that raises in the second task, for odd seeds and as long as the file `broken` lies beside it."""

from pathlib import Path

from streamcl.strategy import GradientStrategy


class Moody(GradientStrategy):
    def before_task(self, task):
        if task.index == 1 and self.context.seed % 2 and Path(__file__).with_name("broken").exists():
            raise RuntimeError("in a bad mood")
'''


def write(folder: Path, **changes: object) -> str:
    """A configuration of a fraction of a second, as a file."""
    changes = {"scenario": {"tasks": 2}, "strategy": {"epochs": 1}, **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(small_run("er", **changes), sort_keys=False))
    return str(folder / "config.yaml")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Another executor, which does the jobs one after another right here; the names of those that it was given."""
    given: list[str] = []

    def here(jobs: Sequence[Job], workers: int, threads: int) -> Generator[Happened | None, None, None]:
        for job in jobs:
            given.append(job.name)
            yield job.name, None, ""
            yield None
            yield job.name, *execute(job)

    monkeypatch.setattr(sweeping, "locally", here)
    return given


def as_written(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores as scores.json holds them, without times."""
    return json.loads(json.dumps(comparable(scores)))


def written(run: Path) -> dict[str, Any]:
    return comparable(json.loads((run / "scores.json").read_text()))


# -- what is swept -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "combinations"),
    [
        (["seed=0..2"], [{"seed": "0"}, {"seed": "1"}, {"seed": "2"}]),
        (["seed=-1..0, 7"], [{"seed": "-1"}, {"seed": "0"}, {"seed": "7"}]),
        (
            ["a=1,2", "b=x,y"],
            [{"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "2", "b": "x"}, {"a": "2", "b": "y"}],
        ),
        (["a={name: er, epochs: 1},[1, [2, 3]]"], [{"a": "{name: er, epochs: 1}"}, {"a": "[1, [2, 3]]"}]),
        (["a='x, y',\"0..3\",it's"], [{"a": "'x, y'"}, {"a": '"0..3"'}, {"a": "it's"}]),
    ],
)
def test_values_are_ranges_and_lists_and_several_keys_make_a_grid(over: list[str], combinations: list[dict[str, str]]) -> None:
    assert list(sweeping._product(sweeping._over(over))) == combinations


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["seed"], "must be KEY=A,B,C or KEY=FIRST..LAST"),
        (["seed="], "must be KEY=A,B,C"),
        (["seed=1,,2"], "a value between two commas is empty"),
        (["seed=4..0"], "4..0 is an empty range"),
        (["seed=0..99999999"], "100000000 runs: a sweep has at most 10000"),
        (["seed=0..999", "strategy.epochs=1..11"], "11000 runs: a sweep has at most 10000"),
        (["seed=0", "seed=1"], "seed is swept already"),
        (["strategy.batch=1,2"], "strategy.batch is set and swept"),
        (["name=a,b"], "name cannot be swept"),
        ([], "there is nothing to sweep"),
    ],
)
def test_what_cannot_be_swept_gets_one_message(over: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(write(tmp_path), ["strategy.batch=16"], over, out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_every_combination_is_checked_before_the_first_is_run_and_all_problems_are_told(tmp_path: Path, in_process: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        sweep(write(tmp_path), (), ["seed=0,x", "strategy=er,icral", "scenario.tasks=2,-1"], out=tmp_path / "sweep")
    told = "\n".join(error.value.problems)
    assert len(error.value.problems) == 3
    assert "unknown strategy 'icral': did you mean 'icarl'?" in told and "got 'x'" in told and "got -1" in told
    assert in_process == [] and not (tmp_path / "sweep").exists()


def test_a_plugin_of_ones_own_that_does_not_import_stops_the_sweep_before_it_begins(tmp_path: Path, in_process: list[str]) -> None:
    (tmp_path / "moody.py").write_text(f"import nowhere\n{MOODY}")
    with pytest.raises(ConfigError, match=r"moody\.py:1: ModuleNotFoundError.*nowhere"):
        sweep(write(tmp_path), (), ["strategy=er,moody.py:Moody"], out=tmp_path / "sweep")
    assert in_process == []


def test_options_of_a_plugin_apply_to_every_plugin_that_is_swept(tmp_path: Path, in_process: list[str]) -> None:
    sweep(write(tmp_path), ["strategy.epochs=2"], ["strategy.batch=64", "strategy=finetune,er"], out=tmp_path / "sweep")
    for strategy in ("er", "finetune"):
        config = yaml.safe_load((tmp_path / f"sweep/batch=64,strategy={strategy}/config.yaml").read_text())
        assert (config["strategy"]["name"], config["strategy"]["epochs"], config["strategy"]["batch"]) == (strategy, 2, 64)


def test_names_of_runs_are_readable_safe_and_all_different() -> None:
    long = "[" + ", ".join(str(n) for n in range(60)) + "]"
    values = ["{name: sgd, lr: 0.1}", "../../x", "a/b", "a:b", long, long + " "]
    names = sweeping._names([{"strategy.optimizer": value, "seed": "3"} for value in values])
    assert names[0] == "optimizer=name=sgd,lr=0.1,seed=3"
    assert len(set(names)) == len(names)
    assert all("/" not in name and not name.startswith((".", "-")) and len(name) <= 80 for name in names)


# -- running -------------------------------------------------------------------------------------------------------------------


def test_a_run_of_a_sweep_is_the_run_by_itself_and_its_record_is_enough_to_repeat_it(tmp_path: Path, in_process: list[str]) -> None:
    config = write(tmp_path)
    sweep(config, (), ["seed=1,2"], out=tmp_path / "sweep")
    for seed in (1, 2):
        swept = tmp_path / f"sweep/seed={seed}"
        assert written(swept) == as_written(running.run(config, [f"seed={seed}"], tmp_path / f"alone{seed}"))
        assert written(swept) == as_written(running.run(swept / "config.yaml", (), tmp_path / f"again{seed}"))


def test_a_sweep_block_is_a_grid_or_a_list_and_the_command_line_adds_to_it(tmp_path: Path, in_process: list[str]) -> None:
    grid = write(tmp_path, sweep={"over": {"seed": ["0..1"], "strategy.optimizer": [{"lr": 0.001}]}})
    sweep(grid, (), (), out=tmp_path / "grid")
    assert in_process == ["seed=0,optimizer=lr=0.001", "seed=1,optimizer=lr=0.001"]
    assert yaml.safe_load((tmp_path / f"grid/{in_process[0]}/config.yaml").read_text())["strategy"]["optimizer"]["lr"] == 0.001
    in_process.clear()
    sweep(
        write(tmp_path, sweep={"runs": [{"strategy": "finetune"}, {"strategy.batch": 8}]}),
        ["strategy.epochs=1"],
        ["seed=3"],
        out=tmp_path / "list",
    )
    assert in_process == ["strategy=finetune,seed=3", "batch=8,seed=3"]


def test_the_same_sweep_again_keeps_what_is_finished_and_may_add_values(tmp_path: Path, in_process: list[str]) -> None:
    config = write(tmp_path)
    first = sweep(config, (), ["seed=0,1"], out=tmp_path / "sweep")
    before = (tmp_path / "sweep/seed=0/scores.json").stat().st_mtime_ns
    in_process.clear()
    assert sweep(config, (), ["seed=0,1"], out=tmp_path / "sweep") == first
    sweep(config, (), ["seed=0..2"], out=tmp_path / "sweep")
    assert in_process == ["seed=2"]
    assert (tmp_path / "sweep/seed=0/scores.json").stat().st_mtime_ns == before


def test_runs_that_were_made_with_another_version_of_a_plugin_are_named(tmp_path: Path, in_process: list[str]) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("from streamcl.strategy import GradientStrategy\n\n\nclass Mine(GradientStrategy):\n    pass\n")
    config = write(tmp_path)
    sweep(config, [f"strategy={plugin}:Mine"], ["seed=0,1"], out=tmp_path / "sweep")
    plugin.write_text(plugin.read_text() + "    # another\n")
    swept = sweep(config, [f"strategy={plugin}:Mine"], ["seed=0..2"], out=tmp_path / "sweep")
    assert "made with another mine.py than there is now: seed=0, seed=1\n" in swept.table


def test_a_folder_with_other_runs_is_refused_and_stays_as_it_is(tmp_path: Path, in_process: list[str]) -> None:
    config, out = write(tmp_path), tmp_path / "sweep"
    sweep(config, (), ["seed=0"], out=out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"another configuration \(seed=0 had strategy\.epochs=1, and would now have 2\)"):
        sweep(config, ["strategy.epochs=2"], ["seed=0"], out=out)
    with pytest.raises(RunError, match="holds a sweep of another configuration;"):
        sweep(config, ["strategy.epochs=2"], ["seed=5"], out=out)
    with pytest.raises(RunError, match="is not empty and holds no sweep"):
        sweep(config, (), ["seed=0"], out=out / "seed=0")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_in_use_is_refused(tmp_path: Path, in_process: list[str]) -> None:
    config = write(tmp_path)
    sweep(config, (), ["seed=0"], out=tmp_path / "sweep")
    holder = RunFolder(tmp_path / "sweep")
    holder.lock()
    with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        sweep(config, (), ["seed=0"], out=tmp_path / "sweep")
    holder.close()


# -- the table -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["final", "forgetting"])
def test_combinations_are_ranked_on_validation_by_the_mean_over_seeds(rank: str, tmp_path: Path, in_process: list[str]) -> None:
    block = {"over": {"strategy.epochs": [1, 5], "seed": [0, 1]}, "rank": rank}
    swept = sweep(write(tmp_path, scenario={"tasks": 2, "validation": 0.2}, sweep=block), (), (), out=tmp_path / "sweep")
    scores = {name: json.loads((tmp_path / f"sweep/{name}/scores.json").read_text()) for name in in_process}
    validation = {e: statistics.mean(scores[f"epochs={e},seed={s}"]["validation"][rank] for s in (0, 1)) for e in (1, 5)}
    assert validation[1] != validation[5]
    best = sorted(validation, key=lambda e: validation[e] if rank == "forgetting" else -validation[e])
    table = json.loads((tmp_path / "sweep/table.json").read_text())
    assert [entry["combination"] for entry in table["combinations"]] == [{"strategy.epochs": str(e)} for e in best]
    rows = swept.table.partition("---\n")[2].splitlines()[:2]
    assert [line.split()[:2] for line in rows] == [[str(i), f"epochs={e}"] for i, e in enumerate(best, 1)]
    finals = [scores[f"epochs={best[0]},seed={s}"]["final"] for s in (0, 1)]
    deviation = abs(finals[0] - finals[1]) / math.sqrt(2)
    assert table["combinations"][0]["validation"]["mean"] == pytest.approx(validation[best[0]])
    final = table["combinations"][0]["final"]
    assert (final["n"], final["half_width"]) == (2, None)  # of two seeds there is no interval
    assert (final["mean"], final["deviation"]) == pytest.approx((sum(finals) / 2, deviation))
    assert (tmp_path / "sweep/table.md").read_text().count("\n| ") == 3
    assert swept.exit_code == 0


def test_a_process_that_ends_before_its_run_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(jobs: Sequence[Job], workers: int, threads: int) -> Generator[Happened | None, None, None]:
        for job in jobs:
            yield job.name, None, ""
            yield job.name, 0, ""

    monkeypatch.setattr(sweeping, "locally", nothing)
    swept = sweep(write(tmp_path), (), ["seed=0,1"], out=tmp_path / "sweep")
    assert swept.exit_code == 1 and "no run is finished" in swept.table
    assert "failed: seed=1: the process ended and the run had not" in swept.table


def test_without_a_validation_part_nothing_is_ranked_and_the_table_says_why(tmp_path: Path, in_process: list[str]) -> None:
    swept = sweep(write(tmp_path), (), ["strategy=er,finetune"], out=tmp_path / "sweep")
    assert "rank" not in swept.table.splitlines()[0]
    assert "not ranked: nothing is held out to rank on" in swept.table and "scenario.validation=0.1" in swept.table
    assert json.loads((tmp_path / "sweep/table.json").read_text())["rank"] is None


def test_an_unknown_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.rank: must be one of .*, got 'finale': did you mean 'final'"):
        sweep(write(tmp_path, sweep={"over": {"seed": [0]}, "rank": "finale"}), (), (), out=tmp_path / "sweep")


# -- processes -----------------------------------------------------------------------------------------------------------------


def test_a_failed_run_stops_no_other_is_named_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    (tmp_path / "moody.py").write_text(MOODY)
    (tmp_path / "broken").touch()
    config, out = write(tmp_path), tmp_path / "sweep"
    words = ["streamcl", "sweep", config, "strategy=moody.py:Moody", "--over", "seed=0..2", "--workers", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capfd.readouterr()
    assert stop.value.code == 2  # the failed run's own exit code
    assert "2 of 3" in printed.out and "failed: seed=1: RuntimeError: in a bad mood" in printed.out and "Traceback" not in printed.out
    assert "3/3" in printed.err
    assert "moody.py:11 in before_task" in (out / "seed=1.log").read_text()
    forked = {json.loads((out / f"seed={seed}/status.json").read_text())["process"] for seed in range(3)}
    assert len(forked) == 3 and os.getpid() not in forked
    (tmp_path / "broken").unlink()
    in_process = request.getfixturevalue("in_process")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0 and in_process == ["seed=1"]
    assert "failed:" not in capfd.readouterr().out
    assert written(out / "seed=1") == as_written(running.run(config, ["strategy=moody.py:Moody", "seed=1"], tmp_path / "whole"))


def test_ctrl_c_stops_every_run_with_its_state_saved_and_the_same_sweep_goes_on(tmp_path: Path, in_process: list[str]) -> None:
    config, out = write(tmp_path, strategy={"epochs": 100}), tmp_path / "sweep"
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # which a suite in the background has not
    code = f"{heard}; import sys; from streamcl.cli import main; sys.argv[0] = 'streamcl'; main()"
    words = ["sweep", config, "--over", "seed=0,1", "--workers", "2", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    runs = [out / "seed=0", out / "seed=1"]
    until(lambda: all((run / "environment.json").exists() for run in runs))
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # to the sweep alone: it has to stop the runs itself
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.strip().endswith("the sweep was interrupted: 0 of 2 runs are finished; the same command goes on with the others")
    assert [json.loads((run / "status.json").read_text())["status"] for run in runs] == ["interrupted"] * 2
    sweep(config, (), ["seed=0"], out=out)
    assert in_process == ["seed=0"]
    assert written(runs[0]) == as_written(running.run(runs[0] / "config.yaml", (), tmp_path / "whole"))


def until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 30 s")
