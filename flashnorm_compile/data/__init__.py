"""Batches as the accounting assumes them: Poisson draws, delivered in physical batches of one size."""

from .physical_batches import PrivateDataLoader, private_dataloader
from .poisson import PoissonSampler

__all__ = ["PoissonSampler", "PrivateDataLoader", "private_dataloader"]
