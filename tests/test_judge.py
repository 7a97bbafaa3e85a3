"""A language model as a reward model: what it is asked, and what is read out of what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streamcl.config import plugin_spec
from streamcl.errors import ConfigError
from streamcl.nn import tiny_vlm
from streamcl.stream import Batch
from streamcl.verifiers.judge import score


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("0.7", 0.7),
        ("Score: 1.", 1.0),
        ("between 0.2 and 0.4, so 0.3", 0.3),
        ("1.0", 1.0),
        ("0", 0.0),
        ("0.75", 0.0),
        ("8/10", 0.0),
        ("90%", 0.0),
        ("-0.5", 0.0),
        ("10", 0.0),
        ("sound", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_is_the_rating_where_it_is_one(said: str, value: float) -> None:
    assert score(said) == value


def test_a_model_in_a_folder_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMCL_CACHE", str(tmp_path))
    folder = tiny_vlm.folder(edge=28, patch=7, hidden=16, layers=1, heads=2, vision_layers=1, places=128, words="")
    judge: Any = plugin_spec(
        "verifier", {"name": "judge", "model": str(folder), "longest": 4, "prompt": "{question} {answer}", "weight": 0.3}
    ).build()
    assert judge.weight == 0.3
    rows = {"question": ["how many?", "which {answer}?", "how many?", "what?"], "choices": ["", "left\nright", "", ""]}
    answers = ["two red", "left", "two red", " "]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert judge(answers, rows).shape == (4,)
    assert torch.equal(torch.get_rng_state(), state)

    asked: list[list[str]] = []
    speak = judge.speaker.speak

    def watched(batch: Batch, **options: Any) -> Any:
        asked.append(list(batch.inputs["text"]))
        assert not options  # greedy
        return speak(batch)

    monkeypatch.setattr(judge.speaker, "speak", watched)
    monkeypatch.setattr("streamcl.verifiers.judge.score", lambda said: 1 + len(said) / 100)
    rated = judge(answers, rows)
    assert asked == [["how many? two red", "which {answer}?\nleft\nright left"]]
    said = speak(Batch({"text": asked[0]}, None, torch.arange(2))).texts
    first, second = (1 + len(text) / 100 for text in said)
    torch.testing.assert_close(rated, torch.tensor([first, second, first, 0.0]))
    assert not any(value.requires_grad for value in judge.speaker.network.parameters())


def test_what_cannot_judge_is_refused() -> None:
    with pytest.raises(ConfigError, match="no model is named"):
        plugin_spec("verifier", "judge").build()(["two"], {})
    with pytest.raises(ConfigError, match="nothing in its prompt stands for the answer"):
        plugin_spec("verifier", {"name": "judge", "prompt": "rate it"}).build()
