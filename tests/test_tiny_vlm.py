"""The tiny vision-language model: its words, what its processor makes with and without it, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcl.config import plugin_spec
from streamcl.errors import ConfigError, DataError
from streamcl.nn import tiny_vlm
from streamcl.nn.backbones.language_model import Speaker
from streamcl.stream import Batch, Modality, SourceData, StreamInfo

SMALL = {"hidden": 16, "layers": 1, "heads": 2, "longest": 6}


def puzzles(**options: Any) -> SourceData:
    return plugin_spec("source", {"name": "puzzles", "count": 12, "test": 4, "skills": ["counting", "chart"], **options}).build().load()


def info_of(data: SourceData) -> StreamInfo:
    return StreamInfo(data.modalities, target="text", metrics=("verified",))


def tiny(data: SourceData, **options: Any) -> Any:
    backbone = plugin_spec("backbone", {"name": "tiny_vlm", **SMALL, **options}).build()
    backbone.build(info_of(data))
    backbone.eval()
    return backbone


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path_factory.getbasetemp() / "tiny_vlm"
    monkeypatch.setenv("STREAMCL_CACHE", str(folder))
    yield folder


@pytest.mark.parametrize("colours", [True, False])
def test_its_tokenizer_knows_every_word_of_the_puzzles(colours: bool) -> None:
    known, data = tiny_vlm.tokenizer(), puzzles(skills=None, count=300, colours=colours)
    batch = data.train[torch.arange(len(data.train))]
    said = [*batch.inputs["text"], *batch.extra["answer"], *(row.replace("\n", " ") for row in batch.extra["choices"]), *data.class_names]
    ids = known(said)["input_ids"]
    assert known.unk_token_id not in {number for row in ids for number in row}
    assert known.unk_token_id in known("a zebra")["input_ids"]
    assert known.unk_token_id not in tiny_vlm.tokenizer("Zebra")("a zebra")["input_ids"]


def test_what_is_written_is_read_again_and_tags_are_one_token_each() -> None:
    known = tiny_vlm.tokenizer()
    text = "<think> how many? </think> <answer> red, green </answer>"
    ids = known(text)["input_ids"]
    assert known.convert_ids_to_tokens(ids) == [
        "<think>", "▁how", "▁many", "?", "</think>", "<answer>", "▁red", ",", "▁green", "</answer>",
    ]  # fmt: skip
    said = known.decode([*ids, known.eos_token_id, known.pad_token_id], skip_special_tokens=True)
    assert said == "<think> how many?</think><answer> red, green</answer>"
    assert known(said)["input_ids"] == ids
    assert known("<answer>12</answer>")["input_ids"] == known("<answer> 12 </answer>")["input_ids"]


def test_the_fast_path_gives_what_the_processor_gives() -> None:
    data = puzzles(skills=["counting", "order"])
    model = tiny(data, prompt="{question} {choices}", system="look")
    rows = torch.tensor([0, 13, 1, 14, 15])
    for batch in (data.train[rows], data.train[rows[:1]], data.train[rows[1:2]]):
        fast, slow = model.prompts(batch), Speaker.prompts(model, batch)
        assert fast.keys() == slow.keys()
        assert torch.equal(fast["input_ids"], slow["input_ids"])
        assert torch.equal(fast["attention_mask"], slow["attention_mask"])
        assert torch.allclose(fast["pixel_values"], slow["pixel_values"], atol=1e-6)
        assert torch.equal(model._lengths(batch), fast["attention_mask"].sum(dim=1))
        assert torch.equal(model._lengths(batch), Speaker._lengths(model, batch))


def test_pictures_may_be_grey_prepared_or_absent() -> None:
    info = StreamInfo({"text": Modality("text"), "image": Modality("image", (1, 8, 8), 16)}, target="text", metrics=("verified",))
    model = plugin_spec("backbone", {"name": "tiny_vlm", **SMALL, "patch": 4}).build()
    model.build(info)
    values = torch.arange(3 * 64).reshape(3, 1, 8, 8) % 17
    there = torch.tensor([True, False, True])
    batch = Batch({"text": ["how many?"] * 3, "image": values.to(torch.uint8)}, None, torch.arange(3), {"image": there})
    fast, slow = model.prompts(batch), Speaker.prompts(model, batch)
    assert fast["pixel_values"].shape == (2, 3, 8, 8)
    assert torch.allclose(fast["pixel_values"], slow["pixel_values"], atol=0.5 / 255 * 2)  # a picture of PIL has 256 steps
    assert torch.equal(fast["input_ids"], slow["input_ids"])
    prepared = model.prompts(batch.replace(inputs={**batch.inputs, "image": values / 16}))
    assert torch.equal(prepared["pixel_values"], fast["pixel_values"])
    nothing = batch.replace(present={"image": torch.zeros(3, dtype=torch.bool)})
    assert "pixel_values" not in model.prompts(nothing)
    assert len(model.speak(nothing).texts) == 3


@pytest.fixture
def asked() -> tuple[Any, Batch]:
    data = puzzles()
    return tiny(data), data.train[torch.tensor([0, 3, 12, 17])]


def test_it_writes_what_generation_of_transformers_writes(asked: tuple[Any, Batch]) -> None:
    model, batch = asked
    spoken = model.speak(batch)
    written = Speaker.write(model, batch, 0.0, 1, None, 6)
    width = spoken.tokens.shape[1]
    assert torch.equal(written[:, :width] * spoken.mask, spoken.tokens * spoken.mask)
    copies = model.speak(batch, samples=3)
    assert torch.equal(copies.tokens, spoken.tokens.repeat_interleave(3, dim=0))
    assert copies.samples == 3
    assert len(copies.texts) == 12


def test_the_logits_of_answers_are_those_that_generation_went_by(asked: tuple[Any, Batch]) -> None:
    model, batch = asked
    inputs = model.encode(batch)
    how = {"do_sample": False, "max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    made = model.network.generate(**inputs, **how, suppress_tokens=model._unspoken())
    spoken = model.speak(batch)
    found = model.logits(batch, spoken)
    seen = torch.stack(made.logits, dim=1)[:, : found.shape[1]]
    mask = spoken.mask.bool()
    assert torch.allclose(found[mask], seen[mask], atol=1e-5)
    silent = found.clone()
    silent[..., model._unspoken()] = -torch.inf
    assert torch.equal(silent.argmax(dim=2)[mask], spoken.tokens[mask])  # greedy
    assert not bool(torch.isin(spoken.tokens, torch.tensor(model._unspoken())).any())


def test_samples_follow_from_their_generator_and_leave_others_alone(asked: tuple[Any, Batch]) -> None:
    model, batch = asked
    before = torch.get_rng_state()
    one, again, other = (
        model.speak(batch, temperature=1.0, samples=4, generator=torch.Generator().manual_seed(seed)).tokens for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one[:, : other.shape[1]], other[:, : one.shape[1]])
    assert torch.equal(torch.get_rng_state(), before)
    library = [Speaker.write(model, batch, 1.0, 4, torch.Generator().manual_seed(1), 6) for _ in range(2)]
    assert torch.equal(*library)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_are_as_frequent_as_their_probability(asked: tuple[Any, Batch]) -> None:
    model, batch = asked
    one = batch[:1]
    first = model.speak(one, temperature=0.7, samples=4000, generator=torch.Generator().manual_seed(0), longest=1).tokens[:, 0]
    spoken = model.speak(one, longest=1)
    scores = model.logits(one, spoken)[0, 0].detach() / 0.7
    scores[model._unspoken()] = -torch.inf
    chance, share = scores.softmax(dim=0), torch.bincount(first, minlength=len(scores)) / 4000
    assert float((chance - share).abs().sum()) < 6 * float((chance * (1 - chance) / 4000).sqrt().sum())


def test_rows_are_answered_alike_alone_and_side_by_side(asked: tuple[Any, Batch]) -> None:
    model, batch = asked
    together, model.at_once = model.speak(batch), 3
    parts = model.speak(batch)
    assert parts.texts == together.texts
    assert torch.equal(parts.tokens, together.tokens)
    assert torch.equal(parts.mask, together.mask)


def test_an_answer_ends_with_its_end_and_is_padded_after_it(asked: tuple[Any, Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = asked
    end, pad = model.tokenizer.eos_token_id, model.tokenizer.pad_token_id
    answers = torch.tensor([[9, end, 9, 9], [end, end, end, end], [9, 10, 11, 12], [9, 9, 9, end]])

    def written(*_: Any) -> Tensor:
        return answers.clone()

    monkeypatch.setattr(model, "write", written)
    spoken = model.speak(batch)
    assert spoken.lengths.tolist() == [2, 1, 4, 4]
    assert spoken.tokens[0].tolist() == [9, end, pad, pad]
    assert spoken.texts[1] == ""


def test_a_folder_is_made_once_and_the_network_is_the_same_every_time(asked: tuple[Any, Batch], cache: Path) -> None:
    model, _ = asked
    again = tiny(puzzles())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    place = Path(model.network.name_or_path)
    assert place.is_relative_to(cache)
    assert (place / "model.safetensors").is_file()
    assert not [path for path in place.parent.iterdir() if path.name.startswith(".")]
    assert tiny(puzzles(), words="zebra").network.name_or_path != str(place)


def test_making_it_draws_no_random_numbers(cache: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    tiny(puzzles(), words="unheard")
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_input_gets_one_message() -> None:
    with pytest.raises(ConfigError, match=r"patch \(5\) divides.*28 x 28"):
        tiny(puzzles(), patch=5)
    with pytest.raises(ConfigError, match=r"put \{question\} there"):
        plugin_spec("backbone", {"name": "tiny_vlm", "prompt": "say"}).build()
    with pytest.raises(ConfigError, match="take a multiple of 8"):
        plugin_spec("backbone", {"name": "tiny_vlm", "hidden": 20}).build()
    data = puzzles()
    model = tiny(data, places=40)
    with pytest.raises(DataError, match=r"its prompt has \d+ tokens and an answer up to 12.*reads 40 in all"):
        model.longest = 12
        model.speak(data.train[torch.arange(4)])
