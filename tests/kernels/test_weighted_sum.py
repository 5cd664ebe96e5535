"""``flashnorm::weighted_sum`` and its form with the noise: kernel in Triton's interpreter, ATen, and Inductor's code for a CPU."""

from __future__ import annotations

import pytest
import torch
from eager import interpreted_launches
from flashnorm_compile.templates import noise_triton, weighted_sum
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code

ops = torch.ops.flashnorm
KEYS = torch.tensor([[0x0123456789ABCDEF, 7], [-3, -(1 << 40)]])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = noise_triton.NoiseTile(counters=16)
RTOL, ATOL = 1e-6, 4e-6


def problem(batch: int, shape: tuple[int, ...], dtype: torch.dtype, dropped: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients inside a larger block of NaN, and factors; dropped samples hold NaN and Inf and have factor 0."""
    memory = torch.full((batch + 1, *shape), float("nan"), dtype=dtype)
    memory[:batch] = torch.randn(batch, *shape)
    factors = torch.rand(batch) + 0.01
    for b, drop in zip(range(batch), dropped, strict=False):
        if drop:
            memory[b], factors[b] = (float("nan") if b % 2 else float("inf")), 0
    return memory[:batch], factors


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    batch=st.integers(0, 5), shape=st.sampled_from([(1,), (65,), (3, 50), (4, 0), ()]), dtype=st.sampled_from(DTYPES),
    dropped=st.lists(st.booleans(), min_size=5, max_size=5), std=st.sampled_from([0.0, 0.7]), row=st.integers(0, 1),
    permuted=st.booleans(), out_dtype=st.sampled_from([None, torch.bfloat16, torch.float32]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_form_is_the_sum_and_the_noise(
    batch: int, shape: tuple[int, ...], dtype: torch.dtype, dropped: list[bool], std: float, row: int, permuted: bool,
    out_dtype: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    w, factors = problem(batch, shape, dtype, dropped)
    if permuted and len(shape) == 2:
        w = w.mT
    level = torch.tensor(std)
    total = weighted_sum.reference(w, factors)
    expected = ops.add_noise(total, KEYS, level, row)
    torch.testing.assert_close(ops.weighted_sum(w, factors).double(), total, rtol=RTOL, atol=ATOL)
    rtol = torch.finfo(out_dtype).eps if out_dtype == torch.bfloat16 else RTOL
    with interpreted_launches(seed):
        kernel = noise_triton.weighted_sum_noise_triton(w, factors, KEYS, level, row, out_dtype, tile=SMALL)
    for found in (kernel, ops.weighted_sum_noise(w, factors, KEYS, level, row, out_dtype)):
        assert found.dtype == (out_dtype or torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=ATOL)


def test_float64_stays_float64() -> None:
    w, factors = torch.randn(3, 7, dtype=torch.float64), torch.rand(3)
    assert ops.weighted_sum(w, factors).dtype == torch.float64
    torch.testing.assert_close(ops.weighted_sum(w, factors), weighted_sum.reference(w, factors), rtol=1e-14, atol=1e-14)
    assert ops.weighted_sum_noise(w, factors, KEYS, torch.tensor(0.5), 0).dtype == torch.float64


def test_sum_spans_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    w, factors = problem(3, (50,), torch.bfloat16, [False, True])
    whole = ops.weighted_sum(w, factors)
    monkeypatch.setattr(weighted_sum, "_CPU_COLUMNS", 8)
    assert torch.equal(ops.weighted_sum(w, factors), whole)


def test_operators_are_declared_correctly() -> None:
    w, factors = torch.randn(3, 4, 5), torch.rand(3)
    torch.library.opcheck(ops.weighted_sum.default, (w, factors), test_utils=("test_schema", "test_faketensor"))
    arguments = (w, factors, KEYS, torch.tensor(0.5), 1, torch.bfloat16)
    torch.library.opcheck(ops.weighted_sum_noise.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    w = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"shape \(2,\) for 3 samples; it needs float32 \[B\]"):
        ops.weighted_sum(w, torch.ones(2))
    with pytest.raises(ValueError, match=r"torch.view_as_real"):
        ops.weighted_sum(w.to(torch.complex64), torch.ones(3))
    with pytest.raises(ValueError, match=r"0 <= row < P"):
        ops.weighted_sum_noise(w, torch.ones(3), KEYS, torch.tensor(1.0), 2)


def test_inductor_fuses_the_sum_and_calls_one_kernel_for_sum_and_noise() -> None:
    def step(w: Tensor, factors: Tensor, keys: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        return ops.weighted_sum(w * 2, factors) + 1, ops.weighted_sum_noise(w, factors, keys, std, 1)

    w, factors = problem(4, (9, 11), torch.bfloat16, [False, True])
    inputs = w, factors, KEYS, torch.tensor(0.3)
    with torch._inductor.config.patch(force_disable_caches=True):
        results, (code,) = run_and_get_code(torch.compile(step), *inputs)
        _, (permuted,) = run_and_get_code(torch.compile(lambda *given: step(*given)[1]), w.mT, *inputs[1:])
    assert "flashnorm.weighted_sum.default(" not in code
    assert code.count("flashnorm.weighted_sum_noise.default(") == 1
    torch.testing.assert_close(results, step(*inputs), rtol=1e-5, atol=ATOL)
    # Samples that are not contiguous would be copied for the kernel: Inductor's own sum reads them as they lie.
    assert permuted.count("flashnorm._add_noise_into.default(") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_kernel_for_a_cpu_adds_any_number_of_samples(dtype: torch.dtype) -> None:
    """More samples than it adds at a time, tiles that end early, samples apart from each other, parts of a larger tensor."""
    parts = torch.cat([KEYS, torch.tensor([[5, 100, 250], [0, 9, 10]])], 1)
    for batch, size in ((1, 5000), (6, 4097), (11, 33)):
        w = torch.randn(2 * batch, size).to(dtype)[::2]
        factors = torch.rand(batch) * (torch.rand(batch) > 0.3)
        for keys in (KEYS, parts):
            expected = ops.add_noise(weighted_sum.reference(w, factors), keys, torch.tensor(0.7), 1)
            found = ops.weighted_sum_noise(w, factors, keys, torch.tensor(0.7), 1, torch.float64)
            torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)
