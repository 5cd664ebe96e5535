"""Interleaved step times, and the peak of the memory that tensors hold during a step."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], None]


@dataclass(frozen=True)
class Times:
    """Quartiles of a step's time, in milliseconds, over `repeats` steps."""

    low_ms: float
    median_ms: float
    high_ms: float
    repeats: int


def interleave(
    steps: Mapping[str, Step], repeats: int, at_least_s: float = 0.0, at_most_s: float = float("inf"), warm_up: int = 2
) -> dict[str, Times]:
    """Times every step in turn, so that a slow moment of the machine meets all of them.

    There are at least `repeats` rounds, and more until `at_least_s` seconds have passed: short steps need more of them.
    After `at_most_s` seconds it stops once there are three. The order is reversed in every other round: none always runs
    behind the same other one. A step is timed to the end of its work on the GPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for round_number in itertools.count(-warm_up):
        passed = time.perf_counter() - start
        if (round_number >= repeats and passed >= at_least_s) or (round_number >= 3 and passed >= at_most_s):
            break
        names = list(steps) if round_number % 2 == 0 else list(reversed(list(steps)))
        for name in names:
            taken = _seconds(steps[name])
            if round_number >= 0:
                seconds[name].append(taken)
    return {name: _quartiles(taken) for name, taken in seconds.items()}


def _seconds(step: Step) -> float:
    _synchronize()
    start = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quartiles(seconds: list[float]) -> Times:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Times(1e3 * low, 1e3 * median, 1e3 * high, len(seconds))


def peak_tensor_bytes(step: Step, device: str = "cpu") -> int:
    """The largest sum of tensor memory allocated within one step, beyond what was held before it.

    On a GPU it is the caching allocator's count of allocated bytes, on the CPU the profiler's record of allocations.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    recorded = profiler.profiler.kineto_results if profiler.profiler is not None else None
    assert recorded is not None, "the profiler has stopped, so it holds results"
    events = [event for event in recorded.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type() == torch._C._autograd.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak
