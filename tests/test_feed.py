"""New data for a finished run: it becomes the next task, or one message says why not and the run is as it was."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from small_runs import classifying, comparable, copies, family, small_run

from streamcl import cli, config, feeding, running
from streamcl.errors import ConfigError, DataError, Interrupted, PluginError, RunError
from streamcl.run_folder import RunFolder

PIXELS, DIGITS = load_digits(return_X_y=True)
PIXELS = PIXELS.reshape(-1, 1, 8, 8).astype(np.uint8)
COMMAND = [sys.executable, "-m", "streamcl.cli"]


def images(path: Path, *digits: int, turned: bool = False, limit: int = 40) -> str:
    """An .npz with digits; `turned` ones are mirrored and have names of their own, so they are new classes."""
    rows = np.concatenate([np.flatnonzero(digit == DIGITS)[:limit] for digit in digits])
    values = PIXELS[rows].transpose(0, 1, 3, 2) if turned else PIXELS[rows]
    np.savez(path, x=np.ascontiguousarray(values), y=np.array([f"turned {d}" if turned else str(d) for d in DIGITS[rows]]))
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run on digits, made once for each strategy, and copied for each test."""

    def finish(strategy: str, to: Path, /, **changes: Any) -> None:
        running.run(small_run(strategy, **{"memory": {"exemplars": 90}, "log": [], **changes}), out=to)

    return copies(tmp_path_factory.mktemp("finished"), finish)


def contents(run: Path) -> dict[str, str]:
    """The checksum of every file of a run that is a record of it."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "events.jsonl"))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("strategy", classifying())
def test_every_strategy_learns_new_classes_then_old_ones_then_both(strategy: str, tmp_path: Path, finished: Any) -> None:
    run = finished(strategy, tmp_path / "run")
    before = json.loads((run / "scores.json").read_text())["matrix"]
    feeding.feed(run, images(tmp_path / "new.npz", 3, 4, turned=True), holdout=0.25)
    feeding.feed(run, images(tmp_path / "old.npz", 1, 2), holdout=0.25)
    both = {"name": "arrays", "path": images(tmp_path / "both.npz", 4, 5, turned=True)}
    scores = feeding.feed(run, json.dumps(both), test=images(tmp_path / "test.npz", 3, 5, turned=True, limit=60), name="both")
    matrix = scores["matrix"]
    assert [row[:5] for row in matrix[:5]] == before and all(len(row) == 8 for row in matrix)
    assert [[value is not None for value in row] for row in matrix[5:]] == [[True] * (n + 1) + [False] * (7 - n) for n in (5, 6, 7)]
    tasks = scores["tasks"][5:]
    assert [task["name"] for task in tasks] == ["new", "old", "both"]
    assert [task["classes"] for task in tasks] == [["turned 3", "turned 4"], [], ["turned 5"]]
    assert [(task["train"], task["test"]) for task in tasks] == [(60, 20), (60, 20), (80, 120)]
    assert scores["per_class"]["classes"][10:] == ["turned 3", "turned 4", "turned 5"]
    assert json.loads((run / "status.json").read_text())["status"] == "done"


def vectors(path: Path, count: int, *, seed: int, **target: Any) -> str:
    x = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    np.savez(path, x=x, **{name: make(x) for name, make in target.items()})
    return str(path)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("er", {}), ("krt", {"attention": False}), ("ml_masked", {}), ("ml_finetune", {}), ("ml_joint", {}), ("asl", {})],
)
def test_sets_of_labels_are_fed_by_the_names_of_their_columns(strategy: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A delivery annotates its own columns; what it says nothing of is not annotated."""
    first = vectors(tmp_path / "first.npz", 200, seed=0, y=lambda x: (x[:, :4] > 0.5).astype(np.int8))
    source = {"name": "arrays", "path": first, "as": "labels", "class_names": list("abcd"), "test_fraction": 0.2}
    run, scenario = tmp_path / "run", {"name": "multi_label", "data": source, "increment": 2}
    changes = {"model": {"backbone": {"name": "mlp", "hidden": [16]}}, "memory": {"exemplars": 50}, "strategy": options}
    running.run(small_run(strategy, scenario=scenario, **changes, log=[]), out=run)

    def columns(x: np.ndarray) -> np.ndarray:
        return np.stack([x[:, 4] > 0.5, x[:, 1] > 0.5, x[:, 0] > 99], axis=1).astype(np.int8)

    more = vectors(tmp_path / "more.npz", 60, seed=1, y=columns)
    given = {"name": "arrays", "path": more, "as": "labels", "class_names": ["e", "b", "never"]}
    scores = feeding.feed(run, json.dumps(given), holdout=0.25, name="more")
    task = scores["tasks"][2]
    assert (task["classes"], task["train"], task["test"]) == (["e"], 45, 15) and scores["per_class"]["classes"] == list("abcde")
    assert len(scores["matrix"]) == 3 and scores["metric"] == "map" and all(value is not None for value in scores["matrix"][2])
    folder = RunFolder.open(run)
    folder.close()
    learned = running.continued(folder).scenario.task(2).train
    assert learned.targets.shape[1] == 5
    assert torch.equal((learned.targets >= 0).any(dim=0), torch.tensor([False, True, False, False, True]))
    x = torch.cat([batch.inputs["vector"] for batch in learned.batches(100)])
    for column in (1, 4):
        assert torch.equal(learned.targets[:, column], (x[:, column] > 0.5).to(torch.int8))


def test_values_are_fed_and_scored(tmp_path: Path) -> None:
    first = vectors(tmp_path / "first.npz", 200, seed=0, y=lambda x: x[:, 0])
    source = {"name": "arrays", "path": first, "as": "value", "test_fraction": 0.2}
    run, scenario = tmp_path / "run", {"name": "missing_modality", "data": source, "missing": [{}, {}]}
    running.run(small_run("finetune", scenario=scenario, log=[]), out=run)
    more = vectors(tmp_path / "more.npz", 40, seed=1, y=lambda x: x[:, 0])
    scores = feeding.feed(run, json.dumps({"name": "arrays", "path": more, "as": "value"}), holdout=0.25, name="more")
    assert scores["metric"] == "mae" and len(scores["matrix"][2]) == 3 and scores["tasks"][2]["train"] == 30
    two = vectors(tmp_path / "two.npz", 40, seed=2, y=lambda x: x[:, :2])
    before = contents(run)
    with pytest.raises(DataError, match=r"two: the value of a sample is 2 number\(s\), and this run's one"):
        feeding.feed(run, json.dumps({"name": "arrays", "path": two, "as": "value"}))
    assert contents(run) == before
    with pytest.raises(DataError, match="digits is labelled with class, and this run takes value"):
        feeding.feed(run, images(tmp_path / "digits.npz", 1))


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (np.full((4, 2), 2), "labels", r"y.npz, row 0: a label is not 1, 0 or -1 \(and 3 more such\)"),
        (np.zeros(4), "labels", "whole numbers, a column per class, are needed"),
        (np.array([0.0, np.nan, 1.0, 2.0]), "value", "row 1: a value is NaN, infinite or too large"),
        (np.array(list("abcd")), "value", "numbers, one or several per row, are needed"),
        (np.zeros((4, 2), int), "class", "must hold one whole number or text per row.*`as: labels`"),
    ],
)
def test_targets_that_are_none_are_refused_by_row(values: np.ndarray, kind: str, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "y.npz", x=np.zeros((4, 3), np.float32), y=values)
    with pytest.raises(DataError, match=message):
        config.plugin_spec("source", {"name": "arrays", "path": str(tmp_path / "y.npz"), "as": kind}).build().load()


def test_ids_stay_unique_and_classes_are_matched_by_name(tmp_path: Path, finished: Any) -> None:
    run = finished("er", tmp_path / "run")
    feeding.feed(run, images(tmp_path / "a.npz", 3, 7), holdout=0.2)
    feeding.feed(run, images(tmp_path / "a2.npz", 3, 7), test=images(tmp_path / "t.npz", 7), again=True)
    stream = running.stream_of(config.load(run / "config.yaml"), RunFolder(run))
    info = stream.open(0)
    tasks = [stream.task(index) for index in range(len(stream))]
    assert info.tasks == 7 and len(info.class_names) == info.classes == 10
    tests = [data for task in tasks[5:] if (data := stream.test(task, tasks[-1])) is not None]
    ids = torch.cat([*(task.train.ids for task in tasks), *(data.ids for data in tests)])
    assert len(ids.unique()) == len(ids)
    for data in (tasks[5].train, tasks[6].train, *tests):
        for batch in data.batches(16):
            names = [tasks[-1].names[label] for label in batch.target.tolist()]
            values = batch.inputs["image"].numpy()
            assert all(str(DIGITS[(value == PIXELS).all(axis=(1, 2, 3))][0]) == name for value, name in zip(values, names, strict=True))
    assert torch.equal(torch.cat([batch.ids for batch in tasks[6].train.batches(16)]), tasks[6].train.ids)


def rows(count: int, shift: float, *names: str) -> list[dict[str, Any]]:
    random.seed(count)
    return [{"a": round(random.random() + shift * (i % 2), 3), "b": i / count, "label": names[i % len(names)]} for i in range(count)]


def write_rows(path: Path, table: list[dict[str, Any]]) -> str:
    if path.suffix == ".csv":
        path.write_text("\n".join([",".join(table[0]), *(",".join(map(str, row.values())) for row in table)]))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, table)))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        np.savez(path, x=np.array([[row["a"], row["b"]] for row in table], np.float32), y=np.array([row["label"] for row in table]))
    return str(path)


def table_run(tmp_path: Path, strategy: str = "er", **scenario: Any) -> Path:
    data = {"name": "csv", "path": write_rows(tmp_path / "first.csv", rows(80, 3.0, "low", "high")), "test_fraction": 0.25}
    run = tmp_path / "run"
    running.run(small_run(strategy, scenario={"name": "class_incremental", "data": data, "tasks": 2, **scenario}, log=[]), out=run)
    return run


def test_tables_of_every_kind_feed_one_run(tmp_path: Path) -> None:
    run = table_run(tmp_path)
    for ending in (".csv", ".jsonl", ".parquet", ".npz"):
        scores = feeding.feed(run, write_rows(tmp_path / f"more{ending}", rows(40, 6.0, "low", f"new in {ending}")), holdout=0.25)
        assert scores["tasks"][-1]["classes"] == [f"new in {ending}"]
    assert len(scores["matrix"]) == len(scores["matrix"][-1]) == 6


def test_a_nan_is_told_with_its_line(tmp_path: Path) -> None:
    run = table_run(tmp_path)
    (tmp_path / "nan.jsonl").write_text('{"a": 1.0, "b": NaN, "label": "low"}\n')
    with pytest.raises(DataError, match=r"nan\.jsonl, line 1.*NaN"):
        feeding.feed(run, str(tmp_path / "nan.jsonl"))
    assert not (run / "fed").exists()


def test_a_folder_of_images_feeds_a_run_on_folders_and_its_own_test_part_is_scored(tmp_path: Path) -> None:
    def folder(name: str, *digits: int) -> str:
        for part, start in (("train", 0), ("test", 20)):
            for digit in digits:
                (tmp_path / name / part / f"class {digit}").mkdir(parents=True)
                for row in np.flatnonzero(digit == DIGITS)[start : start + (20 if part == "train" else 5)]:
                    Image.fromarray(PIXELS[row, 0] * 15).save(tmp_path / name / part / f"class {digit}" / f"{row}.png")
        return str(tmp_path / name)

    scenario = {"name": "class_incremental", "data": {"name": "folder", "path": folder("first", 0, 1)}, "tasks": 2}
    running.run(small_run("icarl", scenario=scenario, log=[]), out=tmp_path / "run")
    new = folder("second", 1, 2)
    scores = feeding.feed(tmp_path / "run", new)
    assert (scores["tasks"][-1]["train"], scores["tasks"][-1]["test"], scores["tasks"][-1]["classes"]) == (40, 10, ["class 2"])
    files = json.loads((tmp_path / "run/files.json").read_text())
    assert {f"{new}/train", f"{new}/test"} <= files.keys()
    with pytest.raises(ConfigError, match="second has a test part of its own: leave out --holdout"):
        feeding.feed(tmp_path / "run", new, holdout=0.1, again=True)
    next((tmp_path / "second/test/class 1").iterdir()).unlink()
    with pytest.raises(DataError, match=r"second/test has changed since the run was made"):
        feeding.feed(tmp_path / "run", folder("third", 3))


def test_several_modalities_are_fed_together(tmp_path: Path) -> None:
    def pairs(name: str, *digits: int) -> dict[str, Any]:
        rows = np.concatenate([np.flatnonzero(digit == DIGITS)[:30] for digit in digits])
        np.savez(tmp_path / name, image=PIXELS[rows], sound=PIXELS[rows].reshape(-1, 64)[:, ::4].astype(np.float32), y=DIGITS[rows])
        return {"name": "arrays", "path": str(tmp_path / name), "inputs": {"image": "image", "audio": "sound"}}

    scenario = {"name": "class_incremental", "data": {**pairs("first.npz", 0, 1), "test_fraction": 0.3}, "tasks": 2}
    model = {"backbone": {"name": "mlp", "hidden": [16], "modality": "audio"}}
    running.run(small_run("icarl", scenario=scenario, model=model, log=[]), out=tmp_path / "run")
    scores = feeding.feed(tmp_path / "run", json.dumps(pairs("second.npz", 1, 2)), holdout=0.2)
    assert scores["tasks"][-1]["name"] == "second" and scores["tasks"][-1]["classes"] == ["2"] and scores["matrix"][-1][2] is not None
    only = {**pairs("third.npz", 3), "inputs": {"image": "image"}}
    with pytest.raises(DataError, match=r"third has image \(.*\), and this run takes image \(.*\) and audio \(decimal numbers, 16\)"):
        feeding.feed(tmp_path / "run", json.dumps(only))


@pytest.mark.parametrize("strategy", ["mmp", "mplmm", "cmmm", "cggm", "ogm_ge"])
def test_methods_of_several_modalities_are_fed_complete_samples_and_a_new_class(strategy: str, tmp_path: Path) -> None:
    def pairs(name: str, *digits: int) -> dict[str, Any]:
        rows = np.concatenate([np.flatnonzero(digit == DIGITS)[:30] for digit in digits])
        np.savez(tmp_path / name, image=PIXELS[rows], means=PIXELS[rows].reshape(-1, 64)[:, ::4].astype(np.float32), y=DIGITS[rows])
        return {"name": "arrays", "path": str(tmp_path / name), "inputs": {"image": "image", "vector": "means"}}

    data = {**pairs("first.npz", 0, 1), "test_fraction": 0.3}
    scenario = {"name": "missing_modality", "data": data, "missing": [{"image": 0.5}, {"vector": 0.5}]}
    backbone = (
        {"name": "fusion", "width": 8}
        if family(strategy) == "terms"
        else {"name": "multimodal_transformer", "width": 16, "depth": 3, "heads": 2}
    )
    model = {"backbone": backbone, "pretrain": {"scenario": {**scenario, "missing": [{}]}, "strategy": {"name": "finetune", "epochs": 1}}}
    running.run(small_run(strategy, scenario=scenario, model=model, log=[]), out=tmp_path / "run")
    scores = feeding.feed(tmp_path / "run", json.dumps(pairs("second.npz", 1, 2)), holdout=0.2)
    assert scores["tasks"][-1]["classes"] == ["2"] and all(value is not None for value in scores["matrix"][-1])


OWN_SOURCE = """
import torch
from streamcl.data import ArrayDataset
from streamcl.stream import Modality, Source, SourceData

class Own(Source):
    def __init__(self, *, wrong: str):
        self.wrong = wrong

    def load(self) -> SourceData:
        image, y = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 0, 1])
        ids, modality, target = torch.arange(6), Modality("image", (1, 8, 8), 16), "class"
        match self.wrong:
            case "test ids":
                return SourceData(*[ArrayDataset({"image": image}, y, ids)] * 2, ["a", "b"], {"image": modality})
            case "empty":
                image, y, ids = image[:0], y[:0], ids[:0]
            case "label":
                y[3] = 2
            case "unlabelled":
                y[3] = -1
            case "ids":
                ids[3] = 0
            case "target":
                target = "value"
            case "range":
                image[4] = 200
            case "dark":
                modality = Modality("image", (1, 8, 8), 1)
            case "type":
                image = image.int()
            case "floats":
                image, modality = image.float(), Modality("image", (1, 8, 8))
            case "lies":
                image = image.float()
            case "shape":
                image = image[:, :, :7]
        return SourceData(ArrayDataset({"image": image}, y, ids), None, ["a", "b"], {"image": modality}, target)
"""

WRONG = {
    "empty": "Own holds no sample",
    "label": "the label 2 is outside of the 2 classes",
    "unlabelled": "the label -1 is outside of the 2 classes",
    "ids": "the ids of its samples must all differ",
    "target": "is labelled with value, and this run takes class",
    "range": r"image of sample 4 holds values outside of 0 to 16 \(1 such",
    "dark": "the numbers of image go up to 1, and this run's to 16: scale them",
    "type": r"image holds torch.int32, and the run's first task torch.uint8",
    "floats": r"has image \(decimal numbers, 1 x 8 x 8\), and this run takes image \(whole numbers from 0 to 16, 1 x 8 x 8\)",
    "lies": "image must be whole numbers from 0 to 16, 1 x 8 x 8, and holds float32",
    "shape": "image must be whole numbers from 0 to 16, n x 1 x 8 x 8, and has the shape n x 1 x 7 x 8",
}


def test_wrong_data_gets_one_message_and_the_run_is_as_it_was(tmp_path: Path, finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished("er", tmp_path / "run")
    before = contents(run)
    (tmp_path / "own.py").write_text(OWN_SOURCE)
    for wrong, message in WRONG.items():
        with pytest.raises(DataError, match=message):
            feeding.feed(run, json.dumps({"name": f"{tmp_path}/own.py:Own", "wrong": wrong}), name="Own")
        assert contents(run) == before
    repeated = shutil.copytree(run, tmp_path / "repeated")
    assert feeding.feed(repeated, json.dumps({"name": f"{tmp_path}/own.py:Own", "wrong": "test ids"}))["tasks"][-1]["test"] == 6
    assert json.loads((repeated / "files.json").read_text())[f"{tmp_path}/own.py"]["plugin"]
    empty = json.dumps({"name": f"{tmp_path}/own.py:Own", "wrong": "empty"})
    good, other = images(tmp_path / "good.npz", 1), images(tmp_path / "other.npz", 2, turned=True)
    table = write_rows(tmp_path / "table.csv", rows(10, 1.0, "1", "2"))
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data": table}, DataError, r"table has vector \(decimal numbers, 2\), and this run takes image"),
        ({"data": good, "test": empty}, DataError, "the test data of good holds no sample"),
        ({"data": good, "test": table}, DataError, "the test data of good has vector"),
        ({"data": good, "test": other}, DataError, "the test data of good has classes that nothing was learned of: turned 2"),
        ({"data": good, "test": good, "holdout": 0.1}, ConfigError, "--test and --holdout both say what to score"),
        ({"data": good, "holdout": 1.0}, ConfigError, "a fraction from 0 to below 1"),
        (
            {"data": images(tmp_path / "one.npz", 1, 2, limit=1), "holdout": 0.1},
            DataError,
            "one sample of each class: none can be held out",
        ),
        ({"data": str(tmp_path / "nowhere.csv")}, DataError, "there is no 'nowhere.csv'"),
        ({"data": "{name: csv"}, ConfigError, "this is no source as YAML writes it"),
        ({"data": "{path: new.csv}"}, ConfigError, "must name a source"),
        ({"data": "{name: cvs, path: new.csv}"}, ConfigError, "did you mean 'csv'"),
    ]
    for given, kind, message in cases:
        with pytest.raises(kind, match=message):
            feeding.feed(run, **given)
        assert contents(run) == before
    monkeypatch.chdir(tmp_path)
    assert feeding.feed(run, "good.npz", test="good.npz")["tasks"][-1]["train"] == 40
    assert json.loads((run / "fed/0001.json").read_text())["data"]["path"] == good


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path, finished: Any) -> None:
    run = finished("er", tmp_path / "run")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "status": "interrupted"}))
    with pytest.raises(RunError, match=r"is interrupted: finish it first \(streamcl resume"):
        feeding.feed(run, images(tmp_path / "new.npz", 1))
    assert not (run / "fed").exists()
    with pytest.raises(RunError, match="is no run"):
        feeding.feed(tmp_path, images(tmp_path / "new.npz", 1))


def test_a_feed_that_cannot_be_learned_leaves_the_run_as_it_was(tmp_path: Path, finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished("icarl", tmp_path / "run", memory={"exemplars": 10}, engine={"checkpoint": {"every": "task"}})
    before = contents(run)
    with pytest.raises(ConfigError, match=r"memory.exemplars is 10, less than one sample for each of the 12 classes that will come"):
        feeding.feed(run, images(tmp_path / "new.npz", 3, 4, turned=True))
    assert contents(run) == before
    monkeypatch.setattr("streamcl.engine._check_exemplars", lambda *arguments: None)  # so that it fails in the middle
    with pytest.raises(
        ConfigError, match=r"memory.exemplars is 10, less than one sample for each of the 12(.|\n)*The data was not taken"
    ) as told:
        feeding.feed(run, images(tmp_path / "new.npz", 3, 4, turned=True))
    assert contents(run) == before
    assert str(told.value).endswith("as it was before; after the fix, feed it again") and "streamcl resume" not in str(told.value)
    assert len(feeding.feed(run, images(tmp_path / "old.npz", 3))["matrix"]) == 6


def test_a_source_that_raises_is_told_with_its_own_line(tmp_path: Path, finished: Any) -> None:
    (tmp_path / "own.py").write_text(OWN_SOURCE.replace("self.wrong = wrong", "raise KeyError(wrong)"))
    run = finished("er", tmp_path / "run")
    with pytest.raises(PluginError, match=r"own\.py:8: KeyError"):
        feeding.feed(run, json.dumps({"name": f"{tmp_path}/own.py:Own", "wrong": "all"}))
    assert not (run / "fed").exists()


def test_a_record_that_was_edited_into_nonsense_is_named(tmp_path: Path, finished: Any) -> None:
    run = finished("gacil", tmp_path / "run")
    feeding.feed(run, images(tmp_path / "new.npz", 3))
    record = run / "fed/0001.json"
    record.write_text(record.read_text().replace('"samples"', '"simples"'))
    with pytest.raises(RunError, match=r"0001\.json is no record of a delivery any more.*simples"):
        feeding.feed(run, images(tmp_path / "new.npz", 3))


@pytest.mark.parametrize("at", range(5))
def test_a_feed_that_dies_while_it_is_recorded_is_whole_or_nothing(
    at: int, tmp_path: Path, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images(tmp_path / "new.npz", 1, 2, turned=True)
    whole = feeding.feed(finished("er", tmp_path / "whole"), data, holdout=0.2)
    run = finished("er", tmp_path / "run")
    scores = json.loads((run / "scores.json").read_text())
    written: list[str] = []
    from streamcl import run_folder, writing

    def dying(path: Path, text: str) -> None:
        if len(written) == at:
            raise SystemExit  # as a kill would: nothing below gets to clean up
        written.append(path.name)
        writing.write_atomically(path, text)

    with monkeypatch.context() as patch:
        for module in (run_folder, feeding):
            patch.setattr(module, "write_atomically", dying)
        with pytest.raises(SystemExit):
            feeding.feed(run, data, holdout=0.2)
    resumed = running.resume(run)
    recorded = (run / "fed/0001.json").exists()
    assert written == ["status.json", "files.json", "info.json", "0001.json"][:at] and recorded == (at == 4)
    if not recorded:
        assert comparable(resumed) == comparable(scores)
        resumed = feeding.feed(run, data, holdout=0.2)
    assert comparable(resumed) == comparable(whole)


def test_a_killed_feed_is_finished_by_resume_with_the_same_scores(tmp_path: Path, finished: Any) -> None:
    changes = {"strategy": {"epochs": 40}, "engine": {"device": "cpu", "threads": 1, "checkpoint": {"every": {"steps": 25}}}}
    data = images(tmp_path / "new.npz", 1, 2, 3, turned=True, limit=150)
    whole = feeding.feed(finished("er", tmp_path / "whole", **changes), data, holdout=0.2)
    run = finished("er", tmp_path / "killed", **changes)
    newest = max(path.name for path in (run / "checkpoints").glob("0*"))
    process = subprocess.Popen([*COMMAND, "feed", str(run), data, "--holdout", "0.2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and max(path.name for path in (run / "checkpoints").glob("0*")) == newest:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == -signal.SIGKILL, output
    with pytest.raises(RunError, match="is running: finish it first"):
        feeding.feed(run, data)
    assert comparable(running.resume(run)) == comparable(whole)


def test_a_feed_stopped_at_its_first_step_is_kept_for_resume(tmp_path: Path, finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamcl.engine import Engine

    data = images(tmp_path / "new.npz", 1, 2, turned=True)
    whole = feeding.feed(finished("icarl", tmp_path / "whole"), data)
    run = finished("icarl", tmp_path / "run")
    tick = Engine._tick

    def stop(engine: Engine) -> None:
        engine.context.interrupted = True
        tick(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_tick", stop)
        with pytest.raises(Interrupted, match="streamcl resume"):
            feeding.feed(run, data)
    assert comparable(running.resume(run)) == comparable(whole)


def test_training_data_of_the_past_may_go_and_test_data_is_asked_for(tmp_path: Path, finished: Any) -> None:
    run, joint = finished("er", tmp_path / "run"), finished("joint", tmp_path / "joint")
    first, test = Path(images(tmp_path / "jan.npz", 1, turned=True)), Path(images(tmp_path / "jan-test.npz", 1, turned=True, limit=60))
    held = Path(images(tmp_path / "feb.npz", 2, turned=True))
    for folder in (run, joint):
        feeding.feed(folder, str(first), test=str(test))
    feeding.feed(run, str(held), holdout=0.2)
    first.unlink()
    assert feeding.feed(run, images(tmp_path / "mar.npz", 3))["matrix"][-1][5] is not None
    with pytest.raises(DataError, match=r"task 6 \(jan\) is needed again: there is no 'jan.npz'(.|\n)*The data was not taken"):
        feeding.feed(joint, images(tmp_path / "mar.npz", 3))
    for gone, index in ((test, 5), (held, 6)):
        gone.unlink()
        record = run / f"fed/000{index - 4}.json"
        with pytest.raises(
            DataError, match=rf'{gone} is gone.*or give up the scores of task {index + 1} .*write 0 for "test".* in {record}'
        ) as told:
            feeding.feed(run, images(tmp_path / "apr.npz", 4))
        assert "\n" not in str(told.value)
        record.write_text(record.read_text().replace('"test": 60' if index == 5 else '"test": 8', '"test": 0'))
    matrix = feeding.feed(run, images(tmp_path / "apr.npz", 4))["matrix"]
    assert matrix[7][5] is not None and matrix[8][5] is None and len(matrix[8]) == 7 and all(value is not None for value in matrix[8][:5])


def test_fed_data_that_changed_is_refused(tmp_path: Path, finished: Any) -> None:
    run = finished("er", tmp_path / "run")
    feeding.feed(run, images(tmp_path / "jan.npz", 1), holdout=0.1)
    images(tmp_path / "jan.npz", 1, 2)
    with pytest.raises(DataError, match=r"jan\.npz has changed since the run was made"):
        feeding.feed(run, images(tmp_path / "feb.npz", 2))


def test_data_that_the_run_has_already_is_refused_unless_again_is_given(
    tmp_path: Path, finished: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = finished("gacil", tmp_path / "run", log=["progress"])
    feeding.feed(run, images(tmp_path / "jan.npz", 3), test=images(tmp_path / "exam.npz", 3, limit=60))
    before = contents(run)
    refused = {
        shutil.copy(tmp_path / "jan.npz", tmp_path / "copy.npz"): r"copy is in the run already, as task 6 \(jan\): .*give --again",
        str(tmp_path / "exam.npz"): r"exam is in the run already, as the test data of task 6 \(jan\)",
        "digits": "digits is in the run already, as what it began with",
    }
    for data, message in refused.items():
        with pytest.raises(RunError, match=message):
            feeding.feed(run, str(data))
        assert contents(run) == before
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["streamcl", "feed", str(run), str(tmp_path / "copy.npz"), "--again"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().out
    assert left.value.code == 0 and "warning: copy was in the run already, as task 6 (jan)" in said
    assert "warning: copy has no test part: nothing is scored of it" in said


def test_data_sets_that_lie_in_one_folder_are_told_apart_by_their_source(tmp_path: Path, finished: Any) -> None:
    (tmp_path / "own.py").write_text(
        OWN_SOURCE.replace("    def load", f"    def files(self):\n        return [{str(tmp_path / 'store')!r}]\n\n    def load")
    )
    (tmp_path / "store").mkdir()
    images(tmp_path / "store/all.npz", 1)
    run = finished("gacil", tmp_path / "run")
    one, other = (json.dumps({"name": f"{tmp_path}/own.py:Own", "wrong": wrong}) for wrong in ("nothing", "nothing else"))
    feeding.feed(run, one)
    assert len(feeding.feed(run, other)["tasks"]) == 7
    with pytest.raises(RunError, match=r"in the run already, as task 6"):
        feeding.feed(run, one)


def test_validation_and_single_pass_streams_go_on_as_they_began(tmp_path: Path) -> None:
    run = table_run(tmp_path, strategy="gacil", validation=0.2, online=True)
    scores = feeding.feed(run, write_rows(tmp_path / "more.csv", rows(50, 6.0, "low", "new")), holdout=0.2)
    assert (scores["tasks"][-1]["train"], scores["tasks"][-1]["validation"], scores["tasks"][-1]["test"]) == (32, 8, 10)
    stream = running.stream_of(config.load(run / "config.yaml"), RunFolder(run))
    stream.open(0)
    train = stream.task(2).train
    train[torch.tensor([0])]
    with pytest.raises(DataError, match="single-pass"):
        train[torch.tensor([0])]


def test_the_command_line_says_what_the_run_takes_and_exits_with_3(
    tmp_path: Path, finished: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = finished("gacil", tmp_path / "run", log=["progress"])
    table = write_rows(tmp_path / "new.csv", rows(10, 1.0, "a", "b"))
    monkeypatch.setattr(sys, "argv", ["streamcl", "feed", str(run), table])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = capsys.readouterr().err
    assert stop.value.code == 3 and told.count("\n") == 1
    assert "new has vector (decimal numbers, 2), and this run takes image (whole numbers from 0 to 16, 1 x 8 x 8)" in told
    images(tmp_path / "feb.npz", 3, 4, turned=True)
    words = ["feed", "run", "feb.npz", "--holdout", "0.2", "--name", "february"]
    fed = subprocess.run([*COMMAND, *words], cwd=tmp_path, capture_output=True, text=True)
    assert fed.returncode == 0 and "gacil on class_incremental" in fed.stdout and "task 6/6: 64 samples of turned 3" in fed.stdout, (
        fed.stderr
    )
    assert json.loads((run / "scores.json").read_text())["tasks"][5]["name"] == "february"
