"""Runs functions on several gloo ranks of this machine.

Each rank is a process of its own, forked from a server that has imported what ranks need and has computed nothing: starting one
takes no time. The ranks of `run` are started once and do one thing after the other.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=240)
PATIENCE = 600  # seconds for one result; four ranks share two cores with other tests
TESTS = Path(__file__).parent
MODULES = ["gloo_scenarios", "gloo_parallel", "bucketing_ranks", "crash_child", "torch.distributed.checkpoint._fsspec_filesystem"]


@functools.cache
def _context() -> Any:
    """Of a server for the whole test process; it ends with it. The server looks for modules where its environment says."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    return context


def start(
    ranks: int, function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> list[BaseProcess]:
    """A process for each rank that calls ``function`` with what torchrun would put into its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), **(environment or {})}
    processes = []
    for rank in range(ranks):
        given = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(_context().Process(target=_rank, args=(given, function, arguments)))
        processes[-1].start()
    return processes


def run(ranks: int, functions: Sequence[Callable[[], Any]]) -> dict[str, list[Any]]:
    """For each function (of a module that the processes can import) its results by rank; a failure is a string, its traceback."""
    queue = _context().Queue()
    processes = start(ranks, _one_after_the_other, functions, queue)
    try:
        told = [queue.get(timeout=PATIENCE) for _ in range(ranks * len(functions))]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    results: dict[str, list[Any]] = {function.__name__: [None] * ranks for function in functions}
    for rank, name, result in told:
        results[name][rank] = result
    return results


def _rank(environment: Mapping[str, str], function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def _one_after_the_other(functions: Sequence[Callable[[], Any]], queue: Any) -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    for function in functions:
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            result = function()
        except BaseException:
            result = traceback.format_exc()
        queue.put((dist.get_rank(), function.__name__, result))
    queue.close()
    queue.join_thread()
    dist.barrier()
    dist.destroy_process_group()
