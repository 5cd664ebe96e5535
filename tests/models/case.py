"""One model of the zoo: how to build it, what to feed it, and what one sample's loss is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its batches, and its loss.

    ``inputs(B)`` gives the keyword arguments of ``forward``; ``targets(inputs)`` what only the loss needs (samples
    along dim 0). ``loss(output, targets)`` is a mean over samples. ``dims`` names the inputs whose samples do not lie
    along dim 0 (None: a public input), and is handed to the backend as ``batch_dims``. ``share(inputs)`` is the factor
    from the loss of a batch of one to the sample's own loss, for losses that count only some tokens (valid over ``n``).
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensors]
    loss: Callable[[Any, Tensors], Tensor]
    targets: Callable[[Tensors], Tensors] = field(default=lambda inputs: {})
    dims: dict[str, int | None] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    share: Callable[[Tensors], float] = field(default=lambda inputs: 1.0)
    batch_size: int = 4
    may_refuse: bool = False

    def make(self, batch_size: int | None = None, seed: int = 0) -> tuple[nn.Module, Tensors, Tensors]:
        """The model, its inputs and its targets, the same for the same seed."""
        torch.manual_seed(seed)
        model = self.build()
        inputs = self.inputs(self.batch_size if batch_size is None else batch_size)
        return model, inputs, self.targets(inputs)

    def sample(self, tensors: Tensors, index: int) -> Tensors:
        """Sample ``index`` as a batch of one; public inputs whole."""
        return {name: _slice(tensor, self.dims.get(name, 0), index) for name, tensor in tensors.items()}


def _slice(tensor: Tensor, dim: int | None, index: int) -> Tensor:
    return tensor if dim is None else tensor.narrow(dim, index, 1)


def spread(batch_size: int) -> Tensor:
    """Scales from 0.3 to 3, [B]: they move the samples' gradient norms apart, so that a median clips half of them."""
    return torch.logspace(-0.5, 0.5, max(batch_size, 1))[:batch_size]


def gaussian(batch_size: int, *shape: int) -> Tensor:
    """Normal samples [B, *shape]."""
    return torch.randn(batch_size, *shape)


def tokens(batch_size: int, length: int, vocabulary: int) -> Tensor:
    """Token ids [B, T]. Sample b repeats a word of b + 1 tokens, which makes the norms differ from sample to sample."""
    rows = [torch.randint(1, vocabulary, (b + 1,)).repeat(length)[:length] for b in range(batch_size)]
    return torch.stack(rows) if rows else torch.zeros(0, length, dtype=torch.long)


def weights_and_noise(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    """Targets for :func:`squared_error`: ``y`` [B, *shape] and one weight a sample; B is read off ``inputs[name]``."""

    def targets(inputs: Tensors) -> Tensors:
        batch_size = inputs[name].shape[0]
        return {"y": gaussian(batch_size, *shape), "weight": spread(batch_size)}

    return targets


def squared_error(output: Tensor, targets: Tensors) -> Tensor:
    """Weighted squared error, mean over samples; ``output`` [B, ...]."""
    error = (output - targets["y"]).square().flatten(1).mean(1)
    return (error * targets["weight"]).mean()


def own_loss(output: Any, targets: Tensors) -> Tensor:
    """The loss that a model computed itself: the output, or its ``loss``."""
    return output if isinstance(output, Tensor) else output.loss
