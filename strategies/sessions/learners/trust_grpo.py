"""Trust-GRPO (SophiaVL-R1): a reward model rates the thinking, as far as it can be trusted, and less and less.

Fan et al., SophiaVL-R1: Reinforcing MLLMs Reasoning with Thinking Reward, 2025, arXiv 2505.17018. With R^o the outcome of an answer and R^t
in [0, 1] what the reward model says of its thinking, and in each group mu_c the mean R^t where R^o >= 0.5 and mu_w where it is below:

    gamma = 1 if mu_c >= mu_w else exp(mu_c - mu_w)
    R_i = R^o_i + gamma alpha exp(-step / T) R^t_i
    A_i = (R_i - mean R) / (std R + 1e-6),    and GRPO's loss with k3 (the forward KL), token mean

A reward model that rates the thinking of wrong answers higher is not trusted there. A group without correct or without wrong answers has
gamma 1: nothing speaks against the model. `reward_model` is any verifier (`judge` is a language model); it is given the thinking alone,
up to </think>, and of the rows nothing but the columns question, choices, skill, difficulty and length, for it must not know what is right.
It sees no picture, which the paper's does. What it cannot judge (NaN) counts nothing.

The released code asks the reward model only where R^o >= 0.2 and takes 0 elsewhere, and leaves it out of groups with every R^o >= 0.9 or
every R^o <= 0.1 (`trm_call: outcome>=0.2`). On rewards of 0 and 1 gamma is then always 1. By default all are asked, as the paper says. Its
T is an option, so large that hardly anything is annealed; here it is the number of updates, of the session or of the stream
(`anneal_scope`), as in the paper. Left out are its entropy term (1e-3) and its bound of 10 on k3; the bound of 10 on u is kept.

Defaults: the paper's (alpha 0.3, 8 answers to each of 16 prompts, AdamW at 5e-7, beta 0.04).

Evidence: small real data
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.options import NonNegativeFloat, Optimizer, PositiveFloat, PositiveInt
from streamcl.strategy import plugin_name
from streamcl.stream import Column
from streamcl.verifier import Verifier
from streamcl.verifiers.thought import Thought

from ._judging import judged
from ._policy import PolicyLearner
from ._rollouts import Rollouts, total

SHOWN = ("question", "choices", "skill", "difficulty", "length")  # columns that do not tell the answer


class TrustGRPO(PolicyLearner):
    """`reward_model` rates the thinking (a rule, unless one is named) and counts `alpha` times; `trust`: by gamma; `anneal_scope`: over
    what it fades; `trm_call`: whose thinking it is asked about."""

    clamp = 10.0
    spread = 1e-6

    def __init__(
        self,
        *,
        reward_model: Verifier | None = None,
        alpha: NonNegativeFloat = 0.3,
        trust: bool = True,
        anneal_scope: Literal["session", "stream", "none"] = "session",
        trm_call: Literal["all", "outcome>=0.2"] = "all",
        prompts: PositiveInt = 16,
        beta: NonNegativeFloat = 0.04,
        aggregation: Literal["sequence", "token", "constant"] = "token",
        optimizer: Optimizer = Optimizer(name="adamw", lr=5e-7, weight_decay=0.01),  # noqa: B008
        clip: PositiveFloat | None = 4.0,
        **options: Any,
    ) -> None:
        super().__init__(prompts=prompts, beta=beta, aggregation=aggregation, optimizer=optimizer, clip=clip, **options)
        self.reward_model = reward_model or Thought()
        self.alpha, self.trust, self.anneal_scope, self.trm_call = alpha, trust, anneal_scope, trm_call

    def judge(self, answers: Sequence[str], rows: Mapping[str, Column]) -> dict[str, Tensor]:
        shown = {name: column for name, column in rows.items() if name in SHOWN}
        return {"thinking": judged(self.reward_model, plugin_name(self.reward_model), [thinking(answer) for answer in answers], shown)}

    def rated(self, rollouts: Rollouts) -> Tensor:
        """R^t; NaN where it is not known  # (N,)"""
        rated, outcome = rollouts.extra["thinking"].to(rollouts.rewards), rollouts.outcome
        if self.trm_call == "all":
            return rated
        alike = rollouts.grouped(outcome >= 0.9).all(dim=1) | rollouts.grouped(outcome <= 0.1).all(dim=1)
        return rated.masked_fill((outcome < 0.2) | alike.repeat_interleave(rollouts.group), 0.0)

    def shaped(self, rollouts: Rollouts) -> Tensor:
        rated = self.rated(rollouts)
        gamma = trusted(rollouts, rated) if self.trust else torch.ones_like(rated)
        return total(rollouts) + self.alpha * self.faded(rollouts) * gamma * rated.nan_to_num(0.0)

    def faded(self, rollouts: Rollouts) -> float:
        if self.anneal_scope == "session":
            return math.exp(-rollouts.step / rollouts.steps)
        return math.exp(-rollouts.stream_step / rollouts.stream_steps) if self.anneal_scope == "stream" else 1.0

    def figures(self, rollouts: Rollouts) -> dict[str, float]:
        rated = self.rated(rollouts)
        return {"thinking": float(rated.nanmean()), "trust": float(trusted(rollouts, rated).mean())}


def trusted(rollouts: Rollouts, rated: Tensor) -> Tensor:
    """gamma of each row's group  # (N,)"""
    known, good = rollouts.judged & ~rated.isnan(), rollouts.outcome >= 0.5
    above = rollouts.mean(rated, known & good) - rollouts.mean(rated, known & ~good)
    return above.nan_to_num(0.0).clamp(max=0.0).exp()


def thinking(answer: str) -> str:
    """The part of an answer that is thought, in its tags; nothing where it is not marked."""
    start = answer.find("<think>")
    end = answer.find("</think>", max(start, 0))
    return answer[start : end + len("</think>")] if 0 <= start < end else ""
