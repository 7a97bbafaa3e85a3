"""A tower of a CLIP model by architecture and tag, `open_clip:ViT-B-32/laion2b_s34b_b79k`, frozen unless said otherwise.

OpenCLIP (Ilharco et al., 2021, github.com/mlfoundations/open_clip) after CLIP (Radford et al., 2021). The features are the projected
embeddings as `encode_image` and `encode_text` give them, not normalised to length 1. `model` is ARCHITECTURE/TAG, hf-hub:OWNER/NAME,
or a local folder with open_clip_config.json and a .safetensors file; with `weights`, a local .safetensors file or folder, it is the
architecture alone. Only the tower that is used stays in memory. Images are resized as the model was trained to see them; in training
a random box of at least 90 % of the area is taken, open_clip's own default. The licence is the weights' own: see the model card.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.nn.backbone import choose_modality, numbers, texts
from streamcl.nn.pretrained import Pretrained, colour, fetch, first_line, licence_of, origin, vision_transforms, weight_file
from streamcl.stream import Batch, StreamInfo, Transform

HUB = "hf-hub:"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")  # what open_clip itself takes first in a folder


class OpenClip(Pretrained):
    net: Any

    def __init__(
        self,
        *,
        model: str,
        weights: Path | None = None,
        tower: Literal["image", "text"] = "image",
        frozen: bool = True,
        modality: str | None = None,
    ) -> None:
        super().__init__(frozen)
        self.model, self.weights, self.tower, self.modality = model, weights, tower, modality

    def load(self, info: StreamInfo) -> None:
        import open_clip

        self.reads = choose_modality(info, self.modality, (self.tower,), "open_clip")
        if self.tower == "image":
            self.coloured = colour(info.modalities[self.reads], "open_clip")
        name, settings = self.find()
        try:
            model = open_clip.create_model(name, pretrained_text=False, require_pretrained=True, **settings)
            if self.tower == "text":
                self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # RuntimeError from open_clip, OSError from the hub: for a person both are a model that is not there
            raise ConfigError(f"backbone open_clip: {self.model} cannot be loaded: {first_line(error)}") from error
        self.preprocessing: dict[str, Any] = open_clip.get_model_preprocess_cfg(model)
        self.dim = open_clip.get_model_config(name)["embed_dim"]
        self.net = model
        if self.tower == "image":
            self.net = model.visual
        else:
            for part in ("visual", "logit_scale", "logit_bias", "text_decoder"):
                if hasattr(model, part):
                    delattr(model, part)

    def find(self) -> tuple[str, dict[str, Any]]:
        """What open_clip calls the model, and how it finds the weights; sets `origin` and `licence`."""
        import open_clip

        if self.model.startswith(HUB) or Path(self.model).expanduser().is_dir():
            repository = self.model.removeprefix(HUB)
            if self.model.startswith(HUB):
                folder = fetch("open_clip", repository, ["open_clip*.safetensors", "*.json", "*.txt", "*.model", "README.md"], "model")
            else:
                folder = Path(self.model).expanduser()
            file = next((folder / name for name in FILES if (folder / name).is_file()), None)
            if file is None:
                raise ConfigError(
                    f"backbone open_clip: {self.model} holds no {FILES[0]}: open_clip's folders have it beside open_clip_config.json"
                )
            self.origin, self.licence = origin(repository, [file]), licence_of(folder, repository)
            return f"local-dir:{folder}", {}

        architecture, _, tag = self.model.partition("/")
        if architecture not in open_clip.list_models():
            near = get_close_matches(architecture, open_clip.list_models(), 1)
            raise ConfigError(f"backbone open_clip: unknown architecture {architecture!r}{f': did you mean {near[0]!r}?' if near else ''}")
        if self.weights is not None:
            file = weight_file("open_clip", self.weights, FILES)
            self.origin, self.licence = origin(str(self.weights), [file]), f"see the source of {file.name}"
            return architecture, {"pretrained": str(file)}
        known = open_clip.get_pretrained_cfg(architecture, tag)
        if not known:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
            raise ConfigError(
                f"backbone open_clip: {self.model!r} names no known weights; write ARCHITECTURE/TAG (tags of {architecture}: {tags}), "
                "or set weights to a local .safetensors file"
            )
        owner, name, file_name = known["hf_hub"].split("/")
        wanted = f"{Path(file_name).stem}.safetensors" if file_name else FILES[0]
        file = fetch("open_clip", f"{owner}/{name}", [wanted], "weights") / wanted
        self.origin, self.licence = origin(f"{owner}/{name}", [file]), f"see the model card of {owner}/{name}"
        preprocessing = {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in known}
        # weights that were trained with QuickGELU are a little wrong without it, and nothing would say so
        return architecture, {
            "pretrained": str(file),
            "force_preprocess_cfg": preprocessing,
            "force_quick_gelu": bool(known.get("quick_gelu")),
        }

    def encode(self, batch: Batch) -> Tensor:
        if self.tower == "text":
            tokens = self.tokenizer(texts(batch, self.reads)).to(batch.ids.device)
            return self.net.encode_text(tokens, normalize=False)
        features = self.net(numbers(batch, self.reads))
        return features[0] if isinstance(features, tuple) else features  # CoCa gives its tokens beside

    def transforms(self) -> dict[str, list[Transform]]:
        if self.tower == "text":
            return super().transforms()
        settings = self.preprocessing
        size = settings["size"]
        height, width = (size, size) if isinstance(size, int) else size
        resize = (height, width) if settings["resize_mode"] == "squash" or height != width else height
        return vision_transforms(
            (height, width),
            resize,
            settings["mean"],
            settings["std"],
            settings["interpolation"],
            self.coloured,
            scale=(0.9, 1.0),
            flip=False,
        )
