"""``ghost_cpu.cpp``: against loops in float64, at every vector width, and where float32 is not enough."""

from __future__ import annotations

import logging
import platform

import pytest
import torch
from flashnorm_compile.templates import _cpu
from flashnorm_compile.templates import ghost_norm as module
from helpers import FORMS, operand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

ghost_norm = torch.ops.flashnorm.ghost_norm
WIDTHS = {"avx512": (), "avx2": ("-mno-avx512f",), "sse": ("-mno-avx512f", "-mno-avx2", "-mno-avx")}
X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    if _cpu.ghost_norm_kernel() is None:
        pytest.skip("no C++ compiler")


def reach_of(g: Tensor, a: Tensor) -> Tensor:
    """[B] float64: ``sum_t |g_t| |a_t|``."""
    return (g.double().norm(dim=2) * a.double().norm(dim=2)).sum(1)


def exact(g: Tensor, a: Tensor) -> Tensor:
    return torch.einsum("btp,btd->bpd", g.double(), a.double()).square().sum((1, 2))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_equals_float64(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.one_of(st.sampled_from([1, 15, 16, 17, 1024, 1025]), st.integers(1, 80))
    batch, p, d = draw(st.integers(1, 4)), draw(sizes), draw(sizes)
    length = draw(st.one_of(st.sampled_from([1, 4, 8, 9, 512, 513, 521]), st.integers(1, 60)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    g, a = (operand((batch, length, width), dtype, draw(st.sampled_from(FORMS))) for width in (p, d))
    got, want, reach = ghost_norm(g, a).double(), exact(g, a), reach_of(g, a)
    # What is added for rounding is no more than stated, and covers what rounding took.
    assert (got >= want * (1 - 2**-24)).all()
    assert (got <= torch.maximum(want * (1 + 1.1 * module.DOUBTFUL), 1.001 * (module.CANCELLED * reach) ** 2)).all()


@pytest.mark.parametrize("flags", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.skipif(not X86, reason="vector widths of x86")
def test_every_vector_width(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    functions = _cpu._built("ghost_cpu.cpp", *flags)
    assert functions is not None
    monkeypatch.setattr(module, "cpu_kernel", lambda: functions[0])
    for length, p, d in ((1, 1, 1), (7, 3, 5), (37, 70, 33), (530, 20, 1100)):
        g, a = torch.randn(3, length, p), torch.randn(3, length, d)
        torch.testing.assert_close(ghost_norm(g, a).double(), exact(g, a), rtol=1e-3, atol=0)


def test_threads_change_nothing() -> None:
    g, a = torch.randn(3, 100, 40), torch.randn(3, 100, 70)
    threads, many = torch.get_num_threads(), ghost_norm(g, a)
    try:
        torch.set_num_threads(1)
        assert torch.equal(many, ghost_norm(g, a))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("g_scale", "a_scale"), [(1e-22, 1e22), (1e-30, 1e30), (1e25, 1e-25), (1e-13, 1e13), (1e-18, 1e19)])
def test_squares_that_float32_cannot_hold(g_scale: float, a_scale: float) -> None:
    """As where a layer that normalises follows one whose input is huge."""
    g, a = torch.randn(3, 50, 64) * g_scale, torch.randn(3, 50, 40) * a_scale
    g[1, ::2] = 0
    torch.testing.assert_close(ghost_norm(g, a).double(), exact(g, a), rtol=1e-4, atol=0)


def test_one_sample_that_cancels_is_taken_in_float64_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    g, a = torch.randn(3, 40, 9), torch.randn(3, 40, 7)
    g[1, 1::2] = -0.99 * g[1, ::2]
    a[1, 1::2] = a[1, ::2]
    again = []
    monkeypatch.setattr(module, "aten_ghost_norm", lambda g, a: again.append(len(g)) or exact(g, a).float())
    torch.testing.assert_close(ghost_norm(g, a).double(), exact(g, a), rtol=1e-4, atol=0)
    assert again == [1]


def test_what_is_not_finite_stays_so_and_touches_nobody_else() -> None:
    g, a = torch.randn(3, 40, 30), torch.randn(3, 40, 20)
    g[0, 3, 2], g[1, 5, 1] = float("nan"), float("inf")
    norms = ghost_norm(g, a)
    assert not norms[:2].isfinite().any()
    torch.testing.assert_close(norms[2:].double(), exact(g, a)[2:], rtol=1e-4, atol=0)


def test_without_a_compiler_it_is_float64(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no working compiler")

    monkeypatch.setattr(_cpu.CppCodeCache, "load", fail)
    with caplog.at_level(logging.WARNING):
        assert _cpu.ghost_norm_kernel.__wrapped__() is None
    assert "Ghost norms are computed by PyTorch instead" in caplog.text
    monkeypatch.setattr(module, "cpu_kernel", lambda: None)
    g, a = torch.randn(3, 40, 30), torch.randn(3, 40, 20)
    torch.testing.assert_close(ghost_norm(g, a).double(), exact(g, a), rtol=1e-6, atol=0)
