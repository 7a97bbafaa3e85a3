"""What the tests of the server share: a small run that is trained once, and a client of its application."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi.testclient import TestClient
from small_runs import small_run

from streamcl import running
from streamcl.serving import Settings, application

PREDICT, CHANGE = "a-token-for-asking", "a-token-for-changing"
ASK, ALTER = ({"Authorization": f"Bearer {token}"} for token in (PREDICT, CHANGE))
QUIET: list[str] = []  # what servers said


def digits_run(folder: Path, norm: str = "batch") -> Path:
    """A convnet on the digits, of one epoch or two."""
    running.run(
        small_run(
            "finetune",
            scenario={"name": "class_incremental", "data": "digits", "tasks": 1},
            model={"backbone": {"name": "convnet", "width": 8, "blocks": 2, "norm": norm}},
        ),
        out=folder,
    )
    return folder


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


@contextmanager
def served(run: Path, **settings: Any) -> Iterator[TestClient]:
    """A client of the run's application, from its start to its orderly end."""
    app, _ = application(run, Settings(**{"threads": 1, "tell": QUIET.append, **settings}))
    with TestClient(app, raise_server_exceptions=False) as client:
        client.service = app.state.server.service  # type: ignore[attr-defined]
        yield client


def digits(count: int, first: int = 0) -> torch.Tensor:
    """Images of the digits, as the stream has them."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images[first : first + count].astype(np.uint8))[:, None]


def as_json(images: torch.Tensor, **more: Any) -> dict[str, Any]:
    return {"inputs": {"image": images.tolist()}, **more}


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()
