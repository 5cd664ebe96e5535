"""Times a private training step against the compiled non-private one on the CPU.

    make bench-cpu       (or: python -m benchmarks.cpu --help)

A step is forward, backward, AdamW and zero_grad. Rows are written as JSON, one for each case and contender.
"""

import argparse
import copy
import datetime
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from rich.console import Console
from rich.table import Table
from torch import Tensor

import flashnorm_compile
from benchmarks.cases import CASES, Case
from benchmarks.gate import TOLERANCE, GateError, clipped_mean, gradient_error, rounding_error
from benchmarks.timing import Step, Times, interleave, peak_tensor_bytes

SUITE = "cpu"
RESULTS = Path(__file__).parent / "results" / SUITE


@dataclass(frozen=True)
class Row:
    """One contender in one case. `ratio` is its median step time over the compiled non-private one's."""

    suite: str
    case: str
    description: str
    contender: str
    dtype: str
    step: str
    median_ms: float
    low_quartile_ms: float
    high_quartile_ms: float
    repeats: int
    ratio: float
    target: float | None
    gradient_error: float | None
    peak_bytes: int
    compile_s: float
    device: str
    threads: int
    versions: dict[str, str]
    date: str


@dataclass
class Contender:
    """A compiled model with its optimizer."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    backend: str | None
    options: dict[str, Any] | None = None
    forward_backward_only: bool = False
    compile_s: float = 0.0

    def __post_init__(self) -> None:
        self.call: Callable[..., Tensor] = self.model
        if self.backend is not None:
            self.call = torch.compile(self.model, backend=self.backend, options=self.options, dynamic=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        start = time.perf_counter()
        self.backward()
        self.compile_s = time.perf_counter() - start
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self) -> None:
        self.call(*self.inputs).backward()

    def step(self) -> None:
        self.backward()
        if not self.forward_backward_only:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def run_case(case: Case, arguments: argparse.Namespace) -> list[Row]:
    """Compiles, checks the private gradients, times. Raises GateError where they are wrong."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = case.build()
    options: dict[str, Any] = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, **arguments.options}
    only = arguments.forward_backward_only
    private = Contender(copy.deepcopy(model), inputs, "flashnorm", options, forward_backward_only=only)
    plain = Contender(copy.deepcopy(model), inputs, "inductor", forward_backward_only=only)
    error = _pass_gate(private, plain, case)
    contenders = {"flashnorm": private, "inductor": plain}
    if arguments.eager:
        contenders["eager"] = Contender(model, inputs, None, forward_backward_only=only)
    steps: dict[str, Step] = {name: contender.step for name, contender in contenders.items()}
    times = interleave(steps, arguments.repeats, at_least_s=arguments.seconds)
    return [_row(case, name, contender, times, error if name == "flashnorm" else None) for name, contender in contenders.items()]


def _pass_gate(private: Contender, plain: Contender, case: Case) -> float:
    """Compares one noiseless gradient with the loop over samples; leaves clipping norm and noise as they were.

    Allowed is the tolerance, or twice the error that the compiled non-private step has in float32 (a ReLU that rounding
    switches moves both).
    """
    plain.backward()
    allowed = max(TOLERANCE, 2 * rounding_error(plain.model, plain.inputs))
    plain.optimizer.zero_grad(set_to_none=True)
    reference, max_grad_norm = clipped_mean(private.model, private.inputs)
    state = flashnorm_compile.privacy(private.model)
    before = state.max_grad_norm, state.noise_multiplier
    state.max_grad_norm, state.noise_multiplier = max_grad_norm, 0.0
    private.backward()
    error = gradient_error(private.model, reference)
    state.max_grad_norm, state.noise_multiplier = before
    private.optimizer.zero_grad(set_to_none=True)
    if not error <= allowed:
        raise GateError(f"{case.name}: relative error {error:.1e} of the private gradient, allowed {allowed:.0e}")
    return error


def _row(case: Case, name: str, contender: Contender, times: dict[str, Times], error: float | None) -> Row:
    return Row(
        suite=SUITE,
        case=case.name,
        description=case.description,
        contender=name,
        dtype="float32",
        step="forward, backward" if contender.forward_backward_only else "forward, backward, AdamW",
        median_ms=times[name].median_ms,
        low_quartile_ms=times[name].low_ms,
        high_quartile_ms=times[name].high_ms,
        repeats=times[name].repeats,
        ratio=times[name].median_ms / times["inductor"].median_ms,
        target=case.target if name == "flashnorm" else None,
        gradient_error=error,
        peak_bytes=peak_tensor_bytes(contender.step),
        compile_s=contender.compile_s,
        device=_processor(),
        threads=torch.get_num_threads(),
        versions={package: importlib.metadata.version(package) for package in ("flashnorm_compile", "torch")}
        | {"python": platform.python_version()},
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    )


def _processor() -> str:
    """The processor's model name, from the kernel where it tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"{rows[0].step}; {rows[0].device}, {rows[0].threads} threads, {rows[0].date}")
    for column in ("case", "contender", "ms (quartiles)", "ratio", "target", "peak MB"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    for row in rows:
        missed = row.target is not None and row.ratio > row.target
        table.add_row(
            row.case,
            row.contender,
            f"{row.median_ms:.1f} ({row.low_quartile_ms:.1f}-{row.high_quartile_ms:.1f})",
            f"{'[red]' if missed else ''}{row.ratio:.2f}",
            "" if row.target is None else f"{row.target:.2f}",
            f"{row.peak_bytes / 1e6:.0f}",
        )
    return table


def _write(rows: list[Row], folder: Path) -> Path:
    """Adds rows to the day's file; a row of the same case, contender and step replaces the older one."""
    path = folder / f"{rows[0].date}.json"
    older = json.loads(path.read_text()) if path.exists() else []
    kept = {(row["case"], row["contender"], row["step"]): row for row in [*older, *map(asdict, rows)]}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(kept.values()), indent=2) + "\n")
    return path


def _parse_arguments() -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"any of {', '.join(names)} (default: all)")
    parser.add_argument("--repeats", type=int, default=20, help="least number of timed steps (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="least time spent on a case (%(default)s)")
    parser.add_argument("--forward-backward-only", action="store_true", help="leave the optimizer out of the step")
    parser.add_argument("--eager", action="store_true", help="time the non-private eager step too")
    parser.add_argument("--options", type=json.loads, default={}, help="further options of the backend, as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (%(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(names):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; known are {', '.join(names)}")
    if arguments.repeats < 2:
        parser.error("--repeats: at least 2 are needed for quartiles")
    return arguments


def main() -> int:
    arguments = _parse_arguments()
    console = Console()
    rows: list[Row] = []
    failures = 0
    for case in CASES:
        if arguments.cases and case.name not in arguments.cases:
            continue
        console.print(f"{case.name}: {case.description}")
        try:
            case_rows = run_case(case, arguments)
        except (GateError, ValueError) as error:
            failures += 1
            console.print(f"[red]{case.name}: {error}")
            continue
        private = case_rows[0]
        console.print(f"  gradient error {private.gradient_error:.0e}, compiled in {private.compile_s:.0f} s")
        rows += case_rows
    if rows:
        console.print(_table(rows))
        console.print(f"Rows: {_write(rows, arguments.out)}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
