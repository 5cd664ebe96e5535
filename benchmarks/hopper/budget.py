"""How long a run on a GPU would take: steps at their predicted times, and what is not a timed step by a formula each.

    compiling       for each compiled row, generating / SIDE_BY_SIDE + KERNEL_SECONDS * kernels / CORES
    gate            for each case: a loop over samples for each kind of clipping, twice (norms, then sums), and one non-private
                    step, eager, in the oracle's precision; and two steps of each contender
    building        for each case, START_SECONDS / SIDE_BY_SIDE
    timing          for each row, the rounds of `benchmarks.timing.interleave` with the baseline, and one step for the memory

`generating` is the processor time that tracing and code generation take on the machine of the dry run, whose cores are taken to
be as fast as those of the machine with the GPU.

KERNEL_SECONDS: on an Intel Xeon (Sapphire Rapids), with torch 2.13 and triton 3.7, Triton and ptxas took 0.25 to 0.4 s for a
pointwise kernel that Inductor generated for sm_90. The allowance is for the larger ones, and for those that are compiled with
several configurations.

DISPATCH_SECONDS is what Python and the dispatcher take for one operator of an eager step, on the high side: a GPU that is faster
waits for them. Roofline times are those of `flashnorm_compile.passes.peaks`, which names the datasheets and the share of their
rates that is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from flashnorm_compile.passes.peaks import Peaks

from benchmarks.runner import Settings

LIMIT_MINUTES = 25
CORES = 16
SIDE_BY_SIDE = 6
"""Cases that `benchmarks.side_by_side` compiles at once on so many cores; their timing has the machine to itself."""
KERNEL_SECONDS = 1.0
DISPATCH_SECONDS = 8e-6
START_SECONDS = 10.0
"""For each case: starting its process, building and copying the model."""
WARM_UP, LEAST_ROUNDS = 2, 3
"""Of `benchmarks.timing.interleave`."""


def timed_seconds(own: float, baseline: float, settings: Settings = Settings()) -> float:  # noqa: B008 - a frozen constant
    """The interleaved timing of one contender, and its peak memory."""
    both = own + baseline
    rounds = max(settings.repeats, settings.at_least_s / both)
    if rounds * both > settings.at_most_s:
        rounds = max(LEAST_ROUNDS, settings.at_most_s / both)
    return (WARM_UP + rounds) * both + own


def compile_seconds(generating: float, kernels: int) -> float:
    """What one row adds to a run that has nothing in its caches."""
    return generating / SIDE_BY_SIDE + KERNEL_SECONDS * kernels / CORES


def eager_seconds(roofline: float, operators: float) -> float:
    """A step of that many operators."""
    return max(roofline, DISPATCH_SECONDS * operators)


@dataclass(frozen=True)
class Gate:
    """The oracle of one case. `step_flops`, `step_operators`: of a non-private step of the whole batch."""

    step_flops: int
    step_operators: int
    batch_size: int
    clippings: int
    dtype: torch.dtype

    def seconds(self, peaks: Peaks) -> float:
        arithmetic = self.step_flops / peaks.flops(self.dtype)
        loop = max(arithmetic, DISPATCH_SECONDS * self.step_operators * self.batch_size)
        return 2 * self.clippings * loop + max(arithmetic, DISPATCH_SECONDS * self.step_operators)
