"""BN-adapt: what each weight of the batch amounts to, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tent import batch, convolutions, goes_back_exactly, pictures, started
from torch import Tensor, nn

from streamcl.errors import ConfigError, DataError
from streamcl.nn.norms import Gathered, batch_norms, moments
from streamcl.stream import Batch


def source(module: nn.Module, served: Batch | None = None) -> Tensor:
    with torch.no_grad():
        return module.eval()((served or batch()).inputs["input"])


def by_batch(module: nn.Module, seed: int = 0) -> Tensor:
    """As torch itself does it in training mode."""
    with torch.no_grad():
        return module.train()(batch(seed=seed).inputs["input"])


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"prior": 1e12}, {"momentum": 0.0}])
def test_without_weight_for_the_batch_it_is_the_source(options: dict[str, float]) -> None:
    method = started("bn_adapt", convolutions(), **options)
    torch.testing.assert_close(method.adapt(batch()).scores, source(convolutions()), rtol=1e-5, atol=1e-6)
    assert method.adapted == {} and method.optimizer is None


@pytest.mark.parametrize("options", [{}, {"weight": 1.0}, {"prior": 0.0}])
def test_with_all_the_weight_it_is_training_mode_and_writes_nothing(options: dict[str, float]) -> None:
    module = convolutions()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    method = started("bn_adapt", module, **options)
    for seed in range(3):
        expected = by_batch(convolutions(), seed)
        torch.testing.assert_close(method.adapt(batch(seed=seed)).scores, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(method.predict(batch(seed=seed)).scores, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(("options", "share"), [({"weight": 0.3}, 0.3), ({"prior": 16.0}, 4 / 20)])
def test_in_between_mean_and_biased_variance_are_mixed(options: dict[str, float], share: float) -> None:
    """Worked out for one layer: m_s = 1, v_s = 4; the batch 0 2 4 6 has the mean 3 and the biased variance 5."""
    module = nn.BatchNorm1d(1, eps=1e-12).eval()
    with torch.no_grad():
        module.weight.fill_(2.0), module.bias.fill_(0.5)
    module.running_mean, module.running_var = torch.tensor([1.0]), torch.tensor([4.0])
    values = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
    mean, variance = (1 - share) * 1 + share * 3, (1 - share) * 4 + share * 5
    answer = started("bn_adapt", module, **options).adapt(batch(values)).scores
    torch.testing.assert_close(answer, 2 * (values - mean) / variance**0.5 + 0.5)


def test_one_sample_can_be_mixed_and_a_modest_weight_is_what_it_needs() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))
    assert started("bn_adapt", module, prior=16.0).adapt(batch(size=1)).scores.isfinite().all()


def test_the_running_mean_is_that_of_torchs_own_layers() -> None:
    method, by_hand = started("bn_adapt", convolutions(), momentum=0.1), convolutions()
    for seed in range(4):
        values = batch(seed=seed).inputs["input"]
        with torch.no_grad():
            by_hand.train()(values)  # takes the batch in; torch's momentum is 0.1 too
            expected = by_hand.eval()(values)
        assert torch.equal(method.adapt(batch(seed=seed)).scores, expected)
    asked = method.predict(batch(seed=9)).scores
    assert torch.equal(method.predict(batch(seed=9)).scores, asked), "asking takes nothing in"
    for name, value in method.weights().items():
        assert torch.equal(value, by_hand.state_dict()[name.removeprefix("module.")])


@pytest.mark.parametrize("options", [{}, {"weight": 0.3}, {"prior": 16.0}, {"momentum": 0.1}])
def test_going_back_is_exact(options: dict[str, float]) -> None:
    goes_back_exactly("bn_adapt", **options)


@pytest.mark.parametrize("options", [{}, {"weight": 0.3}])
def test_statistics_are_gathered_of_what_the_layers_normalised_by(options: dict[str, float]) -> None:
    """For shadow mode: a model that answers by them, for each sample alone, is close to what the batches were answered by."""
    method = started("bn_adapt", convolutions(), **options)
    method.gathered = Gathered(method.layers)
    for seed in range(60):
        method.adapt(batch(seed=seed, size=64))
    served, last = convolutions(), batch(seed=59, size=64)
    answered = method.predict(last).scores
    unlike = (source(served, last) - answered).abs().mean()
    served.load_state_dict({name.removeprefix("module."): value for name, value in method.weights().items()}, strict=False)
    assert (source(served, last) - answered).abs().mean() < 0.35 * unlike
    assert method.counts == {"updates": 60}


def test_it_brings_back_what_a_shift_took_and_loses_it_where_a_batch_holds_one_class() -> None:
    values, labels = pictures(3, 320)
    by_class = labels.argsort()

    def accuracy(method: Any, order: Tensor) -> float:
        right = [method.adapt(batch(values[rows])).scores.argmax(dim=1) == labels[rows] for rows in order.split(32)]
        return torch.cat(right).double().mean().item()

    shuffled = accuracy(started("bn_adapt", convolutions()), torch.arange(320))
    assert shuffled > accuracy(started("bn_adapt", convolutions(), weight=0.0), torch.arange(320)) + 0.03
    assert shuffled > accuracy(started("bn_adapt", convolutions()), by_class) + 0.03


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("form", [(6, 3, 5, 7), (50, 3, 2, 2), (1, 3, 4, 4), (200, 3, 1, 1), (200, 3), (20, 3, 9), (3, 3, 2, 3, 4)])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1e4])
def test_mean_and_variance_are_right_where_sums_of_squares_would_cancel(offset: float, form: tuple[int, ...], last: bool) -> None:
    away = torch.tensor([offset, -offset, 0.0]).view(1, 3, *[1] * (len(form) - 2))
    values = torch.randn(form, generator=torch.Generator().manual_seed(0)) + away
    values = values.movedim(1, -1).contiguous().movedim(-1, 1) if last else values
    mean, variance = moments(values)
    exact = values.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), exact.var(dim=1, correction=0), rtol=2e-4, atol=1e-6)


def test_a_model_that_keeps_no_statistics_is_refused() -> None:
    with pytest.raises(ConfigError, match="looked for BatchNorm layers with running statistics, and this model has none"):
        started("bn_adapt", convolutions("group"))
    with pytest.raises(ConfigError, match="weight and prior are different ways"):
        started("bn_adapt", convolutions(), weight=0.5, prior=16.0)


def test_the_layers_are_as_they_were_when_a_batch_fails() -> None:
    module = convolutions()
    method = started("bn_adapt", module, weight=0.5)
    with pytest.raises(DataError):
        method.adapt(batch(torch.zeros(2, 4, 8, 8)))
    assert all(layer.running_mean is not None and not layer._forward_pre_hooks for layer in batch_norms(module).values())
    assert torch.equal(source(module), source(convolutions()))
