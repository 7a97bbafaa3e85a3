"""The training loop: what it promises to methods and terms, checked against loops written by hand."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from small_runs import small_run
from test_strategies import engine, learn, make, prepared
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamcl import running
from streamcl.config import EngineConfig, EvaluateConfig
from streamcl.data import ArrayDataset
from streamcl.engine import Engine
from streamcl.errors import PluginError
from streamcl.events import Event, Events, Sink
from streamcl.options import Optimizer, Schedule
from streamcl.plugins import find
from streamcl.seeding import generator
from streamcl.strategy import GradientStrategy, Term, learning_rate_factor, make_optimizer
from streamcl.stream import Batch, Modality, Source, SourceData, Task


class Plain(GradientStrategy):
    """Nothing but the loop."""


def by_hand(run: Engine, task: Task, epochs: int, size: int, optimizer: torch.optim.Optimizer, accumulate: int = 1) -> None:
    """What the loop does, written out."""
    for epoch in range(epochs):
        order = torch.randperm(len(task.train), generator=generator(0, "order", task.index, "train", epoch))
        parts = order.split(size)
        for step, chosen in enumerate(parts, 1):
            batch = prepared(run, task.train[chosen])
            group = min(accumulate, len(parts) - (step - 1) // accumulate * accumulate)  # the last group may be a smaller one
            (cross_entropy(run.model(batch), batch.target) / group).backward()
            if step % accumulate == 0 or step == len(parts):
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loop_is_the_loop_one_would_write(accumulate: int) -> None:
    twin = engine(Plain())
    task = twin._next_task()
    assert task is not None
    twin.model.grow(2)
    by_hand(twin, task, 3, 32, torch.optim.Adam(twin.model.parameters(), lr=0.01, fused=True), accumulate)
    run = engine(Plain(epochs=3, batch=32, accumulate=accumulate, optimizer=Optimizer(name="adam", lr=0.01)))
    learn(run, 1)
    for ours, theirs in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_clipping_bounds_the_step() -> None:
    before: list[Tensor] = []

    class Watch(Term):
        def before_task(self, task: Task) -> None:
            before.extend(p.detach().clone() for p in self.strategy.model.parameters())

    run = engine(Plain(epochs=1, batch=400, clip=1e-3, optimizer={"lr": 1.0}, with_=(Watch(),)))
    learn(run, 1)
    moved = sum(((p.detach() - b) ** 2).sum() for p, b in zip(run.model.parameters(), before, strict=True))
    assert math.sqrt(float(moved)) == pytest.approx(1e-3, rel=1e-3)


def test_stages_train_the_first_task_differently() -> None:
    seen: list[tuple[int, int, float]] = []

    class Watch(Term):
        def after_step(self, batch: Batch) -> None:
            optimizer = self.strategy.optimizer
            seen.append((self.strategy.context.task.index, len(batch), optimizer.param_groups[0]["lr"]))

    stages = {"first": {"epochs": 2, "batch": 100, "optimizer": {"lr": 0.3}}, "later": {"epochs": 1, "batch": 50}}
    learn(engine(Plain(epochs=9, batch=9, optimizer={"lr": 0.1}, stages=stages, with_=(Watch(),))), 2)
    first, later = [s for s in seen if s[0] == 0], [s for s in seen if s[0] == 1]
    assert {s[2] for s in first} == {0.3} and max(s[1] for s in first) == 100 and len(first) == 2 * 3
    assert {s[2] for s in later} == {0.1} and max(s[1] for s in later) == 50


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"name": "constant"}, [1, 1, 1, 1]),
        ({"name": "steps", "milestones": (1, 3), "gamma": 0.1}, [1, 0.1, 0.1, 0.01]),
        ({"name": "steps", "milestones": (0.5,), "gamma": 0.2}, [1, 1, 0.2, 0.2]),
        ({"name": "cosine"}, [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]),
        ({"name": "linear", "end": 0.2}, [1, 0.8, 0.6, 0.4]),
        ({"name": "linear", "warmup": 2}, [1 / 3, 2 / 3, 1, 0.5]),
    ],
)
def test_learning_rates_over_four_epochs(schedule: dict, factors: list[float]) -> None:
    settings = Schedule.model_validate(schedule)
    assert [learning_rate_factor(settings, epoch, 4) for epoch in range(4)] == pytest.approx(factors)


def test_optimisers_by_name_take_their_own_arguments() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    sgd = make_optimizer(weights, Optimizer(lr=0.5, momentum=0.9, nesterov=True))
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["nesterov"] and sgd.defaults["momentum"] == 0.9
    assert isinstance(make_optimizer(weights, Optimizer(name="adamw", betas=(0.8, 0.9))), torch.optim.AdamW)
    with pytest.raises(ValueError, match="adam takes no momentum"):
        Optimizer(name="adam", momentum=0.9)


class Decay(Term):
    """Half the squared norm of the weights, as a term: its effect on a step of SGD is known."""

    def __init__(self, *, strength: float = 1.0) -> None:
        self.strength, self.tasks = strength, 0

    def loss(self, batch: Batch) -> Tensor:
        return self.strength / 2 * sum((p**2).sum() for p in self.strategy.model.parameters())

    def after_task(self, task: Task) -> None:
        self.tasks += 1

    def state(self) -> dict[str, Any]:
        return {"tasks": self.tasks}

    def restore(self, state: Any) -> None:
        self.tasks = state["tasks"]


def test_a_term_adds_its_loss_to_any_strategy() -> None:
    carried = engine(Plain(epochs=2, batch=64, optimizer={"lr": 0.1}, with_=(Decay(strength=0.2),)))
    learn(carried, 2)
    decayed = engine(Plain(epochs=2, batch=64, optimizer={"lr": 0.1, "weight_decay": 0.2}))
    learn(decayed, 2)
    for ours, theirs in zip(carried.model.parameters(), decayed.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert carried.strategy.terms[0].tasks == 2


def test_a_terms_state_travels_with_the_strategys() -> None:
    carried = engine(Plain(epochs=1, batch=64, with_=(Decay(),)))
    learn(carried, 2)
    fresh = engine(Plain(epochs=1, batch=64, with_=(Decay(),)))
    fresh.strategy.restore(carried.strategy.state())
    assert fresh.strategy.terms[0].tasks == 2


def test_a_term_sees_the_logits_and_the_gradients_of_the_step() -> None:
    seen: list[bool] = []

    class Watch(Term):
        def loss(self, batch: Batch) -> None:
            strategy = self.strategy
            seen.append(strategy.logits is not None and strategy.logits.shape == (len(batch), strategy.model.classes))
            seen.append(torch.equal(strategy.model.head(strategy.features), strategy.logits))

        def after_backward(self, batch: Batch) -> None:
            seen.append(all(p.grad is not None for p in self.strategy.model.parameters()))

    learn(engine(Plain(epochs=1, batch=100, with_=(Watch(),))), 1)
    assert seen and all(seen)


def test_a_term_with_a_criterion_replaces_the_strategys() -> None:
    class Zero(Term):
        @staticmethod
        def criterion(logits: Tensor, target: Tensor) -> Tensor:
            return logits.sum() * 0.0

    run = engine(Plain(epochs=1, batch=64, with_=(Zero(),)))
    before = [p.detach().clone() for p in run.model.backbone.parameters()]
    learn(run, 1)
    assert all(torch.equal(p, b) for p, b in zip(run.model.backbone.parameters(), before, strict=True))


def test_early_stopping_keeps_the_best_weights() -> None:
    accuracies = iter([0.5, 0.9, 0.4, 0.3, 0.95])
    kept: list[dict[str, Tensor]] = []

    class Scripted(Plain):
        def validate(self, data: Any) -> float:
            kept.append({name: value.clone() for name, value in self.model.state_dict().items()})
            return next(accuracies)

    run = engine(Scripted(epochs=10, batch=64, patience=2), validation=0.2)
    learn(run, 1)
    assert len(kept) == 4  # the best was the second; two worse ones ended it
    assert all(torch.equal(value, kept[1][name]) for name, value in run.model.state_dict().items())


def test_early_stopping_goes_by_losses_of_any_size() -> None:
    """Values in the hundreds: the loss is far above 1 for all the epochs in which there is something to learn."""
    kept: list[float] = []

    class Watched(Plain):
        def validate(self, data: Any) -> float:
            kept.append(super().validate(data))
            return kept[-1]

    class Tall(Source):
        def load(self) -> SourceData:
            x = torch.rand(120, 4, generator=torch.Generator().manual_seed(0))
            data = ArrayDataset({"vector": x}, 300 + 100 * x[:, 0])
            return SourceData(data, data, [], {"vector": Modality("vector", (4,))}, target="value")

    stream = make("scenario", "missing_modality", data=Tall(), missing=[{}], validation=0.2)
    strategy = Watched(epochs=12, batch=16, patience=2, optimizer={"lr": 1e-3})
    run = Engine(stream, strategy, make("backbone", "identity"), engine=EngineConfig(device="cpu"))
    learn(run, 1)
    assert len(kept) == 12 and kept == sorted(kept) and kept[0] < -1000
    assert strategy.validate(run.tasks[0].validation) == kept[-1]


def test_bfloat16_learns_and_leaves_the_weights_in_float32() -> None:
    stream = make("scenario", "class_incremental", data=make("source", "digits"), tasks=2)
    settings = EngineConfig(device="cpu", precision="bfloat16", threads=1)
    run = Engine(stream, make("strategy", "er", epochs=5), make("backbone", "mlp"), engine=settings)
    scores = run.run()
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert scores["final"] > 0.7 and scores["resume"]["kind"] == "statistical"


def test_growing_keeps_the_old_rows_bit_for_bit() -> None:
    run = engine(Plain(epochs=1, batch=64))
    learn(run, 1)
    before = run.model.head.weight.detach().clone()
    run.model.grow(7)
    assert torch.equal(run.model.head.weight[:2], before) and run.model.classes == 7


def test_any_time_scores_are_taken_within_tasks_and_change_nothing() -> None:
    def scores(**evaluate: Any) -> dict[str, Any]:
        stream = make("scenario", "class_incremental", data=make("source", "digits"), tasks=2)
        strategy, backbone = make("strategy", "er", epochs=1, batch=10), make("backbone", "mlp")
        return Engine(stream, strategy, backbone, engine=EngineConfig(device="cpu"), evaluate=EvaluateConfig(**evaluate)).run()

    scored, unscored = scores(every={"samples": 100}), scores()
    assert scored["any_time"] is not None and unscored["any_time"] is None
    assert scored["matrix"] == unscored["matrix"]


def test_an_error_in_a_strategy_shows_its_author_their_own_lines(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "from streamcl.strategy import GradientStrategy\n\n\n"
        "class Mine(GradientStrategy):\n    def loss(self, batch):\n        return batch.missing\n"
    )
    config = {
        "scenario": {"name": "class_incremental", "data": "digits", "tasks": 2},
        "strategy": f"{tmp_path}/mine.py:Mine",
        "model": {"backbone": "mlp"},
        "log": [],
    }
    assert find("strategy", f"{tmp_path}/mine.py:Mine").options["epochs"].default == 1
    with pytest.raises(PluginError, match=r"has no attribute 'missing'") as failure:
        running.run(config, out=tmp_path / "run")
    assert f"{tmp_path}/mine.py:6 in loss: return batch.missing" in str(failure.value)
    assert "streamcl/strategy.py" not in str(failure.value) and failure.value.exit_code == 2


@pytest.mark.parametrize("term", ["alone", "with"])
@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("self.forward(batch).sum()", "None"),
        ("return 0.5", "a float"),
        ("return self.forward(batch)", r"a tensor of shape \(32, 2\)"),
        ("return self.forward(batch).sum().detach()", r"a tensor without a graph"),
    ],
)
def test_a_loss_that_cannot_be_trained_with_is_told_with_its_file_and_class(body: str, what: str, term: str, tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "from streamcl.strategy import GradientStrategy, Term\n\n\n"
        f"class Mine(GradientStrategy):\n    def loss(self, batch):\n        {body}\n\n\n"
        "class Nothing(Term):\n    def loss(self, batch):\n        return None\n"
    )
    strategy = {"name": f"{tmp_path}/mine.py:Mine", "with": [f"{tmp_path}/mine.py:Nothing"] if term == "with" else []}
    with pytest.raises(PluginError, match=rf"{tmp_path}/mine\.py:5: Mine\.loss returned {what}.*it must return the mean loss") as failure:
        running.run(small_run("finetune", strategy=strategy, log=[]), out=tmp_path / "run")
    assert failure.value.exit_code == 2 and "\n" not in str(failure.value)


def test_the_pace_of_training_leaves_out_what_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    class Slow(Plain):
        def before_task(self, task: Task) -> None:
            clock[0] += 300

        def loss(self, batch: Batch) -> Tensor:
            clock[0] += 100 if clock[0] % 1000 == 300 else 1
            return super().loss(batch)

    class Kept(Sink):
        rates: ClassVar[list[float]] = []

        def write(self, event: Event) -> None:
            if event.kind == "progress":
                self.rates.append(event.fields["samples_per_second"])

    run = engine(Slow(epochs=1, batch=41))  # 246 samples: six batches
    run.events.sinks.append(Kept())
    learn(run, 1)
    assert Kept.rates == [41.0] * 5


def test_a_sink_that_fails_is_left_out_and_named() -> None:
    class Broken(Sink):
        def write(self, event: Event) -> None:
            raise KeyError("no such figure")

    class Kept(Sink):
        def __init__(self) -> None:
            self.seen: list[Event] = []

        def write(self, event: Event) -> None:
            self.seen.append(event)

    kept = Kept()
    events = Events([Broken(), kept])
    events.emit("progress", task=0)
    events.emit("progress", task=1)
    assert [event.kind for event in kept.seen] == ["progress", "warning", "progress"]
    assert "the sink broken failed and writes no more: KeyError" in kept.seen[1].fields["message"]


def test_plain_sgd_is_torchs_sgd_bit_for_bit() -> None:
    def trained(make_it: Any) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        optimizer = make_it(model.parameters())
        for _ in range(20):
            optimizer.zero_grad()
            cross_entropy(model(torch.rand(8, 5)), torch.randint(3, (8,))).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    ours = trained(lambda parameters: make_optimizer(parameters, Optimizer(lr=0.3)))
    theirs = trained(lambda parameters: torch.optim.SGD(parameters, lr=0.3))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert type(make_optimizer([nn.Parameter(torch.ones(2))], Optimizer(lr=0.3, momentum=0.9))) is torch.optim.SGD
