"""DreamBooth with LoRA (Ruiz et al., CVPR 2023), session after session in one shared adapter: the naive baseline of concept streams.

    L = L_diff(x, "a photo of <new1> digit") + prior_weight L_diff(x_prior, "a photo of digit")

One low-rank update of rank `rank` (alpha the rank, A Gaussian, B zero) of q, k, v and out in all attention layers goes on learning from
concept to concept, and with it the vector of each new word. The `prior` pictures of the class are painted once, by the generator as it was
before the first concept: they hold the class word, not the concepts before. Defaults are those of diffusers' example (LoRA at 5e-4,
100 prior pictures, batch 4, AdamW, clipped at 1). There the identifier is a rare word whose vector stays; here it is a new word and
learns at `token_lr` (0 keeps it as it begins, at the class word's vector). `layers: keys_values` is what the methods of this
family compare with.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from streamcl.context import Context
from streamcl.options import NonNegativeFloat, NonNegativeInt, Optimizer, PositiveInt
from streamcl.stream import Batch, StreamInfo, Task

from ._lora import inject, parameters
from ._painting import ConceptLearner, Prior


class DreamBoothLora(ConceptLearner):
    def __init__(
        self,
        *,
        rank: PositiveInt = 4,
        layers: Literal["keys_values", "cross", "all"] = "all",
        prior: NonNegativeInt = 100,
        prior_weight: NonNegativeFloat = 1.0,
        optimizer: Optimizer = Optimizer(name="adamw", lr=5e-4, weight_decay=1e-2),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **options)
        self.rank, self.layers, self.prior_weight = rank, layers, prior_weight
        self.prior = Prior(prior if prior_weight else 0)

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.adapted = inject(self.backbone, self.rank, self.layers)
        self.model.to(context.device).remember()

    def trained(self) -> list[nn.Parameter]:
        return parameters(self.adapted)

    def before_task(self, task: Task) -> None:
        super().before_task(task)
        if task.index == 0:
            self.prior.paint(self, task)

    def loss(self, batch: Batch) -> Tensor:
        loss, held = super().loss(batch), self.prior.loss(self, len(batch))
        return loss if held is None else loss + self.prior_weight * held

    def state(self) -> dict[str, Any]:
        return {**super().state(), "prior": self.prior.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.prior.restore(state["prior"])
