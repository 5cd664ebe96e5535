"""Runs and reports benchmarks; see `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.case import Case, Suite
from benchmarks.contenders import BASELINE, CONTENDERS, EAGER, Contender
from benchmarks.row import RESULTS, Row, write
from benchmarks.runner import Settings, run_case
from benchmarks.suites import SUITES

ROOT = Path(__file__).resolve().parent.parent
SOUNDNESS = "soundness"
# What `run all` runs, in this order: the suites that the papers are compared with come first.
EVERYTHING = ("linear", "gpt2", "llama", "vision", SOUNDNESS, "layers")


def main(arguments: list[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    return int(parsed.command(parsed))


def _run(options: argparse.Namespace) -> int:
    console = Console()
    _be_quiet()
    contenders = _contenders(options.contenders)
    names = EVERYTHING if "all" in options.suites else tuple(options.suites)
    if options.dry_run:
        return _dry_run(names, contenders, options, console)
    if options.device == "cuda" and not torch.cuda.is_available():
        console.print("--device cuda: this machine has no CUDA device; --dry-run generates the code without one")
        return 2
    start = time.monotonic()
    settings = Settings(
        device=options.device,
        sizes=options.sizes or ("paper" if options.device == "cuda" else "small"),
        repeats=options.repeats,
        at_least_s=options.seconds,
        at_most_s=max(8.0, options.seconds),
        deadline=start + 60 * options.minutes,
    )
    folder = options.out or RESULTS / options.device / machine.today()
    failed = False
    if SOUNDNESS in names:
        names = tuple(name for name in names if name != SOUNDNESS)
    for suite, case in _planned(names, settings.sizes, options.cases):
        console.rule(f"{suite.name}: {case.description}", align="left")

        def report(row: Row, suite: Suite = suite) -> None:
            nonlocal failed
            write([row], folder / f"{suite.name}.json")
            console.print(_line(row), highlight=False, markup=False, soft_wrap=True)
            failed = failed or (row.error is not None and row.contender == BASELINE)

        run_case(suite.name, case, contenders, settings, report)
    if SOUNDNESS in options.suites or "all" in options.suites:
        from benchmarks import soundness

        # What is compiled is judged once: its algorithms and its eager twins are the same mathematics.
        judged = [c for c in contenders if not c.compiled or c.name in ("flashnorm", "flashnorm per-layer")]
        rows = soundness.run(judged, options.device)
        soundness.write(rows, folder / f"{SOUNDNESS}.json")
        console.print(soundness.markdown_table(rows), highlight=False, markup=False, soft_wrap=True)
    console.print(f"{time.monotonic() - start:.0f} s; rows in {folder}")
    return int(failed)


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


def _dry_run(names: tuple[str, ...], contenders: tuple[Contender, ...], options: argparse.Namespace, console: Console) -> int:
    from benchmarks.dry_run import dry_run, table

    suites = [SUITES[name] for name in names if name != SOUNDNESS]
    rows = dry_run(suites, contenders, cases=options.cases)
    console.print(table(rows))
    return int(any(row.error for row in rows))


def _planned(names: tuple[str, ...], sizes: str, only: list[str] | None) -> list[tuple[Suite, Case]]:
    """All cases to run, the headline cases of every suite first."""
    found = [(SUITES[name], case) for name in names for case in SUITES[name].cases(sizes)]
    if only:
        known = {case.name for _, case in found}
        if unknown := set(only) - known:
            raise SystemExit(f"--cases: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
        found = [(suite, case) for suite, case in found if case.name in only]
    return sorted(found, key=lambda pair: not pair[1].headline)


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


def _be_quiet() -> None:
    """Peers warn about things that the gate checks; the rows are what counts."""
    warnings.filterwarnings("ignore")
    logging.getLogger("flashnorm_compile").setLevel(logging.ERROR)


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

    report = commands.add_parser("report", help="tables in Markdown, plots in PNG and SVG")
    report.set_defaults(command=_report)
    report.add_argument("directory", nargs="?", type=Path, help="folder of results")
    report.add_argument("--against", type=Path, metavar="OLD", help="print what changed since these results")
    report.add_argument("--readme", action="store_true", help="write README.md's section from the newest results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
