"""Language models by folder: pictures or words alone, the policies that they keep, and what is wrong with some folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcl.config import plugin_spec
from streamcl.errors import ConfigError, DataError
from streamcl.nn import tiny_vlm
from streamcl.nn.language import language_model
from streamcl.nn.model import Model
from streamcl.stream import Batch, Modality, StreamInfo

SEEN = StreamInfo({"text": Modality("text"), "image": Modality("image", (3, 28, 28), 255)}, target="text", metrics=("verified",))
READ = StreamInfo({"text": Modality("text")}, target="text", metrics=("verified",))
QUESTIONS = ["how many red things are there?", "which way?", "what is the number of blue squares in the picture?"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCL_CACHE", str(tmp_path_factory.getbasetemp() / "tiny_vlm"))
        yield


def batch_of(info: StreamInfo) -> Batch:
    inputs: dict[str, Any] = {"text": list(QUESTIONS)}
    if "image" in info.modalities:
        inputs["image"] = torch.randint(0, 256, (3, 3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(inputs, None, torch.arange(10, 13))


def llava(folder: Path) -> StreamInfo:
    made = tiny_vlm.folder(edge=28, patch=7, hidden=16, layers=1, heads=2, vision_layers=1, places=128, words="")
    shutil.copytree(made, folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    return SEEN


def qwen_vl(folder: Path) -> StreamInfo:
    """Of Qwen2.5-VL's architecture, processor and template, with random weights and tied words."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    signs = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = tiny_vlm.tokenizer(" ".join(word.strip("<|>") for word in signs))
    words.add_special_tokens({"additional_special_tokens": signs})
    words.chat_template = tiny_vlm.TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    start, end, image, video = words.convert_tokens_to_ids(signs)
    text = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 28,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    network = Qwen2_5_VLForConditionalGeneration(config)
    network.generation_config.update(pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id)
    network.save_pretrained(folder)
    pixels: dict[str, Any] = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**pixels), words, Qwen2VLVideoProcessor(**pixels), chat_template=words.chat_template
    ).save_pretrained(folder)
    return SEEN


def mistral(folder: Path) -> StreamInfo:
    """Of words alone."""
    from transformers import MistralConfig, MistralForCausalLM

    words = tiny_vlm.tokenizer()
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    signs: dict[str, Any] = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**size, **signs, vocab_size=len(words), max_position_embeddings=128)).save_pretrained(folder)
    words.save_pretrained(folder)
    return READ


KINDS: list[Callable[[Path], StreamInfo]] = [llava, qwen_vl, mistral]


@pytest.fixture(scope="module", params=KINDS, ids=["llava", "qwen2.5-vl", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StreamInfo]:
    place = tmp_path_factory.mktemp("model") / "saved"
    return place, request.param(place)


def read(folder: tuple[Path, StreamInfo], name: str = "language_model", **options: Any) -> Any:
    if name == "language_model":
        options = {"longest": 5, **options}
    backbone = plugin_spec("backbone", {"name": name, "model": str(folder[0]), **options}).build()
    backbone.build(folder[1])
    backbone.eval()
    return backbone


def test_a_folder_speaks(folder: tuple[Path, StreamInfo]) -> None:
    model, batch = read(folder), batch_of(folder[1])
    prompts = model.tokenizer.batch_decode(model.encode(batch)["input_ids"])
    assert all(f"{question}<assistant>" in prompt for question, prompt in zip(QUESTIONS, prompts, strict=True))
    spoken = model.speak(batch)
    assert len(spoken.texts) == 3
    found = model.logits(batch, spoken)
    found[..., model._unspoken() or []] = -torch.inf
    mask = spoken.mask.bool()
    assert torch.equal(found.argmax(dim=2)[mask], spoken.tokens[mask])
    assert model(batch).shape == (3, model.dim)
    assert (model.origin["source"], len(model.origin["sha256"])) == (str(folder[0]), 64)
    copies = model.speak(batch, temperature=1.0, samples=2, generator=torch.Generator().manual_seed(0))
    assert copies.tokens.shape[0] == 6
    assert model.logits(batch, copies).shape[:2] == copies.tokens.shape


def test_logits_are_those_of_generation(folder: tuple[Path, StreamInfo]) -> None:
    model, batch = read(folder), batch_of(folder[1])
    how = {"do_sample": False, "max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    made = model.network.generate(**model.encode(batch), **how, suppress_tokens=model._unspoken())
    spoken = model.speak(batch)
    mask = spoken.mask.bool()
    seen = torch.stack(made.logits, dim=1)[:, : mask.shape[1]]
    assert torch.allclose(model.logits(batch, spoken)[mask], seen[mask], atol=1e-4)


def test_answers_are_taught_as_they_would_be_written(folder: tuple[Path, StreamInfo]) -> None:
    model, batch = read(folder), batch_of(folder[1])
    spoken = model.speak(batch, temperature=1.0, generator=torch.Generator().manual_seed(1))
    inputs = model.encode(batch, ["red", "blue, green", "3"])
    labels = inputs.pop("labels")
    width = int((labels != -100).any(dim=0).sum())
    logits = model.network(**inputs).logits[:, -width - 1 : -1]
    mask = (labels[:, -width:] != -100).long()
    same = model.logits(batch, type(spoken)([], labels[:, -width:].clamp(min=0), mask, 1))
    assert torch.allclose(logits[mask.bool()], same[mask.bool()], atol=1e-5)


def test_hf_speaks_where_the_stream_is_answered_in_words(folder: tuple[Path, StreamInfo]) -> None:
    backbone = read(folder, "hf")
    model = Model(backbone)
    language: Any = language_model(model)
    assert language is backbone.speaker
    batch = batch_of(folder[1])
    assert language.speak(batch, longest=5).texts == read(folder).speak(batch).texts
    assert model.features(batch).shape == (3, backbone.dim)
    assert backbone.origin == language.origin


def test_what_was_saved_is_read_again(folder: tuple[Path, StreamInfo], tmp_path: Path) -> None:
    model = read(folder)
    step(model, folder[1])
    assert model.save(tmp_path) == {"model": ".", "revision": None}
    again = read((tmp_path, folder[1]))
    batch = batch_of(folder[1])
    assert torch.equal(again.logits(batch, model.speak(batch)), model.logits(batch, model.speak(batch)))


def test_the_vision_tower_is_frozen_unless_it_is_to_learn(folder: tuple[Path, StreamInfo]) -> None:
    if folder[1] is READ:
        pytest.skip("it has none")
    for vision in (False, True):
        model = read(folder, vision=vision)
        tower = model.network.get_encoder(modality="image")
        assert {value.requires_grad for value in tower.parameters()} == {vision}
        assert all(value.requires_grad for value in model.network.get_input_embeddings().parameters())


# Policies -----------------------------------------------------------------------------------------------------------------------


def step(model: Any, info: StreamInfo, rate: float = 0.1) -> None:
    """One step of training on an answer."""
    inputs = model.encode(batch_of(info), ["red", "blue", "three"])
    network = model.network
    optimizer = torch.optim.SGD([value for value in network.parameters() if value.requires_grad], lr=rate)
    network(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    layers = r".*(?<!vision_model)\.layers\.\d+\.self_attn\.(q|v)_proj"
    config = LoraConfig(r=2, lora_alpha=4, target_modules=layers)
    model.network = get_peft_model(model.network, config)
    return model


@pytest.mark.parametrize("adapter", [False, True])
def test_policies_that_are_kept_answer_as_they_did(folder: tuple[Path, StreamInfo], adapter: bool) -> None:
    info = folder[1]
    model, batch = read(folder), batch_of(info)
    spoken = model.speak(batch)

    def now() -> Tensor:
        with torch.no_grad():
            found: Tensor = model.logits(batch, spoken)
        return found

    at_first = now()
    if adapter:
        adapted(model)
        assert torch.equal(now(), at_first)
    model.keep("previous")
    assert not model._held  # nothing was copied, since nothing was trained
    step(model, info)
    later = now()
    model.keep("later")
    step(model, info)
    last = now()
    assert not torch.equal(at_first, later)
    assert not torch.equal(later, last)
    learns = [value.requires_grad for value in model.network.parameters()]
    for name, expected in (("base", at_first), ("previous", at_first), ("later", later)):
        with model.policy(name) as network:
            assert network is model.network
            assert torch.equal(now(), expected)
            assert not torch.is_grad_enabled()
        assert torch.equal(now(), last)
        assert [value.requires_grad for value in model.network.parameters()] == learns

    state = json_and_tensors(model.kept())
    again = read(folder)
    if adapter:
        adapted(again)
    again.restore_kept(state)
    again.network.load_state_dict(model.network.state_dict())
    for name, expected in (("base", at_first), ("previous", at_first), ("later", later)):
        with again.policy(name):
            assert torch.equal(again.logits(batch, spoken), expected)
    with torch.no_grad():
        assert torch.equal(again.logits(batch, spoken), last)


def json_and_tensors(state: Any) -> Any:
    """As a checkpoint would hold it: fails where something is neither."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {str(key): json_and_tensors(value) for key, value in state.items()}
    if isinstance(state, list):
        return [json_and_tensors(value) for value in state]
    return json.loads(json.dumps(state))


def test_only_what_is_trained_is_copied(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    model = read((folder, llava(folder)))
    step(model, SEEN)
    trained = {name for name, value in model.network.named_parameters() if value.requires_grad}
    assert set(model._held) == trained
    assert 0 < len(trained) < len(list(model.network.parameters()))
    model.keep("now")
    kept = model._kept["now"]["tensors"]
    assert kept.keys() <= trained
    assert not any(torch.equal(value, model._held[name]) for name, value in kept.items())


def test_a_base_outlasts_an_adapter_that_is_merged(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    model = read((folder, llava(folder)))
    batch = batch_of(SEEN)
    spoken = model.speak(batch)
    at_first = model.logits(batch, spoken).detach()
    adapted(model)
    step(model, SEEN, rate=10.0)
    step(model, SEEN, rate=10.0)
    model.hold(model.network.parameters())
    model.network = model.network.merge_and_unload()
    assert not torch.equal(model.logits(batch, spoken).detach(), at_first)
    with model.policy("base"):
        assert torch.equal(model.logits(batch, spoken), at_first)


def test_a_policy_that_was_not_kept_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    model = read((folder, llava(folder)))
    with pytest.raises(KeyError, match="'previous'"), model.policy("previous"):
        pass


# What is wrong with a folder ------------------------------------------------------------------------------------------------------


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def drops_picture(folder: Path) -> None:
    told = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else '' }}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(told, encoding="utf-8")


def drops_question(folder: Path) -> None:
    told = "{% for m in messages %}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else 'hm' }}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(told, encoding="utf-8")


def without_processor(folder: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (without_template, "the chat template of .* does not render a question"),
        (drops_picture, "drops the picture"),
        (drops_question, "drops the question"),
        (without_processor, "(has no processor for pictures|cannot be loaded)"),
        (without_weights, "holds no .safetensors file"),
    ],
)
def test_a_folder_that_lacks_something_gets_one_message(tmp_path: Path, spoil: Callable[[Path], None], problem: str) -> None:
    folder = tmp_path / "saved"
    llava(folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=problem) as caught:
        read((folder, SEEN))
    assert "\n" not in str(caught.value)


def test_words_alone_are_no_pictures(tmp_path: Path) -> None:
    mistral(tmp_path / "saved")
    with pytest.raises(ConfigError, match="reads words alone, and the stream has image"):
        read((tmp_path / "saved", SEEN))


def test_an_encoder_does_not_answer(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    ViTModel(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4)
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a vit, which does not answer in words"):
        read((tmp_path, SEEN))


def test_prompts_beyond_the_context_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    model = read((folder, llava(folder)), longest=100)
    with pytest.raises(DataError, match=r"row 12: its prompt has \d+ tokens and an answer up to 100, .* reads 128 in all"):
        model.encode(batch_of(SEEN))
    with pytest.raises(DataError, match="row 12"):
        model.encode(batch_of(SEEN), ["red " * 110] * 3)


def test_a_system_message_and_choices_stand_in_the_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    model = read((folder, llava(folder)), system="look", prompt="{question} choose: {choices}.")
    batch = batch_of(SEEN).replace(extra={"choices": ["red\nblue", "", "up"]})
    rendered = [model._render(row) for row in model.conversations(batch)]
    assert rendered[0].startswith("<s><system>look<user><image>how many red things are there? choose: red, blue.<assistant>")
