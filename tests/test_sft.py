"""Supervised learners of language models: what they teach, the loss by hand, and a session that is stopped inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.sessions.learners._supervised import Template, said_loss
from strategies.sessions.learners.rejection_sft import RejectionSFT
from streamcl.config import plugin_spec
from streamcl.context import Context
from streamcl.data import ArrayDataset
from streamcl.errors import ConfigError, DataError
from streamcl.events import Events
from streamcl.nn.model import Model
from streamcl.preparing import Preparation
from streamcl.stream import Batch, SourceData, StreamInfo, Task
from streamcl.verifier import Verifier

SMALL = {"hidden": 16, "layers": 1, "heads": 2, "longest": 4}
FAST: dict[str, Any] = {"optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.0}, "batch": 4}


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("STREAMCL_CACHE", str(tmp_path_factory.getbasetemp() / "tiny_vlm"))
    yield


@pytest.fixture(scope="module")
def data() -> SourceData:
    return plugin_spec("source", {"name": "puzzles", "count": 9, "test": 4, "skills": ["counting"]}).build().load()


def task_of(rows: Any, index: int = 0) -> Task:
    return Task(index, "counting", rows, (0,), (0,), (0,))


def begin(data: SourceData, learner: Any, task: Task) -> Context:
    info = StreamInfo(data.modalities, target="text", metrics=("verified",))
    backbone = plugin_spec("backbone", {"name": "tiny_vlm", **SMALL}).build()
    backbone.build(info)
    memory = plugin_spec("memory", "faiss").build()
    context = Context(Model(backbone), memory, Events(), Preparation(info, backbone.transforms()), seed=3)
    context.begin(task, {})
    learner.start(info, context)
    return context


def learner_of(name: str = "sft", **options: Any) -> Any:
    return plugin_spec("learner", {"name": name, **FAST, **options}).build()


def weights(context: Context) -> list[Tensor]:
    return [value.detach().clone() for value in context.model.backbone.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def with_extra(data: SourceData, **columns: list[str]) -> ArrayDataset:
    rows = data.train[torch.arange(len(data.train))]
    assert rows.target is not None
    return ArrayDataset(rows.inputs, rows.target, rows.ids, rows.present, {**rows.extra, **columns})


# What is taught -----------------------------------------------------------------------------------------------------------------


def test_labels_are_the_answer_and_its_end_and_nothing_else(data: SourceData) -> None:
    context = begin(data, learner_of(), task_of(data.train))
    language: Any = context.model.backbone
    batch = context.prepare(data.train[torch.arange(3)])
    answers = ["<answer> 3 </answer>", "red, green, blue", ""]
    inputs = language.encode(batch, answers)
    for row, answer in enumerate(answers):
        taught = inputs["labels"][row] != -100
        expected = [*language.tokenizer(answer, add_special_tokens=False)["input_ids"], language.tokenizer.eos_token_id]
        assert inputs["labels"][row][taught].tolist() == expected
        assert inputs["input_ids"][row][taught].tolist() == expected
        assert bool(inputs["attention_mask"][row][taught].all())
    prompt = language.encode(batch)["input_ids"]
    assert torch.equal(inputs["input_ids"][:, : prompt.shape[1]], prompt)
    assert bool((inputs["labels"][:, : prompt.shape[1]] == -100).all())


def test_the_loss_is_the_cross_entropy_of_the_answers_tokens(data: SourceData) -> None:
    context = begin(data, learner_of(), task_of(data.train))
    language: Any = context.model.backbone
    batch, answers = context.prepare(data.train[torch.arange(3)]), ["3", "above left", "<think> 4 </think>"]
    total, tokens = 0.0, 0
    for row, answer in enumerate(answers):
        one = batch[[row]]
        prompt = language.encode(one)
        said = torch.tensor([[*language.tokenizer(answer, add_special_tokens=False)["input_ids"], language.tokenizer.eos_token_id]])
        ids = torch.cat([prompt["input_ids"], said], dim=1)
        logits = language.network(input_ids=ids, pixel_values=prompt["pixel_values"]).logits[0]
        chances = logits[-said.shape[1] - 1 : -1].log_softmax(dim=1)
        total -= chances.gather(1, said.T).sum().item()
        tokens += said.shape[1]
    assert said_loss(language, batch, answers).item() == pytest.approx(total / tokens, abs=1e-5)


def test_a_template_holds_the_columns_of_the_row(data: SourceData) -> None:
    batch = data.train[torch.tensor([0, 1])]
    assert isinstance(batch.inputs["text"], list)
    filled = Template("{{{skill}}} {question} = {answer}").filled(batch)
    assert filled == [f"{{counting}} {q} = {a}" for q, a in zip(batch.inputs["text"], batch.extra["answer"], strict=True)]


def test_a_row_may_bring_its_own_response(data: SourceData) -> None:
    own = with_extra(data, response=["it is 3", *[""] * 8])
    assert Template("so {answer}").filled(own[torch.tensor([0, 1])])[0] == "it is 3"
    assert Template("so {answer}").filled(own[torch.tensor([0, 1])])[1].startswith("so ")


@pytest.mark.parametrize(
    ("template", "problem"),
    [("yes", "nothing stands for the answer"), ("{answer", "a brace that is meant is doubled"), ("{answer} {colour}", "names {colour}")],
)
def test_bad_templates_get_one_message(data: SourceData, template: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        learner = learner_of(template=template)
        begin(data, learner, task_of(data.train))
        learner.check(task_of(data.train))


def test_a_row_without_an_answer_is_named(data: SourceData) -> None:
    rows = with_extra(data, answer=[" ", *["3"] * 8])
    learner = learner_of()
    begin(data, learner, task_of(rows))
    with pytest.raises(DataError, match=rf"row {int(rows.ids[0])} has no answer"):
        learner.check(task_of(rows))


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_before_anything_is_learned(data: SourceData) -> None:
    learner = learner_of()
    context = begin(data, learner, task_of(data.train))
    language: Any = context.model.backbone
    language.longest = 512
    with pytest.raises(DataError, match="an answer up to 512"):
        learner.check(task_of(data.train))


def test_a_model_that_does_not_speak_is_refused(data: SourceData) -> None:
    backbone = plugin_spec("backbone", "identity").build()
    info = StreamInfo({"image": data.modalities["image"]}, target="text")
    backbone.build(info)
    context = Context(Model(backbone), plugin_spec("memory", "faiss").build(), Events(), Preparation(info, {}))
    with pytest.raises(ConfigError, match="does not speak"):
        learner_of().start(info, context)


# A session ----------------------------------------------------------------------------------------------------------------------


def test_what_is_taught_is_learned(data: SourceData) -> None:
    task, learner = task_of(data.train), learner_of(template="<answer> {answer} </answer>", epochs=40)
    context = begin(data, learner, task)
    language: Any = context.model.backbone
    before = said_loss(language, context.prepare(data.train[torch.arange(9)]), ["<answer> 3 </answer>"] * 9)
    report = learner.fit(context.model, task, context)
    assert report.figures["loss"] < before.item()
    spoken = language.speak(context.prepare(data.train[torch.arange(9)]))
    assert all(text.startswith("<answer>") for text in spoken.texts)
    assert not any(module.training for module in language.network.modules())
    assert learner.state() == {"inside": {}}


def test_gradients_that_accumulate_are_those_of_the_whole_batch(data: SourceData) -> None:
    rows = with_extra(data, answer=["3"] * 9)  # as many tokens in each
    found = []
    ways: list[dict[str, Any]] = [{"batch": 6}, {"batch": 2, "accumulate": 3}]
    for options in ways:
        task, learner = task_of(rows), learner_of(**options, steps=1, shuffle=False, optimizer={"name": "sgd", "lr": 0.1}, clip=None)
        context = begin(data, learner, task)
        learner.fit(context.model, task, context)
        found.append(weights(context))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_steps_end_a_session_and_the_schedule_goes_by_them(data: SourceData) -> None:
    task, learner, rates = task_of(data.train), learner_of(steps=5, schedule={"name": "linear"}), []
    context = begin(data, learner, task)
    context.step_limit, context.tick = 0, lambda: rates.append(learner.optimizer.param_groups[0]["lr"])
    learner.fit(context.model, task, context)
    assert rates == pytest.approx([0.01 * (1 - step / 5) for step in range(5)])


def stop(context: Context, learner: Any, after: int) -> dict[str, Any]:
    """Run a session and stop it at its n-th place to save; what a checkpoint would hold."""
    seen = 0

    def tick() -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise Stopped

    context.step_limit, context.tick = 0, tick
    with pytest.raises(Stopped):
        learner.fit(context.model, context.task, context)
    state = {name: value.clone() for name, value in context.model.backbone.state_dict().items()}
    return {"learner": learner.state(), "passes": context.passes, "weights": state}


LEARNERS: list[Callable[[], Any]] = [
    lambda: learner_of(epochs=3, accumulate=2, schedule="cosine"),
    lambda: learner_of(steps=5),
    lambda: learner_of("rejection_sft", rounds=2, prompts=5, group=4, epochs=2, rewards=[{"name": "thought"}], accept=0.0),
]


@pytest.mark.parametrize("make", LEARNERS)
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_session_that_was_stopped_goes_on_bit_for_bit(data: SourceData, make: Callable[[], Any], after: int) -> None:
    task = task_of(data.train)
    whole = make()
    context = begin(data, whole, task)
    report = whole.fit(context.model, task, context)

    first = make()
    stopped = stop(begin(data, first, task), first, after)
    second = make()
    resumed = begin(data, second, task)
    resumed.begin(task, stopped["passes"])
    second.restore(stopped["learner"])
    resumed.model.backbone.load_state_dict(stopped["weights"])
    assert second.fit(resumed.model, task, resumed).figures == report.figures
    assert same(weights(resumed), weights(context))


def test_a_network_may_add_a_loss_of_its_own(data: SourceData) -> None:
    found = []
    for added in (False, True):
        task, learner = task_of(data.train), learner_of(steps=1, optimizer={"name": "sgd", "lr": 0.1}, clip=None, shuffle=False)
        context = begin(data, learner, task)
        network: Any = context.model.backbone.network
        last = network.lm_head.weight
        if added:
            network.auxiliary_loss = lambda last=last: 3.0 * last.sum()
        learner.fit(context.model, task, context)
        found.append(last.detach().clone())
    assert torch.allclose(found[0] - found[1], torch.full_like(last, 0.3), atol=1e-6)


# Rejection sampling ---------------------------------------------------------------------------------------------------------------


class Long(Verifier):
    def __call__(self, answers: Any, rows: Any) -> Tensor:
        assert len(rows["answer"]) == len(answers)
        return torch.tensor([float(len(answer.split()) > 2) for answer in answers])


def test_what_is_kept_are_the_models_own_answers_that_were_accepted(data: SourceData, monkeypatch: pytest.MonkeyPatch) -> None:
    task, learner = task_of(data.train), RejectionSFT(rounds=2, prompts=5, group=4, rewards=(Long(),), most=2, **FAST)
    context = begin(data, learner, task)
    said: list[Any] = []
    taught: list[tuple[int, str]] = []
    language: Any = context.model.backbone
    speak, teach = language.speak, learner.teach

    def listening(batch: Batch, **options: Any) -> Any:
        said.append((batch.ids.tolist(), speak(batch, **options)))
        return said[-1][1]

    def watching(batch: Batch, answers: list[str]) -> None:
        taught.extend(zip(batch.ids.tolist(), answers, strict=True))
        teach(batch, answers)

    monkeypatch.setattr(language, "speak", listening)
    monkeypatch.setattr(learner, "teach", watching)
    report = learner.fit(context.model, task, context)
    expected = []
    for ids, spoken in said:
        for place, row in enumerate(ids):
            mine = [text for text in spoken.texts[4 * place : 4 * place + 4] if len(text.split()) > 2]
            expected += [(row, text) for text in mine[:2]]
    assert sorted(taught) == sorted(expected)
    assert len(said) == 2
    last = [text for text in said[1][1].texts if len(text.split()) > 2]
    assert 0 < report.figures["accepted"] <= len(last) / 20


def test_a_round_of_which_nothing_is_kept_says_so_and_changes_nothing(data: SourceData, monkeypatch: pytest.MonkeyPatch) -> None:
    task, learner = task_of(data.train), learner_of("rejection_sft", rounds=1, prompts=4, group=2, rewards=["format"])
    context = begin(data, learner, task)
    warnings: list[str] = []
    monkeypatch.setattr(context.events, "warn", warnings.append)
    before = weights(context)
    report = learner.fit(context.model, task, context)
    assert same(weights(context), before)
    assert report.figures["accepted"] == 0
    assert "none of 8 answers was accepted" in warnings[0]


# An order --------------------------------------------------------------------------------------------------------------------------


def test_a_task_that_has_an_order_is_taught_in_it(data: SourceData) -> None:
    taught: list[int] = []
    for ordered in (True, False):
        task, learner = dataclasses.replace(task_of(data.train), about={"ordered": ordered}), learner_of(epochs=2)
        learner.teach = lambda raw, answers: taught.extend(raw.ids.tolist())
        learner.fit(begin(data, learner, task).model, task, learner.context)
        assert (taught == data.train.ids.tolist() * 2) == ordered and sorted(taught) == sorted(data.train.ids.tolist() * 2)
        taught.clear()


def test_rounds_go_on_through_an_order(data: SourceData) -> None:
    task = dataclasses.replace(task_of(data.train), about={"ordered": True})
    learner = learner_of("rejection_sft", rounds=3, prompts=4, group=2, accept=0.0)
    context = begin(data, learner, task)
    came, answers = [], learner._answers

    def watched(task: Task) -> list[tuple[int, str]]:
        kept: list[tuple[int, str]] = answers(task)
        came.append(list(dict.fromkeys(row for row, _ in kept)))
        return kept

    learner._answers = watched
    learner.fit(context.model, task, context)
    assert came == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 1, 2]]
