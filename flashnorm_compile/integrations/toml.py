"""Options from a TOML file, for loops that can name a backend and nothing else."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from typing import Any

from .. import config
from ..options import Options
from ..passes.errors import OptionsError


def load_config(path: str | os.PathLike[str], table: str = "flashnorm") -> dict[str, Any]:
    """Sets ``flashnorm_compile.config`` from ``[flashnorm]`` of a TOML file; returns what it set.

        [flashnorm]
        max_grad_norm = 1.0
        noise_multiplier = 0.8
        clipping = "per_layer"

    Every option is allowed, and ``dump``. Values from the file win over ``FLASHNORM_*``; ``options`` given to
    ``torch.compile`` win over both. The rest of the file belongs to others and is not read.

    Raises:
        OptionsError: the file is not TOML, the table is missing, or an option is unknown or wrong. Nothing is set then.
        ImportError: Python 3.10 without the tomli package.
    """
    with open(path, "rb") as file:
        try:
            document = _parser().load(file)
        except ValueError as error:  # both parsers' own error, and text that is not UTF-8
            raise OptionsError(f"{os.fspath(path)} is not a TOML file: {error}") from error
    values = document.get(table)
    if not isinstance(values, dict):
        raise OptionsError(f"{os.fspath(path)} has no table [{table}]. Its tables: {', '.join(document) or 'none'}.")
    options = {name: value for name, value in values.items() if name != "dump"}
    try:
        parsed = Options.parse(options)
    except OptionsError as error:
        raise OptionsError(f"[{table}] of {os.fspath(path)}: {error}") from None
    checked = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed) if field.name in options}
    if "dump" in values:
        checked["dump"] = str(values["dump"])
    for name, value in checked.items():
        setattr(config, name, value)
    return checked


def _parser() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        return importlib.import_module("tomli")
    except ImportError:
        raise ImportError("Python 3.10 cannot read TOML files by itself: pip install tomli, or set FLASHNORM_* instead.") from None
