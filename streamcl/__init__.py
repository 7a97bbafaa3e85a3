"""streamcl: a continual-learning streaming engine.

`run` a scenario, `load` what a run has learned, or build an `Engine` from objects. Everything is imported when it is first
used, so that `streamcl list` starts without torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "AdaptingStrategy": "streamcl.adapting",
    "Batch": "streamcl.stream",
    "Engine": "streamcl.engine",
    "GradientStrategy": "streamcl.strategy",
    "Guard": "streamcl.guard",
    "OnlineLoop": "streamcl.online_loop",
    "Prediction": "streamcl.stream",
    "Scenario": "streamcl.stream",
    "Strategy": "streamcl.strategy",
    "StreamInfo": "streamcl.stream",
    "Task": "streamcl.stream",
    "load": "streamcl.running",
    "online": "streamcl.deploying",
    "run": "streamcl.running",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'streamcl' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
