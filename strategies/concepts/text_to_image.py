"""Trains a whole text-to-image model on pictures with captions: what `model.pretrain` runs once, before concepts are taught.

Latent diffusion (Rombach et al., CVPR 2022) in two passes. First the autoencoder: squared error plus `kl` times the divergence of its
latents from a standard normal, whose scale is then measured. Then the UNet and the text encoder, on noise that was added to latents. A
share `pairs` of each batch shows two pictures side by side under `joint_templates` of the scenario, so that prompts that name two things
mean something; a share `unnamed` of the captions holds the class word alone, and a share `dropped` is empty, for classifier-free
guidance. For the tiny model: a real pipeline is trained already. Defaults are ours.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.nn.backbone import texts
from streamcl.options import Fraction, NonNegativeFloat, Optimizer, PositiveFloat, PositiveInt, Schedule, Stage
from streamcl.pictures import side_by_side
from streamcl.stream import Batch, StreamInfo, Task

from ._painting import Painter


class TextToImageTraining(Painter):
    def __init__(
        self,
        *,
        autoencoder_epochs: PositiveInt = 50,
        kl: NonNegativeFloat = 1e-5,
        pairs: Fraction = 0.25,
        unnamed: Fraction = 0.1,
        dropped: Fraction = 0.1,
        epochs: PositiveInt = 160,
        batch: PositiveInt = 48,
        optimizer: Optimizer = Optimizer(name="adamw", lr=2e-3, weight_decay=1e-4),  # noqa: B008
        schedule: Schedule = Schedule(name="cosine", warmup=0.05),  # noqa: B008
        clip: PositiveFloat | None = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, schedule=schedule, clip=clip, **options)
        self.autoencoder_epochs, self.kl, self.pairs = autoencoder_epochs, kl, pairs
        self.unnamed, self.dropped = unnamed, dropped
        self.autoencoding = False

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if self.backbone.origin is not None:
            raise ConfigError(f"{self.backbone.model} is trained already: leave out model.pretrain")

    def enter_task(self, task: Task) -> None:
        concepts = dict(zip(task.classes, task.concepts, strict=True))
        self.phrases = {label: concept["phrase"] for label, concept in concepts.items()}
        self.class_words = {label: concept["word"] for label, concept in concepts.items()}
        self.joint = task.joint_templates
        for concept in task.concepts:
            several = {"templates": [concept["phrase"]], "prompts": concept["prompts"], "joint_prompts": concept["joint_prompts"]}
            for option, prompts in several.items():
                self.check_words(prompts, f"scenario.{option}")
        self.check_words([text for raw in task.train.batches(1024) for text in texts(raw, "text")], "scenario.templates")

    def before_task(self, task: Task) -> None:
        self.autoencoding = True
        self.fit(task, task.train, Stage(epochs=self.autoencoder_epochs), "autoencoder", self.backbone.vae.parameters())
        self.autoencoding = False
        self.model.eval()
        with torch.no_grad():
            self.backbone.scale.fill_(1.0)
            parts = [self.backbone.pictures(self.context.prepare(raw, train=False)) for raw in task.train.batches(256)]
            self.backbone.scale.fill_(1 / torch.cat([self.backbone.encode(part) for part in parts]).std())

    def parameter_groups(self) -> list[nn.Parameter]:
        return [*self.backbone.unet.parameters(), *self.backbone.encoders.parameters()]

    def loss(self, batch: Batch) -> Tensor:
        pictures, captions = self.shown(batch)
        if not self.autoencoding:
            return self.denoising(pictures, captions)
        found = self.backbone.vae.encode(pictures).latent_dist
        latents = found.mean + found.std * self.draw(found.mean.shape)
        divergence = found.kl().mean() / latents[0].numel()
        return mse_loss(self.backbone.vae.decode(latents).sample, pictures) + self.kl * divergence

    def shown(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """The pictures of a batch, some as two side by side, and what is said of them."""
        random, labels = self.context.generator, batch.target.tolist()
        pictures, captions = self.backbone.pictures(batch), list(texts(batch, "text"))
        chance = torch.rand(2, len(labels), generator=random)
        other = torch.randperm(len(labels), generator=random)
        joined = chance[0] < self.pairs if self.joint else torch.zeros(len(labels), dtype=torch.bool)
        both = side_by_side(pictures, pictures[other.to(pictures.device)], background=-1.0)
        pictures = torch.where(joined.to(pictures.device)[:, None, None, None], both, pictures)
        template = torch.randint(max(1, len(self.joint)), (len(labels),), generator=random).tolist()
        for row, (label, partner) in enumerate(zip(labels, other.tolist(), strict=True)):
            if joined[row]:
                text = self.joint[template[row]]
                captions[row] = text.replace("{0}", self.phrases[label]).replace("{1}", self.phrases[labels[partner]])
            if chance[1, row] < self.dropped:
                captions[row] = ""
            elif chance[1, row] < self.dropped + self.unnamed:
                for mine in {label, labels[partner]} if joined[row] else {label}:
                    captions[row] = captions[row].replace(self.phrases[mine], self.class_words[mine])
        return pictures, captions
