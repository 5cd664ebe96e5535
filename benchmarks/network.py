"""How long a collective takes: links from their makers' datasheets, and NCCL's ring over them.

A ring sends (n - 1) / n of the whole tensor over each of its links, an all-reduce twice that. Ranks of one node are joined by
NVLink. A group that spans nodes leaves each node by the network adapters of its own GPUs there, one for each GPU, all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GPUS_PER_NODE = 8
ATTAINED = 0.8
"""Share of a link's rate that NCCL's large messages reach: its own tables (src/graph/topo.h) have 240 of an A100's 300 GB/s and
370 of an H100's 450."""
# Seconds, NCCL's ring with its protocol for large messages (src/graph/tuning.cc): for a call, and for a step of the ring.
START, STEP_IN_NODE, STEP_BETWEEN_NODES = 8.4e-6, 3.4e-6, 14e-6


@dataclass(frozen=True)
class Network:
    """Bytes per second in one direction, for each GPU: `nvlink` to the others of its node, `adapter` out of the node."""

    device: str
    nvlink: float
    adapter: float
    source: str

    def ring(self, ranks: Sequence[int]) -> tuple[float, float]:
        """Bytes per second over each link of a ring of these ranks, and the seconds of one round of steps without the bytes."""
        nodes = {rank // GPUS_PER_NODE for rank in ranks}
        if len(nodes) == 1:
            return ATTAINED * self.nvlink, (len(ranks) - 1) * STEP_IN_NODE
        between = len(nodes) - 1
        rate = min(self.nvlink, len(ranks) / len(nodes) * self.adapter)
        return ATTAINED * rate, (len(ranks) - 1 - between) * STEP_IN_NODE + between * STEP_BETWEEN_NODES

    def seconds(self, nbytes: float, ranks: Sequence[int]) -> float:
        """A gather that makes, or a reduce-scatter that takes, a tensor of `nbytes`. Half an all-reduce of such a tensor."""
        if len(ranks) == 1 or not nbytes:
            return 0.0
        rate, steps = self.ring(ranks)
        return START + steps + wire_bytes(nbytes, len(ranks)) / rate


def wire_bytes(nbytes: float, ranks: int) -> float:
    """What each rank sends of a tensor of `nbytes` in a gather or a reduce-scatter; an all-reduce sends it twice."""
    return nbytes * (ranks - 1) / ranks


NETWORKS = {
    "A100": Network("A100", 300e9, 25e9, "NVIDIA A100 datasheet (NVLink 600 GB/s, both ways); DGX A100 datasheet (8 x 200 Gb/s)"),
    "H200": Network("H200", 450e9, 50e9, "NVIDIA H200 datasheet (NVLink 900 GB/s, both ways); DGX H200 datasheet (8 x 400 Gb/s)"),
}
