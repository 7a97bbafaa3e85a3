"""T-GRPO (Video-R1): correct answers earn more where the order of frames was of use.

Feng et al., Video-R1: Reinforcing Video Reasoning in MLLMs, NeurIPS 2025, arXiv 2503.21776. Beside G answers to a video, half as many are
given to the same frames in random order; they are judged, and nothing is learned from them. With p and p~ the mean outcomes of the two,

    temporal:  where p >= 0.8 p~, each answer with an outcome above 0.1 gets r_i + 0.3
    length:    where more than one answer has an outcome above 0.1, each of these with 320 <= |o_i| <= 512 gets r_i + 0.2
    A_i = (r_i - mean r) / (std r + 1e-4),    L = mean_i 1/|o_i| sum_t [ -rho_it A_i + beta k3_it ]

strictly on policy, so there is nothing to clip; u in k3 is bounded by 10, and k3 is the forward KL(reference || policy). What has no frames
gets no temporal reward, and a stream without any is refused. The 0.8 stands in the released code alone. The rule is also met where p~ is
small, so a bonus by itself is no sign of an order that was understood; compare p with p~ (figures `ordered`, `shuffled`).

Rewards are the row's own verifier and the format <think>...</think><answer>...</answer>. Defaults: the released ones (8 answers, sampled
with top-p 0.95, AdamW at 1e-6 with a cosine, beta 0.04). Supervised training comes first.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import Fraction, NonNegativeFloat, NonNegativeInt, Optimizer, PositiveFloat, PositiveInt, Schedule
from streamcl.verifier import Verifier
from streamcl.verifiers.format import Format

from ._policy import PolicyLearner
from ._rollouts import Rollouts, total

RIGHT = 0.1  # an outcome above this is worth a bonus


class TGRPO(PolicyLearner):
    """`bonus`: where the ordered group is at least `ratio` as good as the other; `length_bonus`: from `shortest` to `longest` tokens."""

    shuffles = True
    clamp = 10.0

    def __init__(
        self,
        *,
        bonus: NonNegativeFloat = 0.3,
        ratio: NonNegativeFloat = 0.8,
        length_bonus: NonNegativeFloat = 0.2,
        shortest: NonNegativeInt = 320,
        longest: PositiveInt = 512,
        updates: Literal[1] = 1,
        beta: NonNegativeFloat = 0.04,
        optimizer: Optimizer = Optimizer(name="adamw", lr=1e-6, weight_decay=0.01),  # noqa: B008
        schedule: Schedule = Schedule(name="cosine"),  # noqa: B008
        clip: PositiveFloat | None = 5.0,
        top_p: Fraction = 0.95,
        **options: Any,
    ) -> None:
        super().__init__(updates=updates, beta=beta, optimizer=optimizer, schedule=schedule, clip=clip, top_p=top_p, **options)
        if shortest > longest:
            raise ConfigError(f"learner: shortest is {shortest} and longest {longest}: no length is in between")
        self.bonus, self.ratio = bonus, ratio
        self.length_bonus, self.shortest, self.longest = length_bonus, shortest, longest

    def usual(self) -> tuple[Verifier, ...]:
        return (*super().usual(), Format())

    def shaped(self, rollouts: Rollouts) -> Tensor:
        return total(rollouts) + self.bonus * temporal(rollouts, self.ratio) + self.length_bonus * self.of_length(rollouts)

    def of_length(self, rollouts: Rollouts) -> Tensor:
        """1 for each good answer of a fair length, where there is more than one good answer  # (N,)"""
        good, lengths = rollouts.outcome > RIGHT, rollouts.lengths
        several = (rollouts.grouped(good).sum(dim=1) > 1).repeat_interleave(rollouts.group)
        return (several & good & (lengths >= self.shortest) & (lengths <= self.longest)).to(rollouts.rewards.dtype)

    def figures(self, rollouts: Rollouts) -> dict[str, float]:
        shuffled = rollouts.extra["shuffled"]
        seen = rollouts.judged & ~shuffled.isnan()  # the rows with frames
        if not seen.any():
            return {}
        return {"ordered": float(rollouts.outcome[seen].mean()), "shuffled": float(shuffled[seen].mean())}


def temporal(rollouts: Rollouts, ratio: float) -> Tensor:
    """1 for each good answer to frames in order whose group is at least `ratio` as good as the shuffled one  # (N,)"""
    ordered, shuffled = rollouts.mean(rollouts.outcome, rollouts.judged), rollouts.extra["shuffled"].to(rollouts.rewards)
    return ((ordered >= ratio * shuffled) & (rollouts.outcome > RIGHT)).to(rollouts.rewards.dtype)
