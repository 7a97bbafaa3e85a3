"""What session strategies promise of weights, adapters, earlier prompts and figures: equal bit for bit, or worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import comparable, small_run
from test_language_model import qwen_vl
from test_resume import stopped_and_resumed
from test_strategies import learn
from torch import Tensor
from toy_speaker import BEGIN, ToySpeaker

import streamcl
from streamcl import exporting, running
from streamcl.checkpoint import Checkpoints
from streamcl.config import from_mapping
from streamcl.context import Context
from streamcl.engine import Engine
from streamcl.errors import ConfigError
from streamcl.learned import Learned
from streamcl.learner import Learner, Report
from streamcl.nn.backbones.language_model import Speaker
from streamcl.nn.language import Spoken
from streamcl.nn.model import Model, plain_name
from streamcl.plugins import find
from streamcl.seeding import generator
from streamcl.stream import Batch, Task

Sessions: Any = find("strategy", "sequential").load().__mro__[1]  # what the strategies share
ROOM = __import__(Sessions.__module__, fromlist=["divergences"])
AFTER = ("routed", "kept", "merged")
WARM = {"rank": 2, "alpha": 4}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCL_CACHE", str(tmp_path_factory.getbasetemp() / "tiny_vlm"))
        yield


class Writes(Learner):
    """Writes what it pleases into all that may be trained, and notes what it was given."""

    def __init__(self, size: float = 0.1) -> None:
        self.size = size
        self.rows: list[list[int]] = []
        self.ends: list[dict[str, Tensor]] = []  # the weights that each session came to

    def fit(self, model: Model, task: Task, context: Context) -> Report:
        language: Any = model.backbone
        network = language.network
        free = {name: value for name, value in network.named_parameters() if value.requires_grad}
        if not hasattr(network, "peft_config"):
            language.hold(free.values())
        draw = generator(1, "writes", task.index)
        with torch.no_grad():
            for value in free.values():
                value.add_(self.size * torch.randn(value.shape, generator=draw))
        self.rows.append(task.train[torch.arange(len(task.train))].ids.tolist())
        self.ends.append(weights(network))
        return Report({"written": float(len(free))})


def weights(network: Any) -> dict[str, Tensor]:
    return {plain_name(name): value.detach().clone() for name, value in network.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def built(name: str = "sequential", learner: Learner | None = None, exemplars: int = 6, **options: Any) -> Any:
    config = small_run(name, log=[], memory={"exemplars": exemplars})
    config["strategy"] = {"name": name, "learner": config["strategy"]["learner"], **options}
    run: Any = running.build(from_mapping(config), None)
    if learner is not None:
        run.strategy.learner = learner
    return run


def asked(run: Engine, task: Task, rows: int = 4) -> Batch:
    return run.context.prepare(task.train[torch.arange(rows)], train=False)


def said(run: Any, batch: Batch) -> Tensor:
    """The logits of a fixed answer to each row."""
    language = run.strategy.language
    words = torch.tensor([[5, 6, 7]]).expand(len(batch), 3)
    with torch.no_grad():
        found: Tensor = language.logits(batch, Spoken([], words, torch.ones_like(words), 1))
    return found


# Earlier prompts ----------------------------------------------------------------------------------------------------------------


def test_earlier_prompts_are_their_share_of_a_session_and_strewn_among_its_own() -> None:
    learner = Writes()
    run = built(learner=learner, replay=0.25)
    first, second, third = learn(run, 3)
    own = [first.train.ids.tolist(), second.train.ids.tolist(), third.train.ids.tolist()]
    assert learner.rows[0] == own[0]  # nothing is remembered yet
    for session, earlier in ((1, own[0]), (2, own[0] + own[1])):
        rows = learner.rows[session]
        assert len(rows) == 16  # 12 of its own, and 4 of 16 are the share
        assert [row for row in rows if row in own[session]] == own[session]
        replayed = [row for row in rows if row not in own[session]]
        assert len(set(replayed)) == 4
        assert set(replayed) <= set(earlier)
        places = [place for place, row in enumerate(rows) if row in replayed]
        assert places != list(range(12, 16))


def test_a_session_that_is_entered_again_has_the_same_rows() -> None:
    run = built(learner=Writes(), replay=0.25)
    learn(run, 1)
    other = built(learner=Writes(), replay=0.25)
    other.restore(run.state())
    task = run._next_task()
    assert task is not None
    every = torch.arange(16)
    found = [again.strategy.with_replay(task).train[every] for again in (run, run, other)]
    assert found[0].ids.tolist() == found[1].ids.tolist() == found[2].ids.tolist()
    assert found[0].inputs["text"] == found[2].inputs["text"]
    assert found[0].extra["answer"] == found[2].extra["answer"]


def test_no_more_is_replayed_than_is_remembered() -> None:
    learner = Writes()
    learn(built(learner=learner, replay=0.9, exemplars=5), 2)
    assert [len(rows) for rows in learner.rows] == [12, 12 + 5]


def test_the_rows_of_a_replayed_session_are_whole() -> None:
    run = built(learner=Writes(), replay=0.25)
    first, second = learn(run, 2)
    mixed = run.strategy.with_replay(second).train
    batch = mixed[torch.arange(len(mixed))]
    for place, row in enumerate(batch.ids.tolist()):
        task = first if row in first.train.ids.tolist() else second
        alone = task.train[torch.tensor([task.train.ids.tolist().index(row)])]
        assert batch.inputs["text"][place] == alone.inputs["text"][0]
        assert batch.extra["answer"][place] == alone.extra["answer"][0]
        for name, values in alone.inputs.items():
            if isinstance(values, Tensor) and bool(alone.present is None or name not in alone.present or alone.present[name][0]):
                assert torch.equal(batch.inputs[name][place], values[0])


# Weights that are averaged --------------------------------------------------------------------------------------------------------


def test_what_is_merged_whole_is_sequential_and_what_is_merged_not_at_all_is_as_before() -> None:
    plain, whole, none = built(), built("merge", share=1.0), built("merge", share=0.0)
    first = weights(none.strategy.language.network)
    for run in (plain, whole, none):
        learn(run, 2)
    end = weights(plain.strategy.language.network)
    assert same(weights(whole.strategy.language.network), end)
    assert same(weights(none.strategy.language.network), first)
    assert not same(first, end)


def test_the_average_of_two_sessions_by_hand() -> None:
    learner = Writes()
    run = built("merge", learner)
    learn(run, 2)
    end = weights(run.strategy.language.network)
    for name, value in end.items():
        one, two = (ends[name] for ends in learner.ends)  # the second session began with what the first came to
        assert torch.allclose(value, (one + two) / 2, atol=1e-6)
    run = built("merge", Writes(), share=0.25)
    before = weights(run.strategy.language.network)
    learn(run, 1)
    for name, value in weights(run.strategy.language.network).items():
        assert torch.allclose(value, before[name] + 0.25 * (run.strategy.learner.ends[0][name] - before[name]), atol=1e-6)


# An adapter for each session ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", AFTER)
def test_a_fresh_adapter_changes_nothing_bit_for_bit(after: str) -> None:
    run = built("adapter_per_session", Writes(), adapter=WARM, after=after)
    task = run._next_task()
    batch = asked(run, task)
    before = said(run, batch)
    run.strategy.before_session(task)
    assert any("lora" in name for name in weights(run.strategy.language.network))
    assert torch.equal(said(run, batch), before)


@pytest.mark.parametrize("after", AFTER)
def test_the_models_own_weights_are_what_they_were_and_the_base_answers_as_at_first(after: str) -> None:
    run = built("adapter_per_session", Writes(), adapter=WARM, after=after)
    network = run.strategy.language.network
    first = weights(network)
    answers: list[Tensor] = []
    batch = asked(run, run.scenario.task(0))
    for _ in range(2):
        answers.append(said(run, batch))
        learn(run, 1)
    language = run.strategy.language
    last = said(run, batch)
    assert not torch.equal(last, answers[0])
    with language.policy("base"):
        assert torch.equal(said(run, batch), answers[0])
    with language.policy("previous"):  # as the second session found it: without its own adapter, or for `routed` without any
        found = said(run, batch)
    assert torch.equal(found, answers[0] if after == "routed" else answers[1])
    assert torch.equal(said(run, batch), last)
    own = {name: value for name, value in weights(language.network).items() if "lora" not in name}
    assert own.keys() == first.keys()
    assert same(own, first) == (after != "merged")
    assert not any(value.requires_grad for name, value in language.network.named_parameters() if "lora" not in name)


def test_an_adapter_that_is_merged_is_its_product_by_hand() -> None:
    learner = Writes()
    run = built("adapter_per_session", learner, adapter=WARM, after="merged")
    first = weights(run.strategy.language.network)
    learn(run, 1)
    end = weights(run.strategy.language.network)
    changed = 0
    for name, value in end.items():
        stem = name.removesuffix(".weight")
        down, up = (learner.ends[0].get(f"{stem}.lora_{part}.session0.weight") for part in "AB")
        if down is None or up is None:
            assert torch.equal(value, first[name])
        else:
            assert torch.allclose(value, first[name] + 4 / 2 * up @ down, atol=1e-6)
            changed += 1
    assert changed == sum("lora_A" in name for name in learner.ends[0]) > 0


def test_only_the_newest_adapter_learns_and_kept_ones_add_up() -> None:
    learner = Writes()
    run = built("adapter_per_session", learner, adapter=WARM, after="kept")
    learn(run, 2)
    one, two = learner.ends
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert run.strategy.language.network.active_adapters == ["session0", "session1"]
    merged = built("adapter_per_session", Writes(), adapter=WARM, after="merged")
    learn(merged, 2)
    batch = asked(run, run.scenario.task(0))
    with run.strategy.language.policy("base"):
        before = said(run, batch)
    assert not torch.allclose(said(run, batch), before, atol=1e-2)
    other = Writes()
    alone = built("adapter_per_session", other, adapter=WARM, after="routed")
    learn(alone, 2)
    assert not torch.allclose(said(run, batch), said(alone, batch), atol=1e-2)  # the second adapter without the first


def routed(answers: int = 3) -> tuple[Any, Batch, Tensor]:
    """A run after three sessions whose prompts are told apart by made-up features; a batch, and whose each of its rows is."""
    run = built("adapter_per_session", Writes(2.0), adapter=WARM, after="routed")
    owner = torch.tensor([2, 0, 1, 1, 0, 2])
    strategy = run.strategy
    strategy.features = lambda batch: torch.eye(3)[torch.full((len(batch),), run.context.task.index)]
    tasks = learn(run, 3)
    batch = asked(run, tasks[1], 6)
    strategy.features = lambda batch: torch.eye(3)[owner] * 0.9 + 0.01
    return run, batch, owner


@pytest.mark.parametrize("samples", [1, 2])
def test_each_row_is_answered_by_the_adapter_of_its_session_and_stays_in_its_place(samples: int) -> None:
    run, batch, owner = routed()
    strategy, language = run.strategy, run.strategy.language
    spoken = strategy.answer(batch, samples=samples)
    assert spoken.samples == samples
    expected: list[str] = []
    lengths: list[int] = []
    different = set()
    for row, session in enumerate(owner.tolist()):
        by = []
        for name in ("session0", "session1", "session2"):
            language.network.base_model.set_adapter(name)
            by.append(language.speak(batch[[row]]))
        different.add(len({alone.texts[0] for alone in by}))
        expected += by[session].texts * samples
        lengths += by[session].lengths.tolist() * samples
    assert spoken.texts == expected
    assert max(different) > 1  # else nothing was told apart
    assert spoken.lengths.tolist() == lengths


def test_after_an_answer_the_newest_adapter_is_the_one_that_is_active() -> None:
    run, batch, _ = routed()
    strategy = run.strategy
    strategy.answer(batch)
    network = strategy.language.network
    assert network.active_adapters == ["session2"]
    assert {name.split(".")[-2] for name, value in network.named_parameters() if value.requires_grad} == {"session2"}


def test_prototypes_are_the_means_of_what_the_base_holds_of_a_sessions_prompts() -> None:
    run = built("adapter_per_session", Writes(), adapter=WARM)
    task = run.scenario.task(0)
    with torch.no_grad():
        before = run.strategy.language(asked(run, task, len(task.train))).float().mean(dim=0)
    learn(run, 1)
    assert run.memory.prototypes.labels().tolist() == [0]
    assert torch.allclose(run.memory.prototypes.means()[0].float(), before, atol=1e-5)


# Stopping -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("sequential", {"adapter": WARM, "replay": 0.25}), ("merge", {}), *(("adapter_per_session", {"after": after}) for after in AFTER)],
)
def test_a_run_that_was_stopped_inside_a_session_ends_with_the_same_weights(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = {"name": "sft", "steps": 3, "batch": 8, "optimizer": {"name": "adamw", "lr": 0.01}}
    if name == "adapter_per_session":
        options = {**options, "adapter": {**WARM, "dropout": 0.2}}
    config = small_run("merge", log=[])
    config["strategy"] = {"name": name, "learner": learner, **options, **({} if options.get("after") == "routed" else {"probes": 2})}
    whole = running.run(config, out=tmp_path / "whole")
    again = stopped_and_resumed(config, tmp_path / "stopped", monkeypatch, 5)
    assert comparable(again) == comparable(whole)
    states = [Checkpoints(tmp_path / one / "checkpoints").load(pytest.fail) for one in ("whole", "stopped")]
    assert all(states)
    mine, theirs = (state["model"]["tensors"] for state in states if state is not None)
    assert same(dict(mine), dict(theirs))


@pytest.mark.parametrize("after", AFTER)
def test_an_export_answers_as_the_run(after: str, tmp_path: Path) -> None:
    config = small_run("adapter_per_session", log=[])
    config["strategy"]["after"] = after
    running.run(config, out=tmp_path / "run")
    mine, theirs = running.load(tmp_path / "run"), exporting.read(exporting.export(tmp_path / "run", tmp_path / "model"))
    batch = exporting.made_up(mine.info)

    def answers(learned: Learned) -> list[str] | None:
        return learned.answer(batch).texts

    assert answers(mine) == answers(theirs)
    assert same(weights(mine.model), weights(theirs.model))


# Figures --------------------------------------------------------------------------------------------------------------------------

ASKED = Batch({"text": [""] * 4}, None, torch.arange(4))


def table(*rows: list[float]) -> Tensor:
    return torch.tensor([list(row) for row in rows]).log()


ONE = table([1, 0, 0], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25])  # after the end, after yes, after no, at first
OTHER = table([1, 0, 0], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75], [0.25, 0.5, 0.25])


def kl(one: Tensor, other: Tensor, longest: int) -> float:
    """KL(one || other) of whole answers, by summation over all of them."""
    total = 0.0
    answers: list[list[int]] = [[]]
    for _ in range(longest):
        answers = [[*said, word] for said in answers for word in range(3) if not said or said[-1]] + [a for a in answers if a and not a[-1]]
    for answer in answers:
        before = [BEGIN, *answer[:-1]]
        p, q = (sum(float(of[last, word]) for last, word in zip(before, answer, strict=True)) for of in (one, other))
        total += float(torch.tensor(p).exp()) * (p - q)
    return total


def test_equal_policies_do_not_diverge() -> None:
    speaker = ToySpeaker(OTHER.clone().nan_to_num(neginf=-1e4), longest=3)
    assert ROOM.divergences(speaker, ASKED, "base", generator(0)) == (0.0, 0.0)
    run = built(probes=4)
    learn(run, 1)
    language = run.strategy.language
    language.keep("now")
    assert ROOM.divergences(language, asked(run, run.scenario.task(0)), "now", generator(0)) == (0.0, 0.0)
    assert all(value > 0 for value in ROOM.divergences(language, asked(run, run.scenario.task(0)), "base", generator(0)))


def test_divergences_of_one_word_are_the_sums_by_hand() -> None:
    """Of one word nothing depends on what is drawn: 1/2 ln 2 + 1/4 ln 1/2 = 1/4 ln 2, and the same the other way round."""
    speaker = ToySpeaker(ONE, longest=1)
    speaker.say(OTHER)
    forward, reverse = ROOM.divergences(speaker, ASKED, "base", generator(0))
    assert forward == pytest.approx(0.25 * 0.6931472, abs=1e-6)
    assert reverse == pytest.approx(0.25 * 0.6931472, abs=1e-6)
    speaker.say(table([1, 0, 0], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    forward, reverse = ROOM.divergences(speaker, ASKED, "base", generator(0))
    assert forward == pytest.approx(0.5 * 0.6931472 - 0.25 * 0.6931472, abs=1e-6)


def test_divergences_of_answers_are_in_the_mean_the_exact_sums() -> None:
    speaker = ToySpeaker(ONE.clamp(min=-1e4), longest=3)
    speaker.say(OTHER.clamp(min=-1e4))
    many = Batch({"text": [""] * 40000}, None, torch.arange(40000))
    forward, reverse = ROOM.divergences(speaker, many, "base", generator(0))
    exact = kl(ONE, OTHER, 3), kl(OTHER, ONE, 3)
    assert abs(exact[0] - exact[1]) > 0.05  # so that one cannot pass for the other
    assert (forward, reverse) == pytest.approx(exact, abs=0.01)


def test_further_answers_are_a_head_of_their_own_and_the_same_whenever_they_are_asked() -> None:
    run = built(learner=Writes(), samples=3)
    task = learn(run, 1)[0]
    batch = asked(run, task)
    first, second = run.strategy.predict(batch), run.strategy.predict(batch)
    drawn = first.heads["pass@3"]
    assert [len(row) for row in drawn] == [3] * 4
    assert drawn == second.heads["pass@3"]
    assert len({text for row in drawn for text in row}) > 1
    assert len(first.texts) == 4
    assert first.texts == run.strategy.language.speak(batch).texts


def test_the_figures_of_a_batch_by_hand() -> None:
    run = built(learner=Writes(), probes=2, format="format", samples=2)
    strategy = run.strategy
    tasks = learn(run, 2)
    run.context.task = tasks[1]
    for task, kind in zip(tasks, ("old", "new"), strict=True):
        raw = task.train[torch.arange(4)]
        batch = run.context.prepare(raw, train=False)
        spoken = strategy.language.speak(batch)
        strategy.predict(batch)
        figures = strategy.measure(batch)
        assert figures["length"] == pytest.approx(sum(spoken.lengths.tolist()) / 4)
        assert figures["format_rate"] == float(strategy.format(spoken.texts, raw.extra).mean())
        named = {f"{way}kl_{policy}_{kind}" for way in ("", "reverse_") for policy in ("base", "previous")}
        assert figures.keys() == {"length", "format_rate", *named}
        draw = generator(run.context.seed, "probes", *batch.ids[:1].tolist())
        expected = ROOM.divergences(strategy.language, batch[:2], "previous", draw)
        assert (figures[f"kl_previous_{kind}"], figures[f"reverse_kl_previous_{kind}"]) == expected
        assert all(value >= 0 for value in expected)


def test_figures_and_heads_reach_the_scores(tmp_path: Path) -> None:
    config = small_run("sequential", log=[])
    scores = running.run(config, out=tmp_path / "run")
    assert scores["heads"].keys() == {"pass@2"}
    named = scores["metrics"]
    assert {"length", "format_rate", "kl_base_new", "reverse_kl_previous_new", "kl_base_old"} <= named.keys()
    assert named["kl_previous_new"]["per_task"][0] > 0


# Messages -------------------------------------------------------------------------------------------------------------------------

CLASSIFIER = {"name": "mlp", "hidden": [8]}
DIGITS = {"name": "class_incremental", "data": "digits", "tasks": 5}
SFT = {"name": "sft", "steps": 1}
ACTS = {"name": "grpo", "steps": 1}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"strategy": {"name": "sequential", "learner": SFT, "replay": 1.0}}, "strategy.replay is 1, which leaves no room"),
    ({"strategy": {"name": "sequential", "learner": SFT, "replay": 0.5}, "memory": {"exemplars": 0}}, "memory.exemplars is 0"),
    ({"strategy": {"name": "sequential", "learner": SFT}, "model": {"backbone": CLASSIFIER}}, "the backbone does not speak: take"),
    (
        {"strategy": {"name": "sequential", "learner": ACTS, "samples": 2}, "scenario": DIGITS, "model": {"backbone": CLASSIFIER}},
        "adapter, samples, probes, format and ladder belong to models that answer in words",
    ),
    (
        {"strategy": {"name": "merge", "learner": ACTS}, "scenario": DIGITS, "model": {"backbone": CLASSIFIER}},
        "merge averages the weights of models that answer in words",
    ),
    (
        {"strategy": {"name": "adapter_per_session", "learner": ACTS}, "scenario": DIGITS, "model": {"backbone": CLASSIFIER}},
        "adapter_per_session adapts models that answer in words",
    ),
    (
        {"strategy": {"name": "sequential", "learner": SFT, "adapter": {"layers": ["no_such_layer"]}}},
        "strategy.adapter: .*no_such_layer",
    ),
    ({"strategy": {"name": "merge", "learner": SFT, "adapter": {"rank": 2}}}, "merge averages the model's own weights"),
    ({"strategy": {"name": "adapter_per_session", "learner": SFT, "probes": 4}}, "after=routed has one for each session"),
]


@pytest.mark.parametrize(("changes", "problem"), MISTAKES)
def test_mistakes_get_one_message_before_anything_is_learned(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    config = {**small_run("sequential", log=[]), **changes}
    with pytest.raises(ConfigError, match=problem) as caught:
        running.run(config, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_model_that_speaks_is_no_classifier() -> None:
    run = built()
    with pytest.raises(ConfigError, match="the backbone answers in words, and the target of this stream is class: take a classifier"):
        run.strategy.start(dataclasses.replace(run.info, target="class"), run.context)


def test_unknown_layers_of_an_adapter_for_each_session_are_told_too(tmp_path: Path) -> None:
    config = small_run("adapter_per_session", log=[])
    config["strategy"]["adapter"] = {"layers": ["no_such_layer"]}
    with pytest.raises(ConfigError, match=r"strategy.adapter: .*no_such_layer"):
        running.run(config, out=tmp_path / "run")


EVEN = """
import torch
from streamcl.verifier import Verifier


class Even(Verifier):
    def __call__(self, answers, rows):
        return torch.tensor([float(len(answer) % 2 == 0) for answer in answers])
"""

# A model by its folder --------------------------------------------------------------------------------------------------------------


def test_a_model_by_its_folder_learns_by_reinforcement_through_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setitem(Speaker.__init__.__kwdefaults__ or {}, "longest", 6)
    qwen_vl(tmp_path / "model")
    (tmp_path / "even.py").write_text(EVEN)
    config = small_run("sequential", log=["jsonl"])
    learner = {"name": "grpo", "steps": 2, "prompts": 2, "group": 4, "rewards": ["own", str(tmp_path / "even.py")], "beta": 0.1}
    optimizer = {"name": "adamw", "lr": 0.01}
    config["scenario"]["data"] = {"name": "puzzles", "skills": ["counting"], "count": 6, "test": 2, "difficulty": [1, 1]}
    config["strategy"] = {"name": "sequential", "learner": {**learner, "optimizer": optimizer}, "adapter": WARM, "probes": 2}
    config["model"] = {"backbone": f"hf:{tmp_path / 'model'}"}
    running.run(config, out=tmp_path / "run")
    state = Checkpoints(tmp_path / "run" / "checkpoints").load(pytest.fail)
    assert state is not None
    names = [name for name in state["model"]["tensors"] if not name.startswith("head.")]
    assert names
    assert all(".lora_" in name for name in names)  # the weights themselves are named, not copied
    assert not any("visual" in name for name in names)  # the vision tower is frozen, and gets no adapter
    assert all(".default." in name for name in names)
    moved = [value for name, value in state["model"]["tensors"].items() if "lora_B" in name]
    assert any(bool(value.any()) for value in moved)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    learned, scored = (event["fields"] for event in events if event["kind"] == "figures")
    assert {"reward", "reward/own", "reward/Even", "length", "kl"} <= learned.keys()
    assert scored["kl_base_new"] > 0


def test_an_export_answers_in_words_and_its_card_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    running.run(small_run("sequential", log=[]), out=run)
    exporting.export(run, tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    assert "A language model that learned to answer them" in card and "classifier" not in card
    model, before = streamcl.load(tmp_path / "model"), streamcl.load(run)
    shapes = {name: modality.shape for name, modality in model.info.modalities.items() if modality.kind != "text"}
    asked = {
        "text": ["How many things are there?"] * 2,
        **{name: torch.zeros(2, *shape, dtype=torch.uint8) for name, shape in shapes.items()},
    }
    said = model.predict(asked)
    assert len(said) == 2 and all(isinstance(text, str) for text in said) and said == before.predict(asked)
