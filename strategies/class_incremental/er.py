"""Experience replay: every batch of new samples is joined by as many drawn from a reservoir of everything seen so far.

One cross-entropy over all classes seen, on the concatenation in a single forward pass, so that batch normalisation sees the
mixture; replayed samples are stored raw and augmented anew. Defaults of Mammoth's ER (batch 32 + 32, SGD at 0.1, 50 epochs).
Each sample is offered to the reservoir once, in its task's first epoch, so that every sample of the stream is held with the
same probability (Mammoth offers it again in each epoch).

Chaudhry et al., On Tiny Episodic Memories in Continual Learning, 2019.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any

from streamcl.options import NonNegativeInt, Optimizer, PositiveInt
from streamcl.strategy import GradientStrategy


class ER(GradientStrategy):
    selection = "reservoir"
    processes = True

    def __init__(
        self,
        *,
        epochs: PositiveInt = 50,
        batch: PositiveInt = 32,
        replay: NonNegativeInt = 32,
        optimizer: Optimizer = Optimizer(lr=0.1),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, replay=replay, optimizer=optimizer, **options)
