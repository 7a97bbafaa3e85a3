"""Prompts in a frozen transformer: where they join, when they go, and that a ViLT takes them as the small transformer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_run
from test_strategies import make
from torch import Tensor, nn
from toy_modalities import batch, every_pattern, transformer

import streamcl
from streamcl import exporting, running
from streamcl.checkpoint import Checkpoints
from streamcl.errors import ConfigError
from streamcl.nn.backbones.hf import HuggingFace
from streamcl.nn.model import Model
from streamcl.nn.prompts import Embedded, Grown, Insertion, Prompts, code, encode, filled, patterns, presence
from streamcl.preparing import Preparation
from streamcl.stream import Batch, Modality, StreamInfo

BOTH = StreamInfo({"photo": Modality("image", (3, 20, 20), 255), "caption": Modality("text")})
CAPTIONS = ["the cat sat", "on the mat the dog ran away", "", "cat"]


class Given(Prompts):
    """Insertions by layer."""

    def __init__(self, **at: Insertion) -> None:
        super().__init__()
        self.at = at

    def before(self, layer: int, here: Tensor) -> Insertion | None:
        return self.at.get(f"layer{layer}")


def some(length: int, seed: int = 0, count: int = 6, width: int = 8) -> Tensor:
    return torch.randn(count, length, width, generator=torch.Generator().manual_seed(seed))


def test_prompts_of_length_0_leave_the_frozen_model_as_it_is_bit_for_bit() -> None:
    backbone = transformer()
    before = backbone(batch(every_pattern()))
    for empty in (Insertion(some(0)), Insertion(some(0), some(0)), Insertion(some(0), drop=True)):
        assert torch.equal(encode(backbone, batch(every_pattern()), Given(layer0=empty, layer2=empty)), before)
    assert torch.equal(encode(backbone, batch(every_pattern()), Prompts()), before)
    model = Model(backbone)
    model.prompts = Given(layer1=Insertion(some(0)))
    assert torch.equal(model.features(batch(every_pattern())), before)


def test_what_joins_at_the_input_stays_and_what_joins_at_the_attention_does_not() -> None:
    backbone = transformer()
    lengths: list[tuple[int, int]] = []
    layer = backbone.layer

    def watched(number: int, x: Tensor, mask: Tensor, prefix: Any) -> Tensor:
        lengths.append((x.shape[1], mask.shape[1]))
        return layer(number, x, mask, prefix)

    backbone.layer = watched  # type: ignore[method-assign]
    tokens = 1 + 16 + 8 + 5
    encode(backbone, batch(), Given(layer0=Insertion(some(3)), layer2=Insertion(some(2))))
    encode(backbone, batch(), Given(layer0=Insertion(some(3), some(3)), layer2=Insertion(some(2), some(2))))
    encode(backbone, batch(), Given(layer0=Insertion(some(3)), layer1=Insertion(some(4), drop=True), layer2=Insertion(some(0), drop=True)))
    assert lengths[:3] == [(tokens + 3,) * 2, (tokens + 3,) * 2, (tokens + 5,) * 2]
    assert lengths[3:6] == [(tokens, tokens + 3), (tokens, tokens), (tokens, tokens + 2)]
    assert lengths[6:] == [(tokens + 3,) * 2, (tokens + 4,) * 2, (tokens,) * 2]


def test_a_prompt_by_hand() -> None:
    backbone = transformer()
    made = backbone.embed(batch(), presence(batch(), backbone.reads))
    x = torch.cat([made.lead, *made.tokens.values()], dim=1)
    mask = torch.cat([torch.ones(6, 1, dtype=torch.bool), *made.masks.values()], dim=1)
    x = backbone.layer(0, x, mask, None)
    there = torch.ones(6, 3, dtype=torch.bool)
    x, mask = torch.cat([some(3), x], dim=1), torch.cat([there, mask], dim=1)
    x = backbone.layer(2, backbone.layer(1, x, mask, None), mask, None)
    assert torch.equal(encode(backbone, batch(), Given(layer1=Insertion(some(3)))), backbone.finish(x[:, 3]))


def test_prompts_that_a_sample_lacks_are_not_attended_to() -> None:
    backbone = transformer()
    mask = torch.tensor([[True, True, False]] * 3 + [[True, True, True]] * 3)
    features = encode(backbone, batch(), Given(layer0=Insertion(some(3), mask=mask)))
    shorter, longer = (encode(backbone, batch(), Given(layer0=Insertion(some(3)[:, :length]))) for length in (2, 3))
    torch.testing.assert_close(features[:3], shorter[:3])
    torch.testing.assert_close(features[3:], longer[3:])


def test_tokens_may_be_changed_and_features_too() -> None:
    class Doubled(Prompts):
        def embed(self, made: Embedded, here: Tensor) -> Embedded:
            return Embedded(made.lead, {name: 2 * tokens for name, tokens in made.tokens.items()}, made.masks)

        def after(self, features: Tensor) -> Tensor:
            return 3 * features

    backbone = transformer()
    found = encode(backbone, batch(), Doubled())
    for encoder in backbone.encoders.values():
        encoder.norm.weight.data *= 2
        encoder.norm.bias.data *= 2
    for name in backbone.reads:
        backbone.places[name].data *= 2
        backbone.kind[name].data *= 2
    torch.testing.assert_close(found, 3 * backbone(batch()))


def test_patterns_have_the_scenario_s_code() -> None:
    here = presence(batch(every_pattern()), ["image", "sound", "text"])
    assert code(here).tolist() == [0, 1, 2, 3, 4, 5]
    assert presence(batch(), ["image", "text"]).all() and presence(batch({"text": [0] * 6}), ["image"]).all()
    every = patterns(3)
    assert code(every).tolist() == list(range(7)) and every[0].all() and every[1].tolist() == [False, True, True]


def test_a_dummy_takes_the_place_of_what_is_absent() -> None:
    here = torch.tensor([True, False])
    values = torch.tensor([[1.0, 2.0], [float("nan")] * 2], requires_grad=True)
    assert filled(values, here, 7.0).tolist() == [[1, 2], [7, 7]] and filled(["a", "b"], here, "") == ["a", ""]  # type: ignore[union-attr]


def test_parameters_that_grow_are_loaded_whatever_their_number() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grown = Grown()

    one, other = Holder(), Holder()
    for number in range(3):
        one.grown.grow(torch.full((2, 2), float(number)))
    assert not any(p.requires_grad for p in one.parameters())
    other.load_state_dict(one.state_dict())
    assert [float(p.mean()) for p in other.grown] == [0, 1, 2]
    one.load_state_dict(Holder().state_dict())
    assert len(one.grown) == 0


# ViLT -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vilt_folder(tmp_path: Path) -> Path:
    """A tiny ViLT at random, with its tokenizer and image processor, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, ViltConfig, ViltImageProcessor, ViltModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in CAPTIONS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    folder = tmp_path / "tiny-vilt"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=9,
        image_size=16,
        patch_size=8,
        initializer_range=0.3,
    )
    ViltModel(config).save_pretrained(folder)
    ViltImageProcessor(size={"shortest_edge": 16}).save_pretrained(folder)
    return folder


def vilt(folder: Path, **options: Any) -> HuggingFace:
    backbone = HuggingFace(model=str(folder), **options)
    backbone.build(BOTH)
    return backbone.eval()


def photos(backbone: HuggingFace, present: dict[str, list[int]] | None = None) -> Batch:
    values = torch.randint(256, (4, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    masks = {name: torch.tensor(there, dtype=torch.bool) for name, there in (present or {}).items()}
    raw = Batch({"photo": values, "caption": CAPTIONS}, None, torch.arange(4), masks or None)
    return Preparation(BOTH, backbone.transforms())(raw, False, torch.Generator())


def test_a_vilt_in_parts_gives_what_transformers_gives(vilt_folder: Path) -> None:
    backbone = vilt(vilt_folder, frozen=True)
    ready = photos(backbone)
    assert ready.inputs["photo"].shape == (4, 3, 16, 16) and backbone.dim == 16  # type: ignore[union-attr]
    torch.manual_seed(0)  # theirs draws the order of the patches
    theirs = backbone.net(**backbone.tokens(CAPTIONS), pixel_values=ready.inputs["photo"]).pooler_output
    torch.testing.assert_close(backbone(ready), theirs, atol=1e-5, rtol=1e-5)
    assert backbone.origin is not None and backbone.origin["source"] == str(vilt_folder)


def test_a_vilt_takes_prompts_through_the_same_hook(vilt_folder: Path) -> None:
    backbone = vilt(vilt_folder, frozen=True)
    ready, parts = photos(backbone), backbone.transformer()
    before = backbone(ready)
    assert parts.reads == ["caption", "photo"] and parts.depth == 3
    assert torch.equal(encode(parts, ready, Given(layer1=Insertion(some(0, count=4, width=16)))), before)
    empty = some(0, count=4, width=16)
    torch.testing.assert_close(encode(parts, ready, Given(layer1=Insertion(empty, empty))), before, atol=1e-6, rtol=1e-5)
    prompt = some(2, count=4, width=16).requires_grad_()
    for form in (Insertion(prompt), Insertion(prompt, prompt), Insertion(prompt, drop=True)):
        found = encode(parts, ready, Given(layer1=form))
        assert not torch.isclose(found, before).all()
        (gradient,) = torch.autograd.grad(found.sum(), prompt)
        assert gradient.any()


def test_keys_and_values_of_a_vilt_are_lengthened_as_by_hand(vilt_folder: Path) -> None:
    parts = vilt(vilt_folder).transformer()
    torch.manual_seed(0)
    x, mask = torch.randn(2, 4, 16), torch.tensor([[True] * 6, [True, True, True, True, False, True]])
    keys, values = torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    layer = parts.net.encoder.layer[0]  # type: ignore[attr-defined]
    inner, normed, heads = layer.attention.attention, layer.layernorm_before(x), []
    k, v = torch.cat([keys, inner.key(normed)], dim=1), torch.cat([values, inner.value(normed)], dim=1)
    for part in (slice(0, 8), slice(8, 16)):
        scores = (inner.query(normed)[..., part] @ k[..., part].transpose(1, 2) / 8**0.5).masked_fill(~mask[:, None], -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    middle = layer.attention.output.dense(torch.cat(heads, dim=2)) + x
    expected = layer.output(layer.intermediate(layer.layernorm_after(middle)), middle)
    torch.testing.assert_close(parts.layer(0, x, mask, (keys, values)), expected)


@pytest.mark.parametrize("name", ["mmp", "mplmm", "cmmm"])
def test_every_method_puts_its_prompts_into_a_vilt(name: str, vilt_folder: Path) -> None:
    backbone = vilt(vilt_folder, frozen=True)
    strategy = make("strategy", name, length=2, **({"layers": 3} if name == "mmp" else {}))
    prompts = strategy.prompts_for(backbone.transformer())
    if name == "cmmm":
        prompts.add(0)
        prompts.begin(0)
    holed = photos(backbone, {"photo": [1, 0, 1, 1], "caption": [1, 1, 1, 0]})
    features = encode(backbone.transformer(), holed, prompts)
    assert features.isfinite().all() and not torch.isclose(features[:, :16], backbone(holed)).all(dim=1).any()
    features.square().sum().backward()
    learning = [p for p in prompts.parameters() if p.requires_grad]
    assert learning and all(p.grad is not None and p.grad.isfinite().all() for p in learning if p.numel())
    assert all(p.grad is None for p in backbone.parameters())


def test_an_absent_caption_is_blank_and_an_absent_photo_all_ones(vilt_folder: Path) -> None:
    backbone = vilt(vilt_folder)
    holed = photos(backbone, {"photo": [1, 0, 1, 1], "caption": [1, 1, 1, 0]})
    features = backbone(holed)
    holed.inputs["photo"][1] = 1.0  # type: ignore[index]
    holed.inputs["caption"] = [*CAPTIONS[:3], ""]
    holed.present = None
    assert torch.equal(backbone(holed), features)


def test_a_vilt_without_a_pooler_gives_the_normalised_token(vilt_folder: Path) -> None:
    from transformers import ViltModel

    ViltModel.from_pretrained(vilt_folder, add_pooling_layer=False).save_pretrained(vilt_folder)
    backbone = vilt(vilt_folder)
    assert backbone.net.pooler is None and backbone.transformer().pooler() == [] and backbone(photos(backbone)).isfinite().all()


def test_a_vilt_s_trained_prompts_are_exported_and_its_frozen_weights_only_named(vilt_folder: Path) -> None:
    model = Model(vilt(vilt_folder, frozen=True))
    model.prompts = Given()
    model.prompts.register_parameter("more", nn.Parameter(torch.ones(2)))
    assert {name.partition(".")[0] for name in model.state()["tensors"]} == {"prompts", "head"}


def test_a_vilt_on_a_stream_without_text_is_refused(vilt_folder: Path) -> None:
    backbone = HuggingFace(model=str(vilt_folder))
    with pytest.raises(ConfigError, match="it reads a modality of kind text; the stream has photo"):
        backbone.build(StreamInfo({"photo": Modality("image", (3, 20, 20))}))


# What a run with prompts leaves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mmp", "mplmm", "cmmm"])
def test_a_run_and_its_export_answer_the_same(name: str, tmp_path: Path) -> None:
    running.run(small_run(name, strategy={"epochs": 1}, log=[]), out=tmp_path / "run")
    learned, exported = streamcl.load(tmp_path / "run"), streamcl.load(exporting.export(tmp_path / "run", tmp_path / "model"), device="cpu")
    given = Batch(
        {"image": torch.rand(4, 1, 8, 8), "audio": torch.randn(4, 400)},
        None,
        torch.arange(4),
        {"image": torch.tensor([True, True, False, True]), "audio": torch.tensor([True, False, True, True])},
    )
    scores = learned.answer(given).scores
    assert scores is not None and torch.equal(scores, exported.answer(given).scores) and scores.isfinite().all()


def test_a_run_with_a_vilt_keeps_its_prompts_beside_the_named_weights_and_exports_both(vilt_folder: Path, tmp_path: Path) -> None:
    settings = {
        "scenario": {
            "name": "missing_modality",
            "data": {"name": "shapes", "samples": 40, "test_samples": 12, "size": 16, "seconds": 0.05},
            "missing": [{"image": 0.3, "text": 0.4}],
        },
        "strategy": {"name": "mmp", "length": 2, "layers": 3, "epochs": 1, "batch": 20},
        "model": {"backbone": {"name": "hf", "model": str(vilt_folder), "frozen": True}},
        "engine": {"device": "cpu", "threads": 1},
        "log": [],
    }
    running.run(settings, out=tmp_path / "run")
    state = Checkpoints(tmp_path / "run" / "checkpoints").load(pytest.fail)
    assert state is not None
    kept = {name for name in state["model"]["tensors"] if name.startswith("backbone.")}
    assert kept == {"backbone.net.pooler.dense.weight", "backbone.net.pooler.dense.bias"}, "the pooler learns, the rest is named"
    learned, exported = streamcl.load(tmp_path / "run"), streamcl.load(exporting.export(tmp_path / "run", tmp_path / "model"), device="cpu")
    given = {"image": torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8), "text": ["cat", "", "the dog"], "audio": torch.zeros(3, 400)}
    assert torch.equal(learned.scores(given), exported.scores(given))


def test_the_method_of_the_guide_runs(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "missing_modality.md").read_text(encoding="utf-8")
    (tmp_path / "prefix.py").write_text(page.partition("```python prefix.py\n")[2].partition("```")[0], encoding="utf-8")
    settings = small_run("mmp", log=[])
    scores = running.run({**settings, "strategy": {"name": f"{tmp_path / 'prefix.py'}:Prefix", "epochs": 1}}, out=tmp_path / "run")
    assert len(scores["matrix"]) == 3
