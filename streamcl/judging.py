"""Who says how well painted pictures fit their prompts and their concepts: CLIP, or an encoder of pictures and names trained on real ones.

A judge is made before the stream, from real pictures of every class, and never sees a painted one until it is asked. It gives features of
length 1 for pictures and for texts; alignment is the cosine of two of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from streamcl.errors import DataError, PluginError
from streamcl.learned import undisturbed
from streamcl.pictures import resized, side_by_side
from streamcl.stream import Batch, Modality, StreamInfo

VERSION = 1  # of the encoder that is trained: raised when it changes, so that no old one is taken from the cache
SEED = 20250


class Encoder(Protocol):
    """Features of length 1 for pictures (from 0 to 1) and for texts."""

    about: str

    def pictures(self, pictures: Tensor) -> Tensor: ...

    def texts(self, texts: Sequence[str]) -> Tensor: ...


class Judge:
    """An encoder, and the real pictures that painted ones are compared with.

    `references` are the pictures of each concept, in the order of its number; `others` those of further classes, one tensor for each.
    `rivals` says which of all these a picture of each concept may be taken for  # (concepts, concepts and other classes); `read` of which
    concepts the encoder knows the name  # (concepts,). Without them it is all.
    """

    def __init__(
        self,
        encoder: Encoder,
        references: Sequence[Tensor],
        others: Sequence[Tensor] = (),
        rivals: Tensor | None = None,
        read: Tensor | None = None,
    ) -> None:
        self.encoder = encoder
        means = [encoder.pictures(pictures).mean(dim=0) for pictures in (*references, *others)]
        self.means = torch.stack(means)  # (concepts and other classes, dim): a cosine with all of a class's pictures, averaged
        self.prototypes = normalize(self.means, dim=1)
        self.references, self.concepts = list(references), len(references)
        self.rivals = torch.ones(self.concepts, len(means), dtype=torch.bool) if rivals is None else rivals
        self.read = torch.ones(self.concepts, dtype=torch.bool) if read is None else read
        self._joint: dict[tuple[int, int], Tensor] = {}

    def joint(self, one: int, other: int) -> Tensor:
        """The mean of the features of real pictures of two concepts side by side, both ways round  # (dim,)"""
        key = min(one, other), max(one, other)
        if key not in self._joint:
            left, right = (resized(self.references[label], 2 * self.references[label].shape[-1]) for label in key)
            both = min(len(left), len(right))
            shown = [side_by_side(left[:both], right[:both]), side_by_side(right[:both], left[:both])]
            self._joint[key] = self.encoder.pictures(torch.cat(shown)).mean(dim=0)
        return self._joint[key]

    @torch.no_grad()
    def look(self, batch: Batch, pictures: Tensor | None) -> dict[str, Tensor]:
        """The features of what was painted for a batch of prompts, and of the prompts in words that the judge knows."""
        if pictures is None or pictures.dim() != 4 or len(pictures) != len(batch):
            told = "no images" if pictures is None else f"images of shape {tuple(pictures.shape)}"
            raise PluginError(
                f"this stream is answered in pictures, and the strategy's predict returned {told} for {len(batch)} prompts: "
                "(prompts, channels, height, width) with values from 0 to 1 are needed"
            )
        judged = batch.extra.get("judged")
        if not isinstance(judged, list):
            raise DataError("a prompt of this stream does not say how it is put to the judge (extra['judged'])")
        return {"image": self.encoder.pictures(pictures.detach().float().cpu()), "text": self.encoder.texts(judged)}


class Clip:
    """OpenCLIP, by the name or the folder that the backbone open_clip takes."""

    def __init__(self, model: str, channels: int) -> None:
        from streamcl.config import plugin_spec

        self.about = f"open_clip:{model}"
        info = StreamInfo({"image": Modality("image", (channels, 224, 224)), "text": Modality("text")})
        self.towers: dict[str, Any] = {}
        with undisturbed(SEED):
            for tower in ("image", "text"):
                self.towers[tower] = plugin_spec("backbone", {"name": "open_clip", "model": model, "tower": tower}).build()
                self.towers[tower].build(info)
                self.towers[tower].eval()
        self.modality = info.modalities["image"]
        self.steps = self.towers["image"].transforms()["test"]

    @torch.no_grad()
    def _features(self, tower: str, values: Any, count: int) -> Tensor:
        return normalize(self.towers[tower](Batch({tower: values}, None, torch.arange(count))).float(), dim=1)

    def pictures(self, pictures: Tensor) -> Tensor:
        for step in self.steps:
            pictures = step(pictures, self.modality, torch.Generator())
        return torch.cat([self._features("image", part, len(part)) for part in pictures.split(64)])

    def texts(self, texts: Sequence[str]) -> Tensor:
        different = list(dict.fromkeys(texts))
        found = self._features("text", different, len(different))
        return found[[different.index(text) for text in texts]]


class Own(nn.Module):
    """A small encoder of pictures, and a vector for each class's name; a text is the sum of the names in it.

    Trained as CLIP is: the cosine of a picture with the right text is to be above that with all others. Of the pictures two fifths show
    one class, two fifths show two side by side, under the names of both, and a fifth show nothing: spots, or two pictures in one place.
    Without these a judge takes noise for whatever class is most like it.
    """

    def __init__(self, names: Sequence[str], channels: int, edge: int, dim: int = 64) -> None:
        super().__init__()
        self.names, self.edge, self.channels = list(names), edge, channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, dim),
        )
        self.words = nn.Parameter(torch.randn(len(names) + 1, dim))  # the last one stands for nothing
        longest_first = sorted(map(re.escape, names), key=len, reverse=True)
        self.pattern = re.compile(rf"(?<!\w)({'|'.join(longest_first)})(?!\w)")
        self.about = "an encoder trained on the real pictures"

    def seen(self, pictures: Tensor) -> Tensor:
        return normalize(self.layers(resized(pictures, self.edge, self.channels) - 0.5), dim=1)

    def said(self, named: Tensor) -> Tensor:
        """`named` says which names a text holds  # (texts, names + 1)"""
        return normalize(named @ normalize(self.words, dim=1), dim=1)

    @torch.no_grad()
    def pictures(self, pictures: Tensor) -> Tensor:
        if pictures.shape[1] > self.channels:
            pictures = pictures.mean(dim=1, keepdim=True)
        return torch.cat([self.seen(part) for part in pictures.split(512)])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        named = torch.zeros(len(texts), len(self.words))
        for row, text in enumerate(texts):
            for name in self.pattern.findall(text):
                named[row, self.names.index(name)] = 1
        return self.said(named)

    def teach(self, pictures: Tensor, labels: Tensor, steps: int = 500, part: int = 26) -> None:
        random = torch.Generator().manual_seed(SEED)
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        pictures, one = resized(pictures, self.edge, self.channels), torch.eye(len(self.words))
        for step in range(steps):
            single, left, beside, over, under = torch.randint(len(labels), (5, part), generator=random)
            spots = torch.rand(part // 4, self.channels, 2 ** (1 + step % 4), 2 ** (1 + step % 4), generator=random)
            nothing = torch.cat([resized(spots, self.edge), (pictures[over] + pictures[under])[: part // 4] / 2])
            shown = torch.cat([pictures[single], side_by_side(pictures[left], pictures[beside]), nothing])
            both = (one[labels[left]] + one[labels[beside]]).clamp(max=1)
            named = torch.cat([one[labels[single]], both, one[-1].expand(len(nothing), -1)])
            offered, right = torch.cat([one, named]).unique(dim=0, return_inverse=True)
            move = torch.randint(-1, 2, (2,), generator=random).tolist()
            shown = shown.roll(move, dims=(2, 3)) + 0.1 * torch.rand((), generator=random) * torch.randn(shown.shape, generator=random)
            loss = cross_entropy(10 * self.seen(shown) @ self.said(offered).T, right[len(one) :])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def trained(names: Sequence[str], pictures: Tensor, labels: Tensor, tell: Callable[[str], None] = lambda message: None) -> Own:
    """The encoder for these real pictures (from 0 to 1), trained once and kept in the cache under the hash of all that it follows from."""
    edge = 16 if pictures.shape[-1] <= 16 else 32
    content = hashlib.sha256(json.dumps([VERSION, list(names), list(pictures.shape)]).encode())
    content.update(pictures.contiguous().numpy().tobytes())
    content.update(labels.contiguous().numpy().tobytes())
    folder = Path(os.environ.get("STREAMCL_CACHE", Path.home() / ".cache" / "streamcl")) / "judges"
    file = folder / f"{content.hexdigest()[:32]}.safetensors"
    with undisturbed(SEED):
        judge = Own(names, pictures.shape[1], edge)
        if file.is_file():
            judge.load_state_dict(load_file(file))
        else:
            tell(f"training the judge of the pictures on {len(labels)} real ones, once")
            with torch.enable_grad():
                judge.teach(pictures, labels)
            folder.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{file.name}.{os.getpid()}")
            save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, aside)
            aside.replace(file)
    return judge.eval().requires_grad_(False)
