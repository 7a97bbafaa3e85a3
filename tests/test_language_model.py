"""Language models by folder: pictures or words alone, the policies that they keep, and what is wrong with some folders."""

from __future__ import annotations

import copy
import json
import math
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
from streamcl.nn.language import _apart, language_model
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
    told = {"longest": 7, "prompt": "so: {question}", "system": "look", "dtype": "bfloat16", "at_once": 3}
    speaker = read(folder, "hf", **told).speaker
    assert {name: getattr(speaker, name) for name in told} == told
    assert speaker.network.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="only models that answer in words have longest"):
        read((folder[0], StreamInfo(folder[1].modalities)), "hf", longest=7)


def test_what_was_saved_is_read_again(folder: tuple[Path, StreamInfo], tmp_path: Path) -> None:
    model = read(folder)
    step(model, folder[1])
    assert model.save(tmp_path) == {"model": ".", "revision": None}
    again = read((tmp_path, folder[1]))
    batch = batch_of(folder[1])
    assert torch.equal(again.logits(batch, model.speak(batch)), model.logits(batch, model.speak(batch)))


def test_a_save_holds_the_adapter_and_leaves_the_network_as_it_is(folder: tuple[Path, StreamInfo], tmp_path: Path) -> None:
    model, batch = adapted(read(folder)), batch_of(folder[1])
    step(model, folder[1], rate=10.0)
    step(model, folder[1], rate=10.0)
    spoken = model.speak(batch)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    model.save(tmp_path)
    after = model.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    whole = copy.deepcopy(model)
    whole.network = whole.network.merge_and_unload()
    found = read((tmp_path, folder[1])).logits(batch, spoken)
    assert torch.equal(found, whole.logits(batch, spoken))
    assert not torch.allclose(found, read(folder).logits(batch, spoken))


def test_one_of_several_adapters_is_not_exported(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = adapted(read((tmp_path / "saved", llava(tmp_path / "saved"))))
    model.network.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="answers by one of several adapters"):
        model.save(tmp_path / "out")
    model.network.base_model.set_adapter(["default", "other"])
    model.save(tmp_path / "out")


def test_features_are_the_last_layers_a_few_rows_at_a_time(folder: tuple[Path, StreamInfo]) -> None:
    batch = batch_of(folder[1])
    for model in (read(folder, at_once=2), adapted(read(folder, at_once=2))):
        found = model(batch)
        whole = model.network(**model._placed(model.encode(batch)), output_hidden_states=True).hidden_states[-1][:, -1]
        assert torch.allclose(found, whole, atol=1e-5)
        asked: list[int] = []
        hook = model.network.get_input_embeddings().register_forward_hook(lambda *call, asked=asked: asked.append(len(call[2])))
        model(batch)
        hook.remove()
        assert asked == [2, 1]


def test_what_learns_is_kept_in_32_bits(folder: tuple[Path, StreamInfo]) -> None:
    for alone in (False, True):
        model = read(folder, dtype="bfloat16")
        if alone:
            with pytest.raises(ConfigError, match=r"kept in bfloat16, where small steps are rounded away: set .*dtype: float32"):
                model.trainable()
            assert all(value.requires_grad for value in read(folder, dtype="float32").trainable())
        else:
            adapted(model)
            assert {value.dtype for value in model.trainable()} == {torch.float32}
            assert model.network.get_input_embeddings().weight.dtype == torch.bfloat16
        model.network.requires_grad_(False)
        with pytest.raises(ConfigError, match="every weight is frozen"):
            model.trainable()


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


@pytest.mark.parametrize("adapter", [False, True])
def test_divergences_are_those_of_whole_logits(folder: tuple[Path, StreamInfo], adapter: bool) -> None:
    model, batch = read(folder, at_once=2), batch_of(folder[1])
    if adapter:
        adapted(model)
    model.keep("previous")
    for _ in range(2):
        step(model, folder[1], rate=1.0)
    spoken = model.speak(batch, temperature=1.0, samples=2, generator=torch.Generator().manual_seed(0))
    asked: list[int] = []
    plain = model.logits

    def counted(batch: Batch, spoken: Any) -> Tensor:
        asked.append(len(spoken.tokens))
        found: Tensor = plain(batch, spoken)
        return found

    model.logits = counted
    for name in ("base", "previous"):
        forward, reverse = model.divergence(batch, spoken, name)
        now = plain(batch, spoken).detach().log_softmax(dim=-1)
        with model.policy(name):
            then = plain(batch, spoken).log_softmax(dim=-1)
        for found, p, q in ((forward, then, now), (reverse, now, then)):
            expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1) * spoken.mask
            assert float(expected.sum()) > 1e-4
            assert torch.allclose(found, expected, atol=1e-5)
    assert asked == [1, 1, 2, 2, 2, 2, 1, 1] * 2
    assert not model._near


def test_what_is_ruled_out_counts_nothing_in_a_divergence() -> None:
    p, q, r = (torch.tensor(chances).log() for chances in ([0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0]))
    assert float(_apart(p, q)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert float(_apart(r, p)) == pytest.approx(math.log(2))
    assert float(_apart(p, r)) == math.inf


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


def red(words: int) -> str:
    return " ".join(["red"] * words)


def test_room_for_rows_is_known_without_their_pictures(folder: tuple[Path, StreamInfo], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = read(folder), batch_of(folder[1])
    lengths = model.encode(batch)["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    model.check_rows(batch)
    monkeypatch.setattr(model, "pictures", None)  # are not asked for
    assert torch.equal(model._lengths(batch), lengths)
    limit = model.network.config.get_text_config().max_position_embeddings
    model.longest = limit - int(lengths[2])
    model.check_rows(batch)
    model.longest += 1
    with pytest.raises(DataError, match=rf"row 12: its prompt has {int(lengths[2])} tokens and an answer up to {model.longest}, "):
        model.check_rows(batch)
    room = limit - int(lengths[0]) - 1  # and the end
    model.check_rows(batch, [red(room), "", ""])
    with pytest.raises(DataError, match=rf"row 10: .* an answer up to {room + 2}, "):
        model.check_rows(batch, [red(room + 1), "", ""])


def test_a_long_answer_beside_a_long_prompt_has_room_where_each_row_has(tmp_path: Path) -> None:
    model = read((tmp_path / "saved", llava(tmp_path / "saved")))
    batch = batch_of(SEEN)
    lengths = model._lengths(batch)
    assert lengths.argmax() == 2 and lengths[1] < lengths[2]
    room = 128 - int(lengths[1]) - 1  # and the end
    answers = ["", red(room), ""]
    assert model.encode(batch, answers)["input_ids"].shape[1] > 128
    with pytest.raises(DataError, match="row 11"):
        model.encode(batch, ["", red(room + 1), ""])


def test_a_system_message_and_choices_stand_in_the_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    model = read((folder, llava(folder)), system="look", prompt="{question} choose: {choices}.")
    batch = batch_of(SEEN).replace(extra={"choices": ["red\nblue", "", "up"]})
    rendered = [model._render(row) for row in model.conversations(batch)]
    assert rendered[0].startswith("<s><system>look<user><image>how many red things are there? choose: red, blue.<assistant>")
