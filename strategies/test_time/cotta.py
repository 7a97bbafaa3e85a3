"""CoTTA: a student learns from a slow teacher that answers, averaged over views where the source is unsure; some weights always go home.

Wang et al., CVPR 2022, arXiv 2203.13591. With student theta, teacher theta' and the source theta0, all by the statistics of the batch:

    z' = f(x; theta')                                              where the source is sure: mean_i max_c softmax f(x_i; theta0) >= p_th
    z' = 1/N sum_n f(augment_n(x); theta')                         else
    L  = mean_i CE(softmax z'_i, softmax f(x_i; theta))            one step on every parameter
    theta' <- m theta' + (1 - m) theta
    theta  <- M * theta0 + (1 - M) * theta,   M ~ Bernoulli(r)     for every single weight

and the answer is z', made before the step. `symmetric` is the release's loss for ImageNet, half of it with the roles exchanged.

Defaults are those of CIFAR-10-C (CIFAR-100-C: p_th 0.72; ImageNet-C: p_th 0.1, r 0.001, SGD at 0.01). The release runs all N views also
where it does not use them: here it does not. It restores tensors that are called weight or bias; here every parameter, so that tokens and
position embeddings come home as well. A step that was not finite moves neither teacher nor student. On transformers these settings are
known to break. `views: 0` never averages: for streams without images.

Beside the model it keeps the source's parameters and the teacher's. A prediction that learns nothing is the teacher's on the batch itself.

Evidence: small real data
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamcl.context import Context
from streamcl.nn.norms import with_values
from streamcl.options import Fraction, NonNegativeInt, PositiveFloat
from streamcl.stream import Batch, StreamInfo

from ._augmenting import Pixels, on_device, strong
from ._teacher import Taught


class Cotta(Taught):
    """The teacher's answers to `views` are averaged where the source's mean confidence is below `p_th`; `m` is how much the teacher keeps,
    `r` the share of weights that go back to the source; `symmetric` is the loss for ImageNet. Views are mirrored with probability `flip`;
    `mean` and `std` are what images were normalised by, where the stream's preparation does not say it."""

    def __init__(
        self,
        *,
        views: NonNegativeInt = 32,
        p_th: Fraction = 0.92,
        m: Fraction = 0.999,
        r: Fraction = 0.01,
        symmetric: bool = False,
        flip: Fraction = 0.5,
        mean: list[float] = [],  # noqa: B006
        std: list[PositiveFloat] = [],  # noqa: B006
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.views, self.p_th, self.m, self.r, self.symmetric = views, p_th, m, r, symmetric
        self.flip, self.mean, self.std = flip, mean, std

    def start(self, info: StreamInfo, context: Context) -> None:
        if self.views:
            self.pixels = Pixels("cotta (views: 0 goes without)", info, context, self.mean, self.std)
        super().start(info, context)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def update(self, batch: Batch) -> Tensor:
        with self.statistics(gather=False):
            taught = self.taught(batch)
        if self.step(self.learned(self.model(batch), taught)):
            self.follow(1 - self.m)
            self.restore_some()
        return self.again(batch) if self.answer == "after" else taught

    @torch.no_grad()
    def taught(self, batch: Batch) -> Tensor:
        """z'"""
        if self.views:
            sure = self.reference(batch).softmax(dim=1).amax(dim=1).mean()
            if float(sure) < self.p_th:
                self.count("averaged")
                return self.averaged(batch)
        return self.forward(batch)

    def averaged(self, batch: Batch) -> Tensor:
        with with_values(self.model, self.teacher):
            views = (self.pixels.augmented(batch, self.view, self.context.generator) for _ in range(self.views))
            return torch.stack([self.model(view) for view in views]).mean(dim=0)

    def view(self, values: Tensor, generator: torch.Generator) -> Tensor:
        return strong(values, generator, self.flip)

    def learned(self, logits: Tensor, taught: Tensor) -> Tensor:
        """L"""
        loss = cross_entropy(logits, taught.softmax(dim=1))
        if self.symmetric:
            loss = 0.5 * loss - 0.5 * (logits.softmax(dim=1) * taught.log_softmax(dim=1)).sum(dim=1).mean()
        return loss

    @torch.no_grad()
    def restore_some(self) -> None:
        """A share of the student's weights become the source's again."""
        ends = torch.tensor([0, *(value.numel() for value in self.adapted.values())]).cumsum(0)
        chosen = scattered(int(ends[-1]), self.r, on_device(self.context.generator, self.context.device))
        places = torch.searchsorted(chosen, ends.to(chosen.device)).tolist()
        for first, last, end, (name, value) in zip(places, places[1:], ends.tolist(), self.adapted.items(), strict=False):
            flat, which = value.reshape(-1), chosen[first:last] - end
            flat[which] = self.source[name].reshape(-1)[which]
            if not value.is_contiguous():  # then what was changed is a copy
                value.copy_(flat.view(value.shape))

    def own_state(self) -> dict[str, Any]:
        return {"teacher": dict(self.teacher)}

    def own_restore(self, state: Mapping[str, Any]) -> None:
        self.teacher = dict(state["teacher"])


def scattered(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Which of so many are chosen, each with probability `share`, by the gaps between them: as many numbers are drawn as are chosen."""
    chosen = torch.zeros(0, dtype=torch.int64, device=generator.device)
    last = -1
    while share > 0 and last < count:
        likely = (count - last) * share
        uniform = torch.rand(int(likely + 4 * likely**0.5) + 16, generator=generator, device=generator.device, dtype=torch.float64)
        gaps = torch.log1p(-uniform) / math.log1p(-share) if share < 1 else torch.zeros_like(uniform)
        chosen = torch.cat([chosen, (gaps.clamp(max=count).floor().long() + 1).cumsum(0) + last])
        last = int(chosen[-1])
    return chosen[chosen < count]
