"""The objectives of learning by reinforcement, as pure functions: values worked out by hand, and identities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from streamcl.strategies.sessions.learners._policy import aggregated, divergence, surrogate
from streamcl.strategies.sessions.learners._rollouts import Rollouts, compared, total
from streamcl.strategies.sessions.learners.apo import dads, stcr
from streamcl.strategies.sessions.learners.observe_r1 import shortest_correct
from streamcl.strategies.sessions.learners.t_grpo import temporal
from streamcl.strategies.sessions.learners.trust_grpo import thinking, trusted
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.plugins import find
from streamcl.stream import Column
from streamcl.verifier import Verifier

NAN = math.nan


def learner(name: str, **options: Any) -> Any:
    return find("learner", name).load()(**options)


def rollouts(outcome: Any, lengths: Any = None, *others: Any, weights: Any = None, group: int | None = None, **more: Any) -> Rollouts:
    """Completions with these outcomes and lengths; further columns of rewards after them. One group, unless told otherwise."""
    rewards = torch.tensor([list(map(float, outcome)), *(list(map(float, other)) for other in others)]).T
    lengths = torch.tensor(lengths or [1] * len(rewards))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    columns = tuple(f"reward {number}" for number in range(rewards.shape[1]))
    told = torch.tensor(weights or [1.0] * rewards.shape[1])
    return Rollouts(rewards, told, columns, mask, group or len(rewards), **more)


def advantages(of: Any, seen: Rollouts) -> Tensor:
    return of.advantages(seen, of.shaped(seen))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Groups -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "plus", "minus"), [(1, 2.4749, -0.3536), (4, 0.9354, -0.9354), (7, 0.3536, -2.4749)])
def test_advantages_of_rights_and_wrongs_are_those_of_the_share_of_rights(right: int, plus: float, minus: float) -> None:
    q = right / 8
    found = compared(rollouts([1] * right + [0] * (8 - right)), torch.tensor([1.0] * right + [0.0] * (8 - right)), spread=0.0)
    assert found[0].item() == pytest.approx(plus, abs=1e-4) == pytest.approx(math.sqrt((1 - q) / q * 7 / 8), abs=1e-4)
    assert found[-1].item() == pytest.approx(minus, abs=1e-4) == pytest.approx(-math.sqrt(q / (1 - q) * 7 / 8), abs=1e-4)


def test_advantages_add_up_to_nothing_and_do_not_change_with_the_scale_of_rewards() -> None:
    seen = rollouts([0] * 12, group=4)
    earned = drawn(12)
    found = compared(seen, earned, spread=0.0)
    assert found.view(3, 4).sum(dim=1).abs().max() < 1e-12
    assert torch.allclose(compared(seen, 3 * earned + 7, spread=0.0), found, atol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "apo", "rloo", "trust_grpo", "t_grpo", "observe_r1"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1.3, 1e-3 / 7])
def test_a_group_that_earned_the_same_moves_nothing(name: str, value: float) -> None:
    seen = rollouts([value] * 7, extra={"thinking": torch.zeros(7), "shuffled": torch.full((7,), NAN)})
    assert torch.equal(advantages(learner(name), seen), torch.zeros(7))


def test_what_no_reward_judges_is_missing_and_not_wrong() -> None:
    seen = rollouts([1, NAN, 0, 0, NAN, NAN, NAN, NAN], group=4)
    for name in ("grpo", "rloo", "apo"):
        found = advantages(learner(name), seen)
        alone = advantages(learner(name), rollouts([1, 0, 0]))
        assert torch.allclose(found, torch.tensor([alone[0], 0, alone[1], alone[2], 0, 0, 0, 0]))
    assert total(rollouts([NAN, NAN], None, [1, NAN], weights=[1, 0.5])).tolist() == pytest.approx([0.5, NAN], nan_ok=True)


def test_a_group_in_which_one_answer_is_judged_is_compared_with_nobody() -> None:
    assert torch.equal(advantages(learner("grpo"), rollouts([1, NAN, NAN])), torch.zeros(3))
    assert torch.equal(advantages(learner("rloo"), rollouts([1, NAN, NAN])), torch.zeros(3))


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="group is 1"):
        learner("grpo", group=1)


# Dr.GRPO and RLOO ---------------------------------------------------------------------------------------------------------------------


def test_without_the_deviation_right_and_wrong_are_one_apart_whatever_the_share() -> None:
    for right in range(1, 8):
        found = advantages(learner("grpo", scale="none"), rollouts([1] * right + [0] * (8 - right)))
        assert found[0] - found[-1] == pytest.approx(1.0)


def test_dividing_by_the_longest_that_is_allowed_forgets_padding_and_parts() -> None:
    values, mask = drawn(4, 6), (torch.arange(6) < torch.tensor([[1], [6], [3], [2]])).double()
    whole = aggregated(values, mask, "constant", 10)
    padded = [torch.nn.functional.pad(part, (0, 5)) for part in (values, mask)]
    assert torch.allclose(aggregated(padded[0], padded[1], "constant", 10), whole)
    halves = [aggregated(values[rows], mask[rows], "constant", 10) for rows in (slice(0, 2), slice(2, 4))]
    assert torch.allclose(sum(halves, torch.zeros(())) / 2, whole)
    tokens = mask.sum() / 2  # of a part, on average
    shares = [aggregated(values[rows], mask[rows], "token", 10, tokens) for rows in (slice(0, 2), slice(2, 4))]
    assert torch.allclose(sum(shares, torch.zeros(())) / 2, aggregated(values, mask, "token", 10))
    of_tokens = [aggregated(values[rows], mask[rows], "token", 10) for rows in (slice(0, 2), slice(2, 4))]
    assert not torch.allclose(sum(of_tokens, torch.zeros(())) / 2, aggregated(values, mask, "token", 10))


def test_a_token_of_a_longer_answer_counts_half_in_the_mean_of_means_alone() -> None:
    mask = (torch.arange(8) < torch.tensor([[4], [8]])).double()
    for how, ratio in (("sequence", 0.5), ("constant", 1.0), ("token", 1.0), ("sum", 1.0)):
        values = torch.ones(2, 8, dtype=torch.float64, requires_grad=True)
        aggregated(values, mask, how, 8).backward()
        assert values.grad is not None
        assert values.grad[1, 0] / values.grad[0, 0] == ratio


def test_leaving_one_out_is_the_centred_reward_times_g_over_g_less_one() -> None:
    seen = rollouts([0] * 12, group=4)
    earned = drawn(12)
    found = learner("rloo").advantages(seen, earned)
    groups = earned.view(3, 4)
    assert torch.allclose(found.view(3, 4), 4 / 3 * (groups - groups.mean(dim=1, keepdim=True)))
    others = (groups.sum(dim=1, keepdim=True) - groups) / 3
    assert torch.allclose(found.view(3, 4), groups - others)


def test_rloo_takes_the_divergence_off_before_the_baseline() -> None:
    seen = rollouts([1, 1], [2, 1], drift=torch.tensor([[-1.0, -2.0], [0.5, 9.0]]))
    of = learner("rloo", beta=0.1)
    assert of.shaped(seen).tolist() == pytest.approx([0.7, 1.05])
    assert advantages(of, seen).tolist() == pytest.approx([-0.35, 0.35])


def test_rloo_clips_the_ratio_of_the_whole_completion() -> None:
    old = torch.zeros(2, 2)
    policy = torch.tensor([[0.15, 0.15], [0.1, 5.0]], requires_grad=True)  # the last token is padding
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss = learner("rloo", aggregation="sum").loss(policy, old, torch.tensor([1.0, 1.0]), mask, 9)
    assert loss.item() == pytest.approx(-(1.2 + math.exp(0.1)) / 2)  # e^0.3 is clipped, its tokens' ratios would not be
    loss.backward()
    assert policy.grad is not None
    assert policy.grad[0].tolist() == [0, 0]
    assert policy.grad[1].tolist() == pytest.approx([-math.exp(0.1) / 2, 0])


# The divergence -----------------------------------------------------------------------------------------------------------------------


def softmaxes() -> tuple[Tensor, Tensor]:
    """ln p of a policy over seven answers, which can be differentiated, and of a reference."""
    return drawn(7).requires_grad_(), drawn(7, seed=1).log_softmax(0)


def gradient(logits: Tensor, of: Any) -> Tensor:
    return torch.autograd.grad(of(logits.log_softmax(0)), logits)[0]


def test_the_gradients_of_the_estimates_are_what_they_are_called() -> None:
    logits, reference = softmaxes()
    reverse = gradient(logits, lambda lp: (lp.exp() * (lp - reference)).sum())
    forward = gradient(logits, lambda lp: (reference.exp() * (reference - lp)).sum())

    def expected(estimator: Any, corrected: bool = False) -> Tensor:
        """The mean gradient over answers that are drawn from the policy, by summing over all of them."""
        return gradient(
            logits, lambda lp: (lp.exp().detach() * divergence(lp, reference, estimator, old=lp.detach() if corrected else None)).sum()
        )

    assert expected("k1").abs().max() < 1e-15
    assert torch.allclose(expected("k2"), reverse, atol=1e-15)
    assert torch.allclose(expected("k3"), forward, atol=1e-15)
    assert torch.allclose(expected("k3", corrected=True), reverse, atol=1e-15)
    assert torch.allclose(expected("k1", corrected=True), reverse, atol=1e-15)
    in_reward = gradient(logits, lambda lp: (lp.exp().detach() * (lp - reference).detach() * lp).sum())
    assert torch.allclose(in_reward, reverse, atol=1e-15)
    assert not torch.allclose(forward, reverse, atol=1e-2)
    assert not torch.allclose(expected("k2", corrected=True), reverse, atol=1e-3), "k2 must not be corrected"


def test_as_numbers_k1_and_k3_are_the_divergence_and_k3_is_never_negative() -> None:
    logits, reference = softmaxes()
    lp = logits.detach().log_softmax(0)
    kl = (lp.exp() * (lp - reference)).sum()
    for estimator in ("k1", "k3"):
        assert torch.allclose((lp.exp() * divergence(lp, reference, estimator)).sum(), kl)
    assert (divergence(lp, reference, "k3") >= 0).all()
    assert divergence(torch.tensor(0.0), torch.tensor(40.0), "k3", clamp=10.0).item() == pytest.approx(math.exp(10) - 11)


def test_a_weighted_divergence_folds_into_the_advantages_of_a_first_step() -> None:
    policy, reference = drawn(4, 3).requires_grad_(), drawn(4, 3, seed=1)
    advantage, weight, mask, beta = drawn(4, seed=2), drawn(4, seed=3).abs(), torch.ones(4, 3), 0.7
    old = policy.detach()
    plain = learner("grpo", beta=beta)
    (beside,) = torch.autograd.grad(plain.loss(policy, old, advantage, mask, 3, reference, weight), policy)
    folded = advantage[:, None] - beta * weight[:, None] * (1 - (reference - old).exp())
    (inside,) = torch.autograd.grad(plain.loss(policy, old, folded, mask, 3), policy)
    assert torch.allclose(beside, inside, atol=1e-15)


def test_on_policy_the_clipped_loss_is_that_of_reinforce() -> None:
    policy, advantage = drawn(6, 2).requires_grad_(), drawn(6, seed=1)
    (clipped,) = torch.autograd.grad(surrogate(policy, policy.detach(), advantage, 0.2, 0.2).mean(), policy)
    (plain,) = torch.autograd.grad(-(advantage[:, None] * policy).mean(), policy)
    assert torch.allclose(clipped, plain, atol=1e-16)


def test_the_ratio_is_clipped_on_the_side_where_there_is_nothing_more_to_gain() -> None:
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5]])
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert torch.allclose(surrogate(ratio.log(), torch.zeros(1, 4), advantage, 0.2, 0.28), torch.tensor([[-1.28, 1.5, -0.5, 0.8]]))


def test_estimates_that_are_not_what_one_would_think_are_refused() -> None:
    with pytest.raises(ConfigError, match="k1 as a loss has no gradient in expectation"):
        learner("grpo", estimator="k1")
    with pytest.raises(ConfigError, match="k2 is that of the reverse KL as it is"):
        learner("grpo", estimator="k2", bias_correction=True)


# APO ----------------------------------------------------------------------------------------------------------------------------------


def test_the_divergence_counts_less_where_few_answers_are_right() -> None:
    table = [1.0, 0.2881, 0.4932, 0.6392, 0.7431, 0.8171, 0.8698, 0.9073, 1.0]
    for right, kappa in enumerate(table):
        seen = rollouts([1] * right + [0] * (8 - right))
        assert dads(seen).tolist() == pytest.approx([kappa] * 8, abs=1e-4)
        weights = learner("apo").kl_weights(seen, advantages(learner("apo"), seen))
        assert weights.tolist() == pytest.approx([kappa] * right + [1.0] * (8 - right), abs=1e-4)
    assert dads(rollouts([1, 0, NAN, NAN])).tolist() == pytest.approx([1 - math.exp(-math.e / 2)] * 4)


@pytest.mark.parametrize(("excess", "weight"), [(100, 1.0010), (1000, 1.00995), (2000, 1.0198), (4096, 1.0401)])
def test_long_wrong_answers_weigh_more(excess: int, weight: float) -> None:
    seen = rollouts([1, 1, 0, 0, NAN], [30, 50, 40 + excess, 20, 40 + excess])
    assert stcr(seen, 1.00001).tolist() == pytest.approx([1, 1, weight, 1, 1], abs=6e-5)


def test_where_nothing_is_right_no_length_is_wrong() -> None:
    assert torch.equal(stcr(rollouts([0, 0, 0], [1, 50, 5000]), 1.1), torch.ones(3))


def test_apo_without_its_weights_is_grpo() -> None:
    seen = rollouts([1, 0, 0, 1, 0, 0, 0, 0], [3, 9, 2, 40, 5, 5, 5, 8], group=4)
    plain = learner("grpo")
    plain.spread = 1e-9
    same = learner("apo", lambda_=1.0, dads=False)
    assert torch.equal(advantages(same, seen), advantages(plain, seen))
    assert same.kl_weights(seen, advantages(same, seen)) is None


def test_a_wrong_answer_in_the_right_form_is_praised_for_its_length_only_as_released() -> None:
    seen = rollouts([1, *[0] * 7], [200, *[300] * 6, 3000], [1, *[0] * 6, 1], weights=[1.0, 0.5])
    released, mended = learner("apo"), learner("apo", positive_mask="correctness")
    plain = compared(seen, total(seen), 1e-9)
    assert plain[-1].item() == pytest.approx(0.468, abs=5e-4)
    assert (advantages(released, seen)[-1] / plain[-1]).item() == pytest.approx(1.0276, abs=5e-5)
    assert advantages(mended, seen)[-1] == plain[-1]
    assert (advantages(mended, seen)[1] / plain[1]).item() == pytest.approx(2 - 1.00001**-100)
    kappa = pytest.approx(0.2881, abs=1e-4)
    assert released.kl_weights(seen, plain).tolist() == [kappa, *[1.0] * 6, kappa]
    assert mended.kl_weights(seen, plain).tolist() == [kappa, *[1.0] * 7]


def test_the_loss_of_apo_is_a_token_mean_and_its_divergence_a_mean_over_answers() -> None:
    policy, reference = drawn(2, 4), drawn(2, 4, seed=1)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    advantage, weights = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    found = learner("apo", beta=0.1).loss(policy, policy, advantage, mask, 4, reference, weights)
    k3 = divergence(policy, reference, "k3")
    assert torch.allclose(found, (-2 * 4 + 1) / 5 + 0.1 * (0.5 * k3[0].mean() + 3 * k3[1, 0]) / 2)


def test_doubling_the_weights_is_doubling_beta() -> None:
    policy, reference, mask = drawn(3, 2), drawn(3, 2, seed=1), torch.ones(3, 2)
    given = (policy, policy, torch.zeros(3), mask, 2, reference)
    assert learner("apo", beta=0.5).loss(*given, torch.full((3,), 2.0)) == learner("apo", beta=1.0).loss(*given)


def test_a_lambda_that_praises_long_wrong_answers_is_refused() -> None:
    with pytest.raises(ConfigError, match="makes long wrong answers better"):
        learner("apo", lambda_=0.9)


# Observe-R1 ---------------------------------------------------------------------------------------------------------------------------


def test_groups_of_medium_difficulty_weigh_most() -> None:
    for right, omega in enumerate([0, 0.7875, 1.35, 1.6875, 1.8, 1.6875, 1.35, 0.7875, 0]):
        seen = rollouts([1] * right + [0] * (8 - right))
        plain = compared(seen, total(seen), 1e-9)
        assert torch.allclose(advantages(learner("observe_r1", bonus=0.0), seen), omega * plain)
        assert torch.equal(advantages(learner("observe_r1", bonus=0.0, sigma=None), seen), plain)


def test_the_shortest_right_answer_earns_the_bonus_unless_it_is_too_short() -> None:
    outcome, lengths = [0, 1, 1, 0, 1, 0, 0, 0], [10, 300, 150, 5, 150, 5, 5, 5]
    earned = learner("observe_r1").shaped(rollouts(outcome, lengths))
    assert earned.tolist() == pytest.approx([0, 1, 1.2, 0, 1, 0, 0, 0])  # one of them, though the last is as short
    assert shortest_correct(rollouts(outcome, lengths), 149).sum() == 1
    assert shortest_correct(rollouts(outcome, lengths), 150).sum() == 0  # then nobody does, not the next one
    assert torch.equal(learner("observe_r1").shaped(rollouts([0, 0, 0, NAN], [400] * 4))[:3], torch.zeros(3))
    both = shortest_correct(rollouts([0, 0, 1, 1], [200, 200, 300, 200], group=2), 100)
    assert both.tolist() == [0, 0, 0, 1]


def test_the_divergence_to_come_lies_in_each_tokens_advantage() -> None:
    drift = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 99.0]])  # the last token is padding
    seen = rollouts([1, 0], [3, 2], drift=drift)
    found = advantages(learner("observe_r1", beta=0.1, sigma=None, bonus=0.0), seen)
    a = math.sqrt(0.5)
    expected = [[a + 0.7, a + 0.6, a + 0.4], [-a + 0.8, -a + 0.5, 0]]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


# Trust-GRPO ---------------------------------------------------------------------------------------------------------------------------


def rated(outcome: list[float], thought: list[float], **more: Any) -> Rollouts:
    return rollouts(outcome, extra={"thinking": torch.tensor(thought)}, **more)


def test_a_reward_model_that_prefers_the_thinking_of_wrong_answers_is_not_trusted() -> None:
    seen = rated([1, 1, 0, 0], [0.3, 0.4, 0.9, 0.8])
    assert trusted(seen, seen.extra["thinking"]).tolist() == pytest.approx([math.exp(-0.5)] * 4)
    assert learner("trust_grpo").shaped(seen).tolist() == pytest.approx(
        [r + math.exp(-0.5) * 0.3 * t for r, t in zip([1, 1, 0, 0], [0.3, 0.4, 0.9, 0.8], strict=True)]
    )
    assert learner("trust_grpo", trust=False).shaped(seen).tolist() == pytest.approx([1.09, 1.12, 0.27, 0.24])


def test_as_released_it_is_asked_about_good_answers_alone_and_always_trusted() -> None:
    released = learner("trust_grpo", trm_call="outcome>=0.2")
    seen = rated([1, 1, 0, 0], [0.3, 0.4, 0.9, 0.8])
    assert trusted(seen, released.rated(seen)).tolist() == [1.0] * 4
    assert released.shaped(seen).tolist() == pytest.approx([1.09, 1.12, 0, 0])
    assert released.shaped(rated([0.95, 1], [0.3, 0.4])).tolist() == pytest.approx([0.95, 1])  # nothing to tell apart
    graded = rated([0.9, 0.3, 0.1], [0.2, 0.6, 1.0])
    assert trusted(graded, released.rated(graded)).tolist() == pytest.approx([math.exp(0.2 - 0.3)] * 3)


@pytest.mark.parametrize(
    ("outcome", "thought", "gamma"),
    [
        ([1, 1], [0.1, 0.9], 1.0),
        ([0, 0], [0.1, 0.9], 1.0),
        ([1, 0], [0.5, 0.5], 1.0),
        ([1, 0], [0.9, 0.1], 1.0),
        ([1, 0], [0.0, 1.0], math.exp(-1)),
        ([1, 0, 0], [0.5, NAN, 0.75], math.exp(-0.25)),
        ([1, 0], [NAN, 0.75], 1.0),
        ([NAN, 0], [0.1, 0.75], 1.0),
    ],
)
def test_trust_lies_between_1_over_e_and_1_and_is_whole_where_nothing_speaks_against_it(
    outcome: list[float], thought: list[float], gamma: float
) -> None:
    seen = rated(outcome, thought)
    assert trusted(seen, seen.extra["thinking"]).tolist() == pytest.approx([gamma] * len(outcome))


def test_the_thinking_reward_fades_over_the_session_or_the_stream() -> None:
    where: Any = {"step": 10, "steps": 20, "stream_step": 50, "stream_steps": 200}
    for scope, factor in (("session", math.exp(-0.5)), ("stream", math.exp(-0.25)), ("none", 1.0)):
        seen = rated([1, 0], [1.0, 0.0], **where)
        assert learner("trust_grpo", anneal_scope=scope).shaped(seen).tolist() == pytest.approx([1 + 0.3 * factor, 0.0])


def test_without_weight_on_the_thinking_it_is_grpo() -> None:
    seen = rated([1, 0, 0, 1], [0.3, 0.4, 0.9, NAN])
    plain = learner("grpo")
    plain.spread = 1e-6
    assert torch.equal(advantages(learner("trust_grpo", alpha=0.0), seen), advantages(plain, seen))


def test_the_reward_model_sees_the_thinking_and_nothing_that_tells_what_is_right() -> None:
    told: list[Any] = []

    class Watch(Verifier):
        def __call__(self, answers: Any, rows: Any) -> Tensor:
            told.append((list(answers), sorted(rows)))
            return torch.tensor([0.5] * len(answers))

    answers = [
        "<think>two and two</think><answer>4</answer>",
        "4",
        "<think>a</think> b </think>",
        "</think><think>",
        "</think><think>c</think>",
    ]
    rows: dict[str, Column] = {"answer": ["4"] * 5, "rationale": ["2 + 2 = 4"] * 5, "question": ["2 + 2?"] * 5, "choices": [""] * 5}
    assert learner("trust_grpo", reward_model=Watch()).judge(answers, rows)["thinking"].tolist() == [0.5] * 5
    assert told == [(["<think>two and two</think>", "", "<think>a</think>", "", "<think>c</think>"], ["choices", "question"])]
    assert thinking("<think>no end") == ""


# T-GRPO -------------------------------------------------------------------------------------------------------------------------------


def shown(outcome: list[float], shuffled: float, lengths: list[int] | None = None) -> Rollouts:
    return rollouts(outcome, lengths, extra={"shuffled": torch.full((len(outcome),), shuffled)})


@pytest.mark.parametrize(
    ("outcome", "shuffled", "bonus"),
    [
        ([1, 1, 0, 0], 0.0, [1, 1, 0, 0]),
        ([1, 1, 0, 0], 0.625, [1, 1, 0, 0]),  # 0.5 is just 0.8 times as good
        ([1, 1, 0, 0], 0.63, [0, 0, 0, 0]),
        ([0, 0, 0, 0], 0.0, [0, 0, 0, 0]),
        ([0.1, 0.2, 0.9, 0.0], 0.3, [0, 1, 1, 0]),  # graded outcomes are averaged; 0.1 is not above 0.1
        ([1, 1, 1, 1], NAN, [0, 0, 0, 0]),  # no frames
        ([1, NAN, 0, NAN], 0.6, [1, 0, 0, 0]),  # p is over what was judged
    ],
)
def test_good_answers_earn_more_where_the_order_was_of_use(outcome: list[float], shuffled: float, bonus: list[float]) -> None:
    assert temporal(shown(outcome, shuffled), 0.8).tolist() == bonus


def test_several_good_answers_of_a_fair_length_earn_more() -> None:
    of = learner("t_grpo", bonus=0.0)
    lengths = [320, 512, 319, 513, 400]
    assert of.shaped(shown([1, 0.5, 1, 1, 0], NAN, lengths)).tolist() == pytest.approx([1.2, 0.7, 1, 1, 0])
    assert of.shaped(shown([1, 0, 0.1, 0, 0], NAN, lengths)).tolist() == pytest.approx([1, 0, 0.1, 0, 0])  # there is only one


def test_without_its_bonuses_it_is_grpo() -> None:
    seen = shown([1, 0, 0, 1], 0.1, [400] * 4)
    assert torch.equal(advantages(learner("t_grpo", bonus=0.0, length_bonus=0.0), seen), advantages(learner("grpo"), seen))


def test_it_is_strictly_on_policy() -> None:
    assert find("learner", "t_grpo").options["updates"].type.values == (1,)


# All of them --------------------------------------------------------------------------------------------------------------------------


def test_what_each_rewards_where_nothing_is_named() -> None:
    forms = {
        "grpo": [],
        "rloo": [],
        "trust_grpo": [],
        "apo": [("Format", 0.5)],
        "observe_r1": [("Format", 0.5)],
        "t_grpo": [("Format", 1.0)],
    }
    for name, form in forms.items():
        assert [(type(reward).__name__, reward.weight) for reward in learner(name).usual()] == [("Own", 1.0), *form]
    observed = learner("observe_r1").usual()[1]
    assert observed(["<observe>a</observe><think>b</think><answer>c</answer>", "<think>b</think><answer>c</answer>"], {}).tolist() == [1, 0]
