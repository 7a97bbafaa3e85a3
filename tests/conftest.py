"""What the tests share: small runs, and where the real data lies when it is there."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

settings.register_profile("streamcl", deadline=None)  # a busy machine is no fault of an example
settings.load_profile("streamcl")
