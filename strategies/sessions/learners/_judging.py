"""Asking rewards: what one says of each answer, checked, and what goes wrong in it under its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamcl.errors import PluginError, StreamclError
from streamcl.strategy import plugin_name
from streamcl.stream import Batch, Column, take
from streamcl.verifier import Verifier


def judged(verifier: Verifier, name: str, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
    """What a reward says of each answer, NaN where it says nothing  # (N,)"""
    try:
        found = verifier(answers, rows)
    except StreamclError as error:
        error.args = (f"the reward {name}: {error}",)
        raise
    except Exception as error:
        raise PluginError(f"the reward {name} failed: {type(error).__name__}: {error}") from error
    found = torch.as_tensor([torch.nan if value is None else value for value in found] if isinstance(found, list) else found)
    if found.shape != (len(answers),):
        raise PluginError(f"the reward {name} gave values of shape {tuple(found.shape)} for {len(answers)} answers: one for each is needed")
    return found.float()


def names_of(rewards: Sequence[Verifier]) -> list[str]:
    names: list[str] = []
    for verifier in rewards:
        name = plugin_name(verifier)
        names.append(name if name not in names else f"{name} {len(names) + 1}")
    return names


def repeated(batch: Batch, times: int) -> dict[str, Column]:
    """The columns of a batch's rows, each row so many times, and what was asked (`question`)."""
    places = torch.arange(len(batch)).repeat_interleave(times)
    asked = next((values for values in batch.inputs.values() if isinstance(values, list)), None)
    columns = {**({} if asked is None else {"question": asked}), **batch.extra}
    return {name: take(column, places) for name, column in columns.items()}
