"""Finds and calls the function that makes a model and one batch."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UsageError

FORM = "MODULE:FACTORY, such as mypackage.train:example or train.py:example"


def find_factory(text: str) -> Callable[[], Any]:
    """The function that ``MODULE:FACTORY`` names.

    Raises:
        UsageError: there is no such module or function. An error inside the module comes through as it is.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(f"the model is given as {FORM}; got {text!r}.")
    module = _from_file(Path(where)) if where.endswith(".py") else _by_name(where)
    found = getattr(module, name, None)
    if found is None:
        near = difflib.get_close_matches(name, dir(module), n=1)
        raise UsageError(f"{where} has no function {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
    if not callable(found):
        raise UsageError(f"{text} is a {type(found).__name__}. Name a function without arguments that returns (model, *inputs).")
    factory: Callable[[], Any] = found
    return factory


def call_factory(text: str, factory: Callable[[], Any]) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """The model, its positional inputs and its keyword inputs."""
    made = factory()
    if not isinstance(made, (tuple, list)) or len(made) < 2 or not callable(made[0]):
        shown = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, (tuple, list)) else type(made).__name__
        raise UsageError(
            f"{text} must return (model, *inputs): a module or function, then one batch, and at the end, if need be, a dict of "
            f"keyword arguments. It returned {shown}."
        )
    model, *inputs = made
    keywords = inputs.pop() if isinstance(inputs[-1], dict) and all(isinstance(key, str) for key in inputs[-1]) else {}
    return model, inputs, keywords


def _by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        raise UsageError(
            f"there is no module {name!r}. Modules are looked for as in Python itself, in the folder of the call first; "
            "a file can be named by its path, such as scripts/train.py:example."
        ) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {path}. The model is given as {FORM}.")
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python code.")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
