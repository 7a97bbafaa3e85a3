"""What the methods with prompts share: a frozen multimodal transformer, the prompts around it, and what is refused."""

from __future__ import annotations

from abc import abstractmethod

from torch import nn

from streamcl.context import Context
from streamcl.errors import ConfigError, DataError
from streamcl.nn.prompts import Promptable, Prompts, presence
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch, StreamInfo, Task


class Prompted(GradientStrategy):
    """All of the transformer is frozen but what `opened` names; the prompts and the head learn."""

    targets = ("class", "labels", "value")

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        name = type(self).__module__.rpartition(".")[2]
        transformer = self.model.backbone.transformer()
        if len(transformer.reads) < 2:
            raise ConfigError(
                f"{name} learns what to do where a modality is missing, and the model reads {transformer.reads[0]} alone: take a stream of "
                "several modalities (shapes, digits_av), and let model.backbone.modalities name two at least"
            )
        self.transformer, self.name = transformer, name
        self.model.backbone.requires_grad_(False)
        for parameter in self.opened(transformer):
            parameter.requires_grad_(True)
        self.model.prompts = self.prompts_for(transformer).to(context.device)

    @abstractmethod
    def prompts_for(self, transformer: Promptable) -> Prompts:
        """The prompts as they begin."""

    def opened(self, transformer: Promptable) -> list[nn.Parameter]:
        """What of the transformer learns with the prompts."""
        return []

    def before_task(self, task: Task) -> None:
        if task.index == 0 and not self.model.trained:
            self.context.events.warn(
                f"{self.name} learns prompts for a transformer that stays as it is, and nothing has trained this one: let model.pretrain "
                "train it, or start from a run (model.run) or from weights by name"
            )

    def training_mode(self) -> None:
        self.model.train()
        self.model.backbone.eval()

    def compose(self, batch: Batch) -> Batch:
        empty = ~presence(batch, self.transformer.reads).any(dim=1)  # on the host, before the batch moves to the device
        if bool(empty.any()):
            raise DataError(
                f"{int(empty.sum())} of {len(batch)} samples (id {int(batch.ids[empty][0])} first) have none of "
                f"{', '.join(self.transformer.reads)}, and {self.name} needs one of them: let the scenario's patterns leave one, or let "
                "model.backbone.modalities name more"
            )
        return super().compose(batch)
