"""GRPO: group-relative policy optimisation. What a completion earned is compared with its group's mean; there is no value network.

Shao et al., DeepSeekMath, 2024, arXiv 2402.03300. Of G completions o_i of a prompt with rewards r_i,

    A_i = (r_i - mean r) / (std r + 1e-4)
    L = mean_i 1/|o_i| sum_t [ -min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i) + beta k3_it ]

with rho the ratio to the policy that answered, and k3 = e^u - 1 - u, u = ln p_reference - ln p. std is the unbiased one, as in every
library. A group that earned the same moves the weights towards the reference and nowhere else.

Which way the divergence is, is in the gradient, not in the name. `estimator: k3` is the gradient of KL(reference || policy), the forward
KL: the policy keeps answers that the reference gives. `k3` or `k1` with `bias_correction`, and `k2` without, are the reverse KL(policy ||
reference): the policy gives up answers that the reference does not give. TRL has changed from the first to the second (1.16).

Dr.GRPO (Liu et al., 2025, arXiv 2503.20783) is `scale: none, aggregation: constant, beta: 0`: the deviation makes very easy and very hard
prompts count more, and 1/|o_i| makes long wrong answers cheap. Both are left out; the sum over tokens is divided by the longest completion
that is allowed, not by the longest at hand. `aggregation: token, clip_high: 0.28` and the reward `overlong` are those of DAPO (Yu et al.,
2025, arXiv 2503.14476), without its refilling of batches.

Defaults: the paper's (64 answers to each of 16 prompts, learning rate 1e-6, beta 0.04, one update for each batch); 1e-4 is TRL's.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any, Literal

from streamcl.errors import ConfigError
from streamcl.options import NonNegativeFloat, PositiveInt

from ._policy import PolicyLearner
from ._rollouts import Estimator


class GRPO(PolicyLearner):
    """`scale`: over the group's deviation, or as it is. `estimator` and `bias_correction`: which divergence it is, see above."""

    def __init__(
        self,
        *,
        prompts: PositiveInt = 16,
        group: PositiveInt = 64,
        beta: NonNegativeFloat = 0.04,
        scale: Literal["group", "none"] = "group",
        estimator: Literal["k1", "k2", "k3"] = "k3",
        bias_correction: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(prompts=prompts, group=group, beta=beta, **options)
        if estimator == "k1" and not bias_correction:
            raise ConfigError(
                "learner: the estimator k1 as a loss has no gradient in expectation: set bias_correction=true, or take k2 or k3"
            )
        if estimator == "k2" and bias_correction:
            raise ConfigError("learner: the gradient of k2 is that of the reverse KL as it is: set bias_correction=false")
        self.spread = self.spread if scale == "group" else None
        self.estimator: Estimator = estimator
        self.bias_correction = bias_correction
