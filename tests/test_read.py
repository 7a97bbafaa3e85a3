"""READ: its loss by hand, and that q, k and v of the attention between modalities are all that it changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from streamcl.strategies.test_time.read import Read
from test_joint_transformer import around, assert_exact, changed, deployed, served, weights
from torch import Tensor, nn

from streamcl.adapting import entropy
from streamcl.errors import ConfigError
from streamcl.nn.backbones.mlp import Mlp
from streamcl.nn.model import Model
from streamcl.stream import Modality, StreamInfo

LR = {"name": "adam", "lr": 1e-2}


def loss(logits: Tensor, **options: Any) -> Tensor:
    value = Read(**options).loss(served(), logits)
    assert value is not None
    return value


def test_with_gamma_1_over_e_it_is_minus_p_log_p_less_the_balance_of_the_sum() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(dim=1)
    most = p.max(dim=1).values
    confident = -(most * most.log()).mean()
    torch.testing.assert_close(loss(logits, balance=0), confident, rtol=0, atol=1e-15)
    torch.testing.assert_close(loss(logits, balance=0, gamma=1.0), (most * (1 - most.log())).mean())
    q = p.sum(dim=0).softmax(dim=0)
    torch.testing.assert_close(loss(logits, balance=0.3), confident + 0.3 * (q * q.log()).sum())


@pytest.mark.parametrize(("most", "sign"), [(0.30, 1.0), (0.45, -1.0)])
def test_a_step_raises_a_probability_above_1_over_e_and_lowers_one_below(most: float, sign: float) -> None:
    p = torch.tensor([[most, *[(1 - most) / 4] * 4]])
    logits = p.log().requires_grad_()
    loss(logits, balance=0).backward()
    assert math.copysign(1, float(logits.grad[0, 0])) == sign  # type: ignore[index]


def test_balance_alone_makes_the_predicted_classes_more_even_and_says_little_of_one_sample() -> None:
    one = torch.tensor([[4.0, 0.0, 0.0]])
    many = one.expand(64, 3)

    def uneven(logits: Tensor) -> float:
        return math.log(3) + float(loss(logits, balance=1.0) - loss(logits, balance=0))

    assert uneven(many) > 1.0 > 0.2 > uneven(one)


def test_only_q_k_and_v_of_the_joint_attention_change() -> None:
    strategy = deployed(Read(optimizer=LR), joint=2)
    before = weights(strategy)
    strategy.adapt(served())
    expected = {f"backbone.joint_blocks.{block}.attention.qkv.{which}" for block in (0, 1) for which in ("weight", "bias")}
    assert changed(strategy, before) == expected == set(strategy.adapted)
    assert strategy.counts == {"updates": 1}


def test_the_answer_is_that_of_the_second_pass() -> None:
    after, before = deployed(Read(optimizer=LR)), deployed(Read(optimizer=LR, answer="before"))
    frozen = before.predict(served()).scores
    first = after.adapt(served())
    assert torch.equal(before.adapt(served()).scores, frozen) and not torch.equal(first.scores, frozen)
    assert torch.equal(first.scores, after.predict(served()).scores) and first.made == "after"


def test_a_few_steps_on_one_batch_lower_the_loss() -> None:
    strategy = deployed(Read(optimizer=LR))

    def now() -> float:
        return float(strategy.loss(served(), strategy.predict(served()).scores))

    begun = now()
    for _ in range(10):
        strategy.adapt(served())
    assert now() < begun - 0.01


@pytest.mark.parametrize(("given", "learned"), [(served(size=1), 0), (served(size=2), 1)])
def test_nothing_is_learned_from_one_sample(given: Any, learned: int) -> None:
    strategy = deployed(Read(optimizer=LR))
    before, frozen = weights(strategy), strategy.predict(given).scores
    answer = strategy.adapt(given).scores
    assert strategy.counts == ({"updates": 1} if learned else {"skipped": 1})
    assert bool(changed(strategy, before)) == learned and torch.equal(answer, frozen) != learned


def test_nothing_is_learned_where_a_modality_is_absent_for_every_sample() -> None:
    strategy = deployed(Read(optimizer=LR))
    before = weights(strategy)
    given = served(present={"sound": [0] * 6, "image": [1, 0, 1, 1, 1, 1]})
    frozen = strategy.predict(given).scores
    assert torch.equal(strategy.adapt(given).scores, frozen) and not changed(strategy, before) and strategy.counts == {"skipped": 1}
    strategy.adapt(served(present={"sound": [0, 0, 0, 1, 0, 0], "image": [1, 0, 1, 1, 1, 1]}))
    assert changed(strategy, before) and strategy.counts == {"skipped": 1, "updates": 1}


def test_going_back_is_exact() -> None:
    assert_exact(lambda: deployed(Read(optimizer=LR)), [served(seed, present={"image": [1, 1, 0, 1, 1, 0]}) for seed in range(3)])


def test_attention_of_other_models_is_named() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.MultiheadAttention(4, 2) for _ in range(2))
            self.last = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "out")})

    strategy = Read(attention=["layers.*", "last"])
    strategy.model = Other()
    with pytest.raises(ConfigError, match=r"layers\.0\.out_proj is no attention that it knows"):
        strategy.parameters()
    strategy.attention = ["layers.?", "last"]
    assert set(strategy.parameters()) == {
        *(f"layers.{number}.in_proj_{which}" for number in (0, 1) for which in ("weight", "bias")),
        *(f"last.{which}_proj.{kind}" for which in "qkv" for kind in ("weight", "bias")),
    }
    strategy.model = nn.ModuleDict({"module": strategy.model})
    assert len(strategy.parameters()) == 10, "what stands around the network has no say in the names"
    strategy.attention = ["blocks"]
    with pytest.raises(ConfigError, match=r"names 'blocks', which is no part of this model: it has module\.layers\.0, "):
        strategy.parameters()


def test_it_stands_around_any_network_whose_attention_is_named() -> None:
    strategy, given = around(Read(optimizer=LR, attention=["layers.0.self_attn"]))
    before = weights(strategy)
    strategy.adapt(given)
    assert changed(strategy, before) == {f"module.layers.0.self_attn.in_proj_{which}" for which in ("weight", "bias")}


def test_a_model_that_does_not_say_what_joins_its_modalities_is_refused() -> None:
    backbone = Mlp()
    backbone.build(StreamInfo({"image": Modality("image", (1, 2, 2))}))
    strategy = Read()
    strategy.model = Model(backbone)
    with pytest.raises(ConfigError, match=r"name its attention modules in strategy\.attention"):
        strategy.parameters()


def test_it_agrees_with_the_entropy_that_it_replaces_where_one_class_has_everything() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0]])
    torch.testing.assert_close(loss(logits, balance=0), entropy(logits).mean(), atol=1e-12, rtol=0)
