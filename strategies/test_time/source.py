"""The model as it was trained, served as it is: what every method of test-time adaptation is compared with.

It changes nothing and keeps nothing; batch normalisation uses the statistics of the training.

Evidence: small real data
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from streamcl.adapting import AdaptingStrategy
from streamcl.stream import Batch


class Source(AdaptingStrategy):
    """No options."""

    targets: ClassVar[tuple[str, ...]] = ()
    batch_statistics: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def update(self, batch: Batch) -> Tensor:
        return self.forward(batch)
