"""The architectures of `benchmarks/models` that have a mirror in JAX, on the weights of the PyTorch model.

JAX runs no PyTorch model, so each has to be written a second time. A mirror is a function of the weights by PyTorch's names
and of the inputs. Imported by `jax_privacy.py` alone, once JAX is known to be there.

Dimensions: B samples, T tokens, V vocabulary, D width, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.case import Problem, class_cross_entropy, token_cross_entropy
from benchmarks.contenders.base import CannotRunError
from benchmarks.models.gpt import GPT
from benchmarks.models.mlp import MLP

Array = Any
Weights = Mapping[str, Array]
Model = Callable[..., Array]
Loss = Callable[[Array, Array], Array]


def mirror(problem: Problem) -> Callable[..., Array]:
    """`f(weights, *inputs, targets)`, the mean loss in JAX. Raises CannotRunError for other models and losses."""
    model, loss = _model(problem.model), _loss(problem)

    def mean_loss(weights: Weights, *batch: Array) -> Array:
        *inputs, targets = batch
        return loss(model(weights, *inputs), targets).mean()

    return mean_loss


def _model(model: nn.Module) -> Model:
    if type(model) is MLP:
        return _mlp(model)
    if type(model) is GPT:
        return _gpt(model)
    raise CannotRunError(f"JAX runs no PyTorch model, and of the bench's only MLP and GPT are mirrored; got {type(model).__name__}")


def _loss(problem: Problem) -> Loss:
    """By identity; a mean squared error by its values, since each suite makes its own function of it."""
    if problem.loss in (token_cross_entropy, class_cross_entropy):
        return _cross_entropy
    targets = problem.targets
    if targets.is_floating_point():
        outputs = torch.randn_like(targets)
        expected_b = F.mse_loss(outputs, targets, reduction="none").flatten(1).mean(1)
        if torch.allclose(problem.loss(outputs, targets), expected_b):
            return _squared_error
    raise CannotRunError("the loss has no mirror in JAX: there are cross-entropy over classes or tokens, and mean squared error")


def _squared_error(outputs: Array, targets: Array) -> Array:
    errors = jnp.square(outputs - targets)
    return errors.reshape(errors.shape[0], -1).mean(1)


def _cross_entropy(logits: Array, targets: Array) -> Array:
    """[B, V] and [B], or [B, T, V] and [B, T] -> [B]."""
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return losses.reshape(losses.shape[0], -1).mean(1)


def _mlp(model: MLP) -> Model:
    layers, activated = len(model.layers), isinstance(model.between, nn.ReLU)

    def apply(weights: Weights, x: Array) -> Array:
        for i in range(layers):
            x = _linear(weights, f"layers.{i}", x)
            if activated and i < layers - 1:
                x = jax.nn.relu(x)
        return x

    return apply


def _gpt(model: GPT) -> Model:
    layers, heads = len(model.blocks), model.blocks[0].heads

    def block(weights: Weights, name: str, x_btd: Array) -> Array:
        normed_btd = _layer_norm(weights, f"{name}.attention_norm", x_btd)
        qkv = _linear(weights, f"{name}.qkv", normed_btd).reshape(*x_btd.shape[:2], 3, heads, -1)
        q_bthk, k_bthk, v_bthk = (qkv[:, :, i] for i in range(3))
        mixed_bthk = jax.nn.dot_product_attention(q_bthk, k_bthk, v_bthk, is_causal=True)
        x_btd = x_btd + _linear(weights, f"{name}.attention_out", mixed_bthk.reshape(x_btd.shape))
        hidden = _linear(weights, f"{name}.mlp.0", _layer_norm(weights, f"{name}.mlp_norm", x_btd))
        return x_btd + _linear(weights, f"{name}.mlp.2", jax.nn.gelu(hidden, approximate=True))

    def apply(weights: Weights, tokens_bt: Array) -> Array:
        embedding_vd = weights["token_embedding.weight"]
        x_btd = embedding_vd[tokens_bt] + weights["position_embedding.weight"][: tokens_bt.shape[1]]
        for i in range(layers):
            x_btd = block(weights, f"blocks.{i}", x_btd)
        return _layer_norm(weights, "final_norm", x_btd) @ weights.get("head.weight", embedding_vd).T

    return apply


def _linear(weights: Weights, name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _layer_norm(weights: Weights, name: str, x: Array, eps: float = 1e-5) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]
