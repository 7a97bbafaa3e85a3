"""What all concept learners share: the words of the concepts, the diffusion loss, and painting what a prompt says.

The vectors of the concepts' words are the rows of the model's head, one for each concept in order of arrival: they grow with the stream,
old rows stay bit for bit, and checkpoints and exports hold them. The model's own table of words is never touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.nn.backbone import texts
from streamcl.nn.backbones.text_to_image import TextToImage
from streamcl.nn.model import GrowingHead, Model
from streamcl.options import NonNegativeFloat, Optimizer, PositiveFloat, PositiveInt
from streamcl.pictures import noise_of
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch, Prediction, StreamInfo, Task


class Painter(GradientStrategy):
    """The training loop of diffusion models: pictures and their captions in, the squared error of the noise out."""

    targets = ("image",)
    backbone: TextToImage

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.backbone = painter(context.model)
        if not info.words:
            raise ConfigError("a text-to-image model learns pictures with captions: take scenario.name=concepts")
        self.model.head = GrowingHead(self.backbone.dim, bias=False).to(context.device)

    def training_mode(self) -> None:
        self.model.eval()  # nothing in it drops out, and what is frozen stays as it is

    def loss(self, batch: Batch) -> Tensor:
        return self.denoising(self.backbone.pictures(batch), texts(batch, "text"))

    def denoising(self, pictures: Tensor, prompts: Sequence[str], vectors: Tensor | None = None) -> Tensor:
        """L_diff: the mean of ||epsilon - epsilon_theta(z_t, t, prompt)||^2."""
        return self.errors(pictures, prompts, vectors).mean()

    def errors(self, pictures: Tensor, prompts: Sequence[str], vectors: Tensor | None = None) -> Tensor:
        """||epsilon - epsilon_theta(z_t, t, prompt)||^2 for latents z of each picture (from -1 to 1), a time t and noise  # (pictures,)"""
        backbone, shape = self.backbone, self.backbone.latent_shape(len(pictures))
        latents = backbone.encode(pictures, self.draw(shape))
        noise = self.draw(shape)
        last = int(backbone.scheduler.config.num_train_timesteps)
        times = torch.randint(last, (len(pictures),), generator=self.context.generator).to(latents.device)
        noisy, wanted = backbone.wanted(latents, noise, times)
        found = backbone.denoise(noisy, times, backbone.read(prompts, vectors))
        return mse_loss(found.float(), wanted.float(), reduction="none").flatten(1).mean(dim=1)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of the run's own generator, the same on every device."""
        return torch.randn(*shape, generator=self.context.generator).to(self.context.device)

    def predict(self, batch: Batch) -> Prediction:
        prompts = texts(batch, "text")
        told = self.read(prompts)
        noise = noise_of(batch.ids, self.backbone.latent_shape(len(batch))).to(self.context.device)
        return Prediction(images=self.backbone.paint(told, noise))

    def read(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What the prompts say when nothing is learned from it."""
        return self.backbone.read(prompts)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        self.check_words(prompts, "the prompt")

    def check_words(self, prompts: Sequence[str], option: str) -> None:
        unknown = self.backbone.unknown(prompts)
        if unknown:
            raise ConfigError(
                f"the model does not know the word {unknown[0]!r}, and would read it as any other that it does not know: change {option}, "
                "or add it to model.backbone.words (of a model that is trained again)"
            )


class ConceptLearner(Painter):
    """Every concept is a word of its own, whose vector is learned with whatever else a method trains.

    A new word begins as the class word's vector where the model knows that and `from_word` says so, else at random. Words are trained
    without weight decay, which would move the old ones as well.
    """

    from_word = True

    def __init__(
        self,
        *,
        token_lr: NonNegativeFloat = 1e-3,
        epochs: PositiveInt = 200,
        batch: PositiveInt = 4,
        optimizer: Optimizer = Optimizer(name="adamw", lr=1e-4, weight_decay=1e-2),  # noqa: B008
        clip: PositiveFloat | None = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, clip=clip, **options)
        if self.replay:
            raise ConfigError(
                f"strategy.replay is {self.replay}, and exemplars of concepts do not join every batch: leave it out (conceptguard has a "
                "queue of its own)"
            )
        self.token_lr = token_lr
        self.new: Tensor = torch.empty(0, dtype=torch.bool)  # which words this task brought

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.backbone.requires_grad_(False)
        self.backbone.know(self.tokens(info.words))

    def tokens(self, words: Sequence[str]) -> list[str]:
        """The words that are no part of the model's vocabulary, in the order of their vectors."""
        return list(words)

    def enter_task(self, task: Task) -> None:
        self.check(task)
        self.new = torch.zeros(max(task.seen) + 1, dtype=torch.bool)
        self.new[list(task.classes)] = True
        self.new = self.new.to(self.context.device)

    def before_task(self, task: Task) -> None:
        if task.index == 0 and self.backbone.origin is None and float(self.backbone.scale) == 1:
            self.context.events.warn(
                "the text-to-image model was never trained, so there is nothing to customize: give model.pretrain with the strategy "
                "text_to_image, or model.backbone.model"
            )
        weight = self.model.head.weight
        spread = self.backbone.encoders[0].get_input_embeddings().weight.std()
        with torch.no_grad():
            for label, concept in zip(task.classes, task.concepts, strict=True):
                known = self.backbone.word_vectors(concept["word"]) if self.from_word else None
                weight[label] = self.draw(weight.shape[1:]) * spread.to(weight.device) if known is None else known.to(weight)

    def loss(self, batch: Batch) -> Tensor:
        return self.denoising(self.backbone.pictures(batch), texts(batch, "text"), self.vectors())

    def vectors(self) -> Tensor:
        """The words' vectors, of which only the new ones learn  # (concepts, dim)"""
        weight = self.model.head.weight
        return torch.where(self.new[:, None], weight, weight.detach())

    def parameter_groups(self) -> list[dict[str, Any]]:
        words = {"params": [self.model.head.weight], "lr": self.token_lr, "weight_decay": 0.0}
        trained = self.trained()
        return [*([{"params": trained}] if trained else []), *([words] if self.token_lr else [])]

    def trained(self) -> list[nn.Parameter]:
        """What learns of the generator."""
        return []

    def read(self, prompts: Sequence[str]) -> dict[str, Any]:
        return self.backbone.read(prompts, self.model.head.weight)

    def check(self, task: Task) -> None:
        """Every caption and prompt must hold the word of its concept, and no word that the model cannot read."""
        captions: dict[int, list[str]] = {}
        for raw in task.train.batches(256):
            for text, label in zip(texts(raw, "text"), raw.target.tolist(), strict=True):
                captions.setdefault(label, []).append(text)
        for label, concept in zip(task.classes, task.concepts, strict=True):
            if label not in captions:
                raise ConfigError(f"concept {concept['name']!r} has no picture to learn from: give it some, or leave it out of concepts")
            several = {"templates": captions[label], "prompts": concept["prompts"], "joint_prompts": concept["joint_prompts"]}
            for option, prompts in several.items():
                self.check_words(prompts, f"scenario.{option}, or scenario.word where it is the class word")
                lacking = self.backbone.without(prompts, concept["placeholder"])
                if lacking:
                    raise ConfigError(
                        f"the word {concept['placeholder']!r} of concept {concept['name']!r} is not read in {lacking[0]!r} (missing, not a "
                        f"word by itself, or cut off at the end): change scenario.{option} or scenario.placeholder"
                    )


class Prior:
    """Pictures of the class that the generator painted before it was customized, and their caption: what DreamBooth holds the class by."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pictures: dict[str, Tensor] = {}  # caption -> pictures from 0 to 1, as bytes

    def paint(self, learner: ConceptLearner, task: Task) -> None:
        """Once for each class word of the stream, with what the generator is now: called before the first task."""
        first = task.concepts[0]
        for word in dict.fromkeys(learner.info.nouns) if self.count else ():
            if not word:
                continue
            caption = first["prompts"][0].replace(first["phrase"], word)
            learner.check_words([caption], "scenario.word")
            noise = learner.draw(learner.backbone.latent_shape(self.count))
            parts = [learner.backbone.paint(learner.backbone.read([caption] * len(part)), part) for part in noise.split(64)]
            self.pictures[caption] = (torch.cat(parts) * 255).round().to(torch.uint8).cpu()

    def loss(self, learner: ConceptLearner, size: int) -> Tensor | None:
        """The diffusion loss of `size` of them; None where there are none."""
        if not self.pictures:
            return None
        captions = list(self.pictures)
        which = torch.randint(len(captions), (size,), generator=learner.context.generator).tolist()
        rows = torch.randint(self.count, (size,), generator=learner.context.generator).tolist()
        chosen = torch.stack([self.pictures[captions[c]][row] for c, row in zip(which, rows, strict=True)])
        pictures = chosen.to(learner.context.device).float() / 127.5 - 1
        return learner.denoising(pictures, [captions[c] for c in which])

    def state(self) -> dict[str, Any]:
        return dict(self.pictures)

    def restore(self, state: Mapping[str, Any]) -> None:
        self.pictures = dict(state)


def painter(model: Model) -> TextToImage:
    if not isinstance(model.backbone, TextToImage):
        name = type(model.backbone).__module__.rpartition(".")[2]
        raise ConfigError(
            f"the backbone {name} paints no pictures: set model.backbone=text_to_image, or to text_to_image:NAME of a pipeline"
        )
    return model.backbone
