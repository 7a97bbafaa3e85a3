"""A text-to-image diffusion model of `diffusers`: a tiny one to be trained on the spot, or a real pipeline by its name or folder.

Latent diffusion (Rombach et al., CVPR 2022): AutoencoderKL, UNet2DConditionModel, CLIPTextModel, painted by DDIM with classifier-free
guidance. Without `model` everything is small, with a tokenizer of whole `words`, and untrained: `model.pretrain` with the strategy
text_to_image trains it. `text_to_image:stable-diffusion-v1-5/stable-diffusion-v1-5`, SDXL's stabilityai/stable-diffusion-xl-base-1.0, or
a local folder that `save_pretrained` wrote, is read instead: safetensors only, frozen until a strategy says otherwise. Pictures are
resized to `size` and painted so. Words that stand for concepts have no place in the vocabulary: their vectors are given with each prompt,
so no table ever grows. Needs `pip install 'streamcl[concepts]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.errors import ConfigError
from streamcl.nn.backbone import Backbone, choose_modality, numbers, texts
from streamcl.nn.pretrained import first_line, licence_of, origin
from streamcl.options import NonNegativeFloat, PositiveInt
from streamcl.pictures import resized
from streamcl.stream import Batch, StreamInfo

FILES = (
    "model_index.json",
    "*/config.json",
    "scheduler/*.json",
    "tokenizer*/*",
    "*/diffusion_pytorch_model.safetensors",
    "text_encoder*/model.safetensors",
    "README.md",
)
WORDS = (
    "a an the of on in to and next by side two photo picture drawing rendering painting close-up cropped bright dark cool good "
    "black white background small large digit letter zero one three four five six seven eight nine 0 1 2 3 4 5 6 7 8 9"
)


class TextToImage(Backbone):
    unet: Any
    vae: Any
    encoders: Any
    scheduler: Any
    tokenizers: list[Any]
    scale: Tensor  # of the latents, whose deviation is 1 after it

    def __init__(
        self,
        *,
        model: str | None = None,
        size: PositiveInt | None = None,  # of the pictures' edges; 16, or what the pipeline was trained for
        channels: tuple[int, ...] = (32, 64),  # of the UNet
        latent: PositiveInt = 8,  # channels of the latents, which are a quarter as wide and high as the pictures
        text: PositiveInt = 32,  # the length of a token's vector
        layers: PositiveInt = 2,  # of the text encoder
        words: str | None = None,  # a vocabulary of one's own, divided by spaces
        steps: PositiveInt | None = None,  # of sampling: 12, or 50 of a real pipeline
        guidance: NonNegativeFloat | None = None,  # 2, or 7.5
        revision: str | None = None,
        modality: str | None = None,
    ) -> None:
        super().__init__()
        self.model, self.size, self.channels, self.latent, self.text, self.layers = model, size, channels, latent, text, layers
        self.words, self.revision, self.modality = words or WORDS, revision, modality
        self.steps = steps or (50 if model else 12)
        self.guidance = (7.5 if model else 2.0) if guidance is None else guidance

    # -- making it ---------------------------------------------------------------------------------------------------------------

    def build(self, info: StreamInfo) -> None:
        try:
            import diffusers  # noqa: F401
        except ImportError:
            raise ConfigError("backbone text_to_image needs diffusers, which is not installed: pip install 'streamcl[concepts]'") from None
        self.reads = choose_modality(info, self.modality, ("image",), "text_to_image")
        shape = info.modalities[self.reads].shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ConfigError(f"backbone text_to_image: it paints pictures of 1 or 3 channels, and the stream's are {shape}")
        self.picture_channels = shape[0]
        self.placeholders: dict[str, int] = {}  # the words of concepts, and the row of each in the vectors that go with a prompt
        if self.model is None:
            self._small()
        else:
            self._read(self._folder())
        self.register_buffer("scale", torch.tensor(float(self.vae.config.scaling_factor)))
        self._instead: list[tuple[Tensor, Tensor]] = []
        for encoder in self.encoders:
            encoder.get_input_embeddings().register_forward_hook(self._with_concepts)
        self.dim = sum(self._widths())

    def _small(self) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

        self.size = self.size or 16
        if self.size % 8 or len(self.channels) < 2 or any(c % 8 for c in self.channels):
            raise ConfigError("backbone text_to_image: size and each of the two or more channels must be multiples of 8")
        listed = ["<s>", "<pad>", "<unk>", "</s>", *dict.fromkeys(self.words.split())]  # </s> is never 2: see CLIPTextModel's pooling
        words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(listed)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 3)])
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        self.tokenizers = [PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=20, **named)]
        settings = CLIPTextConfig(
            vocab_size=len(listed),
            hidden_size=self.text,
            intermediate_size=2 * self.text,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.text // 8),
            max_position_embeddings=20,
            bos_token_id=0,
            eos_token_id=3,
            pad_token_id=1,
        )
        self.encoders = nn.ModuleList([CLIPTextModel(settings)])
        deep = len(self.channels) - 1
        self.unet = UNet2DConditionModel(
            sample_size=self.size // 4,
            in_channels=self.latent,
            out_channels=self.latent,
            layers_per_block=1,
            block_out_channels=self.channels,
            down_block_types=("CrossAttnDownBlock2D",) * deep + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * deep,
            cross_attention_dim=self.text,
            attention_head_dim=8,
            norm_num_groups=min(8, self.channels[0] // 2),
        )
        self.vae = AutoencoderKL(
            in_channels=self.picture_channels,
            out_channels=self.picture_channels,
            latent_channels=self.latent,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=self.size,
            scaling_factor=1.0,  # text_to_image measures it
        )
        self.scheduler = DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=False, steps_offset=1)

    def _folder(self) -> Path:
        """The local folder of the pipeline: as given, of the local cache, or from the hub."""
        name = str(self.model)
        place = Path(name).expanduser()
        if place.is_dir():
            return place
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            try:
                return Path(snapshot_download(name, revision=self.revision, allow_patterns=list(FILES), local_files_only=True))
            except LocalEntryNotFoundError:
                return Path(snapshot_download(name, revision=self.revision, allow_patterns=list(FILES)))
        except Exception as error:  # whatever the hub's client raises, the person has the same two ways out
            raise ConfigError(
                f"backbone text_to_image: {name} is not in the local Hugging Face cache and cannot be fetched from the hub "
                f"({first_line(error)}); set model to a local folder with its files, or run `hf download {name}` once where there is a "
                "network"
            ) from None

    def _read(self, folder: Path) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

        how: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        second = (folder / "text_encoder_2").is_dir()  # Stable Diffusion XL
        try:
            self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, **how)
            self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, **how)
            kinds = [(CLIPTextModel, ""), *([(CLIPTextModelWithProjection, "_2")] if second else [])]
            self.encoders = nn.ModuleList(
                [kind.from_pretrained(folder / f"text_encoder{place}", dtype=torch.float32, **how) for kind, place in kinds]
            )
            self.tokenizers = [AutoTokenizer.from_pretrained(folder / f"tokenizer{place}", local_files_only=True) for _, place in kinds]
            self.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        except Exception as error:  # every library below has its own errors for a folder that lacks something
            raise ConfigError(
                f"backbone text_to_image: {self.model} cannot be loaded as a pipeline of diffusers: {first_line(error)}"
            ) from error
        if self.vae.config.in_channels != 3 and self.vae.config.in_channels != self.picture_channels:
            raise ConfigError(
                f"backbone text_to_image: {self.model} paints pictures of {self.vae.config.in_channels} channels, and the stream's have "
                f"{self.picture_channels}"
            )
        self.size = self.size or int(self.unet.config.sample_size) * self._shrink()
        files = [file for part in ("unet", "vae", "text_encoder*") for file in sorted(folder.glob(f"{part}/*.safetensors"))]
        self.origin, self.licence = origin(str(self.model), files), licence_of(folder, str(self.model))
        self.requires_grad_(False)

    def _shrink(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _widths(self) -> list[int]:
        return [encoder.config.hidden_size for encoder in self.encoders]

    def save_pipeline(self, folder: Path) -> None:
        """Write it as a pipeline of diffusers, which others load. Adapters must have been taken out of the UNet before."""
        from diffusers import StableDiffusionPipeline

        if any("lora" in name for name, _ in self.unet.named_parameters()):
            raise ValueError("the UNet holds an adapter: a pipeline that is saved with one cannot be loaded again; unload it first")
        self.vae.register_to_config(scaling_factor=float(self.scale))
        pipeline: Any = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.encoders[0],
            tokenizer=self.tokenizers[0],
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)

    # -- words -------------------------------------------------------------------------------------------------------------------

    def know(self, placeholders: Sequence[str]) -> None:
        """Words that stand for concepts from now on; the row of each in the vectors that go with a prompt is its place in the list."""
        self.placeholders = {word: row for row, word in enumerate(placeholders)}
        for tokenizer in self.tokenizers:
            vocabulary = tokenizer.get_vocab()
            taken = [word for word in placeholders if word in vocabulary and vocabulary[word] < self._size_of(tokenizer)]
            if taken:
                raise ConfigError(f"{taken[0]!r} is a word of the model's own: take another scenario.placeholder, <new{{}}> say")
            tokenizer.add_tokens(list(placeholders))

    def _size_of(self, tokenizer: Any) -> int:
        """How many words the model itself has a vector for."""
        return int(self.encoders[self.tokenizers.index(tokenizer)].get_input_embeddings().num_embeddings)

    def unknown(self, prompts: Sequence[str]) -> list[str]:
        """The words of these prompts that the tokenizer reads as unknown; real tokenizers spell, and know every word."""
        tokenizer = self.tokenizers[0]
        if tokenizer.unk_token is None or tokenizer.unk_token == tokenizer.eos_token:
            return []
        vocabulary = tokenizer.get_vocab()
        return [word for word in dict.fromkeys(" ".join(prompts).split()) if word not in vocabulary and len(tokenizer.tokenize(word)) == 1]

    def without(self, prompts: Sequence[str], word: str) -> list[str]:
        """The prompts in which this word of a concept is not read, as far as the model reads them."""
        tokenizer = self.tokenizers[0]
        number = tokenizer.convert_tokens_to_ids(word)
        cut = [tokenizer(text, truncation=True, max_length=self._most(0))["input_ids"] for text in prompts]
        return [text for text, ids in zip(prompts, cut, strict=True) if number not in ids]

    def span(self, prompt: str, phrase: str = "") -> tuple[int, int]:
        """Where the tokens of a phrase begin and end in a prompt; without one, all tokens between the first, the start, and the end's."""
        tokenizer = self.tokenizers[0]
        ids = tokenizer(prompt, truncation=True, max_length=self._most(0))["input_ids"]
        if not phrase:
            return 1, len(ids) - 1
        wanted = tokenizer(phrase, add_special_tokens=False)["input_ids"]
        for first in range(len(ids) - len(wanted) + 1):
            if ids[first : first + len(wanted)] == wanted:
                return first, first + len(wanted)
        raise ValueError(f"{phrase!r} is not read in {prompt!r}")

    def _most(self, place: int) -> int:
        """How many tokens a text encoder reads."""
        return min(int(self.tokenizers[place].model_max_length), int(self.encoders[place].config.max_position_embeddings))

    def _with_concepts(self, table: nn.Module, inputs: Any, found: Tensor) -> Tensor | None:
        """What the text encoder's table gave, with the concepts' own vectors in their places."""
        if not self._instead:
            return None
        where, vectors = self._instead[0]
        return torch.where(where[:, :, None], vectors.to(found), found)

    def read(self, prompts: Sequence[str], vectors: Tensor | None = None) -> dict[str, Any]:
        """What the UNet is told by these prompts; `vectors` (words of concepts, dim) or (prompts, words of concepts, dim)."""
        hidden, pooled, start = [], None, 0
        device = self.scale.device
        if vectors is not None and vectors.shape[-2] == 0:
            vectors = None
        for place, (tokenizer, encoder, width) in enumerate(zip(self.tokenizers, self.encoders, self._widths(), strict=True)):
            encoded = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self._most(place), return_tensors="pt")
            ids: Tensor = encoded["input_ids"]
            rows = torch.full_like(ids, -1)
            for word, row in self.placeholders.items():
                if vectors is None or row >= vectors.shape[-2]:  # of a concept that has not come yet
                    continue
                rows[ids == tokenizer.convert_tokens_to_ids(word)] = row
            # an id beyond the table would be taken for the end of the text; where nobody gave its vector, the word says nothing
            ids = torch.where((rows >= 0) | (ids >= self._size_of(tokenizer)), torch.zeros_like(ids), ids).to(device)
            rows = rows.to(device)
            if vectors is not None:
                mine = vectors[..., start : start + width]
                mine = mine[rows.clamp(min=0)] if mine.dim() == 2 else mine.take_along_dim(rows.clamp(min=0)[:, :, None], dim=1)
                self._instead = [(rows >= 0, mine)]
            try:
                given = encoder(input_ids=ids, output_hidden_states=len(self.encoders) > 1)
            finally:
                self._instead = []
            start += width
            if len(self.encoders) == 1:
                return {"encoder_hidden_states": given.last_hidden_state}
            hidden.append(given.hidden_states[-2])  # as Stable Diffusion XL does
            pooled = given[0]
        assert pooled is not None and self.size is not None
        size = torch.tensor([self.size, self.size, 0, 0, self.size, self.size], dtype=pooled.dtype, device=device)
        beside = {"text_embeds": pooled, "time_ids": size.expand(len(pooled), 6)}
        return {"encoder_hidden_states": torch.cat(hidden, dim=2), "added_cond_kwargs": beside}

    def word_vectors(self, word: str) -> Tensor | None:
        """The mean of the model's own vectors for a word's tokens; None for a word that it does not know  # (dim,)"""
        if not word.strip() or self.unknown([word]):
            return None
        parts = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = [number for number in tokenizer(word, add_special_tokens=False)["input_ids"] if number < self._size_of(tokenizer)]
            if not ids:
                return None
            parts.append(encoder.get_input_embeddings().weight[ids].detach().mean(dim=0))
        return torch.cat(parts)

    # -- pictures ----------------------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """The mean of what the captions' tokens say  # (batch, dim)"""
        return self.read(texts(batch, "text"))["encoder_hidden_states"].mean(dim=1)

    def pictures(self, batch: Batch) -> Tensor:
        """The pictures of a batch as the model sees them, from -1 to 1  # (batch, channels, size, size)"""
        values = numbers(batch, self.reads)
        assert self.size is not None
        return 2 * resized(values, self.size, int(self.vae.config.in_channels)) - 1

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents; with `noise` of their size, drawn from what the encoder is unsure of."""
        with torch.no_grad():
            found = self.vae.encode(pictures).latent_dist
            return (found.mean if noise is None else found.mean + found.std * noise) * self.scale

    def latent_shape(self, count: int) -> tuple[int, ...]:
        assert self.size is not None
        edge = self.size // self._shrink()
        return (count, int(self.unet.config.in_channels), edge, edge)

    def wanted(self, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with noise, and what the UNet is to say of them."""
        noisy = self.scheduler.add_noise(latents, noise, times)
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return noisy, self.scheduler.get_velocity(latents, noise, times)
        return noisy, noise if kind == "epsilon" else latents

    def denoise(self, noisy: Tensor, times: Tensor, told: dict[str, Any]) -> Tensor:
        return self.unet(noisy, times, **told).sample

    @torch.no_grad()
    def paint(self, told: dict[str, Any], noise: Tensor) -> Tensor:
        """Pictures from 0 to 1, by DDIM with classifier-free guidance  # (batch, channels, size, size)"""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(self.steps, device=noise.device)
        guided = self.guidance != 1
        if guided:
            told = _twice(self.read([""] * len(noise)), told)
        latents = noise * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            given = self.denoise(torch.cat([latents, latents]) if guided else latents, time, told)
            if guided:
                without, given = given.chunk(2)
                given = without + self.guidance * (given - without)
            latents = scheduler.step(given, time, latents).prev_sample
        return (self.vae.decode(latents / self.scale).sample / 2 + 0.5).clamp(0, 1)


def _twice(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {name: _twice(one[name], other[name]) if isinstance(one[name], dict) else torch.cat([one[name], other[name]]) for name in one}
