"""``flashnorm::ghost_norm``: the kernel in Triton's interpreter, the ATen form and the operator against loops in float64."""

from __future__ import annotations

import pytest
import torch
from flashnorm_compile.templates import ghost_norm as module
from flashnorm_compile.templates._triton import HOPPER, POINTERS, ceil_div, layout_of
from helpers import FORMS, interpret, operand, poisoned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

ghost_norm = torch.ops.flashnorm.ghost_norm
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RTOL = 1e-5


def reach_of(g: Tensor, a: Tensor) -> Tensor:
    """[B] float64: ``sum_t |g_t| |a_t|``."""
    return (g.double().norm(dim=2) * a.double().norm(dim=2)).sum(1)


def run(g: Tensor, a: Tensor, block: int, layouts: tuple[int, int], order: list[int], slots: int | None = None) -> Tensor:
    batch, length, p = g.shape
    blocks = ceil_div(length, block)
    slots = slots or max(1, blocks * (blocks + 1) // 2)
    out = poisoned(batch, slots, 4)
    interpret(
        module.ghost_norm_kernel, order, g, a, out, batch, length, p, a.shape[2], slots, *g.stride(), *a.stride(),
        block, 16, *layouts, "ieee",
    )  # fmt: skip
    return out


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_kernel_equals_loops(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.one_of(st.sampled_from([1, 16, 17]), st.integers(1, 40))
    batch, p, d = draw(st.integers(1, 3)), draw(sizes), draw(sizes)
    length = draw(st.one_of(st.sampled_from([0, 1, 48, 64]), st.integers(1, 100)))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 1000)))
    g, a = (operand((batch, length, width), dtype, draw(st.sampled_from(FORMS))) for width in (p, d))
    layouts = tuple(draw(st.sampled_from(sorted({POINTERS, layout_of(x, HOPPER)}))) if length else POINTERS for x in (g, a))
    order = draw(st.permutations(range(draw(st.integers(1, 4)))))
    out = run(g, a, draw(st.sampled_from([16, 32])), layouts, order)
    reach = reach_of(g, a)
    torch.testing.assert_close(out[:, :, 1].double().sum(1), reach, rtol=RTOL, atol=0)
    exact, got = module.reference_ghost_norm(g, a), module._bounded(out).double()
    # What is added for rounding is no more than stated, and covers what rounding took.
    assert (got >= exact).all()
    assert (got <= torch.maximum(exact + 2 * module.ROUNDING * reach**2, 1.001 * (module.CANCELLED * reach) ** 2)).all()


@pytest.mark.parametrize("blocks", range(1, 10))
def test_every_pair_of_tiles_is_visited_once(blocks: int) -> None:
    even = 1 - blocks % 2
    visited = []
    for index in range(blocks * (blocks + 1) // 2):
        q, column = divmod(index, blocks + even)
        visited.append((q, q + column) if column < blocks - q else (blocks - even - q, column - even))
    assert sorted(visited) == [(i, j) for i in range(blocks) for j in range(i, blocks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_that_cancel_count_as_their_rounding(dtype: torch.dtype) -> None:
    g, a = torch.randn(2, 40, 9).to(dtype), torch.randn(2, 40, 7).to(dtype)
    g[:, 1::2], a[:, 1::2] = -g[:, ::2], a[:, ::2]
    least = (module.CANCELLED * reach_of(g, a)).square()
    assert (module.reference_ghost_norm(g, a) < 1e-12 * least).all()
    kernel = module._bounded(run(g, a, 16, (POINTERS, POINTERS), [0, 1]))
    for norms in (kernel, ghost_norm(g, a)):
        torch.testing.assert_close(norms.double(), least, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("g_scale", "a_scale"), [(1e-22, 1e18), (1e-30, 1e15), (1e18, 1e-22)])
def test_squares_that_float32_cannot_hold(g_scale: float, a_scale: float) -> None:
    """As where a layer that normalises follows one whose input is huge. Rows of zeros cost nothing."""
    g, a = torch.randn(3, 40, 9) * g_scale, torch.randn(3, 40, 7) * a_scale
    g[1], a[2, 3:] = 0, 0
    got = module._bounded(run(g, a, 16, (POINTERS, POINTERS), [0, 1])).double()
    assert (got >= module.reference_ghost_norm(g, a)).all()
    g[0] = torch.randn(40, 9)
    g[0, 5:], a[0] = 0, torch.randn(40, 7)
    got, exact = module._bounded(run(g, a, 16, (POINTERS, POINTERS), [0, 1])).double(), module.reference_ghost_norm(g, a)
    torch.testing.assert_close(got[0], exact[0], rtol=RTOL, atol=0)


def test_slots_beyond_the_pairs_are_zero() -> None:
    g, a = torch.randn(2, 20, 5), torch.randn(2, 20, 6)
    out = run(g, a, 32, (POINTERS, POINTERS), [1, 0], slots=3)
    assert not out[:, 1:].any()


def test_not_finite_stays_not_finite() -> None:
    g, a = torch.randn(2, 40, 5), torch.randn(2, 40, 6)
    g[0, 3, 4] = float("nan")
    norms = module._bounded(run(g, a, 16, (POINTERS, POINTERS), [0, 1]))
    assert not norms[0].isfinite()
    assert norms[1].isfinite()


@pytest.mark.parametrize("sizes", [(3, 7, 5, 4), (1, 1, 1, 1), (0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_operator_takes_any_size(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, length, p, d = sizes
    g, a = torch.randn(batch, length, p, dtype=dtype), torch.randn(batch, d, length, dtype=dtype).mT
    norms = ghost_norm(g, a)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), module.reference_ghost_norm(g, a), rtol=RTOL, atol=0)
    torch.library.opcheck(ghost_norm.default, (g, a), test_utils=("test_schema", "test_faketensor"))


def test_aten_form_in_parts_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    g, a = torch.randn(5, 30, 8), torch.randn(5, 30, 9)
    monkeypatch.setattr(module, "_CPU_CHUNK", 200)
    monkeypatch.setattr(module, "_CPU_ROWS", 7)
    torch.testing.assert_close(module.aten_ghost_norm(g, a).double(), module.reference_ghost_norm(g, a), rtol=RTOL, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    g, a = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    with pytest.raises(TypeError, match=r"ghost_norm got g_btp of dtype torch.float32 and a_btd of dtype torch.float16"):
        ghost_norm(g, a.half())
    with pytest.raises(ValueError, match=r"ghost_norm got g_btp of shape \(1, 3, 4\) and a_btd of shape \(2, 3, 5\)"):
        ghost_norm(g[:1], a)
