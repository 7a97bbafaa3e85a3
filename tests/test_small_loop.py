"""Learning by reinforcement with models that are no language models: what a step is, what it must not change, and how it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import comparable
from streamcl.strategies.sessions.learners._loop import disordered
from streamcl.strategies.sessions.learners._rollouts import Rollouts
from test_every_stop import stop_after
from torch import Tensor, nn

from streamcl.config import EngineConfig
from streamcl.data import ArrayDataset
from streamcl.engine import Engine
from streamcl.errors import ConfigError, Interrupted, PluginError, TrainingError
from streamcl.events import Event, Events, Sink
from streamcl.nn.backbone import Backbone
from streamcl.nn.model import Model
from streamcl.plugins import find
from streamcl.run_folder import RunFolder
from streamcl.stream import Batch, Column, Modality, Source, SourceData, StreamInfo, Task
from streamcl.verifier import Verifier

SGD = {"name": "sgd", "lr": 0.1}
SMALL: dict[str, Any] = {"steps": 6, "prompts": 8, "group": 4, "optimizer": SGD}


def make(kind: str, name: str, **options: Any) -> Any:
    return find(kind, name).load()(**options)


def kind(name: str) -> Any:
    return find("learner", name).load()


def run(learner: Any, folder: Path | None = None, *, source: Any = None, backbone: Any = None, tasks: int = 2, **session: Any) -> Engine:
    strategy = make("strategy", "sequential", learner=learner, **session)
    stream = make("scenario", "class_incremental", data=source or make("source", "digits"), tasks=tasks)
    model, memory = backbone or make("backbone", "mlp", hidden=[16]), make("memory", "faiss", exemplars=40)
    if folder is not None:
        folder.mkdir(exist_ok=True)
    kept = None if folder is None else RunFolder(folder)
    return Engine(stream, strategy, model, memory, seed=5, engine=EngineConfig(device="cpu", threads=1), folder=kept)


def sessions(engine: Engine, count: int = 1) -> Engine:
    """The engine after its first sessions, without scoring."""
    for _ in range(count):
        task = engine._next_task()
        assert task is not None
        engine._learn(task)
        engine.context.task = None
    return engine


def weights(engine: Engine) -> Tensor:
    return nn.utils.parameters_to_vector(engine.model.parameters()).detach()


def watched(base: Any) -> Any:
    """A learner that keeps what it saw."""

    class Watched(base):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.seen: list[Rollouts] = []
            self.parts: list[dict[str, Tensor]] = []

        def shaped(self, rollouts: Rollouts) -> Tensor:
            self.seen.append(rollouts)
            return super().shaped(rollouts)

        def loss(self, policy: Tensor, old: Tensor, advantages: Tensor, *rest: Any) -> Tensor:
            self.parts.append({"policy": policy.detach(), "old": old, "advantages": advantages})
            return super().loss(policy, old, advantages, *rest)

    return Watched


class Answers(Verifier):
    """Judges the class's name by a table; NaN where the right answer is not in it."""

    def __init__(self, table: Mapping[str, float] | None = None, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.table = table

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        if self.table is not None:
            return torch.tensor([self.table.get(answer, math.nan) for answer in answers])
        return torch.tensor([float(answer == right) for answer, right in zip(answers, rows["answer"], strict=True)])


# One step -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "rloo", "apo", "observe_r1", "trust_grpo"])
def test_one_update_without_a_reference_is_a_step_of_reinforce(name: str) -> None:
    learner = watched(kind(name))(**{**SMALL, "steps": 1}, updates=1, beta=0.0, clip=None)
    engine = run(learner)
    asked: list[Batch] = []
    prepare = engine.context.prepare
    engine.context.prepare = lambda raw, train=True: asked.append(prepare(raw, train)) or asked[-1]  # type: ignore
    task = engine._next_task()
    assert task is not None
    engine.model.grow(max(task.seen) + 1)
    before, twin = weights(engine), engine.model.copy().requires_grad_(True)
    engine._learn(task)
    rewards, ratio = learner.seen[0].rewards[:, 0], learner.parts[0]
    lp = twin(asked[0]).log_softmax(dim=1)
    actions = (lp.detach().repeat_interleave(4, dim=0) - ratio["old"]).abs().argmin(dim=1)
    assert torch.equal(rewards, (actions == asked[0].target.repeat_interleave(4)).float())  # type: ignore[union-attr]
    spoken = lp.repeat_interleave(4, dim=0).gather(1, actions[:, None])[:, 0]
    loss = -(ratio["advantages"].flatten() * spoken).mean()
    gradient = nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(twin.parameters())))
    assert gradient.abs().max() > 0
    assert torch.allclose(weights(engine) - before, -0.1 * gradient, atol=1e-7)


def test_answers_are_drawn_as_often_as_they_are_likely() -> None:
    learner = watched(kind("grpo"))(**{**SMALL, "steps": 1, "group": 4000, "prompts": 2}, temperature=0.5)
    engine = run(learner)
    asked: list[Batch] = []
    prepare = engine.context.prepare
    engine.context.prepare = lambda raw, train=True: asked.append(prepare(raw, train)) or asked[-1]  # type: ignore
    task = engine._next_task()
    assert task is not None
    engine.model.grow(max(task.seen) + 1)
    twin = engine.model.copy()
    engine._learn(task)
    lp = (twin(asked[0]) / 0.5).log_softmax(dim=1)
    old = learner.parts[0]["old"].view(2, 4000, 1)
    often = ((old - lp[:, None]).abs() < 1e-5).float().mean(dim=1)
    assert (often - lp.exp()).abs().max() < 0.03
    assert often.sum(dim=1).tolist() == pytest.approx([1, 1], abs=1e-3)


def test_rare_answers_are_left_out_where_they_are_to_be() -> None:
    learner = kind("grpo")(**{**SMALL, "top_p": 0.7})
    run(learner)
    chances = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.05, 0.05, 0.1, 0.8]])
    drawn = learner.session._drawn(chances.log(), 4000).view(2, 4000)
    assert set(drawn[0].tolist()) == {1, 3} and set(drawn[1].tolist()) == {3}
    assert (drawn[0] == 1).double().mean().item() == pytest.approx(2 / 3, abs=0.03)


def test_a_loss_that_is_no_number_stops_before_it_is_learned() -> None:
    class Endless(kind("grpo")):  # type: ignore[misc]
        def advantages(self, rollouts: Rollouts, earned: Tensor) -> Tensor:
            return torch.full_like(earned, math.nan)

    engine = run(Endless(**SMALL))
    with pytest.raises(TrainingError, match="the loss is nan at update 1"):
        sessions(engine)
    assert weights(engine).isfinite().all()


def test_a_reward_that_fails_is_named() -> None:
    class Raising(Verifier):
        def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
            raise ZeroDivisionError("of nothing")

    with pytest.raises(PluginError, match="the reward Raising failed: ZeroDivisionError: of nothing"):
        sessions(run(kind("grpo")(**SMALL, rewards=(Raising(),))))
    with pytest.raises(PluginError, match="the reward Raising failed"):
        sessions(run(kind("trust_grpo")(**SMALL, reward_model=Raising())))


def test_several_updates_go_through_each_answer_once_and_the_ratio_moves() -> None:
    learner = watched(kind("apo"))(**{**SMALL, "steps": 7, "optimizer": {"name": "sgd", "lr": 1.0}}, updates=4, beta=0.0, lambda_=1.0)
    engine = sessions(run(learner))
    assert [len(part["old"]) for part in learner.parts] == [8] * 7
    assert len(learner.seen) == 2
    first = learner.parts[:4]
    drawn = torch.cat([part["advantages"] for part in first])
    assert torch.equal(drawn.sort().values, learner.advantages(learner.seen[0], learner.seen[0].rewards[:, 0]).sort().values)
    assert torch.allclose(first[0]["policy"], first[0]["old"], atol=1e-6)
    assert not torch.allclose(first[3]["policy"], first[3]["old"], atol=1e-3)
    assert learner.session.done == 7 and engine.context.steps == 2


# Equalities ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 3])
def test_apo_without_its_weights_is_grpo_to_the_bit(updates: int) -> None:
    options = {**SMALL, "updates": updates, "beta": 0.5, "aggregation": "token"}
    plain = kind("grpo")(**options)
    plain.spread = 1e-9
    same = kind("apo")(**options, lambda_=1.0, dads=False, schedule={"name": "constant"})
    assert torch.equal(weights(sessions(run(plain), 2)), weights(sessions(run(same), 2)))


def test_twice_the_weights_are_twice_the_beta_to_the_bit() -> None:
    class Doubled(kind("apo")):  # type: ignore[misc]
        def kl_weights(self, rollouts: Rollouts, advantages: Tensor) -> Tensor:
            return torch.full_like(advantages, 2.0)

    ones = kind("apo")(**SMALL, updates=2, beta=1.0, dads=False)
    twos = Doubled(**SMALL, updates=2, beta=0.5)
    assert torch.equal(weights(sessions(run(ones), 2)), weights(sessions(run(twos), 2)))


def test_trust_without_weight_on_the_thinking_is_grpo_to_the_bit() -> None:
    plain = kind("grpo")(**SMALL, beta=0.04)
    plain.spread = 1e-6
    none = kind("trust_grpo")(**SMALL, beta=0.04, alpha=0.0, aggregation="sequence", clip=1.0)
    assert torch.equal(weights(sessions(run(plain))), weights(sessions(run(none))))


def test_rewards_by_name_are_those_by_number() -> None:
    named = kind("grpo")(**SMALL, rewards=(Answers(),))
    assert torch.equal(weights(sessions(run(named))), weights(sessions(run(kind("grpo")(**SMALL)))))


# What must not move -------------------------------------------------------------------------------------------------------------------


class Hears(Sink):
    def __init__(self) -> None:
        self.told: list[str] = []

    def write(self, event: Event) -> None:
        if event.kind == "warning":
            self.told.append(event.fields["message"])


@pytest.mark.parametrize("value", [0.0, 1.3, math.nan])
@pytest.mark.parametrize("name", ["grpo", "rloo", "apo", "observe_r1", "trust_grpo"])
def test_rewards_that_are_all_equal_or_missing_change_nothing(name: str, value: float) -> None:
    learner = kind(name)(**{**SMALL, "steps": 25}, updates=1, beta=0.0, rewards=(Answers(dict.fromkeys(map(str, range(10)), value)),))
    engine, heard = run(learner), Hears()
    engine.context.events = Events([heard])
    task = engine._next_task()
    assert task is not None
    engine.model.grow(max(task.seen) + 1)
    before = weights(engine)
    engine._learn(task)
    assert torch.equal(weights(engine), before)
    assert len(heard.told) == 1 and ("no reward says anything" if math.isnan(value) else "no group has variance") in heard.told[0]


def test_a_flat_reward_still_holds_on_to_the_reference() -> None:
    equal = Answers(dict.fromkeys(map(str, range(10)), 1.0))
    learner = watched(kind("grpo"))(**{**SMALL, "steps": 60}, beta=1.0, rewards=(equal,))
    engine = run(learner)
    task = engine._next_task()
    assert task is not None
    engine.context.begin(task, {})
    learner.session._enter(engine.model, task)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.3)
    learner.fit(engine.model, task, engine.context)
    far = [float((seen.drift.expm1() - seen.drift).mean()) for seen in learner.seen]
    assert sum(far[-10:]) < 0.5 * sum(far[:10])


def test_what_is_not_judged_is_left_out_of_the_figures() -> None:
    half = Answers({"0": 1.0, "1": 0.0, "2": 1.0, "3": 0.0})
    learner = watched(kind("grpo"))(**SMALL, rewards=(half,))
    report = sessions(run(learner)).strategy.learner.session  # type: ignore[attr-defined]
    every = [seen.rewards[:, 0].nanmean() for seen in learner.seen]
    total, count = report.sums["reward"]
    assert count == 6 and total == pytest.approx(float(torch.stack(every).sum()))


# References ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["base", "previous"])
def test_the_reference_is_the_policy_of_then_and_classes_that_came_later_begin_alike(reference: str) -> None:
    learner = watched(kind("rloo"))(**SMALL, beta=1e-6)
    engine = run(learner, reference=reference)
    sessions(engine)
    assert torch.equal(learner.seen[0].drift, torch.zeros(32, 1))
    trained = weights(engine)
    task = engine._next_task()
    assert task is not None
    rows = len(engine.model.head.weight)
    engine.context.begin(task, {})
    learner.session._enter(engine.model, task)
    kept = learner.session.reference
    assert kept.classes == engine.model.classes == 10 > rows
    assert torch.equal(kept.head.weight[rows:], engine.model.head.weight[rows:])
    first = torch.cat([p.detach().flatten() for p in kept.backbone.parameters()])
    assert torch.equal(first, trained[: len(first)]) is (reference == "previous")
    assert all(not p.requires_grad for p in kept.parameters())


def test_without_a_divergence_no_reference_is_kept() -> None:
    engine = sessions(run(kind("grpo")(**SMALL, beta=0.0)))
    assert engine.strategy.learner.session.reference is None  # type: ignore[attr-defined]


# Going on -----------------------------------------------------------------------------------------------------------------------------

STOPPED: dict[str, Any] = {
    "grpo, reference base": lambda: (kind("grpo")(**SMALL, beta=0.1), {"reference": "base"}),
    "apo, several updates": lambda: (
        kind("apo")(**{**SMALL, "optimizer": {"name": "adam", "lr": 0.01}}, updates=2, beta=0.1),
        {"reference": "previous"},
    ),
    "trust over the stream": lambda: (kind("trust_grpo")(**SMALL, beta=0.1, anneal_scope="stream"), {"reference": "base"}),
}


@pytest.mark.parametrize("case", list(STOPPED))
def test_a_session_may_be_stopped_anywhere_and_goes_on_to_the_bit(case: str, tmp_path: Path) -> None:
    def build(folder: Path) -> Engine:
        learner, session = STOPPED[case]()
        return run(learner, folder, **session)

    whole = build(tmp_path / "whole")
    places = stop_after(whole, -1)
    scores = whole.run()
    figures = whole.strategy.learner.session.sums  # type: ignore[attr-defined]
    assert places[0] > 6
    for place in range(1, places[0] + 1, 1 if "updates" in case else 5):
        folder = tmp_path / str(place)
        stopped = build(folder)
        stop_after(stopped, place)
        with pytest.raises(Interrupted):
            stopped.run()
        engine = build(folder)
        again = engine.run(resume=True)
        assert comparable(again) == comparable(scores)
        assert torch.equal(weights(engine), weights(whole))
        assert engine.strategy.learner.session.sums == figures  # type: ignore[attr-defined]


def test_a_session_that_was_over_is_not_learned_again() -> None:
    learner = kind("grpo")(**SMALL)
    engine = run(learner)
    task = engine._next_task()
    assert task is not None
    engine.context.begin(task, {})
    report = learner.fit(engine.model, task, engine.context)
    after = weights(engine)
    assert learner.fit(engine.model, task, engine.context) == report
    assert torch.equal(weights(engine), after)
    assert report.figures["updates"] == 6 and 0 < report.figures["entropy"] <= math.log(5)


# Learning -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_prompts_come_in_the_order_of_a_task_that_has_one(ordered: bool) -> None:
    engine = run(kind("grpo")(**SMALL))
    task = engine._next_task()
    assert task is not None
    task.about["ordered"] = ordered
    asked: list[Tensor] = []
    prepare = engine.context.prepare
    engine.context.prepare = lambda raw, train=True: asked.append(raw.ids) or prepare(raw, train)  # type: ignore
    engine._learn(task)
    assert torch.equal(torch.cat(asked), task.train.ids[:48]) is ordered


@pytest.mark.parametrize("name", ["grpo", "rloo", "apo", "observe_r1", "trust_grpo"])
def test_each_learns_which_digit_it_is(name: str) -> None:
    options = {"steps": 60, "prompts": 32, "group": 8, "optimizer": {"name": "adam", "lr": 0.01}}
    learner = watched(kind(name))(**options, updates=1)
    sessions(run(learner, tasks=5), 2)
    earned = [float(seen.outcome.mean()) for seen in learner.seen]
    for first in (0, 60):
        assert sum(earned[first + 50 : first + 60]) / 10 > 0.9


# Frames -------------------------------------------------------------------------------------------------------------------------------


class Frames(Backbone):
    """Reads the frames side by side, in their order."""

    def build(self, info: StreamInfo) -> None:
        self.dim = 64
        self.layers = nn.Sequential(nn.Linear(math.prod(info.modalities["clip"].shape), self.dim), nn.ReLU())

    def forward(self, batch: Batch) -> Tensor:
        return self.layers(batch.inputs["clip"].flatten(1))  # type: ignore[union-attr]


class Clips(Source):
    """Clips of three frames, each of one pixel: which of them is lit (order matters), or how bright the lit one is (it does not)."""

    def __init__(self, ordered: bool) -> None:
        self.ordered = ordered

    def load(self) -> SourceData:
        draw = torch.Generator().manual_seed(0)
        place, bright = (torch.randint(3, (240,), generator=draw) for _ in range(2))
        clips = torch.zeros(240, 3, 1, 1, 1)
        clips[torch.arange(240), place] = 1 + bright.float()[:, None, None, None]
        ids, target = torch.arange(240), place if self.ordered else bright
        train, test = (ArrayDataset({"clip": clips[rows]}, target[rows], ids[rows]) for rows in (ids[:180], ids[180:]))
        return SourceData(train, test, ["a", "b", "c"], {"clip": Modality("video", (3, 1, 1, 1))})


def test_a_bonus_for_order_separates_only_where_order_tells() -> None:
    last = {}
    for ordered in (True, False):
        learner = watched(kind("t_grpo"))(steps=150, prompts=24, optimizer={"name": "adam", "lr": 0.02}, beta=0.0)
        sessions(run(learner, source=Clips(ordered), backbone=Frames(), tasks=1))
        tail = learner.seen[-20:]
        figures = [learner.figures(seen) for seen in tail]
        last[ordered] = [sum(f[name] for f in figures) / len(figures) for name in ("ordered", "shuffled")]
    assert last[True][0] > 0.9 and last[True][1] < 0.6
    assert last[False][0] > 0.9 and last[False][1] > 0.6


def test_nothing_is_learned_from_shuffled_frames() -> None:
    """With what they are worth held fixed, what the policy says to them makes no difference."""
    ends = []
    for noise in (0.0, 100.0):
        learner = kind("t_grpo")(steps=3, prompts=8, optimizer=SGD, beta=0.0)
        engine = run(learner, source=Clips(True), backbone=Frames(), tasks=1)
        session = learner.session
        shuffled = session._shuffled

        def fixed(model: Model, raw: Batch, batch: Batch, task: Task, shuffled: Any = shuffled, noise: float = noise) -> Tensor:
            clip: Any = batch.inputs["clip"]
            found: Tensor = shuffled(model, raw, batch.replace(inputs={"clip": clip + noise}), task)
            return torch.full_like(found, 0.5)

        session._shuffled = fixed
        ends.append(weights(sessions(engine)))
    assert torch.equal(ends[0], ends[1])


def test_frames_are_never_left_in_their_order() -> None:
    order = disordered(4000, 3, torch.Generator().manual_seed(0))
    numbers = (order * torch.tensor([9, 3, 1])).sum(dim=1)
    counts = numbers.unique(return_counts=True)[1]
    assert len(counts) == 5 and (counts - 800).abs().max() < 120  # all orders but the given one, equally often
    assert (order.sort(dim=1).values == torch.arange(3)).all()


# What is refused ----------------------------------------------------------------------------------------------------------------------


def test_what_has_no_frames_is_not_shuffled() -> None:
    with pytest.raises(ConfigError, match="frames in random order, and this stream has no modality of kind video"):
        run(kind("t_grpo")())


def test_a_stream_that_is_read_once_has_no_second_epoch() -> None:
    learner = kind("grpo")(**{**SMALL, "steps": 1000})
    engine = run(learner)
    task = engine._next_task()
    assert task is not None
    learner.session.info = StreamInfo(engine.info.modalities, passes=1)
    with pytest.raises(ConfigError, match="take fewer steps"):
        learner.check(task)
    learner.steps = len(task.train) // 8
    learner.check(task)


def test_a_target_that_is_no_class_is_refused() -> None:
    learner = kind("grpo")()
    engine = run(learner)
    with pytest.raises(ConfigError, match="the target of this stream is value"):
        learner.session.start(StreamInfo(engine.info.modalities, target="value"), engine.context)


@pytest.mark.parametrize("option", [{"vllm": True}, {"at_once": 2}])
def test_options_of_language_models_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="belong to models that answer in words"):
        run(kind("grpo")(**option))


def test_an_unknown_reference_is_refused() -> None:
    learner = kind("grpo")()
    engine = run(learner)
    learner.reference = "teacher"
    with pytest.raises(ConfigError, match="keeps base and previous"):
        learner.session.start(engine.info, engine.context)
