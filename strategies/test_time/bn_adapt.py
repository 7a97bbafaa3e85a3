"""BN-adapt: batch normalisation by the batch that is served, or by a mixture of it and the source. No gradient, no label.

Schneider et al., NeurIPS 2020, arXiv 2006.16971 (and Nado et al., 2020). With the running statistics m_s, v_s of training, and mean m_b and
biased variance v_b of the batch, each layer normalises by

    m = (1 - a) m_s + a m_b,    v = (1 - a) v_s + a v_b

    weight      a is this number: 1 (what is done where nothing is given) is BN-1 of the literature, 0 the source exactly, and 0.1 is
                what is used with batches of one
    prior       a = n / (n + prior) for a layer that sees n samples: the source counts as much as `prior` samples do, which is Schneider's
                form. With batches of one and prior 16 it is the 1 / 17 of MEMO
    momentum    the statistics are a running mean over the batches served: it begins as the source's and gives the newest batch this
                weight. A first forward pass, normalised by the batch, takes it in, and a second one answers: twice the cost

Weight and bias of the layers stay the source's. The released alpha form has the unbiased variance of the batch; here it is the biased one,
so that weight 1 is BN-1. The running mean takes the unbiased one in, as torch's own layers do. A model without batch normalisation would
gain nothing, and is refused. Of a batch of one, weight 1 has no more to go by than the places of an image.

In the loop's shadow mode statistics are promoted: a running mean of those that the layers normalised by.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from streamcl.adapting import AdaptingStrategy
from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.nn.norms import Gathered, by_mixture
from streamcl.options import Fraction, NonNegativeFloat
from streamcl.stream import Batch, StreamInfo


class BnAdapt(AdaptingStrategy):
    """One of `weight`, `prior` and `momentum`; with none of them it is `weight: 1`."""

    def __init__(self, *, weight: Fraction | None = None, prior: NonNegativeFloat | None = None, momentum: Fraction | None = None) -> None:
        super().__init__()
        given = [name for name, value in (("weight", weight), ("prior", prior), ("momentum", momentum)) if value is not None]
        if len(given) > 1:
            raise ConfigError(f"bn_adapt: {' and '.join(given)} are different ways to weigh the batch against the source: give one of them")
        self.weight, self.prior, self.momentum = 1.0 if weight is None else weight, prior, momentum

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def can_adapt(self) -> bool:
        return bool(self.layers)

    def nothing_to_adapt(self) -> str:
        return (
            "bn_adapt changes the statistics by which batch normalisation normalises: it looked for BatchNorm layers with running "
            "statistics, and this model has none (LayerNorm and GroupNorm keep none; tent adapts their weight and bias)"
        )

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if self.momentum is not None:
            self.gathered = Gathered(self.layers, self.momentum)

    def share(self, samples: int) -> float:
        """The weight a of a batch in a layer that sees so many samples."""
        return self.weight if self.prior is None else samples / (samples + self.prior)

    def update(self, batch: Batch) -> Tensor:
        if self.momentum is not None and self.gathered is not None:
            with torch.no_grad(), self.gathered.gathering():
                self.model(batch)
        if self.gathered is not None:
            self.count("updates")
        return self.forward(batch)

    @contextmanager
    def statistics(self, gather: bool = True) -> Iterator[None]:
        adapting = gather and torch.is_grad_enabled()
        context: AbstractContextManager[None] = nullcontext()
        if self.momentum is not None and self.gathered is not None:
            context = self.gathered.answering()
        elif self.weight > 0:
            context = by_mixture(self.layers, self.share, self.gathered if adapting else None)
        with context:
            yield

    def weights(self) -> dict[str, Tensor]:
        return {} if self.gathered is None else self.gathered.values
