"""LAME: its fixed point against one solved by hand, the cases in which it must change nothing, and that it keeps nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from streamcl.strategies.test_time.lame import STEPS, Lame, assigned
from torch import Tensor, nn

from streamcl.adapting import AdaptingStrategy
from streamcl.context import Context
from streamcl.nn.backbone import Backbone
from streamcl.nn.backbones.convnet import Convnet
from streamcl.nn.model import Model
from streamcl.preparing import Preparation
from streamcl.seeding import generator
from streamcl.stream import Batch, Modality, StreamInfo

CLASSES = 4
INFO = StreamInfo({"image": Modality("image", (3, 16, 16), 255)}, classes=CLASSES, test_time=True)


def deployed(strategy: AdaptingStrategy, model: nn.Module | None = None, info: StreamInfo = INFO, seed: int = 0) -> Any:
    """The strategy around a small model, ready to serve."""
    torch.set_num_threads(1)
    model = small_model(info) if model is None else model
    preparation = Preparation(info, {"test": []})
    context = cast(
        Context,
        SimpleNamespace(
            model=model,
            memory=None,
            device=torch.device("cpu"),
            precision="float32",
            preparation=preparation,
            seed=seed,
            generator=generator(seed, "context"),
        ),
    )
    strategy.start(info, context)
    return strategy


def small_model(info: StreamInfo = INFO, backbone: Backbone | None = None, norm: str = "batch") -> Model:
    """A network whose running statistics and affine weights are none that any layer begins with."""
    torch.manual_seed(0)
    backbone = Convnet(width=8, blocks=2, norm=cast(Any, norm)) if backbone is None else backbone
    backbone.build(info)
    model = Model(backbone)
    model.grow(info.classes or CLASSES)
    model.train()
    with torch.no_grad():
        for number in range(3):
            model(served(32, seed=100 + number, info=info))
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
        model.head.weight.mul_(5)
    return model.eval()


def served(size: int, seed: int = 0, info: StreamInfo = INFO, present: Mapping[str, Tensor] | None = None) -> Batch:
    """Prepared samples without labels: pixels from 0 to 1, a level of grey each with some noise on it."""
    drawn = torch.Generator().manual_seed(seed)
    inputs = {
        name: (torch.rand(size, 1, *[1] * (len(m.shape) - 1), generator=drawn) * 0.7 + torch.rand(size, *m.shape, generator=drawn) * 0.3)
        for name, m in info.modalities.items()
    }
    return Batch(dict(inputs), None, torch.arange(size) + 1000 * seed, present=None if present is None else dict(present))


def answers(strategy: AdaptingStrategy, batches: list[Batch]) -> list[Tensor]:
    given = [strategy.adapt(batch).scores for batch in batches]
    assert all(scores is not None and not scores.requires_grad for scores in given)
    return cast(list[Tensor], given)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def goes_back_exactly(make: Any, batches: list[Batch], **around: Any) -> None:
    """Reset, snapshot and rewind, and a state in a fresh start: to the bit, and the model is the source's again after a reset."""
    strategy = deployed(make(), **around)
    clean = {name: value.clone() for name, value in strategy.model.state_dict().items()}
    half = len(batches) // 2
    first = answers(strategy, batches[:half])
    kept, state = strategy.snapshot(), strategy.state()
    state = {**state, "source": {name: value.clone() for name, value in state["source"].items()}}
    second = answers(strategy, batches[half:])
    strategy.rewind(kept)
    assert same(second, answers(strategy, batches[half:])), "rewound"
    strategy.rewind(kept)
    assert same(second, answers(strategy, batches[half:])), "a snapshot can be used twice"
    strategy.reset()
    assert all(torch.equal(clean[name], value) for name, value in strategy.model.state_dict().items()), "reset"
    assert same([*first, *second], answers(strategy, batches)), "reset"
    other = deployed(make(), **{**around, **({"model": small_model(around.get("info", INFO))} if "model" not in around else {})})
    other.restore(state)
    assert same(second, answers(other, batches[half:])), "restored"


def learns_nothing_from_predicting(strategy: AdaptingStrategy, batches: list[Batch]) -> None:
    before = strategy.snapshot()
    first = strategy.predict(batches[0]).scores
    assert first is not None and torch.equal(first, cast(Tensor, strategy.predict(batches[0]).scores))
    after = strategy.snapshot()
    assert torch.equal(before["random"], after["random"])
    assert all(torch.equal(value, after["adapted"][name]) for name, value in before["adapted"].items())


# -- LAME ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affinity", ["rbf", "knn", "linear"])
def test_without_a_pull_the_answer_is_the_networks(affinity: str) -> None:
    lame = deployed(Lame(affinity=cast(Any, affinity), lam=0.0))
    batch = served(16)
    assert torch.allclose(answers(lame, [batch])[0].softmax(1), lame.model(batch).softmax(1), atol=1e-7)
    logits = torch.randn(6, 3)
    assert torch.allclose(assigned(logits, torch.zeros(6, 6), 1.0).exp(), logits.softmax(1), atol=1e-7)


def test_a_batch_of_one_is_answered_by_the_network() -> None:
    lame = deployed(Lame())
    assert torch.equal(answers(lame, [served(1)])[0], lame.model(served(1)))


def test_the_fixed_point_of_two_twins_is_the_one_solved_by_hand() -> None:
    """Two samples with the same answer that pull each other: by symmetry u = z + lam (y1 - y0) where u is the logit of y, one equation."""
    z, lam = 0.4, 1.0
    u = z
    for _ in range(10_000):
        u = z + lam * math.tanh(u / 2)
    logits = torch.tensor([[z, 0.0], [z, 0.0]])
    y = assigned(logits, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), lam).exp()
    assert y[0, 0] == pytest.approx(1 / (1 + math.exp(-u)), abs=1e-5) and y[0, 0] > logits.softmax(1)[0, 0]
    assert torch.allclose(y.sum(1), torch.ones(2))


def test_it_is_the_literal_iteration_and_the_scores_are_log_probabilities() -> None:
    torch.manual_seed(0)
    logits, features = torch.randn(20, 5), torch.randn(20, 7)
    lame = Lame(affinity="knn", k=3)
    unit = features / features.norm(dim=1, keepdim=True)
    w = torch.zeros(20, 20)
    for i in range(20):
        by_distance = sorted((float((unit[i] - unit[j]).norm()), j) for j in range(20) if j != i)
        for _, j in by_distance[:3]:
            w[i, j] = 1.0
    assert torch.equal(lame.alike(features), w)
    unary = -(logits.softmax(1) + 1e-10).log()
    y = (-unary).softmax(1)
    for _ in range(STEPS):
        y = (-unary + w @ y).softmax(1)
    scores = assigned(logits, w, 1.0)
    assert torch.allclose(scores.softmax(1), y, atol=1e-5) and torch.allclose(scores.exp(), y, atol=1e-5)


def test_the_energy_never_rises_with_a_symmetric_positive_kernel() -> None:
    torch.manual_seed(1)
    logits, w = torch.randn(12, 4), Lame().alike(torch.randn(12, 3))
    assert torch.allclose(w.diagonal(), torch.ones(12)) and torch.allclose(w, w.mT)
    log_q = logits.log_softmax(1)
    y, energies = log_q.exp(), []
    for _ in range(30):
        energies.append(float((y * (y.log() - log_q - w @ y / 2)).sum()))
        y = (log_q + w @ y).softmax(1)
    assert all(after <= before + 1e-5 for before, after in pairwise(energies))
    assert torch.allclose(assigned(logits, w, 1.0).exp(), y, atol=1e-4)


def test_samples_that_are_equal_do_not_divide_by_zero() -> None:
    lame = deployed(Lame())
    batch = served(1)
    twice = batch[torch.tensor([0, 0, 0])]
    assert answers(lame, [twice])[0].isfinite().all()


def test_neighbours_in_feature_space_overrule_one_that_stands_alone() -> None:
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 0.6]])
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, -0.01], [1.0, 0.02]])
    assert assigned(logits, Lame(affinity="knn", k=2).alike(features), 1.0).argmax(1).tolist() == [0, 0, 0, 0]


def test_lame_changes_and_keeps_nothing() -> None:
    lame = deployed(Lame())
    before = {name: value.clone() for name, value in lame.model.state_dict().items()}
    first, second = answers(lame, [served(8), served(8)])
    assert torch.equal(first, second) and lame.optimizer is None and not lame.own_state()
    assert all(torch.equal(value, before[name]) for name, value in lame.model.state_dict().items())
    assert torch.equal(first, lame.predict(served(8)).scores)
    goes_back_exactly(Lame, [served(8, seed=s) for s in range(4)])
