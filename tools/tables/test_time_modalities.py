"""The table of test-time adaptation of several modalities: weak, strong and mixed shifts, missing modalities, and values, over seeds.

    python tools/tables/test_time_modalities.py [--seeds 5] [--out FOLDER] [STREAM ...] > docs/results/test_time_modalities.md

What is finished under `--out` is not run again. A method whose file is not there is left out and named.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from class_incremental import text

from streamcl import running
from streamcl.comparing import Estimate, Run
from streamcl.plugins import plugins

SUMI = "{name: sumi, horizon: 60, optimizer: {lr: 0.001}"
CLASSES = {
    "source": "source",
    "tent": "tent",
    "tent, answers after": "{name: tent, answer: after}",
    "sar": "{name: sar, optimizer: {lr: 0.001}}",
    "read, paper's rate 1e-4": "read",
    "read": "{name: read, optimizer: {lr: 0.001}}",
    "sumi, paper's rate 1e-4": "{name: sumi, horizon: 60}",
    "sumi": SUMI + "}",
    "sumi, no sharing": SUMI + ", lam: 0}",
    "sumi, no sharing, no assistance": SUMI + ", lam: 0, gamma_u: 0}",
    "sumi, no sharing, no smoothing": SUMI + ", lam: 0, band: none}",
    "sumi, released bands and thresholds": SUMI + ", band: range, weights: mean, gamma_m: 2.454, ent0: 2.454}",
}
FEW = ("source", "tent", "sar", "read", "sumi, paper's rate 1e-4", "sumi", "sumi, no sharing")
CASP = "{name: casp, window: 128"
VALUES = {
    "source": "source",
    "casp": CASP + "}",
    "casp, rate 3e-4": CASP + ", optimizer: {lr: 0.0003}}",
    "casp, contrast alone": CASP + ", label_epochs: 0}",
    "casp, the unstable as released": CASP + ", select: unstable}",
}


@dataclass(frozen=True)
class Table:
    title: str
    config: str
    strategies: Mapping[str, str]
    parts: Mapping[str, slice] = field(default_factory=dict)  # which segments are shown by themselves, where their domains do not tell
    error: bool = False  # a mean absolute error, and no accuracy


TABLES = {
    "mixed": Table("Mixed: weak and strong shifts in one stream", "sumi", CLASSES),
    "weak": Table("Weak: one modality corrupted, ten domains in turn", "sumi_weak", {name: CLASSES[name] for name in FEW}),
    "strong": Table("Strong: both modalities corrupted, 24 domains in turn", "sumi_strong", {name: CLASSES[name] for name in FEW}),
    "missing": Table(
        "Missing: sounds, then images in a burst, then no sound at all",
        "sumi_missing",
        {name: CLASSES[name] for name in FEW},
        {"30 % without sound": slice(0, None, 3), "30 % without image": slice(1, None, 3), "no sound": slice(2, None, 3)},
    ),
    "mild": Table(
        "Mild first: slight corruptions, then one modality alone",
        "sumi_mild",
        {name: CLASSES[name] for name in FEW},
        {"complete": slice(0, 4), "no sound": slice(4, 5), "no image": slice(5, 6)},
    ),
    "values": Table("Values: CASP on windows of 128, two for each of three domains", "casp", VALUES, error=True),
}


def apart(scores: Mapping[str, Any], parts: Mapping[str, slice]) -> dict[str, float]:
    """The mean score of each part of the stream: as said, or by what is wrong with a domain; of a few domains, each by itself."""
    if parts:
        found = {name: scores["per_task"][part] for name, part in parts.items()}
    elif len(scores["per_domain"]) <= 3:
        found = {name: [value] for name, value in scores["per_domain"].items()}
    else:
        found = {}
        for domain, value in scores["per_domain"].items():
            kind = "one absent" if domain.startswith("no ") else "both corrupted" if " + " in domain else "one corrupted"
            found.setdefault(kind, []).append(value)
        found = found if len(found) > 1 else {}
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def finished(config: str, strategy: str, seed: int, out: Path) -> Run:
    """A run, which is begun unless it is there: all in one process, since one run takes no longer than starting a process does."""
    folder = out / f"seed={seed}"
    if not (folder / "scores.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        running.run(f"test_time/{config}", (f"strategy={strategy}", f"seed={seed}", "log=[]"), out=folder)
    return Run.read(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("streams", nargs="*", metavar="STREAM", help=f"some of {', '.join(TABLES)}; all where none is named")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/test_time_modalities"))
    options = parser.parse_args()
    print(
        "# Test-time adaptation of several modalities, as measured\n\n"
        "Made by `python tools/tables/test_time_modalities.py` on two CPU cores; mean ± standard deviation over seeds. "
        "`over the source` is the mean of the differences to the source model on the same seed, ± half of its 95 % interval. "
        "tent and sar answer before their update, read and sumi after it, as their papers do."
    )
    there = plugins("strategy")
    for name in options.streams or TABLES:
        table, missing = TABLES[name], []
        source: dict[int | None, float] = {}
        factor, digits = (1.0, 3) if table.error else (100.0, 1)
        heading: list[str] | None = None
        for label, strategy in table.strategies.items():
            method = label.partition(",")[0]
            if method not in there:
                missing.append(method)
                continue
            out = options.out / name / label.replace(" ", "-").replace(",", "").replace("'", "")
            runs = [finished(table.config, strategy, seed, out) for seed in range(options.seeds)]
            shares = [apart(run.scores, table.parts) for run in runs]
            if heading is None:
                heading = ["mean absolute error" if table.error else "accuracy, %", *shares[0], "over the source", "seconds"]
                print(f"\n## {table.title}\n\n`configs/test_time/{table.config}.yaml`\n")
                print(f"| | seeds | {' | '.join(heading)} |\n| --- |{' ---: |' * (len(heading) + 1)}")
            finals = {run.seed: run.scores["final"] for run in runs}
            source = source or finals
            over = Estimate.of([factor * (value - source[seed]) for seed, value in finals.items() if seed in source])
            half = "" if over is None or over.half_width is None else f" ± {over.half_width:.{digits}f}"
            cells = [
                text(list(finals.values()), factor, digits),
                *(text([one[kind] for one in shares], factor, digits) for kind in shares[0]),
                "–" if over is None or label == "source" else f"{over.mean:+.{digits}f}{half}",
                text([run.scores["seconds"]["total"] for run in runs], 1.0),
            ]
            print(f"| {label} | {len(runs)} | {' | '.join(cells)} |", flush=True)
        for method in missing:
            print(f"\nLeft out, {method}: there is no such strategy")
            print(f"{name}: there is no strategy {method}", file=sys.stderr)


if __name__ == "__main__":
    main()
