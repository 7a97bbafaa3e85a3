"""SuMi: begin with samples in the middle of the features' distribution, learn from those that several modalities together are sure of.

Guo et al., Smoothing the Shift: Towards Stable Test-Time Adaptation under Complex Multimodal Noises, ICLR 2025, arXiv 2503.02616. Weight
and bias of the norms are adapted. The t-th batch of a stream of T, with joint logits z and those of each modality alone, z_m:

 1. Smoothing. F is each sample's features, the mean over the tokens of every modality before they meet. In each dimension a band
    [Q1 - w (t/T) IQR, Q3 + w (t/T) IQR] around the batch's quartiles; a sample passes that is inside in a share 0.6 + 0.4 t/T of them.
 2. Assistance. Of these, those with H(z) <= gamma_m and u >= gamma_u, where u is the mean of H(z_m), a modality after the first with
    weight mu: sure together, and not already sure each alone. If none is left, there is no step.
 3. Sharing, while t < T/2. M = sum_m KL( mean of p and the other p_m' || p_m ), for two modalities KL((p_v + p)/2 || p_a) + the reverse.
 4. L = mean of exp(Ent0 - H) (H + lam M) - balance, with H's weight detached, balance as in READ: the entropy of the softmax of sum_i p_i.

One step of Adam, and the answer is that of another forward pass. A batch costs a pass of the model and of each modality alone, with a
graph (those of single modalities while they share), the encoders once more without one, a backward pass and a last forward pass.

Where the released code is different, what it does is an option, or left out with a reason:
- Its quartiles are min + range/4 and max - range/4 (`band: range`). Their band is everything from t/T = 1/3 on, and for a few hundred
  dimensions it passes all of a batch of 32 or none of a batch of 4. The default is true quartiles. At t = T no sample is inside in every
  one of many dimensions, so that `cap` bounds the share that is asked for.
- T is the length of the stream; a stream that is served has none. `horizon` is T in batches, t/T stays 1 after it, and a reset begins anew.
- gamma_m and Ent0 are ln(1000)/2 - 1 for any number of classes; the paper's 0.4 ln C is the default here.
- After the warm half it takes the mean weight times the mean entropy instead of the mean of the products (`weights: mean`).
A sample without some modality has no features and no answer of it: quartiles, shares, u and M are over those that it has. From a batch in
which a modality is absent for every sample nothing is learned, nor from a batch of one, of which the balance says nothing; t goes on.

Evidence: small real data
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.adapting import AdaptingStrategy, alone, entropy
from streamcl.options import Fraction, NonNegativeFloat, Optimizer, PositiveInt
from streamcl.stream import Batch

from ._bimodal import balance, comparable, here, several


class Sumi(AdaptingStrategy):
    """`optimizer` of the norms; `horizon` is T in batches.

    Smoothing: `band` (none passes every sample), `width` (w), `inside` (the share at t = 0) and its `cap`. Assistance: `gamma_m` and
    `ent0` (0.4 ln C), `gamma_u` (e/10; 0 asks nothing of single modalities), `mu`. Sharing: `lam` (0 leaves it out), for the share `warm`
    of the horizon. `weights`: of each sample, their mean after the warm part as released, or none. `balance` weighs the last term.
    """

    def __init__(
        self,
        *,
        optimizer: Optimizer = Optimizer(name="adam", lr=1e-4),  # noqa: B008
        answer: Literal["before", "after"] = "after",
        horizon: PositiveInt = 100,
        band: Literal["quartiles", "range", "none"] = "quartiles",
        width: NonNegativeFloat = 1.5,
        inside: Fraction = 0.6,
        cap: Fraction = 0.95,
        gamma_m: NonNegativeFloat | None = None,
        gamma_u: NonNegativeFloat = 0.27182818284590454,  # e/10
        mu: NonNegativeFloat = 1.0,
        lam: NonNegativeFloat = 5.0,
        warm: Fraction = 0.5,
        ent0: NonNegativeFloat | None = None,
        weights: Literal["each", "mean", "none"] = "each",
        balance: NonNegativeFloat = 1.0,
    ) -> None:
        super().__init__(optimizer=optimizer, answer=answer)
        self.horizon, self.band, self.width, self.inside, self.cap = horizon, band, width, inside, cap
        self.gamma_m, self.gamma_u, self.mu, self.lam, self.warm = gamma_m, gamma_u, mu, lam, warm
        self.ent0, self.weighting, self.balance = ent0, weights, balance
        self.batches = 0  # since the beginning, or the last reset

    @property
    def progress(self) -> float:
        """t/T"""
        return min(1.0, self.batches / self.horizon)

    @property
    def shares(self) -> bool:
        """Whether information is shared between modalities still."""
        return self.lam > 0 and self.progress < self.warm

    def update(self, batch: Batch) -> Tensor:
        names = several(batch, "sumi")
        if not comparable(batch, names):
            self.count("skipped")
            self.batches += 1
            return self.again(batch)
        there = here(batch, names)
        logits = self.model(batch)
        with self.statistics(gather=False), torch.set_grad_enabled(self.shares):
            smooth = self.smooth(batch, there)
            single = torch.stack([self.model(alone(batch, name)) for name in names], dim=1)  # (batch, modalities, classes)
        kept = smooth & self.assisted(logits.detach(), single.detach(), there)
        count = int(kept.sum())
        if count:
            self.step(self.loss_of(logits[kept], single[kept], there[kept]))
        else:
            self.count("skipped")
        self.count("smooth", int(smooth.sum()))
        self.count("kept", count)
        self.batches += 1
        return self.again(batch) if self.answer == "after" else logits.detach()

    @torch.no_grad()
    def smooth(self, batch: Batch, there: Tensor) -> Tensor:
        """The samples in the band  # (batch,) bool"""
        if self.band == "none":
            return there.any(dim=1)
        values, given, names = [], [], list(batch.inputs)
        for name, features in self.model.by_modality(batch).items():
            mean = features.flatten(1, -2).mean(dim=1) if features.dim() > 2 else features  # (batch, width)
            has = there[:, names.index(name)] if name in names else there.any(dim=1)
            values.append(mean.float())
            given.append(has[:, None].expand_as(mean))
        return inside(
            torch.cat(values, dim=1),
            torch.cat(given, dim=1),
            by=self.band,
            widening=self.width * self.progress,
            share=min(self.cap, self.inside + (1 - self.inside) * self.progress),
        )

    def assisted(self, logits: Tensor, single: Tensor, there: Tensor) -> Tensor:
        """The samples of which the model is sure and its modalities, each alone, are not  # (batch,) bool"""
        weight = torch.full_like(there, self.mu, dtype=logits.dtype)
        weight[:, 0] = 1
        weight = weight * there
        unsure = (weight * entropy(single.flatten(0, 1)).view_as(weight)).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-12)
        return (unsure >= self.gamma_u) & (entropy(logits) <= self._threshold(self.gamma_m, logits))

    def loss_of(self, logits: Tensor, single: Tensor, there: Tensor) -> Tensor:
        """The loss of the samples that are kept."""
        unsure = entropy(logits)
        weight = (self._threshold(self.ent0, logits) - unsure).detach().exp()
        if self.weighting == "none":
            weight = torch.ones_like(weight)
        elif self.weighting == "mean" and self.progress >= self.warm:
            weight = weight.mean().expand_as(weight)
        shared = self.lam * sharing(logits, single, there) if self.shares else 0.0
        return (weight * (unsure + shared)).mean() - self.balance * balance(logits.softmax(dim=1))

    def own_state(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def own_restore(self, state: Mapping[str, Any]) -> None:
        self.batches = int(state["batches"])

    @staticmethod
    def _threshold(value: float | None, logits: Tensor) -> float:
        return 0.4 * math.log(logits.shape[1]) if value is None else value


def inside(values: Tensor, given: Tensor, *, by: Literal["quartiles", "range"], widening: float, share: float) -> Tensor:
    """The rows that lie within the columns' bands in at least a `share` of the columns that are `given` of them  # (batch,) bool"""
    blank = values.masked_fill(~given, math.nan)
    if by == "quartiles":
        low, high = blank.nanquantile(torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device), dim=0)
    else:
        least, most = values.masked_fill(~given, math.inf).amin(dim=0), values.masked_fill(~given, -math.inf).amax(dim=0)
        low, high = least + 0.25 * (most - least), least + 0.75 * (most - least)
    margin = widening * (high - low)
    within = (blank >= low - margin) & (blank <= high + margin)  # nothing is within where it is not given
    columns = given.sum(dim=1)
    return (within.sum(dim=1) >= share * columns) & (columns > 0)


def sharing(logits: Tensor, single: Tensor, there: Tensor) -> Tensor:
    """For each sample the sum over its modalities of KL(mean of the joint answer and the others' || its own)  # (batch,)"""
    p, alone_log = logits.softmax(dim=1)[:, None], single.log_softmax(dim=2)
    each = alone_log.exp() * there[:, :, None]
    others = (p + each.sum(dim=1, keepdim=True) - each) / (1 + (there.sum(dim=1, keepdim=True) - there.long()))[:, :, None]
    log = others.clamp(min=torch.finfo(others.dtype).tiny).log()
    divergence = (others * (log - alone_log)).sum(dim=2)  # (batch, modalities)
    return (divergence * there).sum(dim=1)
