"""Training on several devices: sharded parameters whose collectives torch.compile sees, and what the ranks have to agree on."""

from .fully_shard import fully_shard, replicate

__all__ = ["fully_shard", "replicate"]
