"""Merged sessions: after each session the weights are averaged with those from before it.

Weight averaging between tasks, as in model soups (Wortsman et al., ICML 2022, arXiv 2203.05482) and WiSE-FT (CVPR 2022, arXiv 2109.01903):
theta <- theta_before + share (theta_learned - theta_before). `share: average` is 1/t after session t, so that the result is the mean of
what the sessions ended with; each begins from the mean so far. Low-rank adapters are refused: the average of their factors is not the
average of what they add (adapter_per_session with `after: merged` adds them up).

Evidence: small real data
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.options import Fraction
from streamcl.stream import StreamInfo, Task

from ._sessions import Sessions


class Merge(Sessions):
    """`share`: how much of what a session changed is kept."""

    def __init__(self, *, share: Fraction | Literal["average"] = "average", **options: Any) -> None:
        super().__init__(**options)
        if self.adapter is not None:
            raise ConfigError("strategy.adapter: merge averages the model's own weights: leave it out, or take adapter_per_session")
        self.share = share

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if self.language is None:
            raise ConfigError("merge averages the weights of models that answer in words, and this one does not: take sequential")

    @torch.no_grad()
    def after_session(self, task: Task) -> None:
        share = 1 / (task.index + 1) if self.share == "average" else float(self.share)
        with self.language.policy("previous") as network:
            before = {name: value.clone() for name, value in network.named_parameters() if value.requires_grad}
        for name, value in self.language.network.named_parameters():
            if name in before:
                value.copy_(before[name].lerp(value, share))
