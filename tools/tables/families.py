"""The tables of the families beside class-incremental learning: their configurations over seeds, by `streamcl sweep`.

    python tools/tables/families.py [--seeds 5] [--out runs/families] [FAMILY ...] > docs/results/families.md

What is finished under `--out` is not run again. A row whose data is not at hand is left out and named.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from class_incremental import text

from streamcl.comparing import Run
from streamcl.errors import DataError
from streamcl.sweeping import sweep


@dataclass
class Row:
    """A configuration, and what of it is changed on the command line."""

    config: str
    changes: tuple[str, ...] = ()
    seeds: int = 5  # at most


@dataclass
class Table:
    title: str
    columns: dict[str, str]  # heading -> where the number lies in scores.json, and a factor where it is no share
    rows: dict[str, Row] = field(default_factory=dict)


FEW_SHOT = {
    "final": "final",
    "average": "average_incremental",
    "base classes": "metrics.base_accuracy.final",
    "new classes": "metrics.new_accuracy.final",
    "harmonic mean": "metrics.harmonic_mean.final",
    "new taken for base": "metrics.new_as_base.final",
    "base taken for new": "metrics.base_as_new.final",
}
TABLES: dict[str, list[Table]] = {
    "few_shot": [
        Table(
            "Few-shot: digits, 4 base classes, then 3 x 2 classes of 5 samples, %",
            FEW_SHOT,
            {
                "finetune": Row("few_shot/digits"),
                "proto": Row("few_shot/proto"),
                "teen, alpha 0.1": Row("few_shot/teen", ("strategy.alpha=0.1",)),
                "teen, alpha 0.5": Row("few_shot/teen"),
            },
        ),
        Table(
            "Few-shot: CLINC150, 60 base intents, then 9 x 10 intents of 5 texts, %",
            FEW_SHOT,
            {
                "finetune": Row("few_shot/clinc150", ("strategy.name=finetune",)),
                "proto": Row("few_shot/clinc150"),
                "teen, alpha 0.1": Row("few_shot/clinc150", ("strategy.name=teen", "strategy.alpha=0.1")),
                "teen, alpha 0.5": Row("few_shot/clinc150", ("strategy.name=teen",)),
            },
        ),
        Table(
            "Few-shot: Omniglot, 60 base characters, then 8 x 5 characters of 5 drawings, %",
            FEW_SHOT,
            {
                "proto": Row("few_shot/omniglot", seeds=3),
                "teen, alpha 0.1": Row("few_shot/omniglot", ("strategy.name=teen", "strategy.alpha=0.1"), seeds=3),
                "teen, alpha 0.5": Row("few_shot/omniglot", ("strategy.name=teen",), seeds=3),
            },
        ),
    ],
}
LABELS = {
    "mAP, final": "final",
    "mAP, average": "average_incremental",
    "CF1": "metrics.cf1.final",
    "OF1": "metrics.of1.final",
    "macro F1": "metrics.macro_f1.final",
    "mAP forgetting": "forgetting",
}


def label_sets(ending: str, **more: Row) -> dict[str, Row]:
    return {
        "ml_finetune": Row(f"multi_label/ml_finetune{ending}"),
        "ml_masked": Row(f"multi_label/ml_masked{ending}"),
        "ml_masked, cross-entropy": Row(f"multi_label/ml_masked{ending}", ("strategy.with=[]", "scenario.threshold=0.5")),
        "krt, pseudo-labels above 0.8 alone": Row(
            f"multi_label/krt{ending}", ("strategy.attention=false", "strategy.threshold=0.8", "strategy.cardinality=null")
        ),
        "krt, pseudo-labels alone": Row(f"multi_label/krt{ending}", ("strategy.attention=false",)),
        **more,
        "ml_joint": Row(f"multi_label/ml_joint{ending}"),
    }


TABLES["multi_label"] = [
    Table(
        "Label sets: scenes of digits, 5 tasks of 2 classes, a network that has seen other scenes, %",
        LABELS,
        label_sets(
            "",
            **{
                "krt without the token loss": Row("multi_label/krt", ("strategy.token_weight=0",)),
                "krt": Row("multi_label/krt"),
                "krt, 20 exemplars per class": Row(
                    "multi_label/krt", ("strategy.replay_labels=original", "memory={exemplars: 20, unit: per_class}")
                ),
            },
        ),
    ),
    Table("Label sets: Mulan's scene, 3 tasks of 2 classes, %", LABELS, label_sets("_scene")),
    Table("Label sets: Mulan's yeast, 7 tasks of 2 classes, %", LABELS, label_sets("_yeast")),
]
PROMPTS = {
    "fine-tuning of everything": "strategy={name: finetune, epochs: 10, batch: 64, optimizer: {name: adam, lr: 0.001}, schedule: constant}",
    "frozen, pooler and classifier learn": "strategy={name: mmp, length: 0, layers: 3, epochs: 10, batch: 64}",
    "mmp": "strategy={name: mmp, length: 4, layers: 3, epochs: 10, batch: 64}",
    "mplmm": "strategy={name: mplmm, length: 4, epochs: 10}",
    "cmmm": "strategy={name: cmmm, length: 4, epochs: 10}",
}
WITHOUT = {
    "cmmm without contrast": "strategy.contrast=0",
    "cmmm without modality-specific prompts": "strategy.specific=false",
    "cmmm without task-aware prompts": "strategy.aware=none",
    "cmmm without task-specific prompts": "strategy.task=none",
    "cmmm, one task-specific prompt for all": "strategy.task=shared",
    "cmmm without learned projections": "strategy.projections=false",
}
IN_TURN = {"final": "final", "average": "average_incremental", "forgetting": "forgetting"}


def at_rates(change: str) -> dict[str, Row]:
    return {
        f"{rate} % missing": Row(
            "missing_modality/mmp", (change, f"scenario.missing=[{{image: {rate / 200}, audio: {rate / 200}}}]"), seeds=3
        )
        for rate in (10, 30, 50, 70, 90)
    }


TABLES["missing_modality"] = [
    Table(
        "Missing modalities: digits seen and heard; complete, then without image, then without sound, %",
        IN_TURN,
        {
            **{name: Row("missing_modality/cmmm", (change,), seeds=3) for name, change in PROMPTS.items()},
            **{name: Row("missing_modality/cmmm", (change,), seeds=3) for name, change in WITHOUT.items()},
        },
    ),
    Table(
        "Missing modalities: shapes in image, text and sound; seven patterns in turn, %",
        IN_TURN,
        {name: Row("missing_modality/cmmm_shapes", (change,), seeds=3) for name, change in PROMPTS.items()},
    ),
    *(
        Table(f"Missing modalities: digits seen and heard, one task, {name}, %", {"accuracy": "final"}, at_rates(change))
        for name, change in PROMPTS.items()
    ),
]
PAINTED = {
    "image alignment": "final",
    "forgetting": "forgetting",
    "recognised": "metrics.recognised.final",
    "confusion": "metrics.confusion.final",
    "text alignment": "metrics.text_alignment.final",
    "of two: image": "metrics.joint_image_alignment.final",
    "of two: text": "metrics.joint_text_alignment.final",
}
TABLES["concepts"] = [
    Table(
        "Concepts: four digits, one after another, taught to a tiny latent diffusion model that paints the other six, x 100",
        PAINTED,
        {
            **{
                name: Row(f"concepts/{name}", seeds=3)
                for name in ("textual_inversion", "dreambooth_lora", "custom_diffusion", "c_lora", "conceptguard")
            },
            **{
                f"conceptguard without {what}": Row("concepts/conceptguard", changes, seeds=3)
                for what, changes in {
                    "preservation": ("strategy.preserve=0",),
                    "shift": ("strategy.shift=false",),
                    "binding": ("strategy.bind=false",),
                    "replay and binding": ("strategy.queue=0", "strategy.bind=false"),
                }.items()
            },
        },
    )
]


def figure(scores: dict[str, Any], where: str) -> float | None:
    value: Any = scores
    for key in where.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"some of {', '.join(TABLES)}; all where none is named")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/families"))
    options = parser.parse_args()
    print(
        "# The families, as measured\n\nMade by `python tools/tables/families.py` on two CPU cores; mean ± standard deviation over seeds."
    )
    for family in options.families or TABLES:
        for number, table in enumerate(TABLES[family], 1):
            print(f"\n## {table.title}\n")
            print(f"| | seeds | {' | '.join(table.columns)} | memory, kB | seconds |")
            print(f"| --- |{' ---: |' * (len(table.columns) + 3)}")
            missing = []
            for label, row in table.rows.items():
                out = options.out / family / f"{number}" / label.replace(" ", "-").replace(",", "")
                try:
                    sweep(row.config, row.changes, (f"seed=0..{min(options.seeds, row.seeds) - 1}",), out=out)
                except DataError as error:
                    missing.append(f"{label}: {error}")
                    continue
                scores = [Run.read(path.parent).scores for path in sorted(out.glob("*/scores.json"))]
                found = [[figure(one, where) for one in scores] for where in table.columns.values()]
                cells = [text([value for value in values if value is not None]) for values in found]
                memory = text([one["memory_bytes"] / 1000 for one in scores], 1.0)
                seconds = text([one["seconds"]["total"] for one in scores], 1.0)
                print(f"| {label} | {len(scores)} | {' | '.join(cells)} | {memory} | {seconds} |", flush=True)
            for line in missing:
                print(f"\nLeft out, {line}")
                print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
