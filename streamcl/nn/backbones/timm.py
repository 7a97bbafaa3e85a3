"""Any vision model of timm by its name: `timm:resnet18`, `timm:vit_base_patch16_224.augreg_in21k`, `timm:hf-hub:OWNER/NAME`.

PyTorch Image Models (Wightman, 2019, github.com/huggingface/pytorch-image-models). The weights come from the local Hugging Face
cache or the hub, or from `weights`, a local .safetensors file (or a folder with one) that was saved from the same model; only
safetensors are read. The features are what timm's model gives without its classifier. Size, mean, deviation and interpolation are
the model's own: images are resized and cropped in the middle for the test, a random box and a flip for training; one channel is
repeated in three. The licence is the weights' own, as timm records it.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.nn.backbone import choose_modality, numbers
from streamcl.nn.pretrained import Pretrained, colour, fetch, first_line, licence_of, origin, vision_transforms, weight_file
from streamcl.stream import Batch, StreamInfo, Transform

HUB = "hf-hub:"


class Timm(Pretrained):
    net: Any

    def __init__(
        self, *, model: str, pretrained: bool = True, weights: Path | None = None, frozen: bool = False, modality: str | None = None
    ) -> None:
        super().__init__(frozen)
        self.model, self.pretrained, self.weights, self.modality = model, pretrained, weights, modality

    def load(self, info: StreamInfo) -> None:
        import timm

        self.reads = choose_modality(info, self.modality, ("image",), "timm")
        self.coloured = colour(info.modalities[self.reads], "timm")
        name, settings = self.model, {}
        if self.weights is None and self.model.startswith(HUB):
            repository, _, revision = self.model.removeprefix(HUB).partition("@")
            folder = fetch("timm", repository, ["model.safetensors", "config.json", "README.md"], "weights", revision or None)
            name, self.licence = f"local-dir:{folder}", licence_of(folder, repository)
            settings = self.from_file(repository, folder / "model.safetensors")
        elif not (timm.is_model(self.model) and ("." not in self.model or self.model in timm.list_pretrained())):
            near = get_close_matches(self.model, timm.list_models() + timm.list_pretrained(), 1)
            raise ConfigError(f"backbone timm: unknown model {self.model!r}{f': did you mean {near[0]!r}?' if near else ''}")
        elif self.weights is None and self.pretrained:
            settings = self.from_hub(timm.get_pretrained_cfg(self.model))
        try:
            self.net = timm.create_model(name, num_classes=0, **settings)
        except Exception as error:  # a tag that does not exist, a file that does not fit: timm says which
            raise ConfigError(f"backbone timm: {self.model} cannot be made: {first_line(error)}") from error
        if self.weights is not None:
            self.read(self.weights)
        self.dim = self.net.head_hidden_size

    def from_hub(self, settings: Any) -> dict[str, Any]:
        if settings is None or not settings.hf_hub_id:
            raise ConfigError(
                f"backbone timm: timm knows no weights on the hub for {self.model!r}; set weights to a local .safetensors file, "
                "or pretrained to false for random ones"
            )
        self.licence = settings.license or f"see the model card of {settings.hf_hub_id}"
        folder = fetch("timm", settings.hf_hub_id, ["model.safetensors"], "weights")
        return self.from_file(settings.hf_hub_id, folder / "model.safetensors")

    def from_file(self, source: str, file: Path) -> dict[str, Any]:
        """timm's own loader on this file: it knows how to fit an older layout to the model."""
        self.origin = origin(source, [file])
        return {"pretrained": True, "pretrained_cfg_overlay": {"source": "", "file": str(file), "custom_load": False}}

    def read(self, weights: Path) -> None:
        """Local weights, all of the model's: a loader that leaves some at random would go unnoticed."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = weight_file("timm", weights)
        heads = self.net.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        try:
            tensors = load_file(file)
            self.net.load_state_dict({name: value for name, value in tensors.items() if name.rpartition(".")[0] not in heads})
        except (RuntimeError, SafetensorError) as error:
            detail = str(error).split("\n\t")[1:2] or [first_line(error)]  # torch's first line says only that there are errors
            raise ConfigError(f"backbone timm: {weights} does not fit {self.model}: {detail[0][:300]}") from error
        self.origin = origin(str(weights), [file])
        self.licence = f"see the source of {file.name}"

    def save(self, folder: Path) -> dict[str, Any]:
        name = self.net.pretrained_cfg["architecture"] if self.model.startswith(HUB) else self.model
        return {"model": name, "pretrained": False, "weights": None}

    def encode(self, batch: Batch) -> Tensor:
        return self.net(numbers(batch, self.reads))

    def patches(self, batch: Batch) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns):
            found = self.net.forward_features(numbers(batch, self.reads))
        if found.dim() == 3:  # a transformer's tokens, after its class and register tokens
            return found[:, getattr(self.net, "num_prefix_tokens", 0) :]
        if found.dim() != 4:
            return super().patches(batch)
        return found.flatten(1, 2) if getattr(self.net, "output_fmt", "NCHW") == "NHWC" else found.flatten(2).transpose(1, 2)

    def transforms(self) -> dict[str, list[Transform]]:
        import timm

        data = timm.data.resolve_model_data_config(self.net)
        height, width = data["input_size"][-2:]
        larger = (math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"]))
        resize = min(larger) if data["crop_mode"] == "center" and height == width else larger
        return vision_transforms((height, width), resize, data["mean"], data["std"], data["interpolation"], self.coloured)
