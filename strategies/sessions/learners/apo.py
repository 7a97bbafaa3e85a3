"""APO (View-R1): answers that are better and answers that are worse than their group are held differently.

Hong et al., APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization, 2025, arXiv 2506.21655. On GRPO's advantages,
with c_i whether an answer is correct, n+ their number in the group, and d = 1 - n+/G its difficulty:

    STCR:  w_i = 2 - lambda^-max(|o_i| - mean length of the correct, 0) where c_i = 0 and n+ > 0, else 1;   A_i <- w_i A_i
    DADS:  W_i = 1 - exp(-e (1 - d)) where A_i > 0 and 0 < d < 1, else 1        (e is Euler's number)
    L = token mean of GRPO's clipped term + beta mean_i[ W_i 1/|o_i| sum_t k3_it ]

The first makes wrong answers that are longer than the right ones worse; the second lets go of the reference where few answers are right.
k3 as a loss is the forward KL(reference || policy). The token mean is that of an update, whatever goes through the model at once; the
released code's is of each 2 answers.

As released, `positive_mask: advantage`: positive is what has A_i > 0, so a wrong answer in the right format may count as one, and STCR then
rewards its length. `correctness` is our mend: positive is what is correct, and STCR is for wrong answers with A_i < 0 alone. lambda is a
scale of length: 1/ln lambda is 100 000 tokens, so that answers of a few hundred are hardly touched; take a larger one for short answers.
With the defaults all of this differs from GRPO by little: compare with a constant weight W, or the effect is only that of less KL.

Rewards are the row's own verifier and half the format <think>...</think><answer>...</answer>. Defaults: the released script's (128 prompts
with 8 answers, 16 updates for each batch, AdamW at 1e-6 with betas 0.9 and 0.95, beta 1e-3).

Evidence: small real data
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import NonNegativeFloat, Optimizer, PositiveFloat, PositiveInt, Schedule
from streamcl.verifier import Verifier
from streamcl.verifiers.format import Format

from ._policy import PolicyLearner
from ._rollouts import Rollouts


class APO(PolicyLearner):
    """`lambda`: of STCR, 1 for none. `dads`: whether the divergence is weighted. `positive_mask`: what is positive, see above."""

    kl_aggregation = "sequence"
    spread = 1e-9

    def __init__(
        self,
        *,
        lambda_: PositiveFloat = 1.00001,
        dads: bool = True,
        positive_mask: Literal["advantage", "correctness"] = "advantage",
        prompts: PositiveInt = 128,
        updates: PositiveInt = 16,
        beta: NonNegativeFloat = 1e-3,
        aggregation: Literal["sequence", "token", "constant"] = "token",
        optimizer: Optimizer = Optimizer(name="adamw", lr=1e-6, weight_decay=0.0, betas=(0.9, 0.95)),  # noqa: B008
        schedule: Schedule = Schedule(warmup=0.03),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(
            prompts=prompts, updates=updates, beta=beta, aggregation=aggregation, optimizer=optimizer, schedule=schedule, **options
        )
        if lambda_ < 1:
            raise ConfigError(f"learner: lambda is {lambda_}, which makes long wrong answers better than short ones: take 1 or more")
        self.lambda_, self.dads, self.positive_mask = lambda_, dads, positive_mask

    def usual(self) -> tuple[Verifier, ...]:
        return (*super().usual(), Format(weight=0.5))

    def advantages(self, rollouts: Rollouts, earned: Tensor) -> Tensor:
        advantages = super().advantages(rollouts, earned)
        weights = stcr(rollouts, self.lambda_)
        if self.positive_mask == "correctness":
            weights = weights.where(advantages < 0, 1.0)
        return weights * advantages

    def kl_weights(self, rollouts: Rollouts, advantages: Tensor) -> Tensor | None:
        if not self.dads:
            return None
        positive = advantages > 0 if self.positive_mask == "advantage" else rollouts.correct
        return dads(rollouts).where(positive, 1.0)


def stcr(rollouts: Rollouts, lambda_: float) -> Tensor:
    """w: by how much a wrong answer's advantage grows with its length beyond that of the correct ones  # (N,)"""
    correct, lengths = rollouts.correct, rollouts.lengths.double()
    excess = (lengths - rollouts.mean(lengths, correct)).nan_to_num(0.0).clamp(min=0.0)
    weights = 2 - (-math.log(lambda_) * excess).exp()
    return weights.masked_fill(correct | ~rollouts.judged, 1.0).to(rollouts.rewards.dtype)


def dads(rollouts: Rollouts) -> Tensor:
    """kappa: how much the divergence counts in a group of this difficulty  # (N,)"""
    right = rollouts.share(rollouts.correct, rollouts.judged)  # 1 - d
    kappa = 1 - (-math.e * right).exp()
    return kappa.where((right > 0) & (right < 1), torch.ones_like(kappa))
