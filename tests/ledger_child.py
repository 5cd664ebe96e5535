"""Run by test_ledger in processes that are killed: a training loop with a ledger that says what its optimizer applied."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from stand_in import Private, weights
from torch import Tensor, nn

from flashnorm_compile import privacy

X = torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]])


def stand_in() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model of one weight, and its loss, with the real engine, guard and state behind a stand-in for a compiled graph."""
    model = nn.ParameterList(weights(1))
    graph = Private(*model, noise_multiplier=1.0)
    return model, lambda: graph(X)


def compiled() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A linear layer under the real backend, and its loss."""
    model = nn.Linear(3, 2)
    options = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "loss_reduction": "sum"}
    loss = torch.compile(lambda x: model(x).square().sum(), backend="flashnorm_eager", options=options)
    return model, lambda: loss(X)


def train(make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]], ledger: Path, applied: Path) -> None:
    """Steps until it is killed. One byte goes to ``applied`` *before* each ``optimizer.step()``: the file can hold more than was
    applied, never less."""
    model, loss = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = privacy(model)
    state.record_to(ledger)
    file = os.open(applied, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        with state.accumulate():
            loss().backward()
        loss().backward()
        os.write(file, b".")
        optimizer.step()
        optimizer.zero_grad()
