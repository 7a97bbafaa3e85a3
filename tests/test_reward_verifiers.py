"""Rewards that judge how an answer is written: its form, its length, its thinking."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamcl.errors import ConfigError, DataError
from streamcl.verifiers.format import Format
from streamcl.verifiers.overlong import Overlong
from streamcl.verifiers.thought import Thought


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<think>so</think><answer>4</answer>", 1),
        ("  <think>so\nand so</think>\n<answer>4</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>so</think> then <answer>4</answer>", 0),
        ("well <think>so</think><answer>4</answer>", 0),
        ("<think>so</think><answer>4</answer>.", 0),
        ("<answer>4</answer><think>so</think>", 0),
        ("<think>so</think>", 0),
        ("<think>so<think></think><answer>4</answer>", 0),
        ("<think>so</think><answer>4</answer><answer>4</answer>", 0),
        ("<think><answer>4</answer></think>", 0),
        ("<Think>so</Think><answer>4</answer>", 0),
        ("<think>so</think><answer>4", 0),
        ("<observe>a</observe><think>so</think><answer>4</answer>", 0),
        ("", 0),
    ],
)
def test_a_form_is_each_block_once_and_nothing_beside(text: str, fits: float) -> None:
    assert Format()([text], {}).tolist() == [fits]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<observe>a</observe><think>so</think><answer>4</answer>", 1),
        ("<think>I see: <observe>a</observe> so</think> <answer>4</answer>", 1),
        ("<think>so</think><observe>a</observe><answer>4</answer>", 0),
        ("<think>so</think><answer><observe>a</observe>4</answer>", 0),
        ("<think><observe>a</think></observe><answer>4</answer>", 0),
        ("<think>so</think><answer>4</answer>", 0),
    ],
)
def test_an_observation_stands_before_the_thinking_or_in_it(text: str, fits: float) -> None:
    assert Format(tags=["observe", "think", "answer"])([text], {}).tolist() == [fits]


def test_many_tags_are_looked_through_once() -> None:
    assert Format()(["<think>" * 100_000, "</answer>" * 100_000], {}).tolist() == [0, 0]
    assert Thought()(["<think>" * 100_000], {}).tolist() == [0]


@pytest.mark.parametrize("tags", [[], ["think", "think"], ["<think>"], [""]])
def test_tags_that_are_none_are_refused(tags: list[str]) -> None:
    with pytest.raises(ConfigError, match="format: tags is"):
        Format(tags=tags)


def test_an_answer_is_punished_on_a_straight_line_before_it_is_too_long() -> None:
    lengths = torch.tensor([0, 80, 85, 90, 100, 500])
    assert Overlong(longest=100, cushion=20)([""] * 6, {"length": lengths}).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    assert Overlong()(["", ""], {"length": [16384, 18432]}).tolist() == [0, -0.5]


@pytest.mark.parametrize(("rows", "told"), [({}, "is missing"), ({"length": torch.ones(2)}, "has 2 values")])
def test_overlong_says_which_column_it_needs(rows: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=f"'length' {told}"):
        Overlong()([""], rows)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("<think>a b c d</think><answer>1</answer>", 1.0),
        ("<think>a b</think>", 0.5),  # two words of four
        ("<think>a b a b a b</think>", 0.4),  # two of its five pairs are new
        ("<think>A b a B</think>", 2 / 3),
        ("<think>a b c d e f g h i j k l</think>", 10 / 12),
        ("<think>a</think>", 0.25),
        ("<think> </think>", 0.0),
        ("a b c d", 0.0),
    ],
)
def test_thinking_is_rated_by_its_form(text: str, rate: float) -> None:
    assert Thought(longest=10)([text], {}).tolist() == pytest.approx([rate])


@pytest.mark.parametrize(
    ("kind", "options"), [(Overlong, {"longest": 4, "cushion": 5}), (Thought, {"shortest": 9, "longest": 8})], ids=["overlong", "thought"]
)
def test_bounds_that_cross_are_refused(kind: Any, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=kind.__name__.lower()):
        kind(**options)


@pytest.mark.parametrize("kind", [Format, Overlong, Thought])
def test_each_has_a_weight_and_judges_nothing_as_nothing(kind: Any) -> None:
    assert kind().weight == 1.0 and kind(weight=0.5).weight == 0.5
    found = kind()([], {"length": []})
    assert found.shape == (0,) and found.dtype == torch.float32
