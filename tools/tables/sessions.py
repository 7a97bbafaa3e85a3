"""Learners of language models over sessions of visual puzzles: accuracy matrix, forgetting, lengths and divergences, over seeds.

    python tools/tables/sessions.py [--seeds 3] [--out runs/sessions.jsonl] [LEARNER ...] > docs/results/sessions.md

Each line of `--out` is one run; what is there is not run again, and several of these commands may fill one file at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from streamcl import config, running

REPLAY = ["strategy.replay=0.25", "memory.exemplars=300"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "sft": ("sft", []),
    "sft, replay": ("sft", REPLAY),
    "rejection_sft": ("rejection_sft", []),
    "grpo": ("grpo", []),
    "grpo, replay": ("grpo", REPLAY),
    "apo": ("apo", []),
    "observe_r1": ("observe_r1", []),
    "trust_grpo": ("trust_grpo", []),
    "grpo, frames": ("grpo_frames", []),
    "t_grpo, frames": ("t_grpo", []),
}


def run(name: str, seed: int, changes: Sequence[str]) -> dict[str, Any]:
    file, own = RUNS[name]
    settings = config.load(f"sessions/{file}", [*own, *changes, "log=[]", "evaluate.future=false", f"seed={seed}"])
    engine = running.build(settings, None, log=[])
    before = scored(engine)
    begun = time.process_time()
    scores = engine.run()
    figures = {key: value["per_task"] for key, value in (scores["metrics"] or {}).items()}
    heads = {head: of["matrix"] for head, of in (scores["heads"] or {}).items()}
    return {
        "name": name,
        "seed": seed,
        "before": before,
        "tasks": [task["name"] for task in scores["tasks"]],
        "matrix": scores["matrix"],
        "heads": heads,
        "forgetting": scores["forgetting"],
        "final": scores["final_task_mean"],
        "figures": figures,
        "seconds": round(time.process_time() - begun, 1),
    }


def scored(engine: Any) -> list[float | None]:
    """What the warmed-up policy reaches on each task's test set, before anything is learned."""
    from streamcl.evaluation import Evaluation

    evaluation = Evaluation(engine.info, batch=engine.evaluate.batch)
    tasks = [engine.scenario.task(index) for index in range(len(engine.scenario))]
    columns = [(task, engine.scenario.test(task, tasks[-1])) for task in tasks]
    with engine.model.evaluating():
        fields = evaluation.score(tasks[-1], columns, engine._predict)
    engine._figures = {}
    return fields["row"]


def finished(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {(row["name"], row["seed"]): row for row in map(json.loads, lines)}


def shown(values: Sequence[float | None], scale: float = 100.0, digits: int = 1) -> str:
    known = [scale * value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def page(path: Path) -> str:
    rows = finished(path)
    seeds = sorted({seed for _, seed in rows})
    text = [
        "# Sessions: learners of language models on visual puzzles",
        "",
        "A tiny vision-language model, warmed up under supervision on all skills, and then trained skill by skill; greedy answers to",
        "held-out puzzles, in %: mean ± standard deviation over as many seeds, from 0, as stand in the row. A column is a skill, a row",
        "what was scored after that session. `KL` is the divergence of the policy from that at the session's start, in nats per answer, on",
        "held-out prompts of the new skill: forward KL(before || after), reverse KL(after || before).",
        "",
        "Made by `python tools/tables/sessions.py > docs/results/sessions.md`.",
        "",
    ]
    there = [name for name in RUNS if any((name, seed) in rows for seed in seeds)]
    if not there:
        return "\n".join(text)
    tasks = rows[there[0], seeds[0]]["tasks"]
    every = {name: [rows[name, seed] for seed in seeds if (name, seed) in rows] for name in there}
    text += [
        "## In one table",
        "",
        "| | seeds | first session, held-out | gain | all skills at the end | forgetting | pass@k at the end | length | ",
    ]
    text[-1] += "format | KL forward | KL reverse | processor seconds |"
    text += ["| --- |" + " ---: |" * 11]
    for name, runs in every.items():
        first = [one["matrix"][0][0] for one in runs]
        gain = [one["matrix"][0][0] - one["before"][0] for one in runs]
        best = [statistics.mean(head[-1]) for one in runs for head in one["heads"].values()]
        cells = [
            str(len(runs)),
            shown(first),
            shown(gain),
            shown([one["final"] for one in runs]),
            shown([one["forgetting"] for one in runs]),
            shown(best),
            shown([last(one, "length") for one in runs], 1.0),
            shown([last(one, "format_rate") for one in runs]),
            shown([mean(one, "kl_previous_new") for one in runs], 1.0, 2),
            shown([mean(one, "reverse_kl_previous_new") for one in runs], 1.0, 2),
            shown([one["seconds"] for one in runs], 1.0, 0),
        ]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    start = [shown([rows[there[0], seed]["before"][place] for seed in seeds if (there[0], seed) in rows]) for place in range(len(tasks))]
    text += ["", f"Before any session: {', '.join(f'{task} {value}' for task, value in zip(tasks, start, strict=True))}.", ""]
    for name, runs in every.items():
        text += [f"## {name}", "", "| after | " + " | ".join(tasks) + " |", "| --- |" + " ---: |" * len(tasks)]
        for after, task in enumerate(tasks):
            text.append(f"| {task} | " + " | ".join(shown([one["matrix"][after][j] for one in runs]) for j in range(len(tasks))) + " |")
        text.append("")
    return "\n".join(text)


def last(one: Mapping[str, Any], figure: str) -> float | None:
    values = one["figures"].get(figure) or [None]
    return values[-1]


def mean(one: Mapping[str, Any], figure: str) -> float | None:
    known = [value for value in one["figures"].get(figure) or [] if value is not None]
    return statistics.mean(known) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learners", nargs="*", metavar="LEARNER", help=f"some of: {'; '.join(RUNS)}; all where none is named")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/sessions.jsonl"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a change to every configuration")
    parser.add_argument("--only-write", action="store_true", help="run nothing more")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds if not args.only_write else 0):
        for name in args.learners or RUNS:
            if (name, seed) in finished(args.out):
                continue
            row = run(name, seed, args.set)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, seed, "before", row["before"], "matrix", row["matrix"], row["seconds"], file=sys.stderr, flush=True)
    print(page(args.out))


if __name__ == "__main__":
    main()
