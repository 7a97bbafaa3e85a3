"""CIFAR-10 with few images and few epochs: whether the methods come out in the order that they are known to have. No benchmark figures.

    STREAMCL_DATA=... OMP_NUM_THREADS=1 python tools/bench/cifar_order.py [METHOD ...] [--epochs 10] [--per-class 100] [--device cpu]

100 training and 40 test images per class, 5 tasks of 2 classes, no task told; the slim ResNet-18 (20 channels), batch 32 (and 32 replayed),
SGD at 0.05 without a schedule, 200 exemplars, one seed. It reads cifar10-train.parquet and cifar10-test.parquet under STREAMCL_DATA.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from streamcl.config import EngineConfig
from streamcl.data import ArrayDataset, Subset, place_in_class, whole
from streamcl.engine import Engine
from streamcl.plugins import find
from streamcl.stream import Dataset, Source, SourceData

METHODS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "lwf": {},
    "ewc": {},
    "er": {"replay": 32},
    "er_ace": {"replay": 32},
    "derpp": {"replay": 32, "alpha": 0.3},
    "icarl": {"optimizer": {"lr": 0.5, "momentum": 0.9}, "mirror": True},
    "bic": {"bias_epochs": 100},
    "memo": {},
}
TERMS = ("lwf", "ewc")


class Few(Source):
    """The first images of each class."""

    def __init__(self, folder: Path, per_class: int, test_per_class: int) -> None:
        self.folder, self.counts = folder, (per_class, test_per_class)

    def load(self) -> SourceData:
        files = {"path": self.folder / "cifar10-train.parquet", "test": self.folder / "cifar10-test.parquet"}
        data = find("source", "parquet").load()(**files, decode="lazy", workers=0).load()
        train, test = (first(part, count) for part, count in zip((data.train, data.test), self.counts, strict=True))
        return SourceData(train, test, data.class_names, data.modalities, licence=data.licence)


def first(data: Dataset, count: int) -> Dataset:
    rows = (place_in_class(data.targets) < count).nonzero().squeeze(1)
    batch = whole(Subset(data, rows))
    assert batch.target is not None
    return ArrayDataset(batch.inputs, batch.target, batch.ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"some of {', '.join(METHODS)}; all where none is named")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    folder = Path(os.environ.get("STREAMCL_DATA", "none"))
    if not (folder / "cifar10-train.parquet").exists():
        print("left out: STREAMCL_DATA names no folder with cifar10-train.parquet and cifar10-test.parquet")
        return
    torch.set_num_threads(1)
    source = Few(folder, options.per_class, 40)
    print("| method | final, % | average incremental, % | forgetting, points | processor seconds |\n| --- | ---: | ---: | ---: | ---: |")
    for name in options.methods or METHODS:
        given = {"epochs": options.epochs, "batch": 32, "optimizer": {"lr": 0.05}, "schedule": "constant"}
        if name in TERMS:
            term = find("term", name).load()(**METHODS[name])
            strategy = find("strategy", "finetune").load()(**given, over="task", with_=(term,))
        else:
            strategy = find("strategy", name).load()(**{**given, **METHODS[name]})
        started = time.process_time()
        scores = Engine(
            find("scenario", "class_incremental").load()(data=source, tasks=5),
            strategy,
            find("backbone", "resnet18").load()(width=20),
            find("memory", "faiss").load()(exemplars=200),
            engine=EngineConfig(device=options.device, threads=1),
        ).run()
        figures = " | ".join(f"{100 * scores[key]:.1f}" for key in ("final", "average_incremental", "forgetting"))
        print(f"| {name} | {figures} | {time.process_time() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
