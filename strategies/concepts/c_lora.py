"""C-LoRA (Smith et al., Continual Diffusion, TMLR 2024): low-rank updates one upon another, each kept off what earlier ones changed.

    W_t = W_0 + sum over t' < t of A_t' B_t'  +  A_t B_t
    L   = L_diff + strength sum over layers of || |sum over t' < t of A_t' B_t'| * (A_t B_t) ||_F^2

In keys and values of cross-attention; * is element by element, and of the past there is one dense matrix for each layer, whose entries may
have cancelled. Only A_t, B_t and the new word learn; after a session its update is folded into the weights. The word begins at random, and
the class noun is left out of every caption and prompt ("a photo of <new1>"). The equations are as others restate them. `strength` is of the
order of 1e6 to 1e8 in the paper (recalled, not read): the squared product of two small matrices is tiny. `penalty`, in the progress of a
run, is the ratio of the second term to the first, to see that it is neither nothing nor everything.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.context import Context
from streamcl.nn.backbone import texts
from streamcl.options import NonNegativeFloat, PositiveInt
from streamcl.stream import Batch, StreamInfo, Task

from ._lora import delta, fold, inject, parameters
from ._painting import ConceptLearner


class CLora(ConceptLearner):
    from_word = False

    def __init__(self, *, rank: PositiveInt = 16, strength: NonNegativeFloat = 1e8, **options: Any) -> None:
        super().__init__(**options)
        self.rank, self.strength = rank, strength
        self.past: dict[str, Tensor] = {}  # the sum of earlier updates by the name of its layer

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.adapted = inject(self.backbone, self.rank, "keys_values")
        self.model.to(context.device).remember()

    def trained(self) -> list[nn.Parameter]:
        return parameters(self.adapted)

    def loss(self, batch: Batch) -> Tensor:
        told = self.denoising(self.backbone.pictures(batch), self.without_nouns(texts(batch, "text")), self.vectors())
        if not self.past or not self.strength:
            return told
        parts = [((self.past[name].abs() * delta(layer)) ** 2).sum() for name, layer in self.adapted.items()]
        held = self.strength * torch.stack(parts).sum()
        self.context.log(penalty=(held / told).detach())
        return told + held

    def after_task(self, task: Task) -> None:
        for name, layer in self.adapted.items():
            added = fold(layer, self.context.generator)
            self.past[name] = self.past[name] + added if name in self.past else added

    def without_nouns(self, prompts: Sequence[str]) -> list[str]:
        """ "a photo of <new1> digit" is said as "a photo of <new1>"."""
        said = list(prompts)
        for word, noun in zip(self.info.words, self.info.nouns, strict=True):
            said = [text.replace(f"{word} {noun}", word) for text in said] if noun else said
        return said

    def read(self, prompts: Sequence[str]) -> dict[str, Any]:
        return super().read(self.without_nouns(prompts))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "past": self.past}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.past = {name: value.to(self.context.device) for name, value in state["past"].items()}
