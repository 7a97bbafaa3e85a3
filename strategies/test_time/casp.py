"""CASP: for values, which have no entropy. Become indifferent to the loss of a modality, then learn one's own answers where they stayed.

Guo et al., Bridging the Gap for Test-Time Multimodal Sentiment Analysis, AAAI 2025, arXiv 2412.07121. It is defined on a set of unlabelled
samples, here a `window` of what was served, and adapts the norms inside of the layers.

 1. Contrast, E1 epochs with dropout on: of every minibatch of B one modality, drawn anew for all of it, is taken away. With h_i and h_j the
    representations of a sample with and without it, NT-Xent over the 2B views: mean of -log( exp(cos(h_i, h_j)/tau) / sum_{k != i}
    exp(cos(h_i, h_k)/tau) ).
 2. The window is predicted before this stage and after every few epochs of it: Y_0 .. Y_K. A sample's instability is s = mean_j
    |Y_{j+1} - Y_j|, its label the mean of its Y_j; kept are those with s up to a quantile of the window.
 3. E2 epochs of |prediction - label| on the samples kept, from where the first stage ended.

Each stage has an optimiser of its own, as the released scripts have, and a learning rate that falls tenfold when the stage's own loss has
not fallen for `patience` epochs (released: the error on labelled validation samples, which nobody has here; so is their choice of the
best epoch, and here the last one counts). Adapted weights serve once both stages are through; where one of them cannot go on, the weights
are those of before. Where the released code is different, what it does is an option: it keeps the samples with s *above* the 0.95
quantile, the least stable ones (`select: unstable`). The paper does not say its quantile; with `stable` the default leaves out the
worst twentieth. The dropout is the network's own: a network that has none gets views that differ by the modality alone. A sample keeps the
modality that is to go where it has no other.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim.lr_scheduler import ReduceLROnPlateau

from streamcl.adapting import AdaptingStrategy
from streamcl.errors import ConfigError
from streamcl.nn.norms import affine
from streamcl.options import Fraction, NonNegativeInt, Optimizer, PositiveFloat, PositiveInt
from streamcl.strategy import make_optimizer
from streamcl.stream import Batch

from ._bimodal import here, several

FEWEST = 2  # samples that can be contrasted with one another
CHUNK = 256  # samples that are predicted at a time


class Casp(AdaptingStrategy):
    """`window` samples at a time; `optimizer` and `clip` of both stages, in minibatches of `batch`.

    Contrast: `contrast_epochs` (E1; 0 leaves the stage out) at temperature `tau`. Snapshots after every `snapshots` epochs. Labels:
    `label_epochs` (E2; 0 leaves the stage out) on those that `select` keeps by `quantile` (all: every sample). `norms` that are
    adapted: those inside of layers, or all; a norm is inside if a number in its name says which layer it belongs to. `begin`: each
    window adapts on from the one before, or from the source.
    """

    targets: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(
        self,
        *,
        optimizer: Optimizer = Optimizer(name="adam", lr=1e-3),  # noqa: B008
        answer: Literal["before", "after"] = "before",
        window: PositiveInt = 512,
        batch: PositiveInt = 24,
        contrast_epochs: NonNegativeInt = 15,
        snapshots: PositiveInt = 3,
        tau: PositiveFloat = 0.5,
        label_epochs: NonNegativeInt = 5,
        select: Literal["stable", "unstable", "all"] = "stable",
        quantile: Fraction = 0.95,
        clip: PositiveFloat | None = 0.8,
        patience: PositiveInt | None = 10,
        norms: Literal["inside", "all"] = "inside",
        begin: Literal["last", "source"] = "last",
    ) -> None:
        super().__init__(optimizer=optimizer, answer=answer)
        self.window, self.batch, self.tau, self.clip, self.patience = window, batch, tau, clip, patience
        self.contrast_epochs, self.snapshots, self.label_epochs = contrast_epochs, snapshots, label_epochs
        self.select, self.quantile, self.norms, self.begin = select, quantile, norms, begin

    def parameters(self) -> dict[str, nn.Parameter]:
        found = affine(self.model)
        return {name: value for name, value in found.items() if self.norms == "all" or any(part.isdigit() for part in name.split("."))}

    def nothing_to_adapt(self) -> str:
        told = super().nothing_to_adapt().removesuffix(", and this model has none")
        if self.norms == "all":
            return f"{told}, and this model has none"
        return f"{told} inside of numbered layers, and this model has none: `norms: all` takes those outside of them as well"

    def update(self, batch: Batch) -> Tensor:
        several(batch, "casp")
        if len(batch) < FEWEST:
            self.count("skipped")
            return self.forward(batch)
        before = {name: value.detach().clone() for name, value in self.adapted.items()}
        try:
            served = self._predicted(batch)
            with self.statistics(gather=False):  # what follows lacks modalities, has dropout, or was seen already
                self._adapt_to(batch, served)
        except BaseException:
            self._be(before)
            raise
        return self.again(batch) if self.answer == "after" else served

    def _adapt_to(self, batch: Batch, first: Tensor) -> None:
        """Both stages on one window; `first` is what was predicted of it before them  # (window, values)"""
        if self.begin == "source":
            self._be(self.source)
            first = self._predicted(batch)
        told = [first]
        self._begin_stage()
        for epoch in range(1, self.contrast_epochs + 1):
            with dropping(self.model, int(torch.randint(2**62, (), generator=self.context.generator)), batch.ids.device):
                self._epoch(batch, self._contrast)
            if epoch % self.snapshots == 0:
                told.append(self._predicted(batch))
        self._begin_stage()
        answers = torch.stack(told)  # (K + 1, window, values)
        kept = selected(answers, self.select, self.quantile).nonzero().squeeze(1)
        chosen = batch[kept]
        chosen.extra["label"] = answers.mean(dim=0)[kept]
        self.count("kept", len(chosen))
        for _ in range(self.label_epochs):
            self._epoch(chosen, self._error)

    @torch.no_grad()
    def _be(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.adapted.items():
            value.copy_(values[name])
            value.grad = None

    def _begin_stage(self) -> None:
        self.optimizer = make_optimizer(self.adapted.values(), self.optimizer_settings)
        self._slower = None if self.patience is None else ReduceLROnPlateau(self.optimizer, factor=0.1, patience=self.patience)

    def _epoch(self, data: Batch, loss: Callable[[Batch], Tensor]) -> None:
        order = torch.randperm(len(data), generator=self.context.generator)
        parts = [part for part in order.split(self.batch) if len(part) > 1]
        total = torch.zeros((), device=data.ids.device)
        for part in parts:
            value = loss(data[part])
            self.step(value)
            total += value.detach()
        if self._slower is not None:
            self._slower.step(float(total) / max(1, len(parts)))

    def _contrast(self, batch: Batch) -> Tensor:
        names = list(batch.inputs)
        lost = names[int(torch.randint(len(names), (), generator=self.context.generator))]
        _, whole = self.model.both(batch)
        _, rest = self.model.both(without(batch, lost))
        loss = nt_xent(whole, rest, self.tau)
        if not loss.requires_grad:
            raise ConfigError(
                "casp contrasts the features that the answer is made from, and those that this model gives do not depend on what is "
                f"adapted, {', '.join(list(self.adapted)[:2])} ...: give the features that go into its last layer, or set norms: all"
            )
        return loss

    def _error(self, batch: Batch) -> Tensor:
        return (self.model(batch) - batch.extra["label"]).abs().mean()

    @torch.no_grad()
    def _predicted(self, batch: Batch) -> Tensor:
        return torch.cat([self.model(batch[start : start + CHUNK]) for start in range(0, len(batch), CHUNK)])


def selected(told: Tensor, select: str, quantile: float) -> Tensor:
    """Whose predictions hardly moved from one snapshot to the next  # (K + 1, samples, values) -> (samples,) bool"""
    if select == "all" or len(told) < 2:
        return torch.ones_like(told[0, :, 0], dtype=torch.bool)
    moved = told.diff(dim=0).abs().mean(dim=(0, 2))
    edge = moved.quantile(quantile)
    return moved > edge if select == "unstable" else moved <= edge


def nt_xent(one: Tensor, other: Tensor, tau: float) -> Tensor:
    """Each of the two views of a sample is to be nearest to the other of all views  # (batch, width) twice"""
    views = normalize(torch.cat([one, other]).float(), dim=1)
    likeness = (views @ views.T / tau).fill_diagonal_(float("-inf"))
    count = len(one)
    return cross_entropy(likeness, torch.arange(2 * count, device=one.device).roll(count))


def without(batch: Batch, modality: str) -> Batch:
    """The batch without one modality: zeros (or empty text) that are masked. A sample that has no other keeps it."""
    names = list(batch.inputs)
    there = here(batch, names)
    place = names.index(modality)
    stays = there[:, place] & (there.sum(dim=1) == 1)
    values = batch.inputs[modality]
    if isinstance(values, Tensor):
        left: Tensor | list = torch.where(stays.reshape(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))
    else:
        left = [value if kept else "" for value, kept in zip(values, stays.tolist(), strict=True)]
    return batch.replace(inputs={**batch.inputs, modality: left}, present={**(batch.present or {}), modality: stays})


@contextmanager
def dropping(model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """For a while, dropout is on, and nothing else of training; its random numbers are this seed's, and nobody else's are used up."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention)]
    was = [layer.training for layer in layers]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer, before in zip(layers, was, strict=True):
                layer.training = before
