"""A small multimodal transformer, batches for it, and runs on a stream whose samples lack modalities."""

from __future__ import annotations

import math
from typing import Any

import torch
from test_strategies import CPU, make
from torch import Tensor

from streamcl.engine import Engine
from streamcl.nn.backbones.multimodal_transformer import MultimodalTransformer
from streamcl.stream import Batch, Modality, StreamInfo

INFO = StreamInfo(
    {"image": Modality("image", (1, 8, 8)), "sound": Modality("audio", (700,)), "text": Modality("text")},
    classes=3,
    class_names=("a", "b", "c"),
)
WORDS = ["a red circle", "Look at it!", "one two three", "circle red a", "nothing", "more and more words than there are places for in it"]


def transformer(**options: Any) -> MultimodalTransformer:
    torch.manual_seed(0)
    backbone = MultimodalTransformer(**{"width": 8, "depth": 3, "heads": 2, "words": 4, **options})
    backbone.build(INFO)
    return backbone.eval()


def batch(present: dict[str, list[int]] | None = None, seed: int = 0, size: int = 6) -> Batch:
    """Samples with every absent value as the scenarios leave it."""
    draw = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {name: torch.randn(size, *m.shape, generator=draw) for name, m in INFO.modalities.items() if m.kind != "text"}
    inputs["text"] = WORDS[:size]
    masks = {name: torch.tensor(there, dtype=torch.bool) for name, there in (present or {}).items()}
    for name, there in masks.items():
        if name == "text":
            inputs[name] = [text if here else "" for text, here in zip(inputs[name], there.tolist(), strict=True)]
        else:
            inputs[name][~there] = math.nan
    return Batch(inputs, torch.arange(size) % 3, torch.arange(size), masks or None)


def every_pattern() -> dict[str, list[int]]:
    """Presence of six samples: complete, without image, without sound, without both, without text, with sound alone."""
    return {"image": [1, 0, 1, 0, 1, 0], "sound": [1, 1, 0, 0, 1, 1], "text": [1, 1, 1, 1, 0, 0]}


def run_of(strategy: Any, missing: list[dict[str, float]], *, depth: int = 3, backbone: Any = None, **scenario: Any) -> Engine:
    """On images and tones of digits."""
    data = make("source", "digits_av", seconds=0.05, samples=120, test_samples=40)
    stream = make("scenario", "missing_modality", data=data, missing=missing, **scenario)
    model = backbone if backbone is not None else make("backbone", "multimodal_transformer", width=8, depth=depth, heads=2)
    return Engine(stream, strategy, model, make("memory", "faiss", exemplars=0), engine=CPU)


def held(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
