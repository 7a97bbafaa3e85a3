"""A vision-language model that is small enough to learn on a laptop: Llava's architecture with a few layers.

Made on the spot, a vision transformer and a Llama, and untrained; `model.pretrain` with the learner sft warms it up. It reads and says
whole words, those of the built-in puzzles and `words` (divided by spaces) beside. Pictures are squares whose edge `patch` divides, as the
stream has them. Everything else is as with a large model (see language_model), from the folder that it is read from to the chat template;
but prompts that come again are tokenised once, pictures stay tensors, and the answers to one prompt share the reading of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from streamcl.errors import ConfigError
from streamcl.nn import tiny_vlm
from streamcl.nn.backbone import numbers, texts
from streamcl.options import PositiveInt
from streamcl.stream import Batch, StreamInfo

from .language_model import Speaker

REMEMBERED = 2**16  # prompts whose tokens are kept


class TinyVLM(Speaker):
    reader = "tiny_vlm"
    asks_first = True  # a few causal layers read a picture better with the question in mind

    def __init__(
        self,
        *,
        hidden: PositiveInt = 64,
        layers: PositiveInt = 2,
        heads: PositiveInt = 4,
        patch: PositiveInt = 7,
        vision_layers: PositiveInt = 1,
        words: str = "",
        longest: PositiveInt = 32,
        places: PositiveInt = 512,  # tokens of a prompt and its answer
        prompt: str = "{question}",
        system: str | None = None,
        at_once: PositiveInt = 512,
    ) -> None:
        super().__init__(model="tiny_vlm", longest=longest, prompt=prompt, system=system, vision=True, dtype="float32", at_once=at_once)
        self.shape = {"patch": patch, "hidden": hidden, "layers": layers, "heads": heads, "vision_layers": vision_layers, "places": places}
        self.more = words
        if hidden % (2 * heads):
            raise ConfigError(f"backbone tiny_vlm: hidden is {hidden}, which {heads} heads cannot share: take a multiple of {2 * heads}")

    def folder(self, info: StreamInfo) -> Path:
        edges = {info.modalities[name].shape[-2:] for name in self.seen}
        edge = max((max(edge) for edge in edges), default=self.shape["patch"])
        if edges - {(edge, edge)} or edge % self.shape["patch"]:
            told = " and ".join(f"{high} x {wide}" for high, wide in sorted(edges))
            raise ConfigError(
                f"backbone tiny_vlm: it reads squares of one size that patch ({self.shape['patch']}) divides, and the stream's pictures "
                f"are {told}: set patch, or let the source give others (size)"
            )
        self.edge = edge
        self.known: dict[tuple[str, str, int], Tensor] = {}  # the tokens of prompts: words, choices, pictures
        return tiny_vlm.folder(edge=edge, words=self.more, **self.shape)

    def load(self, folder: Path) -> None:
        with tiny_vlm.quietly():
            super().load(folder)

    def build(self, info: StreamInfo) -> None:
        super().build(info)
        self.origin, self.licence = None, "Apache-2.0"  # checkpoints hold it whole

    def save(self, folder: Path) -> dict[str, Any]:
        return {}

    # -- what the processor would make, without it ------------------------------------------------------------------------------------

    def prompts(self, batch: Batch) -> dict[str, Tensor]:
        ids, lengths = self._ids(batch), self._lengths(batch)
        tokens = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id, padding_side="left")
        mask = (torch.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]).long()
        inputs = {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device)}
        pixels = self._pixels(batch)
        return inputs if pixels is None else {**inputs, "pixel_values": pixels}

    def _lengths(self, batch: Batch) -> Tensor:
        return torch.tensor([len(row) for row in self._ids(batch)])

    def _ids(self, batch: Batch) -> list[Tensor]:
        """The tokens of each row's prompt; a prompt that comes again is remembered."""
        choices = batch.extra.get("choices") if "{choices}" in self.prompt else None
        said = zip(
            texts(batch, self.words),
            [row.replace("\n", ", ") for row in choices] if isinstance(choices, list) else [""] * len(batch),
            self._counts(batch).tolist(),
            strict=True,
        )
        keys = list(said)
        if len(self.known) > REMEMBERED:
            self.known.clear()
        for key in set(keys) - self.known.keys():
            places = "<image>" * (self.edge // self.shape["patch"]) ** 2
            rendered = self._render(self._conversation(*key)).replace("<image>", places)
            self.known[key] = torch.tensor(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])
        return [self.known[key] for key in keys]

    def _pixels(self, batch: Batch) -> Tensor | None:
        """All pictures in the order of the rows, each row's own in their order  # (pictures, 3, edge, edge)"""
        counts = self._counts(batch)
        first = counts.cumsum(0) - counts
        pixels, total = None, int(counts.sum())
        for name in self.seen:
            if name not in batch.inputs:
                continue
            values = numbers(batch, name).to(self.device)
            values = values if values.is_floating_point() else values / (self.highest[name] or 255)
            frames = values if values.dim() == 5 else values[:, None]
            frames = frames.expand(-1, -1, 3, -1, -1) if frames.shape[2] == 1 else frames
            rows = self._there(batch, name).nonzero().squeeze(1)
            if total == len(batch) * frames.shape[1] == len(rows) * frames.shape[1]:
                pixels = frames.flatten(0, 1)  # every row has these pictures and no others
                break
            if not len(rows):
                continue
            if pixels is None:
                pixels = values.new_zeros(total, *frames.shape[2:])
            places = first[rows][:, None] + torch.arange(frames.shape[1])
            pixels[places.flatten().to(self.device)] = frames[rows.to(self.device)].flatten(0, 1)
            first = first + frames.shape[1] * self._there(batch, name)
        return None if pixels is None else pixels.clamp(0, 1) * 2 - 1

    # -- answers ----------------------------------------------------------------------------------------------------------------------

    def write(self, batch: Batch, temperature: float, samples: int, generator: Any, longest: int) -> Tensor:
        """As transformers generates; but a prompt is read once for all its answers, and all end together."""
        inputs = self._placed(self._asked(batch, longest))
        network, ends = self.network, self._ends()
        read = network(**inputs, use_cache=True, logits_to_keep=1)
        cache, scores = read.past_key_values, read.logits[:, -1]
        mask, place = inputs["attention_mask"], inputs["position_ids"][:, -1:]
        if samples > 1:
            cache.batch_repeat_interleave(samples)
            scores, mask, place = (value.repeat_interleave(samples, dim=0) for value in (scores, mask, place))
        silent = self._unspoken()
        ended = torch.zeros(len(scores), dtype=torch.bool, device=self.device)
        tokens = torch.full((len(scores), longest), self.tokenizer.pad_token_id, device=self.device)
        for step in range(longest):
            scores[:, silent] = -torch.inf
            if temperature == 0:
                said = scores.argmax(dim=1)
            else:
                chances = (scores / temperature).softmax(dim=1)
                said = torch.multinomial(chances.to(generator.device) if generator is not None else chances, 1, generator=generator)
                said = said.squeeze(1).to(self.device)
            tokens[:, step] = said.masked_fill(ended, self.tokenizer.pad_token_id)
            ended |= torch.isin(said, ends)
            if step + 1 == longest or bool(ended.all()):
                break
            mask, place = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), place + 1
            read = network(
                input_ids=tokens[:, step : step + 1], attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
            )
            scores = read.logits[:, -1]
        return tokens[:, : step + 1]
