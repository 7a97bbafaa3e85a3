"""Time per training iteration of replay: a hand-written PyTorch loop, streamcl's `er`, and Avalanche's `Replay`, on the same work.

scikit-learn's digits in 5 tasks of 2 classes, MLP 64-256-10, batch 32 + 32 replayed from 200 samples, SGD, 20 epochs a task, one
thread. The three alternate within one process and each figure is a median over repeats, so that the noise of the machine meets all alike.

    python tools/bench/loop.py [--repeats 7]        (Avalanche is left out where avalanche-lib is not installed)
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from streamcl.config import EngineConfig
from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.plugins import find

EPOCHS, BATCH, BUFFER, RATE = 20, 32, 200, 0.1


def scenario():
    return find("scenario", "class_incremental").load()(data=find("source", "digits").load()(), tasks=5)


def by_hand(
    tasks: list[tuple[torch.Tensor, torch.Tensor]],
    model: nn.Module | None = None,
    epochs: int = EPOCHS,
    buffer: int = BUFFER,
    after_task: Callable[[nn.Module], None] = lambda model: None,
) -> tuple[float, int]:
    """What one would write without any library: tensors, a reservoir, one loop."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    held_x, held_y = tasks[0][0].new_empty(buffer, *tasks[0][0].shape[1:]), torch.empty(buffer, dtype=torch.int64)
    seen = steps = 0
    started = time.perf_counter()
    for x, y in tasks:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for epoch in range(epochs):
            order = torch.randperm(len(x))
            for start in range(0, len(x), BATCH):
                chosen = order[start : start + BATCH]
                new_x, new_y = x[chosen], y[chosen]
                batch_x, batch_y = new_x, new_y
                held = min(seen, buffer)
                if held:
                    drawn = torch.randperm(held)[:BATCH]
                    batch_x, batch_y = torch.cat([new_x, held_x[drawn]]), torch.cat([new_y, held_y[drawn]])
                optimizer.zero_grad()
                loss = cross_entropy(model(batch_x), batch_y)
                loss.backward()
                optimizer.step()
                steps += 1
                if epoch == 0:
                    numbers = torch.arange(seen, seen + len(new_x))
                    slots = torch.where(numbers < buffer, numbers, (torch.rand(len(new_x)) * (numbers + 1)).long())
                    kept = slots < buffer
                    held_x[slots[kept]], held_y[slots[kept]] = new_x[kept], new_y[kept]
                    seen += len(new_x)
        after_task(model)
    return time.perf_counter() - started, steps


def by_engine() -> tuple[float, int]:
    strategy = find("strategy", "er").load()(epochs=EPOCHS, batch=BATCH, replay=BATCH, optimizer={"lr": RATE})
    memory = find("memory", "faiss").load()(exemplars=BUFFER)
    engine = Engine(
        scenario(), strategy, find("backbone", "mlp").load()(hidden=[256]), memory, engine=EngineConfig(device="cpu", threads=1)
    )
    engine.run()
    return engine.seconds["learn"], engine.context.steps


def by_avalanche(tasks: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, int]:
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.benchmarks.utils.data_attribute import TensorDataAttribute
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Replay

    torch.manual_seed(0)
    datasets = []
    for x, y in tasks:
        data = torch.utils.data.TensorDataset(x, y)
        attributes = [
            TensorDataAttribute(y, name="targets"),
            TensorDataAttribute(torch.zeros_like(y), name="targets_task_labels", use_in_getitem=True),
        ]
        datasets.append(AvalancheDataset([data], data_attributes=attributes))
    benchmark = benchmark_from_datasets(train=datasets)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    strategy = Replay(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        criterion=nn.CrossEntropyLoss(),
        mem_size=BUFFER,
        train_mb_size=BATCH,
        train_epochs=EPOCHS,
        evaluator=EvaluationPlugin(),
    )
    steps = sum(-(-len(x) // BATCH) * EPOCHS for x, _ in tasks)
    started = time.perf_counter()
    for experience in benchmark.train_stream:
        strategy.train(experience, num_workers=0)
    return time.perf_counter() - started, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    stream = scenario()
    stream.open(0)
    batches = [whole(task.train) for task in stream]
    tasks = [(batch.inputs["image"].flatten(1) / 16, batch.target) for batch in batches]
    contenders = {"hand-written loop": lambda: by_hand(tasks), "streamcl er": by_engine}
    try:
        import avalanche  # noqa: F401

        contenders["Avalanche Replay"] = lambda: by_avalanche(tasks)
    except ImportError:
        print("avalanche-lib is not installed: pip install 'streamcl[avalanche]' for the third row")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            seconds, steps = contender()
            if repeat:  # the first round warms up
                times[name].append(seconds / steps * 1e6)
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'':20} {'us/iteration':>12} {'lowest':>8} {'highest':>8} {'ratio to streamcl':>18}")
    for name, values in times.items():
        print(f"{name:20} {middle[name]:12.0f} {min(values):8.0f} {max(values):8.0f} {middle[name] / middle['streamcl er']:18.2f}")
    print(f"streamcl er / hand-written loop: {middle['streamcl er'] / middle['hand-written loop']:.3f} (bar: at most 1.10)")
    if "Avalanche Replay" in middle:
        print(f"Avalanche Replay / streamcl er: {middle['Avalanche Replay'] / middle['streamcl er']:.2f} (bar: at least 2.2)")


if __name__ == "__main__":
    main()
