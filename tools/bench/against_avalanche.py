"""Eight methods in streamcl and in Avalanche, on the same work: accuracy over seeds, and time.

    OMP_NUM_THREADS=1 python tools/bench/against_avalanche.py [er lwf ...] [--seeds 5]
    OMP_NUM_THREADS=1 python tools/bench/against_avalanche.py --model resnet18
    OMP_NUM_THREADS=1 python tools/bench/against_avalanche.py --cost

The stream is scikit-learn's digits in 5 tasks of 2 classes, or images of noise; the network an MLP 64-256 (`slda`: the pixels), or the
slim ResNet-18. Both libraries start from the same weights, the rows of the head too, and get the same tensors (Avalanche scaled ones, which
streamcl scales as it goes), optimiser, rates, epochs, batch size and seed. One library after the other trains, in turns within one process
and on one thread; seconds are processor time of training alone, without scoring, and ratios medians over the seeds.

`--cost`: seconds of learning a task as the tasks of one size add up, for every class-incremental strategy and term (`cost_per_task.py`).
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import cost_per_task
import torch
from noise import Noise
from torch import Tensor, nn

from streamcl.config import EngineConfig, EvaluateConfig
from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.nn.backbone import Backbone
from streamcl.plugins import find
from streamcl.strategy import Strategy, Term
from streamcl.stream import Scenario, Task

try:
    from avalanche_runs import Setting, Stream, count_samples
    from avalanche_runs import run as run_avalanche
except ModuleNotFoundError as missing:
    raise SystemExit(f"there is nothing to compare with ({missing}): pip install 'streamcl[avalanche]'") from None

EXEMPLARS, BATCH = 200, 32
PROTOCOLS = EvaluateConfig(protocols=["class_incremental", "task_incremental"])


@dataclass
class Method:
    """A method with equal settings on both sides."""

    name: str
    options: dict[str, Any]  # streamcl's, beside what all share
    optimizer: dict[str, float]
    theirs: dict[str, Any] = field(default_factory=dict)
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    select: str | None = None  # streamcl's policy of selection
    wide: bool = False  # Avalanche's head has all its classes from the first task on
    mended: bool = False  # Avalanche's code with the mistake put right that is told of in the results
    mirror: bool = False  # exemplars are mirrored for the class means, as Avalanche does with whatever has the shape of pictures
    term: bool = False

    def setting(self) -> Setting:
        return Setting(self.name, self.optimizer, self.milestones, self.gamma, self.wide, self.mended, self.theirs)


PLAIN, FAST = {"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}
QUARTERS = (0.25, 0.5, 0.75)
METHODS: dict[str, Method] = {
    "er": Method("er", {"replay": BATCH}, PLAIN),
    "lwf": Method("lwf", {"strength": 3.0, "temperature": 2.0}, FAST, {"alpha": 3.0, "temperature": 2.0}, term=True),
    "ewc": Method(
        "ewc",
        {"strength": 100.0, "mode": "separate", "ceiling": None},
        PLAIN,
        {"ewc_lambda": 50.0 * BATCH, "mode": "separate"},
        term=True,
    ),
    "derpp": Method("derpp", {"replay": BATCH, "alpha": 1.0, "beta": 0.5}, PLAIN, {"alpha": 1.0, "beta": 0.5}, wide=True),
    "er_ace": Method("er_ace", {"replay": BATCH, "task_free": False}, PLAIN),
    "icarl": Method("icarl", {}, {"lr": 1.0, "momentum": 0.9}, milestones=(0.7, 0.9), gamma=0.2),
    "slda": Method("slda", {"scatter": "released"}, {}, {"shrinkage_param": 1e-4}),
    "bic": Method(
        "bic", {"bias_epochs": 200, "held_out": 0.1}, FAST, {"val_percentage": 0.1, "stage_2_epochs": 200}, QUARTERS, select="random"
    ),
}

HALVES = {"batch_size": BATCH // 2, "batch_size_mem": BATCH // 2}  # as many samples a step, and about as many steps, as streamcl
# What one of the two does otherwise, put right or taken over, to see what it makes.
CONTROLS: dict[str, Method] = {
    "lwf, cross-entropy over the new classes": replace(METHODS["lwf"], options={**METHODS["lwf"].options, "over": "task"}),
    "derpp, 16 + 16 replayed": replace(METHODS["derpp"], options={**METHODS["derpp"].options, "replay": BATCH // 2}),
    "er_ace, replay in the first task too": replace(METHODS["er_ace"], options={"replay": BATCH}),
    "icarl, Avalanche's head of ten from the start": replace(METHODS["icarl"], wide=True),
    "icarl, means of mirrored digits too": replace(METHODS["icarl"], mirror=True),
    "slda, exact scatter": replace(METHODS["slda"], options={}),
    "bic, Avalanche's distillation mended": replace(METHODS["bic"], mended=True),
    "bic, and Avalanche takes 16 + 16 a batch": replace(METHODS["bic"], mended=True, theirs={**METHODS["bic"].theirs, **HALVES}),
}
HEADER = (
    "| method | streamcl, final % | Avalanche, final % | difference (spread) | task told, % | of Avalanche | seconds | of Avalanche "
    "| time, streamcl / Avalanche | without the first task | samples trained on, ratio |"
)


class Rows(Term):
    """The rows of the head as they are in the other library."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def before_task(self, task: Task) -> None:
        head = self.strategy.model.head
        with torch.no_grad():
            for label in task.classes:
                head.weight[label], head.bias[label] = self.rows[label, :-1], self.rows[label, -1]


class Clock:
    """The seconds of processor time in which a strategy learned each task."""

    def __init__(self) -> None:
        self.tasks: list[float] = []

    def watch(self, strategy: Strategy) -> None:
        learn = strategy.learn

        def timed(task: Task) -> None:
            started = time.process_time()
            learn(task)
            self.tasks.append(time.process_time() - started)

        strategy.learn = timed


@dataclass
class Work:
    """What both libraries learn, and with which network."""

    model: str
    epochs: int

    def scenario(self) -> Scenario:
        source = find("source", "digits").load()() if self.model == "mlp" else Noise(10, 32, 4)
        return find("scenario", "class_incremental").load()(data=source, tasks=5)

    def backbone(self, method: str) -> Backbone:
        if self.model == "mlp":
            return find("backbone", "identity" if method == "slda" else "mlp").load()()
        return find("backbone", "resnet18").load()(width=20)

    def stream(self, seed: int, method: Method) -> Stream:
        scenario = self.scenario()
        info = scenario.open(seed)
        tasks = [scenario.task(index) for index in range(len(scenario))]
        parts = [[task.train for task in tasks], [scenario.test(task, tasks[-1]) for task in tasks]]
        [modality] = info.modalities.values()
        train, test = ([tensors(data, modality, self.model == "mlp" and not method.mirror) for data in part] for part in parts)
        return Stream(train, test, 1 if method.name == "slda" else self.epochs, BATCH, EXEMPLARS)


def tensors(data: Any, modality: Any, flat: bool) -> tuple[Tensor, Tensor]:
    batch = whole(data)
    [values] = batch.inputs.values()
    assert isinstance(values, Tensor) and isinstance(batch.target, Tensor)
    values = values if values.is_floating_point() else values / modality.high
    return (values.flatten(1) if flat else values), batch.target


def engine(method: Method, work: Work, seed: int, rows: Tensor) -> Engine:
    terms: tuple[Term, ...] = () if method.name in ("derpp", "slda") else (Rows(rows),)
    memory = {"exemplars": EXEMPLARS, **({"select": method.select} if method.select else {})}
    return Engine(
        work.scenario(),
        strategy(method, work, terms),
        work.backbone(method.name),
        find("memory", "faiss").load()(**memory),
        seed=seed,
        engine=EngineConfig(device="cpu", threads=1),
        evaluate=PROTOCOLS,
    )


def strategy(method: Method, work: Work, terms: tuple[Term, ...]) -> Strategy:
    if method.name == "slda":
        return find("strategy", "slda").load()(batch=BATCH, **method.options)
    schedule = {"name": "steps", "milestones": method.milestones, "gamma": method.gamma} if method.milestones else "constant"
    loop = {"epochs": work.epochs, "batch": BATCH, "optimizer": method.optimizer, "schedule": schedule}
    options = dict(method.options)
    if method.name == "icarl":
        options["mirror"] = method.mirror or work.model != "mlp"
    if not method.term:
        return find("strategy", method.name).load()(**loop, **options, with_=terms)
    over = options.pop("over", "seen")
    term = find("term", method.name).load()(**options)
    return find("strategy", "finetune").load()(**loop, over=over, with_=(*terms, term))


@dataclass
class Result:
    seconds: list[float]
    final: float
    told: float
    samples: int  # that went through the network with a gradient


def compare(method: Method, work: Work, seed: int, first: bool) -> tuple[Result, Result]:
    """streamcl's run and Avalanche's, which of them goes first being told."""
    torch.manual_seed(seed)
    classes = sum(work.stream(seed, method).classes)
    clock, backbone = Clock(), work.backbone(method.name)
    scenario = work.scenario()
    backbone.build(scenario.open(seed))
    layer = nn.Linear(backbone.dim, classes)
    rows = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1)
    run = engine(method, work, seed, rows)
    clock.watch(run.strategy)
    run.model.backbone.load_state_dict(backbone.state_dict())
    if method.name == "derpp":
        rows = run.strategy.reserve.detach().clone()  # its own rows of the classes to come

    def ours() -> Result:
        passed = count_samples(run.model.backbone)
        scores = run.run()
        told = scores["protocols"]["task_incremental"]["final"] if "protocols" in scores else float("nan")
        return Result(clock.tasks, scores["final"], told, sum(passed))

    def theirs() -> Result:
        return Result(*run_avalanche(method.setting(), work.stream(seed, method), backbone, rows, seed))

    if first:
        mine = ours()
        return mine, theirs()
    other = theirs()
    return ours(), other


def text(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def measure(name: str, method: Method, work: Work, seeds: int) -> None:
    pairs = [compare(method, work, seed, first=seed % 2 == 0) for seed in range(seeds)]
    ours, theirs = zip(*pairs, strict=True)
    difference = 100 * (statistics.mean(r.final for r in ours) - statistics.mean(r.final for r in theirs))
    spread = 0.0
    if seeds > 1:
        spread = 100 * max(statistics.stdev(r.final for r in ours), statistics.stdev(r.final for r in theirs))
    ratios = [sum(a.seconds) / sum(b.seconds) for a, b in pairs]
    later = [sum(a.seconds[1:]) / sum(b.seconds[1:]) for a, b in pairs]
    times = " | ".join(f"{statistics.median(sum(r.seconds) for r in results):.2f}" for results in (ours, theirs))
    cells = [
        name,
        text([r.final for r in ours]),
        text([r.final for r in theirs]),
        f"{difference:+.1f} ({spread:.1f})",
        text([r.told for r in ours]),
        text([r.told for r in theirs]),
        times,
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{statistics.median(later):.2f}",
        f"{ours[0].samples / theirs[0].samples:.2f}" if theirs[0].samples else "–",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"some of {', '.join(METHODS)}; all where none is named")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--model", choices=["mlp", "resnet18"], default="mlp")
    parser.add_argument("--epochs", type=int, help="20 with the MLP, 2 with the ResNet, unless told")
    parser.add_argument("--controls", action="store_true", help="what differs, put right or taken over")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="of --cost")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cost:
        cost_per_task.main(options.methods, options.repeats)
        return
    warnings.showwarning = lambda *given, **options: None  # Avalanche tells of its own deprecations, whatever the filters say
    logging.disable(logging.WARNING)
    work = Work(options.model, options.epochs or (20 if options.model == "mlp" else 2))
    known = CONTROLS if options.controls else METHODS
    before = os.getloadavg()[0]
    print(f"{HEADER}\n| --- |{' ---: |' * (HEADER.count('|') - 2)}")
    for name in options.methods or known:
        measure(name, known[name], work, options.seeds)
    print(f"load of the machine: {before:.1f} to {os.getloadavg()[0]:.1f} ({os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
