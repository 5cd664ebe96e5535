"""A step on two queues: what is computed, and what is sent meanwhile.

The order is FSDP's: a block's parameters are gathered while the block before it runs, in one message (no more than two blocks are
whole at a time), and its gradients leave in one message as soon as they are there. Under flat clipping they are there only when the
norms of all blocks are: the reductions then overlap the clipped sums of the blocks behind. What a message takes from the memory
bandwidth and the multiprocessors that compute is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Seconds of one block. `gather`, `again`: its parameters for the forward and for the backward. `clipped`: from its clip
    factors to its gradients, noise included. `reduce`: its gradients over the ranks."""

    gather: float = 0.0
    forward: float = 0.0
    again: float = 0.0
    backward: float = 0.0
    clipped: float = 0.0
    reduce: float = 0.0


@dataclass(frozen=True)
class Overlapped:
    """Seconds of a step, and of these the ones in which nothing was computed: waiting for gathers, and for reductions."""

    seconds: float
    waiting_for_gathers: float
    waiting_for_reductions: float


def overlapped(blocks: Sequence[Block], *, one_norm: bool) -> Overlapped:
    """`one_norm`: no gradient is summed before the norms of all blocks are known."""
    queues = _Queues()
    last = len(blocks) - 1
    arrived = queues.send(0.0, blocks[0].gather)
    for i, block in enumerate(blocks):
        begins = max(queues.computed, arrived)
        following = blocks[i + 1].gather if i < last else block.again
        arrived = queues.send(begins, following)
        queues.compute(begins, block.forward)
    for i in range(last, -1, -1):
        block, begins = blocks[i], max(queues.computed, arrived)
        if i:
            arrived = queues.send(begins, blocks[i - 1].again)
        queues.compute(begins, block.backward + (0.0 if one_norm else block.clipped))
        if not one_norm:
            queues.send(queues.computed, block.reduce)
    waited = queues.computed - queues.busy
    if one_norm:
        for block in reversed(blocks):
            queues.compute(queues.computed, block.clipped)
            queues.send(queues.computed, block.reduce)
    end = max(queues.computed, queues.sent)
    return Overlapped(end, waited, end - queues.computed)


@dataclass
class _Queues:
    """When the last computation and the last message so far end; and how long was computed in all."""

    computed: float = 0.0
    sent: float = 0.0
    busy: float = 0.0

    def send(self, ready: float, seconds: float) -> float:
        if seconds:
            self.sent = max(self.sent, ready) + seconds
        return max(self.sent, ready) if seconds else ready

    def compute(self, begins: float, seconds: float) -> None:
        self.computed = begins + seconds
        self.busy += seconds
