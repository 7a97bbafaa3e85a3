"""`streamcl adapt`, and the section `online` of a configuration."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import small_run
from typer.testing import CliRunner

from streamcl import config as configuration
from streamcl import running
from streamcl.adapt import adapt
from streamcl.cli import app
from streamcl.errors import ConfigError, DataError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    running.run(
        {
            "scenario": {"name": "class_incremental", "data": "digits", "tasks": 1},
            "strategy": {"name": "finetune", "epochs": 4, "batch": 32},
            "model": {"backbone": {"name": "convnet", "width": 16, "blocks": 2}},
            "log": [],
        },
        out=folder,
    )
    return folder


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [one.get("fields", one) for one in found if one["kind"] == kind]


def test_a_configuration_is_served_under_guard_beside_the_deployed_model(tmp_path: Path) -> None:
    path = tmp_path / "stream.yaml"
    path.write_text(configuration.from_mapping({**small_run("tent"), "log": ["jsonl", "report"]}).dump().split("\nonline:")[0] + "\n")
    told = adapt(str(path), overrides=["scenario.samples=300"], out=tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert told.startswith(f"accuracy {scores['final']:.4f}, {scores['heads']['frozen']['final']:.4f} by the model as it was deployed")
    served = events(tmp_path / "run", "served")
    assert [one["samples"] for one in served[:2]] == [256, 300] and served[0]["accuracy_frozen"] is not None
    assert configuration.load(tmp_path / "run" / "config.yaml").online.guard is True
    source = adapt(str(path), strategy="source", overrides=["scenario.samples=300", "log=[]"], out=tmp_path / "source")
    frozen = json.loads((tmp_path / "source" / "scores.json").read_text())
    assert frozen["final"] == scores["heads"]["frozen"]["final"] and source.startswith(f"accuracy {frozen['final']:.4f}")


def test_of_a_stream_of_values_the_errors_that_are_told_are_those_that_are_scored(tmp_path: Path) -> None:
    scores = running.run({**small_run("casp"), "log": ["jsonl", "report"], "online": {"frozen": True}}, out=tmp_path / "run")
    told, blocks = events(tmp_path / "run", "served"), [0.0, 0.0]
    before = 0
    for one in told:
        blocks = [total + one[name] * (one["samples"] - before) for total, name in zip(blocks, ("mae", "mae_frozen"), strict=True)]
        before = one["samples"]
    expected = [of["metrics"]["mae"]["final"] if of["metric"] != "mae" else of["final"] for of in (scores, scores["heads"]["frozen"])]
    assert [total / before for total in blocks] == pytest.approx(expected, rel=1e-5)
    assert not {"accuracy", "entropy"} & told[0].keys()
    assert "Mean absolute error of what was served" in (tmp_path / "run" / "report.html").read_text()


def test_what_a_configuration_says_of_its_loop_is_what_it_means() -> None:
    from streamcl.adapt import _on

    plain = configuration.from_mapping(small_run("tent"))
    assert sorted(_on([], plain)) == ["online.frozen=true", "online.guard=true", "online.window=32"]
    assert _on(["online.guard=false", "online.window=null"], plain) == ["online.frozen=true"]


def test_a_runs_model_meets_labelled_data(trained: Path, tmp_path: Path) -> None:
    told = adapt(str(trained), "digits", strategy="tent", batch=32, out=tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["samples_seen"] == 539 and scores["final"] >= scores["heads"]["frozen"]["final"] - 0.02
    assert "by the model as it was deployed" in told


def test_data_without_labels_is_answered_row_by_row(trained: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    np.savez(tmp_path / "new.npz", image=loaded.images.astype(np.uint8)[:200])
    told = adapt(str(trained), str(tmp_path / "new.npz"), out=tmp_path / "answers")
    rows = list(csv.DictReader((tmp_path / "answers" / "answers.csv").open()))
    right = np.mean([row["answer"] == str(label) for row, label in zip(rows, loaded.target[:200], strict=True)])
    assert len(rows) == 200 and right > 0.8 and told.startswith("200 answers in ")
    assert [row["version"] for row in rows[:1]] == ["0"] and {row["made"] for row in rows} == {"before"}
    assert json.loads((tmp_path / "answers" / "online.json").read_text())["samples"] == 200
    with pytest.raises(ConfigError, match="holds something already"):
        adapt(str(trained), str(tmp_path / "new.npz"), out=tmp_path / "answers")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "is a run: name the data that its model is to meet"),
        ("sklearn:wine", "the model does not know|the target of this data|classes"),
        ("no_such_thing", "no_such_thing"),
    ],
)
def test_a_run_and_data_that_do_not_go_together_are_told_so(data: str | None, message: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        adapt(str(trained), data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_array_is_named(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"bad\.npz: this cannot be read as NumPy arrays"):
        adapt(str(trained), str(tmp_path / "bad.npz"), out=tmp_path / "run")
    np.savez(tmp_path / "odd.npz", image=np.zeros((3, 5, 5), np.uint8))
    with pytest.raises(DataError, match=r"image must be .* 1 x 8 x 8"):
        adapt(str(trained), str(tmp_path / "odd.npz"), out=tmp_path / "run")


def test_the_command_line_tells_data_from_options(trained: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["adapt", str(trained), "digits", "log=[]", "--strategy", "bn_adapt", "--out", str(tmp_path / "run")])
    assert found.exit_code == 0, found.output
    assert found.output.startswith("accuracy ")
    both = CliRunner().invoke(app, ["adapt", str(trained), "digits", "more", "--out", str(tmp_path / "two")])
    assert isinstance(both.exception, ConfigError) and "more is one thing too many" in str(both.exception)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"online": {"canary": 8}}, "is what the guard goes by, and there is none: set online.guard=true"),
        ({"online": {"guard": {"compare": 0}}}, "online.guard.compare"),
        ({"strategy": {"name": "tent", "optimizer": {"momentum": 0.9}}}, "adam takes no momentum"),
    ],
)
def test_settings_of_the_loop_that_make_no_sense_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration.from_mapping({**small_run("tent"), **changes})


def test_a_stream_that_is_learned_has_no_loop(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the online loop serves a test-time stream, and there is none"):
        running.run({**small_run("finetune"), "online": {"guard": True}}, out=tmp_path / "run")


def test_what_is_left_out_of_an_optimiser_is_the_methods_own() -> None:
    def optimizer(given: Any) -> Any:
        return configuration.from_mapping({**small_run("tent"), "strategy": {"name": "tent", "optimizer": given}}).strategy.options[
            "optimizer"
        ]

    assert (optimizer({"lr": 0.5}).name, optimizer({"lr": 0.5}).lr) == ("adam", 0.5)
    assert (optimizer({"name": "adam"}).lr, optimizer("sgd").lr) == (0.001, 0.05)


def test_canary_and_late_labels_reach_the_guard(tmp_path: Path) -> None:
    config = {**small_run("tent"), "log": [], "online": {"guard": True, "canary": 32, "feedback": 0.5, "calibrate": 64}}
    engine = running.build(running.as_config(config), None, log=[])
    engine.run()
    assert engine.loop is not None and engine.loop.guard is not None
    status = engine.loop.status()
    assert sum(len(batch) for batch in engine.loop.canary) == 32 and engine.loop.guard.canary_source is not None
    assert 60 < status["feedback"]["labelled"] < 240 and status["feedback"]["unknown"] == 0
    assert "fisher" in status["guard"]
