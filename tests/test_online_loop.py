"""The online loop around any module: what it answers, what it keeps, how it goes back, and that it never writes where it must not."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamcl
from streamcl.checkpoint import flatten, tree_bytes, unflatten
from streamcl.errors import ConfigError, DataError
from streamcl.stream import Batch


def network(seed: int = 0, norm: str = "batch") -> nn.Sequential:
    """A small network whose running statistics are those of some data."""
    torch.manual_seed(seed)
    layer: nn.Module = nn.BatchNorm2d(6) if norm == "batch" else nn.GroupNorm(2, 6)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 3, 6, 6))
        model[5].weight.mul_(4)
    return model.eval()


def pictures(count: int, seed: int = 0, shift: float = 0.5) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) + shift


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Two(nn.Module):
    """Two inputs by name, answered as libraries answer: an object that has logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> Any:
        class Answer:
            logits = self.head(self.norm(left + right))

        return Answer()


class RefersToSome(streamcl.AdaptingStrategy):
    needs_references = "a test"


# -- what it answers -----------------------------------------------------------------------------------------------------------------


def test_tent_in_the_loop_is_tent_written_by_hand() -> None:
    mine, theirs = network(), network()
    loop = streamcl.online(mine, {"name": "tent", "optimizer": {"lr": 0.01}}, guard=False, window=None)
    norm = theirs[1]
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    optimizer = torch.optim.Adam(norm.parameters(), lr=0.01)
    for number in range(5):
        x = pictures(16, number)
        logits = theirs(x)
        log = logits.log_softmax(1)
        optimizer.zero_grad()
        (-(log.exp() * log).sum(1).mean()).backward()
        optimizer.step()
        answer = loop(x)
        torch.testing.assert_close(answer.scores, logits.detach(), atol=1e-6, rtol=0)
        assert (answer.made, answer.version) == ("before", number)
    assert loop.version == 5


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "batch"])
def test_inputs_in_any_form_reach_the_module_as_they_were_given(form: str) -> None:
    left, right = torch.randn(8, 5), torch.randn(8, 5)
    torch.manual_seed(0)
    model = Two()
    expected = model(left, right).logits.detach()
    if form == "tensor":
        loop = streamcl.online(model, "tent", forward=lambda m, x: m(x[:, :5], x[:, 5:]).logits)
        given: Any = torch.cat([left, right], 1)
    else:
        loop = streamcl.online(model, "tent")
        given = {"tuple": (left, right), "mapping": {"left": left, "right": right}}.get(form)
        if form == "batch":
            given = Batch({"left": left, "right": right}, None, torch.arange(8))
    torch.testing.assert_close(loop(given).scores, expected)
    assert loop.counts["adapted"] == 8


def test_the_deployed_model_answers_to_the_bit_whatever_was_learned_and_nothing_of_it_was_copied_but_what_is_adapted() -> None:
    model = network()
    before, x = tensors(model), pictures(32)
    with torch.no_grad():
        expected = model(x)
    loop = streamcl.online(model, {"name": "tent", "optimizer": {"lr": 0.1}}, guard=False, window=None)
    for number in range(6):
        loop(pictures(16, number))
    assert torch.equal(loop.frozen(x).scores, expected) and not torch.equal(loop.predict(x).scores, expected)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.weight", "1.bias"}, "neither other weights nor running statistics"
    assert sum(value.numel() for value in loop.strategy.source.values()) == 12
    loop.reset()
    assert unchanged(model, before) and loop.version == 0


@pytest.mark.parametrize("mode", ["inline", "shadow"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_loop_that_comes_back_from_its_state_goes_on_to_the_bit(mode: Any, norm: str) -> None:
    def made() -> streamcl.OnlineLoop:
        return streamcl.online(network(norm=norm), {"name": "tent", "optimizer": {"lr": 0.02}}, mode=mode, promote=3)

    whole, first, second = made(), made(), made()
    for number in range(10):
        whole(pictures(16, number)), first(pictures(16, number))
    tree, values = flatten(first.state())
    second.restore(unflatten(tree, {name: value.clone() for name, value in values.items()}))
    for number in range(10, 20):
        a, b = whole(pictures(16, number)), second(pictures(16, number))
        assert torch.equal(a.scores, b.scores) and (a.version, a.made) == (b.version, b.made)
    assert whole.status() == second.status()


def test_a_snapshot_is_all_that_adapting_changed_and_can_be_used_again() -> None:
    loop = streamcl.online(network(), {"name": "tent", "optimizer": {"lr": 0.05}}, guard=False, window=None)
    loop(pictures(16, 0))
    saved = loop.snapshot()
    assert tree_bytes(saved) < 6000, "weights and bias of six channels, their moments, and a generator's state"
    runs = []
    for _ in range(2):
        loop.restore(saved)
        runs.append([loop(pictures(16, number)).scores for number in range(1, 5)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_it_works_where_gradients_are_switched_off_outside_and_the_model_was_left_in_training_mode() -> None:
    model = network()
    before = tensors(model)
    loop = streamcl.online(model, "tent", guard=False, window=None)
    with torch.inference_mode():
        loop(torch.randn(16, 3, 6, 6))
    with torch.no_grad():
        loop(pictures(16))
    model.train()
    loop(pictures(16))
    assert loop.strategy.counts["updates"] == 3
    assert torch.equal(model[1].running_mean, before["1.running_mean"]) and not model.training


# -- what is wrong with what it is given ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.full((4, 3, 6, 6), torch.nan), "input of sample 0 of the batch holds NaN or infinite values"),
        (torch.empty(0, 3, 6, 6), "the batch is empty"),
        ({"x": torch.randn(2, 3, 6, 6)}, "were given as a tensor, and this one as a mapping"),
        ("a text", "a batch is a tensor, a sequence or a mapping"),
        (torch.tensor(3.0), "is a single number"),
        (np.zeros((4, 3, 6, 6), np.float32), "a NumPy array: give torch.from_numpy"),
        (torch.randn(4, 5, 6, 6), r"the module cannot take this batch \(input 4 x 5 x 6 x 6 float32\): "),
        (torch.zeros(4, 3, 6, 6, dtype=torch.int64), r"the module cannot take this batch \(input 4 x 3 x 6 x 6 int64\): "),
    ],
)
@pytest.mark.parametrize("mode", ["inline", "shadow"])
def test_what_cannot_be_served_is_one_sentence_and_leaves_everything_as_it_was(given: Any, message: str, mode: Any) -> None:
    loop = streamcl.online(network(), "tent", mode=mode)
    loop(pictures(16))
    before, status = flatten(loop.snapshot()), loop.status()
    with pytest.raises(DataError, match=message):
        loop(given)
    after = flatten(loop.snapshot())
    assert before[0] == after[0] and all(torch.equal(a, b) for a, b in zip(before[1].values(), after[1].values(), strict=True))
    assert loop.status() == status
    assert len(loop(pictures(16)).scores) == 16


def test_a_batch_that_cannot_be_taken_does_not_poison_the_window_that_it_came_first_in() -> None:
    loop = streamcl.online(network(), "tent", window=8, guard=False)
    with pytest.raises(DataError, match="cannot take this batch"):
        loop(torch.randn(1, 5, 6, 6))
    for number in range(8):
        loop(pictures(1, number))
    assert loop.strategy.counts["updates"] == 1


def test_after_the_loop_is_closed_the_same_parameters_want_gradients_as_before() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    loop = streamcl.online(model, "tent")
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["1.weight", "1.bias"]
    loop.close()
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["0.weight"]


def test_one_loop_stands_around_a_module_at_a_time() -> None:
    model, x = network(), pictures(16)
    before = tensors(model)
    first = streamcl.online(model, {"name": "tent", "optimizer": {"lr": 0.1}}, guard=False, window=None)
    first(x)
    for around in (model, nn.Sequential(model)):
        with pytest.raises(ConfigError, match=r"a loop with tent stands around this module already.*close"):
            streamcl.online(around, "eata")
    assert not unchanged(model, before) and first.version == 1, "a refusal changes nothing"
    first.reset(), first.close(), first.close()
    assert unchanged(model, before) and all(value.requires_grad for value in model.parameters())
    with pytest.raises(ConfigError, match="this loop is closed"):
        first(x)
    second = streamcl.online(model, "tent", guard=False, window=None)
    assert torch.equal(second.frozen(x).scores, network()(x).detach())


@pytest.mark.parametrize("mode", ["inline", "shadow"])
def test_a_loop_that_nobody_holds_leaves_no_mark(mode: Any) -> None:
    gc.disable()  # it is gone when its last name is, and not when somebody collects
    try:
        model = network()
        loop = streamcl.online(model, "tent", mode=mode)
        loop(pictures(16))
        gone = weakref.ref(loop)
        del loop
        assert gone() is None
        streamcl.online(model, "tent")(pictures(16))
        with pytest.raises(ConfigError, match="needs labelled samples"):  # nor does one that did not come about
            streamcl.online(nn.Sequential(model), RefersToSome())
        streamcl.online(model, "tent")
    finally:
        gc.enable()


def test_inputs_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="of different lengths: left 3, right 4"):
        streamcl.online(Two(), "tent")({"left": torch.randn(3, 5), "right": torch.randn(4, 5)})


def test_what_is_no_state_is_refused_and_there_is_nothing_before_the_deployed_model() -> None:
    loop = streamcl.online(network(), "tent")
    for wrong in ({"a": 1}, None):
        with pytest.raises(ConfigError, match="this is no state of an online loop"):
            loop.restore(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is no version before this one"):
        loop.rollback()


def test_a_state_of_another_method_or_model_is_refused_before_anything_is_touched() -> None:
    tent, sar = streamcl.online(network(), "tent"), streamcl.online(network(norm="group"), "sar")
    tent(pictures(16))
    before = flatten(sar.snapshot())[1]
    for state in (tent.state(), tent.snapshot()):
        with pytest.raises(ConfigError, match="of another model or of another method than sar"):
            sar.restore(state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), flatten(sar.snapshot())[1].values(), strict=True))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(3, 2), {}, "it looked for BatchNorm, LayerNorm, GroupNorm"),
        ("resnet", {}, "stands around a torch.nn.Module"),
        (network(), {"strategy": "er"}, "er learns from labels: the online loop takes a method of test-time adaptation"),
        (network(), {"mode": "shadow", "strategy": "source"}, "changes answers and no weights"),
        (network(), {"every": 0}, "every is 0: 1 or more is needed"),
        (network(), {"guard": {"compare": 0}}, "compare is 0"),
        (
            network(),
            {"guard": False, "canary": [(pictures(4), torch.zeros(4, dtype=torch.int64))]},
            "watched by the guard, and there is none",
        ),
        (network(), {"calibrate": []}, "there is no batch in it"),
        (network(), {"mode": "shadw"}, "mode is 'shadw': inline or shadow"),
        (network(), {"window": "32"}, "window is '32': a number from 0 up"),
        (network(), {"budget": -1}, "budget is -1"),
        (network(), {"guard": {"compar": 8}}, "there is no 'compar': did you mean 'compare'"),
        (network(), {"canary": [pictures(4)]}, "canary is a list of batches .inputs, classes., and holds a Tensor"),
        (network(), {"canary": [(pictures(4), [0, 1, 2, 77])]}, "holds a class that the model does not have: it has 0 to 3"),
        (torch.jit.trace(network(), pictures(2)), {}, "a scripted module hides its layers"),
        (network(), {"target": "value"}, "tent adapts models that answer with class, and this one answers with value"),
        (network(norm="group").to(torch.bfloat16), {}, "steps, which are lost in half precision, and module.1.weight is bfloat16"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_served(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        streamcl.online(model, **options)


def test_a_module_that_does_not_return_scores_is_told_of_forward() -> None:
    loop = streamcl.online(nn.Sequential(nn.LayerNorm(4)), "tent", forward=lambda m, x: m(x)[:, 0])
    with pytest.raises(ConfigError, match="one row of scores for each sample is needed: give `forward`"):
        loop(torch.randn(3, 4))


# -- how often, and on what ----------------------------------------------------------------------------------------------------------


def test_it_learns_from_every_nth_batch() -> None:
    loop = streamcl.online(network(), "tent", every=3, guard=False, window=None)
    versions = [loop(pictures(8, number)).version for number in range(7)]
    assert versions == [0, 1, 1, 1, 2, 2, 2] and loop.strategy.counts["updates"] == 3


def test_an_update_that_takes_longer_than_the_budget_is_left_out_and_counted() -> None:
    loop = streamcl.online(network(), "tent", budget=1e-6, guard=False, window=None)
    for number in range(5):
        loop(pictures(8, number))
    assert loop.strategy.counts["updates"] == 2 and loop.counts["over_budget"] == 3, (
        "one that warmed up, and one that showed how long it takes"
    )
    generous = streamcl.online(network(), "tent", budget=1e6, guard=False, window=None)
    for number in range(5):
        generous(pictures(8, number))
    assert generous.strategy.counts["updates"] == 5 and "over_budget" not in generous.counts


def test_single_samples_are_normalised_by_the_newest_window_and_learned_from_once_per_window() -> None:
    model, x = network(), pictures(40)
    loop = streamcl.online(model, {"name": "tent", "optimizer": {"lr": 0.05}}, window=8, guard=False)
    answers = [loop(x[place : place + 1]) for place in range(40)]
    assert all(one.scores.shape == (1, 4) for one in answers)
    with torch.no_grad():
        alone = model(x[:7])  # in evaluation mode, with weights that changed since
    assert loop.strategy.counts["updates"] == 5
    fresh = network()
    fresh[1].running_mean = fresh[1].running_var = None
    torch.testing.assert_close(answers[7].scores, fresh(x[:8]).detach()[-1:], atol=1e-6, rtol=0)
    frozen = network()
    torch.testing.assert_close(torch.cat([one.scores for one in answers[:7]]), frozen(x[:7]).detach(), atol=1e-6, rtol=0)
    assert [one.version for one in answers[:9]] == [0] * 8 + [1] and alone.shape == (7, 4)


def test_without_batch_normalisation_each_sample_is_answered_alone() -> None:
    model, x = network(norm="group"), pictures(24)
    with torch.no_grad():
        expected = model(x[:8])
    loop = streamcl.online(model, "tent", window=8, guard=False)
    answers = torch.cat([loop(x[place : place + 1]).scores for place in range(24)])
    torch.testing.assert_close(answers[:8], expected, atol=1e-6, rtol=0)
    assert loop.strategy.counts["updates"] == 3


def test_every_second_window_is_learned_from_and_none_is_lost_to_its_number() -> None:
    loop = streamcl.online(network(), "tent", window=8, every=2, guard=False)
    for number in range(64):
        loop(pictures(1, number))
    assert loop.strategy.counts["updates"] == 4


def test_single_samples_of_changing_size_are_answered_and_begin_a_window_anew() -> None:
    loop = streamcl.online(network(norm="group"), "tent", window=8, guard=False)
    for number in range(40):
        size = 6 if number % 10 else 8
        assert loop(torch.randn(1, 3, size, size)).scores.shape == (1, 4)
    assert loop.strategy.counts["updates"] == 4


def test_after_large_batches_a_single_sample_is_normalised_by_what_came_just_before() -> None:
    loop = streamcl.online(network(), "tent", window=8, guard=False, every=1000)
    for number in range(8):
        loop(pictures(1, number))
    x = pictures(16, 99, shift=3.0)
    loop(x)
    fresh = network()
    fresh[1].running_mean = fresh[1].running_var = None
    fresh.load_state_dict(dict(loop.served.module.state_dict().items()), strict=False)
    one = pictures(1, 5, shift=3.0)
    torch.testing.assert_close(loop(one).scores, fresh(torch.cat([x[9:], one])).detach()[-1:], atol=1e-5, rtol=1e-4)


def test_masked_classes_are_no_reason_to_stop() -> None:
    mask = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    loop = streamcl.online(network(norm="group"), "tent", forward=lambda m, x: m(x) + mask)
    for number in range(10):
        loop(pictures(16, number))
    assert loop.strategy.counts == {"updates": 10} and not loop.status()["events"]


def test_one_batch_of_huge_numbers_does_not_stay_in_the_statistics() -> None:
    loop = streamcl.online(network(), "tent", mode="shadow", guard=False, promote=1)
    loop(pictures(16) * 1e25)
    for number in range(3):
        loop(pictures(16, number))
    scores = loop.predict(pictures(16, 9)).scores
    assert bool(scores.isfinite().all()) and float(scores.std(dim=0).max()) > 0.01


def test_a_fault_of_the_module_is_not_called_the_batchs() -> None:
    fail = []

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        if fail:
            raise RuntimeError("the card fell out")
        return module(x)

    loop = streamcl.online(network(), "tent", forward=forward)
    loop(pictures(16))
    fail.append(1)
    with pytest.raises(RuntimeError, match="the card fell out"):
        loop(pictures(16))


def test_a_first_batch_that_was_refused_does_not_settle_the_form() -> None:
    loop = streamcl.online(network(), "tent")
    with pytest.raises(DataError):
        loop({"nonsense": torch.randn(4, 3, 6, 6)})
    assert loop(pictures(16)).version == 0


# -- shadow --------------------------------------------------------------------------------------------------------------------------


def test_in_shadow_mode_what_is_served_changes_only_by_promotion_and_shares_what_is_not_adapted() -> None:
    model = network()
    before, x = tensors(model), pictures(16, 99)
    with torch.no_grad():
        expected = model(x)
    loop = streamcl.online(model, {"name": "tent", "optimizer": {"lr": 0.05}}, mode="shadow", guard=False, promote=4)
    for number in range(3):
        assert loop(pictures(16, number)).version == 0
    assert torch.equal(loop.predict(x).scores, expected) and unchanged(model, before)
    twin, own = dict(loop.model.named_parameters()), dict(loop.served.named_parameters())
    assert {name for name in own if own[name].data_ptr() != twin[name].data_ptr()} == {"module.1.weight", "module.1.bias"}
    loop(pictures(16, 3))
    assert loop.version == 1 and not torch.equal(loop.predict(x).scores, expected)
    whole = loop.predict(x).scores
    torch.testing.assert_close(loop.predict(x[:1]).scores, whole[:1], atol=1e-6, rtol=0)  # whatever else is in the batch
    assert loop.rollback() == 0 and torch.equal(loop.predict(x).scores, expected) and unchanged(model, before)


class Named(nn.Module):
    """Its arguments have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.again, self.head = nn.LayerNorm(5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.again.weight = self.norm.weight  # one parameter in two places

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(self.again(self.norm(x if y is None else x + y)))


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "forward"])
def test_the_copy_that_adapts_is_given_its_inputs_as_the_served_model_is(form: str) -> None:
    torch.manual_seed(0)
    model, x = Named(), torch.randn(8, 5)
    given: Any = {"tensor": x, "tuple": (x, x), "mapping": {"x": x, "y": x}, "forward": x}[form]
    options = {"forward": lambda m, inputs: (m(inputs), inputs)} if form == "forward" else {}
    loop = streamcl.online(model, {"name": "tent", "optimizer": {"lr": 0.05}}, mode="shadow", guard=False, promote=2, **options)
    first = loop(given).scores
    loop(given)
    assert loop.version == 1 and not torch.equal(loop.predict(given).scores, first)
    assert loop.served.module.norm.weight is loop.served.module.again.weight
    assert loop.model.module.norm.weight is loop.model.module.again.weight
    loop.reset()
    assert torch.equal(loop.predict(given).scores, first)


def test_a_parameter_in_two_places_is_adapted_once_and_frozen_brings_it_back() -> None:
    torch.manual_seed(0)
    model, x = Named(), torch.randn(8, 5)
    loop = streamcl.online(model, {"name": "tent", "optimizer": {"lr": 0.05}}, guard=False, window=None)
    expected = loop.frozen(x).scores
    loop(x)
    learned = model.norm.weight.detach().clone()
    assert torch.equal(loop.frozen(x).scores, expected) and torch.equal(model.norm.weight, learned)
    assert [name for name in loop.strategy.adapted if name.endswith("weight")] == ["module.norm.weight"]


def test_versions_are_numbered_on_and_can_be_gone_back_to() -> None:
    loop = streamcl.online(network(), {"name": "tent", "optimizer": {"lr": 0.05}}, mode="shadow", guard=False, promote=2, keep=3)
    x, served = pictures(8, 99), {}
    for number in range(10):
        loop(pictures(16, number))
        served[loop.version] = loop.predict(x).scores
    assert loop.version == 5 and loop.status()["versions"] == [0, 3, 4, 5]
    assert loop.rollback(3) == 3 and torch.equal(loop.predict(x).scores, served[3])
    for number in range(2):
        loop(pictures(16, number))
    assert loop.version == 6, "a number is never used twice"
    with pytest.raises(ConfigError, match="there is no version 4 to go back to; there are 0, 3, 6"):
        loop.rollback(4)
    assert loop.promote() == 7 and loop.rollback() == 6 and loop.rollback(0) == 0


def test_asking_learning_and_labels_from_several_threads_keep_every_id_once() -> None:
    loop = streamcl.online(network(), {"name": "tent", "optimizer": {"lr": 0.01}}, mode="shadow", promote=2, remember=512)
    seen, wrong, done = [], [], threading.Event()

    def ask(size: int) -> None:
        while not done.is_set():
            answer = loop.predict(pictures(size, size))
            seen.append(answer.ids)
            try:
                loop.feedback(answer.ids, answer.labels())
                loop.status()
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=ask, args=(size,)) for size in (3, 5, 16)]
    for one in threads:
        one.start()
    for number in range(40):
        loop.learn(pictures(16, number))
    done.set()
    for one in threads:
        one.join()
    ids = torch.cat(seen)
    assert not wrong and len(ids) == len(ids.unique())
    known = loop.status()["feedback"]
    assert known["labelled"] == known["right"] == len(ids) and known["unknown"] == 0


def test_it_answers_while_another_thread_learns_and_every_answer_is_of_one_version() -> None:
    loop = streamcl.online(network(), {"name": "tent", "optimizer": {"lr": 0.05}}, mode="shadow", guard=False, promote=1)
    x, seen, wrong, done = pictures(4, 99), {}, [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            answer = loop.predict(x)
            if not torch.equal(seen.setdefault(answer.version, answer.scores), answer.scores):
                wrong.append(answer.version)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for one in threads:
        one.start()
    for number in range(30):
        loop.learn(pictures(16, number))
    done.set()
    for one in threads:
        one.join()
    assert not wrong and loop.version == 30
    alone = streamcl.online(network(), {"name": "tent", "optimizer": {"lr": 0.05}}, mode="shadow", guard=False, promote=1)
    for number in range(30):
        alone.learn(pictures(16, number))
    learned, expected = flatten(loop.snapshot())[1], flatten(alone.snapshot())[1]
    assert all(torch.equal(value, expected[name]) for name, value in learned.items()), "who asks changes nothing of what is learned"


# -- labels that come late -----------------------------------------------------------------------------------------------------------


def test_late_labels_are_matched_by_id_scored_and_compared_with_the_deployed_model() -> None:
    loop = streamcl.online(network(), {"name": "tent", "optimizer": {"lr": 0.05}}, guard=False, window=None, remember=64)
    answers = [loop(pictures(16, number)) for number in range(4)]
    said = torch.cat([one.labels() for one in answers])
    ids = torch.tensor([5, 20, 63, 40, 1000])
    told = torch.cat([said[ids[:4]], torch.tensor([0])])
    told[0] = (told[0] + 1) % 4
    found = loop.feedback(ids, told)
    assert (found["found"], found["unknown"], found["labelled"], found["right"]) == (4, 1, 4, 3)
    frozen = torch.cat([loop.frozen(pictures(16, number)).labels() for number in range(4)])
    assert found["recent_accuracy_frozen"] == float((frozen[ids[:4]] == told[:4]).double().mean())
    version = loop.version
    assert loop.feedback(ids[:2], told[:2], correct=True)["learned"] == 2 and loop.version == version + 1
    assert loop.feedback(ids, told)["found"] == 0, "a label counts once"
    for wrong, message in (
        (told[:2], "one id and one class"),
        (torch.tensor([0, 0, 0, 0, 4]), "holds class 4, and the model has classes 0 to 3"),
    ):
        with pytest.raises(DataError, match=message):
            loop.feedback(ids, wrong)
    with pytest.raises(DataError, match="names an id twice"):
        loop.feedback(torch.tensor([1, 1]), torch.tensor([0, 0]))
    assert loop.feedback(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))["found"] == 0


def test_learning_from_late_labels_lowers_their_loss() -> None:
    loop = streamcl.online(network(), {"name": "tent", "optimizer": {"lr": 0.05}}, guard=False, window=None, remember=2000, every=1000)
    x, target = pictures(32), torch.arange(32) % 4
    loop(pictures(4, 7)), loop(x)

    def loss() -> float:
        return float(nn.functional.cross_entropy(loop.predict(x).scores, target))

    before, ids = loss(), torch.arange(4, 36)
    for _ in range(10):
        loop.feedback(ids, target, correct=True)
    assert loss() < before - 0.05


def test_labels_of_what_was_answered_before_a_restore_are_matched_scored_and_forgotten_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamcl.late_labels.REMEMBERED", 6)

    def made() -> streamcl.OnlineLoop:
        return streamcl.online(network(), {"name": "tent", "optimizer": {"lr": 0.05}}, window=None)

    def asked(loop: streamcl.OnlineLoop, first: int) -> dict[str, Any]:
        return loop.feedback(torch.arange(first, first + 70, 7), torch.arange(10) % 4)

    whole, parts = made(), made()
    for number in range(5):
        whole(pictures(16, number)), parts(pictures(16, number))
    assert asked(whole, 3) == asked(parts, 3)
    for start in (5, 8, 11):  # batch by batch the oldest go, however often it was restored
        tree, values = flatten(parts.state())
        parts = made()
        parts.restore(unflatten(tree, {name: value.clone() for name, value in values.items()}))
        told = asked(whole, 4 + 16 * (start - 5))
        assert told == asked(parts, 4 + 16 * (start - 5)) and told["found"] > 0
        for number in range(start, start + 3):
            whole(pictures(16, number)), parts(pictures(16, number))
    assert asked(whole, 50) == asked(parts, 50) and whole.status()["feedback"]["unknown"] > 0
    assert sum(len(one[0]) for one in parts.labels.answers) == 6 * 16
    with pytest.raises(DataError, match="the model has classes 0 to 3"):
        fresh = made()
        fresh.restore(parts.state())
        fresh.feedback([200], [4])


def test_after_a_restore_an_id_that_comes_again_is_not_taken_for_the_sample_that_had_it() -> None:
    loop = streamcl.online(network(), {"name": "tent", "optimizer": {"lr": 0.05}}, guard=False, window=None, remember=64)
    before = loop.state()
    loop(pictures(16))
    loop.restore(before)
    found = loop.feedback([0], [1], correct=True)
    assert (found["found"], found["learned"]) == (0, 0)
