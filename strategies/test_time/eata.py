"""EATA: entropy minimisation on reliable samples that are not like those before, with a pull to the source on what mattered there.

Niu et al., ICML 2022, arXiv 2204.02610. Of a batch with probabilities p_i and entropies H_i those are kept for which

    H_i < E0                and        |cos(m, p_i)| < epsilon

where m is the running mean of the kept samples' p (0.9 old, 0.1 new; the second rule waits until there is one). One step is made on

    mean over the kept of  exp(E0 - H_i) H_i   +   beta * sum_j F_j (theta_j - theta_j of the source)^2

with no gradient through the weights. F is the Fisher information of the source: `calibrate` takes unlabelled data of the source (the first
`fisher_samples`) and averages, over its batches, the squared gradient of the cross-entropy with the model's own decisions. Without such
data there is no pull: that is ETA of the same paper, and a warning says so where beta is not 0.

`e0` is 0.4 ln C unless given. `epsilon` has to lie above 1 / sqrt(C), the cosine of a certain answer with a uniform mean, or next to
nothing is kept: unless given it is the power of C through the authors' values for 10 and 1000 classes, 0.4 and 0.05 (that gives 0.14 for
100 classes, where they have 0.1). The other defaults are theirs for CIFAR; for ImageNet they have beta 2000 and SGD at 2.5e-4 with momentum
0.9. A batch of which nothing is kept makes no step (their loss would be NaN), and a reset clears m, which theirs keeps. As in their code
the whole batch goes through the backward pass: what is left out saves no time.

Evidence: small real data
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from streamcl.adapting import AdaptingStrategy, entropy
from streamcl.options import NonNegativeFloat, PositiveFloat, PositiveInt
from streamcl.stream import Batch

from ._reliable import margin

POWER = math.log(0.4 / 0.05) / math.log(1000 / 10)  # epsilon = 0.4 (10 / C)^POWER


class EATA(AdaptingStrategy):
    """`e0` and `epsilon`: the margins of the two rules, null for those that follow from the number of classes. `weighted`: whether surer
    samples count more. `beta` and `fisher_samples`: the pull to the source, and how much calibration data it is made from."""

    def __init__(
        self,
        *,
        e0: PositiveFloat | None = None,
        epsilon: PositiveFloat | None = None,
        weighted: bool = True,
        beta: NonNegativeFloat = 1.0,
        fisher_samples: PositiveInt = 2000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.e0, self.epsilon, self.weighted, self.beta, self.fisher_samples = e0, epsilon, weighted, beta, fisher_samples
        self.mean: Tensor | None = None  # of the probabilities of what was kept  # (classes,)
        self.fisher: dict[str, Tensor] = {}
        self.told = False

    def loss(self, batch: Batch, logits: Tensor) -> Tensor | None:
        self._tell(logits.shape[1])
        e0, found = margin(self.e0, 0.4, logits), entropy(logits)
        probabilities = logits.detach().softmax(dim=1)
        keep = found.detach() < e0
        if self.mean is not None:
            keep &= cosine_similarity(self.mean[None], probabilities).abs() < self._epsilon(logits.shape[1])
        rows = keep.nonzero().squeeze(1)
        self.count("kept", len(rows))
        if not len(rows):
            return None
        kept, found = probabilities[rows].mean(dim=0), found[rows]
        self.mean = kept if self.mean is None else 0.9 * self.mean + 0.1 * kept
        return (found * (e0 - found.detach()).exp() if self.weighted else found).mean() + self._pull()

    def _pull(self) -> Tensor | float:
        if not self.fisher or not self.beta:
            return 0.0
        together = (torch.cat([values[name].flatten() for name in self.fisher]) for values in (self.fisher, self.adapted, self.source))
        fisher, now, source = together
        return self.beta * (fisher * (now - source).square()).sum()

    def _epsilon(self, classes: int) -> float:
        return 0.4 * (10 / classes) ** POWER if self.epsilon is None else self.epsilon

    def _tell(self, classes: int) -> None:
        """What is to be said once, when the number of classes is known."""
        if self.told:
            return
        self.told = True
        if self.beta and not self.fisher:
            self.context.events.warn(
                "eata: no data of the source came to calibrate it, so nothing pulls the weights back to the source: this is eta (beta: 0 "
                "says that this is meant)"
            )
        if self._epsilon(classes) <= classes**-0.5:
            self.context.events.warn(
                f"eata: epsilon is {self._epsilon(classes):g}, and a certain answer has a cosine of {classes**-0.5:.3g} with a uniform "
                f"mean of {classes} classes: next to nothing will be learned from; leave epsilon out, or set it higher"
            )

    def calibrate(self, batches: Iterable[Batch]) -> None:
        self.fisher = {name: torch.zeros_like(value) for name, value in self.adapted.items()}
        samples = count = 0
        for batch in batches:
            with torch.enable_grad(), self.statistics(gather=False):
                logits = self.model(batch)
                gradients = torch.autograd.grad(cross_entropy(logits, logits.argmax(dim=1)), list(self.adapted.values()), allow_unused=True)
            for total, gradient in zip(self.fisher.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.square()
            samples, count = samples + len(batch), count + 1
            if samples >= self.fisher_samples:
                break
        self.fisher = {name: total / count for name, total in self.fisher.items()} if count else {}

    def own_state(self) -> dict[str, Any]:
        return {"mean": self.mean, "fisher": self.fisher}

    def own_restore(self, state: Mapping[str, Any]) -> None:
        self.mean, self.fisher = state["mean"], dict(state["fisher"])
