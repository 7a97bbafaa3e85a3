"""Reinforcement learning on TRL: the loss is the learner's, a session goes on where it was stopped, and bad input gets a message."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from datasets import Dataset as Rows
from trl import GRPOConfig, GRPOTrainer

from streamcl import running
from streamcl.checkpoint import Checkpoints, flatten, unflatten
from streamcl.context import Context
from streamcl.data import ArrayDataset, FileDataset, Joined, Subset
from streamcl.engine import Engine
from streamcl.errors import ConfigError, DataError, Interrupted, PluginError, TrainingError
from streamcl.events import Event, Events, Sink
from streamcl.nn.model import Model
from streamcl.options import Optimizer, Schedule
from streamcl.plugins import find
from streamcl.preparing import Preparation
from streamcl.stream import Column, Modality, StreamInfo, Task
from streamcl.verifier import Verifier

Base: Any = find("learner", "grpo").load().__mro__[1]  # the learner that all methods fill in
ROOM = Base.__module__.rpartition(".")[0]
TinyVLM: Any = find("backbone", "tiny_vlm").load()
SGD = Optimizer(name="sgd", lr=0.5)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Each session begins with a collection of garbage, which takes longest over all the libraries that were loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Even(Verifier):
    """Rewards an even number of letters."""

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        assert len(rows["length"]) == len(rows["answer"]) == len(answers)
        return torch.tensor([float(len(answer) % 2 == 0) for answer in answers])


class Plain(Base):
    def __init__(self, *, reference: str = "base", rewards: tuple[Verifier, ...] = (Even(),), **options: Any) -> None:
        super().__init__(rewards=rewards, optimizer=options.pop("optimizer", SGD), **options)
        self.reference = reference


class Told(Sink):
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def write(self, event: Event) -> None:
        self.events.append((event.kind, event.fields))


class Speaker(TinyVLM):
    """The tiny model at its smallest, with weights that make one word more likely than another."""

    def __init__(self, **options: Any) -> None:
        super().__init__(hidden=8, layers=1, heads=2, patch=14, words="plus", longest=4, places=64, **options)
        self.asked: list[str] = []  # the kept policies that were computed by

    def build(self, info: StreamInfo) -> None:
        torch.manual_seed(0)
        super().build(info)
        with torch.no_grad():
            for value in self.network.parameters():
                value.mul_(3.0)

    @contextmanager
    def policy(self, name: str) -> Iterator[Any]:
        self.asked.append(name)
        with super().policy(name) as network:
            yield network


def questions(count: int) -> list[str]:
    return [f"{number % 10} plus {number // 10} ?" for number in range(count)]


class Session:
    """A learner, the language model that it is given, and a task of a few sums; with eyes each has a picture."""

    def __init__(self, learner: Any, *, count: int = 6, eyes: bool = False, seed: int = 0, **about: Any) -> None:
        torch.manual_seed(1)
        modalities = {"question": Modality("text")}
        inputs: dict[str, Column] = {"question": questions(count)}
        if eyes:
            modalities["image"] = Modality("image", (3, 28, 28), 255)
            inputs["image"] = torch.randint(0, 256, (count, 3, 28, 28), dtype=torch.uint8)
        self.add(modalities, inputs)
        self.data = ArrayDataset(
            inputs, torch.zeros(count, dtype=torch.int64), extra={"answer": ["1"] * count, "verifier": ["exact"] * count}
        )
        self.info = StreamInfo(modalities, target="text", tasks=2)
        self.speaker = Speaker()
        self.speaker.build(self.info)
        self.model, self.told, self.learner = Model(self.speaker), Told(), learner
        self.context = Context(self.model, None, Events([self.told]), Preparation(self.info, {}), seed=seed)  # type: ignore[arg-type]
        self.learner.start(self.info, self.context)
        self.about = about

    def add(self, modalities: dict[str, Modality], inputs: dict[str, Column]) -> None:
        """Further modalities."""

    def task(self, index: int = 0) -> Task:
        return Task(index, "sums", self.data, (0,), (0,), about=self.about)

    def run(self, index: int = 0) -> Any:
        task = self.task(index)
        if self.context.task is None or self.context.task.index != index:
            self.context.begin(task, {})
        self.learner.check(task)
        return self.learner.fit(self.model, task, self.context)

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return self.told.events

    def put(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.speaker.network.named_parameters():
                value.copy_(weights[name])

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.speaker.network.named_parameters()}


class Seen(Plain):
    """Keeps the rollouts that it was shown."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rollouts: list[Any] = []

    def advantages(self, rollouts: Any, earned: Tensor) -> Tensor:
        self.rollouts.append(rollouts)
        return super().advantages(rollouts, earned)


class Ranked(Verifier):
    """Each answer of a group earns more than the one before it."""

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        return torch.arange(float(len(answers))) / len(answers)


class Constant(Verifier):
    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        return torch.full((len(answers),), 0.5)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def moved(session: Session) -> dict[str, Tensor]:
    before = session.weights()
    session.run()
    assert difference(before, session.weights()) > 0
    return session.weights()


# -- the loss --------------------------------------------------------------------------------------------------------------------


def stock(session: Session, folder: Any) -> dict[str, Tensor]:
    """The weights after TRL's own trainer went through the same prompts, with the same seed and the KL in the loss as k3."""
    module = __import__(f"{ROOM}._trainer", fromlist=["Prompts"])
    trl, learner, network = __import__(f"{ROOM}._trl", fromlist=["derived"]), session.learner, session.speaker.network
    prompts = module.Prompts(learner, session.speaker, session.task(), session.context, 1, 0)

    class Stock(GRPOTrainer):
        def get_train_dataloader(self) -> Any:
            return prompts

    def even(completions: list[Any], **_: Any) -> list[float | None]:
        return [float(len(said[0]["content"]) % 2 == 0) for said in completions]

    network.save_pretrained(folder)
    session.speaker.processor.save_pretrained(folder)
    network.config._name_or_path = str(folder)
    options = module.settings(
        learner, session.context, str(folder), trl.derived(0, "session", 0) % 2**32, session.speaker.longest, 8, 1
    ).to_dict()
    kept = {name: options[name] for name in options if name in GRPOConfig.__dataclass_fields__ and name != "generation_batch_size"}
    trainer = Stock(
        model=network,
        reward_funcs=even,
        args=GRPOConfig(**kept | {"beta": learner.beta, "gradient_checkpointing": False}),
        train_dataset=Rows.from_dict({"row": [0]}),
        processing_class=session.speaker.processor,
        optimizers=(torch.optim.SGD(network.parameters(), lr=0.5), None),
    )
    trainer.args.lr_scheduler_type = "constant"
    trainer.train()
    return session.weights()


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_without_weights_it_is_the_stock_trainer(beta: float, tmp_path: Any) -> None:
    options: dict[str, Any] = {"steps": 3, "prompts": 2, "group": 4, "beta": beta, "clip": None}
    theirs = stock(Session(Plain(**options)), tmp_path)
    assert difference(moved(Session(Plain(**options))), theirs) == 0.0


def test_twice_the_weight_and_half_the_beta_are_the_same() -> None:
    class Weighted(Plain):
        weight = 1.0

        def kl_weights(self, rollouts: Any, advantages: Tensor) -> Tensor:
            return torch.full_like(rollouts.rewards[:, 0], self.weight)

    class Twice(Weighted):
        weight = 2.0

    options: dict[str, Any] = {"steps": 3, "prompts": 2, "group": 4}
    plain, once, twice = (moved(Session(kind(beta=beta, **options))) for kind, beta in ((Plain, 0.2), (Weighted, 0.2), (Twice, 0.1)))
    assert difference(once, twice) == 0.0
    assert difference(plain, once) == 0.0


def test_groups_that_earned_the_same_leave_the_weights_alone() -> None:
    session = Session(Plain(steps=2, prompts=2, group=4, rewards=(Constant(),)))
    before = session.weights()
    session.run()
    assert difference(before, session.weights()) == 0.0


def test_a_loss_of_the_network_itself_is_added() -> None:
    session = Session(Plain(steps=1, prompts=2, group=4, rewards=(Constant(),), clip=None))
    name, weight = next((n, w) for n, w in session.speaker.network.named_parameters() if "q_proj" in n)
    session.speaker.auxiliary_loss = lambda: weight.square().sum() / 2
    before = session.weights()
    session.run()
    after = session.weights()
    torch.testing.assert_close(after.pop(name), before.pop(name) * 0.5)
    assert difference(before, after) == 0.0


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_a_batch_in_parts_is_the_batch(aggregation: str) -> None:
    options: dict[str, Any] = {"steps": 4, "prompts": 4, "group": 4, "updates": 2, "beta": 0.1, "temperature": 3.0}
    whole, parts = (Session(Seen(at_once=size, aggregation=aggregation, **options)) for size in (None, 2))
    assert difference(moved(whole), moved(parts)) < 3e-6  # of weights up to 5
    assert len(whole.learner.rollouts[0].lengths.unique()) > 1  # or a mean of means would be the mean


def test_of_a_large_model_few_rows_go_through_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Session(Plain(prompts=6, group=4)).learner.session.parts == 1
    monkeypatch.setattr(f"{ROOM}._trl.LARGE", 1000)
    assert [Session(Plain(prompts=p, group=g)).learner.session.rows for p, g in ((6, 4), (2, 5), (2, 2))] == [8, 5, 4]
    assert Session(Plain(prompts=6, group=4, at_once=24)).learner.session.parts == 1


def test_dropout_is_off_in_a_session_and_on_again_afterwards() -> None:
    without, dropping = (Session(Plain(steps=2, prompts=2, group=4, beta=0.1, updates=2)) for _ in range(2))
    *_, layer = (module for module in dropping.speaker.network.modules() if hasattr(module, "q_proj"))  # the last one reads words
    layer.attention_dropout, layer.further = 0.5, torch.nn.Dropout(0.25)
    layer.k_proj = torch.nn.Sequential(layer.k_proj, layer.further)
    result = moved(without)
    moved(dropping)
    theirs = {name.replace("k_proj.0.", "k_proj."): value for name, value in dropping.weights().items()}
    assert difference(result, theirs) == 0.0
    assert (layer.attention_dropout, layer.further.p) == (0.5, 0.25)


def test_rare_words_are_left_out_of_sampling() -> None:
    still = Optimizer(name="sgd", lr=1e-12)
    greedy = Session(Seen(steps=1, prompts=2, group=4, top_p=1e-6, optimizer=still))
    greedy.run()
    (rollouts,) = greedy.learner.rollouts
    assert torch.equal(rollouts.rewards[:4], rollouts.rewards[:1].expand(4, 1)) and len(rollouts.lengths[:4].unique()) == 1


def test_each_answer_of_a_batch_is_learned_from_once() -> None:
    session = Session(Seen(steps=6, prompts=4, group=4, updates=3 + 1))
    session.run()
    assert len(session.learner.rollouts) == 2 and session.context.steps == 6 and session.context.samples == 8
    assert [len(rollouts.rewards) for rollouts in session.learner.rollouts] == [16, 16]
    assert session.learner.rollouts[1].step == 4


def test_a_divergence_in_the_rewards_is_of_the_reference() -> None:
    class Rewarded(Seen):
        estimator = None

    session = Session(Rewarded(steps=2, prompts=2, group=4, beta=0.5, reference="previous"))
    session.speaker.keep("previous")
    session.run()
    first, second = (rollouts.drift for rollouts in session.learner.rollouts)
    assert session.speaker.asked == ["previous", "previous"]
    torch.testing.assert_close(first, torch.zeros_like(first), atol=1e-6, rtol=0)  # nothing has moved yet
    assert float((second * session.learner.rollouts[1].mask).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["grpo", "rloo", "apo", "observe_r1", "trust_grpo", "t_grpo"])
def test_every_method_learns_on_it(name: str) -> None:
    kind: Any = find("learner", name).load()
    learner = kind(steps=2, prompts=2, group=4, updates=1, rewards=(Ranked(), Even()), optimizer=Optimizer(name="adamw", lr=0.01))
    session = Moving(learner, count=4, eyes=True) if name == "t_grpo" else Session(learner, eyes=True)
    moved(session)
    assert name != "t_grpo" or "shuffled" in session.learner.session.history
    assert session.speaker.asked == (["base"] * 2 if learner.beta else [])


# -- data and rewards ---------------------------------------------------------------------------------------------------------------


class Listening(Verifier):
    """Says nothing of the second prompt of each batch."""

    def __init__(self) -> None:
        super().__init__(weight=2.0)
        self.rows: list[Mapping[str, Column]] = []

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        self.rows.append(rows)
        said = torch.arange(float(len(answers)))
        said[4:8] = torch.nan
        return said


def test_what_no_reward_judges_is_missing_and_not_zero() -> None:
    listening = Listening()
    session = Session(Seen(steps=1, prompts=2, group=4, rewards=(listening,)))
    report = session.run()
    (rollouts,) = session.learner.rollouts
    assert rollouts.rewards.isnan().squeeze(1).tolist() == [False] * 4 + [True] * 4
    assert rollouts.weights.tolist() == [2.0]
    assert report.figures["reward"] == 2 * 1.5  # of 0, 1, 2, 3
    columns = listening.rows[-1]  # the first call tries the reward on the task's first rows
    assert columns["answer"] == ["1"] * 8
    assert torch.equal(columns["length"], rollouts.lengths)  # type: ignore[arg-type]


def test_several_rewards_are_told_apart() -> None:
    session = Session(Seen(steps=1, prompts=2, group=2, rewards=(Even(), Even(weight=0.25), Constant(weight=3.0))))
    report = session.run()
    (rollouts,) = session.learner.rollouts
    assert rollouts.columns == ("Even", "Even 2", "Constant") and rollouts.weights.tolist() == [1.0, 0.25, 3.0]
    assert report.figures["reward/Constant"] == 0.5
    assert report.figures["reward"] == pytest.approx(1.25 * report.figures["reward/Even"] + 1.5)


def asked(session: Session) -> list[str]:
    prompts = __import__(f"{ROOM}._trainer", fromlist=["Prompts"]).Prompts(
        session.learner, session.speaker, session.task(), session.context, 1, 0
    )
    return [row["prompt"][0]["content"][-1]["text"] for rows in prompts for row in rows]


def test_an_order_is_kept_and_gone_through_again() -> None:
    session = Session(Plain(steps=2, prompts=4, group=2), count=3, ordered=True)
    zero, one, two = questions(3)
    assert asked(session) == [q for q in (zero, one, two, zero, one, two, zero, one) for _ in range(2)]


def test_without_an_order_every_prompt_comes_before_one_comes_again() -> None:
    session = Session(Plain(steps=3, prompts=2, group=2), count=3)
    came = asked(session)[::2]
    assert sorted(came[:3]) == sorted(came[3:]) == sorted(questions(3))
    assert came != asked(Session(Plain(steps=3, prompts=2, group=2), count=3, seed=1))[::2]


def test_sessions_draw_different_answers() -> None:
    still = Optimizer(name="sgd", lr=1e-12)
    session = Session(Seen(steps=1, prompts=2, group=4, optimizer=still), count=2, ordered=True)
    for index in (0, 1):
        session.run(index)
    first, second = (event["answer"] for kind, event in session.events if kind == "sample")
    assert first != second
    assert [rollouts.stream_step for rollouts in session.learner.rollouts] == [0, 1]
    assert session.learner.rollouts[0].stream_steps == 2


# -- stopping and going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"beta": 0.1}, {"updates": 2, "at_once": 2}], ids=["one update", "several"])
def test_a_session_that_was_stopped_goes_on_with_the_same_result(options: dict[str, Any]) -> None:
    def made() -> Session:
        settings = Optimizer(name="adamw", lr=0.01), Schedule(name="cosine", warmup=0.2)
        return Session(Plain(steps=6, prompts=2, group=4, optimizer=settings[0], schedule=settings[1], **options))

    whole = made()
    report = whole.run()

    stopped, saved = made(), {}

    def stop() -> None:
        if stopped.context.steps == 4:
            tree, tensors = flatten({"learner": stopped.learner.state(), "passes": stopped.context.passes})
            saved.update(unflatten(tree, {name: value.clone() for name, value in tensors.items()}))
            raise Interrupted("stopped")

    stopped.context.tick = stop
    with pytest.raises(Interrupted):
        stopped.run()
    assert saved["passes"] == {"session": [0, 4]}

    resumed = made()
    resumed.speaker.restore_kept(stopped.speaker.kept())
    resumed.put(stopped.weights())
    resumed.learner.restore(saved["learner"])
    again, tensors = flatten(resumed.learner.state())
    was, values = flatten(saved["learner"])
    assert again == was and tensors and all(torch.equal(value, values[name]) for name, value in tensors.items())
    resumed.context.begin(resumed.task(), saved["passes"])
    torch.rand(7)  # a process of its own has drawn something else
    assert resumed.run() == report
    assert difference(whole.weights(), resumed.weights()) == 0.0
    assert resumed.learner.state() == whole.learner.state() == {"updates": 6, "inside": {}}


def test_a_run_that_was_stopped_inside_a_session_goes_on_with_the_same_weights(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "seed": 0,
        "scenario": {
            "name": "reasoning",
            "data": {"name": "puzzles", "count": 8, "test": 4, "skills": ["counting", "comparing"]},
            "order": "given",
        },
        "strategy": {
            "name": "sequential",
            "learner": {"name": "grpo", "steps": 3, "prompts": 2, "group": 2, "beta": 0.1, "optimizer": {"name": "adamw", "lr": 1e-3}},
        },
        "model": {"backbone": {"name": "tiny_vlm", "hidden": 8, "layers": 1, "heads": 2, "patch": 14, "longest": 4}},
        "log": [],
    }
    whole = running.run(config, out=tmp_path / "whole")
    tick = Engine._tick

    def ask_and_tick(engine: Engine) -> None:
        engine.context.interrupted |= engine.context.steps == 5
        tick(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_tick", ask_and_tick)
        with pytest.raises(Interrupted):
            running.run(config, out=tmp_path / "stopped")
    torch.rand(3)
    resumed = running.resume(tmp_path / "stopped")
    assert {**resumed, "seconds": None} == {**whole, "seconds": None}
    first, second = (Checkpoints(tmp_path / name / "checkpoints").load(print) for name in ("whole", "stopped"))
    assert first is not None and second is not None
    tensors = [flatten({name: state[name] for name in ("model", "strategy")})[1] for state in (first, second)]
    assert tensors[0] and all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def test_one_that_was_stopped_at_its_end_has_nothing_left_to_do() -> None:
    session = Session(Plain(steps=2, prompts=2, group=4))
    saved: dict[str, Any] = {}
    session.context.tick = lambda: saved.update(copy.deepcopy(session.learner.state()))
    report = session.run()
    again = Session(Plain(steps=2, prompts=2, group=4))
    again.learner.restore(saved)
    before = again.weights()
    assert again.run() == report and difference(before, again.weights()) == 0.0


def test_four_sessions_of_an_adapter_leave_the_network_as_it_was() -> None:
    from peft import LoraConfig, get_peft_model

    session = Session(Plain(steps=1, prompts=2, group=4, beta=0.1, reference="previous", rewards=(Ranked(),)))
    session.speaker.network = get_peft_model(session.speaker.network, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    network = session.speaker.network
    for index in range(4):
        session.speaker.keep("previous")
        before = session.weights()
        session.run(index)
        grown = {name for name, value in session.weights().items() if not torch.equal(value, before[name])}
        assert grown and all("lora_" in name for name in grown)
        assert list(network.peft_config) == ["default"]
        assert "forward" not in vars(network) and "forward" not in vars(network.get_base_model())


def test_as_on_a_gpu_the_network_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__(f"{ROOM}._trainer", fromlist=["settings"])
    settings = module.settings

    def on_gpu(*arguments: Any) -> Any:
        made = settings(*arguments)
        made.gradient_checkpointing = made.activation_checkpointing = True
        made.gradient_checkpointing_kwargs = made.activation_checkpointing_kwargs = {"use_reentrant": False}
        return made

    monkeypatch.setattr(module, "settings", on_gpu)
    session = Session(Plain(steps=2, prompts=2, group=4, beta=0.1, rewards=(Ranked(),)), eyes=True)
    session.context.precision = "bfloat16"
    network = session.speaker.network
    counts = []
    for index in range(2):
        session.run(index)
        counts.append(sum(len(part._forward_hooks) for part in network.modules()))
        assert not network.is_gradient_checkpointing and not {"forward", "_original_forward"} & set(vars(network))
    assert counts[0] == counts[1]


# -- pictures and frames ------------------------------------------------------------------------------------------------------------


def test_a_model_that_sees_learns_and_shows_what_it_says() -> None:
    session = Session(Plain(steps=2, prompts=2, group=4, beta=0.1), eyes=True)
    moved(session)
    samples = [event for kind, event in session.events if kind == "sample"]
    assert [event["step"] for event in samples] == [0, 1]
    assert samples[0]["question"] in questions(6) and samples[0]["rewards"] == {"Even": samples[0]["reward"]}
    assert samples[0]["picture"].startswith("iVBOR")  # a PNG


def test_the_trainer_reads_prompts_as_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = __import__(f"{ROOM}._trainer", fromlist=["SessionTrainer"]).SessionTrainer
    read, tokenize = [], trainer._tokenize_prompts

    def watched(self: Any, prompts: list) -> Any:
        made = tokenize(self, prompts)
        read.extend(made[0])
        return made

    monkeypatch.setattr(trainer, "_tokenize_prompts", watched)
    session = Session(Plain(steps=1, prompts=6, group=2), eyes=True, ordered=True)
    session.run()
    own = session.speaker.encode(session.context.preparation(session.data[torch.arange(6)], False, torch.Generator()))
    mine = [ids[seen > 0].tolist() for ids, seen in zip(own["input_ids"], own["attention_mask"], strict=True)]
    assert read == [ids for ids in mine for _ in range(2)]


def test_what_the_model_says_is_shown(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from streamcl.sinks.progress import Progress
    from streamcl.sinks.tensorboard import Tensorboard

    session = Session(Plain(steps=1, prompts=2, group=2), eyes=True)
    session.run()
    (event,) = [Event(kind, fields) for kind, fields in session.events if kind == "sample"]
    for sink in (Tensorboard(), Progress()):
        sink.open(tmp_path)
        sink.write(event)
        sink.close()
    kept = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0, "images": 0}).Reload()
    (text,) = kept.Tensors("samples/text_summary")
    assert text.step == 0 and event.fields["answer"] in text.tensor_proto.string_val[0].decode()
    assert (kept.Images("samples")[0].width, kept.Images("samples")[0].height) == (28, 28)
    assert f"{event.fields['question']} -> {event.fields['answer']}" in capsys.readouterr().out


class Moving(Session):
    """Of four rows one shows a picture, one frames, one nothing, and one frames."""

    def add(self, modalities: dict[str, Modality], inputs: dict[str, Column]) -> None:
        modalities["video"] = Modality("video", (4, 3, 28, 28), 255)
        inputs["video"] = torch.arange(4, dtype=torch.uint8).mul(60).view(1, 4, 1, 1, 1).expand(4, 4, 3, 28, 28).contiguous()

    def task(self, index: int = 0) -> Task:
        self.data.present = {"video": torch.tensor([False, True, False, True]), "image": torch.tensor([True, False, False, False])}
        return super().task(index)


def test_frames_in_another_order_leave_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shuffling(Seen):
        shuffles = True

    trainer = __import__(f"{ROOM}._trainer", fromlist=["SessionTrainer"]).SessionTrainer
    put, generate = [], trainer._generate

    def watched(self: Any, prompts: list) -> Any:
        put.append([[part["image"].getpixel((0, 0))[0] for part in m[0]["content"] if part["type"] == "image"] for m in prompts])
        return generate(self, prompts)

    monkeypatch.setattr(trainer, "_generate", watched)
    options: dict[str, Any] = {"count": 4, "eyes": True, "ordered": True}
    plain, shuffled = (Moving(kind(steps=1, prompts=4, group=4), **options) for kind in (Plain, Shuffling))
    assert difference(moved(plain), moved(shuffled)) < 1e-6  # the rows of a batch stand in another order
    ordered, again = put[1:]
    frames = [0, 60, 120, 180]
    assert [len(shown) for shown in ordered] == [1] * 4 + [4] * 4 + [0] * 4 + [4] * 4 and ordered[4] == frames
    assert len(again) == 2 * 2 and all(sorted(shown) == frames and shown != frames for shown in again)
    (rollouts,) = shuffled.learner.rollouts
    outcome = rollouts.extra["shuffled"].view(4, 4)
    assert outcome[::2].isnan().all() and ((outcome[1::2] >= 0) & (outcome[1::2] <= 1)).all()
    assert torch.equal(outcome[1::2], outcome[1::2, :1].expand(2, 4))


def test_a_process_with_fewer_videos_samples_as_much_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shuffled(Seen):
        shuffles = True

    trainer = __import__(f"{ROOM}._trainer", fromlist=["SessionTrainer"]).SessionTrainer
    put, generate = [], trainer._generate

    def watched(self: Any, prompts: list) -> Any:
        put.append(len(prompts))
        return generate(self, prompts)

    monkeypatch.setattr(trainer, "_generate", watched)
    monkeypatch.setattr(trainer, "_most", lambda self, count: 3 if count == 2 else count)  # elsewhere are three videos
    session = Moving(Shuffled(steps=1, prompts=4, group=4), count=4, eyes=True, ordered=True)
    session.run()
    assert put == [16, 3 * 2]
    (rollouts,) = session.learner.rollouts
    assert rollouts.extra["shuffled"].view(4, 4).isnan().all(dim=1).tolist() == [True, False, True, False]


def test_what_fails_on_one_process_stops_the_others() -> None:
    trainer = __import__(f"{ROOM}._trainer", fromlist=["SessionTrainer"]).SessionTrainer
    told: list[int] = []

    class Process:
        def __init__(self, elsewhere: int) -> None:
            self.elsewhere = elsewhere

        def _most(self, count: int) -> int:
            told.append(count)
            return max(count, self.elsewhere)

    with trainer._agreed(Process(0)):
        pass
    with pytest.raises(TrainingError, match="another process stopped"), trainer._agreed(Process(1)):
        pass
    with pytest.raises(DataError, match="of this one"), trainer._agreed(Process(0)):
        raise DataError("of this one")
    assert told == [0, 0, 1]


# -- what a person is told ----------------------------------------------------------------------------------------------------------


def test_a_person_is_told_once_that_nothing_varies() -> None:
    session = Session(Plain(steps=7, prompts=1, group=2, rewards=(Constant(),)))
    report = session.run()
    warnings = [event["message"] for kind, event in session.events if kind == "warning"]
    assert len(warnings) == 1 and "no group has variance" in warnings[0]
    assert report.figures["flat"] == 1.0


def test_figures_of_each_batch_are_logged() -> None:
    session = Session(Plain(steps=1, prompts=2, group=2, beta=0.1))
    report = session.run()
    logged = session.context.logged
    assert {"loss", "reward", "reward/Even", "length", "kl", "entropy", "lr", "flat"} <= set(logged)
    assert logged["lr"] == 0.5 and report.figures["tokens"] == 4 * logged["length"]


def test_a_person_is_told_that_no_reward_says_anything() -> None:
    class Silent(Verifier):
        def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
            return torch.full((len(answers),), torch.nan)

    session = Session(Plain(steps=6, prompts=1, group=2, rewards=(Silent(),)))
    session.run()
    (message,) = [event["message"] for kind, event in session.events if kind == "warning"]
    assert "no reward says anything of any answer" in message


class Raising(Verifier):
    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        raise ZeroDivisionError("of nothing")


class Short(Verifier):
    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        return torch.zeros(len(answers) - 1)


@pytest.mark.parametrize(("reward", "says"), [(Raising(), "Raising failed: ZeroDivisionError: of nothing"), (Short(), "Short gave")])
def test_a_reward_that_cannot_be_had_is_named_before_training(reward: Verifier, says: str) -> None:
    session = Session(Plain(steps=1, prompts=2, group=2, rewards=(Even(), reward)))
    with pytest.raises(PluginError, match=says):
        session.learner.check(session.task())


def test_a_loss_that_is_no_number_stops_the_session() -> None:
    class Endless(Plain):
        def advantages(self, rollouts: Any, earned: Tensor) -> Tensor:
            return torch.full_like(earned, torch.nan)

    with pytest.raises(TrainingError, match="the loss is nan at update 1"):
        Session(Endless(steps=2, prompts=2, group=2)).run()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": 3, "group": 3, "updates": 2}, "9 rows"),
        ({"prompts": 2, "group": 4, "at_once": 3}, "an update has 8 rows"),
        ({"vllm": True}, "the device is a CPU"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Session(Plain(**options))


class Shuffling(Plain):
    shuffles = True


def test_half_of_an_odd_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="take an even number"):
        Moving(Shuffling(group=3), count=4, eyes=True)


def test_without_frames_nothing_can_be_shuffled() -> None:
    with pytest.raises(ConfigError, match="Shuffling also answers with frames in random order, and this stream has no modality of kind"):
        Session(Shuffling(group=2), eyes=True)
    session = Moving(Shuffling(group=2), count=4, eyes=True)
    task = session.task()
    session.learner.check(task)
    warned = [event["message"] for kind, event in session.events if kind == "warning"]
    assert len(warned) == 1 and "1 of 4 rows show no picture" in warned[0]
    session.data.present = {"video": torch.zeros(4, dtype=torch.bool), "image": torch.ones(4, dtype=torch.bool)}
    session.learner.check(task)
    (_, message) = [event["message"] for kind, event in session.events if kind == "warning"]
    assert "no row has frames" in message and "Shuffling rewards no order here" in message


def test_rows_without_an_answer_are_named_before_training_and_no_picture_is_read_for_it() -> None:
    session = Session(Plain(steps=1, prompts=2, group=2), count=6)
    session.data.extra["answer"] = ["1", "2", "3", "4", " ", ""]
    read: list[int] = []

    def decode(rows: list[int]) -> dict[str, Column]:
        read.extend(rows)
        return {"question": [questions(6)[row] for row in rows]}

    files = FileDataset(decode, session.data.targets, workers=0, extra=session.data.extra)
    mine = Subset(Joined([files, session.data]), torch.arange(11, -1, -1))
    with pytest.raises(DataError, match=r"sums: 4 of 12 rows have no right answer \(rows 5, 4, 5, 4\)"):
        session.learner.check(dataclasses.replace(session.task(), train=mine))
    assert read == []  # the first rows, which are tried, are the last of those in memory


def test_a_prompt_that_is_too_long_is_named() -> None:
    session = Session(Plain(steps=1, prompts=6, group=2))
    session.data.inputs["question"] = ["1 plus " * 40] * 6
    with pytest.raises(DataError, match="row 0: its prompt has 83 tokens"):
        session.run()
    session.data.inputs["question"] = [*questions(5), "1 plus " * 40]  # one that is not among those that are tried
    with pytest.raises(DataError, match="row 5: its prompt has 83 tokens"):
        session.run()


def test_a_template_that_drops_the_picture_is_named() -> None:
    session = Session(Plain(steps=1, prompts=2, group=2), eyes=True)
    session.speaker.processor.chat_template = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match="makes 0 places in a prompt for its 1 pictures"):
        session.learner.check(session.task())


def test_another_version_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__(f"{ROOM}._trainer", fromlist=["HOOKS"])
    monkeypatch.setattr(module.trl, "__version__", "1.17.0")
    with pytest.raises(ConfigError, match=r"TRL 1\.17\.0 is installed, and learners were tested on 1\.16"):
        Session(Plain())
    monkeypatch.undo()
    monkeypatch.setitem(module.HOOKS, "_compute_loss", ("model", "batch"))
    with pytest.raises(ConfigError, match=r"_compute_loss takes \(model, inputs\) where \(model, batch\)"):
        Session(Plain())


def test_without_the_library_a_person_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, f"{ROOM}._trainer", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(ConfigError, match=r"pip install 'streamcl\[rl\]'"):
        Session(Plain())
