"""Parses the command line and hands it to one module for each command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from ..passes.errors import PrivacyError
from . import budget, diff, explain
from .errors import UsageError

COMMANDS = (budget, explain, diff)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 1 if a model would be refused, 2 for a mistake in the call."""
    parser = argparse.ArgumentParser(
        prog="python -m flashnorm_compile",
        description="Privacy budgets, and what the flashnorm backend does with a model.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except BrokenPipeError:  # "| head" has seen enough; the interpreter must not flush into the pipe again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UsageError, PrivacyError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
