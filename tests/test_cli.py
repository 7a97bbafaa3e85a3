"""The command line: what it says to a person, above all to one who made a mistake, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from small_runs import comparable, small_run

from streamcl import config, listing, running
from streamcl.cli import app, main
from streamcl.run_folder import RunFolder

Answer = tuple[int, str, str]  # exit code, standard output, standard error


@pytest.fixture
def streamcl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command line in a folder of its own, with the file `config.yaml` in it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "config.yaml")

    def call(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["streamcl", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return int(stop.value.code or 0), printed.out, printed.err

    return call


def write(path: Path, **changes: object) -> None:
    path.write_text(yaml.safe_dump(small_run("er", **{"strategy": {"epochs": 1}, **changes}), sort_keys=False))


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# -- the words of a command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "no such command 'rnu'. Did you mean 'run'?"),
        (["frobnicate"], "no such command 'frobnicate'; see streamcl --help"),
        (["run"], "missing argument 'CONFIG'; see streamcl run --help"),
        (["run", "config.yaml", "--oot", "x"], "--oot"),
        (["sweep", "config.yaml", "--workers", "0"], "'--workers'"),
        (["sweep", "config.yaml", "--workers", "two"], "'--workers'"),
        (["list", "strategies", "sources"], "unexpected extra argument"),
        (["list", "stratgies"], "there is no kind of plug-in 'stratgies': did you mean 'strategies'?"),
        (["show", "icral"], "did you mean 'icarl'?"),
        (["show", "er", "--kind", "source"], "no source is called 'er'"),
        (["new", "strategy", "9lives"], "'9lives' cannot name a strategy"),
        (["resume", "nowhere"], "nowhere is no run"),
        (["compare", "nowhere"], "nowhere is no run"),
        (["run", "config.yaml", "strategy.epochs"], "must be KEY=VALUE"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(
    words: list[str], message: str, streamcl: Callable[..., Answer], tmp_path: Path
) -> None:
    before = names(tmp_path)
    code, out, err = streamcl(*words)
    assert (code, out) == (2, "") and message in err and err.startswith("streamcl: ") and err.count("\n") == 1
    assert names(tmp_path) == before


def test_help_names_every_command_and_none_fails(streamcl: Callable[..., Answer]) -> None:
    code, out, _ = streamcl("--help")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert code == 0 and streamcl() == (0, out, "")
    for name in ("run", "resume", "feed", "eval", "export", "compare", "sweep", "list", "show", "new", "check", "schema"):
        assert f"\n  {name} " in out and name in commands
        code, about, _ = streamcl(name, "--help")
        assert code == 0 and about.startswith(f"Usage: streamcl {name}")


# -- the configuration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy=icral", "unknown strategy 'icral': did you mean 'icarl'?"),
        ("strategy.epoch=3", "unknown option of er: did you mean 'epochs'?"),
        ("sede=3", "unknown key: did you mean 'seed'?"),
        ("strategy.epochs=many", "strategy.epochs: must be a positive integer, got 'many'"),
        ("strategy.epochs=0", "strategy.epochs: must be a positive integer, got 0"),
        ("scenario.repeat=1.5", "scenario.repeat: must be a number from 0 to 1, got 1.5"),
        ("model.backbone=null", "give either backbone (a new model) or run"),
        ("strategy=nowhere.py:Mine", "there is no file nowhere.py"),
        ("strategy=broken.py:Mine", "broken.py:3: ModuleNotFoundError: No module named 'no_such_module'"),
        ("strategy=syntax.py:Mine", "syntax.py:1: this is not Python"),
    ],
)
def test_a_wrong_setting_is_told_with_what_would_be_right(
    command: str, override: str, message: str, streamcl: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(f"from streamcl.strategy import Strategy\n\nimport no_such_module\n{MINE}")
    (tmp_path / "syntax.py").write_text("class Mine(:\n")
    before = names(tmp_path)
    code, out, err = streamcl(command, "config.yaml", override, *(["--out", "run"] if command == "run" else []))
    assert (code, out) == (2, "") and message in err
    assert names(tmp_path) - {"__pycache__"} == before


MINE = """
class Mine(Strategy):
    def learn(self, task):
        ratio = 1 / len(task.classes[2:])  # the third task's mistake
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scenario: {name: class_incremental\nstrategy: er\n", "wrong.yaml:2:"),
        ("seed: 1\nseed: 2\n", "wrong.yaml:2:1: the key 'seed' stands twice: first at 1:1"),
        (
            "a: &a [1, 1]\n"
            + "".join(f"{x}: &{x} [*{y}, *{y}]\n" for x, y in zip("bcdefghijklmnopqrstu", "abcdefghijklmnopqrst", strict=True)),
            "anchors",
        ),
        ("", "wrong.yaml"),
        ("x: " + "y" * 1_100_000, "a configuration has at most"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_place(
    text: str, message: str, streamcl: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    code, out, err = streamcl("run", "wrong.yaml", "--out", "run")
    assert (code, out) == (2, "") and message in err
    assert not (tmp_path / "run").exists()


def test_what_only_shows_when_the_run_is_built_leaves_no_folder_behind(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    code, _, err = streamcl("run", "config.yaml", "scenario.tasks=50", "--out", "run")
    assert code == 2 and "tasks is 50 and there are only 10 classes" in err
    assert names(tmp_path) == {"config.yaml"}


# -- the data ------------------------------------------------------------------------------------------------------------------


def table(path: Path, *rows: str) -> dict[str, object]:
    path.write_text("\n".join(["a,b,label", *rows]) + "\n")
    return {"name": "csv", "path": str(path), "label": "label", "test_fraction": 0.5}


def arrays(path: Path, x: np.ndarray, **more: object) -> dict[str, object]:
    np.savez(path, x=x.astype(np.float32), y=np.arange(len(x)) % 4)
    return {"name": "arrays", "path": str(path), "test_fraction": 0.5, **more}


def with_nan(count: int) -> np.ndarray:
    x = np.ones((count, 3))
    x[7, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda folder: table(folder / "t.csv", "1,2,x", "3,oops,y"), "t.csv, line 3: 'oops' in column 'b' is no number"),
        (lambda folder: table(folder / "t.csv"), "t.csv: there is not a single record in it"),
        (lambda folder: arrays(folder / "a.npz", with_nan(40)), "a.npz, row 7: there are NaN or infinite values"),
        (lambda folder: arrays(folder / "a.npz", np.ones((40, 3)), class_names=["u", "v"]), "a.npz, row 2: the label '2' is not among"),
        (lambda folder: {"name": "csv", "path": str(folder / "nowhere.csv"), "label": "label"}, "there is no 'nowhere.csv'"),
    ],
)
def test_wrong_data_is_told_with_its_file_and_row_and_exit_code_3(
    data: Callable[[Path], dict[str, object]], message: str, streamcl: Callable[..., Answer], tmp_path: Path
) -> None:
    write(tmp_path / "data.yaml", scenario={"data": data(tmp_path), "tasks": 2})
    before = names(tmp_path)
    code, out, err = streamcl("run", "data.yaml", "--out", "run")
    assert (code, out) == (3, "") and message in err and err.count("\n") == 1
    assert names(tmp_path) == before


# -- runs ----------------------------------------------------------------------------------------------------------------------


def test_a_plugin_that_raises_fails_the_run_and_after_the_fix_it_goes_on(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    text = "from streamcl.strategy import GradientStrategy\n\n\nclass Mine(GradientStrategy):\n    def after_task(self, task):\n        "
    (tmp_path / "mine.py").write_text(f"{text}1 / (2 - task.index)\n")
    write(tmp_path / "config.yaml", log=["progress"])
    code, _, err = streamcl("run", "config.yaml", "strategy=mine.py:Mine", "--out", "run")
    assert code == 2 and "ZeroDivisionError: division by zero (task 3, classes" in err and "streamcl resume" in err
    assert f"{tmp_path / 'mine.py'}:6 in after_task: 1 / (2 - task.index)" in err
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["status"], status["cursor"]["tasks_done"]) == ("failed", 2)
    code, out, _ = streamcl("show", "run")
    assert code == 0 and "failed" in out and "division by zero" in out and "streamcl resume run" in out
    (tmp_path / "mine.py").write_text(f"{text}pass\n")
    code, out, _ = streamcl("resume", "run")
    assert code == 0 and "run is done: final accuracy" in out
    assert "warning: mine.py has changed since the run last used it" in out
    whole = running.run("config.yaml", ["strategy=mine.py:Mine"], tmp_path / "whole")
    resumed, whole = json.loads((tmp_path / "run/scores.json").read_text()), json.loads(json.dumps(whole))
    assert resumed.pop("resume") == {"kind": "none", "why": "mine.py changed while the run was under way"}
    assert whole.pop("resume")["kind"] == "bitwise" and comparable(resumed) == comparable(whole)


@pytest.mark.parametrize("error", ["KeyError('key')", "DataError('no such thing')", "ConfigError('wrong')", "TrainingError('it diverged')"])
def test_a_run_that_fails_at_once_says_how_to_go_on_and_does(error: str, streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    text = f"from streamcl.errors import *\nfrom streamcl.strategy import Strategy\n{MINE}"
    (tmp_path / "mine.py").write_text(text.replace("ratio =", f"raise {error}\n        ratio ="))
    code, _, err = streamcl("run", "config.yaml", "strategy=mine.py:Mine", "--out", "run")
    place = f" in {tmp_path}/run/config.yaml" if "Config" in error else ""
    stand = rf"\(task 1, classes \d, \d, step 0\); there is no checkpoint yet; after the fix{place}: streamcl resume {tmp_path}/run\n"
    assert code and re.search(stand, err)
    assert json.loads((tmp_path / "run/status.json").read_text())["error"] in err
    (tmp_path / "mine.py").write_text("from streamcl.strategy import GradientStrategy\n\nclass Mine(GradientStrategy): ...\n")
    assert streamcl("resume", "run")[0] == 0
    assert json.loads((tmp_path / "run/scores.json").read_text())["resume"]["kind"] == "bitwise"  # nothing was learned by the old one


def test_a_folder_that_holds_a_run_or_is_in_use_is_not_touched(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    running.run("config.yaml", ["scenario.tasks=2"], tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"}
    code, _, err = streamcl("run", "config.yaml", "--out", "run")
    assert code == 2 and "holds a run already" in err and "streamcl resume" in err
    holder = RunFolder.open(tmp_path / "run")
    code, _, err = streamcl("resume", "run")
    assert code == 2 and f"in use by process {os.getpid()}" in err
    holder.close()
    assert {path: path.read_bytes() for path in before} == before


# -- list, show, check ---------------------------------------------------------------------------------------------------------


def test_the_list_has_every_plugin_in_its_family_with_evidence_and_licence(streamcl: Callable[..., Answer]) -> None:
    code, out, _ = streamcl("list")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["class", "incremental"] in lines
    assert ["er", "small", "real", "data"] in [line[:4] for line in lines]
    assert ["digits", "CC", "BY", "4.0"] in [line[:4] for line in lines]
    assert streamcl("list", "strategies")[1] in out and streamcl("list", "strategy") == streamcl("list", "strategies")


def test_a_plugin_that_cannot_be_read_is_named_and_spoils_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_broken(kind: str, problems: list[str]) -> dict:
        problems.append(f"{kind}.py:1: this is not Python")
        return {}

    monkeypatch.setattr(listing, "plugins", one_broken)
    assert listing.listing("sinks").splitlines()[-2:] == ["left out, because they cannot be read:", "  sink.py:1: this is not Python"]


def test_list_and_show_import_no_torch() -> None:
    code = (
        "import sys; from streamcl.cli import main\n"
        "def loaded(*words):\n"
        "    sys.argv = ['streamcl', *words]\n"
        "    try: main()\n"
        "    except SystemExit: print(*sorted({'torch', 'pydantic', 'rich'} & sys.modules.keys()), file=sys.stderr)\n"
        "loaded('list'); loaded('show', 'quickstart'); loaded('show', 'icarl')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines() == ["", "pydantic", "pydantic"]


def test_show_of_a_plugin_has_its_text_and_its_options_with_types_defaults_and_owners(streamcl: Callable[..., Answer]) -> None:
    code, out, _ = streamcl("show", "icarl")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and "Rebuffi et al., CVPR 2017" in out
    own, shared = lines.index("options"), lines.index("options of every GradientStrategy")
    assert own < lines.index("epochs a positive integer = 70") < shared < lines.index("clip a positive number or null = null")
    assert "with a list of terms = []" in lines and lines[0].startswith("strategy icarl · class ICaRL · ")
    unfolded = lines.index("optimizer a mapping of optimizer settings")
    assert lines[unfolded + 1].endswith("adamax = sgd") and lines[unfolded + 2] == "lr a positive number = 2.0"
    stages = lines.index("stages a mapping of stages settings")
    assert lines[stages + 1 : stages + 3] == ["first a mapping of stage settings", "epochs a positive integer or null = null"]
    source = streamcl("show", "csv")[1]
    assert "path a path required" in " ".join(source.split()) and "licence: that of the data itself" in source
    assert streamcl("show", "timm:resnet18")[1] == streamcl("show", "timm")[1]


def test_show_of_a_file_of_ones_own_says_what_it_holds(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f'"""Mine: does nothing well."""\n\nfrom streamcl.strategy import Strategy\n{MINE}')
    (tmp_path / "other.py").write_text("x = 1\n")
    assert "Mine: does nothing well." in streamcl("show", "mine.py:Mine")[1]
    code, _, err = streamcl("show", "other.py")
    assert code == 2 and "holds no plug-in" in err and "Strategy" in err and "Adapter" not in err  # there are none yet
    (tmp_path / "odd.py").write_text(f"from streamcl.strategy import Strategy\n{MINE}    def __init__(self, *, size: Tensor = 1): ...\n")
    assert "  size  Tensor  = 1" in streamcl("show", "odd.py")[1]


def test_an_unknown_kind_is_told_with_those_that_have_a_plugin(streamcl: Callable[..., Answer]) -> None:
    err = streamcl("list", "nothing")[2]
    assert "there are scenarios, sources, strategies, " in err and "adapters" not in err


def test_show_of_a_configuration_reads_back_to_the_same_one(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    code, out, _ = streamcl("show", "config.yaml")
    (tmp_path / "shown.yaml").write_text(out)
    assert code == 0 and out.startswith("# licence of source digits: CC BY 4.0\n")
    assert config.load("shown.yaml") == config.load("config.yaml")


@pytest.mark.parametrize("command", ["show", "compare", "resume", "eval"])
def test_a_folder_of_runs_is_told_with_the_runs_in_it(command: str, streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("seed: 0\n")
    code, _, err = streamcl(command, "runs")
    assert code == 2 and re.search(r"; the runs in it are \S*runs/a, \S*runs/b\n", err)


def test_show_of_a_run_has_its_status_matrix_and_cost(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    scores = running.run("config.yaml", ["scenario.tasks=2"], tmp_path / "run")
    code, out, _ = streamcl("show", "run")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and ["status", "done"] in rows and ["tasks", "learned", "2"] in rows
    last = [f"{100 * value:.1f}" for value in (*scores["matrix"][1], scores["final"])]
    assert ["2", *last] in rows
    assert any(row[:1] == ["memory"] for row in rows) and any(row[:2] == ["resume", "bitwise"] for row in rows)


def test_check_names_what_a_run_would_use_and_under_which_licences(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    before = names(tmp_path)
    code, out, _ = streamcl("check", "config.yaml")
    assert code == 0 and out.startswith("config.yaml is in order\n")
    assert "licence of source digits: CC BY 4.0" in out and "licence of backbone mlp: Apache-2.0" in out
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ({"tasks": 3, "increment": 5}, "tasks and increment contradict each other"),
        ({"validation": 1.5, "tasks": 2}, "validation is 1.5"),
        ({"name": "domain_incremental", "by": "speaker", "shift": "rotate"}, "give either by .* or shift"),
        ({"name": "missing_modality", "missing": [{"audio": 1.0, "image": 0.2}]}, "the shares add up to 1.2"),
        ({"name": "test_time", "severity": 6}, "severity"),
        ({"name": "test_time", "corruptions": ["fogg"]}, "did you mean 'fog'"),
    ],
)
def test_check_tells_options_that_cannot_be_together(
    scenario: dict[str, object], message: str, streamcl: Callable[..., Answer], tmp_path: Path
) -> None:
    write(tmp_path / "wrong.yaml", scenario={"name": "class_incremental", "data": "digits", **scenario})
    code, _, err = streamcl("check", "wrong.yaml")
    assert code == 2 and re.search(message, err) and err.count("\n") == 1
    name = scenario.get("name", "class_incremental")
    assert err.startswith("streamcl: wrong.yaml:") and err.count(f"{name}:") <= 1


def test_check_tells_all_that_is_missing_at_once(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    source = {"name": "csv", "path": "nowhere.csv", "test": "neither.csv", "label": "label"}
    write(tmp_path / "data.yaml", scenario={"data": source, "tasks": 2})
    code, _, err = streamcl("check", "data.yaml")
    assert code == 3 and err.count("\n") == 2  # only data is missing
    assert "path: there is no 'nowhere.csv'" in err and "test: there is no 'neither.csv'" in err and "data.yaml:" in err
    write(tmp_path / "both.yaml", scenario={"data": source, "tasks": 2}, model={"run": "gone", "backbone": None})
    code, _, err = streamcl("check", "both.yaml")
    assert code == 2 and "model.run: gone is no run" in err and "nowhere.csv" in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scenario.tasks=11"], "command line: 'scenario.tasks=11': scenario.tasks: is 11, and digits has only 10 classes"),
        (["scenario.data=sklearn:iris"], "config.yaml:4:10: scenario.tasks: is 5, and sklearn:iris has only 3 classes"),
        (["engine.device=cuda"], "engine.device: is cuda, and this machine has no CUDA device: use auto or cpu"),
    ],
)
def test_check_sees_more_tasks_than_classes_and_a_device_that_is_not_there(
    overrides: list[str], message: str, streamcl: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "cuda_devices", lambda: 0)
    assert streamcl("check", "config.yaml", *overrides) == (2, "", f"streamcl: {message}\n")


@pytest.mark.parametrize(
    ("shipped", "override", "message"),
    [
        ("test_time/tent", "model.backbone=mlp", "tent adapts weight and bias of normalisation layers.*this model has none"),
        ("test_time/tent", "strategy=sumi", "sumi.*modalit"),
        ("test_time/casp", "strategy=tent", "the target of this stream is value"),
        ("test_time/tent", "strategy=er", "er learns from labels"),
        ("test_time/tent", "scenario.part=train online.guard=true online.canary=8", "needs data from before any shift"),
        ("quickstart", "strategy=tent", "it belongs on a test-time stream"),
        ("quickstart", "strategy=cggm", "does not keep an encoder for each modality"),
        ("quickstart", "strategy=er memory.exemplars=0", "er needs exemplars"),
    ],
)
def test_check_lets_the_stream_the_model_and_the_method_refuse_each_other_and_trains_nothing(
    shipped: str, override: str, message: str, streamcl: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMCL_CACHE", str(tmp_path / "cache"))
    before = names(tmp_path)
    code, out, err = streamcl("check", shipped)
    assert code == 0 and out.endswith("the stream was opened and the model built, and the strategy takes both; nothing was trained\n"), err
    code, _, err = streamcl("check", shipped, *override.split())
    assert code == 2 and re.search(message, err) and err.count("\n") == 1
    assert names(tmp_path) == before


def test_check_says_what_it_does_not_check(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    unread = "not checked, because the data was not read: whether its form fits"
    assert unread in streamcl("check", "config.yaml", "scenario.data=torchvision:MNIST")[1]
    assert unread in streamcl("check", "config.yaml", "model.backbone=timm:resnet18")[1]
    write(tmp_path / "data.yaml", scenario={"data": table(tmp_path / "t.csv", "1,2,x"), "tasks": 2})
    assert "not checked, because the data was not read: how many classes it has" in streamcl("check", "data.yaml")[1]


def test_a_hook_that_is_spelt_wrong_is_told_by_check_and_when_the_run_starts(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from streamcl import GradientStrategy\nclass Mine(GradientStrategy):\n    def los(self, batch): ...\n"
    )
    write(tmp_path / "config.yaml", log=["progress"])
    for words in (["check", "config.yaml"], ["run", "config.yaml", "scenario.tasks=2", "--out", "run"]):
        code, out, _ = streamcl(*words, "strategy=mine.py:Mine")
        assert code == 0
        assert "warning: mine.py:3: Mine.los overrides nothing, and nothing calls it: did you mean 'loss'?" in out


def test_the_driver_is_asked_for_as_many_devices_as_torch_finds() -> None:
    import torch

    if torch.version.cuda is None:
        pytest.skip("torch was built without CUDA")
    assert listing.cuda_devices() == torch.cuda.device_count()


def test_a_source_has_the_classes_that_it_says() -> None:
    for name in ("digits", "sklearn:iris", "sklearn:wine", "sklearn:breast_cancer"):
        source = config.plugin_spec("source", name)
        settings = running.as_config(small_run("er", scenario={"name": "class_incremental", "data": name, "tasks": 2}))
        assert listing._classes(settings) == len(source.build().load().class_names)


def test_the_schema_is_json(streamcl: Callable[..., Answer]) -> None:
    code, out, _ = streamcl("schema")
    assert code == 0 and json.loads(out)["properties"]["seed"]


# -- faults --------------------------------------------------------------------------------------------------------------------


def test_a_fault_of_ours_is_one_line_that_asks_to_report_it(
    streamcl: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*words: str) -> str:
        raise IndexError("list index\nout of range")

    monkeypatch.setattr(listing, "show", fault)
    code, out, err = streamcl("show", "er")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "IndexError: list index out of range" in err and "please report it" in err
    monkeypatch.setenv("STREAMCL_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["streamcl", "show", "er"])
    with pytest.raises(SystemExit):
        main()
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_stops_reading_is_no_error() -> None:
    ran = subprocess.run(f"{sys.executable} -m streamcl.cli schema | head -c 1", shell=True, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("{", "")
