"""A working file to start from: a strategy or a scenario of one's own, with a configuration that runs it and a test."""

from __future__ import annotations

import ast
import importlib.util
import keyword
from pathlib import Path

from streamcl.errors import ConfigError
from streamcl.plugins import near_name, plugins

STRATEGY = '''"""CLASS: replay in which the samples of old tasks weigh `alpha` times as much as those of the new one.

Say here what your method does, in the words of its paper, what its defaults are and where they come from.
`streamcl show NAME.py` prints this text with the options below.

Author, Title, Venue, year.
"""

from __future__ import annotations

from streamcl.options import NonNegativeFloat, NonNegativeInt
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch
from torch import Tensor
from torch.nn.functional import cross_entropy


class CLASS(GradientStrategy):
    selection = "reservoir"  # how the memory chooses its exemplars

    def __init__(self, *, alpha: NonNegativeFloat = 1.0, replay: NonNegativeInt = 32, **options) -> None:
        super().__init__(replay=replay, **options)  # epochs, batch, optimizer, ...: `options` are those of every GradientStrategy
        self.alpha = alpha

    def loss(self, batch: Batch) -> Tensor:
        losses = cross_entropy(self.forward(batch), batch.target, reduction="none")  # (new + replayed,)
        new, old = losses[: batch.new], losses[batch.new or len(batch) :]  # the exemplars follow the first `new` samples
        return new.mean() + self.alpha * old.mean() if len(old) else new.mean()
'''

STRATEGY_CONFIG = """# streamcl run NAME.yaml
# Any option can be changed on the command line: streamcl run NAME.yaml strategy.alpha=0.5 memory.exemplars=50
seed: 0
scenario: {name: class_incremental, data: digits, tasks: 5}
strategy: {name: NAME.py:CLASS, epochs: 5}
model: {backbone: mlp}
memory: {exemplars: 200}
"""

STRATEGY_TEST = '''"""What CLASS promises."""

from pathlib import Path

import streamcl

FILE = Path(__file__).with_name("NAME.py")


def scores(tmp_path: Path, strategy: dict) -> dict:
    config = {
        "scenario": {"name": "class_incremental", "data": "digits", "tasks": 5},
        "strategy": {"epochs": 1, "batch": 32, "optimizer": {"lr": 0.05}, "schedule": "constant", **strategy},
        "model": {"backbone": "mlp"},
        "engine": {"device": "cpu"},
        "log": [],
    }
    return streamcl.run(config, out=tmp_path / Path(strategy["name"]).stem)


def test_without_replay_it_is_fine_tuning(tmp_path: Path) -> None:
    mine = scores(tmp_path, {"name": f"{FILE}:CLASS", "replay": 0})
    assert mine["matrix"] == scores(tmp_path, {"name": "finetune"})["matrix"]
'''

ADAPTING = '''"""CLASS: lower the entropy of the answers, of those alone that are certain already.

No label ever arrives: the method goes by what the model itself answers, and changes weight and bias of its normalisation layers. An answer
is certain where its entropy is below `margin` times ln(classes), the largest that there is.

Say here what your method does, in the words of its paper, what its defaults are and where they come from.
`streamcl show NAME.py` prints this text with the options below.

Author, Title, Venue, year.
"""

from __future__ import annotations

import math

from streamcl.adapting import AdaptingStrategy, entropy
from streamcl.options import PositiveFloat
from streamcl.stream import Batch
from torch import Tensor


class CLASS(AdaptingStrategy):
    def __init__(self, *, margin: PositiveFloat = 0.4, **options) -> None:
        super().__init__(**options)  # optimizer and answer: `options` are those of every AdaptingStrategy
        self.margin = margin

    def loss(self, batch: Batch, logits: Tensor) -> Tensor | None:
        uncertain = entropy(logits)  # (batch,)
        kept = uncertain < self.margin * math.log(logits.shape[1])
        return uncertain[kept].mean() if kept.any() else None  # None: nothing to learn from this batch
'''

ADAPTING_CONFIG = """# streamcl run NAME.yaml, or streamcl adapt NAME.yaml: under guard, beside the model as it was deployed
# Any option can be changed on the command line: streamcl adapt NAME.yaml strategy.margin=0.8 scenario.severity=3
seed: 0
scenario: {name: test_time, data: digits, corruptions: [fog, contrast, gaussian_noise], batch: 64}
strategy: NAME.py:CLASS
model:
  backbone: {name: convnet, width: 16, blocks: 2}
  pretrain:  # the model that is deployed: trained once, and kept
    scenario: {name: class_incremental, data: digits, tasks: 1}
    strategy: {name: finetune, epochs: 10}
"""

ADAPTING_TEST = '''"""What CLASS promises."""

from pathlib import Path

import streamcl
import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("NAME.py")


def answers(strategy) -> tuple[Tensor, dict]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    loop = streamcl.online(model, strategy, guard=False, window=None)
    return torch.cat([loop(torch.randn(32, 8)).scores for _ in range(5)]), loop.status()["counts"]


def test_where_every_answer_is_certain_enough_it_is_tent() -> None:
    mine, counts = answers({"name": f"{FILE}:CLASS", "margin": 2.0})
    assert torch.equal(mine, answers("tent")[0]) and counts["updates"] == 5


def test_where_no_answer_is_certain_nothing_is_learned() -> None:
    mine, counts = answers({"name": f"{FILE}:CLASS", "margin": 1e-9})
    torch.testing.assert_close(mine, answers("bn_adapt")[0])
    assert counts == {"skipped": 5}
'''

SCENARIO = '''"""CLASS: the classes of a data set arrive a few at a time, in an order drawn by the seed.

Say here what your stream is, where its protocol comes from, and what it is meant to show.
`streamcl show NAME.py` prints this text with the options below.
"""

from __future__ import annotations

import torch
from streamcl.data import Subset, split_by_class
from streamcl.errors import ConfigError
from streamcl.options import PositiveInt
from streamcl.seeding import generator
from streamcl.stream import Dataset, Scenario, Source, StreamInfo, Task
from torch import Tensor


class CLASS(Scenario):
    def __init__(self, *, data: Source, tasks: PositiveInt = 5, **options) -> None:
        super().__init__(**options)  # transforms and validation: `options` are those of every Scenario
        self.data, self.tasks = data, tasks

    def open(self, seed: int) -> StreamInfo:
        self.source = source = self.data.load()
        count = len(source.class_names)
        if self.tasks > count or source.test is None:
            raise ConfigError(f"CLASS needs a class for each of the {self.tasks} tasks and a test set; the data has {count} classes")
        order = torch.randperm(count, generator=generator(seed, "classes"))
        self.number = order.argsort()  # the place of each of the source's classes in the order of arrival  # (classes,)
        self.groups = torch.arange(count).tensor_split(self.tasks)
        self.names = [source.class_names[original] for original in order.tolist()]
        self.kept, self.held = split_by_class(source.train.targets, self.validation, generator(seed, "validation"))
        self.info = StreamInfo(source.modalities, classes=count, tasks=self.tasks, licence=source.licence, class_names=tuple(self.names))
        return self.info

    def __len__(self) -> int:
        return self.tasks

    def task(self, index: int) -> Task:
        classes = tuple(self.groups[index].tolist())
        seen = tuple(range(classes[-1] + 1))
        train, validation = (self.part(self.source.train, rows, classes) for rows in (self.kept, self.held))
        return Task(
            index=index,
            name=", ".join(self.names[label] for label in classes),
            train=train,
            validation=validation if self.validation else None,
            classes=classes,  # new here
            labels=classes,  # what occurs here
            seen=seen,  # all that has arrived
            names={label: self.names[label] for label in seen},
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        return self.part(self.source.test, torch.arange(len(self.source.test)), task.classes)

    def part(self, data: Dataset, rows: Tensor, classes: tuple[int, ...]) -> Dataset:
        """Those of the rows that belong to these classes, with their classes numbered in order of arrival."""
        mine = torch.isin(self.number[data.targets[rows]], torch.tensor(classes))
        return Subset(data, rows[mine], self.number)
'''

SCENARIO_CONFIG = """# streamcl run NAME.yaml
# Any option can be changed on the command line: streamcl run NAME.yaml scenario.tasks=2 strategy=icarl
seed: 0
scenario: {name: NAME.py:CLASS, data: digits, tasks: 5}
strategy: {name: er, epochs: 5}
model: {backbone: mlp}
memory: {exemplars: 200}
"""

SCENARIO_TEST = '''"""What CLASS promises."""

from pathlib import Path

import torch
from streamcl.config import plugin_spec

FILE = Path(__file__).with_name("NAME.py")


def test_every_training_sample_is_in_the_task_of_its_class_and_in_no_other() -> None:
    scenario = plugin_spec("scenario", {"name": f"{FILE}:CLASS", "data": "digits", "validation": 0.2}).build()
    info = scenario.open(seed=0)
    tasks = list(scenario)
    parts = [part for task in tasks for part in (task.train, task.validation)]
    assert sorted(torch.cat([part.ids for part in parts]).tolist()) == sorted(scenario.source.train.ids.tolist())
    assert [label for task in tasks for label in task.classes] == list(range(info.classes))
    for task in tasks:
        assert set(task.train.targets.tolist()) == set(scenario.test(task, tasks[-1]).targets.tolist()) == set(task.classes)
'''

TEMPLATES = {
    "strategy": (STRATEGY, STRATEGY_CONFIG, STRATEGY_TEST),
    "scenario": (SCENARIO, SCENARIO_CONFIG, SCENARIO_TEST),
    "adapting": (ADAPTING, ADAPTING_CONFIG, ADAPTING_TEST),
}
KINDS = ("learning", "adapting")  # of strategies


def new(kind: str, name: str, folder: Path = Path(), of: str | None = None) -> str:
    """Write NAME.py, NAME.yaml and test_NAME.py into the folder; what was written, and the commands that run it.

    `of` is the kind of strategy: one that learns from tasks, or one that adapts to what it serves.
    """
    if kind not in (known := ("strategy", "scenario")):
        raise ConfigError(f"there is no template of a {kind!r}{near_name(kind, known) or '; there are ' + ' and '.join(known)}")
    if of is not None and (kind != "strategy" or of not in KINDS):
        raise ConfigError(f"--kind is {of!r}: it says what a strategy does, {' or '.join(KINDS)}")
    templates = TEMPLATES["adapting" if of == "adapting" else kind]
    class_name = _class_name(kind, name, templates[0])
    files = [folder / f"{name}.py", folder / f"{name}.yaml", folder / f"test_{name}.py"]
    there = [str(file) for file in files if file.exists()]
    if there:
        raise ConfigError(f"{', '.join(there)} {'is' if len(there) == 1 else 'are'} there already, and nothing is written over")
    if importlib.util.find_spec(name) is not None:
        raise ConfigError(f"{name!r} is a module that Python finds already, and a file of this name would hide it: choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, template in zip(files, templates, strict=True):
            with file.open("x", encoding="utf-8") as written:
                written.write(template.replace("CLASS", class_name).replace("NAME", name))
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} cannot be written: {error.strerror}") from error
    module, config, test = map(str, files)
    return f"wrote {module}, {config} and {test}\n\n  run it    streamcl run {config}\n  test it   python -m pytest {test}"


def _class_name(kind: str, name: str, template: str) -> str:
    """MyMethod for my_method; refuses what cannot be the name of a plug-in's file."""
    if not (name.isidentifier() and name.isascii() and name == name.lower() and name[0] != "_") or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} cannot name a {kind}: lower-case letters, digits and _ are needed, and a letter first, such as my_{kind}"
        )
    if name in plugins(kind, []):
        raise ConfigError(f"there is a {kind} {name!r} already (streamcl show {name}): choose another name")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    if class_name in {node.id for node in ast.walk(ast.parse(template)) if isinstance(node, ast.Name)}:
        raise ConfigError(f"the class of {name!r} would hide {class_name}, which it needs: choose another name")
    return class_name
