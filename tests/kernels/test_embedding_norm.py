"""``flashnorm::embedding_norm`` and ``flashnorm::tied_cross_term``: kernels in Triton's interpreter, ATen forms, operators."""

from __future__ import annotations

import pytest
import torch
from flashnorm_compile.templates import embedding_norm as module
from flashnorm_compile.templates import flash_norm as _flash  # noqa: F401  (registers the operator)
from flashnorm_compile.templates import tied_cross_term as tied
from flashnorm_compile.templates._triton import HOPPER, POINTERS, ceil_div, layout_of
from helpers import FORMS, interpret, operand, poisoned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

embedding_norm = torch.ops.flashnorm.embedding_norm
tied_cross_term = torch.ops.flashnorm.tied_cross_term
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RTOL = 1e-5
SWEEP = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def run(g: Tensor, index: Tensor, rows: int, padding: int, block_t: int, block_d: int, ranges: int, order: list[int]) -> Tensor:
    batch, length, d = g.shape
    ids, positions = module.sort_indices(index, rows)
    out = poisoned(batch, ceil_div(d, block_d), ranges, 2)
    interpret(
        module.embedding_norm_kernel,
        order,
        g,
        ids,
        positions,
        out,
        batch,
        length,
        d,
        padding,
        *g.stride(),
        block_t,
        block_d,
        ranges,
    )
    return out


@SWEEP
@given(data=st.data())
def test_embedding_kernel_equals_loops(data: st.DataObject) -> None:
    draw = data.draw
    batch, d = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    length = draw(st.one_of(st.sampled_from([1, 16, 32, 64]), st.integers(1, 90)))
    rows = draw(st.sampled_from([1, 2, 3, 7, 200]))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 1000)))
    g = operand((batch, length, d), dtype, draw(st.sampled_from(FORMS)))
    index = torch.randint(-rows, rows, (batch, length), dtype=draw(st.sampled_from([torch.int64, torch.int32])))
    padding = draw(st.integers(-1, rows - 1))
    order = draw(st.permutations(range(draw(st.integers(1, 4)))))
    out = run(g, index, rows, padding, 16, draw(st.sampled_from([16, 32])), draw(st.integers(1, 5)), order)
    exact = module.reference_embedding_norm(g, index, rows, padding)
    totals, reach = out.double().sum(2).unbind(2)
    torch.testing.assert_close(totals.sum(1), exact, rtol=RTOL, atol=0)
    norms = module._bounded(out).double()
    assert (norms >= exact * (1 - RTOL)).all()
    assert (norms <= torch.maximum(exact * (1 + RTOL), exact + (1.001 * module.CANCELLED * reach).square().sum(1))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_cancel_count_as_their_rounding(dtype: torch.dtype) -> None:
    g = torch.randn(2, 40, 12).to(dtype)
    g[:, 1::2] = -g[:, ::2]
    index = torch.randint(0, 9, (2, 20)).repeat_interleave(2, 1)
    least = (module.CANCELLED * g.double().norm(dim=2).sum(1)).square()
    assert not module.reference_embedding_norm(g, index, 9).any()
    kernel = module._bounded(run(g, index, 9, -1, 16, 16, 3, [1, 0]))
    for norms in (kernel, embedding_norm(g, index, 9)):
        torch.testing.assert_close(norms.double(), least, rtol=1e-4, atol=0)


def test_one_index_over_many_ranges_is_added_before_it_is_squared() -> None:
    g, index = torch.randn(1, 90, 5), torch.full((1, 90), 3)
    out = run(g, index, 4, -1, 16, 16, 5, [2, 0, 1])
    torch.testing.assert_close(out[0, 0, 0, 0], g.sum(1).square().sum(), rtol=RTOL, atol=0)
    assert not out[0, 0, 1:, 0].any()


@pytest.mark.parametrize("sizes", [(3, 7, 5), (1, 1, 1), (0, 4, 3), (2, 0, 3), (2, 4, 0)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_embedding_operator_takes_any_size(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, length, d = sizes
    g, index = torch.randn(batch, d, length, dtype=dtype).mT, torch.randint(-6, 6, (batch, length))
    norms = embedding_norm(g, index, 6, 2)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), module.reference_embedding_norm(g, index, 6, 2), rtol=RTOL, atol=0)
    torch.library.opcheck(embedding_norm.default, (g, index, 6, 2), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.flashnorm.sort_indices.default, (index, 6), test_utils=("test_schema", "test_faketensor"))


def test_aten_forms_in_parts_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    g, index, head, a = torch.randn(5, 30, 8), torch.randint(0, 12, (5, 30)), torch.randn(5, 20, 12), torch.randn(5, 20, 8)
    monkeypatch.setattr(module, "_CPU_CHUNK", 500)
    monkeypatch.setattr(tied, "_CPU_CHUNK", 300)
    monkeypatch.setattr(tied, "_CPU_ROWS", 7)
    torch.testing.assert_close(
        embedding_norm(g, index, 12).double(), module.reference_embedding_norm(g, index, 12), rtol=RTOL, atol=0
    )
    cross, size = tied_cross_term(g, index, head, a, 3)
    exact = tied.reference_tied_cross_term(g, index, head, a, 3)
    assert ((cross - exact).abs() <= RTOL * size).all()


def run_cross(
    h: Tensor, index: Tensor, g: Tensor, a: Tensor, padding: int, layouts: tuple[int, int], order: list[int], extra: int = 0
) -> Tensor:
    (batch, length, d), (heads, rows) = h.shape, g.shape[1:]
    down, across = ceil_div(length, 16) + extra, ceil_div(heads, 16) + extra
    out = poisoned(batch, down, across, 2)
    interpret(
        tied.cross_term_kernel, order, h, index, g, a, out, batch, length, heads, d, rows, padding, down, across, *index.stride(),
        *h.stride(), *g.stride(), *a.stride(), 16, 16, *layouts, "ieee",
    )  # fmt: skip
    return out


@SWEEP
@given(data=st.data())
def test_cross_term_kernel_equals_loops(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.one_of(st.sampled_from([1, 16, 17]), st.integers(1, 40))
    batch, length, heads, d, rows = draw(st.integers(1, 3)), draw(sizes), draw(sizes), draw(sizes), draw(st.integers(1, 30))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 1000)))
    h, g, a = (
        operand((batch, t, width), dtype, draw(st.sampled_from(FORMS))) for t, width in ((length, d), (heads, rows), (heads, d))
    )
    index = torch.randint(-rows, rows, (length, batch), dtype=draw(st.sampled_from([torch.int64, torch.int32]))).T
    padding = draw(st.integers(-1, rows - 1))
    layouts = tuple(draw(st.sampled_from(sorted({POINTERS, layout_of(x, HOPPER)}))) for x in (h, a))
    order = draw(st.permutations(range(draw(st.integers(1, 4)))))
    cross, size = run_cross(h, index, g, a, padding, layouts, order, draw(st.integers(0, 1))).double().sum((1, 2)).unbind(1)
    assert ((cross - tied.reference_tied_cross_term(h, index, g, a, padding)).abs() <= RTOL * size + 1e-30).all()
    exact_size = tied.aten_tied_cross_term(h, index, g, a, padding)[:, 1].double()
    torch.testing.assert_close(size, exact_size, rtol=1e-3, atol=1e-30)


def test_norm_of_a_tied_weight_is_the_sum_of_three_terms() -> None:
    h, index, g, a = torch.randn(3, 9, 6), torch.randint(0, 11, (3, 9)), torch.randn(3, 9, 11), torch.randn(3, 9, 6)
    parts = embedding_norm(h, index, 11) + torch.ops.flashnorm.flash_norm(g, a) + tied_cross_term(h, index, g, a)[0]
    for b in range(3):
        weight = torch.zeros(11, 6, dtype=torch.float64).index_add_(0, index[b], h[b].double())
        weight += g[b].double().T @ a[b].double()
        torch.testing.assert_close(parts[b].double(), weight.square().sum(), rtol=RTOL, atol=0)


@pytest.mark.parametrize(
    "sizes", [(3, 7, 4, 5, 6), (1, 1, 1, 1, 1), (0, 4, 3, 2, 5), (2, 0, 3, 2, 5), (2, 4, 0, 2, 5), (2, 4, 3, 0, 5)]
)
def test_cross_term_operator_takes_any_size(sizes: tuple[int, int, int, int, int]) -> None:
    batch, length, heads, d, rows = sizes
    arguments = torch.randn(batch, length, d), torch.randint(0, rows, (batch, length)), torch.randn(batch, heads, rows)
    cross, size = tied_cross_term(*arguments, torch.randn(batch, heads, d), 0)
    assert cross.dtype == size.dtype == torch.float32
    assert cross.shape == size.shape == (batch,)
    arguments = (*arguments, torch.randn(batch, heads, d))
    torch.library.opcheck(tied_cross_term.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    g, index = torch.randn(2, 3, 4), torch.randint(0, 5, (2, 3))
    with pytest.raises(TypeError, match=r"embedding_norm got indices of dtype torch.float32; it needs int64 or int32"):
        embedding_norm(g, index.float(), 5)
    with pytest.raises(ValueError, match=r"embedding_norm got g_btd of shape \(2, 3, 4\) and index_bt of shape \(2, 2\)"):
        embedding_norm(g, index[:, :2], 5)
    with pytest.raises(ValueError, match=r"tied_cross_term got h_btd of shape \(2, 3, 4\) and a_bsd of shape \(2, 6, 5\)"):
        tied_cross_term(g, index, torch.randn(2, 6, 5), torch.randn(2, 6, 5))
