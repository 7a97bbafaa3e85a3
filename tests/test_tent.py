"""Tent, and what every method around a deployed model is tested with: small models, batches, and what going back has to keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from test_strategies import make
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamcl.adapting import AdaptingStrategy, entropy
from streamcl.context import Context
from streamcl.deployed import Deployed
from streamcl.errors import ConfigError, DataError
from streamcl.events import Event, Events, Sink
from streamcl.preparing import Preparation
from streamcl.stream import Batch, Modality, StreamInfo


class Heard(Sink):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)


def started(name: str, module: nn.Module, kinds: dict[str, Modality] | None = None, **options: Any) -> Any:
    """A method around a deployed module; its warnings are in `heard`."""
    strategy = make("strategy", name, **options)
    model, heard = Deployed(module), Heard()
    model.form.asked = "tensor" if not kinds or len(kinds) == 1 else "mapping"
    info = StreamInfo(kinds or {"input": Modality("image", (3, 8, 8))}, test_time=True)
    context = Context(model, None, Events([heard]), Preparation(info, {}), seed=3)  # type: ignore[arg-type]
    strategy.start(info, context)
    strategy.heard = heard
    return strategy


def pictures(seed: int = 0, size: int = 12, shifted: bool = True) -> tuple[Tensor, Tensor]:
    """Noisy pictures of five kinds, with another gain and offset in each channel where they are shifted; and which kind they are."""
    drawn = torch.Generator().manual_seed(seed + 1)
    kinds = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (size,), generator=drawn)
    values = kinds[labels] + 2 * torch.randn(size, 3, 8, 8, generator=drawn)
    if shifted:
        values = (values + 2 * torch.randn(size, 3, 8, 8, generator=drawn)) * torch.tensor([0.2, 2.0, 0.5])[:, None, None] + 1
    return values, labels


def batch(values: Tensor | None = None, seed: int = 0, size: int = 12) -> Batch:
    """Shifted pictures, unless values are given."""
    values = pictures(seed, size)[0] if values is None else values
    return Batch({"input": values}, None, torch.arange(len(values)))


def convolutions(norm: str = "batch") -> nn.Sequential:
    """Four blocks and a classifier, trained on pictures that are not shifted."""
    module = _blocks(norm)
    module.load_state_dict(_trained(norm))
    return module.eval()


def _blocks(norm: str) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = []
    for before, after in ((3, 8), (8, 8), (8, 8), (8, 8)):
        layer = nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(2, after)
        blocks.append(nn.Sequential(nn.Conv2d(before, after, 3, padding=1), layer, nn.ReLU()))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))


@lru_cache
def _trained(norm: str) -> dict[str, Tensor]:
    module = _blocks(norm)
    adam = torch.optim.Adam(module.parameters(), lr=1e-2)
    for seed in range(150):
        values, labels = pictures(seed + 100, 32, shifted=False)
        cross_entropy(module(values), labels).backward()
        adam.step(), adam.zero_grad()
    return module.state_dict()


def goes_back_exactly(name: str, build: Callable[[], nn.Module] = convolutions, **options: Any) -> AdaptingStrategy:
    """Snapshot and rewind, reset, and a saved state in a fresh start: the answers are the same to the bit."""
    stream = [batch(seed=seed) for seed in range(6)]
    strategy = started(name, build(), **options)
    fresh = [strategy.adapt(one).scores for one in stream[:3]]
    taken, saved = strategy.snapshot(), strategy.state()
    saved = {**saved, "now": strategy.snapshot()}
    later = [strategy.adapt(one).scores for one in stream[3:]]
    asked = strategy.predict(stream[0]).scores
    for _ in range(2):
        strategy.rewind(taken)
        assert all(torch.equal(strategy.adapt(one).scores, answer) for one, answer in zip(stream[3:], later, strict=True))
        assert torch.equal(strategy.predict(stream[0]).scores, asked)
    strategy.reset()
    assert all(torch.equal(strategy.adapt(one).scores, answer) for one, answer in zip(stream[:3], fresh, strict=True))
    other = started(name, build(), **options)
    other.adapt(stream[5])
    other.restore(saved)
    assert all(torch.equal(other.adapt(one).scores, answer) for one, answer in zip(stream[3:], later, strict=True))
    other.reset()
    assert torch.equal(other.adapt(stream[0]).scores, fresh[0])
    return strategy


def untouched(module: nn.Module, adapted: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """What of a module no method may change."""
    return {name: value.clone() for name, value in module.state_dict().items() if f"module.{name}" not in adapted}


def test_one_step_on_two_classes_is_the_one_worked_out_by_hand() -> None:
    """x normalises to -1 and +1; logits are (z, 0) with z = 2 (w x + b). dH/dz = -p (1 - p) z, as the specification says."""
    module = nn.Sequential(nn.BatchNorm1d(1, eps=1e-12), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[2.0], [0.0]]))
        module[0].weight.fill_(1.0), module[0].bias.fill_(0.5)
    tent = started("tent", module, optimizer={"name": "sgd", "lr": 0.1})
    answer = tent.adapt(batch(torch.tensor([[3.0], [7.0]])))
    z = [2 * (-1 + 0.5), 2 * (1 + 0.5)]
    assert torch.allclose(answer.scores, torch.tensor([[z[0], 0.0], [z[1], 0.0]])) and answer.made == "before"
    slope = [-(p := 1 / (1 + math.exp(-value))) * (1 - p) * value for value in z]
    by_weight, by_bias = (slope[0] * 2 * -1 + slope[1] * 2 * 1) / 2, (slope[0] * 2 + slope[1] * 2) / 2
    assert module[0].weight.item() == pytest.approx(1 - 0.1 * by_weight, abs=1e-6)
    assert module[0].bias.item() == pytest.approx(0.5 - 0.1 * by_bias, abs=1e-6)
    assert module[0].running_mean.item() == 0 and module[0].running_var.item() == 1, "the source's statistics are not written to"


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_step_is_that_of_torch_and_nothing_else_of_the_model_changes(norm: str) -> None:
    module, by_hand = convolutions(norm), convolutions(norm)
    tent = started("tent", module)
    kept = untouched(module, tent.adapted)
    for layer in by_hand.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    by_hand.eval().requires_grad_(False)
    weights = [value for layer in by_hand.modules() if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm) for value in layer.parameters()]
    for value in weights:
        value.requires_grad_(True)
    adam = torch.optim.Adam(weights, lr=1e-3)
    for seed in range(3):
        logits = by_hand(batch(seed=seed).inputs["input"])
        entropy(logits).mean().backward()
        adam.step(), adam.zero_grad()
        torch.testing.assert_close(tent.adapt(batch(seed=seed)).scores, logits.detach(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(tent.adapted.values(), weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert tent.counts == {"updates": 3} and all(torch.equal(module.state_dict()[name], value) for name, value in kept.items())


def test_going_back_is_exact() -> None:
    goes_back_exactly("tent")
    goes_back_exactly("tent", lambda: convolutions("group"), answer="after")


def test_answering_after_the_update_lowers_the_entropy() -> None:
    before, after = (started("tent", convolutions(), answer=answer).adapt(batch()).scores for answer in ("before", "after"))
    assert entropy(after).mean() < entropy(before).mean()


def test_at_a_hundred_times_its_rate_it_collapses() -> None:
    """What it has no protection against, over several passes of a shifted stream."""

    def accuracy(rate: float) -> float:
        tent, right = started("tent", convolutions(), optimizer={"name": "adam", "lr": rate}), 0
        for step in range(60):
            values, labels = pictures(step % 10, 32)
            found = tent.adapt(batch(values)).scores.argmax(dim=1) == labels
            right += int(found.sum()) if step >= 50 else 0
        return right / 320

    assert accuracy(1e-3) > accuracy(1e-1) + 0.3


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    tent = started("tent", convolutions())
    values = batch().inputs["input"].clone()
    values[0] = math.nan
    tent.adapt(batch(values))
    assert tent.counts == {"not_finite": 1}
    assert all(torch.equal(tent.adapted[name], value) for name, value in tent.source.items())


def test_one_sample_where_a_layer_has_one_value_per_channel_is_refused_in_words() -> None:
    with pytest.raises(DataError, match=r"more than one value per channel.*serve more samples at once"):
        started("tent", nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))).adapt(batch(size=1))


def test_a_model_without_normalisation_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="looked for BatchNorm, LayerNorm, GroupNorm"):
        started("tent", nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
