"""Run by test_statistics in processes of their own: one private step."""

from __future__ import annotations

import torch
from models.algebra import Mlp


def released(backend: str, options: dict[str, object]) -> list[float]:
    """All gradients of one step, from the same model, batch and torch seed in every process."""
    torch.manual_seed(0)
    model, x = Mlp(width=64), torch.ones(4, 6)
    torch.compile(model, backend=backend, options=options)(x).square().sum().backward()
    return [value for p in model.parameters() if p.grad is not None for value in p.grad.flatten().tolist()]
