"""``budget``: epsilon, noise multiplier and steps depend on each other; whichever one is left out is computed."""

from __future__ import annotations

import argparse
import math
from typing import Any

from rich.console import Console

from ..accounting import calibrate, calibrate_steps, planned_epsilon
from ..accounting.accountant import accountant_version
from ..accounting.calibrate import MOST_STEPS
from ..accounting.statement import rounded_up
from .errors import UsageError

DESCRIPTION = """\
Give two of --epsilon, --noise-multiplier and --steps; the third is computed.

How batches are drawn decides what sampling earns. Give one of:
  --sample-rate Q                     Poisson draws: every record with probability Q
  --batch-size L --dataset-size N     the same, with Q = L / N
  --unknown-sampler                   anything else, such as shuffled batches: nothing is earned
"""

EXAMPLE = "example: python -m flashnorm_compile budget --epsilon 3 --delta 1e-5 --batch-size 256 --dataset-size 60000 --steps 5000"


def add_parser(commands: Any) -> None:
    """Adds the command to the ``COMMAND`` list of the argument parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "budget",
        help="epsilon <-> noise <-> steps",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--epsilon", type=float, help="epsilon > 0 to be spent at most")
    parser.add_argument("--noise-multiplier", type=float, help="noise standard deviation over the clipping norm")
    parser.add_argument("--steps", type=int, help="optimizer steps, that is, noised releases")
    parser.add_argument("--delta", type=float, required=True, help="well below 1 / (number of records)")
    parser.add_argument("--sample-rate", type=float, metavar="Q", help="probability of each record to be in a batch")
    parser.add_argument("--batch-size", type=float, metavar="L", help="expected batch size")
    parser.add_argument("--dataset-size", type=int, metavar="N", help="number of records")
    parser.add_argument("--truncated-batch-size", type=int, metavar="M", help="larger draws are cut to M (needs --dataset-size)")
    parser.add_argument("--unknown-sampler", action="store_true", help="credit no amplification by sampling")
    parser.add_argument("--accountant", choices=("pld", "rdp"), default="pld", help="(%(default)s)")
    parser.add_argument(
        "--relation",
        choices=("add_or_remove_one", "replace_one"),
        default="add_or_remove_one",
        help="which data sets are neighbors (%(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the budget."""
    asked = _left_out(arguments)
    _check_numbers(arguments)
    rate = _sample_rate(arguments)
    setting: dict[str, Any] = {
        "delta": arguments.delta,
        "sample_rate": rate,
        "dataset_size": arguments.dataset_size if arguments.truncated_batch_size is not None else None,
        "truncated_batch_size": arguments.truncated_batch_size,
        "accountant": arguments.accountant,
        "relation": arguments.relation,
    }
    noise, steps, computed = _solved(asked, arguments, setting)
    spent = planned_epsilon(noise_multiplier=noise, steps=steps, **setting)
    mechanism = f"{steps:,} steps with noise multiplier {noise:.6g}, {_sampler(arguments, rate)}"
    lines = [
        f"{asked} = {computed}",
        "",
        f"{mechanism}, spend epsilon = {rounded_up(spent)} at delta = {arguments.delta:g}.",
        f"Accountant: {accountant_version(arguments.accountant)}; relation: {arguments.relation}.",
    ]
    if arguments.dataset_size is not None and arguments.delta * arguments.dataset_size > 1:
        lines.append(
            f"Warning: delta is above 1 / dataset_size = {1 / arguments.dataset_size:.2g}, which permits releasing whole records."
        )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print("\n".join(lines))
    return 0


def _solved(asked: str, arguments: argparse.Namespace, setting: dict[str, Any]) -> tuple[float, int, str]:
    """Noise multiplier, steps, and the number that was asked for as text that can be given back to this command."""
    epsilon, noise, steps = arguments.epsilon, arguments.noise_multiplier, arguments.steps
    try:
        if asked == "noise_multiplier":
            noise = calibrate(epsilon=epsilon, steps=steps, **setting)
            return noise, steps, repr(noise)
        if asked == "steps":
            steps = calibrate_steps(epsilon=epsilon, noise_multiplier=noise, **setting)
            return noise, steps, str(steps)
        return noise, steps, repr(planned_epsilon(noise_multiplier=noise, steps=steps, **setting))
    except ImportError as error:
        raise UsageError(str(error)) from error


def _check_numbers(arguments: argparse.Namespace) -> None:
    """NaN fails every comparison, so each one asks for what is allowed."""
    checks = (
        ("--epsilon", arguments.epsilon, lambda x: 0 < x < math.inf, "a number > 0"),
        ("--delta", arguments.delta, lambda x: 0 < x < 1, "> 0 and < 1, usually well below 1 / (number of records)"),
        (
            "--noise-multiplier",
            arguments.noise_multiplier,
            lambda x: 0 < x < math.inf,
            "a number > 0; without noise epsilon is infinite",
        ),
        ("--steps", arguments.steps, lambda x: 1 <= x <= MOST_STEPS, f"an integer >= 1 and <= {MOST_STEPS:,}, the noised releases"),
        ("--sample-rate", arguments.sample_rate, lambda x: 0 < x <= 1, "a probability, > 0 and <= 1"),
        ("--dataset-size", arguments.dataset_size, lambda x: x >= 1, "an integer >= 1"),
        ("--truncated-batch-size", arguments.truncated_batch_size, lambda x: x >= 1, "an integer >= 1"),
    )
    for flag, value, allowed, words in checks:
        if value is not None and not allowed(value):
            raise UsageError(f"{flag} must be {words}; got {value}.")


def _left_out(arguments: argparse.Namespace) -> str:
    names = ("epsilon", "noise_multiplier", "steps")
    missing = [name for name in names if getattr(arguments, name) is None]
    if len(missing) != 1:
        flags = ["--" + name.replace("_", "-") for name in names]
        given = [flag for flag, name in zip(flags, names, strict=True) if name not in missing]
        raise UsageError(f"give exactly two of {', '.join(flags)}; got {', '.join(given) or 'none'}. The third is computed.")
    return missing[0]


def _sample_rate(arguments: argparse.Namespace) -> float | None:
    by_size = arguments.batch_size is not None
    ways = [arguments.sample_rate is not None, by_size, arguments.unknown_sampler]
    if sum(ways) != 1:
        raise UsageError(
            "say how batches are drawn, in exactly one way: --sample-rate Q, or --batch-size L with --dataset-size N, or "
            "--unknown-sampler. Without a sampler no amplification can be computed, and none is assumed."
        )
    if by_size:
        if arguments.dataset_size is None or not 0 < arguments.batch_size <= arguments.dataset_size:
            raise UsageError(
                f"--batch-size {arguments.batch_size:g} needs --dataset-size N with 0 < L <= N; got "
                f"{'none' if arguments.dataset_size is None else arguments.dataset_size}. The sample rate is L / N."
            )
        return float(arguments.batch_size / arguments.dataset_size)
    rate: float | None = arguments.sample_rate
    return rate


def _sampler(arguments: argparse.Namespace, rate: float | None) -> str:
    if rate is None:
        return "batches from an unknown sampler"
    cut = "" if arguments.truncated_batch_size is None else f" truncated to {arguments.truncated_batch_size}"
    return f"Poisson draws at rate {rate:.6g}{cut}"
