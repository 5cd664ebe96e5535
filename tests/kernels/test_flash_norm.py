"""``flashnorm::flash_norm``: the kernel in Triton's interpreter, the ATen form and the operator against loops in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flashnorm_compile.templates import flash_norm as module
from flashnorm_compile.templates._flash_tiles import Choice, Tiles, tile_choices
from flashnorm_compile.templates._triton import COLUMNS, HOPPER, POINTERS, ROWS, ceil_div, layout_of
from helpers import FORMS, interpret, operand, poisoned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

flash_norm = torch.ops.flashnorm.flash_norm
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Products of the inputs are exact in float32, and sums of a few hundred of them lose no more than this.
RTOL = 1e-5


def run(g: Tensor, a: Tensor, tiles: Tiles, layouts: tuple[int, int], order: list[int], slots: int | None = None) -> Tensor:
    batch, length, p = g.shape
    d = a.shape[2]
    slots = slots or ceil_div(p, tiles.BLOCK_P) * ceil_div(d, tiles.BLOCK_D)
    out = poisoned(batch, slots)
    partials = poisoned(batch * slots * tiles.SPLIT * tiles.BLOCK_P * tiles.BLOCK_D)
    counters = torch.zeros(batch * slots, dtype=torch.int32)
    interpret(
        module.flash_norm_kernel, order, g, a, out, partials, counters, batch, length, p, d, slots, *g.stride(), *a.stride(),
        tiles.BLOCK_P, tiles.BLOCK_D, tiles.BLOCK_T, tiles.SPLIT, *layouts, "ieee",
    )  # fmt: skip
    assert not counters.any()
    return out


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_kernel_equals_loops(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.one_of(st.sampled_from([1, 16, 32, 33]), st.integers(1, 40))
    batch, length, p, d = draw(st.integers(1, 3)), draw(st.one_of(st.just(0), sizes)), draw(sizes), draw(sizes)
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 1000)))
    g, a = (operand((batch, length, width), dtype, draw(st.sampled_from(FORMS))) for width in (p, d))
    edge = st.sampled_from([16, 32])
    tiles = Tiles(draw(edge), draw(edge), 16, 4, 2, SPLIT=draw(st.integers(1, 4)))
    layouts = tuple(draw(st.sampled_from(sorted({POINTERS, layout_of(x, HOPPER)}))) if length else POINTERS for x in (g, a))
    order = draw(st.permutations(range(draw(st.integers(1, 5)))))
    out = run(g, a, tiles, layouts, order)
    torch.testing.assert_close(out.double().sum(1), module.reference_flash_norm(g, a), rtol=RTOL, atol=0)
    assert torch.equal(out, run(g, a, tiles, layouts, sorted(order)))


def test_forms_reach_every_layout() -> None:
    found = {form: layout_of(operand((2, 16, 16), torch.bfloat16, form), HOPPER) for form in FORMS}
    assert found == {
        "contiguous": ROWS, "transposed": COLUMNS, "padded": ROWS, "odd rows": POINTERS, "every other column": POINTERS,
        "same for all samples": POINTERS,
    }  # fmt: skip


def test_sizes_of_one_may_have_any_stride() -> None:
    g = operand((1, 1, 24), torch.float32, "contiguous").as_strided((1, 1, 24), (7, 3, 1), 64)
    a = operand((1, 1, 8), torch.float32, "contiguous")
    assert layout_of(g, HOPPER) == ROWS
    out = run(g, a, Tiles(16, 16, 16, 4, 2), (ROWS, ROWS), [0])
    torch.testing.assert_close(out.double().sum(1), module.reference_flash_norm(g, a), rtol=RTOL, atol=0)


def test_slots_beyond_the_tiles_are_zero() -> None:
    g, a = operand((2, 20, 20), torch.float32, "contiguous"), operand((2, 20, 20), torch.float32, "contiguous")
    out = run(g, a, Tiles(32, 32, 16, 4, 2, SPLIT=2), (POINTERS, POINTERS), [1, 0], slots=4)
    assert not out[:, 1:].any()
    torch.testing.assert_close(out[:, 0].double(), module.reference_flash_norm(g, a), rtol=RTOL, atol=0)


def test_not_finite_stays_not_finite() -> None:
    g, a = operand((2, 20, 20), torch.float32, "contiguous"), operand((2, 20, 20), torch.float32, "contiguous")
    g[0, 3, 5] = float("inf")
    out = run(g, a, Tiles(16, 16, 16, 4, 2, SPLIT=2), (POINTERS, POINTERS), [0, 1]).sum(1)
    assert not out[0].isfinite()
    assert out[1].isfinite()


@pytest.mark.parametrize("sizes", [(3, 7, 5, 4), (1, 1, 1, 1), (0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_operator_takes_any_size(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, length, p, d = sizes
    g, a = torch.randn(batch, length, p, dtype=dtype), torch.randn(batch, d, length, dtype=dtype).mT
    norms = flash_norm(g, a)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), module.reference_flash_norm(g, a), rtol=RTOL, atol=0)
    torch.library.opcheck(flash_norm.default, (g, a), test_utils=("test_schema", "test_faketensor"))


def test_aten_form_holds_no_more_than_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor))
            return result

    g, a = torch.randn(5, 3, 40).bfloat16(), torch.randn(5, 3, 30).bfloat16()
    monkeypatch.setattr(module, "_CPU_CHUNK", 600)
    with Watch():
        norms = module.aten_flash_norm(g, a)
    torch.testing.assert_close(norms.double(), module.reference_flash_norm(g, a), rtol=RTOL, atol=0)
    assert max(sizes) <= 600


def test_what_does_not_fit_is_refused() -> None:
    g, a = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    with pytest.raises(TypeError, match=r"g_btp of dtype torch.float32 and a_btd of dtype torch.bfloat16; cast one of them"):
        flash_norm(g, a.bfloat16())
    with pytest.raises(TypeError, match=r"g_btp of dtype torch.int64; it needs a real floating-point one"):
        flash_norm(g.long(), a.long())
    with pytest.raises(ValueError, match=r"the first 2 sizes \(samples, positions\) must agree"):
        flash_norm(g[:, :2], a)
    with pytest.raises(ValueError, match=r"shape \(3, 5\); it needs 3 dimensions"):
        flash_norm(g, a[0])


def test_split_fills_idle_multiprocessors_and_nothing_else() -> None:
    alone = tile_choices(1, 4096, 1024, 1024, torch.bfloat16, HOPPER, "ieee")[0]
    assert alone.tiles.SPLIT > 1
    assert alone.tiles_of_a_sample * alone.tiles.SPLIT <= HOPPER.multiprocessors
    assert tile_choices(8, 1024, 768, 2304, torch.bfloat16, HOPPER, "ieee")[0].tiles.SPLIT == 1
    assert tile_choices(1, 1, 1024, 1024, torch.bfloat16, HOPPER, "ieee")[0].tiles.SPLIT == 1


@pytest.mark.parametrize("shape", [(1, 4096, 1024, 1024), (1, 262144, 1024, 1024), (4, 333, 100, 3000)])
def test_the_best_choice_minimizes_the_formula(shape: tuple[int, int, int, int]) -> None:
    choices = tile_choices(*shape, torch.bfloat16, HOPPER, "ieee")
    best = choices[0].clocks(HOPPER)
    for choice in choices:
        for split in range(1, 17):
            other: Choice = replace(choice, tiles=replace(choice.tiles, SPLIT=split))
            assert best <= other.clocks(HOPPER)
