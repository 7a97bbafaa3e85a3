"""CMMM: three kinds of prompts, of which one belongs to a task, and the contrast between tasks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_strategies import begun, learn, make
from torch.nn.functional import normalize
from toy_modalities import batch, every_pattern, held, run_of, transformer

from streamcl.errors import ConfigError
from streamcl.nn.prompts import encode, presence

PATTERNS: list[dict[str, float]] = [{}, {"image": 1.0}, {"audio": 1.0}]


def cmmm(**options: Any) -> Any:
    return make("strategy", "cmmm", **{"length": 4, "epochs": 2, "batch": 32, **options})


def prompts_of(tasks: int = 1, **options: Any) -> tuple[Any, Any]:
    backbone = transformer()
    torch.manual_seed(1)
    prompts: Any = cmmm(**options).prompts_for(backbone)
    prompts.specific.data.normal_()
    for index in range(tasks):
        prompts.add(index)
    return backbone, prompts.eval()


def test_without_its_prompts_it_is_the_frozen_model() -> None:
    backbone, prompts = prompts_of(specific=False, aware="none", task="none", absent="dummy")
    assert torch.equal(encode(backbone, batch(every_pattern()), prompts), backbone(batch(every_pattern())))
    backbone.absent = "drop"
    prompts.absent = "drop"
    assert torch.equal(encode(backbone, batch(every_pattern()), prompts), backbone(batch(every_pattern())))


def test_patterns_that_differ_in_one_modality_differ_by_its_keys() -> None:
    _, prompts = prompts_of()
    composed = prompts.composed()
    assert composed.shape == (7, 4, 8)
    difference = prompts.specific[1] @ (prompts.keys[1, 0] - prompts.keys[1, 1]) / 3  # sound, missing instead of present
    torch.testing.assert_close(composed[2] - composed[0], difference)
    torch.testing.assert_close(composed[6] - composed[4], difference)
    by_hand = sum(prompts.specific[m] @ prompts.keys[m, state] for m, state in enumerate((0, 1, 1))) / 3
    torch.testing.assert_close(composed[1], by_hand)


def test_attention_weighs_the_modalities_by_their_keys() -> None:
    _, prompts = prompts_of(aware="attention")
    scores = torch.stack([prompts.keys[m, int(m != 1)] @ prompts.specific[m].mean(dim=0) / math.sqrt(8) for m in range(3)])
    by_hand = sum(weight * prompts.specific[m] for m, weight in enumerate(scores.softmax(dim=0)))
    torch.testing.assert_close(prompts.composed()[2], by_hand)


def test_each_third_of_the_layers_has_one_kind_of_prompt() -> None:
    backbone = transformer(depth=6)
    torch.manual_seed(1)
    prompts: Any = cmmm().prompts_for(backbone).eval()
    prompts.add(0)
    here = presence(batch(every_pattern()), backbone.reads)
    added = [prompts.before(layer, here) for layer in range(6)]
    assert [one is not None for one in added] == [True, False] * 3
    assert [one.drop for one in added[::2]] == [False, True, True]
    assert added[0].tokens.shape == (6, 12, 8) and torch.equal(added[0].mask[:, ::4], here), "those of present modalities"
    assert torch.equal(added[2].tokens[3], prompts.composed()[3]) and torch.equal(added[4].tokens[3], prompts.tasks[0])


def test_the_prompts_of_absent_modalities_make_no_difference_in_their_group() -> None:
    backbone, prompts = prompts_of(aware="none", task="none")
    before = encode(backbone, batch(every_pattern()), prompts)
    prompts.specific.data[0].normal_()  # the image's
    changed = ~torch.isclose(encode(backbone, batch(every_pattern()), prompts), before).all(dim=1)
    assert changed.tolist() == [True, False, True, False, True, False]


def test_memory_grows_by_one_prompt_a_task_and_earlier_ones_are_bit_equal() -> None:
    run = run_of(cmmm(), PATTERNS)
    prompts: Any = run.model.prompts
    sizes, kept = [], []
    for number in range(3):
        learn(run, 1)
        sizes.append(sum(p.numel() for p in prompts.tasks.parameters()))
        for index, before in enumerate(kept):
            assert torch.equal(prompts.tasks[index], before), f"the prompt of task {index} after task {number}"
        kept = [p.detach().clone() for p in prompts.tasks]
        assert not any(p.requires_grad for p in prompts.tasks)
    assert sizes == [32, 64, 96]
    assert [counts.tolist() for counts in prompts.counts] == [[80.0, 0, 0], [0, 0, 80], [0, 80, 0]]  # two epochs of 40 samples
    growth = 4 * (32 + 3)  # bytes: a prompt and the counts of three patterns
    assert run.memory_per_task[1] - run.memory_per_task[0] == growth == run.memory_per_task[2] - run.memory_per_task[1]


def test_a_task_s_prompt_begins_as_the_mean_of_the_earlier_ones_and_moves() -> None:
    run = run_of(cmmm(), PATTERNS)
    learn(run, 2)
    prompts: Any = run.model.prompts
    mean = torch.stack([*prompts.tasks]).mean(dim=0)
    begun(run)
    assert torch.equal(prompts.tasks[2], mean)
    assert [p.requires_grad for p in prompts.tasks] == [False, False, True]


@pytest.mark.parametrize("projections", [True, False])
def test_what_is_frozen_is_bit_equal_after_three_tasks(projections: bool) -> None:
    run = run_of(cmmm(projections=projections), PATTERNS)
    before = held(run.model.backbone)
    learn(run, 3)
    moved = {name.partition(".")[0] for name, value in run.model.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == ({"encoders"} if projections else set())


def test_in_serving_a_pattern_gets_the_prompt_of_its_task_and_a_new_one_the_mean() -> None:
    _, prompts = prompts_of(tasks=3)
    for prompt in prompts.tasks:
        prompt.data.normal_()
    for task, pattern, count in ((0, 0, 10), (0, 1, 30), (1, 1, 5), (2, 2, 7)):
        prompts.counts[task].data[pattern] = count
    found = prompts.looked_up()
    assert torch.equal(found[0], prompts.tasks[0]) and torch.equal(found[2], prompts.tasks[2])
    assert torch.equal(found[1], prompts.tasks[1]), "all of task 1 had it, and three quarters of task 0"
    torch.testing.assert_close(found[5], (prompts.tasks[0] + prompts.tasks[1] + prompts.tasks[2]) / 3)
    prompts.train()
    prompts.begin(0)
    assert torch.equal(prompts.task_specific(torch.ones(2, 3, dtype=torch.bool)).tokens[1], prompts.tasks[0]), (
        "the task at hand learns its own"
    )


def test_the_contrast_by_hand() -> None:
    _, prompts = prompts_of(tasks=4)
    for task, pattern in enumerate((0, 1, 6)):  # complete; image missing; sound and text missing
        prompts.counts[task].data[pattern] = 5
    prompts.begin(3)
    here = torch.tensor([[False, True, True]] * 2)  # image missing again
    rows = normalize(prompts.composed().mean(dim=1), dim=1)
    cosines = torch.stack([rows[1] @ rows[pattern] for pattern in (0, 1, 6)]) / 0.1
    # alike: 2/3 with complete, 1 with itself, 0 with the image alone
    by_hand = -(cosines[0] + cosines[1]) / 2 + cosines.exp().sum().log()
    torch.testing.assert_close(prompts.interaction(here, 0.1), by_hand)
    loss = prompts.interaction(here, 0.1)
    loss.backward()
    assert prompts.keys.grad.any() and prompts.specific.grad.any() and all(p.grad is None for p in prompts.tasks)


def test_a_task_of_several_patterns_is_described_by_its_shares() -> None:
    _, prompts = prompts_of(tasks=2)
    prompts.counts[0].data[0], prompts.counts[0].data[1] = 3, 1
    prompts.begin(1)
    found = prompts.interaction(torch.tensor([[True, True, True]]), 0.1)
    assert float(found.detach()) == pytest.approx(0, abs=1e-6), "of one other task alone there is nothing to tell apart"
    prompts.add(2)
    prompts.counts[1].data[3] = 2
    prompts.begin(2)
    rows = normalize(torch.stack([0.75 * a + 0.25 * b for a, b in [(prompts.composed()[0].mean(0), prompts.composed()[1].mean(0))]]), dim=1)
    other, now = (normalize(prompts.composed()[code].mean(0), dim=0) for code in (3, 4))
    cosines = torch.stack([rows[0] @ now, other @ now]) / 0.5
    # image 0.75, sound 1, text 1 against image, sound: (0.75 + 1) / (1 + 1 + 1) >= 1/2; text alone: 0
    found = prompts.interaction(torch.tensor([[True, True, False]]), 0.5)
    torch.testing.assert_close(found, -cosines.log_softmax(dim=0)[0])


def test_the_loss_has_the_contrast_with_its_weight_and_not_before_the_second_task() -> None:
    run = run_of(cmmm(contrast=0.7), PATTERNS)
    strategy = run.strategy
    for number in range(3):
        task = begun(run)
        raw = run.context.prepare(task.train[torch.arange(8)], train=False)
        here = presence(raw, strategy.transformer.reads)
        loss = strategy.loss(raw)
        plain = torch.nn.functional.cross_entropy(run.model(raw), raw.target)
        contrast = strategy.prompts.interaction(here, 0.1)
        assert (contrast is None) == (number == 0)
        torch.testing.assert_close(loss, plain if contrast is None else plain + 0.7 * contrast)
        run.context.task = None


def test_an_absent_modality_is_dropped_or_has_a_learned_token() -> None:
    backbone, dropped = prompts_of()
    _, placed = prompts_of(absent="placeholder")
    given = batch(every_pattern())
    here = presence(given, backbone.reads)
    made = backbone.embed(given, here)
    found = placed.embed(made, here)
    placed.placeholder.data.normal_()
    assert found.masks["image"][1].tolist() == [True] + [False] * 15 and found.masks["image"][0].all()
    assert torch.equal(placed.embed(made, here).tokens["image"][1, 0], placed.placeholder[0])
    assert torch.equal(placed.embed(made, here).tokens["image"][0], made.tokens["image"][0])
    assert dropped.absent == "drop" and placed.absent == "dummy" and dropped.embed(made, here) is made


@pytest.mark.parametrize("task", ["shared", "none"])
def test_a_shared_prompt_is_one_and_none_is_none(task: str) -> None:
    run = run_of(cmmm(task=task), PATTERNS)
    learn(run, 1)
    prompts: Any = run.model.prompts
    assert len(prompts.tasks) == (task == "shared")
    before = [p.detach().clone() for p in prompts.tasks]
    learn(run, 1)
    assert all(not torch.equal(p, q) for p, q in zip(prompts.tasks, before, strict=True)) and len(prompts.tasks) == len(before)


def test_how_far_shared_prompts_drift_is_logged() -> None:
    run = run_of(cmmm(), PATTERNS)
    before = run.model.prompts.shared()  # type: ignore[union-attr, operator]
    learn(run, 1)
    moved = (run.model.prompts.shared() - before).norm() / before.norm()  # type: ignore[union-attr, operator]
    assert float(run.context.logged["drift"]) == pytest.approx(float(moved)) and moved > 0
    assert run.strategy.state()["before_drift"] is None, "nothing of it is kept"


def test_prompts_are_a_small_share_counted_by_hand() -> None:
    run = run_of(cmmm(projections=False), PATTERNS)
    begun(run)
    learning = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert learning == 2 * 4 * 8 + 2 * 2 * 64 + 4 * 8 + (8 * 10 + 10)  # P, K, T and the head


@pytest.mark.parametrize(
    ("options", "depth", "message"),
    [({}, 2, "three kinds of prompts, and the transformer has 2: 3 are needed"), ({"replay": 8}, 3, r"set strategy\.replay=0")],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], depth: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(cmmm(**options), PATTERNS, depth=depth)
