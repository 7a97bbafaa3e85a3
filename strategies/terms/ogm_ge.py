"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement (Peng et al., CVPR 2022), as a term of any gradient strategy.

The score of modality m on a batch is how probable it alone makes the true classes, by its columns of the head and its share of the bias:

    s_m = sum over the batch of softmax(W_m h_m + bias / M) at the true class,      r_m = s_m / min_k s_k
    k_m = 1 - tanh(alpha r_m) where r_m > 1, else 1

The weights of encoder m get k_m x gradient, plus Gaussian noise as strong as the gradient's own entries vary (`noise`, the GE part; it
is the deviation before k_m, as in the released code). So what runs ahead is held back, and the noise gives back what smaller steps take
from generalisation. `begin` and `end` are the first and last epoch of a task with modulation, counted from 0, both included.

With two modalities r_m is the ratio to the other's score, as in the paper; with more the ratio to the smallest, as in BalanceMM, whose
alpha is the default (the original gives one for each data set). The original modulates 4-d convolutions only, all that its ResNet
has beside normalisations; here it is every weight of two dimensions or more, as in BalanceMM. Of masks the score is the mean over the
pixels. A sample that lacks a modality counts for none. Adam and its kin undo a constant factor: take SGD.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from streamcl.errors import ConfigError
from streamcl.nn.losses import NOT_ANNOTATED
from streamcl.options import NonNegativeFloat, NonNegativeInt
from streamcl.seeding import derived
from streamcl.strategy import GradientStrategy, Term
from streamcl.stream import Batch

from ._modalities import features_of, gradients_of, parts_of

TINY = 1e-8  # what the released code adds to the deviation of the noise


class OgmGe(Term):
    def __init__(self, *, alpha: NonNegativeFloat = 0.3, noise: bool = True, begin: NonNegativeInt = 0, end: NonNegativeInt = 50) -> None:
        if end < begin:
            raise ConfigError(f"ogm_ge: end is {end} and begin is {begin}: the first epoch of the modulation comes before the last")
        self.alpha, self.noise, self.begin, self.end = alpha, noise, begin, end
        self.scores: Tensor | None = None  # s, over the batches whose gradients accumulate  # (M,)

    def start(self, strategy: GradientStrategy) -> None:
        super().start(strategy)
        if strategy.info.target not in ("class", "mask"):
            raise ConfigError(
                "ogm_ge compares how probable each modality makes the true class, and the target of this stream is "
                f"{strategy.info.target}: take cggm"
            )
        if type(strategy).forward is not GradientStrategy.forward:
            name = type(strategy).__module__.rpartition(".")[2]
            raise ConfigError(f"ogm_ge takes a linear head apart by modality, and {name} scores by another rule: take cggm")
        self.parts = parts_of(strategy, "ogm_ge")
        device = strategy.context.device
        self.generator = torch.Generator(device).manual_seed(derived(strategy.context.seed, "ogm_ge"))

    @property
    def at_work(self) -> bool:
        return self.begin <= self.strategy.epoch <= self.end

    @torch.no_grad()
    def loss(self, batch: Batch) -> None:
        if self.at_work:
            scores = self.scored(features_of(self.strategy, batch)[0], batch)
            self.scores = scores if self.scores is None else self.scores + scores

    def scored(self, features: Tensor, batch: Batch) -> Tensor:
        """s of a batch  # (M,)"""
        assert batch.target is not None
        head, target = self.strategy.model.head, batch.target.long()
        known, found = target != NOT_ANNOTATED if target.dim() > 1 else None, []
        everywhere = torch.ones(len(target), dtype=torch.bool, device=target.device)
        for name, mask in (batch.present or {}).items():
            if name in self.parts:
                everywhere = everywhere & mask
        for part in self.parts.values():
            own = linear(features[:, part.columns].movedim(1, -1), head.weight[:, part.columns])  # (batch, ..., classes)
            if head.bias is not None:
                own = own + head.bias / len(self.parts)
            label = target if known is None else target.masked_fill(~known, 0)
            sure = own.float().softmax(-1).gather(-1, label[..., None])[..., 0]
            if known is not None:
                sure = (sure * known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
            found.append((sure * everywhere).sum())
        return torch.stack(found)

    @torch.no_grad()
    def after_backward(self, batch: Batch) -> None:
        scores, self.scores = self.scores, None
        if scores is None or not bool(scores.any()):  # no sample has all modalities
            return
        factors = modulation(scores, self.alpha)
        for part, factor in zip(self.parts.values(), factors, strict=True):
            for gradient in gradients_of(part, weights_only=True):
                deviation = gradient.std(correction=min(1, gradient.numel() - 1)) + TINY
                gradient.mul_(factor)
                if self.noise:
                    gradient.add_(deviation * torch.randn(gradient.shape, generator=self.generator, device=gradient.device))
        self.strategy.context.log(**{f"factor_{name}": value for name, value in zip(self.parts, factors, strict=True)})

    def state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())


def modulation(scores: Tensor, alpha: float) -> Tensor:
    """k from the modalities' scores  # (M,)"""
    ahead = scores / scores.min().clamp(min=TINY)
    return torch.where(ahead > 1, 1 - torch.tanh(alpha * ahead), torch.ones_like(ahead))
