"""Runs and reports benchmarks; see `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.case import Case, Suite, in_order
from benchmarks.contenders import BASELINE, CONTENDERS, EAGER, Contender
from benchmarks.hopper.rows import DryRow
from benchmarks.row import RESULTS, Row, read, write
from benchmarks.runner import DTYPES, Settings, be_quiet, run_case
from benchmarks.side_by_side import jobs_of, run_side_by_side
from benchmarks.suites import SUITES
from benchmarks.suites.vision import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
SOUNDNESS = "soundness"
# What `run all` runs, in this order: the suites that the papers are compared with come first.
EVERYTHING = ("linear", "gpt2", "llama", "vision", "layers", SOUNDNESS)
JUDGING_MINUTES = 3.0
"""Kept of a run's time for the soundness suite."""
DRY_RUN = "dry-run.json"


def main(arguments: list[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    return int(parsed.command(parsed))


def _run(options: argparse.Namespace) -> int:
    console = Console()
    be_quiet()
    start = time.monotonic()
    contenders = _contenders(options.contenders)
    names = EVERYTHING if "all" in options.suites else tuple(options.suites)
    suites = [SUITES[name] for name in names if name != SOUNDNESS]
    if options.dry_run:
        return _dry_run(suites, contenders, options, console)
    if options.device == "cuda" and not torch.cuda.is_available():
        console.print("--device cuda: this machine has no CUDA device; --dry-run generates the code without one")
        return 2
    folder = options.out or RESULTS / options.device / machine.today()
    end = start + 60 * options.minutes
    judging_s = 60 * JUDGING_MINUTES if SOUNDNESS in names and suites else 0.0
    failed = _measure(suites, contenders, options, folder, end - judging_s, console)
    if SOUNDNESS in names:
        _judge(contenders, options.device, folder, end, console)
    console.print(f"{time.monotonic() - start:.0f} s; rows in {folder}")
    return int(failed)


def _measure(
    suites: list[Suite],
    contenders: tuple[Contender, ...],
    options: argparse.Namespace,
    folder: Path,
    deadline: float,
    console: Console,
) -> bool:
    """Whether a baseline failed."""
    sizes = options.sizes or ("paper" if options.device == "cuda" else "small")
    plan = unmeasured_first(_planned(suites, sizes, options.cases), folder)
    settings = Settings(
        device=options.device,
        sizes=sizes,
        repeats=options.repeats,
        at_least_s=options.seconds,
        at_most_s=max(8.0, options.seconds),
        deadline=deadline,
    )
    failed = False
    title = ""

    def report(row: Row) -> None:
        nonlocal failed, title
        write([row], folder / f"{row.suite}.json")
        if title != (title := f"{row.suite}: {row.description}"):
            console.rule(title, align="left")
        console.print(_line(row), highlight=False, markup=False, soft_wrap=True)
        failed = failed or (row.error is not None and row.contender == BASELINE and not row.was_late)

    if options.jobs == 1:
        for suite, case in plan:
            run_case(suite.name, case, contenders, settings, report)
    else:
        names = [contender.name for contender in contenders]
        jobs = jobs_of([(suite.name, case) for suite, case in plan], names, options.device)
        run_side_by_side(jobs, settings, report, options.jobs or _processes(options.device))
    return failed


def unmeasured_first(plan: list[tuple[Suite, Case]], folder: Path) -> list[tuple[Suite, Case]]:
    """Cases of which a run that its time has ended left something out come before those that ``folder`` holds rows of."""
    names = dict.fromkeys(suite.name for suite, _ in plan)
    rows = [row for name in names for row in read(folder / f"{name}.json")]
    known = {(row.suite, row.case) for row in rows}
    late = {(row.suite, row.case) for row in rows if row.was_late}
    return sorted(plan, key=lambda one: (one[0].name, one[1].name) in known - late)


def _processes(device: str) -> int:
    """Cores for the compilers that each process starts, and memory of the GPU for its model."""
    cores = os.cpu_count() or 1
    return max(1, min(6, cores // 2)) if device == "cuda" else min(4, cores)


def _judge(contenders: tuple[Contender, ...], device: str, folder: Path, deadline: float, console: Console) -> None:
    """What is compiled is judged once: its algorithms and its eager twins are the same mathematics. Mirrors have no traps."""
    from benchmarks import soundness

    judged = [c for c in contenders if not (c.compiled or c.mirrors) or c.name in ("flashnorm", "flashnorm per-layer")]
    rows = []
    for row in soundness.run(judged, device, deadline=deadline):
        rows.append(row)
        soundness.write([row], folder / f"{SOUNDNESS}.json")
    console.print(soundness.markdown_table(rows), highlight=False, markup=False, soft_wrap=True)


def _max_batch(options: argparse.Namespace) -> int:
    from benchmarks import max_batch

    if not torch.cuda.is_available():
        print("max-batch: this machine has no CUDA device, whose memory could be filled")
        return 2
    be_quiet()
    path = (options.out or RESULTS / "cuda" / machine.today()) / max_batch.FILE_NAME
    for row in max_batch.search(options.architectures, _contenders(options.contenders), options.precision):
        max_batch.write([row], path)
        print(f"{row.architecture} {row.contender} {row.precision}: {row.error or row.batch}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks.report import report, update_readme

    if options.readme:
        changed = update_readme(ROOT / "README.md", RESULTS)
        print(f"README.md: {'brought up to date' if changed else 'is up to date'}")
        return 0
    if options.directory is None or not options.directory.is_dir():
        print(
            f"report: {options.directory or 'DIR'} is not a folder of results; give one, such as benchmarks/results/cpu/2026-11-24"
        )
        return 2
    print(report(options.directory, options.against))
    return 0


def _dry_run(suites: list[Suite], contenders: tuple[Contender, ...], options: argparse.Namespace, console: Console) -> int:
    from benchmarks.dry_run import dry_run, planned
    from benchmarks.dry_table import table
    from benchmarks.hopper import rows as dry_rows

    path = options.out / DRY_RUN if options.out else ROOT / DRY_RUN
    jobs = planned(suites, contenders, options.cases)
    rows = {row.key: row for row in dry_rows.read(path)} if options.resume else {}

    def report(row: DryRow) -> None:
        rows[row.key] = row
        dry_rows.write(rows.values(), path)
        text = f"FAILED {row.error}" if row.error else row.note or row.checked
        line = f"{row.suite} {row.case} {row.precision} {row.contender}: {text} ({row.seconds:.1f} s)"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    deadline = time.monotonic() + 60 * options.minutes
    found = dry_run(
        jobs, known=list(rows.values()), processes=options.jobs or os.cpu_count() or 1, deadline=deadline, report=report
    )
    wanted = sum(len(job.precisions) for job in jobs)
    wide = console if console.is_terminal else Console(width=150)
    wide.print(table(found, wanted))
    return int(len(found) < wanted or any(row.error for row in found))


def _planned(suites: list[Suite], sizes: str, only: list[str] | None) -> list[tuple[Suite, Case]]:
    """All cases to run, in their order."""
    found = in_order(suites, sizes)
    if only:
        known = {case.name for _, case in found}
        if unknown := set(only) - known:
            raise SystemExit(f"--cases: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
        found = [(suite, case) for suite, case in found if case.name in only]
    return found


def _contenders(names: list[str] | None) -> tuple[Contender, ...]:
    """The named ones, with the baseline that every ratio needs."""
    if not names:
        return CONTENDERS
    known = [contender.name for contender in CONTENDERS]
    if unknown := set(names) - set(known):
        raise SystemExit(f"--contenders: unknown {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    return tuple(contender for contender in CONTENDERS if contender.name in {*names, BASELINE, EAGER})


def _line(row: Row) -> str:
    name = f"  {row.contender:<22} {row.precision:<9}"
    if row.median_ms is None:
        return f"{name} {row.error}"
    target = f" (target {row.target:.2f})" if row.target else ""
    return (
        f"{name} {row.median_ms:9.1f} ms  x{row.ratio_to_compiled:.2f}{target}  {(row.peak_bytes or 0) / 1e6:9.1f} MB  "
        f"x{row.memory_ratio or 0:.2f}  error {row.gradient_error:.0e}  compiled in {row.compile_s:.1f} s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Runs and reports benchmarks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="measure; rows are written as they come")
    run.set_defaults(command=_run)
    run.add_argument("suites", nargs="+", choices=[*SUITES, SOUNDNESS, "all"], metavar="SUITE", help="%(choices)s")
    run.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    run.add_argument("--sizes", choices=["small", "paper"], help="default: small on cpu, paper on cuda")
    run.add_argument("--out", type=Path, help="folder of the rows (default: benchmarks/results/DEVICE/DATE)")
    run.add_argument("--cases", nargs="+", metavar="CASE", help="only these cases")
    run.add_argument("--contenders", nargs="+", metavar="NAME", help="only these, beside the non-private steps")
    run.add_argument("--repeats", type=int, default=5, help="least number of timed steps (%(default)s)")
    run.add_argument("--seconds", type=float, default=0.5, help="least time of timed steps for a contender (%(default)s)")
    run.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after this time")
    run.add_argument("--dry-run", action="store_true", help="generate the CUDA code of every case; needs no GPU")
    run.add_argument("--resume", action="store_true", help="of a dry run: do what its rows do not hold yet, or failed")
    run.add_argument("--jobs", type=int, help="processes that build and compile side by side (default: by the number of cores)")

    largest = commands.add_parser("max-batch", help="the largest physical batch that fits into a GPU's memory")
    largest.set_defaults(command=_max_batch)
    largest.add_argument("architectures", nargs="+", choices=list(ARCHITECTURES), metavar="ARCHITECTURE", help="%(choices)s")
    largest.add_argument("--precision", choices=list(DTYPES), default="bfloat16", help="%(default)s")
    largest.add_argument("--contenders", nargs="+", metavar="NAME", help="only these, beside the non-private steps")
    largest.add_argument("--out", type=Path, help="folder of the rows (default: benchmarks/results/cuda/DATE)")

    report = commands.add_parser("report", help="tables in Markdown, plots in PNG and SVG")
    report.set_defaults(command=_report)
    report.add_argument("directory", nargs="?", type=Path, help="folder of results")
    report.add_argument("--against", type=Path, metavar="OLD", help="print what changed since these results")
    report.add_argument("--readme", action="store_true", help="write README.md's section from the newest results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
