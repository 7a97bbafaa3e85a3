"""Whether every kind of stream comes out the same: SHA-256 over all that it says and hands out, from processes that differ.

    OMP_NUM_THREADS=1 python tools/bench/streams_digests.py

Four processes emit the same streams: they differ in PYTHONHASHSEED, in how many workers read ahead (none, one, two), and the last one goes
on half-way from the state that the first one saved. Every batch counts with its inputs, targets, ids, masks and columns beside, in
shuffled passes over training, validation and test sets (a test-time stream is read in order), and what a task tells of itself. The
sources are embedded ones, read through workers as if they lay on disk; with STREAMCL_DATA a stream of its JPEG is among them. Live
streams are not: their order is that of arrival.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamcl.data import ArrayDataset, FileDataset
from streamcl.plugins import find
from streamcl.seeding import generator
from streamcl.stream import Scenario, Source, SourceData, Task, take

SEED = 3


def scenario(name: str, data: Source, **options: Any) -> Scenario:
    return find("scenario", name).load()(data=data, **options)


class Rows:
    """Decodes nothing: rows of columns that lie in memory."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = columns

    def __call__(self, rows: list[int]) -> dict[str, Any]:
        return {name: take(column, torch.tensor(rows)) for name, column in self.columns.items()}


class Read(Source):
    """A source whose samples are read by so many workers, as if they lay on disk."""

    licence = "none"

    def __init__(self, name: str, workers: int, **options: Any) -> None:
        self.source, self.workers = find("source", name).load()(**options), workers

    def load(self) -> SourceData:
        data = self.source.load()
        both = []
        for dataset in (data.train, data.test):
            if isinstance(dataset, ArrayDataset):
                dataset = FileDataset(
                    Rows(dataset.inputs), dataset.targets, dataset.ids, self.workers, dataset.extra or None, dataset.present
                )
            elif isinstance(dataset, FileDataset):
                dataset.workers = self.workers
            both.append(dataset)
        return replace(data, train=both[0], test=both[1])


def every_kind(workers: int) -> Iterator[tuple[str, Scenario]]:
    def digits() -> Source:
        return Read("digits", workers)

    def shapes(**options: Any) -> Source:
        return Read("shapes", workers, samples=600, test_samples=150, **options)

    def scenes(**options: Any) -> Source:
        return Read("digit_scenes", workers, scenes=400, test_scenes=100, **options)

    held = {"validation": 0.1}
    yield "class_incremental", scenario("class_incremental", digits(), tasks=5, repeat=0.2, **held)
    yield (
        "class_incremental, online, told, long tail",
        scenario("class_incremental", digits(), tasks=5, imbalance=0.1, online=True, task_ids=True),
    )
    yield "blurry", scenario("blurry", digits(), tasks=5, **held)
    levels = [{"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}]
    yield "hierarchical", scenario("hierarchical", digits(), levels=levels, tasks=[1, 2], dual=True, **held)
    yield "few_shot", scenario("few_shot", digits(), base=4, ways=2, shots=5, **held)
    yield "multi_label", scenario("multi_label", scenes(), increment=2, partial=0.2, wrong=0.1, **held)
    yield "domain_incremental, rotated", scenario("domain_incremental", digits(), shift="rotate", tasks=4, **held)
    yield "domain_incremental, permuted", scenario("domain_incremental", digits(), shift="permute", tasks=4, share="parts")
    yield "domain_incremental, values", scenario("domain_incremental", shapes(target="value"), by="domain", task_ids=True)
    patterns = [{}, {"image": 0.3, "text": 0.3, "image+text": 0.1}, {"audio": 1.0}]
    yield "missing_modality", scenario("missing_modality", shapes(), missing=patterns, **held)
    yield "concepts", scenario("concepts", digits())
    yield "reasoning", scenario("reasoning", Read("puzzles", workers, count=60, test=20), order="given")
    yield "instruction", scenario("instruction", scenes(as_="dialogues"))
    yield "retrieval", scenario("retrieval", scenes(as_="captions"), by="domain")
    yield "test_time, 15 corruptions", scenario("test_time", digits(), samples=200)
    yield (
        "test_time, image and sound, gaps",
        scenario(
            "test_time", Read("digits_av", workers), combine="weak_and_strong", shift="mixed", rounds=3, labels="dirichlet", samples=300
        ),
    )
    if (file := Path(os.environ.get("STREAMCL_DATA", "none")) / "cifar10-test.parquet").exists():
        source = Read("parquet", workers, path=file, test_fraction=0.2, decode="lazy")
        yield "class_incremental, JPEG", scenario("class_incremental", source, tasks=5, **held)


def digest(stream: Scenario, task: Task) -> str:
    """Everything that a task says and hands out, to the byte."""
    told = [task.name, task.classes, task.seen, task.labels, sorted(task.names.items()), task.about]
    mark = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for part, dataset in (("train", task.train), ("validation", task.validation), ("test", stream.test(task, task))):
        if dataset is None:
            continue
        for batch in dataset.batches(32, not stream.info.test_time, generator(SEED, "digest", part, task.index)):
            columns = {**batch.inputs, "target": batch.target, "ids": batch.ids, "task": batch.task, **batch.extra}
            columns |= {f"present {name}": mask for name, mask in (batch.present or {}).items()}
            for name, column in sorted(columns.items()):
                if isinstance(column, Tensor):
                    mark.update(f"{part} {name} {column.dtype} {tuple(column.shape)}".encode())
                    mark.update(column.contiguous().numpy().tobytes())
                else:
                    mark.update(json.dumps([part, name, column]).encode())
    return mark.hexdigest()


def emit(workers: int, states: dict[str, Any]) -> None:
    """In a process of its own: what comes out of every kind, and where it stood half-way; from there on, where `states` says so."""
    found = {}
    for name, stream in every_kind(workers):
        stream.open(SEED)
        if name in states:
            stream.restore(states[name])
        half, digests = {}, []
        for task in stream:
            digests.append(digest(stream, task))
            if task.index == len(stream) // 2:
                half = stream.state()
        found[name] = {"digests": digests, "half": half}
    print("\nmeasured", json.dumps(found))


def report() -> None:
    print("| every kind | tasks | SHA-256 | 1 worker, another hash seed | 2 workers, another | 2 workers, restored half-way |")
    print("| --- | ---: | --- | --- | --- | --- |")
    first, others = child(0, 1), [child(workers, workers + 1) for workers in (1, 2)]
    with tempfile.NamedTemporaryFile("w") as states:
        json.dump({name: one["half"] for name, one in first.items()}, states)
        states.flush()
        later = child(2, 4, states.name)
    for name, one in first.items():
        own = one["digests"]
        rest = own[len(own) // 2 + 1 :]
        assert rest, f"{name} has too few tasks to go on half-way"
        alike = [*(other[name]["digests"] == own for other in others), later[name]["digests"] == rest]
        told = " | ".join("identical" if same else "DIFFERENT" for same in alike)
        print(f"| {name} | {len(own)} | {hashlib.sha256(''.join(own).encode()).hexdigest()[:16]} | {told} |", flush=True)


def child(workers: int, hash_seed: int, states: str = "") -> dict[str, Any]:
    command = [sys.executable, __file__, "--workers", str(workers), "--states", states]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": str(hash_seed)})
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.rsplit("measured", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("workers", "states"):  # how it calls itself
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.workers is None:
        report()
    else:
        emit(int(options.workers), json.loads(Path(options.states).read_text()) if options.states else {})


if __name__ == "__main__":
    main()
