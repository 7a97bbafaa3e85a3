"""ASL: the asymmetric loss for labels of which few are there and many are not (Ridnik et al., ICCV 2021), as a term.

    p = sigmoid(z),   p_m = max(p - margin, 0)
    L = -sum over samples and classes of  y (1 - p)^gamma_positive log p + (1 - y) p_m^gamma_negative log(1 - p_m)

It takes the place of the criterion of the strategy that carries it. A label that is -1, not annotated, has no part in it. A negative with
p <= margin has neither loss nor gradient; with both gammas and the margin at 0 what is left is binary cross-entropy. It is a sum, so the
size of a batch moves what another loss beside it weighs. Its scores come out high: labels are usually given from 0.8 on
(scenario.threshold).

Defaults: gamma 4 and 0, margin 0.05, those of the released training script (the class has gamma_positive 1). The powers are taken for
constants in the gradient, as released; `through_weight` differentiates them too, as the paper's formula says. Logarithms stop at 1e-8 and
are taken in single precision. The variant for one class per sample (softmax, with smoothed labels) is left out. Named as the strategy
itself it is carried by fine-tuning over what is annotated, with the script's settings: 40 epochs, batch 128, Adam at 1e-4; its one-cycle
rate, the average of weights, Cutout and RandAugment are a cosine with a fifth of warm-up here, and a matter of `scenario.transforms`.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import Fraction, NonNegativeFloat
from streamcl.strategy import GradientStrategy, Term

EPS = 1e-8


class ASL(Term):
    alone: ClassVar[dict[str, Any]] = {
        "epochs": 40,
        "batch": 128,
        "optimizer": {"name": "adam", "lr": 1e-4, "weight_decay": 1e-4},
        "schedule": {"name": "cosine", "warmup": 0.2},
    }

    def __init__(
        self,
        *,
        gamma_negative: NonNegativeFloat = 4.0,
        gamma_positive: NonNegativeFloat = 0.0,
        margin: Fraction = 0.05,
        through_weight: bool = False,
    ) -> None:
        if margin == 1:
            raise ConfigError("asl: margin is 1, and no negative would be left to learn from: 0.05 is usual")
        self.gamma_negative, self.gamma_positive, self.margin, self.through_weight = gamma_negative, gamma_positive, margin, through_weight
        self.criterion = self.loss_of

    def start(self, strategy: GradientStrategy) -> None:
        super().start(strategy)
        if strategy.info.target != "labels":
            raise ConfigError(
                f"asl weighs the labels of samples that may carry several, and the target of this stream is {strategy.info.target}: "
                "leave it out of strategy.with, or take a multi_label scenario"
            )

    def loss_of(self, logits: Tensor, target: Tensor) -> Tensor:
        """The sum over the annotated labels. Both are (batch, classes); samples from before a class arrived may lack its column."""
        p = logits[:, : target.shape[1]].float().sigmoid()
        shifted = (p - self.margin).clamp(min=0)
        positive = (target == 1).to(p)
        negative = (target == 0).to(p)
        weights = (1 - p).clamp(min=EPS) ** self.gamma_positive, shifted.clamp(min=EPS) ** self.gamma_negative
        of_positive, of_negative = weights if self.through_weight else (weight.detach() for weight in weights)
        losses = positive * of_positive * p.clamp(min=EPS).log() + negative * of_negative * (1 - shifted).clamp(min=EPS).log()
        return -losses.sum()
