"""Per-sample gradients of single layers from their input and the gradient of their output.

These are the rules that hooks on modules need. `book_keeping.py` and `two_pass.py` share them; the library has none.

Dimensions: B samples, G groups of a convolution (1 elsewhere), T positions, D inputs and P outputs of one position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contenders.base import CannotRunError


class Contribution(Protocol):
    """The B samples' gradients of one parameter, in whatever form is cheap to keep."""

    def squared_norms(self) -> Tensor:
        """Of each sample's gradient, float32 or wider, [B]."""

    def weighted_sum(self, factors_b: Tensor) -> Tensor:
        """The sum over samples of factor times gradient, in the shape and dtype of the parameter. Called once at most."""


Contributions = Iterator[tuple[Tensor, Contribution]]
Rule = Callable[[nn.Module, Tensor, Tensor], Contributions]


class Instantiated:
    """The gradients themselves, [B, *parameter shape]."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients

    def squared_norms(self) -> Tensor:
        gradients = self.gradients.flatten(1)
        return torch.linalg.vector_norm(gradients, dim=1, dtype=norm_dtype(gradients)).square()

    def weighted_sum(self, factors_b: Tensor) -> Tensor:
        factors_b = factors_b.to(self.gradients.dtype)
        if len(factors_b) == 1:
            return self.gradients.squeeze(0).mul_(factors_b)
        return torch.tensordot(factors_b, self.gradients, dims=1)


class Factors:
    """Gradients G^T A of a weight, kept as A [B, G, T, D] and G [B, G, T, P]. The weight has the shape `shape`."""

    def __init__(self, inputs_bgtd: Tensor, output_gradients_bgtp: Tensor, shape: torch.Size) -> None:
        self.inputs_bgtd, self.output_gradients_bgtp, self.shape = inputs_bgtd, output_gradients_bgtp, shape

    def squared_norms(self) -> Tensor:
        """The ghost norm, sum over t and s of (a_t . a_s) (g_t . g_s): Li et al. 2021, section 4.1."""
        inputs_bgts = self.inputs_bgtd @ self.inputs_bgtd.mT
        outputs_bgts = self.output_gradients_bgtp @ self.output_gradients_bgtp.mT
        products_b = (inputs_bgts.mul_(outputs_bgts)).flatten(1).sum(1, dtype=norm_dtype(inputs_bgts))
        return products_b.clamp_(min=0.0)  # rounding can take a norm near 0 below it

    def weighted_sum(self, factors_b: Tensor) -> Tensor:
        scaled_bgtp = self.output_gradients_bgtp * factors_b.to(self.output_gradients_bgtp.dtype).view(-1, 1, 1, 1)
        return torch.einsum("bgtp,bgtd->gpd", scaled_bgtp, self.inputs_bgtd).reshape(self.shape)


class Lookups:
    """Gradients of an embedding, kept as ids [B, T] and the gradients of the looked-up rows [B, T, D]."""

    def __init__(self, ids_bt: Tensor, output_gradients_btd: Tensor, rows: int) -> None:
        self.ids_bt, self.output_gradients_btd, self.rows = ids_bt, output_gradients_btd, rows

    def squared_norms(self) -> Tensor:
        """Sums the rows of equal ids within each sample, then squares. No T x T matrix, and no size depends on the ids."""
        samples, tokens = self.ids_bt.shape
        sorted_bt, order_bt = self.ids_bt.sort(dim=1)
        changes_bt = F.pad(sorted_bt[:, 1:] != sorted_bt[:, :-1], (1, 0)).cumsum(1)
        segments_bt = torch.empty_like(order_bt).scatter_(1, order_bt, changes_bt)
        segments_bt += tokens * torch.arange(samples, device=segments_bt.device)[:, None]
        gradients = self.output_gradients_btd.flatten(0, 1)
        sums = torch.zeros_like(gradients, dtype=norm_dtype(gradients))
        sums.index_add_(0, segments_bt.flatten(), gradients.to(sums.dtype))
        return sums.view(samples, -1).square_().sum(1)

    def weighted_sum(self, factors_b: Tensor) -> Tensor:
        scaled_btd = self.output_gradients_btd * factors_b.to(self.output_gradients_btd.dtype).view(-1, 1, 1)
        total = scaled_btd.new_zeros(self.rows, scaled_btd.shape[-1])
        return total.index_add_(0, self.ids_bt.flatten(), scaled_btd.flatten(0, 1))


def rule_for(name: str, module: nn.Module) -> Rule:
    """The rule of a module that owns trainable parameters. Raises CannotRunError where there is none."""
    rule = RULES.get(type(module))
    if rule is None:
        known = ", ".join(sorted(kind.__name__ for kind in RULES))
        raise CannotRunError(
            f"no rule for module {name or 'the model itself'} ({type(module).__name__}); there are rules for {known}"
        )
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.sparse):
        raise CannotRunError(f"module {name}: Embedding with scale_grad_by_freq or sparse gradients has no rule")
    return rule


def _linear(module: nn.Module, inputs: Tensor, output_gradients: Tensor) -> Contributions:
    assert isinstance(module, nn.Linear)
    samples = inputs.shape[0]
    output_gradients_bgtp = output_gradients.reshape(samples, 1, -1, module.out_features)
    if module.weight.requires_grad:
        yield module.weight, _matrix(inputs.reshape(samples, 1, -1, module.in_features), output_gradients_bgtp, module.weight.shape)
    if module.bias is not None:
        yield module.bias, Instantiated(output_gradients_bgtp.sum((1, 2)))


def _convolution(module: nn.Module, inputs: Tensor, output_gradients: Tensor) -> Contributions:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    samples, groups = inputs.shape[0], module.groups
    output_gradients_bgtp = output_gradients.reshape(samples, groups, module.out_channels // groups, -1).mT
    if module.weight.requires_grad:
        yield module.weight, _matrix(_patches(module, inputs), output_gradients_bgtp, module.weight.shape)
    if module.bias is not None:
        yield module.bias, Instantiated(output_gradients.flatten(2).sum(2))


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    """The inputs that each output position sees, [B, G, T, D], D = channels of a group times kernel positions."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (kernel, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        windows = windows.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    spatial = len(module.kernel_size)
    samples, channels = inputs.shape[:2]
    positions = math.prod(windows.shape[2 : 2 + spatial])
    windows = windows.unflatten(1, (module.groups, channels // module.groups)).movedim(2, 2 + spatial)
    return windows.reshape(samples, module.groups, positions, -1)


def _embedding(module: nn.Module, ids: Tensor, output_gradients: Tensor) -> Contributions:
    assert isinstance(module, nn.Embedding)
    ids_bt = ids.reshape(ids.shape[0], -1)
    output_gradients_btd = output_gradients.reshape(*ids_bt.shape, -1)
    if module.padding_idx is not None:
        output_gradients_btd = output_gradients_btd.masked_fill((ids_bt == module.padding_idx).unsqueeze(-1), 0.0)
    yield module.weight, Lookups(ids_bt, output_gradients_btd, module.num_embeddings)


def _layer_norm(module: nn.Module, inputs: Tensor, output_gradients: Tensor) -> Contributions:
    assert isinstance(module, nn.LayerNorm)
    normed = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    yield from _scale_and_shift(module, normed * output_gradients, output_gradients)


def _rms_norm(module: nn.Module, inputs: Tensor, output_gradients: Tensor) -> Contributions:
    assert isinstance(module, nn.RMSNorm)
    normed = F.rms_norm(inputs, module.normalized_shape, eps=module.eps)
    yield from _scale_and_shift(module, normed * output_gradients, output_gradients)


def _scale_and_shift(module: nn.Module, scale_gradients: Tensor, shift_gradients: Tensor) -> Contributions:
    """Of norms over the last dimensions: sums over all dimensions between the samples and those."""
    for parameter, gradients in ((module.weight, scale_gradients), (getattr(module, "bias", None), shift_gradients)):
        if isinstance(parameter, nn.Parameter):
            yield parameter, Instantiated(gradients.reshape(gradients.shape[0], -1, *parameter.shape).sum(1))


def _group_norm(module: nn.Module, inputs: Tensor, output_gradients: Tensor) -> Contributions:
    assert isinstance(module, nn.GroupNorm)
    normed = F.group_norm(inputs, module.num_groups, eps=module.eps)
    samples, channels = inputs.shape[:2]
    yield module.weight, Instantiated((normed * output_gradients).reshape(samples, channels, -1).sum(2))
    yield module.bias, Instantiated(output_gradients.reshape(samples, channels, -1).sum(2))


def _matrix(inputs_bgtd: Tensor, output_gradients_bgtp: Tensor, shape: torch.Size) -> Contribution:
    """Ghost norms where 2 T^2 < D P, instantiated gradients elsewhere: Bu et al. 2022 (mixed ghost clipping), section 4.1."""
    tokens, width = inputs_bgtd.shape[2:]
    if 2 * tokens**2 < width * output_gradients_bgtp.shape[3]:
        return Factors(inputs_bgtd, output_gradients_bgtp, shape)
    return Instantiated((output_gradients_bgtp.mT @ inputs_bgtd).reshape(-1, *shape))


def norm_dtype(x: Tensor) -> torch.dtype:
    """What norms of `x` are summed in: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
}
