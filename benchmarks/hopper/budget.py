"""How long a run on a GPU would take: steps at their predicted times, and allowances for all that is not a timed step.

The allowances are deliberately on the high side:

- compiling: what generating the code took here, and Triton's and ptxas's work on each kernel, shared by 8 processes;
- the gate: a loop over samples for each kind of clipping, twice (norms, then sums), and one non-private step, eager, in the
  oracle's precision; and two steps of each contender.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from flashnorm_compile.passes.peaks import Peaks

LIMIT_MINUTES = 25
KERNEL_COMPILE_SECONDS = 1.0 / 8
DISPATCH_SECONDS = 8e-6
"""Python and the dispatcher for one operator of an eager step; a GPU that is faster waits for them."""
WARM_UP, REPEATS, AT_LEAST_SECONDS, AT_MOST_SECONDS, LEAST_ROUNDS = 2, 5, 0.5, 8.0, 3


def timed_seconds(own: float, baseline: float) -> float:
    """The interleaved timing of one contender, `benchmarks.timing.interleave` with the defaults of a run, and its peak memory."""
    both = own + baseline
    rounds = max(REPEATS, AT_LEAST_SECONDS / both)
    if rounds * both > AT_MOST_SECONDS:
        rounds = max(LEAST_ROUNDS, AT_MOST_SECONDS / both)
    return (WARM_UP + rounds) * both + own


def compile_seconds(generating: float, kernels: int) -> float:
    """From the seconds that generating the code took, and the number of its Triton kernels."""
    return generating + KERNEL_COMPILE_SECONDS * kernels


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
