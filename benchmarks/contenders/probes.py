"""Hooks on layers that turn one backward pass into per-sample gradient norms.

Every layer with trainable parameters gets an identity behind its output that also takes a vector `probe` [B]. In the
backward pass it returns, as the "gradient" of `probe`, the squared norms of the samples' gradients of that layer. Autograd
adds them up over layers; asked for the gradient of `probe` alone, it computes no gradient of a weight.

Dimensions: B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders.base import CannotRunError
from benchmarks.contenders.layer_rules import Contribution, Rule, norm_dtype, rule_for

Keep = Callable[[Tensor, Contribution], None]


class Probes:
    """The hooks of one model. `keep` gets every parameter's contribution as the backward pass meets it."""

    def __init__(self, model: nn.Module, keep: Keep | None = None) -> None:
        self.keep = keep
        self.measuring = False
        self.like = next(model.parameters())
        layers = [(name, module, rule_for(name, module)) for name, module in model.named_modules() if _owns_trainable(module)]
        _refuse_shared(model)
        self.handles = [module.register_forward_hook(self._hook(name, rule)) for name, module, rule in layers]

    def losses(self, compute: Callable[[], Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """Runs `compute`, a forward pass that returns losses [B]. Returns them and the probe for `norms`."""
        self.called: set[str] = set()
        self.probe_b = torch.zeros(samples, device=self.like.device, dtype=norm_dtype(self.like), requires_grad=True)
        return compute(), self.probe_b

    def norms(self, losses_b: Tensor, probe_b: Tensor, *, retain_graph: bool) -> Tensor:
        """Each sample's gradient norm over all layers, [B]."""
        self.measuring = True
        try:
            (squared_norms_b,) = torch.autograd.grad(losses_b.sum(), probe_b, retain_graph=retain_graph)
        finally:
            self.measuring = False
        return squared_norms_b.sqrt()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @torch.no_grad()
    def squared_norms(self, module: nn.Module, rule: Rule, inputs: Tensor, output_gradients: Tensor) -> Tensor:
        """Of one layer, over its trainable parameters, [B]."""
        total_b = torch.zeros_like(self.probe_b)
        for parameter, contribution in rule(module, inputs, output_gradients):
            if parameter.requires_grad:
                total_b = total_b + contribution.squared_norms()
                if self.keep is not None:
                    self.keep(parameter, contribution)
        return total_b

    def _hook(self, name: str, rule: Rule) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def probe_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            if name in self.called:
                raise CannotRunError(f"module {name} is called twice in one forward pass, which hooks on modules cannot add up")
            if output.shape[0] != len(self.probe_b):
                raise CannotRunError(f"module {name} gives {output.shape[0]} rows for {len(self.probe_b)} samples")
            self.called.add(name)
            return _Probe.apply(output, self.probe_b, self, module, rule, inputs[0].detach())

        return probe_output


class _Probe(torch.autograd.Function):
    """The identity on `output`; see the head of this file."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor, probes: Probes, module: nn.Module, rule: Rule, inputs: Tensor) -> Tensor:
        ctx.probes, ctx.module, ctx.rule, ctx.inputs = probes, module, rule, inputs
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.probes.measuring:
            return output_gradients, None, None, None, None, None
        squared_norms_b = ctx.probes.squared_norms(ctx.module, ctx.rule, ctx.inputs, output_gradients.detach())
        ctx.inputs = None  # autograd holds it as long as a second pass needs it
        return output_gradients, squared_norms_b, None, None, None, None


def _owns_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _refuse_shared(model: nn.Module) -> None:
    first_name: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and first_name.setdefault(parameter, name) != name:
            raise CannotRunError(f"{first_name[parameter]} and {name} are one parameter: hooks on modules see two")
