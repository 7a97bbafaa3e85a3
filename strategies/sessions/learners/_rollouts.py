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
Aggregation = Literal["sequence", "token", "constant", "sum"]


@dataclass(frozen=True)
class Rollouts:
    """One batch of completions, before it is learned from."""

    rewards: Tensor  # (N, columns), NaN where a reward has nothing to say of a row
    weights: Tensor  # (columns,)
    columns: tuple[str, ...]  # the rewards' names; the first is the outcome
    mask: Tensor  # (N, T): 1 on the tokens that the policy wrote, the one that ends the text included
    group: int  # G
    drift: Tensor | None = None  # (N, T): ln p_reference - ln p_policy of each token, where it is no term of the loss (estimator None)
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

    @property
    def judged(self) -> Tensor:
        """Whether the first reward says anything of a row  # (N,)"""
        return ~self.rewards[:, 0].isnan()

    @property
    def correct(self) -> Tensor:
        """Whether the outcome is all that can be had  # (N,)"""
        return self.outcome >= 1

    def grouped(self, values: Tensor) -> Tensor:
        """(N, ...) -> (groups, G, ...)"""
        return values.unflatten(0, (-1, self.group))

    def share(self, rows: Tensor, of: Tensor) -> Tensor:
        """The share of `rows` among the rows `of` of each group, told to all of its rows; 0 where there are none  # (N,), as both"""
        count = self.grouped(of).sum(dim=1)
        return ((self.grouped(rows & of).sum(dim=1)) / count.clamp(min=1)).repeat_interleave(self.group)

    def mean(self, values: Tensor, of: Tensor) -> Tensor:
        """The mean of values over the rows `of` of each group, told to all of its rows; NaN where there are none  # (N,), as both"""
        return self.grouped(values.masked_fill(~of, torch.nan)).nanmean(dim=1).repeat_interleave(self.group)


def total(rollouts: Rollouts) -> Tensor:
    """The weighted sum of a row's rewards; NaN for a row that no reward says anything of  # (N,)"""
    silent = rollouts.rewards.isnan()
    return (rollouts.rewards * rollouts.weights).nansum(dim=1).masked_fill(silent.all(dim=1), torch.nan)


def compared(rollouts: Rollouts, earned: Tensor, spread: float | None) -> Tensor:
    """By how much each row earned more than its group: over the group's deviation + `spread`, or as it is where that is None  # (N,)

    A row that no reward judges (NaN) gets 0, and the others are compared without it. A group that earned the same gets 0 exactly: rounding
    of its mean must not be taken for a deviation, as it would be with a small `spread`.
    """
    groups = rollouts.grouped(earned).double()
    count = (~groups.isnan()).sum(dim=1, keepdim=True)
    above = groups - groups.nanmean(dim=1, keepdim=True)
    if spread is not None:
        deviation = (above.square().nansum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        above = above / (deviation + spread)
    highest, lowest = groups.nan_to_num(-torch.inf).amax(dim=1, keepdim=True), groups.nan_to_num(torch.inf).amin(dim=1, keepdim=True)
    return above.masked_fill(groups.isnan() | (highest == lowest), 0.0).flatten().to(earned.dtype)
