"""YAML becomes a checked RunConfig, or a ConfigError that says where, what, and what would be right."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamcl.config import from_mapping, load, plugin_spec
from streamcl.errors import ConfigError, PluginError
from streamcl.options import Optimizer
from streamcl.plugins import KINDS, REQUIRED, plugins
from streamcl.schema import schema

FILES = {
    "scenario": {
        "stream": """
from streamcl.stream import Scenario
class Stream(Scenario):
    def __init__(self, *, data: Source, tasks: PositiveInt | None = None, order: Literal["seed", "given"] | list[str | int] = "seed",
                 **options): ...
"""
    },
    "source": {
        "digits": "from streamcl.stream import Source\nclass D(Source):\n    def __init__(self, *, part: Fraction = 0.3): ...",
        "vision": """
from streamcl.stream import Source
class V(Source):
    def __init__(self, *, set: str, root: Path | None = None): ...
""",
    },
    "strategy": {
        "finetune": "from streamcl.strategy import GradientStrategy\nclass F(GradientStrategy): ...",
        "icarl": """
from streamcl.strategy import GradientStrategy
class I(GradientStrategy):
    def __init__(self, *, tau: float = 1.0, sizes: tuple[int, ...] = (1, 2), pair: tuple[int, str] = (1, "a"), flag: bool = False,
                 anything: Any = None, named: dict[str, float] = {}, label: str | int = "x", epochs: PositiveInt = 70,
                 optimizer: Optimizer = Optimizer(lr=2.0), **options): ...
""",
    },
    "term": {"ewc": "from streamcl.strategy import Term\nclass E(Term):\n    def __init__(self, *, strength: float = 1.0): ..."},
    "backbone": {
        "mlp": "from streamcl.nn.backbone import Backbone\nclass M(Backbone):\n    def __init__(self, *, width: PositiveInt = 8): ...",
        "timm": """
from streamcl.nn.backbone import Backbone
class T(Backbone):
    def __init__(self, *, model: str, frozen: bool = False): ...
""",
    },
    "memory": {
        "faiss": """
from streamcl.contracts import Memory
class M(Memory):
    def __init__(self, *, exemplars: NonNegativeInt = 0, select: SelectionPolicy | None = None): ...
"""
    },
    "policy": {"herding": "from streamcl.contracts import SelectionPolicy\nclass H(SelectionPolicy): ..."},
    "sink": {name: "from streamcl.events import Sink\nclass S(Sink): ..." for name in ("progress", "jsonl", "tensorboard", "report")},
    "transform": {"flip": "from streamcl.stream import Transform\nclass F(Transform):\n    def __init__(self, *, p: Fraction = 0.5): ..."},
}

VALID = """\
name: first
seed: 3
scenario: {name: stream, data: digits, tasks: 5}
strategy:
  name: icarl
  epochs: 20
  optimizer: {name: adam, lr: 1e-3, betas: [0.9, 0.99]}
  with: [{name: ewc, strength: 10}, ewc]
model: {backbone: "timm:resnet18"}
memory: {exemplars: 200, select: herding}
engine: {device: "cuda:1", checkpoint: {every: {steps: 5}}}
log: [progress, {name: jsonl}]
"""


@pytest.fixture(scope="module", autouse=True)
def rooms(tmp_path_factory):
    """Small rooms of plug-ins, so that these tests depend on no method."""
    base = tmp_path_factory.mktemp("rooms")
    with pytest.MonkeyPatch.context() as patch:
        for kind, files in FILES.items():
            for name, text in files.items():
                path = base / kind / f"{name}.py"
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
            patch.setitem(KINDS, kind, replace(KINDS[kind], rooms=(base / kind,)))
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "run.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def problems(text: str | bytes, *overrides: str) -> list[str]:
    Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as raised:
        load("run.yaml", overrides)
    return raised.value.problems


def test_a_configuration_is_typed_and_its_defaults_are_filled_in(folder):
    config = load(write(VALID))
    assert (config.name, config.seed) == ("first", 3)
    assert config.scenario.options == {
        "data": config.scenario.options["data"],
        "tasks": 5,
        "order": "seed",
        "transforms": None,
        "validation": 0.0,
    }
    assert config.scenario.options["data"].to_dict() == {"name": "digits", "part": 0.3}
    strategy = config.strategy.options
    assert strategy["optimizer"] == Optimizer(name="adam", lr=0.001, betas=(0.9, 0.99))
    assert (strategy["epochs"], strategy["batch"], strategy["sizes"], strategy["pair"]) == (20, 32, (1, 2), (1, "a"))
    assert [term.options for term in strategy["with"]] == [{"strength": 10.0}, {"strength": 1.0}]
    assert config.model.backbone.options == {"model": "resnet18", "frozen": False}
    assert config.memory.options["select"].plugin.name == "herding"
    assert (config.engine.device, config.engine.checkpoint.every, config.engine.checkpoint.keep) == ("cuda:1", {"steps": 5}, 2)
    assert (config.evaluate.protocols, config.evaluate.every) == (["class_incremental"], "task")
    assert [sink.name for sink in config.log] == ["progress", "jsonl"]


def test_everything_but_scenario_strategy_and_model_has_a_default(folder):
    config = load(write("scenario: {name: stream, data: digits}\nstrategy: icarl\nmodel: {backbone: mlp}\nmemory:\nengine:\n"))
    assert config.memory.to_dict() == {"name": "faiss", "exemplars": 0, "select": None}
    assert config.strategy.options["epochs"] == 70
    assert config.strategy.options["optimizer"] == Optimizer(lr=2.0)
    assert config.engine.checkpoint.every == {"seconds": 60.0}
    assert [sink.name for sink in config.log] == ["progress", "jsonl", "tensorboard", "report"]
    assert problems("{}") == [
        f"run.yaml:1:1: {key}: is missing: it must be {what}"
        for key, what in [
            ("scenario", "a scenario (a name, or a mapping with a name)"),
            ("strategy", "a strategy (a name, or a mapping with a name)"),
            ("model", "a mapping of model settings"),
        ]
    ]


def test_what_is_dumped_reads_back_to_an_equal_configuration(folder):
    Path("mine.py").write_text("from streamcl.strategy import Strategy\nclass Mine(Strategy):\n    def __init__(self, *, file: Path): ...")
    for text in (
        VALID,
        VALID.replace("name: icarl\n", "name: mine.py:Mine\n  file: a/b.txt\n")
        .replace("  epochs", "  #")
        .replace("  opt", "  #")
        .replace("  with", "  #"),
    ):
        config = load(write(text, "sub/../run.yaml"))
        again = load(write(config.dump(), "elsewhere/again.yaml"))
        assert again == config
        assert again.digest() == config.digest()
        assert from_mapping(config.to_dict(), folder / "nowhere") == config
        assert again.dump() == config.dump()
    assert config.strategy.options == {"file": folder / "a/b.txt"}
    assert load("run.yaml", ["seed=4"]).digest() != config.digest()


def test_all_errors_of_a_file_come_at_once_sorted_by_position(folder):
    assert problems("""\
seed: -1
scenaro: stream
scenario: {name: stream, data: digit, tasks: true, order: up}
strategy:
  name: icarl
  epochs: ten
  tau: high
  optimizer: {name: adamm, lr: true, lr2: 1}
  stages: {first: {epochs: 0}}
  with: [ewc, {name: ewc, strenth: 3}, {strength: 3}, 5]
  flag: 1
  sizes: [1, x]
  pair: [1]
  named: {a: b}
  label: [1]
model: {backbone: "timm:resnet18", run: other}
memory: {exemplars: 2.5, select: herdin}
engine: {device: gpu, precision: float12, checkpoint: {every: {minutes: 3}}}
evaluate: {every: {samples: 0}, protocols: []}
log: progress
""") == [
        "run.yaml:1:7: seed: must be an integer from 0 up, got -1",
        "run.yaml:2:1: scenaro: unknown key: did you mean 'scenario'?",
        "run.yaml:3:32: scenario.data: unknown source 'digit': did you mean 'digits'?",
        "run.yaml:3:46: scenario.tasks: must be a positive integer, got true",
        "run.yaml:3:59: scenario.order: must be one of seed, given or a list, got 'up'",
        "run.yaml:6:11: strategy.epochs: must be a positive integer, got 'ten'",
        "run.yaml:7:8: strategy.tau: must be a number, got 'high'",
        "run.yaml:8:21: strategy.optimizer.name: must be one of sgd, adam, adamw, nadam, radam, rmsprop, adagrad, adadelta, adamax, "
        "got 'adamm'",
        "run.yaml:8:32: strategy.optimizer.lr: must be a number, got true",
        "run.yaml:9:28: strategy.stages.first.epochs: must be above 0, got 0",
        "run.yaml:10:27: strategy.with.1.strenth: unknown option of ewc: did you mean 'strength'?",
        "run.yaml:10:40: strategy.with.2: must name a term, got strength and no name",
        "run.yaml:10:55: strategy.with.3: must be a term (a name, or a mapping with a name), got 5",
        "run.yaml:11:9: strategy.flag: must be true or false, got 1",
        "run.yaml:12:14: strategy.sizes.1: must be an integer, got 'x'",
        "run.yaml:13:9: strategy.pair: must have 2 entries, got 1",
        "run.yaml:14:14: strategy.named.a: must be a number, got 'b'",
        "run.yaml:15:10: strategy.label: must be text or an integer, got a list",
        "run.yaml:16:41: model.run: give either backbone (a new model) or run (the model that another run has learned)",
        "run.yaml:17:21: memory.exemplars: must be an integer from 0 up, got 2.5",
        "run.yaml:17:34: memory.select: unknown policy 'herdin': did you mean 'herding'?",
        "run.yaml:18:18: engine.device: must be auto, cpu, cuda, cuda:N or mps, got 'gpu'",
        "run.yaml:18:34: engine.precision: must be one of auto, float32, bfloat16, float16, got 'float12': did you mean 'float32'?",
        "run.yaml:18:64: engine.checkpoint.every: must be one of steps, seconds, got 'minutes'",
        "run.yaml:19:29: evaluate.every.samples: must be a positive integer, got 0",
        "run.yaml:19:44: evaluate.protocols: must name at least one of class_incremental, task_incremental, each once",
        "run.yaml:20:6: log: must be a list, got 'progress'",
    ]


def test_a_missing_option_says_what_is_needed(folder):
    text = "scenario: {name: stream}\nstrategy: icarl\nmodel: {backbone: timm}\n"
    assert problems(text) == [
        "run.yaml:1:18: scenario.data: is missing: stream needs a source (a name, or a mapping with a name) here",
        "run.yaml:3:19: model.backbone.model: is missing: timm needs text here",
    ]


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", "0.001", "1.0e-3"])
def test_numbers_are_read_as_people_write_them(folder, number):
    config = load(write(VALID), [f"strategy.tau={number}", f"strategy.optimizer.lr={number}", "strategy.clip=2"])
    assert config.strategy.options["tau"] == config.strategy.options["optimizer"].lr == 0.001
    assert config.strategy.options["clip"] == 2.0


@pytest.mark.parametrize("value", ["true", "'5'", "5.0", "1e3", ".inf", "[5]", "", "5x"])
def test_only_an_integer_is_an_integer(folder, value):
    assert "strategy.epochs: must be a positive integer, got" in problems(VALID, f"strategy.epochs={value}")[0]


@pytest.mark.parametrize("value", ["true", ".nan", "'0.1'", "x", "1" + "0" * 400])
def test_only_a_number_is_a_number(folder, value):
    assert "strategy.tau: must be a number, got" in problems(VALID, f"strategy.tau={value}")[0]


def test_a_name_with_a_colon_sets_the_first_option(folder):
    config = load(write(VALID), ["scenario.data=vision:MNIST", "model.backbone={name: 'timm:vit', frozen: true}"])
    assert config.scenario.options["data"].to_dict() == {"name": "vision", "set": "MNIST", "root": None}
    assert config.model.backbone.to_dict() == {"name": "timm", "model": "vit", "frozen": True}
    assert "the name 'timm:x' says this already" in problems(VALID, "model.backbone={name: 'timm:x', model: y}")[0]


def test_a_term_as_the_strategy_runs_on_plain_fine_tuning(folder):
    strategy = load(write(VALID), ["strategy={name: ewc, strength: 7, epochs: 3, with: [ewc]}"]).strategy
    assert strategy.plugin.name == "finetune"
    assert strategy.options["epochs"] == 3
    assert [term.options["strength"] for term in strategy.options["with"]] == [7.0, 1.0]
    assert load(write(VALID), ["strategy=ewc"]).strategy.options["with"][0].name == "ewc"


def test_overrides_reach_into_lists_names_and_what_is_not_there(folder):
    text = VALID.replace("name: icarl", "name: finetune")
    config = load(
        write(text), ["strategy.with.1.strength=10", "scenario.data.part=0.5", "scenario.transforms.train=[flip, {name: flip, p: 1}]"]
    )
    assert [term.options["strength"] for term in config.strategy.options["with"]] == [10.0, 10.0]
    assert config.scenario.options["data"].options == {"part": 0.5}
    assert [flip.options["p"] for flip in config.scenario.options["transforms"]["train"]] == [0.5, 1.0]
    replaced = load(write(VALID), ["strategy=finetune"]).strategy
    assert replaced.options["epochs"] == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.epochs=x", "command line: 'strategy.epochs=x': strategy.epochs: must be a positive integer, got 'x'"),
        ("strategy.epoch=5", "command line: 'strategy.epoch=5': strategy.epoch: unknown option of icarl: did you mean 'epochs'?"),
        (
            "strategy.with.7.strength=1",
            "command line: 'strategy.with.7.strength=1': strategy.with is a list, and '7' is none of its entries (0 to 1)",
        ),
        ("seed.more=1", "command line: 'seed.more=1': seed is 3, and has no 'more' in it"),
        ("seed", "command line: 'seed': must be KEY=VALUE, such as seed=1 or strategy.epochs=5"),
        ("a..b=1", "command line: 'a..b=1': must be KEY=VALUE, such as seed=1 or strategy.epochs=5"),
    ],
)
def test_an_error_on_the_command_line_quotes_it(folder, override, message):
    assert problems(VALID, override) == [message]


def test_an_override_that_is_not_yaml_is_one_message(folder):
    (message,) = problems(VALID, "seed=[1, 2")
    assert message.startswith("command line: 'seed=[1, 2': not YAML: ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.backbone=null"], "command line: 'model.backbone=null': model: give either backbone (a new model) or run"),
        (["model.run=old"], "command line: 'model.run=old': model.run: give either backbone (a new model) or run"),
        (
            ["strategy.optimizer.lr=0.5", "strategy.optimizer.momentm=0.9"],
            "command line: 'strategy.optimizer.momentm=0.9': strategy.optimizer: adam takes no momentm; it takes lr",
        ),
        (
            ["engine.checkpoint.every.seconds=5"],
            "command line: 'engine.checkpoint.every.seconds=5': engine.checkpoint.every: must be task,",
        ),
        (["engine.checkpoint.every.steps=1.5"], "command line: 'engine.checkpoint.every.steps=1.5': engine.checkpoint.every: steps must"),
        (["strategy.sizes={a: 1}"], "command line: 'strategy.sizes={a: 1}': strategy.sizes: must be a list, got a mapping"),
    ],
)
def test_a_mapping_that_an_override_made_wrong_is_told_at_the_override(folder, overrides, message):
    (told,) = problems(VALID, *overrides)
    assert told.startswith(message)


def test_what_the_constructor_refuses_is_told_at_the_override_that_it_names(folder):
    constructor = "def __init__(self, *, a: int = 1, b: int = 1):\n        if a + b > 3: raise ValueError('a and b are too much')"
    write(f"from streamcl.strategy import Strategy\nclass S(Strategy):\n    {constructor}\n    def learn(self, task): ...", "mine.py")
    written = write("strategy: {name: mine.py, a: 2}\nscenario: {name: stream, data: digits}\nmodel: {backbone: mlp}\n")
    with pytest.raises(ConfigError, match=r"^command line: 'strategy.b=2': strategy mine.py: a and b are too much"):
        load(written, ["strategy.b=2", "seed=1"]).strategy.build()


def test_a_file_of_data_stands_for_the_source_that_reads_it(folder, monkeypatch):
    arrays = "from streamcl.stream import Source\nclass A(Source):\n    def __init__(self, *, path: Path, part: Fraction = 0.3): ..."
    write(arrays, "sources/arrays.py")
    monkeypatch.setitem(KINDS, "source", replace(KINDS["source"], rooms=(folder / "sources",)))
    write(VALID.replace("data: digits", "data: {name: own.npz, part: 0.5}"), "deep/run.yaml")
    expected = {"name": "arrays", "path": str(folder / "deep/own.npz"), "part": 0.5}
    assert load("deep/run.yaml").scenario.options["data"].to_dict() == expected
    typed = load("deep/run.yaml", ["scenario.data=other.npy"]).scenario.options["data"].to_dict()
    assert typed == {"name": "arrays", "path": str(folder / "other.npy"), "part": 0.3}
    (message,) = problems(VALID, "scenario.data=own.xyz")
    assert message.startswith("command line: 'scenario.data=own.xyz': scenario.data: unknown source 'own.xyz'")


def test_files_build_on_each_other_and_keep_their_places(folder):
    write(
        "name: method\nstrategy: {name: icarl, epochs: 5, optimizer: {name: adam, lr: 0.5}, sizes: [1, 2, 3]}\nseed: 9\n",
        "parts/method.yaml",
    )
    write("scenario: {name: stream, data: digits, tasks: x}\nmodel: {backbone: mlp}\n", "parts/data.yaml")
    top = "extends: [parts/method.yaml, parts/data.yaml]\nname: top\nstrategy: {batch: 7, optimizer: {lr: 0.1}, sizes: [4]}\n"
    assert problems(top) == ["parts/data.yaml:1:47: scenario.tasks: must be a positive integer, got 'x'"]
    config = load(write(top), ["scenario.tasks=2"])
    options = config.strategy.options
    assert (config.name, config.seed, options["epochs"], options["batch"], options["sizes"]) == ("top", 9, 5, 7, (4,))
    assert options["optimizer"] == Optimizer(name="adam", lr=0.1)
    other = load(write(top.replace("{batch: 7, optimizer: {lr: 0.1}, sizes: [4]}", "{name: finetune}")), ["scenario.tasks=2"])
    assert other.strategy.options["epochs"] == 1


def test_relative_files_belong_to_the_file_that_names_them(folder):
    write("from streamcl.strategy import Strategy\nclass Mine(Strategy):\n    def __init__(self, *, file: Path): ...", "parts/mine.py")
    write("strategy: {name: mine.py, file: x.txt}\nscenario: {name: stream, data: digits}\nmodel: {backbone: mlp}\n", "parts/method.yaml")
    config = load(write("extends: parts/method.yaml\n", "deep/../run.yaml"))
    assert config.strategy.plugin.path == folder / "parts/mine.py"
    assert config.strategy.options["file"] == folder / "parts/x.txt"
    assert load("run.yaml", ["strategy.file=y.txt"]).strategy.options["file"] == folder / "y.txt"


def test_data_is_looked_up_under_streamcl_data(folder, monkeypatch):
    write("x", "store/images/a.bin")
    monkeypatch.setenv("STREAMCL_DATA", str(folder / "store"))
    overrides = ["scenario.data={name: vision, set: a, root: images}"]
    assert load(write(VALID, "runs/run.yaml"), overrides).scenario.options["data"].options["root"] == folder / "store/images"
    write("x", "images/own.bin")
    assert load("runs/run.yaml", overrides).scenario.options["data"].options["root"] == folder / "images"


def test_files_that_extend_each_other_in_a_circle_are_refused(folder):
    write("extends: run.yaml\n", "b.yaml")
    assert problems("extends: b.yaml\n") == [
        "b.yaml:1:10: extends: the files extend each other in a circle: run.yaml -> b.yaml -> run.yaml"
    ]
    assert problems("extends: c.yaml\n")[0].startswith("run.yaml:1:10: extends: there is no file 'c.yaml': did you mean 'b.yaml'?")
    assert problems("extends: {a: b}\n") == ["run.yaml:1:10: extends: must be a file or a list of files, got a mapping"]


def test_shipped_configurations_are_found_by_name(folder, monkeypatch):
    for name in ("quickstart", "class_incremental/er"):
        write(VALID, f"shipped/{name}.yaml")
    monkeypatch.setattr("streamcl.yaml_nodes.package_folder", lambda package: folder / "shipped")
    assert load("quickstart") == load("class_incremental/er") == load("quickstart.yaml") == load("shipped/quickstart.yaml")
    for name, near in [
        ("quickstrat", "quickstart"),
        ("configs/quickstart.yaml", "quickstart"),
        ("er", "class_incremental/er"),
        ("shipped/quick.yaml", "shipped/quickstart.yaml"),
    ]:
        with pytest.raises(ConfigError, match=f"there is no file '{name}'.*{near}"):
            load(name)
    with pytest.raises(ConfigError, match="'shipped' is a folder"):
        load("shipped")


def bomb(levels: int) -> str:
    return "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, levels))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"run\.yaml:1:1: is empty: at least scenario, strategy and model are needed"),
        ("- a\n", r"run\.yaml:1:1: must be a mapping with at least scenario, strategy and model, got a list"),
        ("a: [1, 2\nb: 3\n", r"run\.yaml:2:2: not YAML: .*: 'b: 3'"),
        ("a: 'x\n", r"run\.yaml:2:1: not YAML: while scanning a quoted scalar, found unexpected end of stream"),
        ("seed: 1\n---\nseed: 2\n", r"run\.yaml:2:1: not YAML: a second document begins here: one file is one run"),
        ("seed: 1\nname: x\nseed: 2\n", r"run\.yaml:3:1: the key 'seed' stands twice: first at 1:1"),
        ("a: {b: 1, 'b': 2}\n", r"run\.yaml:1:11: the key 'b' stands twice: first at 1:5"),
        ("1: x\n", r"run\.yaml:1:1: the key 1 is read as int, and keys are text: put it in quotes"),
        ("on: x\n", r"run\.yaml:1:1: the key on is read as bool"),
        ("? [a]\n: x\n", r"run\.yaml:1:3: this key is a collection"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", r"run\.yaml:3:3: merge keys \(<<\) are not read: use `extends`"),
        ("a: *x\n", r"run\.yaml:1:4: not YAML: found undefined alias 'x'"),
        ("a: &x [*x]\n", r"run\.yaml:1:4: an anchor that contains itself has no end"),
        (bomb(2000), r"run\.yaml:1:1: with its anchors written out this holds more than 100000 values"),
        ("a: " + "[" * 5000, r"run\.yaml:1:43: not YAML: is nested deeper than 40 levels"),
        ("a: !!python/object/apply:os.system [ls]\n", r"run\.yaml:1:4: the tag .*os\.system' is not read here"),
        ("a: !!binary aGk=\n", r"run\.yaml:1:4: the tag .* is not read here"),
        ("a: !!int x\n", r"run\.yaml:1:4: 'x' is no int"),
        ("seed: " + "1" * 5000, r"run\.yaml:1:7: '1+\.\.\.' is no int"),
        (b"seed: 1\nname: \xff\n", r"run\.yaml:2:7: is not UTF-8 text"),
        ("seed: 1\nname: a\x07b\n", r"run\.yaml:2:8: the control character '\\x07' cannot stand in YAML"),
        ('name: "a\\0b"\n', r"run\.yaml:1:7: a text holds a control character"),
        ('name: "\\ud800"\n', r"run\.yaml:1:7: a text holds a control character or half of a surrogate pair"),
        ('name: "\\UFFFFFFFF"\n', r"run\.yaml: not YAML: "),
        ("# " + "x" * 1_000_000, r"run\.yaml: has 1000002 bytes; a configuration has at most 1000000"),
        (VALID.replace("name: first", "name: ../../up"), r"run\.yaml:1:7: name: must be letters, digits"),
        (VALID.replace("seed: 3", "seed: 5000000000"), r"run\.yaml:2:7: seed: must be below 2\*\*32"),
        (VALID.replace('"timm:resnet18"', "mlp, runs: a"), r"run\.yaml:9:24: model\.runs: unknown key: did you mean 'run'\?"),
    ],
)
def test_what_is_no_configuration_gets_one_clear_message(folder, text, message):
    (problem,) = problems(text)
    assert re.match(message, problem), problem


def test_anchors_that_stay_small_are_read(folder):
    text = VALID.replace("with: [{name: ewc, strength: 10}, ewc]", "with: [&term {name: ewc, strength: 10}, *term]")
    assert [term.options["strength"] for term in load(write(text)).strategy.options["with"]] == [10.0, 10.0]


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("raise ValueError('a is odd')\n    def write(self, event): ...", ConfigError, "a is odd"),
        ("raise KeyError('a')\n    def write(self, event): ...", PluginError, r"cannot be made: mine\.py:4: KeyError: 'a'"),
        ("...", ConfigError, "the class Mine lacks write, which every sink defines"),
    ],
)
def test_a_plugin_that_cannot_be_built_is_named_with_its_place(folder, body, kind, message):
    Path("mine.py").write_text(f"from streamcl.events import Sink\nclass Mine(Sink):\n    def __init__(self, *, a: int):\n        {body}\n")
    config = load(write(VALID.replace("{name: jsonl}", "{name: mine.py, a: 1}")))
    with pytest.raises(kind, match=rf"^run\.yaml:12:(24|36): sink mine\.py:? {message}$"):
        config.log[1].build()


def test_pretraining_and_sweeps_are_checked(folder):
    pretrain = "model: {backbone: mlp, pretrain: {scenario: {name: stream, data: digits}, strategy: %s}}"
    model = 'model: {backbone: "timm:resnet18"}'
    config = load(write(VALID.replace(model, pretrain % "ewc") + "sweep: {over: {seed: [0, 1], strategy: [icarl, ewc]}}\n"))
    assert config.model.pretrain.strategy.plugin.name == "finetune"
    assert config.sweep.over == {"seed": [0, 1], "strategy": ["icarl", "ewc"]}
    assert problems(VALID.replace(model, pretrain % "icral") + "sweep: {over: {seed: []}}\n") == [
        "run.yaml:9:85: model.pretrain.strategy: unknown strategy 'icral': did you mean 'icarl'?",
        "run.yaml:13:15: sweep.over: there is nothing to sweep: a list of values is empty",
    ]


def test_a_python_mapping_is_checked_like_a_file(folder):
    mapping = {"scenario": {"name": "stream", "data": "digits"}, "strategy": "icarl", "model": {"backbone": "mlp"}}
    assert from_mapping(mapping).strategy.options["epochs"] == 70
    mapping["strategy"] = {"name": "icarl", "epochs": "x", "anything": object(), "optimizer": {"lr": {1, 2}}, "tau": b"1"}
    with pytest.raises(ConfigError) as raised:
        from_mapping(mapping)
    assert raised.value.problems == [
        "strategy.tau: must be a number, got a bytes",
        "strategy.anything: must be what YAML can hold, got a object",
        "strategy.epochs: must be a positive integer, got 'x'",
        "strategy.optimizer: must be a mapping of optimizer settings, got a mapping",
    ]


def test_settings_that_contradict_each_other_say_so(folder):
    (message,) = problems(VALID, "strategy.optimizer={name: adam, nesterov: true}")
    assert message.startswith(
        "command line: 'strategy.optimizer={name: adam, nesterov: true}': strategy.optimizer: adam takes no nesterov; it takes lr, "
    )


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_yaml_never_gives_anything_but_a_configuration_or_a_configuration_error(tmp_path_factory, data):
    lines = VALID.splitlines(keepends=True)
    for _ in range(data.draw(st.integers(1, 4))):
        row = data.draw(st.integers(0, len(lines) - 1)) if lines else 0
        match data.draw(st.sampled_from(["drop", "double", "swap", "cut", "insert", "replace", "indent"])) if lines else "insert":
            case "drop":
                del lines[row]
            case "double":
                lines.insert(row, lines[row])
            case "swap":
                lines[row], lines[0] = lines[0], lines[row]
            case "cut":
                at = data.draw(st.integers(0, len(lines[row])))
                lines[row] = lines[row][:at] + lines[row][at + 1 :]
            case "indent":
                lines[row] = f" {lines[row]}"
            case "insert":
                lines.insert(row, data.draw(st.text(max_size=12)))
            case "replace":
                at = data.draw(st.integers(0, len(lines[row])))
                piece = data.draw(
                    st.one_of(
                        st.text(max_size=3),
                        st.sampled_from([*"{}[]:,&*!|>'\"%@`#?-\t\0\\~.", "<<: ", "&a ", "*a", "!!set ", "---", ".py", "1e999", "-.inf"]),
                    )
                )
                lines[row] = lines[row][:at] + piece + lines[row][at + 1 :]
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
    try:
        config = load(path)
    except ConfigError as error:
        assert error.problems
        assert all(str(path.name) in problem for problem in error.problems)
        assert "pydantic" not in str(error)
    else:
        assert from_mapping(yaml.safe_load(config.dump())) == config


def test_checking_imports_no_torch_and_no_plugin(folder):
    Path("mine.py").write_text("raise RuntimeError('executed')\nfrom streamcl.strategy import Strategy\nclass Mine(Strategy): ...")
    write("scenario: {name: class_incremental, data: digits, tasks: 5}\nstrategy: mine.py:Mine\nmodel: {backbone: mlp}\nlog: []\n")
    code = "import sys; from streamcl.config import load; load('run.yaml'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_defaults_of_every_plugin_fit_their_types(monkeypatch):
    monkeypatch.undo()
    code = (
        "from streamcl.plugins import KINDS, REQUIRED, plugins; from streamcl.config import plugin_spec\n"
        "for kind in KINDS:\n"
        "    for name, plugin in plugins(kind).items():\n"
        "        if all(option.default is not REQUIRED for option in plugin.options.values()): plugin_spec(kind, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The schema ---------------------------------------------------------------------------------------------------------------------


def fits(value, rule, root) -> bool:
    """As much of JSON Schema as ours uses."""
    if "$ref" in rule:
        target = root["$defs"][rule["$ref"].removeprefix("#/$defs/")]
        return fits(value, target, root)
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float), "null": type(None)}
    if "type" in rule and (
        not isinstance(value, kinds[rule["type"]]) or (isinstance(value, bool) and rule["type"] in {"integer", "number"})
    ):
        return False
    if ("enum" in rule and value not in rule["enum"]) or ("const" in rule and value != rule["const"]):
        return False
    if ("minimum" in rule and value < rule["minimum"]) or ("exclusiveMinimum" in rule and value <= rule["exclusiveMinimum"]):
        return False
    if "anyOf" in rule and not any(fits(value, choice, root) for choice in rule["anyOf"]):
        return False
    for choice in rule.get("allOf", []):
        if fits(value, choice["if"], root) and not fits(value, choice["then"], root):
            return False
    if isinstance(value, list):
        first = rule.get("prefixItems", [])
        if first:
            return len(value) == len(first) and all(fits(item, part, root) for item, part in zip(value, first, strict=True))
        return all(fits(item, rule.get("items", {}), root) for item in value)
    if isinstance(value, dict):
        known = rule.get("properties", {})
        if not set(rule.get("required", [])) <= value.keys():
            return False
        if rule.get("additionalProperties") is False and not value.keys() <= known.keys():
            return False
        return all(fits(item, known[key], root) for key, item in value.items() if key in known)
    return True


def test_the_schema_accepts_what_is_right_and_refuses_what_is_wrong(folder):
    written = schema()
    assert written["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    value = yaml.safe_load(VALID.replace("1e-3", "0.001").replace("[0.9, 0.99]", "null"))
    assert fits(value, written, written)
    assert fits(load(write(VALID)).to_dict() | {"name": "x"}, written, written)
    assert fits({"extends": "other.yaml"}, written, written)
    for key, wrong in [
        ("seed", -1),
        ("sed", 1),
        ("strategy", {"name": "icarl", "epoch": 3}),
        ("strategy", {"name": "icarl", "epochs": 0}),
        ("strategy", {"name": "icarl", "optimizer": {"name": "adamm"}}),
        ("memory", {"exemplar": 3}),
        ("log", "progress"),
        ("engine", {"precision": "float12"}),
    ]:
        assert not fits({**value, key: wrong}, written, written), (key, wrong)
    del value["model"]
    assert not fits(value, written, written)


def test_the_schema_knows_the_plugins_with_their_options_and_texts():
    definitions = schema()["$defs"]
    assert definitions["strategy"]["anyOf"][0]["examples"] == ["finetune", "icarl", "ewc"]
    for kind in FILES:
        for name, plugin in plugins(kind).items():
            definition = definitions[f"{kind}.{name}"]
            assert list(definition["properties"]) == ["name", *plugin.options]
            assert definition["required"] == [o.name for o in plugin.options.values() if o.default is REQUIRED]
    assert definitions["strategy.icarl"]["properties"]["epochs"] == {"$ref": "#/$defs/PositiveInt", "default": 70}


def test_one_plugin_can_be_named_by_itself(folder):
    assert plugin_spec("source", "vision:MNIST").options == {"set": "MNIST", "root": None}
    with pytest.raises(ConfigError, match=r"^source: unknown source 'visio': did you mean 'vision'\?$"):
        plugin_spec("source", "visio")
