"""``flashnorm::weight_grads``: the kernel in Triton's interpreter, the ATen form and the operator against loops in float64."""

from __future__ import annotations

import pytest
import torch
from eager import interpreted_launches
from flashnorm_compile.templates import weight_grads as module
from flashnorm_compile.templates._triton import AMPERE, HOPPER, POINTERS, layout_of
from flashnorm_compile.templates._weight_tiles import Tiles, tile_choices
from helpers import FORMS, interpret, operand, poisoned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sum_configurations import Configuration, faults, weight_grads_configurations
from torch import Tensor

weight_grads = torch.ops.flashnorm.weight_grads
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Products of the inputs are exact in float32, and sums of a few hundred of them lose no more than this.
RTOL = 1e-5


def assert_sound(out: Tensor, norms: Tensor, g: Tensor, a: Tensor, truncated: bool = False) -> None:
    """Gradients equal the loops up to one rounding to the stored type; norms are those of what was stored."""
    expected = module.reference(g, a)
    size = float(expected.abs().max()) if expected.numel() else 0.0
    # Triton's interpreter truncates to bfloat16 where devices round: one unit in the last place.
    rounding = 0.0 if out.dtype in (torch.float32, torch.float64) else torch.finfo(out.dtype).eps * (1 if truncated else 0.5)
    torch.testing.assert_close(out.double(), expected, rtol=rounding * 1.01 + RTOL, atol=RTOL * size + 1e-7)
    torch.testing.assert_close(norms.double(), out.double().square().sum((1, 2)), rtol=RTOL, atol=0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_kernel_equals_loops(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.one_of(st.sampled_from([1, 16, 32, 33]), st.integers(1, 40))
    batch, length, p, d = draw(st.integers(1, 3)), draw(st.one_of(st.just(0), sizes)), draw(sizes), draw(sizes)
    dtype, store = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    g, a = (operand((batch, length, width), dtype, draw(st.sampled_from(FORMS))) for width in (p, d))
    edge = st.sampled_from([16, 32])
    layouts = tuple(draw(st.sampled_from(sorted({POINTERS, layout_of(x, HOPPER)}))) if length else POINTERS for x in (g, a))
    with interpreted_launches(seed):
        out, squares = module.launch(g, a, store, Tiles(draw(edge), draw(edge), 16, 4, 2), layouts, "ieee")
    assert out.dtype == store
    assert_sound(out, squares.sum(1), g, a, truncated=True)


def test_slots_of_other_tiles_are_zero() -> None:
    g, a = torch.randn(2, 20, 20), torch.randn(2, 20, 40)
    out, squares = poisoned(2, 20, 40), poisoned(2, 7)
    interpret(
        module.weight_grads_kernel, [3, 0, 2, 1], g, a, out, squares, 2, 20, 20, 40, 7, *g.stride(), *a.stride(),
        32, 32, 16, POINTERS, POINTERS, "ieee",
    )  # fmt: skip
    assert not squares[:, 2:].any()
    assert_sound(out, squares.sum(1), g, a)


def test_norms_are_those_of_the_stored_values() -> None:
    # 1 + 2^-8 is a tie that rounds down, 1 + 3 * 2^-8 one that rounds up: stored values differ from the exact product both ways.
    g = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8]).view(2, 1, 1)
    out, norms = weight_grads(g, torch.ones(2, 1, 1), torch.bfloat16)
    assert out.flatten().tolist() == [1.0, 1 + 2.0**-6]
    assert norms.tolist() == [1.0, (1 + 2.0**-6) ** 2]


def test_not_finite_stays_not_finite_and_with_its_sample() -> None:
    g, a = torch.randn(3, 20, 20), torch.randn(3, 20, 20)
    g[1, 3, 5] = float("inf")
    with interpreted_launches():
        _, squares = module.launch(g, a, torch.float32, Tiles(16, 16, 16, 4, 2), (POINTERS, POINTERS), "ieee")
    for norms in (squares.sum(1), weight_grads(g, a)[1]):
        assert norms.isfinite().tolist() == [True, False, True]
    # Overflow of a narrow stored type is seen by the norm.
    assert not weight_grads(torch.full((1, 1, 1), 300.0), torch.full((1, 1, 1), 300.0), torch.float16)[1].isfinite()


def test_eager_launch_takes_the_tiles_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_for", lambda *operands: (HOPPER, [POINTERS, POINTERS]))
    monkeypatch.setattr(module, "allocate_descriptors", lambda: None)
    g, a = torch.randn(2, 40, 20), torch.randn(2, 24, 40).mT
    with interpreted_launches():
        assert_sound(*module.weight_grads_triton(g, a), g, a)
        assert module.weight_grads_triton(g, a, torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [(3, 7, 5, 4), (1, 1, 1, 1), (0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_operator_takes_any_size(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, length, p, d = sizes
    g, a = torch.randn(batch, length, p, dtype=dtype), torch.randn(batch, d, length, dtype=dtype).mT
    for store in (None, torch.bfloat16):
        out, norms = weight_grads(g, a, store)
        assert out.dtype == (store or (torch.float64 if dtype == torch.float64 else torch.float32))
        assert norms.dtype == torch.float32
        assert_sound(out, norms, g, a)
    torch.library.opcheck(weight_grads.default, (g, a), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16])
def test_aten_form_works_in_chunks(store: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    g, a = torch.randn(5, 3, 4).bfloat16(), torch.randn(5, 3, 6).bfloat16()
    whole = module.weight_grads_aten(g, a, store)
    monkeypatch.setattr(module, "_CPU_CHUNK", 60)
    chunks = module.weight_grads_aten(g, a, store)
    torch.testing.assert_close(chunks[0], whole[0], rtol=RTOL if store == torch.float32 else 8e-3, atol=1e-6)
    assert_sound(*chunks, g, a)


def test_what_does_not_fit_is_refused() -> None:
    g, a = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    with pytest.raises(TypeError, match=r"flashnorm::weight_grads got .*cast one of them"):
        weight_grads(g, a.bfloat16())
    with pytest.raises(ValueError, match=r"the first 2 sizes \(samples, positions\) must agree"):
        weight_grads(g[:, :2], a)


def test_largest_tile_needs_descriptors() -> None:
    shape = ((8, 1024, 4096, 4096), torch.bfloat16)
    assert (128, 256) in {(t.BLOCK_P, t.BLOCK_D) for t in tile_choices(*shape, HOPPER, "ieee", torch.float32)}
    assert (128, 256) not in {(t.BLOCK_P, t.BLOCK_D) for t in tile_choices(*shape, AMPERE, "ieee", torch.float32)}


@pytest.mark.parametrize("configuration", weight_grads_configurations(), ids=str)
def test_code_fits_the_device(configuration: Configuration) -> None:
    assert not faults(configuration)
