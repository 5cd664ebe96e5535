"""The demo's picture: training and held-out loss of each run against the step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt

COLORS = ("tab:blue", "tab:orange")


class Curves(Protocol):
    """What the picture shows of a run; losses are in nats per byte."""

    label: str
    train_losses: list[float]
    held_out_steps: list[int]
    held_out_losses: list[float]


def save_loss_plot(path: Path, runs: Sequence[Curves], note: str) -> Path:
    """Writes a PNG, whose title carries `note`, and returns its path."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run, color in zip(runs, COLORS, strict=True):
        steps = range(1, len(run.train_losses) + 1)
        axes.plot(steps, run.train_losses, color=color, alpha=0.35, linewidth=1, label=f"{run.label}, training batch")
        axes.plot(
            run.held_out_steps,
            run.held_out_losses,
            color=color,
            linewidth=2,
            marker=".",
            label=f"{run.label}, held-out",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title(f"Byte-level GPT on the Python standard library, {note}")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
