"""What a training shows while it runs: epsilon in the progress line, and scalars for TensorBoard if they are wanted."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashnorm_compile import PrivacyState

DELTA = 1e-5


def live_epsilon(state: PrivacyState) -> float:
    """By the RDP accountant, which takes milliseconds: a little above what the PLD accountant gives at the end."""
    return state.epsilon(DELTA, accountant="rdp")


def epsilon_text(state: PrivacyState) -> str:
    """A bound on the epsilon spent so far, for a progress line; or what to install to see it."""
    try:
        return f"epsilon < {math.ceil(100 * live_epsilon(state)) / 100:.2f}"
    except ImportError:
        return "epsilon: pip install dp-accounting"


def statement(state: PrivacyState) -> str:
    """What was spent, for a report."""
    try:
        return str(state.spent(DELTA))
    except ImportError as error:
        return str(error)


def tensorboard_folder(text: str) -> Path:
    """The value of ``--tensorboard``, refused where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise argparse.ArgumentTypeError("TensorBoard is not installed. Run: pip install tensorboard")
    return Path(text)


class ScalarLog:
    """Writes scalars with PyTorch's usual writer; without a folder it does nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """One point for each name. Losses come from the data without noise: who sees the log sees them."""
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def add_epsilon(self, state: PrivacyState) -> None:
        """Epsilon after the releases so far, if dp-accounting is installed."""
        if self._writer is not None and importlib.util.find_spec("dp_accounting") is not None:
            self._writer.add_scalar("privacy/epsilon", live_epsilon(state), state.steps)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()
