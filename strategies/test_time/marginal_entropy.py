"""MEMO of test-time adaptation: each sample alone, one step on the entropy of its views' mean prediction; then all is forgotten.

Zhang, Levine and Finn, NeurIPS 2022, arXiv 2110.09506 (the name `memo` belongs to a class-incremental method). For one sample and n views
of it by AugMix

    p = 1/n sum_k softmax f(view_k; theta),    L = -sum_c p_c log p_c

is minimised over every parameter from the source's weights, by `steps` steps; the sample itself is answered; weights and optimiser are the
source's again. Batch normalisation mixes the statistics of what it is given with the source's, 1/(prior + 1) of the former (16 for
ImageNet, as released; no gradient goes through them).

Each sample has weights of its own, so the samples of a batch go one after another: n forward and n backward passes and one more forward
pass for every one. This is no method for a path that somebody waits on. A prediction that learns nothing is the source's, with the same
batch normalisation.

Defaults are those of CIFAR-10 (ImageNet with ResNet-50: SGD at 2.5e-4, 64 views, `crop: resized`; RVT and ResNeXt: AdamW at 1e-5, weight
decay 0.01). The release takes the unbiased variance of the batch, which does not exist for one value: here it is the biased one.

Evidence: small real data
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from streamcl.adapting import AdaptingStrategy
from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.nn.norms import by_mixture
from streamcl.options import Fraction, NonNegativeFloat, Optimizer, PositiveFloat, PositiveInt
from streamcl.stream import Batch, StreamInfo

from ._augmenting import Pixels, augmix


class MarginalEntropy(AdaptingStrategy):
    """`views` of each sample, `steps` on them; `prior` is the weight of the source's statistics in samples, none for those of the source
    alone. Views are cut out with a `padded` border or as boxes that are `resized`, mirrored with probability `flip`, and changed with
    `severity` (of 10); `mean` and `std` are what images were normalised by, where the stream's preparation does not say it."""

    batch_statistics: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    window: int | None = 1

    def __init__(
        self,
        *,
        views: PositiveInt = 32,
        steps: PositiveInt = 1,
        prior: NonNegativeFloat | None = 16.0,
        crop: Literal["padded", "resized"] = "padded",
        flip: Fraction = 0.5,
        severity: PositiveFloat = 1.0,
        mean: list[float] = [],  # noqa: B006
        std: list[PositiveFloat] = [],  # noqa: B006
        optimizer: Optimizer = Optimizer(name="sgd", lr=0.005),  # noqa: B008
    ) -> None:
        super().__init__(optimizer=optimizer)
        self.views, self.steps, self.prior = views, steps, prior
        self.crop, self.flip, self.severity, self.mean, self.std = crop, flip, severity, mean, std

    def start(self, info: StreamInfo, context: Context) -> None:
        self.pixels = Pixels("marginal_entropy", info, context, self.mean, self.std)
        super().start(info, context)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def update(self, batch: Batch) -> Tensor:
        return torch.cat([self.alone(batch[number : number + 1]) for number in range(len(batch))])

    def alone(self, sample: Batch) -> Tensor:
        """The answer to one sample by weights of its own  # (1, classes)"""
        try:
            for _ in range(self.steps):
                views = self.pixels.augmented(sample[[0] * self.views], self.view, self.context.generator)
                self.step(marginal_entropy(self.model(views)))
            return self.forward(sample)
        finally:
            self.forget()

    def forward(self, batch: Batch) -> Tensor:
        apart = self.layers and self.prior is not None and len(batch) > 1  # no sample has a part in another's statistics
        with torch.no_grad():
            return torch.cat([self.model(batch[i : i + 1]) for i in range(len(batch))]) if apart else self.model(batch)

    def view(self, values: Tensor, generator: torch.Generator) -> Tensor:
        return augmix(values, generator, self.flip, self.severity, self.crop)

    @torch.no_grad()
    def forget(self) -> None:
        torch._foreach_copy_(list(self.adapted.values()), list(self.source.values()))
        torch.clear_autocast_cache()  # it holds casts of what is forgotten
        assert self.optimizer is not None
        self.optimizer.state.clear()  # momentum of one sample is nothing to the next

    def correct(self, batch: Batch) -> None:
        raise ConfigError("marginal_entropy forgets after each sample what it learned from it: labels that come late would change nothing")

    @contextmanager
    def statistics(self, gather: bool = True) -> Iterator[None]:
        prior = self.prior
        with nullcontext() if prior is None or not self.layers else by_mixture(self.layers, lambda count: 1 / (prior + 1)):
            yield


def marginal_entropy(logits: Tensor) -> Tensor:
    """The entropy of the mean of the rows' softmax, from logarithms throughout"""
    log = logits.log_softmax(dim=1).logsumexp(dim=0) - math.log(len(logits))
    log = log.clamp(min=torch.finfo(log.dtype).min)
    return -(log.exp() * log).sum()
