"""Finding the picture to a text and the text to a picture: recall at K, the mean of both ways.

A picture may have several texts: `extra["pair"]` numbers the picture that each sample belongs to (without it every sample is a pair
of its own). Text to picture: the share of texts whose picture is among the K nearest. Picture to text: the share of pictures with any
of their texts among the K nearest. Nearest is by the cosine.
"""

from __future__ import annotations

from typing import Any

import torch
import torchmetrics
from torch import Tensor

from streamcl.errors import PluginError
from streamcl.metrics import Answer, Room, Score


class _Recall(torchmetrics.Metric):
    images: list[Tensor]
    texts: list[Tensor]
    pairs: list[Tensor]
    among = 1

    def __init__(self, room: Room, **settings: Any) -> None:
        super().__init__(**settings)
        for name in ("images", "texts", "pairs"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, answer: Answer) -> None:
        given, size = answer.embeddings, len(answer.batch)
        if "text" not in given or len(given) != 2 or any(len(value) != size for value in given.values()):
            shapes = {name: tuple(value.shape) for name, value in given.items()} or "none"
            raise PluginError(
                f"recall needs embeddings of the text and of one other modality, (batch, dim) each; the strategy gave {shapes}"
            )
        (other,) = (name for name in given if name != "text")
        pair = answer.batch.extra.get("pair")
        self.images.append(torch.nn.functional.normalize(given[other].float(), dim=1))
        self.texts.append(torch.nn.functional.normalize(given["text"].float(), dim=1))
        self.pairs.append((pair if isinstance(pair, Tensor) else answer.batch.ids).to(given["text"].device))

    def compute(self) -> Score:
        if not len(self.pairs):
            return Score(None)
        images, texts, pairs = (torch.cat(part) if isinstance(part, list) else part for part in (self.images, self.texts, self.pairs))
        _, number, counts = pairs.unique(return_inverse=True, return_counts=True)
        first = torch.empty_like(counts)
        first[number.flip(0)] = torch.arange(len(number), device=number.device).flip(0)  # a picture's first row holds it
        pictures = images[first]
        hits = 0.0
        ways = ((texts, pictures, number, False), (pictures, texts, torch.arange(len(pictures), device=number.device), True))
        for asked, offered, wanted, several in ways:
            right = 0
            for start in range(0, len(asked), 4096):
                nearest = (asked[start : start + 4096] @ offered.T).topk(min(self.among, len(offered)), dim=1).indices
                found = number[nearest] if several else nearest
                right += int((found == wanted[start : start + 4096, None]).any(dim=1).sum())
            hits += right / len(asked)
        return Score(hits / 2)


class RecallAt1(_Recall):
    """Among the first."""


class RecallAt5(_Recall):
    """Among the five nearest."""

    among = 5


class RecallAt10(_Recall):
    """Among the ten nearest."""

    among = 10
