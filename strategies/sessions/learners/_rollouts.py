"""What reinforcement learners see of one batch of rollouts, whatever made them, and the estimators that they share.

N completions of N / G prompts, those of one prompt side by side: a group. Everything here is a pure function of numbers; no trainer, no
model. `std` is the unbiased one, as in every library that trains by groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["sequence", "token", "constant"]


@dataclass(frozen=True)
class Rollouts:
    """One batch of completions, before it is learned from."""

    rewards: Tensor  # (N, columns), NaN where a reward has nothing to say of a row
    weights: Tensor  # (columns,)
    columns: tuple[str, ...]  # the rewards' names; the first is the outcome
    mask: Tensor  # (N, T): 1 on the tokens that the policy wrote, the one that ends the text included
    group: int  # G
    drift: Tensor | None = None  # (N, T): ln p_reference - ln p_policy of each token, where there is a reference
    step: int = 0  # of this session's updates
    steps: int = 1
    stream_step: int = 0  # of all sessions' updates
    stream_steps: int = 1
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # (N, ...) each: what else was measured of a row

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion  # (N,)"""
        return self.mask.sum(dim=1)

    @property
    def outcome(self) -> Tensor:
        """What the first reward says of each row, from 0 to 1; 0 where it says nothing  # (N,)"""
        return self.rewards[:, 0].nan_to_num(0.0)

    def grouped(self, values: Tensor) -> Tensor:
        """(N, ...) -> (groups, G, ...)"""
        return values.unflatten(0, (-1, self.group))


def total(rollouts: Rollouts) -> Tensor:
    """The weighted sum of a row's rewards; NaN for a row that no reward says anything of  # (N,)"""
    silent = rollouts.rewards.isnan()
    return (rollouts.rewards * rollouts.weights).nansum(dim=1).masked_fill(silent.all(dim=1), torch.nan)
