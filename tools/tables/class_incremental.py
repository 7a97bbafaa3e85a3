"""The table of the class-incremental configurations: each over seeds, on scikit-learn's digits in five tasks, by `streamcl sweep`.

    python tools/tables/class_incremental.py [--seeds 5] [--out runs/table] [METHOD ...]

What is finished under `--out` is not run again. Each row is a configuration of `configs/class_incremental/`, with its own settings (its
header says how they were chosen): they differ in network, epochs and memory, so the rows are no contest under one budget.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from streamcl.comparing import Estimate, Run
from streamcl.sweeping import sweep

REPLAY = ("er", "er_ace", "derpp", "icarl", "bic", "memo")
METHODS = ("finetune", "lwf", "ewc", *REPLAY, "simplecil", "slda", "fecam", "ranpac", "gacil", "joint")


def text(values: list[float], factor: float = 100.0, digits: int = 1) -> str:
    estimate = Estimate.of(values)
    if estimate is None:
        return "–"
    spread = "" if estimate.deviation is None else f" ± {factor * estimate.deviation:.{digits}f}"
    return f"{factor * estimate.mean:.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"some of {', '.join(METHODS)}; all where none is named")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    options = parser.parse_args()
    rows = []
    for method in options.methods or METHODS:
        out = options.out / method
        sweep(f"class_incremental/{method}", (), (f"seed=0..{options.seeds - 1}",), out=out)
        scores = [Run.read(path.parent).scores for path in sorted(out.glob("*/scores.json"))]
        figures = [text([one[key] for one in scores if one[key] is not None]) for key in ("final", "average_incremental", "forgetting")]
        memory = text([one["memory_bytes"] / 1000 for one in scores], 1.0)
        seconds = text([one["seconds"]["total"] for one in scores], 1.0)
        rows.append([method, str(len(scores)), *figures, memory, seconds])
    print("| method | seeds | final, % | average incremental, % | forgetting, points | memory, kB | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
