"""Trains a byte-level GPT with DP-SGD on Python's own standard library, beside the same model without privacy.

    make demo            (or: python -m examples.demo --help)

One record is one function or class. Both models start from the same weights, see the same batches and use the same
optimizer. Their steps alternate, so that the ratio of their step times is measured under the same conditions.
"""

import argparse
import copy
import os
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from examples.byte_gpt import ByteGPT
from examples.loss_plot import save_loss_plot
from examples.stdlib_records import Records, load_records
from flashnorm_compile import explain

WINDOW = 96
WARM_UP_STEPS = 5
STEPS_BETWEEN_EVALUATIONS = 5
HELD_OUT_RECORDS = 128


@dataclass
class Run:
    """One model in training, and what was seen of it. Losses are in nats per byte, times in seconds."""

    label: str
    model: ByteGPT
    backend: str
    options: dict[str, Any] | None
    train_losses: list[float] = field(default_factory=list)
    held_out_steps: list[int] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)
    step_times_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.compiled: Callable[[Tensor], Tensor] = torch.compile(
            self.model, backend=self.backend, options=self.options, dynamic=False
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def compile(self, records_bt1: Tensor) -> float:
        """Compiles forward and backward; the gradient is thrown away. Returns the seconds it took."""
        start = time.perf_counter()
        self.compiled(records_bt1).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def step(self, records_bt1: Tensor, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        start = time.perf_counter()
        loss = self.compiled(records_bt1)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_times_s.append(time.perf_counter() - start)
        self.train_losses.append(loss.item())

    @torch.no_grad()
    def evaluate(self, held_out: Tensor) -> None:
        self.held_out_steps.append(len(self.train_losses))
        self.held_out_losses.append(self.model(held_out).item())


def main() -> None:
    arguments = _parse_arguments()
    console = Console()
    torch.manual_seed(0)
    records = load_records(WINDOW + 1)
    runs = _build_runs(arguments, console)
    private, baseline = runs
    console.print(
        f"{len(records.train):,} training and {len(records.held_out):,} held-out records (functions and classes) from "
        f"{records.files} files of the standard library; "
        f"{sum(p.numel() for p in private.model.parameters()):,} parameters.\n"
        f"DP-SGD: batch {arguments.batch_size}, max_grad_norm {arguments.max_grad_norm}, "
        f"noise_multiplier {arguments.noise_multiplier}."
    )
    for run in runs:
        with console.status(f"Compiling the {run.label} step"):
            seconds = run.compile(records.train[: arguments.batch_size])
        console.print(f"Compiled the {run.label} step in {seconds:.0f} s (backend {run.backend}).")
    train(runs, records, arguments, console)

    console.print(explain(private.model, records.train[: arguments.batch_size], options=private.options))
    console.print(_summary(private, baseline))
    picture = save_loss_plot(arguments.output / "losses.png", runs, f"noise multiplier {arguments.noise_multiplier}")
    console.print(f"Loss curves: {picture}")
    console.print(
        "No epsilon is claimed: this run keeps no privacy account. The losses above, and the curves, are computed "
        "from the data without noise; they are not private."
    )


def train(runs: list[Run], records: Records, arguments: argparse.Namespace, console: Console) -> None:
    """Steps all runs in turn until the steps or the minutes are used up, whichever comes first."""
    held_out = records.held_out[torch.randperm(len(records.held_out))[:HELD_OUT_RECORDS]]
    batches = _batches(records.train, arguments.batch_size)
    for run in runs:
        run.evaluate(held_out)
    start = time.perf_counter()
    with _progress(console) as progress:
        task = progress.add_task("", total=arguments.steps, losses=_losses(runs))
        for step in range(1, arguments.steps + 1):
            elapsed = (time.perf_counter() - start) / (60 * arguments.minutes)
            done = max((step - 1) / arguments.steps, elapsed)
            batch = next(batches)
            for run in runs if step % 2 else reversed(runs):
                run.step(batch, arguments.learning_rate * min(1.0, step / WARM_UP_STEPS) * max(0.1, 1.0 - done))
            last = step == arguments.steps or elapsed >= 1.0
            if last or step % STEPS_BETWEEN_EVALUATIONS == 0:
                for run in runs:
                    run.evaluate(held_out)
            progress.update(task, completed=step, losses=_losses(runs))
            if last:
                break


def _batches(train: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches of one size, drawn without replacement, reshuffled when fewer than a batch is left."""
    while True:
        order = torch.randperm(len(train))
        for indices in order.split(batch_size):
            if len(indices) == batch_size:
                yield train[indices]


def _build_runs(arguments: argparse.Namespace, console: Console) -> list[Run]:
    private_backend, baseline_backend = "flashnorm", "inductor"
    if not _can_build_cpp():
        private_backend, baseline_backend = "flashnorm_eager", "eager"
        console.print(
            "[yellow]No C++ compiler with Python's headers was found, so nothing is compiled: the gradients are the "
            "same, the step times are not those of compiled code. On Debian: apt install g++ python3-dev."
        )
    model = ByteGPT(WINDOW)
    options: dict[str, Any] = {
        "max_grad_norm": arguments.max_grad_norm,
        "noise_multiplier": arguments.noise_multiplier,
    }
    return [
        Run("private", model, private_backend, options),
        Run("non-private", copy.deepcopy(model), baseline_backend, None),
    ]


def _can_build_cpp() -> bool:
    """Whether Inductor can build its CPU kernels here."""
    compilers = [os.environ.get("CXX", "g++"), "g++", "clang++"]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.exists() and any(shutil.which(compiler) for compiler in compilers)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("Step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=12),
        TimeElapsedColumn(),
        TextColumn("held-out: {task.fields[losses]}"),
        console=console,
    )


def _losses(runs: list[Run]) -> str:
    return ", ".join(f"{run.label} {run.held_out_losses[-1]:.2f}" for run in runs)


def _summary(private: Run, baseline: Run) -> Table:
    table = Table(title="Cost of privacy (losses in nats per byte)", title_justify="left")
    for column in ("run", "held-out loss", "training loss", "step (quartiles), ms", "ratio"):
        table.add_column(column, justify="left" if column == "run" else "right")
    reference = statistics.median(baseline.step_times_s)
    for run in (private, baseline):
        low, median, high = statistics.quantiles(run.step_times_s, n=4)
        table.add_row(
            run.label,
            f"{run.held_out_losses[0]:.2f} -> {run.held_out_losses[-1]:.2f}",
            f"{run.train_losses[0]:.2f} -> {run.train_losses[-1]:.2f}",
            f"{1e3 * median:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})",
            f"{median / reference:.2f}",
        )
    return table


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=120, help="steps of each run (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=2.75, help="stop training after this time (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="records in a batch (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of AdamW, at its peak (%(default)s)")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="clipping norm C (%(default)s)")
    parser.add_argument("--noise-multiplier", type=float, default=0.7, help="noise s, in units of C (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: at least 2 are needed for a median step time")
    return arguments


if __name__ == "__main__":
    main()
