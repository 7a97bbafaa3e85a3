"""RLOO: REINFORCE with the mean of the other completions as the baseline (leave one out).

Ahmadian et al., Back to Basics, ACL 2024, arXiv 2402.14740. A completion is one action. With beta on the divergence in the reward,

    r'_i = r_i - beta sum_t (ln p_old - ln p_reference)_it        (k1, detached: the reverse KL)
    A_i = r'_i - mean_{j != i} r'_j = G / (G - 1) (r'_i - mean r')
    L = mean_i -min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i),    rho_i = exp(sum_t ln p - ln p_old)

The divergence is subtracted before the baseline, so also a group that earned the same is told apart by it. Ratios of whole completions
explode or vanish where these are long: stay on policy (`updates: 1`).

Defaults: those of TRL's RLOOTrainer (2 answers to a prompt, beta 0.05, one update).

Evidence: small real data
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from streamcl.options import NonNegativeFloat, PositiveInt

from ._policy import PolicyLearner
from ._rollouts import Rollouts, compared, total


class RLOO(PolicyLearner):
    """`aggregation`: a completion counts as a whole, so its tokens are summed."""

    estimator = None
    whole = True

    def __init__(
        self,
        *,
        group: PositiveInt = 2,
        beta: NonNegativeFloat = 0.05,
        aggregation: Literal["sum"] = "sum",
        **options: Any,
    ) -> None:
        super().__init__(group=group, beta=beta, **options)
        self.aggregation = aggregation

    def shaped(self, rollouts: Rollouts) -> Tensor:
        earned = total(rollouts)
        return earned if rollouts.drift is None else earned + self.beta * (rollouts.drift * rollouts.mask).sum(dim=1)

    def advantages(self, rollouts: Rollouts, earned: Tensor) -> Tensor:
        known = rollouts.grouped(~earned.isnan()).sum(dim=1).repeat_interleave(rollouts.group)
        return compared(rollouts, earned, spread=None) * known / (known - 1).clamp(min=1)
