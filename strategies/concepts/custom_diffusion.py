"""Custom Diffusion (Kumari et al., CVPR 2023): key and value maps of cross-attention, merged over all concepts in closed form.

Text enters the UNet through the keys and values of cross-attention, so only these matrices (whole, of no low rank) and the new word are
trained, each concept from the original weights W0, with the class held by `prior` pictures that the original generator painted. After
each session the concepts so far are merged. With C (rows: the text features of the concepts' own tokens), V (rows: what each concept's
own matrix makes of them), and C_reg (the features of generic `captions`), for every matrix

    W = W0 + (V' - W0 C') (D C')^-1 D,    D = C (C_reg' C_reg)^-1

is the matrix with W C' = V' that changes least what the captions are read as. Of a concept only its rows of C and V are kept; the result
does not depend on the order. Defaults are those of the released code (learning rate 1e-5 x batch, batch 2, 250 steps, 200
pictures, AdamW). C_reg has a ridge of `ridge` times its mean square, since a few captions may not span the features; `captions` are by
default the scenario's prompts with the class word alone. Duplicate rows of C are left out, as in the released code, whose mask never
trains the last of several modifier tokens: here there is one for each concept.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.context import Context
from streamcl.options import NonNegativeFloat, NonNegativeInt, Optimizer, PositiveFloat, PositiveInt
from streamcl.stream import Batch, StreamInfo, Task

from ._painting import ConceptLearner, Prior


class CustomDiffusion(ConceptLearner):
    def __init__(
        self,
        *,
        token_lr: NonNegativeFloat = 2e-5,
        prior: NonNegativeInt = 200,
        prior_weight: NonNegativeFloat = 1.0,
        captions: tuple[str, ...] = (),
        ridge: PositiveFloat = 1e-3,
        epochs: PositiveInt = 100,
        batch: PositiveInt = 2,
        optimizer: Optimizer = Optimizer(name="adamw", lr=2e-5, weight_decay=1e-2),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(token_lr=token_lr, epochs=epochs, batch=batch, optimizer=optimizer, **options)
        self.prior_weight, self.captions, self.ridge = prior_weight, captions, ridge
        self.prior = Prior(prior if prior_weight else 0)
        self.original: dict[str, Tensor] = {}  # W0 by the name of its layer
        self.said: list[Tensor] = []  # C of each concept  # (tokens, text)
        self.meant: list[dict[str, Tensor]] = []  # V of each concept by layer  # (tokens, out)

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.maps: dict[str, nn.Linear] = {
            name: module
            for name, module in self.backbone.unet.named_modules()
            if name.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(module, nn.Linear)
        }
        for layer in self.maps.values():
            layer.weight.requires_grad_(True)

    def trained(self) -> list[Any]:
        return [layer.weight for layer in self.maps.values()]

    @torch.no_grad()
    def before_task(self, task: Task) -> None:
        super().before_task(task)
        if task.index == 0:
            self.original = {name: layer.weight.detach().clone() for name, layer in self.maps.items()}
            self.prior.paint(self, task)
        for name, layer in self.maps.items():
            layer.weight.copy_(self.original[name])

    def loss(self, batch: Batch) -> Tensor:
        loss, held = super().loss(batch), self.prior.loss(self, len(batch))
        return loss if held is None else loss + self.prior_weight * held

    @torch.no_grad()
    def after_task(self, task: Task) -> None:
        for concept in task.concepts:
            rows = self.spoken([concept["prompts"][0]], concept["phrase"])
            self.said.append(rows)
            self.meant.append({name: rows @ layer.weight.T for name, layer in self.maps.items()})
        generic = self.captions or [text.replace(c["phrase"], c["word"]) for c in task.concepts for text in c["prompts"]]
        known = self.spoken(list(generic))
        both, kept = torch.cat(self.said), None
        for name, layer in self.maps.items():
            values = torch.cat([each[name] for each in self.meant])
            kept = distinct(both) if kept is None else kept
            layer.weight.copy_(merged(self.original[name], both[kept], values[kept], known, self.ridge))

    def spoken(self, prompts: list[str], phrase: str = "") -> Tensor:
        """The text features of the tokens of a phrase in prompts, or of all between start and end."""
        said = self.read(prompts)["encoder_hidden_states"]  # (prompts, tokens, text)
        parts = []
        for text, features in zip(prompts, said, strict=True):
            first, end = self.backbone.span(text, phrase)
            parts.append(features[first:end])
        return torch.cat(parts)

    def state(self) -> dict[str, Any]:
        kept = {"original": self.original, "said": self.said, "meant": self.meant, "prior": self.prior.state()}
        return {**super().state(), **kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        device = self.context.device
        self.original = {name: value.to(device) for name, value in state["original"].items()}
        self.said = [value.to(device) for value in state["said"]]
        self.meant = [{name: value.to(device) for name, value in each.items()} for each in state["meant"]]
        self.prior.restore(state["prior"])


def merged(original: Tensor, features: Tensor, values: Tensor, captions: Tensor, ridge: float = 0.0) -> Tensor:
    """W0 + (V' - W0 C') (D C')^-1 D in float64  # (out, text)"""
    w, c, v, known = (each.double() for each in (original, features, values, captions))
    square = known.T @ known
    square += ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
    d = torch.linalg.solve(square, c.T).T  # (tokens, text)
    return (w + (v.T - w @ c.T) @ torch.linalg.solve(d @ c.T, d)).to(original.dtype)


def distinct(rows: Tensor) -> Tensor:
    """Which rows are no repetition of an earlier one."""
    near = torch.cdist(rows.double(), rows.double()) <= 1e-6 * rows.double().norm(dim=1).max()
    return (near.int().argmax(dim=1) == torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
