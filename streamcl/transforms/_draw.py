"""Randomness for whole batches: one row of uniform numbers per sample."""

import torch
from torch import Tensor


def draw(batch: int, columns: int, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1), drawn on the CPU row by row: the same for any device and however a batch is split  # (batch, columns)"""
    return torch.rand(batch, columns, generator=generator)


def between(uniform: Tensor, low: float, high: float) -> Tensor:
    """Uniform numbers of [0, 1) moved to [low, high)."""
    return low + uniform * (high - low)
