"""Functions in processes of their own.

Each is forked from a server that has imported what they need and has computed nothing: starting one takes no time.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

PATIENCE = 600  # seconds for one result; many processes share two cores
TESTS = Path(__file__).parent
MODULES = [
    "gloo_scenarios", "gloo_parallel", "bucketing_ranks", "crash_child", "ledger_child", "cache_child", "noise_child",
    "torch.distributed.checkpoint._fsspec_filesystem",
]  # fmt: skip


def imports_stay() -> None:
    """The millions of objects that imports made are not garbage: looking through them again took a tenth of compilations' time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@functools.cache
def context() -> Any:
    """Of a server for the whole test process; it ends with it. The server looks for modules where its environment says."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    return context


def start(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """A process that calls ``function``, which has to stand in a module."""
    process: BaseProcess = context().Process(target=_call, args=(dict(environment or {}), function, arguments))
    process.start()
    return process


def results(
    function: Callable[..., Any], each: Sequence[tuple[Any, ...]], environment: Mapping[str, str] | None = None
) -> list[Any]:
    """What ``function`` returns for each of these arguments, in as many processes at once."""
    queue = context().Queue()
    processes = [start(_answer, queue, i, function, arguments, environment=environment) for i, arguments in enumerate(each)]
    try:
        answers = dict(queue.get(timeout=PATIENCE) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    failures = [answer for fine, answer in answers.values() if not fine]
    assert not failures, "\n".join(failures)
    return [answers[i][1] for i in range(len(each))]


def _call(environment: Mapping[str, str], function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    imports_stay()
    function(*arguments)


def _answer(queue: Any, number: int, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        queue.put((number, (True, function(*arguments))))
    except BaseException:
        queue.put((number, (False, traceback.format_exc())))
