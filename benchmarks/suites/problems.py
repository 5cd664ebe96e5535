"""Random batches and losses for the models, and the sets of contenders that several suites share.

Random data costs the same time as real data of the same shape. Everything is made on PyTorch's default device, so that
`with torch.device("meta")` builds a case of any size without memory.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.case import Problem, class_cross_entropy, per_sample, token_cross_entropy

OURS = ("eager", "inductor", "flashnorm")
"""For what only this project's own ratio is asked of."""

EVERYBODY = (
    *OURS, "flashnorm per-layer", "opacus", "opacus functorch", "opacus ghost", "opacus fast gradient", "two-pass ghost",
    "book-keeping", "fastdp", "vmap", "vmap compiled", "loop", "loop compiled", "jax_privacy",
)  # fmt: skip
"""All but our algorithms forced one by one, which some cases of `linear` and `gpt2` compare."""

ONE_OF_EACH = (*OURS, "opacus", "opacus ghost", "vmap", "loop compiled")
"""One contender of each method, where many cases have to be quick."""

HOOKS = (*OURS, "opacus", "opacus ghost", "two-pass ghost", "book-keeping", "fastdp")
"""Methods with a rule for each kind of layer; they refuse tied weights. Nobody but ours is compiled."""


def next_token(model: nn.Module, vocabulary: int, batch: int, tokens: int) -> Problem:
    """Predicts each next token of `batch` sequences of `tokens` tokens."""
    sequences_bt1 = torch.randint(vocabulary, (batch, tokens + 1))
    return Problem(model, (sequences_bt1[:, :-1].contiguous(),), sequences_bt1[:, 1:].contiguous(), token_cross_entropy)


def text_classes(model: nn.Module, vocabulary: int, batch: int, tokens: int, classes: int) -> Problem:
    """Classifies `batch` texts of `tokens` tokens."""
    return Problem(model, (torch.randint(vocabulary, (batch, tokens)),), torch.randint(classes, (batch,)), class_cross_entropy)


def image_classes(model: nn.Module, batch: int, pixels: int, classes: int) -> Problem:
    """Classifies `batch` square images of three channels."""
    return Problem(model, (torch.randn(batch, 3, pixels, pixels),), torch.randint(classes, (batch,)), class_cross_entropy)


def regression(model: nn.Module, *inputs: Tensor, output_shape: tuple[int, ...] | None = None) -> Problem:
    """Mean squared error against random targets, in the shape of the first input unless `output_shape` is given.

    Targets are far away, so that gradient norms are above 1: libraries that add 1e-6 to a norm before they divide by it would
    otherwise miss the gate by that alone.
    """
    targets = 100 * torch.randn(inputs[0].shape if output_shape is None else output_shape)
    return Problem(model, inputs, targets, per_sample(F.mse_loss))
