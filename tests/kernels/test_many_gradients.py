"""``squared_norms`` and ``weighted_sums_noise``: kernels in Triton's interpreter and compiled, ATen forms, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from eager import interpreted_launches
from flashnorm_compile.templates import many_gradients, many_triton, noise_triton, weighted_sum
from helpers import TRITON_NAMES, compile_source, device_of_capability
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.compiler import ASTSource

ops = torch.ops.flashnorm
KEYS = torch.tensor([[0x0123456789ABCDEF, 7], [-3, -(1 << 40)], [5, 6], [1, 1]])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = noise_triton.NoiseTile(counters=16)
RTOL, ATOL = 1e-6, 4e-6
SHAPES = st.sampled_from([(1,), (65,), (3, 50), (4, 0), (), (256,), (17, 16), (19, 61)])


def problem(batch: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, drop: bool) -> tuple[list[Tensor], Tensor, list[int]]:
    """Gradients inside larger blocks of NaN, factors [4, B], and rows; a dropped sample holds NaN and Inf and has factor 0."""
    grads = []
    for k, shape in enumerate(shapes):
        memory = torch.full((batch + 1, *shape), float("nan"), dtype=dtype)
        memory[:batch] = torch.randn(batch, *shape)
        if drop and batch:
            memory[0] = float("nan") if k % 2 else float("inf")
        grads.append(memory[:batch])
    factors = torch.rand(4, batch) + 0.01
    if drop and batch:
        factors[:, 0] = 0
    return grads, factors, [(3 * k + 1) % 4 for k in range(len(shapes))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    batch=st.integers(0, 4), shapes=st.lists(SHAPES, min_size=1, max_size=4), dtype=st.sampled_from(DTYPES), drop=st.booleans(),
    std=st.sampled_from([0.0, 0.7]), out_dtype=st.sampled_from([torch.bfloat16, torch.float32]), seed=st.integers(0, 99),
)  # fmt: skip
def test_sums_and_noise_are_those_of_each(
    batch: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, drop: bool, std: float, out_dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    grads, factors, rows = problem(batch, shapes, dtype, drop)
    level = torch.tensor(std)
    with interpreted_launches(seed):
        kernel = many_triton.weighted_sums_noise(grads, factors, KEYS, level, rows, out_dtype, tile=SMALL)
    composed = ops.weighted_sums_noise(grads, factors, KEYS, level, rows, out_dtype)
    for k, (grad, row) in enumerate(zip(grads, rows, strict=True)):
        expected = ops.add_noise(weighted_sum.reference(grad, factors[row]), KEYS, level, row)
        rtol = torch.finfo(out_dtype).eps if out_dtype == torch.bfloat16 else RTOL
        for found in (kernel[k], composed[k]):
            assert found.dtype == out_dtype
            torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=ATOL)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    batch=st.integers(0, 4), shapes=st.lists(SHAPES, min_size=1, max_size=4), dtype=st.sampled_from(DTYPES),
    chunk=st.sampled_from([16, 64, 1024]), seed=st.integers(0, 99),
)  # fmt: skip
def test_norms_of_each(batch: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, chunk: int, seed: int) -> None:
    torch.manual_seed(seed)
    grads, _, _ = problem(batch, shapes, dtype, drop=False)
    exact = torch.stack(
        [grad.double().reshape(batch, -1).square().sum(1) if grad.numel() else torch.zeros(batch) for grad in grads]
    )
    with interpreted_launches(seed):
        found = many_triton.squared_norms(grads, chunk, block=16)
    for norms in (found, ops.squared_norms(grads)):
        torch.testing.assert_close(norms.double(), exact.double(), rtol=1e-5, atol=0)


def test_more_gradients_than_a_launch_takes() -> None:
    grads, factors, rows = problem(2, [(5,), (33,)] * (many_gradients.AT_ONCE // 2 + 1), torch.float32, drop=True)
    arguments = grads, factors, KEYS, torch.tensor(0.3), rows, torch.float32
    with interpreted_launches():
        outs = many_gradients.weighted_sums_noise_triton(*arguments)
        norms = many_gradients.squared_norms_triton([grad[1:] for grad in grads])
    torch.testing.assert_close(outs, ops.weighted_sums_noise(*arguments), rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(norms, ops.squared_norms([grad[1:] for grad in grads]))


def test_operators_are_declared_correctly() -> None:
    grads, factors, rows = problem(3, [(4, 5), (), (7,)], torch.float32, drop=False)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.squared_norms.default, (grads,), test_utils=utils)
    arguments = (grads, factors, KEYS, torch.tensor(0.5), rows, torch.bfloat16)
    torch.library.opcheck(ops.weighted_sums_noise.default, arguments, test_utils=utils)


def test_what_does_not_fit_is_refused() -> None:
    grads, factors, rows = problem(3, [(4,), (5,)], torch.float32, drop=False)
    with pytest.raises(ValueError, match="of one type and number of samples"):
        ops.squared_norms([grads[0], grads[1][:2]])
    with pytest.raises(ValueError, match=r"needs float32 \[P, B\] and a row for each"):
        ops.weighted_sums_noise(grads, factors[0], KEYS, torch.tensor(0.5), rows, torch.float32)


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_compile_without_spills_and_load_vectors(dtype: torch.dtype, capability: int) -> None:
    count, sizes = 64, (1000, 768 * 3072) * 32
    pointers = ("*" + TRITON_NAMES[dtype],) * count
    common = {"SIZES": sizes, "ROWS": tuple(range(count)), "COUNT": count, "EVEN": True}
    norms = {"STARTS": many_triton.tiles_of(sizes, 16384), "CHUNK": 16384, "BLOCK": many_triton.block_of(dtype), **common}
    counters = noise_triton.TILE.counters
    drawn = {"PARTS": False, "COUNTERS": counters, "GENERATOR": noise_triton.PHILOX.value}
    tiles = many_triton.TILES
    sums = {"STARTS": many_triton.tiles_of(sizes, 4 * counters * tiles), "TILES": tiles, **drawn, **common}
    scalars = ("batch", "slots", "factor_row", "factor_stride", "key_stride", "word_stride")
    types = {
        "grads": pointers,
        "outs": pointers,
        "out_ptr": "*fp32",
        "partials": "*fp32",
        "counters": "*i32",
        "factors_ptr": "*fp32",
        "keys_ptr": "*i64",
        "std_ptr": "*fp32",
    }
    for kernel, constants in ((many_triton.squared_norms_kernel, norms), (many_triton.weighted_sums_noise_kernel, sums)):
        names = [parameter.name for parameter in kernel.params]
        signature = {n: "constexpr" if n in constants else "i32" if n in scalars else types[n] for n in names}
        made = compile_source(ASTSource(kernel, signature, constants, {}), capability, many_triton.WARPS, 3)
        assert made.stack == 0
        assert made.shared <= device_of_capability(capability).shared_bytes
        assert "ld.global.v" in made.ptx, "loads of several elements"
        assert made.registers <= 64, "eight programs share a multiprocessor"
        if kernel is many_triton.weighted_sums_noise_kernel:
            assert made.shared == 0, "noise is drawn by the thread that adds it"
