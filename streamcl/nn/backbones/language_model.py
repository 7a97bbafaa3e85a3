"""A language model of transformers that may read pictures, by its name on the Hugging Face hub or its folder, and its processor.

`language_model:Qwen/Qwen2.5-VL-7B-Instruct` (Apache-2.0; the 3B of the same family, Qwen/Qwen2.5-VL-3B-Instruct, has a research licence
that forbids commercial use) or any other model that AutoModelForImageTextToText takes; a model of text alone (AutoModelForCausalLM) too.
Read from the local cache, the hub or a folder: safetensors only, and never code that lies beside the weights. It must have been taught to
converse: its processor renders the prompt by the model's own chat template.

A row's text becomes one message after its pictures; `prompt` is what is said around it (`{question}`, and `{choices}` where rows have
some), `system` the message before it. Frames of a video are given as pictures. `dtype` is what the weights are kept in: bfloat16 on a GPU
that has it, unless it is named; weights that learn without an adapter want float32, since bfloat16 rounds small steps away. The vision
tower is frozen unless `vision` is true. The licence is the weights' own, from the model card.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from streamcl.context import PRECISIONS, chosen_precision
from streamcl.errors import ConfigError, DataError
from streamcl.nn.backbone import choose_modality, numbers, texts
from streamcl.nn.language import LanguageModel, Spoken
from streamcl.nn.pretrained import fetch, first_line, licence_of, origin, weight_file
from streamcl.options import PositiveInt
from streamcl.seeding import random_state, restore_random, seed_everything
from streamcl.stream import Batch, StreamInfo

FILES = ("model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md")
PROBE = "probe"  # a question of one word, by which a chat template is tried


class Speaker(LanguageModel):
    reader = "language_model"
    asks_first = False  # the question stands before the pictures

    def __init__(
        self,
        *,
        model: str,
        longest: PositiveInt = 256,  # tokens of an answer
        prompt: str = "{question}",
        system: str | None = None,
        pixels: tuple[int, int] | None = None,  # of a picture, at least and at most, where the processor scales pictures by their area
        vision: bool = False,  # whether the vision tower learns
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        at_once: PositiveInt = 32,  # rows that go through the network together
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if "{question}" not in prompt:
            raise ConfigError(
                f"backbone {self.reader}: prompt is {prompt!r}, in which nothing stands for the question: put {{question}} there"
            )
        self.model, self.longest, self.prompt, self.system = model, longest, prompt, system
        self.pixels, self.vision, self.dtype, self.at_once, self.revision = pixels, vision, dtype, at_once, revision
        self._held: dict[str, Tensor] = {}  # of parameters that changed since: what they were when the stream began
        self._kept: dict[str, dict[str, Any]] = {}  # policy -> its active adapters, and the tensors in which it is not the base
        self._near: dict[str, dict[str, Tensor]] = {}  # what a policy computes by, while it is asked again and again
        self._places: dict[tuple[int, ...], int] = {}  # size of a picture -> tokens that it takes beyond its sign

    # -- making it --------------------------------------------------------------------------------------------------------------------

    def build(self, info: StreamInfo) -> None:
        self.words = choose_modality(info, None, ("text",), self.reader)
        self.seen = [name for name, modality in info.modalities.items() if modality.kind in ("image", "video")]
        self.highest = {name: info.modalities[name].high for name in self.seen}
        self.load(self.folder(info))
        if self.seen and not self.sees:
            raise ConfigError(
                f"backbone {self.reader}: {self.model} reads words alone, and the stream has {' and '.join(self.seen)}: take a model that "
                "reads pictures (Qwen/Qwen2.5-VL-7B-Instruct)"
            )
        self._check_template()
        self.dim = int(self.network.config.get_text_config().hidden_size)
        self.network.get_input_embeddings().register_forward_pre_hook(self._before_training)

    def folder(self, info: StreamInfo) -> Path:
        """The folder with the model's files."""
        place = Path(self.model).expanduser()
        return place if place.is_dir() else fetch(self.reader, self.model, FILES, "model", self.revision)

    def load(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        asked = (
            self.dtype if self.dtype != "auto" else chosen_precision("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        )
        shards = [] if (folder / "model.safetensors").is_file() else sorted(folder.glob("model-*.safetensors"))
        files = shards or [weight_file(self.reader, folder)]
        try:
            config = AutoConfig.from_pretrained(folder, **local)
            self.sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            if not self.sees and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                raise ConfigError(f"backbone {self.reader}: {self.model} is a {config.model_type}, which does not answer in words")
            kind: Any = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
            self.network, report = kind.from_pretrained(
                folder, use_safetensors=True, dtype=PRECISIONS[asked], output_loading_info=True, **local
            )
            limits = {} if self.pixels is None else {"min_pixels": self.pixels[0], "max_pixels": self.pixels[1]}
            self.processor = (
                AutoProcessor.from_pretrained(folder, **limits, **local) if self.sees else AutoTokenizer.from_pretrained(folder, **local)
            )
        except ConfigError:
            raise
        except Exception as error:  # every library below has its own errors for a folder that lacks something
            raise ConfigError(f"backbone {self.reader}: {self.model} cannot be loaded: {first_line(error)}") from error
        if report["missing_keys"]:
            lacking = sorted(report["missing_keys"])
            raise ConfigError(f"backbone {self.reader}: the files of {self.model} lack {len(lacking)} tensors: {', '.join(lacking[:3])}")
        if self.sees and not (hasattr(self.processor, "image_processor") and hasattr(self.processor, "tokenizer")):
            raise ConfigError(
                f"backbone {self.reader}: {self.model} has no processor for pictures (preprocessor_config.json): take a folder that was "
                "saved with its processor"
            )
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"backbone {self.reader}: the tokenizer of {self.model} names no token that ends a text (eos_token)")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.origin, self.licence = origin(self.model, files), licence_of(folder, self.model)
        if self.sees and not self.vision:
            self.network.get_encoder(modality="image").requires_grad_(False)

    def _check_template(self) -> None:
        """A chat template must let the question through, and the picture."""
        shown = [1, 0] if self.sees else [0]
        try:
            rendered = [self._render(self._conversation(PROBE, "", count)) for count in shown]
        except Exception as error:  # templates raise what they like
            raise ConfigError(
                f"backbone {self.reader}: the chat template of {self.model} does not render a question"
                f"{' with a system message' if self.system else ''}: {first_line(error)}"
            ) from None
        if any(PROBE not in text for text in rendered):
            raise ConfigError(f"backbone {self.reader}: the chat template of {self.model} drops the question: it renders {rendered[0]!r}")
        if self.sees and rendered[0] == rendered[1]:
            raise ConfigError(
                f"backbone {self.reader}: the chat template of {self.model} drops the picture: with and without it renders {rendered[0]!r}"
            )

    def save(self, folder: Path) -> dict[str, Any]:
        network = self.network
        if not hasattr(network, "peft_config"):
            network.save_pretrained(folder)
        elif set(network.peft_config) == set(network.active_adapters):
            network.get_base_model().save_pretrained(folder, state_dict=_merged(network.get_base_model()))
        else:
            raise ConfigError(f"{self.model} answers by one of several adapters, and its own file holds one model: it cannot be exported")
        self.processor.save_pretrained(folder)
        return {"model": ".", "revision": None}

    # -- what goes in -----------------------------------------------------------------------------------------------------------------

    def conversations(self, batch: Batch) -> list[list[dict[str, Any]]]:
        choices = batch.extra.get("choices")
        offered = [c.replace("\n", ", ") for c in choices] if isinstance(choices, list) else [""] * len(batch)
        shown = self._counts(batch).tolist()
        return [self._conversation(*row) for row in zip(texts(batch, self.words), offered, shown, strict=True)]

    def _conversation(self, question: str, choices: str, pictures: int) -> list[dict[str, Any]]:
        said = self.prompt.replace("{choices}", choices).replace("{question}", question)
        if not self.sees:
            alone: list[dict[str, Any]] = [{"role": "user", "content": said}]
            return [{"role": "system", "content": self.system}, *alone] if self.system else alone
        shown: list[dict[str, Any]] = [{"type": "image"} for _ in range(pictures)]
        asked: dict[str, Any] = {"type": "text", "text": said}
        messages = [{"role": "user", "content": [asked, *shown] if self.asks_first else [*shown, asked]}]
        return [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *messages] if self.system else messages

    def _render(self, conversation: list[dict[str, Any]]) -> str:
        return str(self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))

    def _counts(self, batch: Batch) -> Tensor:
        """How many pictures each row has  # (rows,)"""
        count = torch.zeros(len(batch), dtype=torch.int64)
        for name in self.seen:
            if name in batch.inputs:
                count += self._shown(batch, name)
        return count

    def _shown(self, batch: Batch, name: str) -> Tensor:
        values = numbers(batch, name)
        return (values.shape[1] if values.dim() == 5 else 1) * self._there(batch, name)

    @staticmethod
    def _there(batch: Batch, name: str) -> Tensor:
        return torch.ones(len(batch), dtype=torch.bool) if batch.present is None or name not in batch.present else batch.present[name].cpu()

    def pictures(self, batch: Batch) -> list[list[Any]]:
        from PIL import Image

        shown: list[list[Any]] = [[] for _ in range(len(batch))]
        for name in self.seen:
            if name not in batch.inputs:
                continue
            values, high = numbers(batch, name).cpu(), self.highest[name]
            if not values.is_floating_point():
                values = values / (high or 255)
            frames = values if values.dim() == 5 else values[:, None]
            if frames.shape[2] == 1:
                frames = frames.expand(-1, -1, 3, -1, -1)
            pixels = (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
            for row in self._there(batch, name).nonzero().squeeze(1).tolist():
                shown[row] += [Image.fromarray(frame) for frame in pixels[row]]
        return shown

    def encode(self, batch: Batch, answers: Sequence[str] | None = None) -> dict[str, Tensor]:
        if answers is None:
            return self._asked(batch, self.longest)
        end = self.tokenizer.eos_token_id
        ids = [torch.tensor([*row, end]) for row in self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]]
        lengths = torch.tensor([len(row) for row in ids])
        tokens = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id).to(self.device)
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long().to(self.device)
        inputs = self._asked(batch, tokens.shape[1], lengths)
        prompt = torch.full_like(inputs["input_ids"], -100)
        labels = torch.cat([prompt, tokens.masked_fill(mask == 0, -100)], dim=1)
        return {**self._placed(self._continued(inputs, tokens, mask)), "labels": labels}

    def prompts(self, batch: Batch) -> dict[str, Tensor]:
        """What the processor makes of the prompts, left-padded, on the model's device."""
        rendered = [self._render(conversation) for conversation in self.conversations(batch)]
        if not self.sees:
            made = self.tokenizer(rendered, padding=True, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
        else:
            shown = self.pictures(batch)
            images = {"images": shown if all(shown) else [row for row in shown if row]} if any(shown) else {}
            made = self.processor(text=rendered, padding=True, add_special_tokens=False, return_tensors="pt", **images)
        kind = self.network.dtype
        return {
            name: value.to(self.device, kind) if value.is_floating_point() else value.to(self.device)
            for name, value in made.items()
            if isinstance(value, Tensor)
        }

    def _asked(self, batch: Batch, answer: int, each: Tensor | None = None) -> dict[str, Tensor]:
        """The prompts, where there is room for an answer of so many tokens after each."""
        inputs = self.prompts(batch)
        limit = self._limit()
        if limit is not None and inputs["input_ids"].shape[1] + answer > limit:
            self._check_room(batch, inputs["attention_mask"].sum(dim=1).cpu(), torch.tensor(answer) if each is None else each)
        return inputs

    def _limit(self) -> int | None:
        return getattr(self.network.config.get_text_config(), "max_position_embeddings", None)

    def check_rows(self, batch: Batch, answers: Sequence[str] | None = None) -> None:
        if self._limit() is None:
            return
        room = torch.tensor(self.longest)
        if answers is not None:
            room = torch.tensor([len(row) + 1 for row in self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]])
        self._check_room(batch, self._lengths(batch), room)

    def _check_room(self, batch: Batch, prompts: Tensor, answers: Tensor) -> None:
        limit, answers = self._limit(), answers.expand(len(prompts))
        row = int((prompts + answers).argmax())
        if limit is not None and int(prompts[row] + answers[row]) > limit:
            raise DataError(
                f"row {int(batch.ids[row])}: its prompt has {int(prompts[row])} tokens and an answer up to {int(answers[row])}, and "
                f"{self.model} reads {limit} in all: take shorter prompts, smaller pictures (backbone pixels), or a smaller longest"
            )

    def _lengths(self, batch: Batch) -> Tensor:
        """How many tokens each prompt has, found without its pictures: those of one size take as many each  # (rows,)"""
        rendered = [self._render(conversation) for conversation in self.conversations(batch)]
        lengths = torch.tensor([len(row) for row in self.tokenizer(rendered, add_special_tokens=False)["input_ids"]])
        for name in self.seen:
            if name in batch.inputs:
                lengths += self._shown(batch, name) * self._taken(tuple(numbers(batch, name).shape[-2:]))
        return lengths

    def _taken(self, size: tuple[int, ...]) -> int:
        from PIL import Image

        if size not in self._places:
            rendered = self._render(self._conversation(PROBE, "", 1))
            picture = Image.new("RGB", (size[1], size[0]))
            made = self.processor(text=[rendered], images=[[picture]], add_special_tokens=False, return_tensors="pt")
            self._places[size] = made["input_ids"].shape[1] - len(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])
        return self._places[size]

    @staticmethod
    def _continued(inputs: Mapping[str, Tensor], tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The inputs with answers after the prompts; what else is said of each token says 0 of theirs."""
        given = inputs["input_ids"].shape
        other = {name: torch.cat([value, torch.zeros_like(tokens)], dim=1) for name, value in inputs.items() if value.shape == given}
        joined = {"input_ids": torch.cat([inputs["input_ids"], tokens], dim=1)}
        return {**inputs, **other, **joined, "attention_mask": torch.cat([inputs["attention_mask"], mask], dim=1)}

    def _placed(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With the positions that generation gives the tokens; a model whose positions lie in space finds them itself."""
        base = getattr(self.network, "get_base_model", lambda: self.network)()
        if hasattr(base, "get_rope_index") or hasattr(getattr(base, "model", None), "get_rope_index"):
            return dict(inputs)
        return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}

    @property
    def device(self) -> torch.device:
        return self.network.get_input_embeddings().weight.device

    # -- what comes out ---------------------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """The hidden state of the token after which an answer would begin  # (batch, dim)"""
        whole = getattr(self.network, "get_base_model", lambda: self.network)()  # an adapter lies in its layers
        parts = [
            whole.base_model(**self._placed(self._asked(part, 0)), use_cache=False).last_hidden_state[:, -1].float()
            for part in self._parts(batch, self.at_once)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def _parts(batch: Batch, step: int) -> list[Batch]:
        return [batch[start : start + step] for start in range(0, len(batch), step)] if len(batch) > step else [batch]

    @torch.no_grad()
    def speak(
        self,
        batch: Batch,
        *,
        temperature: float = 0.0,
        samples: int = 1,
        generator: Any = None,
        longest: int | None = None,
    ) -> Spoken:
        longest = longest or self.longest
        written, copies = (1, samples) if temperature == 0 else (samples, 1)  # greedy answers are all the same
        step = max(1, self.at_once // written)
        modes = [module for module in self.network.modules() if module.training]
        self.network.eval()
        try:
            parts = [self.write(part, temperature, written, generator, longest) for part in self._parts(batch, step)]
        finally:
            for module in modes:
                module.training = True
        ended = self._ends()
        width = max((part.shape[1] for part in parts), default=0)
        pad = self.tokenizer.pad_token_id
        tokens = torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=pad) for part in parts])
        sizes = torch.tensor([part.shape[1] for part in parts for _ in range(part.shape[0])], device=tokens.device)
        tokens, sizes = tokens.repeat_interleave(copies, dim=0), sizes.repeat_interleave(copies)
        last = torch.isin(tokens, ended)
        after = (last.cumsum(dim=1) - last.long()) > 0
        mask = (~after & (torch.arange(width, device=tokens.device) < sizes[:, None])).long()
        tokens = tokens.masked_fill(mask == 0, pad)
        return Spoken(self.tokenizer.batch_decode(tokens, skip_special_tokens=True), tokens, mask, samples)

    def write(self, batch: Batch, temperature: float, samples: int, generator: Any, longest: int) -> Tensor:
        """The tokens of `samples` answers to each row, the end's and padding included, by transformers' own generation."""
        how: dict[str, Any] = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
        neutral = {"top_k": 0, "top_p": 1.0} if temperature else {"top_k": None, "top_p": None, "temperature": None}
        inputs = self._asked(batch, longest)
        with _drawn_by(generator) if temperature else nullcontext():
            found = self.network.generate(
                **inputs,
                **how | neutral if temperature else {**how, **neutral},
                max_new_tokens=longest,
                num_return_sequences=samples,
                repetition_penalty=1.0,
                suppress_tokens=self._unspoken(),
                eos_token_id=self._ends().tolist(),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return found[:, inputs["input_ids"].shape[1] :]

    def _ends(self) -> Tensor:
        """The tokens that end an answer."""
        named = self.network.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [] if named is None else [named])}
        return torch.tensor(sorted(ends), device=self.device)

    def _unspoken(self) -> list[int] | None:
        """Tokens that stand for pictures: one that is spoken would want a picture."""
        config = self.network.config
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        return sorted({int(found) for name in names if (found := getattr(config, name, None)) is not None}) or None

    def logits(self, batch: Batch, spoken: Spoken) -> Tensor:
        rows = torch.arange(len(batch)).repeat_interleave(spoken.samples)
        asked = self._asked(batch if spoken.samples == 1 else batch[rows], spoken.tokens.shape[1])
        inputs = self._placed(self._continued(asked, spoken.tokens, spoken.mask))
        return self.network(**inputs, logits_to_keep=spoken.tokens.shape[1] + 1, use_cache=False).logits[:, :-1]

    # -- policies that are kept -------------------------------------------------------------------------------------------------------

    def _before_training(self, module: nn.Module, inputs: Any) -> None:
        """What is about to be trained is copied first, once: that is the base from then on."""
        if torch.is_grad_enabled() and not hasattr(self.network, "peft_config"):
            self.hold(p for p in self.network.parameters() if p.requires_grad)

    @torch.no_grad()
    def hold(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy what the base has of these parameters; to be called before something else than training writes into them."""
        wanted = {id(parameter) for parameter in parameters}
        if len(self._held) < len(wanted) or any(
            id(p) in wanted and _plain(n) not in self._held for n, p in self.network.named_parameters()
        ):
            for name, value in self.network.named_parameters():
                if id(value) in wanted and _plain(name) not in self._held:
                    self._held[_plain(name)] = value.detach().to("cpu", copy=True)

    @torch.no_grad()
    def keep(self, name: str) -> None:
        if name == "base":
            raise ValueError("the base is what the stream began with: it is kept already")
        adapters = self._adapters()
        parameters = {_plain(key): value for key, value in self.network.named_parameters() if not _of_adapter(key, adapters)}
        held = [key for key in parameters if key in self._held]
        moved = [(self._held[key].to(parameters[key].device) != parameters[key]).any() for key in held]
        changed = torch.stack(moved).tolist() if moved else []  # read once
        tensors = {key: parameters[key] for key, differs in zip(held, changed, strict=True) if differs}
        tensors |= {_plain(key): value for key, value in self.network.named_parameters() if _of_adapter(key, adapters)}
        self._kept[name] = {"adapters": adapters, "tensors": {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}}

    def _adapters(self) -> list[str]:
        """The adapters that answer now."""
        return list(self.network.active_adapters) if hasattr(self.network, "peft_config") else []

    @contextmanager
    def policy(self, name: str) -> Iterator[nn.Module]:
        if name != "base" and name not in self._kept:
            raise KeyError(f"no policy was kept under the name {name!r}; there are base, {', '.join(self._kept) or 'and no other'}")
        adapters = self._kept[name]["adapters"] if name != "base" else []
        with torch.no_grad(), self._speaking_by(adapters):
            instead, before = self._near.get(name) or self._instead(name), []
            for key, value in self.network.named_parameters():
                if _plain(key) in instead:
                    before.append((value, value.data))
                    value.data = instead[_plain(key)].to(value.device)
            try:
                yield self.network
            finally:
                for value, data in before:
                    value.data = data

    def _instead(self, name: str) -> dict[str, Tensor]:
        """The tensors in which a policy may not be the network as it is, where they were kept."""
        return {**self._held, **(self._kept[name]["tensors"] if name != "base" else {})}

    def divergence(self, batch: Batch, spoken: Spoken, name: str) -> tuple[Tensor, Tensor]:
        if name == "base" or name in self._kept:
            self._near[name] = {key: value.to(self.device) for key, value in self._instead(name).items()}
        try:
            return super().divergence(batch, spoken, name)
        finally:
            self._near.clear()

    @contextmanager
    def _speaking_by(self, adapters: Sequence[str]) -> Iterator[None]:
        """With these adapters, none of them for the network without any; PEFT sets what learns as it goes, which is put back."""
        network, now = self.network, self._adapters()
        if list(adapters) == now:
            yield
            return
        learns = [(value, value.requires_grad) for value in network.parameters()]
        try:
            if not adapters:
                with network.disable_adapter():
                    yield
            else:
                network.base_model.set_adapter(list(adapters))
                yield
        finally:
            if adapters:
                network.base_model.set_adapter(now)
            for value, learned in learns:
                value.requires_grad_(learned)

    def kept(self) -> dict[str, Any]:
        return {"held": sorted(self._held), "policies": {name: dict(policy) for name, policy in self._kept.items()}}

    @torch.no_grad()
    def restore_kept(self, state: Mapping[str, Any]) -> None:
        """The network has the weights that the stream began with, as `build` and the starting model made them."""
        held = set(state["held"]) - self._held.keys()
        self._held |= {
            _plain(key): value.detach().to("cpu", copy=True) for key, value in self.network.named_parameters() if _plain(key) in held
        }
        self._kept = {
            name: {
                "adapters": list(policy["adapters"]),
                "tensors": {key: value.cpu() for key, value in policy["tensors"].items()},
            }
            for name, policy in state["policies"].items()
        }


def _plain(name: str) -> str:
    """A parameter's name without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _merged(network: nn.Module) -> dict[str, Tensor]:
    """A network's tensors with its adapters in them; it stays as it is, and one layer at a time is copied."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {f"{name}.": module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = tuple(layers)
    tensors = {key: value for key, value in network.state_dict().items() if not key.startswith(inside)}
    for name, layer in layers.items():
        alone: Any = copy.deepcopy(layer)
        alone.merge()
        tensors |= {f"{name}{key}": value.cpu() for key, value in alone.get_base_layer().state_dict().items()}
    return tensors


def _of_adapter(name: str, adapters: Sequence[str]) -> bool:
    return name.startswith("base_model.") and any(f".{adapter}." in name or name.endswith(f".{adapter}") for adapter in adapters)


@contextmanager
def _drawn_by(generator: torch.Generator | None) -> Iterator[None]:
    """Libraries draw from the global generators: for a while these follow from ours, and are then as they were."""
    if generator is None:
        yield
        return
    before = random_state()
    seed_everything(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
    try:
        yield
    finally:
        restore_random(before)
