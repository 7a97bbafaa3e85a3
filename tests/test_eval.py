"""`streamcl eval`: the newest model of a run is scored, on its own test sets or on given data, and nothing is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from small_runs import small_run

from streamcl import cli, feeding, running, scoring
from streamcl.engine import Engine
from streamcl.errors import DataError, Interrupted, RunError
from streamcl.run_folder import RunFolder

PIXELS, DIGITS = load_digits(return_X_y=True)
PIXELS = PIXELS.reshape(-1, 1, 8, 8).astype(np.uint8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs, which no test may change."""
    folder = tmp_path_factory.mktemp("runs")
    for strategy in ("er", "icarl", "gacil"):
        protocols = {"evaluate": {"protocols": ["class_incremental", "task_incremental"]}} if strategy == "er" else {}
        running.run(small_run(strategy, log=[], **protocols), out=folder / strategy)
    return {path.name: path for path in folder.iterdir()}


def stamps(run: Path) -> dict[str, tuple[int, int]]:
    """When every file and folder of a run was last touched."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [run, *run.rglob("*")]}


def last(scores: dict[str, Any]) -> dict[str, Any]:
    """What `score` should find again in a run's own scores."""
    per_class = scores["per_class"]
    return {
        "overall": scores["final"],
        "tasks": scores["matrix"][-1],
        "per_class": dict(zip(per_class["classes"], per_class["matrix"][-1], strict=True)),
    }


@pytest.mark.parametrize("strategy", ["er", "icarl", "gacil"])
def test_the_own_test_sets_give_the_scores_of_the_run_and_nothing_is_written(strategy: str, runs: dict[str, Path]) -> None:
    run = runs[strategy]
    before, scores = stamps(run), json.loads((run / "scores.json").read_text())
    result = scoring.score(run)
    assert {key: result[key] for key in ("overall", "tasks", "per_class")} == last(scores)
    assert result["samples"] == sum(result["class_samples"].values()) == sum(result["task_samples"]) == 539
    if strategy == "icarl":
        assert {key: result["heads"]["head"][key] for key in ("overall", "tasks", "per_class")} == last(scores["heads"]["head"])
    if strategy == "er":
        told = scores["protocols"]["task_incremental"]
        assert {key: result["protocols"]["task_incremental"][key] for key in ("overall", "tasks", "per_class")} == last(told)
    assert stamps(run) == before


def test_a_run_in_use_is_scored_without_its_lock(runs: dict[str, Path]) -> None:
    folder = RunFolder.open(runs["gacil"])
    try:
        assert scoring.score(runs["gacil"])["overall"] == folder.read("scores.json")["final"]
    finally:
        folder.close()


def test_given_data_is_matched_by_name_and_unknown_classes_are_counted_as_wrong(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = np.concatenate([np.flatnonzero(digit == DIGITS)[:20] for digit in (7, 1)])
    names = np.where(DIGITS[rows] == 7, "7", "one")  # the run calls it 1
    np.savez(tmp_path / "new.npz", x=PIXELS[rows], y=names)
    run, before = runs["icarl"], stamps(runs["icarl"])
    result = scoring.score(run, str(tmp_path / "new.npz"))
    answers = np.array(running.load(run).predict(PIXELS[rows]))
    assert result["overall"] == (answers == names).mean() and result["unknown"] == {"one": 20}
    assert result["per_class"] == {"7": (answers[:20] == "7").mean(), "one": 0.0}
    assert result["heads"]["head"]["per_class"].keys() == {"7", "one"} and result["protocols"] is None
    text = scoring.table(result)
    assert "20 samples are of classes that the model does not know, and count as wrong: one (20)" in text
    assert stamps(run) == before


def test_of_data_with_a_test_part_that_part_is_scored(runs: dict[str, Path]) -> None:
    result = scoring.score(runs["er"], "{name: digits, test_fraction: 0.1}")
    assert result["samples"] == 180


def test_the_table_is_aligned_and_shows_every_head(runs: dict[str, Path]) -> None:
    lines = scoring.table(scoring.score(runs["icarl"])).splitlines()
    blocks = [block.splitlines() for block in "\n".join(lines).split("\n\n")[1:]]
    assert [block[0].split()[0] for block in blocks] == ["task", "class"] and all("accuracy, head" in block[0] for block in blocks)
    assert [len(block) for block in blocks] == [7, 11] and all(len({len(line) for line in block}) == 1 for block in blocks)
    assert blocks[0][-1].startswith("all ") and "task-incremental" in scoring.table(scoring.score(runs["er"]))


@pytest.mark.parametrize(("place", "learned"), [("_tick", 2), ("_between", 3)])
def test_an_interrupted_run_is_scored_as_far_as_it_got(place: str, learned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(Engine, place)  # what is called between two batches, of training or of scoring

    def stop(engine: Engine) -> None:
        engine.context.interrupted = engine.context.task.index == 2
        original(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, place, stop)
        with pytest.raises(Interrupted):
            running.run(small_run("er", log=[], engine={"checkpoint": {"every": {"steps": 5}}}), out=tmp_path / "run")
    result = scoring.score(tmp_path / "run")
    assert result["learned"] == len(result["tasks"]) == learned and result["tasks"][0] is not None
    loaded = running.load(tmp_path / "run")
    assert loaded.scores(PIXELS[:3]).shape[1] == len(loaded.classes) == 6  # those of the task that was being learned are there


def test_what_cannot_be_scored_is_told_in_one_message(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "new.csv"
    table.write_text("a,b,label\n1,2,x\n")
    with pytest.raises(DataError, match=r"new.csv has vector .*, and this run takes image"):
        scoring.score(runs["er"], str(table))
    with pytest.raises(RunError, match="is no run"):
        scoring.score(tmp_path)
    monkeypatch.setattr(Engine, "_tick", lambda engine: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        running.run(small_run("er", log=[]), out=tmp_path / "early")
    with pytest.raises(RunError, match="has not learned a task yet"):
        scoring.score(tmp_path / "early")


def test_a_fed_run_is_scored_on_what_it_was_fed_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    running.run(small_run("gacil", log=[]), out=run)
    np.savez(tmp_path / "new.npz", x=PIXELS[:60, :, ::-1], y=np.array([f"upside {d}" for d in DIGITS[:60]]))
    scores = feeding.feed(run, str(tmp_path / "new.npz"), holdout=0.3)
    result = scoring.score(run)
    assert {key: result[key] for key in ("overall", "tasks", "per_class")} == last(scores) and result["task_names"][5] == "new"


def test_a_damaged_checkpoint_is_told(runs: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs["er"], tmp_path / "run")
    newest = max((run / "checkpoints").glob("0*"))
    (newest / "state.json").write_text("{}")
    result = scoring.score(run)
    assert result["learned"] == 5 and f"checkpoint {newest} is damaged" in scoring.table(result)


def test_the_command_prints_the_table_and_an_unknown_file_exits_with_3(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["eval", str(runs["gacil"])]
    shown = subprocess.run([sys.executable, "-m", "streamcl.cli", *words], capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.rstrip() == scoring.table(scoring.score(runs["gacil"])), shown.stderr
    monkeypatch.setattr(sys, "argv", ["streamcl", *words, "nowhere.csv"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = capsys.readouterr().err
    assert stop.value.code == 3 and "there is no 'nowhere.csv'" in told and told.count("\n") == 1


def test_raw_inputs_of_the_wrong_form_get_one_message(runs: dict[str, Path]) -> None:
    learned = running.load(runs["er"])
    image = torch.from_numpy(PIXELS[:2])
    cases: list[tuple[Any, str]] = [
        ({"vector": image}, r"takes image \(whole numbers from 0 to 16, 1 x 8 x 8\), and was given vector"),
        ({}, "was given nothing"),
        (image[:, :, :7], "image must be whole numbers from 0 to 16, n x 1 x 8 x 8, and has the shape n x 1 x 7 x 8"),
        (image[0, 0], "n x 1 x 8 x 8, and has the shape 8 x 8"),
        (image.float() / 16, "holds float32"),
        (image + 100, r"image of sample 0 holds values outside of 0 to 16 \(2 such"),
        (["a", "b"], "these are no numbers"),
        (3, "is a single number"),
    ]
    for inputs, message in cases:
        with pytest.raises(DataError, match=message):
            learned.predict(inputs)
    assert learned.predict(image[:0]) == []
    assert learned.predict(image) == learned.predict({"image": PIXELS[:2]}) == learned.predict(PIXELS[:2].tolist())
    assert learned.predict(image) == learned.predict(image[:, 0]) == learned.predict(image.permute(0, 2, 3, 1))  # as `feed` takes them
