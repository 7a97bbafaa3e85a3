"""Observe-R1: prompts of medium difficulty count most, and the shortest correct answer that is not too short earns a bonus.

Guo et al., Observe-R1: Unlocking Reasoning Abilities of MLLMs with Dynamic Progressive Reinforcement Learning, 2025, arXiv 2505.12432.
With d the share of correct answers in a group,

    r_i = accuracy + 0.5 format;   the shortest correct answer of the group gets r_i + b if it has more than c tokens, else nobody does
    A_i = 4 sigma d (1 - d) (r_i - mean r) / (std r + 1e-9)
    A_it = A_i - beta sum_{s >= t} k1_is,    k1 = ln p_old - ln p_reference
    L = token mean of GRPO's clipped term with A_it

The divergence is in the advantages, of each token, after they are compared and weighted: the reverse KL(policy || reference). The format
asks for <observe>...</observe> first, alone or inside the thinking. The order from easy to hard is the scenario's (`by: difficulty`), or
the session strategy's, by the policy's own pass rate.

The released code gives the bonus to the first answer of a group in which none is correct; here such a group earns none. Since d (1 - d) is
0 there too, the bonus does nothing in groups that are all correct, where it would matter most: that is the paper's. Groups that are all
right or all wrong are not drawn again.

Defaults: the released script's (128 prompts with 8 answers, 16 updates for each batch, AdamW at 1e-6, sigma 1.8, b 0.2, c 100); beta 0.01
is what its framework adds unasked.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from streamcl.verifier import Verifier
from streamcl.verifiers.format import Format

from ._policy import PolicyLearner
from ._rollouts import Rollouts, total


class ObserveR1(PolicyLearner):
    """`bonus`: of the shortest correct answer, if it has more than `floor` tokens. `sigma`: the largest weight; None for no weights."""

    estimator = None
    spread = 1e-9

    def __init__(
        self,
        *,
        bonus: NonNegativeFloat = 0.2,
        floor: NonNegativeInt = 100,
        sigma: PositiveFloat | None = 1.8,
        prompts: PositiveInt = 128,
        updates: PositiveInt = 16,
        beta: NonNegativeFloat = 0.01,
        aggregation: Literal["sequence", "token", "constant"] = "token",
        **options: Any,
    ) -> None:
        super().__init__(prompts=prompts, updates=updates, beta=beta, aggregation=aggregation, **options)
        self.bonus, self.floor, self.sigma = bonus, floor, sigma

    def usual(self) -> tuple[Verifier, ...]:
        return (*super().usual(), Format(tags=["observe", "think", "answer"], weight=0.5))

    def shaped(self, rollouts: Rollouts) -> Tensor:
        return total(rollouts) + self.bonus * shortest_correct(rollouts, self.floor)

    def advantages(self, rollouts: Rollouts, earned: Tensor) -> Tensor:
        advantages = super().advantages(rollouts, earned)
        if self.sigma is not None:
            right = rollouts.share(rollouts.correct, rollouts.judged)
            advantages = 4 * self.sigma * right * (1 - right) * advantages
        if rollouts.drift is None:
            return advantages
        to_come = (rollouts.drift * rollouts.mask).flip(1).cumsum(1).flip(1)
        return (advantages[:, None] + self.beta * to_come) * rollouts.mask


def shortest_correct(rollouts: Rollouts, floor: int) -> Tensor:
    """1 for the shortest correct answer of each group (the first of equals), where there is one and it has more than `floor` tokens."""
    lengths = rollouts.grouped(rollouts.lengths.double().masked_fill(~rollouts.correct, torch.inf))
    shortest, place = lengths.min(dim=1, keepdim=True)
    earns = (shortest > floor) & shortest.isfinite()
    return torch.zeros_like(lengths).scatter(1, place, earns.double()).flatten().to(rollouts.rewards.dtype)
