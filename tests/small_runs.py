"""Configurations of a second or two, for every strategy and term there is: a new one is covered the day its file appears."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamcl.plugins import find, plugins

# What a strategy or term needs beside its defaults to be quick on digits; one that is missing here runs with them, for one epoch if it has
# epochs, a term on fine-tuning. One that learns no stream of single classes names its `scenario` here.
QUICK: dict[str, dict[str, Any]] = {
    "finetune": {"strategy": {"epochs": 2, "batch": 32}},
    "joint": {"strategy": {"epochs": 2, "batch": 32}},
    "er": {"strategy": {"epochs": 3}},
    "icarl": {"strategy": {"epochs": 2, "batch": 32}, "memory": {"exemplars": 60}},
    "gacil": {"strategy": {"buffer": 100}, "model": {"backbone": "identity"}},
    "ranpac": {"strategy": {"M": 100}, "model": {"backbone": "identity"}},
    "slda": {"model": {"backbone": "identity"}},
    "simplecil": {"model": {"backbone": "identity"}},
    "fecam": {"model": {"backbone": "identity"}},
    "bic": {"strategy": {"epochs": 2, "batch": 32, "bias_epochs": 20}},
    "memo": {"strategy": {"epochs": 2, "batch": 32}, "model": {"backbone": {"name": "mlp", "hidden": [32, 16]}}},
    "derpp": {"strategy": {"epochs": 2}},
    "er_ace": {"strategy": {"epochs": 2}},
    "proto": {"strategy": {"epochs": 2, "batch": 64}},
    "teen": {"strategy": {"epochs": 2, "batch": 64}},
}
LABEL_SETS: dict[str, Any] = {  # small pictures of one digit, or of two that lie over each other
    "scenario": {
        "name": "multi_label",
        "data": {
            "name": "digit_scenes",
            "size": 8,
            "scale": 1,
            "digits": [1, 2],
            "overlap": True,
            "scenes": 200,
            "test_scenes": 60,
        },
        "increment": 2,
    },
    "model": {"backbone": {"name": "convnet", "width": 8, "blocks": 2}},
}
QUICK |= {
    "krt": {**LABEL_SETS, "strategy": {"epochs": 2, "batch": 32, "dim": 16, "heads": 2}},
    **{name: {**LABEL_SETS, "strategy": {"epochs": 2, "batch": 32}} for name in ("asl", "ml_finetune", "ml_masked", "ml_joint")},
}
SEEN_AND_HEARD: dict[str, Any] = {  # several modalities, where the digits have one
    "scenario": {"name": "class_incremental", "data": {"name": "digits_av", "samples": 400, "seconds": 0.05}, "tasks": 5},
    "model": {"backbone": {"name": "fusion", "width": 16}},
}
QUICK |= {
    "cggm": {"strategy": {"epochs": 2, "batch": 32}, **SEEN_AND_HEARD},
    "ogm_ge": {"strategy": {"epochs": 2, "batch": 32}, **SEEN_AND_HEARD},
}
INCOMPLETE: dict[str, Any] = {  # of images with tones, some without the one or the other
    "scenario": {
        "name": "missing_modality",
        "data": {"name": "digits_av", "samples": 200, "test_samples": 60, "seconds": 0.05},
        "missing": [{}, {"image": 0.5}, {"image": 0.3, "audio": 0.4}],
    },
    "model": {"backbone": {"name": "multimodal_transformer", "width": 8, "depth": 3, "heads": 2}},
}
QUICK |= {
    "mmp": {"strategy": {"length": 4, "layers": 3, "epochs": 2, "batch": 32}, **INCOMPLETE},
    **{name: {"strategy": {"length": 4, "epochs": 2, "batch": 32}, **INCOMPLETE} for name in ("mplmm", "cmmm")},
}
PAINTED: dict[str, Any] = {  # a text-to-image model that is far too small to paint anything
    "scenario": {
        "name": "concepts",
        "data": "digits",
        "concepts": [6, 7, 8],
        "images": 4,
        "word": "digit",
        "prompts": ["a photo of {}"],
        "samples": 2,
    },
    "model": {
        "backbone": {"name": "text_to_image", "size": 8, "channels": [8, 16], "latent": 4, "layers": 1, "steps": 2},
        "pretrain": {
            "scenario": {
                "name": "concepts",
                "data": "digits",
                "concepts": [0, 1],
                "images": 16,
                "together": 2,
                "placeholder": "{name}",
                "word": "digit",
                "judge": "none",
            },
            "strategy": {"name": "text_to_image", "epochs": 1, "autoencoder_epochs": 1},
        },
    },
    "memory": {"exemplars": 9},
}
QUICK |= {
    "text_to_image": {
        **PAINTED,
        "scenario": {**PAINTED["scenario"], "placeholder": "{name}"},
        "model": {"backbone": PAINTED["model"]["backbone"]},
        "strategy": {"epochs": 2, "autoencoder_epochs": 2},
    },
    **{
        name: {**PAINTED, "strategy": {"epochs": 3, "batch": 4, **options}}
        for name, options in {
            "textual_inversion": {},
            "dreambooth_lora": {"prior": 4},
            "custom_diffusion": {"prior": 4},
            "c_lora": {"rank": 2},
            "conceptguard": {"queue": 2, "each": 2},
        }.items()
    },
}
TEST_TIME: dict[str, Any] = {
    "scenario": {
        "name": "test_time",
        "data": "digits",
        "corruptions": ["contrast", "fog", "jpeg_compression"],
        "samples": 100,
        "batch": 32,
    },
    "model": {
        "backbone": {"name": "convnet", "width": 8, "blocks": 2},
        "pretrain": {
            "scenario": {"name": "class_incremental", "data": "digits", "tasks": 1},
            "strategy": {"name": "finetune", "epochs": 2},
        },
    },
}

QUICK |= {
    "rotta": {"strategy": {"capacity": 16, "every": 16}},
    "cotta": {"strategy": {"views": 2, "p_th": 1.0}},
    "marginal_entropy": {"strategy": {"views": 2}},
    "r2t2": {"strategy": {"steps": 2}, "model": {**TEST_TIME["model"], "backbone": {"name": "mixture", "hidden": 16, "width": 16}}},
}

_BOTH: dict[str, Any] = {"name": "digits_av", "samples": 200, "test_samples": 60, "seconds": 0.05}
_VALUES: dict[str, Any] = {"name": "shapes", "target": "value", "samples": 200, "test_samples": 64, "size": 16, "seconds": 0.05}
_HIT: dict[str, Any] = {"corruptions": {"image": ["contrast", "fog"], "audio": ["gaussian_noise"]}, "missing": {"audio": 0.2}, "batch": 32}
_JOINT: dict[str, Any] = {"name": "joint_transformer", "width": 8, "depth": 1, "heads": 2}
SEVERAL_SERVED: dict[str, Any] = {  # images with tones, of which some come without
    "scenario": {"name": "test_time", "data": _BOTH, "samples": 100, **_HIT},
    "model": {
        "backbone": _JOINT,
        "pretrain": {
            "scenario": {"name": "class_incremental", "data": _BOTH, "tasks": 1},
            "strategy": {"name": "finetune", "epochs": 2},
        },
    },
}
VALUES_SERVED: dict[str, Any] = {
    "scenario": {"name": "test_time", "data": _VALUES, "samples": 64, **_HIT},
    "model": {
        "backbone": {**_JOINT, "dropout": 0.1},
        "pretrain": {
            "scenario": {"name": "missing_modality", "data": _VALUES, "missing": [{}]},
            "strategy": {"name": "finetune", "epochs": 2},
        },
    },
}
QUICK |= {
    "read": {"strategy": {}, **SEVERAL_SERVED},
    "sumi": {"strategy": {"horizon": 8}, **SEVERAL_SERVED},
    "casp": {"strategy": {"window": 32, "contrast_epochs": 2, "snapshots": 1, "label_epochs": 1}, **VALUES_SERVED},
}

_TINY: dict[str, Any] = {"name": "tiny_vlm", "hidden": 16, "layers": 1, "heads": 2, "longest": 4}
_TAUGHT: dict[str, Any] = {"name": "sft", "steps": 2, "batch": 8, "optimizer": {"name": "adamw", "lr": 0.01}}
SPOKEN: dict[str, Any] = {  # answered in words by a model that was not taught any
    "scenario": {
        "name": "reasoning",
        "data": {"name": "puzzles", "skills": ["counting", "comparing", "chart"], "count": 12, "test": 6, "difficulty": [1, 1]},
    },
    "model": {"backbone": _TINY},
    "memory": {"exemplars": 6},
}
QUICK |= {
    "sequential": {"strategy": {"learner": _TAUGHT, "replay": 0.25, "samples": 2, "probes": 2, "format": "format"}, **SPOKEN},
    "merge": {"strategy": {"learner": _TAUGHT}, **SPOKEN},
    "adapter_per_session": {"strategy": {"learner": _TAUGHT, "adapter": {"rank": 2, "alpha": 4, "dropout": 0.1}}, **SPOKEN},
}


def family(name: str) -> str:
    found = plugins("strategy").get(name)
    return found.family if found else "terms"


def learns(name: str) -> bool:
    """Whether it learns from tasks; one of the test-time family adapts to what it serves."""
    return family(name) != "test_time"


def strategies() -> list[str]:
    """All there are, and the terms, which fine-tuning carries."""
    return sorted([*plugins("strategy"), *plugins("term")])


def learning() -> list[str]:
    return [name for name in strategies() if learns(name)]


def on_digits() -> list[str]:
    """Those that answer with the ten digits."""
    return [name for name in strategies() if "scenario" not in QUICK.get(name, {})]


def classifying() -> list[str]:
    """Those that learn classes, a few per task."""
    return [name for name in on_digits() if learns(name)]


def small_run(name: str, /, **changes: Any) -> dict[str, Any]:
    """A mapping as YAML would hold it: the strategy on digits in five tasks, with an MLP."""
    config: dict[str, Any] = {
        "scenario": {"name": "class_incremental", "data": "digits", "tasks": 5},
        "strategy": {"name": name},
        "model": {"backbone": {"name": "mlp", "hidden": [32]}},
        "memory": {"name": "faiss", "exemplars": 60},
        "engine": {"device": "cpu", "threads": 1, "checkpoint": {"every": "task"}},
        "log": ["jsonl"],
    }
    if not learns(name):
        config.update(copy.deepcopy(TEST_TIME))
    carried = find("strategy", "finetune") if family(name) == "terms" else find("strategy", name)
    quick = QUICK.get(name) or {"strategy": {"epochs": 1} if "epochs" in carried.options else {}}
    for section, options in (*copy.deepcopy(quick).items(), *changes.items()):
        if isinstance(options, dict) and isinstance(config.get(section), dict) and "name" not in options:
            config[section] = {**config[section], **options}
        else:
            config[section] = options
    return config


def comparable(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores without what a clock measured."""
    return {key: value for key, value in scores.items() if key != "seconds"}


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def copies(folder: Path, finish: Callable[..., None]) -> Callable[..., Path]:
    """A function that gives a copy of a finished run: `finish(strategy, to, **changes)` makes each once, in `folder`."""
    made: dict[str, Path] = {}

    def copy(strategy: str, to: Path, /, **changes: Any) -> Path:
        key = strategy + json.dumps(changes)
        if key not in made:
            made[key] = folder / str(len(made))
            finish(strategy, made[key], **changes)
        shutil.copytree(made[key], to)
        return to

    return copy
