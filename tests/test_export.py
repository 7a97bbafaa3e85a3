"""`streamcl export`: a folder that others load without the run and its data, that predicts the same, and that holds no sample."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from small_runs import on_digits, small_run
from test_backbones import SENTENCES, TINY, bert_folder, timm_weights  # noqa: F401

import streamcl
from streamcl import cli, exporting, feeding, running
from streamcl.checkpoint import Checkpoints
from streamcl.engine import Engine
from streamcl.errors import ConfigError, DiskError, Interrupted, PluginError, RunError

PIXELS, DIGITS = load_digits(return_X_y=True)
PIXELS = PIXELS.reshape(-1, 1, 8, 8).astype(np.uint8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each strategy, which no test may change."""
    folder = tmp_path_factory.mktemp("runs")
    for strategy in on_digits():
        running.run(small_run(strategy, log=[]), out=folder / strategy)
    return {path.name: path for path in folder.iterdir()}


def same_answers(one: Any, other: Any, inputs: Any) -> bool:
    batch = one.batch(inputs)
    mine, theirs = one.answer(batch), other.answer(batch)
    heads = mine.heads.keys() == theirs.heads.keys() and all(torch.equal(mine.heads[name], theirs.heads[name]) for name in mine.heads)
    return (
        heads and torch.equal(mine.scores, theirs.scores) and one.classes == other.classes and one.predict(inputs) == other.predict(inputs)
    )


@pytest.mark.parametrize("strategy", on_digits())
def test_the_run_and_its_export_predict_the_same_bit_for_bit(strategy: str, runs: dict[str, Path], tmp_path: Path) -> None:
    exported = streamcl.load(exporting.export(runs[strategy], tmp_path / "model"), device="cpu")
    learned = streamcl.load(runs[strategy])
    assert same_answers(learned, exported, PIXELS)
    assert set(exported.predict(PIXELS)) <= {str(digit) for digit in range(10)} and len(exported.classes) == 10


def test_loading_needs_neither_the_data_nor_the_run_and_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(
        "a,b,label\n" + "".join(f"{i % 7},{i % 3 + 5 * (i % 2)},{'even' if i % 2 else 'odd'}\n" for i in range(80))
    )
    data = {"name": "csv", "path": str(tmp_path / "data.csv"), "test_fraction": 0.25}
    running.run(small_run("icarl", scenario={"name": "class_incremental", "data": data, "tasks": 2}, log=[]), out=tmp_path / "run")
    (tmp_path / "data.csv").unlink()
    state, inputs = torch.get_rng_state(), np.array([[1, 2], [3, 7.5]])
    learned = running.load(tmp_path / "run")
    exporting.export(tmp_path / "run", tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    shutil.rmtree(tmp_path / "run")
    assert same_answers(learned, streamcl.load(tmp_path / "model"), inputs)


def test_no_sample_leaves_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    for strategy in ("er", "icarl"):
        exporting.export(runs[strategy], tmp_path / strategy)
        state = Checkpoints(runs[strategy] / "checkpoints").load(pytest.fail)
        assert state is not None
        held = state["memory"]["exemplars"]["held"]["inputs"]["image"]
        assert len(held) == 60
        raw = {sample.numpy().tobytes() for sample in held}
        scaled = {sample.numpy().tobytes() for sample in held / 16}
        parts = [path.read_bytes() for path in (runs[strategy] / "checkpoints/parts").iterdir()]
        assert all(any(sample in part for part in parts) for sample in raw)  # so it would be found
        for file in (tmp_path / strategy).iterdir():
            assert not any(sample in file.read_bytes() for sample in raw | scaled), file
        names = {name for file in (tmp_path / strategy).glob("*.safetensors") for name in load_file(file)}
        assert all(name.startswith(("backbone.", "head.", "prototypes.")) for name in names)


def test_what_the_folder_says(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = exporting.export(runs["icarl"], tmp_path / "model")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors", "strategy.safetensors"}
    about = json.loads((folder / "config.json").read_text())["streamcl"]
    scores = json.loads((runs["icarl"] / "scores.json").read_text())
    assert (
        about["classes"] == scores["per_class"]["classes"]
        and about["strategy"]["name"] == "icarl"
        and about["version"] == streamcl.__version__
    )
    assert about["backbone"]["name"] == "mlp" and about["backbone"]["hidden"] == [32] and about["preprocessing"] == []
    assert about["stream"]["modalities"] == {"image": {"kind": "image", "shape": [1, 8, 8], "high": 16}}
    assert about["licence"] == {"weights": "Apache-2.0", "data": "CC BY 4.0"}
    tensors = load_file(folder / "strategy.safetensors")
    assert tensors["prototypes.labels"].tolist() == list(range(10)) and tensors["prototypes.means"].shape == (10, 32)
    readme = (folder / "README.md").read_text()
    for value in (scores["final"], scores["forgetting"], *scores["matrix"][-1]):
        assert f"{100 * value:.1f}" in readme
    assert re.search(r"\| after \| 1 \| 2 .*\n.*\n\| 1: classes", readme)  # people count tasks from 1
    assert "whole numbers are divided by 16" in readme and str(tmp_path) not in readme + (folder / "config.json").read_text()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_who_may_read_an_export_is_what_the_umask_says(mask: int, runs: dict[str, Path], tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        folder = exporting.export(runs["icarl"], tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        (path.name for path in folder.iterdir()), 0o666 & ~mask
    )


def test_the_card_names_the_licence_of_every_delivery(runs: dict[str, Path], tmp_path: Path) -> None:
    fed = shutil.copytree(runs["er"], tmp_path / "fed")
    for month, rows in (("jan", slice(0, 40)), ("feb", slice(40, 80))):
        np.savez(tmp_path / f"{month}.npz", x=PIXELS[rows], y=DIGITS[rows])
        feeding.feed(fed, str(tmp_path / f"{month}.npz"), holdout=0.2)
    feeding.feed(fed, "{name: digits, split_seed: 1}", name="mar")
    licence = "CC BY 4.0; of the deliveries jan, feb: none stated; of the delivery mar: CC BY 4.0"
    folder = exporting.export(fed, tmp_path / "model")
    assert f"Data that it was trained on: {licence}." in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["streamcl"]["licence"]["data"] == licence


@pytest.mark.parametrize("strategy", ["finetune", "gacil"])
def test_the_code_on_the_card_runs(strategy: str, runs: dict[str, Path], tmp_path: Path) -> None:
    folder = exporting.export(runs[strategy], tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "elsewhere/README.md").read_text(), re.DOTALL)
    assert len(code) == 2 and folder.name == "model"
    check = {
        "finetune": "assert head.weight.shape == (10, 32) and len(classes) == 10",
        "gacil": "assert beside['strategy.expansion'].shape == (64, 100)",
    }
    script = "\n".join([*code, check[strategy], "import numpy; print(model.predict(numpy.zeros((1, 1, 8, 8), 'uint8')))"])
    shown = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    answer = streamcl.load(runs[strategy]).predict(np.zeros((1, 1, 8, 8), np.uint8))
    assert shown.stdout.splitlines()[-1] == str(answer)


def test_preprocessing_travels_as_plain_numbers(tmp_path: Path) -> None:
    test = [{"name": "resize", "size": [6, 6]}, {"name": "center_crop", "size": 5}, {"name": "normalize", "mean": [0.3], "std": [0.7]}]
    scenario = {
        "name": "class_incremental",
        "data": "digits",
        "tasks": 5,
        "transforms": {"train": [{"name": "crop", "padding": 1}, *test], "test": test},
    }
    model = {"backbone": {"name": "convnet"}}
    running.run(small_run("finetune", scenario=scenario, model=model, strategy={"epochs": 1}, log=[]), out=tmp_path / "run")
    exporting.export(tmp_path / "run", tmp_path / "model")
    written = json.loads((tmp_path / "model/config.json").read_text())["streamcl"]["preprocessing"]
    assert [step["name"] for step in written] == ["resize", "center_crop", "normalize"] and written[2]["std"] == pytest.approx([0.7])
    assert same_answers(running.load(tmp_path / "run"), streamcl.load(tmp_path / "model"), PIXELS[:200])


@pytest.mark.parametrize(("backbone", "strategy"), [("hf", "er"), ("minilm", "icarl")])
def test_a_hugging_face_model_is_one_that_transformers_loads(
    backbone: str, strategy: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = request.getfixturevalue("bert_folder")
    lines = [{"text": SENTENCES[i % 2] + " cat" * (i % 5), "label": ("sat", "ran")[i % 2]} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"name": "csv", "path": str(tmp_path / "data.jsonl"), "test_fraction": 0.25}
    made = {"hf": {"name": "hf", "model": str(folder), "max_length": 12}, "minilm": {"name": "minilm", "folder": str(folder)}}[backbone]
    scenario = {"name": "class_incremental", "data": data, "tasks": 2}
    running.run(small_run(strategy, scenario=scenario, model={"backbone": made}, strategy={"epochs": 1}, log=[]), out=tmp_path / "run")
    learned, model = running.load(tmp_path / "run"), tmp_path / "model"
    exporting.export(tmp_path / "run", model)
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "run")
    exported = streamcl.load(model)
    assert same_answers(learned, exported, SENTENCES[:2]) and exported.model.backbone.licence == "apache-2.0"
    net, tokenizer = AutoModel.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in learned.model.backbone.net.state_dict().items())
    hidden = net(**tokenizer(SENTENCES[0], return_tensors="pt")).last_hidden_state.mean(dim=1)
    if backbone == "hf":  # the card's way: pooled features through the head
        head = load_file(model / "head.safetensors")
        by_hand = torch.nn.functional.linear(hidden, head["head.weight"], head["head.bias"])
        torch.testing.assert_close(by_hand, learned.scores([SENTENCES[0]]))
    for file in model.glob("*.json"):
        assert str(tmp_path) not in file.read_text()
    code = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)[1]
    assert 'AutoModel.from_pretrained(".")' in code and "head.safetensors" in code


def test_named_weights_travel_with_the_model(tmp_path: Path) -> None:
    file = timm_weights(tmp_path)
    np.savez(tmp_path / "data.npz", x=PIXELS[:24], y=DIGITS[:24] % 2)
    data = {"name": "arrays", "path": str(tmp_path / "data.npz"), "test_fraction": 0.3}
    backbone = {"name": "timm", "model": TINY, "weights": str(file), "frozen": True}
    config = small_run("gacil", scenario={"name": "class_incremental", "data": data, "tasks": 2}, model={"backbone": backbone}, log=[])
    running.run(config, out=tmp_path / "run")
    learned = running.load(tmp_path / "run")
    exporting.export(tmp_path / "run", tmp_path / "model")
    file.unlink()
    assert same_answers(learned, streamcl.load(tmp_path / "model"), PIXELS[:6])


OWN = """
import torch
from streamcl.stream import Prediction, Task
from streamcl.strategy import Strategy

class Shifted(Strategy):
    {declared}
    def learn(self, task: Task) -> None:
        self.model.grow(max(task.seen) + 1)
        for batch in self.context.batches(task.train, 64):
            self.memory.exemplars.add(batch)
        self.shift = torch.arange(self.model.classes).float()

    def predict(self, batch):
        {decides}
        return Prediction(self.model(batch) + self.shift)

    def state(self):
        return dict(shift=self.shift) if hasattr(self, "shift") else dict()

    def restore(self, state):
        self.shift = state["shift"]
"""


def own_run(tmp_path: Path, declared: str = "", decides: str = "") -> Path:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/own.py").write_text(OWN.format(declared=declared, decides=decides))
    config = small_run("finetune", strategy={"name": f"{tmp_path}/plugins/own.py:Shifted"}, log=[])
    running.run(config, out=tmp_path / "run")
    return tmp_path / "run"


def test_a_strategy_of_ones_own_is_named_and_its_code_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = own_run(tmp_path, 'predicts_with = ("shift",)')
    model = exporting.export(run, tmp_path / "model")
    about = json.loads((model / "config.json").read_text())["streamcl"]
    assert about["strategy"] == {"name": "own.py:Shifted"} and load_file(model / "strategy.safetensors")["strategy.shift"].tolist() == [
        *range(10)
    ]
    with pytest.raises(ConfigError, match=r"there is no file .*own\.py"):
        streamcl.load(model)
    monkeypatch.chdir(tmp_path / "plugins")
    assert same_answers(running.load(run), streamcl.load(model), PIXELS[:50])
    card = (model / "README.md").read_text()
    assert "from where you keep your own own.py:Shifted (it is not in this folder" in card and 'load("PATH/OF/THIS/FOLDER")' in card


def test_no_code_of_an_exported_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exporting.export(own_run(tmp_path, 'predicts_with = ("shift",)'), tmp_path / "model")
    source = (tmp_path / "plugins/own.py").read_text()
    harm = f"open({str(tmp_path / 'harm')!r}, 'w').close()\n"
    (model / "own.py").write_text(harm + source)
    (model / "inside").mkdir()
    (model / "inside/own.py").write_text(harm + source)
    config = json.loads((model / "config.json").read_text())
    term = "from streamcl.strategy import Term\nclass Harm(Term):\n    pass\n"
    (model / "term.py").write_text(harm + term)

    def refused(where: Path, folder: str, **changes: Any) -> None:
        (model / "config.json").write_text(json.dumps({"streamcl": {**config["streamcl"], **changes}}))
        monkeypatch.chdir(where)
        with pytest.raises(
            RunError, match=r"names the plug-in .*\.py:\w+, and no code of an exported folder is run.*load the model by its path"
        ):
            streamcl.load(folder)
        assert not (tmp_path / "harm").exists()

    refused(model, ".")
    refused(model / "inside", "..")
    (tmp_path / "elsewhere").symlink_to(model)
    refused(tmp_path / "elsewhere", str(tmp_path / "elsewhere"))
    for path in ("model/own.py", f"{model}/own.py", "plugins/../model/own.py"):
        refused(tmp_path, "model", strategy={"name": f"{path}:Shifted"})
    refused(tmp_path, "model", strategy={"name": "finetune", "with": ["model/term.py:Harm"]})
    refused(tmp_path, "model", strategy={"name": "model/term.py:Harm"})


@pytest.mark.parametrize(
    ("declared", "decides"),
    [("", ""), ('predicts_with = ("shift",)', "if len(self.memory.exemplars) == 0: return Prediction(self.model(batch))")],
    ids=["undeclared", "exemplars"],
)
def test_a_strategy_that_needs_more_to_predict_is_refused(declared: str, decides: str, tmp_path: Path) -> None:
    run = own_run(tmp_path, declared, decides)
    with pytest.raises(PluginError, match=r"Shifted (cannot predict from|predicts something else from) what is exported.*predicts_with"):
        exporting.export(run, tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"plugins", "run"}


def test_a_folder_that_is_not_empty_is_refused_and_an_empty_one_is_filled(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert exporting.export(runs["er"], tmp_path / "model") == tmp_path / "model"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="model is not empty: name a folder that does not exist yet"):
        exporting.export(runs["er"], tmp_path / "model")
    with pytest.raises(RunError, match="is a file"):
        exporting.export(runs["er"], tmp_path / "model/README.md")
    with pytest.raises(RunError, match="is no run"):
        exporting.export(tmp_path / "model", tmp_path / "again")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing_behind(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match="the disk is full"):
            exporting.export(runs["icarl"], tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_export_that_cannot_be_read_is_told(runs: dict[str, Path], tmp_path: Path) -> None:
    model = exporting.export(runs["gacil"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({"streamcl": {**config["streamcl"], "format": 99}}))
    with pytest.raises(RunError, match=r"exported by a newer streamcl \(format 99"):
        streamcl.load(model)
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(RunError, match="is no model that streamcl exported"):
        streamcl.load(model)
    (model / "config.json").write_text(json.dumps(config))
    (model / "strategy.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"strategy\.safetensors cannot be read"):
        streamcl.load(model)
    save_file({"strategy.expansion": torch.zeros(64, 100)}, model / "strategy.safetensors")
    with pytest.raises(RunError, match="is no run"):
        streamcl.load(tmp_path)
    save_file({"head.weight": torch.zeros(0, 64)}, model / "model.safetensors")
    with pytest.raises(RunError, match=r"does not hold the tensors of its model: missing \['head.bias'\]"):
        streamcl.load(model)


def test_an_interrupted_run_is_exported_as_far_as_it_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = Engine._tick

    def stop(engine: Engine) -> None:
        engine.context.interrupted = engine.context.task.index == 3
        tick(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_tick", stop)
        with pytest.raises(Interrupted):
            running.run(small_run("icarl", log=[], engine={"checkpoint": {"every": {"steps": 2}}}), out=tmp_path / "run")
    exporting.export(tmp_path / "run", tmp_path / "model")
    exported = streamcl.load(tmp_path / "model")
    assert len(exported.classes) == 8 and same_answers(running.load(tmp_path / "run"), exported, PIXELS[:100])
    assert "learned its classes in 3 tasks" in (tmp_path / "model/README.md").read_text()


def test_a_run_that_began_with_anothers_model_stands_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    first = shutil.copytree(runs["finetune"], tmp_path / "first")
    running.run(small_run("er", model={"run": str(first), "backbone": None}, log=[]), out=tmp_path / "second")
    learned = running.load(tmp_path / "second")
    shutil.rmtree(first)
    exporting.export(tmp_path / "second", tmp_path / "model")
    assert same_answers(learned, streamcl.load(tmp_path / "model"), PIXELS[:100])


def test_the_command_says_where_the_model_is_and_exits_with_2_where_there_is_one(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["streamcl", "export", str(runs["er"]), "model"])
    codes = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            cli.main()
        codes.append(stop.value.code)
    shown = capsys.readouterr()
    assert codes == [0, 2] and shown.out == f"exported to {tmp_path / 'model'}\n"
    assert shown.err == "streamcl: model is not empty: name a folder that does not exist yet\n"
