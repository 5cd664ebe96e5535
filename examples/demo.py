"""Trains a byte-level GPT with DP-SGD on Python's own standard library, beside the same model without privacy.

    make demo            (or: python -m examples.demo --help)

One record is one function or class. Both models start from the same weights, see the same batches and use the same
optimizer. Their steps alternate, so that the ratio of their step times is measured under the same conditions. Batches are
Poisson draws, so the progress line can show the epsilon that was spent.
"""

import argparse
import copy
import os
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable
from contextlib import nullcontext
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
from examples.privacy_log import ScalarLog, epsilon_text, statement, tensorboard_folder
from examples.stdlib_records import Records, load_records
from flashnorm_compile import PrivacyState, explain, privacy, private_dataloader

WINDOW = 96
WARM_UP_STEPS = 5
STEPS_BETWEEN_EVALUATIONS = 5
HELD_OUT_RECORDS = 128
FILL = 0.8
"""Expected share of a batch that is drawn; the rest is padding, so that few draws need a second batch."""


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
        """Compiles forward and backward; the gradient is thrown away, unnoised. Returns the seconds it took."""
        start = time.perf_counter()
        with nullcontext() if self.options is None else privacy(self.model).accumulate():
            self.compiled(records_bt1).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def step(self, records_bt1: Tensor, learning_rate: float, last_of_draw: bool) -> None:
        """One pass over a batch, and the optimizer's step if it was the last of its draw."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        start = time.perf_counter()
        loss = self.compiled(records_bt1)
        loss.backward()
        if not last_of_draw:
            return
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_times_s.append(time.perf_counter() - start)
        drawn = int(records_bt1.any(1).sum())  # padding counts in the mean with loss 0
        self.train_losses.append(loss.item() * len(records_bt1) / max(drawn, 1))

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
        f"DP-SGD: {FILL * arguments.batch_size:.0f} records expected in a batch, max_grad_norm {arguments.max_grad_norm}, "
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
    console.print(statement(privacy(private.model)), highlight=False)
    console.print("The losses above, and the curves, are computed from the data without noise; they are not private.")


def train(runs: list[Run], records: Records, arguments: argparse.Namespace, console: Console) -> None:
    """Steps all runs in turn until the steps or the minutes are used up, whichever comes first."""
    held_out = records.held_out[torch.randperm(len(records.held_out))[:HELD_OUT_RECORDS]]
    state = privacy(runs[0].model)
    loader = private_dataloader(
        records.train,  # type: ignore[arg-type]  # a tensor has a length and an index
        state,
        expected_batch_size=FILL * arguments.batch_size,
        physical_batch_size=arguments.batch_size,
        steps=arguments.steps,
        padding_sample=torch.zeros_like(records.train[0]),  # no bytes, so no loss and no gradient
        mask_name=None,
    )
    log = ScalarLog(arguments.tensorboard)
    for run in runs:
        run.evaluate(held_out)
    start = time.perf_counter()
    with _progress(console) as progress:
        task = progress.add_task("", total=arguments.steps, losses=_losses(runs), epsilon=epsilon_text(state))
        step = 1
        for batch in loader:
            elapsed = (time.perf_counter() - start) / (60 * arguments.minutes)
            done = max((step - 1) / arguments.steps, elapsed)
            learning_rate = arguments.learning_rate * min(1.0, step / WARM_UP_STEPS) * max(0.1, 1.0 - done)
            for run in runs if step % 2 else reversed(runs):
                run.step(batch, learning_rate, loader.batch_complete)
            if not loader.batch_complete:
                continue
            last = step == arguments.steps or elapsed >= 1.0
            if last or step % STEPS_BETWEEN_EVALUATIONS == 0:
                for run in runs:
                    run.evaluate(held_out)
                progress.update(task, losses=_losses(runs), epsilon=epsilon_text(state))
                _log(log, runs, state)
            progress.update(task, completed=step)
            if last:
                break
            step += 1
    log.close()


def _log(log: ScalarLog, runs: list[Run], state: PrivacyState) -> None:
    for run in runs:
        scalars = {f"{run.label}/training_loss": run.train_losses[-1], f"{run.label}/held_out_loss": run.held_out_losses[-1]}
        log.add(scalars, len(run.train_losses))
    log.add_epsilon(state)


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
        TextColumn("{task.fields[epsilon]}"),
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
    parser.add_argument("--batch-size", type=int, default=128, help="records that a batch has room for (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of AdamW, at its peak (%(default)s)")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="clipping norm C (%(default)s)")
    parser.add_argument("--noise-multiplier", type=float, default=0.7, help="noise s, in units of C (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
    parser.add_argument(
        "--tensorboard", type=tensorboard_folder, metavar="DIR", help="also write losses and epsilon for TensorBoard"
    )
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: at least 2 are needed for a median step time")
    return arguments


if __name__ == "__main__":
    main()
