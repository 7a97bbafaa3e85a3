"""SAR: entropy minimisation on reliable samples, towards a flat minimum, with a return to the source when it collapses.

Niu et al., ICLR 2023, arXiv 2302.12400. Of a batch with entropies H_i:

    1.  reliable are the i with H_i < E0;  g is the gradient of their mean entropy, over all adapted tensors
    2.  theta + rho g / ||g||  is as bad as theta gets nearby: there the batch is answered again, giving H'_i
    3.  of the reliable ones those with H'_i < E0 stay; the gradient of their mean entropy L, taken there, is the step made from theta
    4.  e <- 0.9 e + 0.1 L (L at first); where e < e_m, weights and optimiser are the source's again and e is forgotten

Without reliable samples there is no step, at 3 as well as at 1, and theta is put back to the bit. The normalisation layers of the last
blocks are left out (`skip`). The answer is that of the first forward pass.

`e0` is 0.4 ln C unless given. `e_m` is 0.2 in the paper, for 1000 classes; a sound model of few classes is below that all the time, and
would be reset at every batch. Unless given it is 0.2 ln C / ln 1000, the same share of the largest entropy (0.067 for ten classes). In
the released code the running mean survives the reset, so that it is repeated for several batches, and the threshold is a constant
in the function; here they are as the paper has them. With batch normalisation it runs, and warns: the authors advise against it.

Defaults: SGD at 2.5e-4 with momentum 0.9, as for ResNet-50 with batches of 64 (ViT-B: 1e-3 / 64 per sample; batches of one: twice that).

Evidence: small real data
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.adapting import entropy
from streamcl.context import Context
from streamcl.options import NonNegativeFloat, Optimizer, PositiveFloat
from streamcl.strategy import make_optimizer
from streamcl.stream import Batch, StreamInfo

from ._reliable import Shallow, margin


class SAR(Shallow):
    """`e0`: the margin of reliable samples. `rho`: how far up the slope is looked. `e_m`: the running entropy that counts as a collapse, 0
    for never; null for what follows from the number of classes."""

    def __init__(
        self,
        *,
        e0: PositiveFloat | None = None,
        rho: NonNegativeFloat = 0.05,
        e_m: NonNegativeFloat | None = None,
        optimizer: Optimizer = Optimizer(name="sgd", lr=2.5e-4, momentum=0.9),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **options)
        self.e0, self.rho, self.e_m = e0, rho, e_m
        self.e: float | None = None  # the running mean of the entropy that was minimised

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if self.layers:
            context.events.warn(
                "sar: this model has batch normalisation, for which its authors advise against it: small or mixed batches spoil its "
                "statistics; they have it for layer and group normalisation, and eata or tent do with batches of some size"
            )

    def update(self, batch: Batch) -> Tensor:
        logits = self.model(batch)
        if not self.minimise(batch, logits):
            self.count("skipped")
        return self.again(batch) if self.answer == "after" else logits.detach()

    def minimise(self, batch: Batch, logits: Tensor) -> bool:
        """Steps 1 to 4. Whether there was something to learn from."""
        e0, first = margin(self.e0, 0.4, logits), entropy(logits)
        reliable = (first.detach() < e0).nonzero().squeeze(1)
        self.count("kept", len(reliable))
        if not len(reliable):
            return False
        loss = first[reliable].mean()
        self.backward(loss)
        before = self.climb()
        if before is None:
            self.apply(loss)
            return True
        try:
            with self.statistics(gather=False):
                second = entropy(self.model(batch))[reliable]
            still = (second.detach() < e0).nonzero().squeeze(1)
            if len(still):
                loss = second[still].mean()
                self.backward(loss)
        finally:
            self.back(before)
        if not len(still):
            return False
        if self.apply(loss):
            self.recover(loss.item(), logits.shape[1])
        return True

    @torch.no_grad()
    def climb(self) -> dict[str, Tensor] | None:
        """Go up the slope. What the weights were, or None where the gradient is not finite; then it is still there."""
        gradients = {name: value.grad for name, value in self.adapted.items() if value.grad is not None}
        size = nn.utils.get_total_norm(gradients.values())
        if not bool(size.isfinite()):
            return None
        before = {}
        for name, gradient in gradients.items():
            value = self.adapted[name]
            before[name] = value.detach().clone()
            value.add_(gradient * (self.rho / (size + 1e-12)))
            value.grad = None
        return before

    @torch.no_grad()
    def back(self, before: Mapping[str, Tensor]) -> None:
        for name, value in before.items():
            self.adapted[name].copy_(value)

    @torch.no_grad()
    def recover(self, loss: float, classes: int) -> None:
        """Be the source again, where the running entropy says that all samples get one answer."""
        self.e = loss if self.e is None else 0.9 * self.e + 0.1 * loss
        if self.e >= (0.2 * math.log(classes) / math.log(1000) if self.e_m is None else self.e_m):
            return
        for name, value in self.adapted.items():
            value.copy_(self.source[name])
        self.optimizer, self.e = make_optimizer(self.adapted.values(), self.optimizer_settings), None
        self.count("recovered")

    def own_state(self) -> dict[str, Any]:
        return {"e": self.e}

    def own_restore(self, state: Mapping[str, Any]) -> None:
        self.e = state["e"]
