"""Low-rank updates of a diffusion model's attention by PEFT: where they go, and the change of weight that each makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamcl.nn.backbones.text_to_image import TextToImage

WHERE: dict[str, str] = {
    "keys_values": r".*attn2\.(to_k|to_v)",  # of cross-attention: what text enters the UNet by
    "cross": r".*attn2\.(to_q|to_k|to_v|to_out\.0)",
    "all": r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)",
}


def inject(backbone: TextToImage, rank: int, layers: str) -> dict[str, Any]:
    """Put one adapter into these layers, which changes nothing yet (A is Gaussian, B zero, alpha the rank); the layers by name."""
    from peft import LoraConfig

    settings = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=WHERE[layers])
    backbone.unet.add_adapter(settings)
    return {name: module for name, module in backbone.unet.named_modules() if hasattr(module, "lora_A")}


def matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A  # (rank, in)  and B  # (out, rank)"""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def delta(layer: Any) -> Tensor:
    """What the adapter adds to the layer's weight  # (out, in)"""
    a, b = matrices(layer)
    return (b @ a) * layer.scaling["default"]


def parameters(layers: dict[str, Any]) -> list[nn.Parameter]:
    return [matrix for layer in layers.values() for matrix in matrices(layer)]


@torch.no_grad()
def fold(layer: Any, generator: torch.Generator) -> Tensor:
    """Add the update to the layer's own weight, and begin a new one; what was added."""
    a, b = matrices(layer)
    added = delta(layer)
    layer.base_layer.weight += added
    b.zero_()
    a.copy_(torch.randn(a.shape, generator=generator) / a.shape[0])  # as PEFT's gaussian
    return added
