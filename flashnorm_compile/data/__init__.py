"""Batches as the accounting assumes them: Poisson draws, delivered in physical batches of one size."""

from .make_loader import private_dataloader
from .physical_batches import PrivateDataLoader
from .poisson import PoissonSampler

__all__ = ["PoissonSampler", "PrivateDataLoader", "private_dataloader"]
