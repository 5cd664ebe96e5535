"""Runs functions on several gloo ranks of this machine, each a process of its own.

The ranks of `run` are started once and do one thing after the other.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import forked
import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=240)


def start(
    ranks: int, function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> list[BaseProcess]:
    """A process for each rank that calls ``function`` with what torchrun would put into its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), **(environment or {})}
    given = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [forked.start(function, *arguments, environment=one) for one in given]


def run(ranks: int, functions: Sequence[Callable[[], Any]]) -> dict[str, list[Any]]:
    """For each function (of a module that the processes can import) its results by rank; a failure is a string, its traceback."""
    queue = forked.context().Queue()
    processes = start(ranks, _one_after_the_other, functions, queue)
    try:
        told = [queue.get(timeout=forked.PATIENCE) for _ in range(ranks * len(functions))]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    results: dict[str, list[Any]] = {function.__name__: [None] * ranks for function in functions}
    for rank, name, result in told:
        results[name][rank] = result
    return results


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
