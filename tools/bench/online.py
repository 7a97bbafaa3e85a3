"""What the online loop costs: latency, passes through the model, memory beside it, and a run without end.

    OMP_NUM_THREADS=1 python tools/bench/online.py [--quick] [--batches 40000] [--write FILE] [latency] [passes] [memory] [long]

Without names all parts run. Contenders take turns, forth and back, each with a copy of the model of its own, four batches at a time, so
that one of the guard's comparisons lies in every turn. A ratio is the median over the turns' ratios, in processor time on one thread, and
in wall time beside it: where other work runs on the machine, wall time is noise.

latency: `loop(batch)` over plain inference, and Tent over a step of Tent written by hand, with and without the guard. The model is
torchvision's ResNet-18 on batches of 64 x 3 x 32 x 32, trained for a moment on ten noisy pictures and served the same ones shifted.

passes: the other methods over the passes that they make: which these are is recorded while they run (online_passes.py), and the same
number of samples goes through the same model, forward and backward, with as many steps of the same optimiser, by hand. What a method does
beside passes (random views, a teacher that follows) is timed where it is done and stands beside it. Options are such that every rule for
choosing samples lets some through. READ, SuMi and CASP adapt a transformer of two modalities.

memory: what the loop holds beside the model, by walking through everything it refers to, against the adapted tensors, their optimiser,
one copy of them, and what the method declares (`own_state`); and the largest amount that torch had allocated at once during a batch,
according to its profiler, over that of the same passes made by hand.

long: a small network, Tent and the guard on a stream that drifts for ever: resident memory, what the loop holds, and Python's objects.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import math
import os
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
from online_passes import Trace, recorded, repeated
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import streamcl
from streamcl.nn.model import Model
from streamcl.nn.norms import affine, batch_norms
from streamcl.online_loop import OnlineLoop
from streamcl.plugins import find
from streamcl.strategy import make_optimizer
from streamcl.stream import Batch, Modality, StreamInfo

CLASSES, SIZE, TURN, POOL = 10, 64, 4, 8  # TURN: batches in a turn; POOL: different batches
MIB = 2**20
BARS = {"source": 1.02, "bn_adapt": 1.15, "lame": 1.1, "tent": 1.05}
OTHERS = 1.05
IMAGE, SOUND = (3, 32, 32), (32, 32)  # channels, height, width; bands, frames


@dataclass(frozen=True)
class Case:
    """A method with options under which it learns from every batch. `own`: its methods that do more than passes."""

    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    size: int = SIZE
    two: bool = False  # modalities
    target: str = "class"
    note: str = ""

    @property
    def name(self) -> str:
        return self.strategy + (f", {self.note}" if self.note else "")


CASES = [
    Case("eata"),
    Case("sar", {"e_m": 0.0}, ("recover",)),
    Case("deyo", {"tau_p": -2.0}, ("destroyed",)),
    Case("rotta", {}, ("pixels.augmented", "remember", "follow")),
    Case("cotta", {"p_th": 0.0}, ("follow", "restore_some"), note="source sure"),
    Case("cotta", {"p_th": 1.0}, ("pixels.augmented", "follow", "restore_some"), size=16, note="32 views"),
    Case("marginal_entropy", {}, ("pixels.augmented", "forget"), size=2),
    Case("read", two=True),
    Case("sumi", {"gamma_u": 0.0, "gamma_m": 100.0, "horizon": 10**6}, ("assisted",), two=True, note="while sharing"),
    Case("sumi", {"gamma_u": 0.0, "gamma_m": 100.0, "horizon": 10**6, "warm": 0.0}, ("assisted",), two=True, note="afterwards"),
    Case("casp", {"window": SIZE, "contrast_epochs": 1, "snapshots": 1, "label_epochs": 1}, two=True, target="value", note="1 + 1 epochs"),
]


# models and streams --------------------------------------------------------------------------------------------------------------


def samples(shapes: Mapping[str, tuple[int, ...]], count: int, seed: int, shifted: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """Noisy pictures (and sounds) of ten kinds, from 0 to 1, a little paler where they are shifted; and which kind they are."""
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(CLASSES, (count,), generator=drawn)
    inputs = {}
    for name, shape in shapes.items():
        kinds = torch.rand(CLASSES, *shape, generator=fixed)
        values = (kinds[labels] + 0.5 * torch.randn(count, *shape, generator=drawn)).clamp(0, 1)
        inputs[name] = 0.1 + 0.8 * values if shifted else values
    return inputs, labels


def trained(model: nn.Module, answer: Callable[[dict[str, Tensor]], Tensor], shapes: Mapping[str, tuple[int, ...]], steps: int) -> None:
    """For a moment, so that the model is sure of some of its answers."""
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        inputs, labels = samples(shapes, SIZE, 1000 + step, shifted=False)
        cross_entropy(answer(inputs), labels).backward()
        adam.step(), adam.zero_grad()
    model.eval()


class Models:
    """Both models, made when they are asked for, and the stream of each."""

    def __init__(self, quick: bool) -> None:
        self.steps, self.made = 10 if quick else 40, dict[str, nn.Module]()

    def get(self, two: bool, target: str = "class") -> nn.Module:
        key = f"{two} {target}"
        if key not in self.made:
            torch.manual_seed(0)
            self.made[key] = self._joint(target) if two else self._resnet()
        return copy.deepcopy(self.made[key])

    def _resnet(self) -> nn.Module:
        from torchvision.models import resnet18

        model: nn.Module = resnet18(num_classes=CLASSES)
        trained(model, lambda inputs: model(inputs["image"]), {"image": IMAGE}, self.steps)
        return model

    def _joint(self, target: str) -> nn.Module:
        shapes = {"image": IMAGE, "audio": SOUND}
        kinds = {"image": Modality("image", IMAGE), "audio": Modality("audio", SOUND)}
        backbone = find("backbone", "joint_transformer").load()(width=96, depth=2, joint=1, patch=8)
        backbone.build(StreamInfo(kinds))
        model = Model(backbone)
        model.grow(CLASSES if target == "class" else 1)
        if target == "class":
            trained(model, lambda inputs: model(as_batch(inputs)), shapes, 3 * self.steps)
        return model.eval()

    @staticmethod
    def stream(case: Case) -> list[Any]:
        shapes = {"image": IMAGE, "audio": SOUND} if case.two else {"image": IMAGE}
        drawn = [samples(shapes, case.size, seed)[0] for seed in range(POOL)]
        return [as_batch(one) if case.two else one["image"] for one in drawn]


def as_batch(inputs: dict[str, Tensor]) -> Batch:
    return Batch(dict(inputs), None, torch.arange(len(next(iter(inputs.values())))))


def loop_for(model: nn.Module, case: Case, **options: Any) -> OnlineLoop:
    options = {"guard": False, "target": case.target, **options}
    loop = streamcl.online(model, {"name": case.strategy, **case.options}, **options)
    if case.strategy == "eata":
        loop.calibrate(Models.stream(case)[:2])
    return loop


# time ----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of each turn: of processor time and of wall time."""

    processor: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def over(self, other: Times, beside: list[float] | None = None) -> tuple[float, float]:
        """The medians of the turns' ratios. `beside` is added to the other's."""
        more = beside or [0.0] * len(other.wall)
        return (
            statistics.median(mine / (theirs + extra) for mine, theirs, extra in zip(self.processor, other.processor, more, strict=True)),
            statistics.median(mine / (theirs + extra) for mine, theirs, extra in zip(self.wall, other.wall, more, strict=True)),
        )

    @property
    def milliseconds(self) -> float:
        """Of a batch."""
        return 1000 * statistics.median(self.processor) / TURN


Contender = Callable[[list[Any]], None]


def turns(contenders: dict[str, Contender], stream: list[Any], repeats: int, warm: int = 2) -> dict[str, Times]:
    found = {name: Times() for name in contenders}
    for turn in range(warm + repeats):
        batches = [stream[(turn * TURN + place) % len(stream)] for place in range(TURN)]
        for name in contenders if turn % 2 else reversed(contenders):
            wall, processor = time.perf_counter(), time.process_time()
            contenders[name](batches)
            processor, wall = time.process_time() - processor, time.perf_counter() - wall
            if turn >= warm:
                found[name].processor.append(processor)
                found[name].wall.append(wall)
    return found


def each(do: Callable[[Any], Any]) -> Contender:
    def contender(batches: list[Any]) -> None:
        for batch in batches:
            do(batch)

    return contender


def inference(module: nn.Module) -> Callable[[Any], Any]:
    @torch.no_grad()
    def answer(batch: Any) -> Tensor:
        scores: Tensor = module(batch)
        return scores

    return answer


def tent_by_hand(module: nn.Module) -> Callable[[Any], Any]:
    """A step of Tent as its authors' code makes it, but for the mode of the model: evaluation."""
    for layer in batch_norms(module).values():
        layer.running_mean = layer.running_var = None
    module.requires_grad_(False)
    chosen = list(affine(module).values())
    for value in chosen:
        value.requires_grad_(True)
    optimizer = torch.optim.Adam(chosen, lr=1e-3, fused=True)  # fused, as the loop's is: by torch's default it would be slower

    def step(batch: Any) -> Tensor:
        logits: Tensor = module(batch)
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits

    return step


def latency(models: Models, options: argparse.Namespace) -> Iterator[str]:
    case = Case("source")
    stream = models.stream(case)
    contenders = {"inference": each(inference(models.get(False))), "tent by hand": each(tent_by_hand(models.get(False)))}
    loops = {}
    for name in BARS:
        for guard in (False, True):
            loop = loops[name, guard] = loop_for(models.get(False), Case(name), guard=guard)
            contenders[f"{name}, guard" if guard else name] = each(loop)
    found = turns(contenders, stream, options.repeats)
    yield "| method | over | its ms a batch | ms | ratio | of wall time | bar | | ms with guard | ratio | the guard's events |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |"
    for name, bar in BARS.items():
        base = "tent by hand" if name == "tent" else "inference"
        ratio, wall = found[name].over(found[base])
        guarded, _ = found[f"{name}, guard"].over(found[base])
        counts = loops[name, True].counts
        events = ", ".join(f"{what} {number}" for what, number in counts.items() if what not in ("adapted",)) or "none"
        yield (
            f"| {name} | {base} | {found[base].milliseconds:.1f} | {found[name].milliseconds:.1f} | {ratio:.3f} | {wall:.3f} | {bar} | "
            f"{judged(ratio, bar)} | {found[f'{name}, guard'].milliseconds:.1f} | {guarded:.3f} | {events} |"
        )


def judged(ratio: float, bar: float) -> str:
    return "met" if ratio <= bar else "MISSED"


class Against:
    """A loop, recorded while it runs, and the passes of its last turn made again by hand."""

    def __init__(self, models: Models, case: Case) -> None:
        self.case, self.loop = case, loop_for(models.get(case.two, case.target), case)
        self.model, self.optimizer = copied(self.loop)
        self.traces: list[Trace] = []
        self.own: list[float] = []  # seconds of each turn
        self.counts: list[dict[str, int]] = []

    def looped(self, batches: list[Any]) -> None:
        self.traces = []
        for batch in batches:
            with recorded(self.loop.strategy, self.case.own) as trace:
                self.loop(batch)
            self.traces.append(trace)
        self.own.append(sum(trace.own for trace in self.traces))
        self.counts += [trace.samples() for trace in self.traces]

    def by_hand(self, batches: list[Any]) -> None:
        for trace in self.traces:
            repeated(trace, self.model, self.optimizer)


def passes(models: Models, options: argparse.Namespace) -> Iterator[str]:
    yield (
        "| method | batch | forward without graph | with | backward | part | steps | ms | passes by hand, ms | of its own, ms | "
        "over the passes | over both | of wall time | bar | |"
    )
    yield "| --- |" + " ---: |" * 13 + " --- |"
    for case in CASES:
        both, stream = Against(models, case), models.stream(case)
        begun = time.perf_counter()
        both.looped(stream[:TURN])
        taken = time.perf_counter() - begun
        repeats = max(2, min(options.repeats, int(options.seconds / 2 / taken)))
        found = turns({"loop": both.looped, "by hand": both.by_hand}, stream, repeats, 1 if taken > 5 else 2)
        own = both.own[-repeats:]
        bare, _ = found["loop"].over(found["by hand"])
        ratio, wall = found["loop"].over(found["by hand"], own)
        count = [statistics.mean(one[name] for one in both.counts) for name in both.counts[0]]
        yield (
            f"| {case.name} | {case.size} | {' | '.join(f'{value:.4g}' for value in count)} | {found['loop'].milliseconds:.1f} | "
            f"{found['by hand'].milliseconds:.1f} | {1000 * statistics.median(own) / TURN:.1f} | {bare:.3f} | {ratio:.3f} | {wall:.3f} | "
            f"{OTHERS} | {judged(ratio, OTHERS)} |"
        )


def copied(loop: OnlineLoop) -> tuple[Any, torch.optim.Optimizer | None]:
    """A model like the loop's, with the same tensors to be trained, and an optimiser over them."""
    model = copy.deepcopy(loop.model)
    chosen = dict(model.named_parameters())
    values = [chosen[name] for name in loop.strategy.adapted]
    return model, make_optimizer(values, loop.strategy.optimizer_settings) if values else None


# memory --------------------------------------------------------------------------------------------------------------------------


def tensors(root: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that something refers to, through containers, objects and what functions have closed over; modules are left out."""
    if id(root) in seen or isinstance(root, (str, bytes, int, float, type, nn.Module)) or root is None:
        return
    seen.add(id(root))
    if isinstance(root, Tensor):
        yield root
        if root.grad is not None:
            yield root.grad
        return
    inside: list[Any] = []
    if isinstance(root, Mapping):
        inside += [*root.keys(), *root.values()]
    elif isinstance(root, (list, tuple, set, frozenset, deque)):
        inside += list(root)
    inside += vars(root).values() if hasattr(root, "__dict__") else []
    inside += [getattr(root, name, None) for name in getattr(type(root), "__slots__", ())]
    for cell in getattr(root, "__closure__", None) or ():
        inside.append(cell.cell_contents)
    for one in inside:
        yield from tensors(one, seen)


class Held:
    """Bytes that lie beside the model, each storage counted where it is met first."""

    def __init__(self, loop: OnlineLoop) -> None:
        self.known = {value.untyped_storage().data_ptr() for value in [*loop.model.parameters(), *loop.model.buffers()]}
        strategy, self.loop = loop.strategy, loop
        self.parts = {
            "copy": self._new(strategy.source),
            "optimiser": self._new(strategy.optimizer.state if strategy.optimizer is not None else None),
            "declared": self._new(strategy.own_state()),
            "statistics": self._new(strategy.gathered),
            "reset": self._new(strategy._fresh),
            "versions": self._new(loop.versions),
            "rest": self._new(vars(loop)),
        }

    def _new(self, root: Any) -> int:
        total = 0
        for value in tensors(root, set()):
            storage = value.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    @property
    def bar(self) -> int:
        """Adapted tensors, their optimiser, one copy of them, and what is declared."""
        adapted = sum(value.nbytes for value in self.loop.strategy.adapted.values())
        return 2 * adapted + self.parts["optimiser"] + self.parts["declared"] + self.parts["statistics"]

    @property
    def total(self) -> int:
        """With the adapted tensors themselves, which are the model's own while it serves inline."""
        return sum(self.parts.values()) + sum(value.nbytes for value in self.loop.strategy.adapted.values())


def peak(do: Callable[[], Any]) -> int:
    """The most that torch had allocated at once beyond what there was, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        do()
    assert told.profiler is not None and told.profiler.kineto_results is not None
    events = [one for one in told.profiler.kineto_results.events() if one.name() == "[memory]"]
    now = most = 0
    for one in sorted(events, key=lambda one: one.start_ns()):
        now += one.nbytes()
        most = max(most, now)
    return most


def memory(models: Models, options: argparse.Namespace) -> Iterator[str]:
    batches = 12 if options.quick else 60
    plain, first = models.get(False), models.stream(Case("source"))[0]
    answer = inference(plain)
    answer(first)
    model = sum(value.nbytes for value in [*plain.parameters(), *plain.buffers()])
    most = peak(partial(answer, first)) / MIB
    yield f"ResNet-18: {model / MIB:.1f} MiB; inference on a batch of {SIZE} allocates {most:.1f} MiB at most."
    yield ""
    yield (
        "| method | adapted | its copy | optimiser | declared | kept for reset | the rest | over what there may be | each version | "
        "over, guard, keep 5 | over, guard, keep 1 | peak of a batch | by hand |"
    )
    yield "| --- |" + " ---: |" * 12
    chosen = [Case(name) for name in BARS] + [case for case in CASES if case.target == "class"]
    for case in chosen:
        stream = models.stream(case)
        count = 2 if case.strategy == "marginal_entropy" or "views" in case.note else batches
        of = {}
        for name, more in (("off", {"guard": False}), ("5", {"guard": True}), ("1", {"guard": True, "keep": 1})):
            loop = of[name] = loop_for(models.get(case.two, case.target), case, **more)
            for number in range(2 if name != "off" and not loop.strategy.adapted else count):
                loop(stream[number % len(stream)])
        loop, found = of["off"], Held(of["off"])
        by_hand, optimizer = copied(loop)
        with recorded(loop.strategy) as trace:
            loop(stream[0])
        repeated(trace, by_hand, optimizer)
        peaks = peak(partial(loop, stream[1])), peak(partial(repeated, trace, by_hand, optimizer))
        adapted = sum(value.nbytes for value in loop.strategy.adapted.values())
        guarded = {name: Held(of[name]) for name in ("5", "1")}
        versions = len(of["5"].versions)
        version = f"{guarded['5'].parts['versions'] / versions / MIB:.2f} ({versions})" if versions else "-"
        told = [adapted, *(found.parts[part] for part in ("copy", "optimiser", "declared", "reset", "rest"))]
        over = [found, guarded["5"], guarded["1"]]
        ratios = [f"{(one.total - one.bar) / MIB:+.2f}" for one in over]
        yield (
            f"| {case.name} | {' | '.join(f'{value / MIB:.2f}' for value in told)} | {ratios[0]} | {version} | {ratios[1]} | {ratios[2]} | "
            f"{peaks[0] / MIB:.1f} | {peaks[1] / MIB:.1f} |"
        )


# without end ---------------------------------------------------------------------------------------------------------------------


def resident() -> float:
    """MiB of resident memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def long(models: Models, options: argparse.Namespace) -> Iterator[str]:
    torch.manual_seed(0)
    kinds, drawn, size = 0.6 * torch.randn(CLASSES, 32), torch.Generator().manual_seed(1), 32
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, CLASSES))

    def batch(number: int) -> tuple[Tensor, Tensor]:
        """Gain and offset go round and round, each at a pace of its own."""
        labels = torch.randint(CLASSES, (size,), generator=drawn)
        gain, offset = 1 + 0.5 * math.sin(number / 700), math.sin(number / 1100)
        return gain * (kinds[labels] + torch.randn(size, 32, generator=drawn)) + offset, labels

    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        values, labels = batch(0)
        cross_entropy(model(values), labels).backward()
        adam.step(), adam.zero_grad()
    loop = streamcl.online(model.eval(), "tent", remember=256)
    yield "| batches | resident, MiB | held by the loop, KiB | Python objects | versions | updates | events | accuracy since | ms a batch |"
    yield "| ---: |" + " ---: |" * 8
    right, begun, every = 0, time.perf_counter(), max(1, options.batches // 10)
    measured: list[tuple[float, int, int]] = []
    for number in range(1, options.batches + 1):
        values, labels = batch(number)
        scores = loop(values).scores
        assert scores is not None
        right += int((scores.argmax(1) == labels).sum())
        if number % every:
            continue
        gc.collect()
        measured.append((resident(), Held(loop).total, len(gc.get_objects())))
        told = {what: count for what, count in loop.counts.items() if what not in ("adapted", "over_budget")}
        now, held, objects = measured[-1]
        taken = 1000 * (time.perf_counter() - begun) / every
        yield (
            f"| {number:,} | {now:.1f} | {held / 1024:.1f} | {objects:,} | {len(loop.versions)} | "
            f"{loop.strategy.counts.get('updates', 0):,} | {sum(told.values())} | {right / size / every:.1%} | {taken:.2f} |"
        )
        right, begun = 0, time.perf_counter()
    full = loop._answers.maxlen or 0  # answers that wait for their labels: until there are so many they add up, and the heap settles later
    begin = min(max(1, -(-4 * full // every)), len(measured) - 1)
    first, last = measured[begin], measured[-1]
    flat = last[0] - first[0] <= max(1.0, 0.005 * first[0]) and last[1] <= first[1] + 4096 and last[2] <= first[2] + 1000
    grown = f"resident memory {last[0] - first[0]:+.2f} MiB, held {last[1] - first[1]:+d} bytes, {last[2] - first[2]:+d} objects"
    yield ""
    if begin == len(measured) - 1:
        yield f"Too short to tell: more than {4 * full:,} batches are needed."
        return
    yield f"From {(begin + 1) * every:,} batches (four times the {full:,} whose answers wait for labels) to the last line: {grown}."
    yield "Flat." if flat else "NOT FLAT."


PARTS: dict[str, Callable[[Models, argparse.Namespace], Iterator[str]]] = {
    "latency": latency,
    "passes": passes,
    "memory": memory,
    "long": long,
}
TITLES = {"latency": "Latency", "passes": "Against the passes that a method needs", "memory": "Memory, MiB", "long": "Without end"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"some of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--quick", action="store_true", help="few repeats: a look, no measurement")
    parser.add_argument("--repeats", type=int, help="turns of each contender (41, quick: 3)")
    parser.add_argument("--seconds", type=float, default=120, help="about as long may one method's passes be repeated")
    parser.add_argument("--batches", type=int, help="of the part long (40000, quick: 2000)")
    parser.add_argument("--write", type=Path, help="write what is printed into this file")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}: there are {', '.join(PARTS)}")
    options.repeats = options.repeats or (3 if options.quick else 41)
    options.batches = options.batches or (2000 if options.quick else 40000)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    models, (_, _, how, *parts) = Models(options.quick), (__doc__ or "").split("\n\n")
    told = dict(part.split(": ", 1) for part in parts)
    command = " ".join(["python tools/bench/online.py", *sys.argv[1:]])
    page = ["# The online loop: what it costs", "", f"`{command}`, torch {torch.__version__.partition('+')[0]}, {os.cpu_count()} cores."]
    page += ["", how.removeprefix("Without names all parts run. "), ""]
    for part in options.parts or PARTS:
        text = told[part].strip()
        page += [f"## {TITLES[part]}", "", text[0].upper() + text[1:], ""]
        print(f"{part}:", flush=True)
        for line in PARTS[part](models, options):
            page.append(line)
            print(line, flush=True)
        page.append("")
    if options.write is not None:
        options.write.write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
