"""Gradients, sums and noise on a CUDA device, called and compiled, against loops in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flashnorm_compile.templates import clipped_sum, clipped_sums, many_gradients, noise, per_layer, weight_grads, weighted_sum  # noqa: F401
from helpers import FORMS, on_device, operand
from torch import Tensor

pytestmark = pytest.mark.cuda
ops = torch.ops.flashnorm
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Long and one sample, odd, one column, few positions (rows of different samples share a step), and a small layer of many samples.
SHAPES = [(1, 4096, 136, 72), (3, 101, 77, 55), (2, 300, 129, 1), (37, 3, 64, 80), (64, 196, 128, 64)]
KEYS = torch.tensor([[0x0123456789ABCDEF, 7], [-3, -(1 << 40)], [5, 6], [1, 1]])
# Where these parts begin in the whole tensor, and how its rows go on.
PARTS = torch.tensor([[5, 7, 3, 40, 64], [-3, 1 << 33, 1 << 33, 40, 41], [1, 1, *noise.WHOLE], [2, 2, 0, 1, 9]])
ATOL = 4e-6


@pytest.fixture(params=[False, True], ids=["called", "compiled"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls an operator as it is, or compiled by Inductor."""

    def run(operator: Any, *args: Any) -> Any:
        def call(*tensors: Tensor) -> Any:
            given = iter(tensors)
            return operator(*(next(given) if isinstance(arg, Tensor) else arg for arg in args))

        torch._dynamo.reset()
        return (torch.compile(call, fullgraph=True) if request.param else call)(*(arg for arg in args if isinstance(arg, Tensor)))

    return run


def factors_of(*operands: Tensor) -> Tensor:
    """Factors for each sample; the last is dropped, and holds NaN and Inf where each sample has memory of its own."""
    factors = torch.rand(operands[0].shape[0]) + 0.01
    if len(factors) > 1 and all(x.stride(0) for x in operands):
        factors[-1] = 0
        for x, value in zip(operands, (float("nan"), float("inf")), strict=False):
            x[-1] = value
    return factors


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found.cpu().double(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_clipped_sums(shape: tuple[int, int, int, int], dtype: torch.dtype, form: str, run: Callable[..., Any]) -> None:
    batch, length, p, d = shape
    g, a = operand((batch, length, p), dtype, form), operand((batch, length, d), dtype, form)
    factors = factors_of(g, a)
    found = run(ops.clipped_sum, on_device(g), on_device(a), factors.cuda())
    scaled = torch.where((factors != 0)[:, None, None], g.double() * factors.double()[:, None, None], 0)
    kept = torch.where((factors != 0)[:, None, None], a.double(), 0)
    assert_close(found, torch.einsum("btp,btd->pd", scaled, kept))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 40, 256, 384)])
def test_clipped_sums_of_several_products(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, length, p, d = shape
    gs, a_s = ([torch.randn(batch, length, width).to(dtype) for _ in range(40)] for width in (p, d))
    factors = torch.rand(3, batch) + 0.01
    if batch > 1:
        factors[:, -1] = 0
        for g in gs:
            g[-1] = float("nan")
    rows = [(5 * k + 1) % 3 for k in range(40)]
    found = ops.clipped_sums([g.cuda() for g in gs], [a.cuda() for a in a_s], factors.cuda(), rows)
    for total, g, a, row in zip(found, gs, a_s, rows, strict=True):
        scaled = torch.where((factors[row] != 0)[:, None, None], g.double() * factors[row].double()[:, None, None], 0)
        assert_close(total, torch.einsum("btp,btd->pd", scaled, a.double()))


@pytest.mark.parametrize("store", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_samples(
    shape: tuple[int, int, int, int], dtype: torch.dtype, store: torch.dtype | None, run: Callable[..., Any]
) -> None:
    batch, length, p, d = shape
    for form in ("contiguous", "transposed", "odd rows"):
        g, a = operand((batch, length, p), dtype, form), operand((batch, length, d), dtype, form)
        grads, norms = run(ops.weight_grads, on_device(g), on_device(a), store)
        assert grads.dtype == (store or torch.float32)
        exact = torch.einsum("btp,btd->bpd", g.double(), a.double())
        assert_close(grads, exact, torch.finfo(torch.bfloat16).eps if store else 1e-5)
        torch.testing.assert_close(norms.cpu().double(), grads.cpu().double().square().sum((1, 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("constant", [None, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_clipped_by_themselves(
    shape: tuple[int, int, int, int], dtype: torch.dtype, constant: float | None, run: Callable[..., Any]
) -> None:
    batch, length, p, d = shape
    g, a = torch.randn(batch, length, p).to(dtype), torch.randn(batch, length, d).to(dtype)
    if batch > 1:
        g[-1] = float("nan")
    bound = (length * p * d) ** 0.5
    total, norms = run(ops.per_layer, g.cuda(), a.cuda(), torch.tensor(bound).cuda(), torch.tensor(0.25).cuda(), constant)
    exact = torch.einsum("btp,btd->bpd", g.double(), a.double())
    sizes = exact.square().sum((1, 2))
    factors = 0.25 * (bound / (sizes.sqrt() + constant) if constant else (bound / sizes.sqrt()).clamp(max=1))
    assert_close(total, torch.where(sizes.isfinite()[:, None, None], exact * factors[:, None, None], 0).sum(0))
    assert torch.equal(norms.isfinite().cpu(), sizes.isfinite())
    torch.testing.assert_close(norms.cpu().double(), sizes, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("keys", [KEYS, PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize("std", [0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_that_of_a_cpu(dtype: torch.dtype, std: float, keys: Tensor, run: Callable[..., Any]) -> None:
    level = torch.tensor(std)
    for shape in ((300, 40), (1 << 17, 9), (7,), ()):
        value = torch.randn(shape).to(dtype)
        for row in range(len(keys)):
            exact = noise.reference_add_noise(value.float(), keys, level, row)
            noised = run(ops.add_noise, value.cuda(), keys.cuda(), level.cuda(), row)
            torch.testing.assert_close(noised.cpu(), exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=ATOL)
            if std == 0:
                assert torch.equal(noised.cpu(), value)


@pytest.mark.parametrize("keys", [KEYS, PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_norms_of_stored_gradients(dtype: torch.dtype, keys: Tensor, run: Callable[..., Any]) -> None:
    level, rows = torch.tensor(0.7), [3, 0, 2, 1, 1, 0]
    grads = [torch.randn(3, *shape).to(dtype) for shape in ((40,), (50257, 8), (1,), (400, 1000), (64, 40), ())]
    factors = torch.rand(4, 3) + 0.01
    factors[:, 1] = 0
    for grad in grads:
        grad[1] = float("nan")
    found = [grad.cuda() for grad in grads]
    sums = run(_weighted_sums_noise, *found, factors.cuda(), keys.cuda(), level.cuda(), rows)
    norms = run(_squared_norms, *found)
    for k, (grad, row) in enumerate(zip(grads, rows, strict=True)):
        exact = noise.reference_add_noise(weighted_sum.reference(grad, factors[row]), keys, level, row)
        torch.testing.assert_close(sums[k].cpu().double(), exact, rtol=1e-5, atol=ATOL)
        one = run(ops.weighted_sum_noise, grad.cuda(), factors[row].cuda(), keys.cuda(), level.cuda(), row)
        torch.testing.assert_close(one.cpu().double(), exact, rtol=1e-5, atol=ATOL)
        size = grad.double().flatten(1).square().sum(1) if grad.dim() > 1 else grad.double().square()
        torch.testing.assert_close(norms[k].cpu().double(), size, rtol=1e-5, atol=0, equal_nan=True)


def _weighted_sums_noise(*args: Any) -> list[Tensor]:
    *grads, factors, keys, std, rows = args
    found: list[Tensor] = ops.weighted_sums_noise(grads, factors, keys, std, rows, torch.float32)
    return found


def _squared_norms(*grads: Tensor) -> Tensor:
    norms: Tensor = ops.squared_norms(list(grads))
    return norms
