"""Concept customization: what the methods promise exactly, on a text-to-image model too small to paint anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import PAINTED, small_run
from streamcl.scenarios.concepts import Concepts
from streamcl.scenarios.sources.digits import Digits
from streamcl.strategies.concepts._lora import delta, fold, matrices
from streamcl.strategies.concepts.custom_diffusion import distinct, merged
from torch import Tensor, nn

import streamcl
from streamcl import exporting, running, scoring
from streamcl.config import EngineConfig
from streamcl.engine import Engine
from streamcl.errors import ConfigError, DataError
from streamcl.nn.backbones.text_to_image import TextToImage
from streamcl.pictures import noise_of
from streamcl.plugins import find
from streamcl.stream import Modality, StreamInfo

TINY: dict[str, Any] = {"size": 8, "channels": (8, 16), "latent": 4, "layers": 1, "steps": 2}
DIGITS = StreamInfo({"image": Modality("image", (1, 8, 8), 16), "text": Modality("text")}, target="image", asks=("text",))
PROMPTS = ["a photo of <new1> digit", "a drawing of <new1> digit"]


def tiny(**options: Any) -> TextToImage:
    torch.manual_seed(0)
    model = TextToImage(**{**TINY, **options})
    model.build(DIGITS)
    return model.eval()


def run_of(name: str, model: Any = None, scenario: Any = None, epochs: int = 2, **options: Any) -> Engine:
    """Three concepts of four pictures each, not scored."""
    stream = Concepts(**{"data": Digits(), "concepts": [6, 7, 8], "images": 4, "word": "digit", "judge": "none", **(scenario or {})})
    strategy = find("strategy", name).load()(epochs=epochs, batch=4, **options)
    memory = find("memory", "faiss").load()(exemplars=12)
    return Engine(stream, strategy, model or TextToImage(**TINY), memory, engine=EngineConfig(device="cpu", threads=1))


def learn(run: Engine, tasks: int = 1) -> None:
    for _ in range(tasks):
        task = run._next_task()
        assert task is not None
        run._learn(task)
        run.context.task = None


@torch.no_grad()
def noise_of_prompts(run: Engine, prompts: list[str] = PROMPTS) -> Tensor:
    """What the UNet says of the same noise under these prompts."""
    backbone: Any = run.model.backbone
    noisy = noise_of(torch.arange(len(prompts)), backbone.latent_shape(len(prompts)))
    return backbone.denoise(noisy, torch.full((len(prompts),), 50), run.strategy.read(prompts))  # type: ignore[attr-defined]


# -- the model -------------------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_is_loaded_again_by_its_folder_and_by_diffusers(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    first = tiny()
    first.scale.fill_(1.7)
    first.save_pipeline(tmp_path / "pipeline")
    again = TextToImage(model=str(tmp_path / "pipeline"), steps=2, guidance=2.0)
    again.build(DIGITS)
    assert again.origin is not None and again.origin["source"] == str(tmp_path / "pipeline") and len(again.origin["sha256"]) == 64
    assert not any(p.requires_grad for p in again.parameters()) and again.size == 8
    noise = noise_of(torch.arange(2), first.latent_shape(2))
    told = ["a photo of 3 digit", ""]
    assert torch.allclose(first.paint(first.read(told), noise), again.eval().paint(again.read(told), noise), atol=1e-5)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    for mine, other in ((first.unet, theirs.unet), (first.vae, theirs.vae), (first.encoders[0], theirs.text_encoder)):
        assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True))
    run = run_of("dreambooth_lora", again, prior=0)
    with pytest.raises(ValueError, match="holds an adapter"):
        again.save_pipeline(tmp_path / "other")
    learn(run)
    saved = run.model.state()
    assert saved["origin"] == again.origin and all("lora" in name or name == "head.weight" for name in saved["tensors"])
    fresh = TextToImage(model=str(tmp_path / "pipeline"), steps=2, guidance=2.0)
    other = run_of("dreambooth_lora", fresh, prior=0)
    other.model.restore(saved)
    assert torch.equal(noise_of_prompts(other), noise_of_prompts(run)), "what is frozen was named, and what was learned is there"


def test_a_pipeline_with_two_text_encoders_is_read_as_stable_diffusion_xl_is(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    small = tiny()
    small.save_pipeline(tmp_path)
    small.tokenizers[0].save_pretrained(tmp_path / "tokenizer_2")
    words = small.encoders[0].config.vocab_size
    about = {"vocab_size": words, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    places = {"max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 1}
    CLIPTextModelWithProjection(CLIPTextConfig(**about, **places, projection_dim=16)).save_pretrained(tmp_path / "text_encoder_2")
    settings = {**small.unet.config, "cross_attention_dim": 48, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    UNet2DConditionModel.from_config({**settings, "projection_class_embeddings_input_dim": 16 + 6 * 8}).save_pretrained(tmp_path / "unet")
    model = TextToImage(model=str(tmp_path), steps=2)
    run = run_of("textual_inversion", model)
    assert model.dim == 48
    before = noise_of_prompts(run, ["a photo of 3 digit"])
    learn(run, 2)
    word = model.word_vectors("digit")
    assert word is not None and word.shape == (48,) and run.model.head.weight.shape == (2, 48)
    assert torch.equal(noise_of_prompts(run, ["a photo of 3 digit"]), before)


def test_the_word_of_a_concept_stands_in_its_place_and_nowhere_else() -> None:
    model = tiny()
    model.know(["<new1>", "<new2>"])
    digit = model.word_vectors("digit")
    assert digit is not None
    plain = model.read(["a photo of digit", "two photo"])["encoder_hidden_states"]
    said = model.read(["a photo of <new2>", "two photo"], torch.stack([torch.zeros_like(digit), digit]))["encoder_hidden_states"]
    assert torch.equal(plain, said), "with the vector of a word of its own it is that word"
    each = torch.stack([torch.stack([digit, digit]), torch.zeros(2, len(digit))])  # another table for each prompt
    assert torch.equal(model.read(["a photo of <new1>", "two photo"], each)["encoder_hidden_states"], plain)
    assert model.unknown(["a photo of snow", "<new1>"]) == ["snow"] and model.word_vectors("snow") is None
    assert model.without(["a photo of <new1>", "a photo of <new2>"], "<new1>") == ["a photo of <new2>"]
    assert model.span("a photo of <new1> digit", "<new1> digit") == (4, 6) and model.span("a photo") == (1, 3)


def test_noise_follows_from_the_id_alone() -> None:
    ids = torch.tensor([5, 2**60 + 7, 6, 5])
    noise = noise_of(ids, (4, 3, 2, 2))
    assert torch.equal(noise[0], noise[3]) and torch.equal(noise_of(ids[1:2], (1, 3, 2, 2))[0], noise[1])
    many = noise_of(torch.arange(2000), (2000, 4, 5, 5))
    assert abs(float(many.mean())) < 0.01 and abs(float(many.std()) - 1) < 0.01
    assert float(torch.corrcoef(many.flatten(1)[:40]).fill_diagonal_(0).abs().max()) < 0.5, "neighbours have nothing in common"
    assert float(torch.corrcoef(many.flatten(1).T).fill_diagonal_(0).abs().max()) < 0.12


# -- the methods -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dreambooth_lora", "c_lora", "conceptguard"])
def test_an_adapter_that_was_not_trained_changes_nothing(name: str) -> None:
    plain, run = run_of("textual_inversion"), run_of(name, **({"prior": 0} if name == "dreambooth_lora" else {}))
    adapted = run.model.backbone.state_dict()
    for key, value in plain.model.backbone.state_dict().items():
        inside = key.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        adapted[inside if inside in adapted else key].copy_(value)
    base = ["a photo of 3 digit", "two digit"]
    assert torch.equal(noise_of_prompts(run, base), noise_of_prompts(plain, base))


def test_textual_inversion_paints_old_concepts_bit_for_bit_as_before() -> None:
    run = run_of("textual_inversion", token_lr=0.1)
    frozen = {name: value.clone() for name, value in run.model.backbone.state_dict().items()}
    learn(run)
    before, word = noise_of_prompts(run), run.model.head.weight[0].clone()
    start = run.strategy.backbone.word_vectors("digit")  # type: ignore[attr-defined]
    assert start is not None and not torch.equal(word, start), "the word was learned"
    learn(run, 2)
    assert torch.equal(noise_of_prompts(run), before) and torch.equal(run.model.head.weight[0], word)
    assert all(torch.equal(value, frozen[name]) for name, value in run.model.backbone.state_dict().items())


def test_the_prior_pictures_are_painted_once_before_anything_is_learned() -> None:
    run = run_of("dreambooth_lora", prior=3)
    learn(run)
    first = run.strategy.prior.pictures["a photo of digit"].clone()  # type: ignore[attr-defined]
    assert first.shape == (3, 1, 8, 8) and first.dtype == torch.uint8
    learn(run, 2)
    held = run.strategy.prior.pictures  # type: ignore[attr-defined]
    assert list(held) == ["a photo of digit"] and torch.equal(held["a photo of digit"], first)
    assert "prior" in run.strategy.state(), "they are counted"


def test_merging_keeps_every_constraint_and_is_the_least_change_whatever_the_order() -> None:
    random = torch.Generator().manual_seed(0)
    w, c, v, known = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((24, 16), (5, 16), (5, 24), (60, 16)))
    found = merged(w, c, v, known)
    assert float((found @ c.T - v.T).abs().max()) < 1e-12
    gradient = (found - w) @ known.T @ known  # of the least squares: in the row space of C, by Lagrange
    left = gradient - gradient @ torch.linalg.pinv(c) @ c
    assert float(left.abs().max()) < 1e-10
    order = torch.tensor([3, 0, 4, 1, 2])
    assert float((merged(w, c[order], v[order], known) - found).abs().max()) < 1e-12
    one_by_one = merged(merged(w, c[:2], v[:2], known), c[2:], v[2:], known)
    assert float((one_by_one @ c[:2].T - v[:2].T).abs().max()) > 0.1, "solved one after another, the first constraints are lost"
    assert distinct(torch.cat([c, c[1:3]])).tolist() == [0, 1, 2, 3, 4]


def test_custom_diffusion_gives_the_words_of_all_concepts_what_each_had_alone() -> None:
    run = run_of("custom_diffusion", prior=0, epochs=4, optimizer={"name": "adamw", "lr": 1e-2}, ridge=1e-3)
    strategy: Any = run.strategy
    learn(run, 3)
    assert len(strategy.said) == 3 and strategy.said[0].shape == (2, 32), "the word and its class word"
    for name, layer in strategy.maps.items():
        assert not torch.equal(layer.weight, strategy.original[name])
        for said, meant in zip(strategy.said, strategy.meant, strict=True):
            assert torch.allclose(said @ layer.weight.T, meant[name], atol=2e-4)


def test_c_lora_folds_its_update_without_changing_what_it_says_and_then_stays_off_it() -> None:
    layer: Any = run_of("c_lora", rank=2).strategy.adapted  # type: ignore[attr-defined]
    one = next(iter(layer.values()))
    a, b = matrices(one)
    nn.init.normal_(b)
    x = torch.randn(3, a.shape[1])
    before, moved = one(x), delta(one).clone()
    added = fold(one, torch.Generator().manual_seed(1))
    assert torch.allclose(one(x), before, atol=1e-5) and torch.equal(added, moved) and not bool(b.any())
    run = run_of("c_lora", rank=2, strength=1e3, epochs=3, optimizer={"name": "adamw", "lr": 1e-2})
    strategy: Any = run.strategy
    learn(run)
    assert strategy.past.keys() == layer.keys() and not any(bool(delta(one).any()) for one in strategy.adapted.values())
    task = next(iter(run.scenario))
    strategy.enter_task(task)
    run.model.grow(2)
    for one in strategy.adapted.values():
        nn.init.normal_(matrices(one)[1])
    raw = run.context.prepare(task.train[torch.arange(4)])
    state = run.context.generator.get_state()
    with_penalty = strategy.loss(raw)
    run.context.generator.set_state(state)
    strategy.strength = 0.0
    penalty = with_penalty - strategy.loss(raw)
    by_hand = sum(float((strategy.past[name].abs() * delta(one)).detach().norm() ** 2) for name, one in strategy.adapted.items())
    assert float(penalty.detach()) == pytest.approx(1e3 * by_hand, rel=1e-3)
    assert strategy.without_nouns(["a photo of <new1> digit next to <new2> digit"]) == ["a photo of <new1> next to <new2>"]


def test_conceptguard_reads_a_prompt_of_one_concept_as_it_stands() -> None:
    run = run_of("conceptguard")
    learn(run, 2)
    strategy: Any = run.strategy
    assert strategy.bound(PROMPTS[0]) == PROMPTS[0]
    bound = strategy.bound("a photo of <new2> digit next to <new1> digit")
    assert bound == "<bind> a photo of <bind:2> <new2> digit next to <bind:1> <new1> digit"
    plain = strategy.backbone.read(PROMPTS, run.model.head.weight)["encoder_hidden_states"]
    assert torch.equal(strategy.read(PROMPTS)["encoder_hidden_states"], plain)
    words = run.model.head.weight
    table = strategy.table([bound, PROMPTS[0]], words)
    assert table.shape == (2, 7, 32) and torch.equal(table[0, :2], words) and torch.equal(table[1, 6], strategy.common)
    with torch.no_grad():
        strategy.importance.copy_(torch.tensor([0.0, torch.tensor(3.0).log(), 5.0]))
    table = strategy.table([bound], words)
    assert torch.allclose(table[0, 3], 0.25 * strategy.binding[0]) and torch.allclose(table[0, 4], 0.75 * strategy.binding[1])
    assert not bool(table[0, 5].any()), "the third concept is not named"


def test_an_offset_begins_at_zero_and_is_added_to_the_word_at_the_end() -> None:
    run = run_of("conceptguard", queue=1, token_lr=0.05)
    strategy: Any = run.strategy
    learn(run)
    first = run.model.head.weight[0].clone()
    seen: list[Tensor] = []
    strategy.loss = lambda batch, loss=strategy.loss: seen.append(strategy.vectors()[0].detach().clone()) or loss(batch)
    learn(run)
    assert torch.equal(seen[0], first), "zero at the start"
    assert not torch.equal(run.model.head.weight[0], first) and not bool(strategy.offset.any()), "committed"
    still = run_of("conceptguard", shift=False, token_lr=0.05)
    learn(still)
    first = still.model.head.weight[0].clone()
    learn(still)
    assert torch.equal(still.model.head.weight[0], first)


def test_memory_preservation_is_of_the_product_and_holds_the_adapter_where_it_was() -> None:
    moved = []
    for preserve in (0.0, 1e4, 1e8):
        run = run_of("conceptguard", preserve=preserve, epochs=6, optimizer={"name": "sgd", "lr": 0.5 / max(preserve, 1.0)}, clip=None)
        strategy: Any = run.strategy
        learn(run)
        with torch.no_grad():
            for one in strategy.adapted.values():
                matrices(one)[1].normal_(generator=torch.Generator().manual_seed(0))
        before = {name: delta(one).clone() for name, one in strategy.adapted.items()}
        learn(run)
        moved.append(max(float((delta(one) - before[name]).abs().max()) for name, one in strategy.adapted.items()))
    assert moved[0] > 1e-4 and moved[0] > moved[1] > moved[2] and moved[2] < 1e-6
    one = next(iter(strategy.adapted.values()))
    a, b = matrices(one)
    turn = torch.linalg.qr(torch.randn(len(a), len(a)))[0]
    before_turn = delta(one).clone()
    with torch.no_grad():
        a.copy_(turn @ a), b.copy_(b @ turn.T)
    assert torch.allclose(delta(one), before_turn, atol=1e-5), "A and B may turn as long as their product stays"


def test_the_queue_visits_every_concept_in_turn_and_the_important_ones_first() -> None:
    run = run_of("conceptguard", queue=1, replay_from="generated")
    strategy: Any = run.strategy
    strategy.stamps = {0: 2, 1: 0, 2: 1}
    assert strategy.priorities() == [1, 2, 0], "the oldest visit first"
    with torch.no_grad():
        strategy.importance.copy_(torch.tensor([4.0, 0.0, 0.0]))
    # by age 1/3, 1, 2/3; by importance .965, .018, .018: in equal shares .649, .509, .342
    assert strategy.priorities() == [0, 1, 2]
    strategy.age = 1.0
    assert strategy.priorities() == [1, 2, 0]
    learned = run_of("conceptguard", queue=1)
    learn(learned, 3)
    assert learned.strategy.stamps == {0: 1, 1: 2, 2: 2}, "0 was replayed in the second session, 1 in the third"  # type: ignore[attr-defined]


# -- whole runs ------------------------------------------------------------------------------------------------------------------


def test_a_run_is_scored_painted_and_exported(tmp_path: Path) -> None:
    config = small_run("conceptguard", log=["report"])
    scores = running.run(config, out=tmp_path / "run")
    assert scores["metric"] == "image_alignment" and [len(row) for row in scores["matrix"]] == [3, 3, 3]
    assert scores["metrics"].keys() == {"text_alignment", "recognised", "confusion", "joint_image_alignment", "joint_text_alignment"}
    joint = scores["metrics"]["joint_image_alignment"]["matrix"]
    assert joint[1][0] is None and joint[1][1] is not None and joint[2][1] is not None, "of two concepts from the second task on"
    assert scores["memory_bytes"] > 0
    assert sorted(path.name for path in (tmp_path / "run/pictures").iterdir()) == [f"after-000{n}.png" for n in (1, 2, 3)]
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 3 + 6 and "6 + 7" in page and "img-src data:" in page
    prompts = ["a photo of <new1> digit", "a photo of <new3> digit next to <new2> digit"]
    mine = running.load(tmp_path / "run").paint(prompts)
    assert mine.shape == (2, 1, 8, 8) and 0 <= float(mine.min()) <= float(mine.max()) <= 1
    assert torch.equal(streamcl.load(exporting.export(tmp_path / "run", tmp_path / "model"), device="cpu").paint(prompts), mine)
    again = scoring.score(tmp_path / "run")
    assert again["overall"] == pytest.approx(scores["final"]) and again["per_class"].keys() == {"6", "7", "8"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"backbone": "mlp"}}, "the backbone mlp paints no pictures: set model.backbone=text_to_image"),
        ({"strategy": {"name": "c_lora", "replay": 8}}, "strategy.replay is 8, and exemplars of concepts do not join every batch"),
        ({"scenario": {"templates": ["a photo of {} in snow"]}}, r"does not know the word 'snow'.* change scenario\.templates, or"),
        ({"scenario": {"prompts": ["{} of marble"]}}, r"the word 'marble'.*change scenario\.prompts"),
        ({"scenario": {"prompts": ["a" + " photo" * 20 + " of {}"]}}, "'<new1>' of concept '6' is not read in .*cut off"),
        ({"scenario": {"placeholder": "new{}digit"}}, None),
        ({"scenario": {"placeholder": "{name}"}}, "'6' is a word of the model's own: take another scenario.placeholder"),
        ({"scenario": {"images": 500}}, "500 images per concept are asked for and there are fewer of 6"),
        ({"evaluate": {"future": True}}, "evaluate.future"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_to_change(changes: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    config = small_run("textual_inversion", strategy={"epochs": 1}, log=[])
    config["scenario"] = {**PAINTED["scenario"], "judge": "none", **changes.get("scenario", {})}
    config["model"] = {"backbone": PAINTED["model"]["backbone"], **changes.get("model", {})}
    config |= {key: value for key, value in changes.items() if key not in ("scenario", "model")}
    if message is None:
        running.run(config, out=tmp_path / "run")
        return
    with pytest.raises((ConfigError, DataError), match=message):
        running.run(config, out=tmp_path / "run")


def test_pictures_without_captions_are_no_stream_for_a_painter(tmp_path: Path) -> None:
    config = small_run("text_to_image", scenario={"name": "class_incremental", "data": "digits", "tasks": 2}, log=[])
    with pytest.raises(ConfigError, match="text_to_image learns image, and the target of this stream is class"):
        running.run(config, out=tmp_path / "run")
