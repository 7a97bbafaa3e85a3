"""Curves for TensorBoard, in the run's `tensorboard/`."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

from streamcl.events import Event, Sink
from streamcl.options import NonNegativeFloat


class Tensorboard(Sink):
    """Writes what is logged while training (`train/...`) over steps, and the scores after each task (`test/...`) over tasks.

    A score over tasks stands at the number of tasks learned; `any_time` at the number of samples, and so does what is served of a
    test-time stream (`served/...`) and what the guard says (a text). What a language model says in a session is a text beside its picture
    (`samples`). `progress` events are written at most every `progress_every` seconds.
    """

    def __init__(self, *, progress_every: NonNegativeFloat = 1.0) -> None:
        self.progress_every = progress_every
        self.writer: Any = None
        self.next_progress = -math.inf
        self.step = 0

    def open(self, directory: Path) -> None:
        super().open(directory)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def write(self, event: Event) -> None:
        fields = event.fields
        match event.kind:
            case "progress" if event.time >= self.next_progress:
                self.next_progress = event.time + self.progress_every
                self.step = fields.get("global_step", self.step + 1)
                named = {"task", "pass", "epoch", "epochs", "step", "steps", "global_step"}
                self._numbers("train", {name: value for name, value in fields.items() if name not in named}, self.step)
            case "scored":
                row = fields["row"]
                scores = {f"{fields['metric']}/seen": fields["per_task"]} | {
                    f"{fields['metric']}/task {j}": v for j, v in enumerate(row, 1)
                }
                self._numbers(fields["part"], scores, fields["task"] + 1)
            case "any_time":
                self._numbers("test", {"any_time": fields["accuracy"]}, fields["samples"])
            case "served":
                figures = {name: value for name, value in fields.items() if name not in ("task", "name", "samples", "counts")}
                self._numbers("served", figures | fields["counts"], fields["samples"])
            case "guard":
                self.writer.add_text("guard", f"{fields['what']}: {fields['reason']}", fields["samples"])
            case "sample":
                self._sample(fields)
            case "figures":
                self._numbers("test", {name: value for name, value in fields.items() if name != "task"}, fields["task"] + 1)
            case "task_finished":
                self._numbers("run", {"memory_bytes": fields["memory_bytes"], "parameters": fields["parameters"]}, fields["task"] + 1)

    def _sample(self, fields: dict[str, Any]) -> None:
        rewards = [f"{name} {value:.3g}" for name, value in fields["rewards"].items() if value is not None]
        told = [*rewards, f"{fields['length']} tokens"]
        quoted = [f"    {line}" for name in ("question", "answer") for line in [*fields[name].splitlines(), ""]]  # as it was said
        self.writer.add_text("samples", "\n".join([*quoted, ", ".join(told)]), fields["global_step"])
        if "picture" in fields:
            import numpy as np
            from PIL import Image

            picture = Image.open(io.BytesIO(base64.b64decode(fields["picture"])))
            self.writer.add_image("samples", np.asarray(picture), fields["global_step"], dataformats="HWC")

    def _numbers(self, group: str, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
