"""Runs functions on several gloo ranks of this machine, in processes that are started once and do one thing after the other."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=240)
PATIENCE = 600  # seconds for one result; four ranks share two cores with other tests


def run(ranks: int, functions: Sequence[Callable[[], Any]]) -> dict[str, list[Any]]:
    """For each function (of a module that the processes can import) its results by rank; a failure is a string, its traceback."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_rank, args=(rank, ranks, port, functions, queue)) for rank in range(ranks)]
    for process in processes:
        process.start()
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


def _rank(rank: int, ranks: int, port: int, functions: Sequence[Callable[[], Any]], queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", timeout=TIMEOUT)
    for function in functions:
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            result = function()
        except BaseException:
            result = traceback.format_exc()
        queue.put((rank, function.__name__, result))
    queue.close()
    queue.join_thread()
    dist.barrier()
    dist.destroy_process_group()
