"""``explain``: what the backend would do with a model, as a table or as an HTML page."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from ..explain import explain
from ..html_report import record, report_page
from .errors import UsageError
from .factory import call_factory, find_factory

DESCRIPTION = """\
FACTORY takes no arguments and returns (model, *inputs): a module or function that computes the loss, and one batch as in
training. A dict at the end holds keyword arguments. MODULE is a module's name or the path of a .py file.

The factory makes tensors without memory: they have shapes and types, no values. --real gives them values.
"""

EXAMPLE = (
    "example: python -m flashnorm_compile explain train.py:example -o max_grad_norm=1 -o noise_multiplier=1 --html report.html"
)


def add_parser(commands: Any) -> None:
    """Adds the command to the ``COMMAND`` list of the argument parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain",
        help="what would be done with a model, as a table or a page",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("factory", metavar="MODULE:FACTORY")
    parser.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the backend; VALUE is JSON or plain text. What is left out comes from FLASHNORM_*",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page instead of the table")
    parser.add_argument("--real", action="store_true", help="let the factory make real tensors, for code that looks at values")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table or writes the page. Returns 1 if the model would be refused."""
    options = dict(map(_option, arguments.option))
    factory = find_factory(arguments.factory)
    with contextlib.nullcontext() if arguments.real else _no_memory():
        model, inputs, keywords = call_factory(arguments.factory, factory)
        if arguments.html is None:
            report = _capture(lambda: explain(model, *inputs, options=options, **keywords))
            Console().print(report)
        else:
            report, graph = _capture(lambda: record(model, inputs, keywords, options))
            _write(arguments.html, report_page(report, graph, arguments.factory))
    return 0 if report.refused is None else 1


@contextlib.contextmanager
def _no_memory() -> Any:
    """Tensors made inside have no storage. An error in the block may come from that, so it says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copy.deepcopy of a layer
        try:
            with FakeTensorMode():
                yield
        except ValueError:  # a refusal or a mistake in the call: values have nothing to do with it
            raise
        except Exception:
            sys.stderr.write(
                "Tensors were made without values. If the factory or the model looks at values (item(), numpy(), loading a "
                "checkpoint), run this again with --real.\n"
            )
            raise


def _capture(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except ValueError as error:
        if "nothing to explain" in str(error):
            raise UsageError(
                f"{error} The factory must return a module or function whose call computes a loss from parameters that require "
                "gradients, and the inputs of that call."
            ) from error
        raise


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--option takes NAME=VALUE, such as noise_multiplier=0.8 or clipping=per_layer; got {text!r}.")
    try:
        return name.strip().replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return name.strip().replace("-", "_"), value


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {path} cannot be written: {error.strerror}. Name a file in a folder that exists.") from error
    Console(highlight=False, markup=False, soft_wrap=True).print(f"{path}: {len(page.encode()) / 1e6:.2f} MB")
