"""SAR: the two gradients of a step, the way back when it collapses, and the layers that it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_tent import batch, convolutions, goes_back_exactly, pictures, started
from torch import nn

from streamcl.adapting import entropy
from streamcl.errors import ConfigError
from streamcl.plugins import find

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}


def last_blocks(names: list[str]) -> set[str]:
    find("strategy", "sar").load()
    from streamcl.strategies.test_time import _reliable  # type: ignore[import-not-found]

    found: Callable[[list[str]], set[str]] = _reliable.last_blocks
    return found(names)


def test_without_looking_up_the_slope_it_is_tent_on_reliable_samples() -> None:
    sar = started("sar", convolutions(), rho=0.0, e_m=0.0, e0=0.9, skip=[], optimizer=SGD)
    by_hand = started("tent", convolutions(), optimizer=SGD)
    by_hand.loss = lambda batch, logits: (found := entropy(logits))[found < 0.9].mean()
    for seed in range(4):
        torch.testing.assert_close(sar.adapt(batch(seed=seed)).scores, by_hand.adapt(batch(seed=seed)).scores, rtol=1e-4, atol=1e-4)
    assert 0 < sar.counts["kept"] < 48


def test_the_step_is_made_from_where_it_was_with_the_gradient_from_up_the_slope() -> None:
    """By hand, on the same model: everything of steps 1 to 3, with torch's own SGD."""
    sar, module = started("sar", convolutions(), skip=[], e0=1.2, e_m=0.0, optimizer=SGD), convolutions()
    weights = {f"module.{n}": value for n, value in module.train().named_parameters() if n.split(".")[1] == "1"}
    sgd = torch.optim.SGD(weights.values(), lr=0.05, momentum=0.9)
    for seed in range(3):
        values = batch(seed=seed).inputs["input"]
        module.zero_grad()
        logits = module(values)
        first = entropy(logits)
        first[first < 1.2].mean().backward()
        size = math.sqrt(sum(float(value.grad.square().sum()) for value in weights.values()))
        before = {name: value.detach().clone() for name, value in weights.items()}
        with torch.no_grad():
            for value in weights.values():
                value.add_(0.05 * value.grad / size)
        module.zero_grad()
        second = entropy(module(values))
        second[(first < 1.2) & (second < 1.2)].mean().backward()
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(before[name])
        sgd.step()
        torch.testing.assert_close(sar.adapt(batch(seed=seed)).scores, logits.detach(), rtol=1e-4, atol=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(sar.adapted[name], value, rtol=1e-4, atol=1e-5)


def test_where_no_sample_stays_reliable_the_weights_are_as_before_to_the_bit() -> None:
    """Far up the slope all answers are unsure; the second gradient is dropped."""
    sar = started("sar", convolutions(), rho=30.0, e0=0.3, optimizer=SGD)
    for seed in range(4):
        sar.adapt(batch(seed=seed))
    assert sar.counts["kept"] > 0 and sar.counts["skipped"] == 4 and "updates" not in sar.counts and sar.e is None
    assert all(torch.equal(sar.adapted[name], value) and value.grad is None for name, value in sar.source.items())
    sar.e0 = 1e-9
    sar.adapt(batch())
    assert sar.counts["skipped"] == 5


def test_a_collapse_brings_back_the_source_once_with_a_new_optimiser() -> None:
    sar = started("sar", convolutions(), e_m=0.5, optimizer=SGD)
    for entropy_of_batch in (0.9, 0.6, 0.6):
        sar.recover(entropy_of_batch, 5)
    assert sar.e == pytest.approx(0.9 * (0.9 * 0.9 + 0.1 * 0.6) + 0.1 * 0.6) and "recovered" not in sar.counts
    with torch.no_grad():
        for value in sar.adapted.values():
            value.add_(1)
            sar.optimizer.state[value]["momentum_buffer"] = torch.ones_like(value)
    for _ in range(20):
        sar.recover(0.01, 5)
        if "recovered" in sar.counts:
            break
    assert sar.e is None and not sar.optimizer.state
    assert all(torch.equal(sar.adapted[name], value) for name, value in sar.source.items())
    sar.recover(0.6, 5)
    assert sar.counts["recovered"] == 1, "what came before is forgotten"


def test_what_counts_as_a_collapse_follows_from_the_number_of_classes() -> None:
    sar = started("sar", convolutions())
    threshold = 0.2 * math.log(10) / math.log(1000)
    sar.recover(threshold * 1.01, 10)
    assert "recovered" not in sar.counts
    sar.recover(0.0, 10)
    assert sar.counts["recovered"] == 1
    sar.recover(0.199, 1000)
    assert sar.counts["recovered"] == 2


def test_a_gradient_that_is_not_finite_is_counted_and_nothing_changes() -> None:
    sar = started("sar", convolutions(), skip=[])
    module = sar.model.module
    handle = module[0][1].weight.register_hook(lambda gradient: gradient * math.inf)
    sar.adapt(batch())
    handle.remove()
    assert sar.counts["not_finite"] == 1 and "updates" not in sar.counts
    assert all(torch.equal(sar.adapted[name], value) for name, value in sar.source.items())


def test_with_batch_normalisation_it_warns_once_and_without_it_does_not() -> None:
    sar, other = started("sar", convolutions()), started("sar", convolutions("group"))
    for seed in range(2):
        sar.adapt(batch(seed=seed)), other.adapt(batch(seed=seed))
    assert [event.kind for event in sar.heard.events] == ["warning"] and not other.heard.events
    assert "its authors advise against it" in sar.heard.events[0].fields["message"]


def test_a_parameter_that_two_layers_share_goes_up_the_slope_and_back_once() -> None:
    module: Any = convolutions("group")
    module[1][1].weight = module[0][1].weight
    sar = started("sar", module, skip=[], e0=9.0, rho=0.1)
    sar.optimizer.step = lambda *given: None
    seen: list[float] = []
    sar.model.register_forward_pre_hook(lambda *given: seen.append(moved(sar)))
    sar.adapt(batch())
    assert seen == [0.0, pytest.approx(0.1, rel=1e-4)], "as far up as it says"
    assert moved(sar) == 0.0 and sar.counts["updates"] == 1


def moved(sar: Any) -> float:
    """How far its tensors, each taken once, are from the source's."""
    values = {id(value): value.detach() - sar.source[name] for name, value in sar.adapted.items()}
    return math.sqrt(sum(float(change.square().sum()) for change in values.values()))


def test_going_back_is_exact() -> None:
    goes_back_exactly("sar", optimizer=SGD)
    goes_back_exactly("sar", lambda: convolutions("group"), optimizer=SGD, e_m=0.4, answer="after")


def test_the_last_blocks_are_those_of_the_authors_lists() -> None:
    blocks = (3, 4, 6, 3)
    resnet = ["bn1", *(f"layer{s + 1}.{b}.bn{n}" for s in range(4) for b in range(blocks[s]) for n in (1, 2, 3))]
    assert last_blocks(resnet) == {name for name in resnet if "layer4" in name}
    vit = [*(f"blocks.{b}.norm{n}" for b in range(12) for n in (1, 2)), "norm"]
    theirs = {name for name in vit if any(part in name for part in ("blocks.9", "blocks.10", "blocks.11")) or name == "norm"}
    assert last_blocks(vit) == theirs
    assert last_blocks([f"model.{name}" for name in vit]) == {f"model.{name}" for name in theirs}


@pytest.mark.parametrize(
    ("names", "out"),
    [
        ([f"layers.{b}.1" for b in range(4)], {"layers.3.1"}),
        (
            ["stem.1", *(f"blocks.{b}.norm{n}" for b in range(15) for n in (1, 2))],
            {f"blocks.{b}.norm{n}" for b in (12, 13, 14) for n in (1, 2)},
        ),
        (
            [*(f"encoder.layer.{b}.ln" for b in range(24)), "pooler_norm"],
            {*(f"encoder.layer.{b}.ln" for b in range(18, 24)), "pooler_norm"},
        ),
        ([f"{which}.blocks.{b}.norm" for which in ("image", "audio") for b in range(4)], {"image.blocks.3.norm", "audio.blocks.3.norm"}),
        ([f"block{s}.layer.{b}.bn" for s in (1, 2, 3) for b in range(4)], {f"block3.layer.{b}.bn" for b in (1, 2, 3)}),
        (["first", "second", "third", "fourth", "fifth"], {"fifth"}),
        (["only"], set()),
    ],
)
def test_models_with_other_names_do_without_their_last_quarter(names: list[str], out: set[str]) -> None:
    assert last_blocks(names) == out


def test_skip_is_by_parts_of_names_and_what_fits_nothing_is_refused() -> None:
    assert list(started("sar", convolutions(), skip=["0.1", "2.1"]).adapted) == [
        f"module.{b}.1.{w}" for b in (1, 3) for w in ("weight", "bias")
    ]
    assert {name.split(".")[1] for name in started("sar", convolutions()).adapted} == {"0", "1", "2"}
    with pytest.raises(ConfigError, match=r"no normalisation layer of this model has 'layer9' in its name; they are called module.0.1"):
        started("sar", convolutions(), skip=["layer9"])
    with pytest.raises(ConfigError, match="skip leaves out every normalisation layer of this model"):
        started("sar", convolutions(), skip=["module"])
    with pytest.raises(ConfigError, match="looked for BatchNorm"):
        started("sar", nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))


def test_a_sound_model_of_few_classes_is_not_taken_for_a_collapsed_one() -> None:
    """On data of the source, with answers that are as sure as they should be, the paper's 0.2 of a thousand classes resets all the time."""

    def recovered(e_m: float | None) -> int:
        sar = started("sar", convolutions(), e_m=e_m)
        for seed in range(20):
            sar.adapt(batch(pictures(seed, 32, shifted=False)[0]))
        assert sar.counts["updates"] == 20
        return sar.counts.get("recovered", 0)

    assert recovered(None) == 0
    assert recovered(0.2) > 15
