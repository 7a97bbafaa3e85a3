"""Avalanche's side of `against_avalanche.py`: its own strategies on the tensors, the network and the first weights that streamcl has."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import BiCPlugin, EvaluationPlugin, LRSchedulerPlugin, SupervisedPlugin, bic
from avalanche.training.supervised import DER, ER_ACE, EWC, BiC, ICaRL, LwF, Replay, StreamingLDA
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import TensorDataset

from streamcl.nn.backbone import Backbone


@dataclass
class Stream:
    """The tasks as tensors that are ready for the network, and how much is trained on them."""

    train: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]
    epochs: int
    batch: int
    exemplars: int

    @property
    def classes(self) -> list[int]:
        """How many each task brings."""
        return [len(y.unique()) for _, y in self.train]

    def benchmark(self) -> Any:
        """An `nc_benchmark`, for on the newer kind Avalanche's LwF, DER and ICaRL do not run. Classes are numbered by arrival."""
        train, test = ([TensorDataset(*columns) for columns in part] for part in (self.train, self.test))
        made = nc_benchmark(train, test, len(train), task_labels=False, shuffle=False, one_dataset_per_exp=True)
        for experience, (x, y) in zip(made.train_stream, self.train, strict=True):
            order, given = y.argsort(stable=True), [experience.dataset[n] for n in range(len(x))]  # it sorts by class, and shuffles later
            assert torch.equal(torch.stack([row[0] for row in given]), x[order]) and [int(row[1]) for row in given] == y[order].tolist()
        return made


@dataclass
class Setting:
    """A method as Avalanche is told it, in streamcl's terms."""

    method: str
    optimizer: dict[str, float]
    milestones: tuple[float, ...] = ()  # fractions of the epochs at which the rate is multiplied by gamma
    gamma: float = 0.1
    wide: bool = False  # the head of all classes competes from the first task on, as in Avalanche's own models
    mended: bool = False
    options: dict[str, Any] = field(default_factory=dict)


class Network(nn.Module):
    """The backbone of streamcl's model and a head whose rows of classes that are still to come are masked, as if they were not there."""

    def __init__(self, backbone: Backbone, rows: Tensor, wide: bool) -> None:
        super().__init__()
        self.feature_extractor = Features(backbone)
        classes, dim = rows.shape[0], rows.shape[1] - 1
        self.dim, linear = dim, nn.Linear(dim, classes)
        linear.weight.data, linear.bias.data = rows[:, :-1].clone(), rows[:, -1].clone()
        self.classifier: nn.Module = linear
        if not wide:
            self.classifier = IncrementalClassifier(dim, classes)
            self.classifier.classifier = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.feature_extractor(x))


class Features(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.layers: nn.Module = copy.deepcopy(backbone.layers) if hasattr(backbone, "layers") else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        flat = not any(isinstance(module, nn.Conv2d) for module in self.modules())
        return self.layers(x.flatten(1)) if flat else self.layers(x).mean(dim=(2, 3))


class Answers(SupervisedPlugin):
    """What the strategy answers while it is scored."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Tensor, Tensor]] = []

    def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
        self.given.append((strategy.mb_output.detach().clone(), strategy.mb_y.clone()))


def rate(setting: Setting, stream: Stream, task: int) -> float:
    """The learning rate at which a step of Avalanche's loss is a step of streamcl's, where the two losses differ by a factor."""
    lr, classes = setting.optimizer["lr"], stream.classes
    if setting.method == "er_ace" and task:
        return 2 * lr  # Avalanche halves the sum of the two terms, from the second task on
    if setting.method == "icarl" and not setting.wide:
        return lr * sum(classes) / sum(classes[: task + 1])  # and averages over the columns of all classes, masked ones too
    return lr


def count_samples(module: nn.Module) -> list[int]:
    """A list to which each forward pass that has a gradient adds its samples."""
    passed: list[int] = []

    def count(_: nn.Module, __: Any, features: Tensor) -> None:
        if features.requires_grad:
            passed.append(len(features))

    module.register_forward_hook(count)
    return passed


def run(setting: Setting, stream: Stream, backbone: Backbone, rows: Tensor, seed: int) -> tuple[list[float], float, float, int]:
    """Seconds of each task, final accuracy, the same with the task told, and how many samples were trained on."""
    benchmark, network = stream.benchmark(), Network(backbone, rows, setting.wide)
    passed = count_samples(network.feature_extractor)
    torch.manual_seed(seed)
    strategy, optimizer = MAKERS[setting.method](setting, stream, network), None
    if setting.method != "slda":
        optimizer = strategy.optimizer
    seconds = []
    with patched(setting):
        for task, experience in enumerate(benchmark.train_stream):
            if optimizer is not None:
                optimizer.state.clear()  # streamcl makes the optimiser anew for each task
                for group in optimizer.param_groups:
                    group["lr"] = rate(setting, stream, task)
            started = time.process_time()
            strategy.train(experience, eval_streams=[], num_workers=0)
            seconds.append(time.process_time() - started)
    trained = sum(passed)
    answers = Answers()
    strategy.plugins.append(answers)
    right, told = [], []
    first = 0
    for experience, count in zip(benchmark.test_stream, stream.classes, strict=True):
        answers.given.clear()
        strategy.eval([experience])
        scores, targets = (torch.cat(column) for column in zip(*answers.given, strict=True))
        right.append(float((scores.argmax(dim=1) == targets).float().mean()))
        own = scores[:, first : first + count].argmax(dim=1) + first
        told.append(float((own == targets).float().mean()))
        first += count
    return seconds, sum(right) / len(right), sum(told) / len(told), trained


def common(setting: Setting, stream: Stream, parameters: Any) -> dict[str, Any]:
    optimizer = torch.optim.SGD(parameters, **setting.optimizer)
    plugins: list[Any] = []
    if setting.milestones:
        milestones = [round(part * stream.epochs) for part in setting.milestones]
        plugins.append(LRSchedulerPlugin(MultiStepLR(optimizer, milestones, setting.gamma)))
    return {
        "optimizer": optimizer,
        "train_mb_size": stream.batch,
        "train_epochs": stream.epochs,
        "eval_mb_size": 512,
        "evaluator": EvaluationPlugin(),
        "plugins": plugins,
    }


def er(setting: Setting, stream: Stream, network: Network) -> Any:
    given = common(setting, stream, network.parameters())
    return Replay(model=network, criterion=nn.CrossEntropyLoss(), mem_size=stream.exemplars, **given)


def lwf(setting: Setting, stream: Stream, network: Network) -> Any:
    return LwF(model=network, criterion=nn.CrossEntropyLoss(), **setting.options, **common(setting, stream, network.parameters()))


def ewc(setting: Setting, stream: Stream, network: Network) -> Any:
    return EWC(model=network, criterion=nn.CrossEntropyLoss(), **setting.options, **common(setting, stream, network.parameters()))


def derpp(setting: Setting, stream: Stream, network: Network) -> Any:
    given = common(setting, stream, network.parameters())
    return DER(model=network, mem_size=stream.exemplars, batch_size_mem=stream.batch, **setting.options, **given)


def er_ace(setting: Setting, stream: Stream, network: Network) -> Any:
    given = common(setting, stream, network.parameters())
    return ER_ACE(model=network, mem_size=stream.exemplars, batch_size_mem=stream.batch, **given)


def icarl(setting: Setting, stream: Stream, network: Network) -> Any:
    parts = {"feature_extractor": network.feature_extractor, "classifier": network.classifier}
    given = common(setting, stream, network.parameters())
    return ICaRL(**parts, memory_size=stream.exemplars, buffer_transform=None, fixed_memory=True, **given)


def slda(setting: Setting, stream: Stream, network: Network) -> Any:
    given = common(setting, stream, [nn.Parameter(torch.zeros(1))])
    del given["optimizer"], given["plugins"]
    sizes = {"input_size": network.dim, "num_classes": sum(stream.classes)}
    return StreamingLDA(
        slda_model=network.feature_extractor, criterion=nn.CrossEntropyLoss(), **sizes, **setting.options, **{**given, "train_epochs": 1}
    )


def bias_correction(setting: Setting, stream: Stream, network: Network) -> Any:
    given = common(setting, stream, network.parameters())
    options = dict(setting.options)
    sizes = {name: options.pop(name) for name in ("batch_size", "batch_size_mem") if name in options}  # options of its plug-in alone
    made = BiC(model=network, criterion=nn.CrossEntropyLoss(), mem_size=stream.exemplars, **options, **given)
    for plugin in made.plugins:
        if isinstance(plugin, BiCPlugin):
            vars(plugin).update(sizes)
    return made


MAKERS: dict[str, Callable[[Setting, Stream, Network], Any]] = {
    "er": er,
    "lwf": lwf,
    "ewc": ewc,
    "derpp": derpp,
    "er_ace": er_ace,
    "icarl": icarl,
    "slda": slda,
    "bic": bias_correction,
}


def patched(setting: Setting) -> Any:
    """Avalanche's BiC as it runs on a torch whose schedules have lost `verbose`; where it is mended, distilled over classes as well."""
    silent = patch.object(bic, "MultiStepLR", lambda *given, verbose=False, **options: MultiStepLR(*given, **options))
    if not setting.mended:
        return silent

    class Both:
        mend = patch.object(BiCPlugin, "cross_entropy", lambda self, new, old: cross_entropy(new / self.T, (old / self.T).softmax(dim=1)))

        def __enter__(self) -> None:
            silent.start(), self.mend.start()

        def __exit__(self, *_: object) -> None:
            silent.stop(), self.mend.stop()

    return Both()
