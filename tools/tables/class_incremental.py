"""The table of the class-incremental configurations: each over seeds, on scikit-learn's digits in five tasks, by `streamcl sweep`.

    python tools/tables/class_incremental.py [--seeds 5] [--out runs/table] [METHOD ...]
    STREAMCL_DATA=... python tools/tables/class_incremental.py --intents [--seeds 1]

What is finished under `--out` is not run again. Each row is a configuration of `configs/class_incremental/`, with its own settings (its
header says how they were chosen): they differ in network, epochs and memory, so the rows are no contest under one budget. `--intents` is
the table of the methods that gather statistics, on CLINC150's 150 intents and one frozen encoder of texts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from streamcl.comparing import Estimate, Run
from streamcl.sweeping import sweep

REPLAY = ("er", "er_ace", "derpp", "icarl", "bic", "memo")
INTENTS = {
    "simplecil": ("strategy=simplecil",),
    "slda": ("strategy=slda",),
    "ranpac": ("strategy={name: ranpac, M: 2000}",),
    "gacil": ("strategy={name: gacil, buffer: 2000}",),
    "fecam": ("strategy=fecam",),
}
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
    parser.add_argument("--intents", action="store_true", help="CLINC150 instead of digits")
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    options = parser.parse_args()
    rows = []
    for method in options.methods or (INTENTS if options.intents else METHODS):
        out = options.out / ("intents" if options.intents else "") / method
        config, changes = ("clinc150", INTENTS[method]) if options.intents else (method, ())
        sweep(f"class_incremental/{config}", changes, (f"seed=0..{options.seeds - 1}",), out=out)
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
