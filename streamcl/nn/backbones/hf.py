"""A text or vision encoder of transformers by its name on the Hugging Face hub or its folder: `hf:bert-base-uncased`.

Transformers (Wolf et al., 2020). `model` is read from the local cache, the hub or a folder: safetensors only, and never code that lies
beside the weights. Text is tokenised as it arrives and cut at `max_length` tokens; images get the size, mean and deviation of the
model's image processor, and one channel is repeated in three. `pooling` makes one vector of the tokens: their mean (over those that are
no padding), the first one (cls), or the model's own pooler. A ViLT reads an image and a text at once (`hf:dandelin/vilt-b32-mlm`), takes
prompts, and always gives its pooled first token; texts are padded to `max_length` or what it has places for. Where the stream is to be
answered in words it is a language model that speaks (`hf:Qwen/Qwen2.5-VL-7B-Instruct`), as the backbone language_model has it: the options
from `longest` on are its own, which see, with its defaults. The licence is the weights' own, from the model card where it lies beside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.nn.backbone import choose_modality, numbers, texts
from streamcl.nn.pretrained import Pretrained, colour, fetch, first_line, licence_of, origin, vision_transforms, weight_file
from streamcl.nn.prompts import Promptable, encode
from streamcl.options import PositiveInt
from streamcl.stream import Batch, StreamInfo, Transform

from ._vilt import Vilt
from .language_model import Speaker

FILES = ("model*.safetensors", "*.json", "*.txt", "*.model", "README.md")  # weights, settings, vocabularies, the model card
READS = {"input_ids": "text", "pixel_values": "image"}
BOTH = "image and text"
SPEAKS = "words"


class HuggingFace(Pretrained):
    reader = "hf"
    net: Any

    def __init__(
        self,
        *,
        model: str,
        pooling: Literal["mean", "cls", "pooler"] = "mean",
        max_length: PositiveInt = 512,
        revision: str | None = None,
        frozen: bool = False,
        modality: str | None = None,
        longest: PositiveInt | None = None,
        prompt: str | None = None,
        system: str | None = None,
        pixels: tuple[int, int] | None = None,
        vision: bool | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] | None = None,
        at_once: PositiveInt | None = None,
    ) -> None:
        super().__init__(frozen)
        told = {
            "longest": longest,
            "prompt": prompt,
            "system": system,
            "pixels": pixels,
            "vision": vision,
            "dtype": dtype,
            "at_once": at_once,
        }
        self.spoken = {name: value for name, value in told.items() if value is not None}
        self.model, self.pooling, self.max_length, self.revision, self.modality = model, pooling, max_length, revision, modality

    def find(self) -> Path:
        """The folder with the model's files."""
        folder = Path(self.model).expanduser()
        return folder if folder.is_dir() else fetch(self.reader, self.model, FILES, "model", self.revision)

    def load(self, info: StreamInfo) -> None:
        if "verified" in info.metrics:
            options: dict[str, Any] = self.spoken
            self.speaker = Speaker(model=self.model, revision=self.revision, **options)
            self.speaker.build(info)
            self.kind, self.dim, self.origin, self.licence = SPEAKS, self.speaker.dim, self.speaker.origin, self.speaker.licence
            return
        if self.spoken:
            raise ConfigError(
                f"backbone {self.reader}: only models that answer in words have {' and '.join(self.spoken)}, and this stream is not "
                "answered in words: leave it out"
            )
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        folder = self.find()
        shards = [] if (folder / "model.safetensors").is_file() else sorted(folder.glob("model-*.safetensors"))
        files = shards or [weight_file(self.reader, str(folder))]
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.net, report = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
            )
            self.kind = BOTH if self.net.config.model_type == "vilt" else READS.get(self.net.main_input_name, "")
            if self.kind in ("text", BOTH):
                self.tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            if self.kind in ("image", BOTH):
                self.processor = AutoImageProcessor.from_pretrained(folder, **local)
        except Exception as error:  # every library below has its own errors for a folder that lacks something
            raise ConfigError(f"backbone {self.reader}: {self.model} cannot be loaded: {first_line(error)}") from error
        if not self.kind:
            raise ConfigError(
                f"backbone {self.reader}: {self.model} reads {self.net.main_input_name}; text and vision encoders are supported"
            )
        if self.kind == BOTH:
            self.origin, self.licence = origin(self.model, files), licence_of(folder, self.model)
            self.prepare_both(info, set(report["missing_keys"]))
            return
        self.reads = choose_modality(info, self.modality, (self.kind,), self.reader)
        self.keep_used_layers(set(report["missing_keys"]))
        self.origin, self.licence = origin(self.model, files), licence_of(folder, self.model)
        if self.kind == "image":
            self.coloured = colour(info.modalities[self.reads], self.reader)
        else:
            self.prepare_tokenizer()
        try:
            with torch.no_grad():
                probe = self.tokens(["a"]) if self.kind == "text" else {"pixel_values": torch.zeros(1, 3, *self.size())}
                self.dim = self.pooled(**probe).shape[1]
        except (ValueError, TypeError, AttributeError) as error:  # a decoder beside the encoder, or no such pooling
            raise ConfigError(
                f"backbone {self.reader}: {self.model} does not give features with pooling {self.pooling}: {first_line(error)}"
            ) from error

    def prepare_both(self, info: StreamInfo, missing: set[str]) -> None:
        """A ViLT: its tokens and layers one by one, so that prompts can join them."""
        image, text = (choose_modality(info, None, (kind,), self.reader) for kind in ("image", "text"))
        if any(key.startswith("pooler.") for key in missing):
            self.net.pooler = None
        self.refuse({key for key in missing if not key.startswith("pooler.")})
        self.reads, self.coloured = f"{image} and {text}", colour(info.modalities[image], self.reader)
        self.prepare_tokenizer()
        self.parts = Vilt(self.net, lambda values: self.tokens(values, padding="max_length"), image, text, self.length)
        self.dim = self.parts.width

    def transformer(self) -> Promptable:
        return self.parts if self.kind == BOTH else super().transformer()

    def keep_used_layers(self, missing: set[str]) -> None:
        """Drop a pooler that is not used; refuse weights that the files lack, which transformers would leave at random."""
        pooler = getattr(self.net, "pooler", None)
        if self.pooling != "pooler" and isinstance(pooler, torch.nn.Module) and any(True for _ in pooler.parameters()):
            self.net.pooler = None
            missing = {key for key in missing if not key.startswith("pooler.")}
        self.refuse(missing)

    def refuse(self, missing: set[str]) -> None:
        if missing:
            lacking = ", ".join(sorted(missing)[:3])
            raise ConfigError(f"backbone {self.reader}: the files of {self.model} lack {len(missing)} tensors of its encoder: {lacking}")

    def prepare_tokenizer(self) -> None:
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        places = getattr(self.net.config, "max_position_embeddings", None) or self.max_length
        self.length = min(self.max_length, self.tokenizer.model_max_length, places)

    def tokens(self, values: list[str], padding: bool | str = True) -> dict[str, Tensor]:
        encoded = self.tokenizer(values, padding=padding, truncation=True, max_length=self.length, return_tensors="pt")
        return {name: value.to(self.net.device) for name, value in encoded.items()}

    def pooled(self, **inputs: Tensor) -> Tensor:
        """One vector per sample from the last layer's tokens  # (batch, dim)"""
        result = self.net(**inputs)
        if self.pooling == "pooler":
            if result.pooler_output is None:
                raise ValueError("it has no pooler")
            return result.pooler_output.flatten(1)
        hidden = result.last_hidden_state  # (batch, tokens, dim), or (batch, dim, height, width) of a convolutional network
        if hidden.dim() == 4:
            if self.pooling == "cls":
                raise ValueError("a convolutional network has no first token")
            return hidden.mean(dim=(2, 3))
        if self.pooling == "cls":
            return hidden[:, 0]
        if "attention_mask" not in inputs:
            return hidden.mean(dim=1)
        mask = inputs["attention_mask"][:, :, None].to(hidden)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def encode(self, batch: Batch) -> Tensor:
        if self.kind == SPEAKS:
            return self.speaker(batch)
        if self.kind == BOTH:
            return encode(self.parts, batch)
        if self.kind == "text":
            return self.pooled(**self.tokens(texts(batch, self.reads)))
        return self.pooled(pixel_values=numbers(batch, self.reads))

    def save(self, folder: Path) -> dict[str, Any]:
        if self.kind == SPEAKS:
            return self.speaker.save(folder)
        self.net.save_pretrained(folder)
        for part, kinds in (("tokenizer", ("text", BOTH)), ("processor", ("image", BOTH))):
            if self.kind in kinds:
                getattr(self, part).save_pretrained(folder)
        return {"model": ".", "revision": None}

    def size(self) -> tuple[int, int]:
        """Height and width of the images that the model reads."""
        if self.kind == BOTH:
            return (self.net.config.image_size,) * 2
        size = self.processor.crop_size if getattr(self.processor, "do_center_crop", False) else self.processor.size
        edge = size.get("shortest_edge")
        return (size.get("height") or edge, size.get("width") or edge)

    def transforms(self) -> dict[str, list[Transform]]:
        if self.kind in ("text", SPEAKS):
            return super().transforms()
        processor = self.processor
        edge = processor.size.get("shortest_edge")
        resize = self.size()[0] if self.kind == BOTH else edge or (processor.size["height"], processor.size["width"])
        interpolation = "bilinear" if int(processor.resample) == 2 else "bicubic"  # the numbers are Pillow's
        return vision_transforms(self.size(), resize, processor.image_mean, processor.image_std, interpolation, self.coloured)
