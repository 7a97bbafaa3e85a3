"""ASL: by hand and in closed form, and what a strategy that carries it is trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LABEL_SETS, small_run
from test_strategies import engine, learn, make, prepared
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from streamcl import running
from streamcl.config import from_mapping
from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError

GRID = torch.linspace(-6, 6, 121, dtype=torch.float64)


def scenes(strategy: Any, exemplars: int = 60, **scenario: Any) -> Engine:
    """The strategy on small pictures of one digit or two."""
    data = {name: value for name, value in LABEL_SETS["scenario"]["data"].items() if name != "name"}
    stream = make("scenario", "multi_label", data=make("source", "digit_scenes", **data), **{"increment": 2, **scenario})
    return Engine(stream, strategy, make("backbone", "convnet", width=8, blocks=2), make("memory", "faiss", exemplars=exemplars))


def slopes(target: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss of one label at every logit of the grid, and its slope."""
    term = make("term", "asl", **options)
    logits = GRID.float()[:, None].clone().requires_grad_()
    losses = torch.stack([term.criterion(logit[None], torch.tensor([[target]])) for logit in logits])
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    return losses.detach().double(), slope[:, 0].double()


def test_without_gammas_and_margin_it_is_binary_cross_entropy_summed() -> None:
    term = make("term", "asl", gamma_negative=0, gamma_positive=0, margin=0)
    random = torch.Generator().manual_seed(0)
    logits, target = 3 * torch.randn(20, 7, generator=random), torch.randint(2, (20, 7), generator=random)
    expected = binary_cross_entropy_with_logits(logits, target.float(), reduction="sum")
    torch.testing.assert_close(term.criterion(logits, target), expected, rtol=1e-5, atol=1e-5)


def test_the_loss_of_one_label_by_hand() -> None:
    term = make("term", "asl", gamma_negative=2, gamma_positive=1, margin=0.1)
    logits = torch.tensor([[0.5, 0.5]])
    p = float(torch.tensor(0.5).sigmoid())
    by_hand = -(1 - p) * torch.tensor(p).log() - (p - 0.1) ** 2 * torch.tensor(1 - (p - 0.1)).log()
    assert term.criterion(logits, torch.tensor([[1, 0]])).item() == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.parametrize("through_weight", [False, True])
def test_a_negative_below_the_margin_has_neither_loss_nor_gradient(through_weight: bool) -> None:
    for gamma in (0.5, 1, 4):
        loss, slope = slopes(0, gamma_negative=gamma, margin=0.3, through_weight=through_weight)
        below = GRID.sigmoid() < 0.3
        assert below.sum() > 40 and not loss[below].any() and not slope[below].any() and bool((slope[~below] > 0).all())


def test_the_slope_of_a_negative_in_closed_form() -> None:
    gamma, margin = 4, 0.05
    p = GRID.sigmoid()
    shifted = (p - margin).clamp(min=0)
    detached = shifted**gamma * p * (1 - p) / (1 - shifted)
    through = p * (1 - p) * (shifted**gamma / (1 - shifted) - gamma * shifted ** (gamma - 1) * (1 - shifted).log())
    torch.testing.assert_close(slopes(0, gamma_negative=gamma, margin=margin)[1], detached, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(slopes(0, gamma_negative=gamma, margin=margin, through_weight=True)[1], through, rtol=1e-4, atol=1e-7)


def test_the_slope_of_a_positive_is_that_of_cross_entropy_times_its_weight() -> None:
    p = GRID.sigmoid()
    torch.testing.assert_close(slopes(1)[1], p - 1, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slopes(1, gamma_positive=1)[1], -((1 - p) ** 2), rtol=1e-4, atol=1e-6)


def test_what_is_not_annotated_has_no_part_in_it() -> None:
    term = make("term", "asl")
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 5, generator=random, requires_grad=True)
    target = torch.randint(-1, 2, (9, 3), generator=random, dtype=torch.int8)  # of two classes that came later there is no column
    loss = term.criterion(logits, target)
    loss.backward()
    one_by_one = sum(term.criterion(logits[i, j].view(1, 1), target[i, j].view(1, 1)) for i in range(9) for j in range(3))
    torch.testing.assert_close(loss, one_by_one)
    silent = torch.cat([target < 0, torch.ones(9, 2, dtype=torch.bool)], dim=1)
    assert bool((target < 0).any()) and not logits.grad[silent].any()
    assert term.criterion(logits, torch.full_like(target, -1)).item() == 0


def test_half_precision_stays_finite() -> None:
    logits = torch.tensor([[60.0, -60.0, 60.0, -60.0]], dtype=torch.float16, requires_grad=True)
    for options in ({}, {"gamma_positive": 0.5, "gamma_negative": 0.5, "margin": 0, "through_weight": True}):
        loss = make("term", "asl", **options).criterion(logits, torch.tensor([[0, 1, 1, 0]]))
        loss.backward()
        assert bool(loss.isfinite()) and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("name", ["finetune", "ml_finetune", "ml_masked", "ml_joint", "krt"])
def test_any_strategy_for_sets_of_labels_is_trained_by_it(name: str) -> None:
    term = make("term", "asl", margin=0.1)
    options = {"dim": 16, "heads": 2} if name == "krt" else {}
    run = scenes(make("strategy", name, epochs=1, batch=64, optimizer={"name": "adam", "lr": 1e-3}, with_=(term,), **options))
    learn(run, 1)
    assert run.strategy.criterion == term.criterion
    run.model.eval()
    batch = prepared(run, whole(run.tasks[0].train))
    torch.testing.assert_close(run.strategy.loss(batch), term.criterion(run.model(batch), batch.target))


def test_named_as_the_strategy_it_is_fine_tuning_with_the_settings_of_its_script(tmp_path: Path) -> None:
    options = from_mapping(small_run("asl", strategy={"name": "asl", "epochs": 3})).strategy.options
    assert options["epochs"] == 3 and options["batch"] == 128 and options["optimizer"].lr == 1e-4
    assert options["with"][0].to_dict()["gamma_negative"] == 4.0
    assert running.run(small_run("asl", log=[]), out=tmp_path / "run")["metric"] == "map"


def test_a_stream_of_single_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"asl weighs the labels of samples that may carry several.*leave it out"):
        engine(make("strategy", "finetune", epochs=1, with_=(make("term", "asl"),)))
    with pytest.raises(ConfigError, match="margin is 1"):
        make("term", "asl", margin=1.0)
