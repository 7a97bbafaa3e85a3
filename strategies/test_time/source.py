"""The model as it was trained, served as it is: what every method of test-time adaptation is compared with.

It changes nothing and keeps nothing.

Evidence: small real data
"""

from __future__ import annotations

import torch

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.strategy import Strategy
from streamcl.stream import Batch, Prediction, StreamInfo, Task


class Source(Strategy):
    """No options."""

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if not info.test_time:
            raise ConfigError("source learns nothing: it serves a trained model on a test-time stream (scenario: test_time)")

    def learn(self, task: Task) -> None:
        """Nothing: a test-time stream is only served."""

    def adapt(self, batch: Batch) -> Prediction:
        with torch.no_grad(), self.model.evaluating():
            return self.predict(batch)
