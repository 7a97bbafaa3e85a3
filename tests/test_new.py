"""What `streamcl new` writes runs at once, and its test is green."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from streamcl.adapt import adapt
from streamcl.cli import main
from streamcl.errors import ConfigError
from streamcl.running import run
from streamcl.scaffolding import new


def test_what_is_written_runs_and_its_tests_are_green(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = new("strategy", "my_method", tmp_path / "mine")
    new("scenario", "my_stream", tmp_path / "mine")
    new("strategy", "my_tent", tmp_path / "mine", "adapting")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        *("my_method.py", "my_method.yaml", "my_stream.py", "my_stream.yaml", "my_tent.py", "my_tent.yaml"),
        *("test_my_method.py", "test_my_stream.py", "test_my_tent.py"),
    ]
    command = next(line.split("run it")[1].split() for line in told.splitlines() if "run it" in line)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0 and "MyMethod on class_incremental" in capsys.readouterr().out
    assert (tmp_path / "runs/my_method/report.html").is_file()
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", "mine"], cwd=tmp_path, capture_output=True, text=True)
    assert tested.returncode == 0 and "4 passed" in tested.stdout, tested.stdout


def test_the_new_scenario_is_a_stream_that_strategies_learn_from(tmp_path: Path) -> None:
    new("scenario", "my_stream", tmp_path)
    scores = run(tmp_path / "my_stream.yaml", ["scenario.validation=0.1", "log=[]"], tmp_path / "run")
    assert scores["final"] > 0.5  # a guess among ten classes is right once in ten
    assert len(scores["matrix"]) == len(scores["validation"]["matrix"]) == 5
    with pytest.raises(ConfigError, match="MyStream needs a class for each of the 11 tasks"):
        run(tmp_path / "my_stream.yaml", ["scenario.tasks=11"], tmp_path / "refused")


def test_the_new_method_that_adapts_is_served_under_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["streamcl", "new", "strategy", "my_tent", "--kind", "adapting", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    adapt(str(tmp_path / "my_tent.yaml"), overrides=["scenario.samples=256", "log=[]"], out=tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["final"] > scores["heads"]["frozen"]["final"] + 0.05
    for kind, of in (("scenario", "adapting"), ("strategy", "adaptive")):
        with pytest.raises(ConfigError, match=f"--kind is '{of}': it says what a strategy does, learning or adapting"):
            new(kind, "mine", tmp_path, of)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("strategie", "mine", "no template of a 'strategie': did you mean 'strategy'"),
        ("backbone", "mine", "there are strategy and scenario"),
        ("strategy", "My", "'My' cannot name a strategy: lower-case letters"),
        ("strategy", "my-method", "'my-method' cannot name a strategy"),
        ("strategy", "../up", "cannot name a strategy"),
        ("strategy", "_mine", "cannot name a strategy"),
        ("scenario", "lambda", "'lambda' cannot name a scenario"),
        ("strategy", "er", "there is a strategy 'er' already"),
        ("strategy", "random", "'random' is a module that Python finds already"),
        ("strategy", "batch", "would hide Batch"),
    ],
)
def test_names_that_would_not_work_are_refused(kind: str, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        new(kind, name, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml is there already"):
        new("strategy", "mine", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"] and (tmp_path / "mine.yaml").read_text() == "seed: 3\n"
