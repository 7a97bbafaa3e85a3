"""Methods of test-time adaptation on every stream, bare, guarded, and guarded with a canary or with some labels that come late.

    python tools/tables/online.py [--seeds 3] [--out runs/online.jsonl] [METHOD ...] > docs/results/online.md

Each line of `--out` is one run; what is there is not run again, and several of these commands may fill one file at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from streamcl import config, running

SETTINGS = {
    "bare": [],
    "guard": ["online.guard=true", "online.window=32"],
    "canary": ["online.guard=true", "online.window=32", "online.canary=64"],
    "labels": ["online.guard=true", "online.window=32", "online.feedback=0.05"],
}
BATCH_NORM = ["model.backbone=resnet32", "model.pretrain.strategy.epochs=10"]
GROUP_NORM = ["model.backbone={name: convnet, norm: group, width: 32}", "model.pretrain.strategy.epochs=15"]
MIXTURE = ["model.backbone={name: mixture, experts: 4, layers: 2}"]
CORRUPTIONS = "scenario.corruptions=[gaussian_noise, impulse_noise, defocus_blur, glass_blur, frost, fog, contrast, pixelate]"
STREAMS: dict[str, tuple[str, list[str]]] = {
    "clean": ("test_time/digits", ["scenario.corruptions=none", "scenario.clean=1.0", "scenario.samples=1280"]),
    "abrupt": ("test_time/digits", [CORRUPTIONS, "scenario.samples=192"]),
    "mild": ("test_time/digits", [CORRUPTIONS, "scenario.samples=192", "scenario.severity=1"]),
    "mixed": ("test_time/mixed", [CORRUPTIONS, "scenario.samples=1536"]),
    "gradual": ("test_time/gradual", ["scenario.corruptions=[defocus_blur, fog]", "scenario.samples=64", "scenario.rounds=1"]),
    "correlated": ("test_time/label_shift", [CORRUPTIONS, "scenario.samples=192"]),
    "sorted": ("test_time/label_shift", [CORRUPTIONS, "scenario.samples=192", "scenario.labels=ordered", "scenario.alpha=null"]),
    "sorted, clean": (
        "test_time/digits",
        ["scenario.labels=ordered", "scenario.corruptions=none", "scenario.clean=1.0", "scenario.samples=1280"],
    ),
    "one by one": ("test_time/one_at_a_time", ["scenario.samples=128"]),
}
SEEN_AND_HEARD: dict[str, tuple[str, list[str]]] = {
    "weak": ("test_time/sumi_weak", []),
    "strong": ("test_time/sumi_strong", []),
    "mixed": ("test_time/sumi", []),
    "missing": ("test_time/sumi_missing", []),
}
METHODS: dict[str, list[str]] = {
    "bn_adapt": [],
    "tent": [],
    "tent, 100 x the rate": ["strategy.optimizer.lr=0.1"],
    "eata": [],
    "sar": [],
    "deyo": [],
    "cotta": [],
    "rotta": [],
    "lame": [],
    "marginal_entropy": ["strategy.views=4"],
}
GROUPS: dict[str, tuple[list[str], dict[str, tuple[str, list[str]]], list[str]]] = {
    "batch normalisation (resnet32)": (BATCH_NORM, STREAMS, list(METHODS)),
    "group normalisation (convnet)": (GROUP_NORM, STREAMS, ["tent", "tent, 100 x the rate", "eata", "sar", "deyo", "lame"]),
    "images and sounds (joint_transformer, layer normalisation)": ([], SEEN_AND_HEARD, ["tent", "read", "sumi"]),
    "a mixture of experts (r2t2)": (
        MIXTURE,
        {name: STREAMS[name] for name in ("clean", "abrupt", "mild", "mixed", "correlated")},
        ["r2t2"],
    ),
}


def strategy(method: str) -> list[str]:
    return [f"strategy={{name: {method.split(',')[0]}}}", *METHODS.get(method, [])]


def run(group: str, stream: str, method: str, setting: str, seed: int) -> dict[str, object]:
    """One run: its final score, and what the guard did."""
    model, streams, _ = GROUPS[group]
    name, changes = streams[stream]
    settings = config.load(name, [*strategy(method), *model, *changes, *SETTINGS[setting], "log=[]", f"seed={seed}"])
    engine = running.build(settings, None, log=[])
    scores = engine.run()
    counts = engine.loop.counts if engine.loop is not None else {}
    done = {what: counts[what] for what in ("restore", "bypass", "statistics") if what in counts}
    return {"group": group, "stream": stream, "method": method, "setting": setting, "seed": seed, "final": scores["final"], "guard": done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"some of {', '.join(METHODS)}, read, sumi; all where none is named")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("runs/online.jsonl"))
    parser.add_argument("--groups", help="those that begin with one of these, separated by commas; all by default")
    parser.add_argument("--only-write", action="store_true", help="run nothing more")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.only_write:
        for seed in range(args.first, args.first + args.seeds):
            for group, (_, streams, methods) in GROUPS.items():
                if args.groups and not group.startswith(tuple(args.groups.split(","))):
                    continue
                wanted = [method for method in methods if not args.methods or method in args.methods]
                for stream in streams:
                    for method, setting in [("source", "bare"), *((m, s) for m in wanted for s in SETTINGS)]:
                        key = (group, stream, method, setting, seed)
                        if key in finished(args.out):
                            continue
                        line = json.dumps(run(*key))
                        with args.out.open("a") as file:
                            file.write(line + "\n")
                        print(line, file=sys.stderr, flush=True)
    print(page(args.out))


def finished(path: Path) -> dict[tuple[object, ...], dict[str, object]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {tuple(row[key] for key in ("group", "stream", "method", "setting", "seed")): row for row in rows}


def page(path: Path) -> str:
    """The tables in Markdown."""
    rows = finished(path)
    seeds = sorted({int(str(key[4])) for key in rows})
    text = [
        "# The online loop: what the guard reaches, with and without labels",
        "",
        "Accuracy of what was served, in %, over the whole stream: means over as many seeds, from 0, as stand in the row.",
        "`source` is the model as it was deployed. Each method has its paper's defaults: `bare` as published; `guard` under the guard,",
        "with a window of 32 for smaller batches; `canary` with 64 labelled samples from before any shift besides; `labels` with the",
        "labels of 5 % of what is served, one batch late. **Bold**: more than 1 point under the source. Last column: the worst",
        "difference to the source over all streams and seeds.",
        "",
        "Made by `python tools/tables/online.py > docs/results/online.md`.",
    ]
    misses: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for group, (_, streams, methods) in GROUPS.items():
        got = {(s, m, w): finals(rows, group, s, m, w) for s in streams for m in ["source", *methods] for w in SETTINGS}
        seeds_of = {m: [seed for seed in seeds if all(seed in got[s, m, w] for s in streams for w in SETTINGS)] for m in methods}
        there = [method for method in methods if seeds_of[method]]
        if not there:
            continue
        text += ["", f"## {group[0].upper()}{group[1:]}", ""]
        text += ["| | | seeds | " + " | ".join(streams) + " | worst |", "| --- | --- | ---: |" + " ---: |" * (len(streams) + 1)]
        widest = max((seeds_of[method] for method in there), key=len)
        base = [shown([got[stream, "source", "bare"][seed] for seed in widest]) for stream in streams]
        text.append(f"| source | | {len(widest)} | " + " | ".join(base) + " | |")
        for method in there:
            for setting in SETTINGS:
                cells, worst = [], []
                for stream in streams:
                    mine, source = got[stream, method, setting], got[stream, "source", "bare"]
                    differences = [100 * (mine[seed] - source[seed]) for seed in seeds_of[method]]
                    worst += differences
                    misses[setting].append(statistics.mean(differences))
                    cell = shown([mine[seed] for seed in seeds_of[method]])
                    cells.append(f"**{cell}**" if statistics.mean(differences) < -1 else cell)
                text.append(f"| {method} | {setting} | {len(seeds_of[method])} | " + " | ".join(cells) + f" | {min(worst):+.1f} |")
    text += ["", "## In one table", "", "| | stream x method | more than 1 point under the source | the worst | mean difference |"]
    text += ["| --- | ---: | ---: | ---: | ---: |"]
    for setting, values in misses.items():
        if values:
            under = sum(value < -1 for value in values)
            text.append(f"| {setting} | {len(values)} | {under} | {min(values):+.1f} | {statistics.mean(values):+.2f} |")
    return "\n".join(text)


def finals(rows: dict[tuple[object, ...], dict[str, object]], group: str, stream: str, method: str, setting: str) -> dict[int, float]:
    return {
        int(str(key[4])): float(str(row["final"]))
        for key, row in rows.items()
        if key[:4] == (group, stream, method, setting) and row["final"] is not None
    }


def shown(values: Sequence[float]) -> str:
    return f"{100 * statistics.mean(values):.1f}" if values else ""


if __name__ == "__main__":
    main()
