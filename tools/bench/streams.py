"""What it costs to take batches from a stream: ratios against named baselines in one run, with the bar that each has to meet.

    OMP_NUM_THREADS=1 python tools/bench/streams.py [--quick] [emitting] [jpeg] [building] [digests] [corruptions]

Without names all parts run; --quick repeats less. Contenders take turns, and each figure is a median over repeats, so that the noise of
the machine meets all alike.

emitting: a shuffled pass over all tasks of a stream whose data lie in memory, against a plain loop that draws a permutation and indexes
the tensors, `x[rows], y[rows]`, in processor time. A second loop has `x.index_select(0, rows)` instead, which torch does several times
faster for bytes. Both loops read each task from tensors of its own, cut out of the data and blanked (missing modalities) beforehand, and
look up no ids, which every batch of a stream has.

jpeg: the 20,000 images of STREAMCL_DATA's cifar10-train.parquet as the source `parquet` decodes them when they are read, with two
workers, against Hugging Face `datasets` in torch's DataLoader with two workers, in its own torch format and with a transform by hand; in
images a second of wall time, with the start of the workers.

The others have scripts of their own: streams_building.py, streams_digests.py, corruptions.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from growth import Loaded
from noise import Noise
from torch import Tensor

from streamcl.data import ArrayDataset
from streamcl.plugins import find
from streamcl.stream import Grouping, Modality, Scenario, Source, SourceData, Task

SEED = 3
SHAPES = {"1 x 28 x 28": (1, 28, 28), "3 x 32 x 32": (3, 32, 32), "vector of 512": (512,)}
PER_CLASS, CLASSES, TASKS = 2000, 10, 5
Cut = list[tuple[Tensor, ...]]  # the columns of each task


def scenario(name: str, data: Source, **options: Any) -> Scenario:
    return find("scenario", name).load()(data=data, **options)


def medians(contenders: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """They take turns; the first round warms up."""
    taken = [{name: contender() for name, contender in contenders.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(times[name] for times in taken) for name in contenders}


def several(source: SourceData) -> SourceData:
    """The same samples with a second modality, and in groups."""
    train, test = source.train, source.test
    assert isinstance(train, ArrayDataset) and isinstance(test, ArrayDataset)
    parts = []
    for dataset in (train, test):
        draw = torch.Generator().manual_seed(1)
        vectors = torch.randn(len(dataset), 64, generator=draw)
        parts.append(ArrayDataset({**dataset.inputs, "vector": vectors}, dataset.targets, dataset.ids))
    group = [torch.arange(len(part)) % TASKS for part in parts]
    names = [str(number) for number in range(TASKS)]
    modalities = {**source.modalities, "vector": Modality("vector", (64,))}
    return SourceData(parts[0], parts[1], source.class_names, modalities, groupings={"domain": Grouping(names, *group)})


def labelled(source: SourceData) -> SourceData:
    """The same samples, each with about three labels."""
    parts = []
    for dataset in (source.train, source.test):
        assert isinstance(dataset, ArrayDataset)
        labels = (torch.rand(len(dataset), CLASSES, generator=torch.Generator().manual_seed(1)) < 0.3).to(torch.int8)
        parts.append(ArrayDataset(dataset.inputs, labels, dataset.ids))
    return SourceData(parts[0], parts[1], source.class_names, source.modalities, target="labels")


def streams_in_memory() -> Iterator[tuple[str, Scenario]]:
    """Streams whose data lie in memory, by name."""
    plain = {name: Noise(CLASSES, PER_CLASS, 10, shape).load() for name, shape in SHAPES.items()}
    for name, data in plain.items():
        yield f"class_incremental, {name}", scenario("class_incremental", Loaded(data), tasks=TASKS)
    small, both = plain["1 x 28 x 28"], several(plain["1 x 28 x 28"])
    what = "1 x 28 x 28"
    yield f"class_incremental, task_ids, {what}", scenario("class_incremental", Loaded(small), tasks=TASKS, task_ids=True)
    yield f"class_incremental, online, {what}", scenario("class_incremental", Loaded(small), tasks=TASKS, online=True)
    yield f"blurry, {what}", scenario("blurry", Loaded(small), tasks=TASKS)
    yield f"few_shot, {what}", scenario("few_shot", Loaded(small), base=6, ways=2, shots=5)
    yield f"multi_label, {what}", scenario("multi_label", Loaded(labelled(small)), increment=2)
    yield f"domain_incremental, {what} and 64", scenario("domain_incremental", Loaded(both), by="domain")
    patterns = [{"image": 0.1 * step, "vector": 0.1} for step in range(TASKS)]
    yield f"missing_modality, {what} and 64", scenario("missing_modality", Loaded(both), missing=patterns)


def cut_out(tasks: list[Task]) -> Cut:
    """The tensors of each task: inputs, masks, targets."""
    cut = []
    for task in tasks:
        everything = next(task.train.batches(len(task.train)))
        columns = [*everything.inputs.values(), *(everything.present or {}).values(), everything.target]
        cut.append(tuple(column for column in columns if isinstance(column, Tensor)))
    return cut


def plain_loop(tasks: Cut, size: int) -> None:
    for columns in tasks:
        order = torch.randperm(len(columns[0]))
        if len(columns) == 2:
            x, y = columns
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                x[rows], y[rows]
        else:
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                [column[rows] for column in columns]


def fast_loop(tasks: Cut, size: int) -> None:
    for columns in tasks:
        order = torch.randperm(len(columns[0]))
        if len(columns) == 2:
            x, y = columns
            for rows in order.split(size):
                x.index_select(0, rows), y.index_select(0, rows)
        else:
            for rows in order.split(size):
                [column.index_select(0, rows) for column in columns]


def emitting(repeats: int) -> None:
    print("| emitting, us a batch | batch | plain loop | with index_select | stream | over plain (bar 1.1) | over index_select |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for what, stream in streams_in_memory():
        stream.open(SEED)
        for size in (10, 32, 256):
            plain, fast, ours = emitted(stream, size, repeats)
            row = f"{what} | {size} | {plain:.1f} | {fast:.1f} | {ours:.1f} | {ours / plain:.2f} | {ours / fast:.2f}"
            print(f"| {row} |", flush=True)


def emitted(stream: Scenario, size: int, repeats: int) -> list[float]:
    """Microseconds a batch of the plain loop, the fast one, and the stream."""
    cut = cut_out([stream.task(index) for index in range(len(stream))])
    steps = sum(-(-len(columns[0]) // size) for columns in cut)

    def streamed() -> float:
        tasks = [stream.task(index) for index in range(len(stream))]  # anew: what is online is read once
        started = time.process_time()
        for task in tasks:
            deque(task.train.batches(size, shuffle=True), maxlen=0)
        return time.process_time() - started

    def looped(loop: Callable[[Cut, int], None]) -> float:
        started = time.process_time()
        loop(cut, size)
        return time.process_time() - started

    middle = medians({"plain": lambda: looped(plain_loop), "stream": streamed, "fast": lambda: looped(fast_loop)}, repeats)
    return [middle[name] / steps * 1e6 for name in ("plain", "fast", "stream")]


def to_tensors(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """What a person writes as the transform of a Hugging Face data set: Pillow to uint8, channels first."""
    pixels = [np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in rows["image"]]
    return {"image": [torch.from_numpy(np.ascontiguousarray(values)) for values in pixels], "label": rows["label"]}


def jpeg(repeats: int) -> None:
    file = Path(os.environ.get("STREAMCL_DATA", "none")) / "cifar10-train.parquet"
    if not file.exists():
        print("jpeg: left out, for STREAMCL_DATA names no folder with cifar10-train.parquet")
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    datasets.disable_progress_bars()
    print("| JPEG, 3 x 32 x 32, images a second | batch | baseline | baseline | stream | stream over it (bar 0.9) |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as cache:
        plain = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=cache)
        baselines = {"`datasets`, format torch": plain.with_format("torch"), "`datasets`, own transform": plain.with_transform(to_tensors)}
        for tasks, size in ((1, 32), (1, 256), (TASKS, 256)):
            source = find("source", "parquet").load()(path=file, test_fraction=0.01, decode="lazy", workers=2)
            stream = scenario("class_incremental", source, tasks=tasks)
            stream.open(SEED)
            speed = decoded([task.train for task in stream], baselines, size, repeats)
            for name in baselines:
                told = f"{tasks} task{'s' * (tasks > 1)} | {size} | {name} | {speed[name]:.0f} | {speed['stream']:.0f}"
                print(f"| {told} | {speed['stream'] / speed[name]:.2f} |", flush=True)


def decoded(parts: list[Any], baselines: dict[str, Any], size: int, repeats: int) -> dict[str, float]:
    """Images a second of the stream and of each baseline, which reads as many images in as many loaders."""
    from torch.utils.data import DataLoader

    images = sum(map(len, parts))
    bounds = np.cumsum([0] + [len(part) for part in parts])
    pieces = {n: [data.select(range(*pair)) for pair in pairwise(bounds)] for n, data in baselines.items()}

    def passed(loaders: Iterable[Any]) -> float:
        started, seen = time.perf_counter(), 0
        for loader in loaders:
            for batch in loader:
                seen += len(batch["label"] if isinstance(batch, dict) else batch)
        assert seen == images
        return time.perf_counter() - started

    contenders = {"stream": lambda: passed(part.batches(size, shuffle=True) for part in parts)}
    for name, mine in pieces.items():
        contenders[name] = lambda mine=mine: passed(DataLoader(data, size, shuffle=True, num_workers=2) for data in mine)
    return {name: images / seconds for name, seconds in medians(contenders, repeats).items()}


def elsewhere(script: str, *options: str) -> None:
    subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *options], check=True)


PARTS: dict[str, Callable[[bool], None]] = {
    "emitting": lambda quick: emitting(11 if quick else 41),
    "jpeg": lambda quick: jpeg(2 if quick else 5),
    "building": lambda quick: elsewhere("streams_building.py", "--repeats", "1" if quick else "3"),
    "digests": lambda quick: elsewhere("streams_digests.py"),
    "corruptions": lambda quick: elsewhere("corruptions.py", *(["--quick"] if quick else [])),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"some of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}: there are {', '.join(PARTS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for part in options.parts or PARTS:
        PARTS[part](options.quick)
        print(flush=True)


if __name__ == "__main__":
    main()
