"""A small stand-in for a compiled private graph: the real engine, op, binding and guard, without any compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flashnorm_compile.templates.release import release
from torch import Tensor, nn

from flashnorm_compile import guard
from flashnorm_compile.binding import Binding, binding_for
from flashnorm_compile.options import Options


def options(**changes: Any) -> Options:
    """Options for tests: C = 1, no noise, the sum over samples."""
    return Options.parse({"max_grad_norm": 1.0, "noise_multiplier": 0.0, "loss_reduction": "sum", **changes})


class CompiledFunction(torch.autograd.Function):
    """loss = sum_b x_b . (w1 + w2 + ...): every parameter has x_b as gradient of sample b. The guard knows the name."""

    @staticmethod
    def forward(ctx: Any, layout: Callable[[Tensor], Tensor], handle: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layout, ctx.count = layout, len(parameters)
        ctx.save_for_backward(handle, x)
        return sum((x @ parameter).sum() for parameter in parameters)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        handle, x = ctx.saved_tensors
        norms_sq = (x * tangent).square().sum(1, keepdim=True).repeat(1, ctx.count)
        factors, keys, noise_std = release(handle, norms_sq, tangent)
        gradients = []
        for row, key in zip(factors, keys, strict=True):
            noise = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(int(key[0])))
            gradients.append(ctx.layout((x * tangent * row[:, None]).sum(0) + noise_std * noise))
        return None, None, None, *gradients


class Private:
    """One private graph over some parameters of shape [D]; calling it with x [B, D] gives the loss."""

    def __init__(self, *parameters: nn.Parameter, names: list[str] | None = None, **changes: Any) -> None:
        self.parameters = list(parameters)
        self.names = names or [f"layer{index}.weight" for index in range(len(parameters))]
        self.options = options(**changes)
        self.layout: Callable[[Tensor], Tensor] = lambda gradient: gradient
        guard.protect(self.parameters, self.names)

    @property
    def binding(self) -> Binding:
        return binding_for(self.parameters, self.names, self.options)

    def __call__(self, x: Tensor) -> Tensor:
        binding = self.binding
        loss = CompiledFunction.apply(self.layout, binding.handle, x, *self.parameters)
        guard.watch((loss,), binding)
        return loss


def weights(count: int = 2, size: int = 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size)) for _ in range(count)]
