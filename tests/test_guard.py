"""The guard: streams and settings that are made to break a method, what it says of them, and what is served then."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import streamcl
from streamcl.errors import ConfigError
from streamcl.guard import Guard

HOPELESS = {"name": "tent", "optimizer": {"lr": 1.0}}  # a thousand times the paper's rate


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that knows half of the digits, and the other half, shuffled."""
    loaded = load_digits()
    x, y = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16, torch.tensor(loaded.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:900], order[900:]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(8):
        for rows in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), x[test], y[test]


@pytest.fixture
def deployed(digits: tuple[nn.Module, Tensor, Tensor]) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """The same, as it was, for each test."""
    model, x, y = digits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield model, x, y
    model.load_state_dict(before)


def served(loop: streamcl.OnlineLoop, x: Tensor, y: Tensor, size: int = 32, passes: int = 3) -> tuple[float, float]:
    """The accuracy of what was served, and of the deployed model on the same."""
    right = frozen = total = 0
    for _ in range(passes):
        for inputs, classes in zip(x.split(size), y.split(size), strict=True):
            right += int((loop(inputs).labels() == classes).sum())
            frozen += int((loop.frozen(inputs).labels() == classes).sum())
            total += len(classes)
    return right / total, frozen / total


def by_class(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    order = y.argsort(stable=True)
    return x[order], y[order]


# -- streams that break it -----------------------------------------------------------------------------------------------------------


def test_a_stream_of_one_class_at_a_time_is_served_as_deployed(deployed: Any) -> None:
    model, x, y = deployed
    x, y = by_class(x, y)
    bare, frozen = served(streamcl.online(model, "tent", guard=False), x, y, passes=1)
    assert bare < frozen - 0.08, "without a guard the statistics of such batches ruin it"
    loop = streamcl.online(model, "tent")
    guarded, frozen = served(loop, x, y, passes=1)
    assert guarded >= frozen - 0.01
    assert [event["what"] for event in loop.status()["events"]][:1] == ["statistics"]


@pytest.mark.parametrize("mode", ["inline", "shadow"])
def test_a_learning_rate_far_too_high_costs_little(mode: Any, deployed: Any) -> None:
    model, x, y = deployed
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    bare, frozen = served(streamcl.online(model, HOPELESS, mode=mode, guard=False), x, y)
    assert bare < frozen - 0.1
    model.load_state_dict(kept)
    loop = streamcl.online(model, HOPELESS, mode=mode)
    guarded, frozen = served(loop, x, y)
    assert guarded >= frozen - 0.02
    whats = [event["what"] for event in loop.status()["events"]]
    assert "bypass" in whats and loop.status()["guard"]["bypassing"]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items()), "the deployed model, to the bit"


def test_noise_that_answers_nothing_does_no_harm_to_what_comes_after(deployed: Any) -> None:
    model, x, y = deployed
    loop = streamcl.online(model, {"name": "tent", "optimizer": {"lr": 0.02}})
    for number in range(40):
        loop(torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(number)))
    guarded, frozen = served(loop, x, y, passes=1)
    assert guarded >= frozen - 0.02


def test_abrupt_shifts_are_followed_where_following_helps(deployed: Any) -> None:
    model, x, y = deployed
    loop = streamcl.online(model, "tent")
    for gain, offset in ((1.0, 0.0), (0.3, 0.5), (1.0, 0.0), (0.4, 0.0)):
        guarded, frozen = served(loop, x * gain + offset, y, passes=1)
        assert guarded >= frozen - 0.01
    assert guarded > frozen + 0.1, "the last shift is one that statistics of the batch undo"
    assert not any(event["what"] in ("restore", "bypass") for event in loop.status()["events"])


def test_a_shift_that_makes_the_deployed_model_certain_of_one_class_is_followed_once_labels_tell(deployed: Any) -> None:
    model, x, y = deployed
    shifted, size = x + 0.6, 32
    safe, frozen = served(streamcl.online(model, "tent"), shifted, y, passes=1)
    assert safe >= frozen - 0.01 and frozen < 0.2, "nothing but certainty to go by, and that is misled"
    loop = streamcl.online(model, "tent")
    right = total = 0
    for start in range(0, len(x) - size, size):
        answer = loop(shifted[start : start + size])
        right, total = right + int((answer.labels() == y[start : start + size]).sum()), total + size
        loop.feedback(torch.arange(start, start + 4), y[start : start + 4])
    assert right / total > frozen + 0.3


def test_inputs_made_to_be_confidently_wrong_do_not_take_the_model_over(deployed: Any) -> None:
    model, x, y = deployed
    model.requires_grad_(True)
    probe = x[:256].clone().requires_grad_(True)
    for _ in range(20):  # climbs towards class 3 for whatever is shown
        (gradient,) = torch.autograd.grad(model(probe)[:, 3].sum(), probe)
        probe = (probe + 0.05 * gradient.sign()).clamp(0, 1).detach().requires_grad_(True)
    attack = probe.detach()
    assert float((model(attack).argmax(1) == 3).double().mean()) > 0.95
    loop = streamcl.online(model, {"name": "tent", "optimizer": {"lr": 0.02}})
    for _ in range(5):
        for part in attack.split(32):
            loop(part)
    guarded, frozen = served(loop, x, y, passes=1)
    assert guarded >= frozen - 0.02


def test_nothing_fires_on_a_healthy_stream(deployed: Any) -> None:
    model, x, y = deployed
    loop = streamcl.online(model, "tent")
    guarded, frozen = served(loop, x, y)
    assert guarded >= frozen - 0.005 and not any(event["what"] in ("restore", "bypass") for event in loop.status()["events"])
    assert loop.strategy.counts["updates"] > 0


# -- what decides --------------------------------------------------------------------------------------------------------------------


def test_a_canary_brings_back_what_was_there_before(deployed: Any) -> None:
    model, x, y = deployed
    loop = streamcl.online(
        model, "tent", canary=[(x[:64], y[:64])], guard={"canary_every": 1, "slack": 100.0, "diversity": 0.0, "share": 1.0}
    )
    loop(x[64:96])
    with torch.no_grad():  # something that the other watches are told to let pass
        model[5].weight.neg_()
    loop(x[96:128])
    event = loop.status()["events"][-1]
    assert event["what"] == "restore" and event["reason"].startswith("canary: ") and "of the labelled samples are right" in event["reason"]
    assert torch.equal(model[5].weight, loop.strategy.source["module.5.weight"])


def test_late_labels_bring_it_back_as_well(deployed: Any) -> None:
    model, x, y = deployed
    loop = streamcl.online(model, "tent", remember=256, guard={"slack": 100.0, "diversity": 0.0, "share": 1.0, "memory": 10_000})
    with torch.no_grad():
        model[5].weight.neg_()
    for start in range(0, 256, 32):
        loop(x[start : start + 32])
        loop.feedback(torch.arange(start, start + 32), y[start : start + 32])
    events = loop.status()["events"]
    assert any(event["what"] == "restore" and event["reason"].startswith("feedback: ") for event in events)


def test_while_adapting_is_stopped_by_labels_every_answer_is_the_deployed_models(deployed: Any) -> None:
    model, x, _y = deployed
    loop = streamcl.online(model, "tent", guard={"strikes": 1, "retry": None})
    loop(x[:32])
    loop._strike("feedback: made up", 1)
    assert loop.guard is not None and loop.guard.bypassing and loop.guard.serves_frozen
    for start in range(0, 320, 32):
        part = x[start : start + 32] * 0.5 + 0.3
        assert torch.equal(loop(part).scores, loop.frozen(part).scores)
        assert torch.equal(loop.predict(part).scores, loop.frozen(part).scores)


def test_with_calibration_data_the_distance_to_the_source_has_a_limit_in_nats(deployed: Any) -> None:
    model, x, _y = deployed
    loop = streamcl.online(
        model, "tent", calibrate=x[:256].split(64), guard={"drift": 0.005, "slack": 100.0, "diversity": 0.0, "share": 1.0}
    )
    assert loop.distance() == 0.0
    with torch.no_grad():
        model[5].weight.add_(0.5)
    expected = sum(float((w * (loop.strategy.adapted[n] - loop.strategy.source[n]) ** 2).sum()) for n, w in loop._fisher.items()) / 2
    assert loop.distance() == pytest.approx(expected) and expected > 0.005
    loop(x[256:288])
    assert loop.status()["events"][-1]["reason"].startswith("fisher: ")
    assert loop.distance() == 0.0


def test_answers_that_are_not_finite_are_never_served(deployed: Any) -> None:
    model, x, _y = deployed
    loop = streamcl.online(model, "tent")
    loop(x[:32])
    with torch.no_grad():
        model[5].weight[0] = math.inf
    answer = loop(x[32:64])
    assert bool(answer.scores.isfinite().all()) and answer.version == 0
    assert bool(model[5].weight.isfinite().all())
    assert loop.status()["events"][-1]["reason"].startswith("an answer is not finite")


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors, for each of which a device is waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_batch_that_is_not_compared_costs_one_number_read_from_the_device(deployed: Any) -> None:
    model, x, _ = deployed
    counts = []
    for guard in (False, {"compare": 1000}):
        loop = streamcl.online(model, "tent", guard=guard)
        for _ in range(8):
            loop(x[:64])
        with Reads() as reads:
            loop(x[:64])
        counts.append(reads.count)
        loop.reset(), loop.close()
    assert counts[1] == counts[0] + 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_answers_that_are_not_finite_are_seen_on_the_batch_itself_whether_or_not_it_is_compared(bad: float, deployed: Any) -> None:
    model, x, _ = deployed
    wrong: list[int] = []
    loop = streamcl.online(model, "bn_adapt", guard={"compare": 1000}, forward=lambda m, inputs: spoilt(m(inputs)))

    def spoilt(logits: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(len(logits))[:, None] == 3, bad) if wrong else logits

    for _ in range(8):
        loop(x[:64])
    wrong.append(1)
    loop(x[:64])
    assert loop.status()["events"][-1]["reason"].startswith("an answer is not finite")


def test_a_step_with_a_loss_that_is_not_finite_is_not_made(deployed: Any) -> None:
    model, _x, _y = deployed
    loop = streamcl.online(model, "tent", guard=False, window=None)
    before = [value.detach().clone() for value in model.parameters()]
    assert not loop.strategy.step(sum((p * math.nan).sum() for p in loop.strategy.adapted.values()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert loop.strategy.counts == {"not_finite": 1} and all(p.grad is None for p in loop.strategy.adapted.values())


def test_after_a_bypass_it_is_tried_again_and_each_time_after_twice_as_long() -> None:
    guard = Guard(strikes=1, retry=10)
    assert guard.strike(5) == "bypass" and guard.until == 15
    assert not guard.retries(14) and guard.retries(15) and not guard.bypassing
    assert guard.strike(20) == "bypass" and guard.until == 40
    for_ever = Guard(strikes=1, retry=None)
    assert for_ever.strike(0) == "bypass" and not for_ever.retries(10**9)


# -- how it counts -------------------------------------------------------------------------------------------------------------------


def one_hot(labels: list[int], classes: int = 4, strength: float = 9.0) -> Tensor:
    return nn.functional.one_hot(torch.tensor(labels), classes) * strength


def test_the_share_of_decisions_that_differ_is_what_it_says() -> None:
    guard = Guard(memory=1_000_000)
    usual = [0, 1, 2, 3] * 16
    said = [*usual[:60], 1, 2, 3, 0]
    reason = guard.look(one_hot(said), one_hot(usual), one_hot(usual))
    assert guard.figures["disagreement"] == 4 / 64
    unsure = 1 - 1 / (1 + 3 * math.exp(-9))
    assert guard.figures["limit"] == pytest.approx(0.01 + unsure, abs=1e-6) and reason is not None and reason.startswith("drift: 6% of")


def test_a_collapse_onto_one_class_is_seen_by_diversity_and_a_stream_of_one_class_is_not_one() -> None:
    guard = Guard(disagreement=1.0)
    usual = [0, 1, 2, 3] * 16
    assert str(guard.look(one_hot([0] * 64), one_hot(usual), one_hot(usual))).startswith("diversity: ")
    guard = Guard(disagreement=1.0)
    assert guard.look(one_hot([0] * 64), one_hot([0] * 64), one_hot([0] * 64)) is None


def test_correlation_is_the_information_that_the_place_in_the_stream_has_about_the_class() -> None:
    together, apart = Guard(), Guard()
    for block in range(8):
        one, mixed = [block % 4] * 32, [0, 1, 2, 3] * 8
        together.look(one_hot(one), one_hot(one), one_hot(one))
        apart.look(one_hot(mixed), one_hot(mixed), one_hot(mixed))
    bias = 3 / (2 * 256)  # Miller and Madow's, of the whole
    assert together.figures["correlation"] == pytest.approx(math.log(4) + bias, abs=1e-6)
    assert apart.figures["correlation"] == pytest.approx(0.0, abs=1e-6)


def test_statistics_are_chosen_by_who_is_the_more_certain() -> None:
    sure, unsure, usual = one_hot([0, 1, 2, 3] * 16), one_hot([1, 2, 3, 0] * 16, strength=1.0), one_hot([0, 1, 2, 3] * 16, strength=1.0)
    guard = Guard()
    guard.look(unsure, unsure, sure)
    assert guard.prefers_frozen
    for _ in range(4):
        guard.look(one_hot([1, 2, 3, 0] * 16), one_hot([1, 2, 3, 0] * 16), usual)
    assert not guard.prefers_frozen, "R is the more certain one now"


def test_what_it_has_seen_survives_state_and_restore() -> None:
    torch.manual_seed(0)
    first, second = Guard(), Guard()
    for _ in range(5):
        first.look(torch.randn(16, 5), torch.randn(16, 5), torch.randn(16, 5))
    second.restore(first.state())
    a, b, c = torch.randn(16, 5), torch.randn(16, 5), torch.randn(16, 5)
    assert first.look(a, b, c) == second.look(a, b, c) and first.figures == second.figures


def test_a_guard_with_a_limit_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="guard: strikes is 0: 1 or more is needed"):
        Guard(strikes=0)
