"""What every learner by reinforcement shares: options, the seams that a method fills in, and the loss. Two engines run it.

A method is the few functions of numbers that it changes: how rewards of a group are shaped, how advantages follow, how rows weigh in the
divergence. `_trl` runs it for language models on TRL's GRPOTrainer, `_loop` for any model whose scores are a policy over classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.learner import Learner, Report
from streamcl.nn.language import language_model
from streamcl.nn.model import Model
from streamcl.options import Fraction, NonNegativeFloat, Optimizer, PositiveFloat, PositiveInt, Schedule
from streamcl.stream import Column, StreamInfo, Task
from streamcl.verifier import Verifier

from ._rollouts import Aggregation, Estimator, Rollouts, compared, total


class PolicyLearner(Learner):
    """Group-relative policy optimisation with its seams open.

    A session makes `steps` updates; for each batch of rollouts `prompts` prompts are answered `group` times and learned from in
    `updates` steps of the optimiser (1: strictly on policy). `rewards` are verifiers with their weights, the first one the outcome.

    Of a language model `at_once` rows go through forward and backward together, which is a matter of memory alone: an update in parts is
    that of the whole. Where it is None these are all of an update's rows; of a model with more than 100 million weights they are 8, or the
    most below 8 that divide the update. `top_p` leaves the rarest words out of sampling. `vllm` lets that library sample, on a GPU.
    """

    estimator: Estimator | None = "k3"  # of the divergence as a loss; None where the method has it in its advantages: see Rollouts.drift
    bias_correction: bool = False  # each token's estimate counts by its ratio: see `divergence`
    clamp: ClassVar[float | None] = None  # of the logarithms' difference in the estimate
    kl_aggregation: ClassVar[Aggregation | None] = None  # of the divergence, where it is not that of the rest
    whole: ClassVar[bool] = False  # the ratio that is clipped is of whole completions
    spread: float | None = 1e-4  # what is added to a group's deviation; None where advantages are not divided by it
    shuffles: ClassVar[bool] = False  # also answer with frames in random order: extra["shuffled"], their mean outcome, NaN without frames

    def __init__(
        self,
        *,
        steps: PositiveInt = 40,
        prompts: PositiveInt = 8,
        group: PositiveInt = 8,
        updates: PositiveInt = 1,
        rewards: tuple[Verifier, ...] = (),
        beta: NonNegativeFloat = 0.0,
        clip_low: NonNegativeFloat = 0.2,
        clip_high: NonNegativeFloat = 0.2,
        aggregation: Literal["sequence", "token", "constant"] = "sequence",
        optimizer: Optimizer = Optimizer(name="adamw", lr=1e-6, weight_decay=0.0),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        clip: PositiveFloat | None = 1.0,
        temperature: PositiveFloat = 1.0,
        top_p: Fraction = 1.0,
        at_once: PositiveInt | None = None,
        vllm: bool = False,
    ) -> None:
        if group < 2:
            raise ConfigError("learner: group is 1, and a group of one has no mean to be better than: take 2 or more")
        self.steps, self.prompts, self.group, self.updates = steps, prompts, group, updates
        self.rewards, self.beta, self.temperature = tuple(rewards), beta, temperature
        self.clip_low, self.clip_high, self.clip = clip_low, clip_high, clip
        if top_p == 0:
            raise ConfigError("learner: top_p is 0, which leaves no word to say: take more, 1 for all")
        self.top_p, self.at_once, self.vllm = top_p, at_once, vllm
        self.aggregation: Aggregation = aggregation
        self.optimizer_settings, self.schedule = Optimizer.model_validate(optimizer), Schedule.model_validate(schedule)

    # -- what methods fill in ---------------------------------------------------------------------------------------------------

    def judge(self, answers: Sequence[str], rows: Mapping[str, Column]) -> dict[str, Tensor]:
        """Further judgements of each answer, which lie in `extra` of the rollouts: no rewards by themselves  # (N,) each"""
        return {}

    def shaped(self, rollouts: Rollouts) -> Tensor:
        """What each row earns, once its group is known  # (N,)"""
        return total(rollouts)

    def advantages(self, rollouts: Rollouts, earned: Tensor) -> Tensor:
        """By how much each row is better than its group  # (N,), or (N, T)"""
        return compared(rollouts, earned, self.spread)

    def kl_weights(self, rollouts: Rollouts, advantages: Tensor) -> Tensor | None:
        """How much each row counts in the divergence; None for 1  # (N,)"""
        return None

    def figures(self, rollouts: Rollouts) -> dict[str, float]:
        """What of a batch of rollouts a person should see beside rewards and lengths."""
        return {}

    def usual(self) -> tuple[Verifier, ...]:
        """The rewards of a language model where none are named."""
        from streamcl.verifiers.own import Own

        return (Own(),)

    def loss(
        self,
        policy: Tensor,
        old: Tensor,
        advantages: Tensor,
        mask: Tensor,
        longest: int,
        reference: Tensor | None = None,
        weights: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """The loss of ln p of the tokens that were sampled, under three policies; `longest` is what a completion may have at most, and
        `tokens` what a mean over tokens divides by where that is not their own number: see `aggregated`.

        # policy, old, reference, mask (N, T); advantages (N,) or (N, T); weights (N,)
        """
        if self.whole:
            rows = mask.any(dim=1, keepdim=True).to(policy.dtype)
            said, before = ((values * mask).sum(dim=1, keepdim=True) for values in (policy, old))
            loss = aggregated(surrogate(said, before, advantages, self.clip_low, self.clip_high), rows, "sum", longest)
        else:
            loss = aggregated(surrogate(policy, old, advantages, self.clip_low, self.clip_high), mask, self.aggregation, longest, tokens)
        if self.beta == 0 or reference is None or self.estimator is None:
            return loss
        kl = divergence(policy, reference, self.estimator, self.clamp, old if self.bias_correction else None)
        if weights is not None:
            kl = kl * weights[:, None]
        return loss + self.beta * aggregated(kl, mask, self.kl_aggregation or self.aggregation, longest, tokens)

    # -- running it --------------------------------------------------------------------------------------------------------------

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if language_model(context.model) is not None:
            self.rewards = self.rewards or self.usual()
            from ._trl import LanguageSession

            self.session: Any = LanguageSession(self)
        else:
            from ._loop import ActionSession

            self.session = ActionSession(self)
        self.session.start(info, context)

    def check(self, task: Task) -> None:
        self.session.check(task)

    def fit(self, model: Model, task: Task, context: Context) -> Report:
        return self.session.fit(model, task, context)

    def state(self) -> dict[str, Any]:
        return self.session.state()

    def restore(self, state: Any) -> None:
        self.session.restore(state)


def divergence(policy: Tensor, reference: Tensor, estimator: Estimator, clamp: float | None = None, old: Tensor | None = None) -> Tensor:
    """An estimate of KL(policy || reference) of each token, by ln p of the tokens that the policy sampled  # as both

    As losses they are not alike. In expectation the gradient of k1 is none, of k2 that of KL(policy || reference), the reverse one, and of
    k3 that of KL(reference || policy), the forward one. With ln p of what sampled (`old`) each estimate counts by its ratio, which makes
    the gradient of k1 and of k3 that of KL(policy || reference).
    """
    u = reference - policy
    if clamp is not None:
        u = u.clamp(-clamp, clamp)
    estimate = -u if estimator == "k1" else u.square() / 2 if estimator == "k2" else u.exp() - u - 1  # rounded as TRL rounds it
    return estimate if old is None else estimate * (policy - old).exp()


def aggregated(values: Tensor, mask: Tensor, how: Aggregation, longest: int, tokens: Tensor | None = None) -> Tensor:
    """One number of (N, T) values: the mean over rows of their means, the mean over tokens, the sum over N times `longest`, or the mean
    over rows of their sums. Of a part of a batch `tokens` is how many a part has on average, so that the parts' mean is the whole's."""
    if how == "sequence":
        return ((values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
    if how == "token":
        return (values * mask).sum() / (mask.sum() if tokens is None else tokens).clamp(min=1)
    return (values * mask).sum() / (len(values) * (longest if how == "constant" else 1))


def surrogate(policy: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """The clipped loss of each token  # (N, T)"""
    ratio = (policy - old).exp()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
