"""The joint transformer: its blocks by hand, what it makes of what is absent, what it refuses; a deployed one for other tests."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from test_strategies import make
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm
from toy_modalities import INFO, WORDS, batch, every_pattern

from streamcl.adapting import AdaptingStrategy, alone
from streamcl.context import Context
from streamcl.deployed import Deployed
from streamcl.errors import ConfigError
from streamcl.events import Events
from streamcl.nn.backbones.joint_transformer import JointTransformer
from streamcl.nn.model import Model
from streamcl.preparing import Preparation
from streamcl.stream import Batch, Modality, StreamInfo

NAMES = ["image", "sound", "text"]


def transformer(info: StreamInfo = INFO, **options: Any) -> JointTransformer:
    torch.manual_seed(0)
    backbone = JointTransformer(**{"width": 8, "depth": 2, "heads": 2, "words": 4, **options})
    backbone.build(info)
    with torch.no_grad():  # norms that are none that any layer begins with
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5), module.bias.uniform_(-0.5, 0.5)
    return backbone.eval()


def deployed(strategy: AdaptingStrategy, *, target: str = "class", modalities: list[str] | None = None, **options: Any) -> Any:
    """The strategy around a small network with random weights, ready to serve."""
    names = modalities or NAMES
    info = StreamInfo({name: INFO.modalities[name] for name in names}, target=target, classes=3, test_time=True)
    model = Model(transformer(info, **options))
    model.grow(1 if target == "value" else 3)
    with torch.no_grad():
        model.head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    memory = make("memory", "faiss", exemplars=0)
    strategy.start(info, Context(model, memory, Events(), Preparation(info, {})))
    return strategy


def served(seed: int = 0, size: int = 6, present: dict[str, list[int]] | None = None, modalities: list[str] | None = None) -> Batch:
    """Unlabelled samples as they are served, prepared."""
    names = modalities or NAMES
    draw = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {name: torch.randn(size, *INFO.modalities[name].shape, generator=draw) for name in names if name != "text"}
    if "text" in names:
        inputs["text"] = [WORDS[number] for number in torch.randint(len(WORDS), (size,), generator=draw).tolist()]
    masks = {name: torch.tensor(there, dtype=torch.bool) for name, there in (present or {}).items()}
    for name, there in masks.items():
        if name == "text":
            inputs[name] = [text if here else "" for text, here in zip(inputs[name], there.tolist(), strict=True)]
        else:
            inputs[name][~there] = math.nan
    return Batch({name: inputs[name] for name in names}, None, torch.arange(size) + 1000 * seed, masks or None)


class Other(nn.Module):
    """A network of somebody's own over two vectors, which tells what it makes of each before they meet."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.norm = nn.Linear(5, 8), nn.Linear(7, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)])
        self.head = nn.Linear(8, outputs)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        apart = {"left": self.norm(self.left(left)), "right": self.norm(self.right(right))}
        return self.head(self.layers[0](torch.stack(list(apart.values()), dim=1)).mean(dim=1)), apart


def around(strategy: AdaptingStrategy, target: str = "class") -> Any:
    """The strategy around that network, and a batch for it."""
    model = Deployed(Other(1 if target == "value" else 3), lambda module, inputs: module(**inputs))
    info = StreamInfo({"left": Modality("vector", (5,)), "right": Modality("vector", (7,))}, target=target, test_time=True)
    strategy.start(info, Context(model, make("memory", "faiss", exemplars=0), Events(), Preparation(info, {})))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    return strategy, model.batch({"left": torch.randn(24, 5, generator=draw), "right": torch.randn(24, 7, generator=draw)})


def weights(strategy: AdaptingStrategy) -> dict[str, Tensor]:
    """Every tensor of its model, copied."""
    return {name: value.detach().clone() for name, value in strategy.model.state_dict().items()}


def changed(strategy: AdaptingStrategy, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in strategy.model.state_dict().items() if not torch.equal(value, before[name])}


def assert_exact(make_one: Any, batches: list[Batch]) -> None:
    """Reset, rewind and a restored state are exact to the last bit."""
    strategy = make_one()
    first = strategy.predict(batches[0]).scores
    begun = strategy.snapshot()
    told = [strategy.adapt(one).scores for one in batches]
    assert not torch.equal(strategy.predict(batches[0]).scores, first), "it has adapted"
    middle = strategy.snapshot()
    again = [strategy.adapt(one).scores for one in batches]
    strategy.rewind(middle)
    assert all(torch.equal(strategy.adapt(one).scores, other) for one, other in zip(batches, again, strict=True))
    strategy.rewind(begun)
    assert all(torch.equal(strategy.adapt(one).scores, other) for one, other in zip(batches, told, strict=True))
    state = strategy.state()
    other = make_one()
    other.restore({**state, "now": strategy.snapshot()})
    assert all(torch.equal(strategy.adapt(one).scores, other.adapt(one).scores) for one in batches)
    strategy.reset()
    assert torch.equal(strategy.predict(batches[0]).scores, first)
    assert all(torch.equal(strategy.adapt(one).scores, other) for one, other in zip(batches, told, strict=True))


def test_a_joint_block_is_what_its_docstring_says() -> None:
    backbone = transformer()
    block = cast(Any, backbone.joint_blocks[0])
    torch.manual_seed(1)
    x = torch.randn(2, 29, 8)  # 16 of the image, 8 of the sound, 5 of the text
    mask = torch.rand(2, 29) < 0.7

    def normed(norms: Any, y: Tensor) -> Tensor:
        parts = zip(NAMES, y.split([16, 8, 5], dim=1), strict=True)
        return torch.cat([layer_norm(part, (8,), norms[name].weight, norms[name].bias) for name, part in parts], dim=1)

    q, k, v = (normed(block.first, x) @ block.attention.qkv.weight.T + block.attention.qkv.bias).split(8, dim=2)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = (q[..., part] @ k[..., part].transpose(1, 2) / 2).masked_fill(~mask[:, None], -math.inf)
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    middle = x + block.attention.out(torch.cat(heads, dim=2))
    expected = middle + block.mlp[3](gelu(block.mlp[0](normed(block.second, middle))))
    torch.testing.assert_close(block(x, mask), expected)


def test_features_are_the_mean_of_all_tokens_after_the_joint_blocks() -> None:
    backbone = transformer(StreamInfo({name: INFO.modalities[name] for name in NAMES[:2]}))
    given = served(modalities=NAMES[:2])
    apart = backbone.by_modality(given)
    assert {name: tuple(tokens.shape) for name, tokens in apart.items()} == {"image": (6, 16, 8), "sound": (6, 8, 8)}
    joined = backbone.joint_blocks[0](torch.cat([apart["image"], apart["sound"]], dim=1), torch.ones(6, 24, dtype=torch.bool))
    torch.testing.assert_close(backbone(given), backbone.norm(joined.mean(dim=1)))
    assert backbone.joint() == [backbone.joint_blocks[0].attention] and len(transformer(joint=2).joint()) == 2


def test_what_is_absent_reaches_neither_features_nor_gradients() -> None:
    backbone = transformer()
    holed = batch(every_pattern())
    features = backbone(holed)
    assert features.isfinite().all()
    features[3].sum().backward()  # text alone
    assert all(p.grad is None or not p.grad.any() for name in ("image", "sound") for p in backbone.blocks[name].parameters())
    other = holed.replace(inputs={**holed.inputs, "image": torch.as_tensor(holed.inputs["image"]).nan_to_num(7.0)})
    torch.testing.assert_close(backbone(other), features)
    assert not backbone.by_modality(holed)["image"][1].any(), "zeros in its place"


def test_absent_tokens_dilute_nothing_unless_they_are_asked_to() -> None:
    info = StreamInfo({name: INFO.modalities[name] for name in NAMES[:2]})
    both = served(modalities=NAMES[:2])
    hidden = transformer(info)
    lone = hidden.by_modality(both)["image"]
    x, block = lone, cast(Any, hidden.joint_blocks[0])
    x = x + block.attention(block.first["image"](x), torch.ones(6, 16, dtype=torch.bool))
    x = x + block.mlp(block.second["image"](x))
    torch.testing.assert_close(hidden(alone(both, "image")), hidden.norm(x.mean(dim=1)))
    zeros = transformer(info, absent="zeros")
    tokens = torch.cat([lone, torch.zeros(6, 8, 8)], dim=1)
    torch.testing.assert_close(
        zeros(alone(both, "image")), zeros.norm(zeros.joint_blocks[0](tokens, torch.ones(6, 24, dtype=torch.bool)).mean(dim=1))
    )


def test_a_sample_of_which_nothing_is_there_is_answered_with_finite_numbers() -> None:
    nothing = served(present={name: [0, 1, 1, 1, 1, 1] for name in NAMES})
    for absent in ("hidden", "zeros"):
        assert transformer(absent=absent)(nothing).isfinite().all()


def test_each_sample_is_answered_by_itself_and_dropout_is_for_training() -> None:
    backbone, given = transformer(dropout=0.5), served()
    torch.testing.assert_close(torch.cat([backbone(given[[number]]) for number in range(6)]), backbone(given))
    assert torch.equal(backbone(given), backbone(given))
    backbone.train()
    assert not torch.equal(backbone(given), backbone(given))


def test_it_reads_every_kind_of_modality_and_refuses_what_it_cannot() -> None:
    kinds = {
        "clip": Modality("video", (3, 3, 8, 8)),
        "mel": Modality("audio", (16, 12)),
        "vector": Modality("vector", (5,)),
    }
    backbone = transformer(StreamInfo(kinds))
    values: dict[str, Any] = {name: torch.randn(2, *modality.shape) for name, modality in kinds.items()}
    assert backbone(Batch(values, None, torch.arange(2))).shape == (2, 8)
    with pytest.raises(ConfigError, match="'smell' is no modality of the stream; it has image, sound, text"):
        transformer(modalities=["smell"])
    with pytest.raises(ConfigError, match="width 8 is no multiple of heads, 3"):
        JointTransformer(width=8, heads=3)
    with pytest.raises(ConfigError, match="patch is 9, and image has 8 pixels on a side"):
        transformer(patch=9)
    with pytest.raises(ConfigError, match=r"cannot read image \(image of shape \(8, 8\)\)"):
        transformer(StreamInfo({"image": Modality("image", (8, 8))}))
