"""``flashnorm::clipped_sum``: the kernel in Triton's interpreter, the ATen form and the operator against loops in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from eager import interpreted_launches
from flashnorm_compile.templates import clipped_sum as module
from flashnorm_compile.templates._clipped_tiles import FEW_POSITIONS, Tiles, tile_choices
from flashnorm_compile.templates._triton import HOPPER, POINTERS, layout_of
from helpers import FORMS, operand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sum_configurations import Configuration, clipped_sum_configurations, faults
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

clipped_sum = torch.ops.flashnorm.clipped_sum
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Products of the inputs are exact in float32; sums of a few hundred of them, and of scaled products, lose no more than this.
RTOL = 1e-5


def assert_equals_loops(out: Tensor, g: Tensor, a: Tensor, factors: Tensor) -> None:
    expected = module.reference(g, a, factors)
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(out.double(), expected, rtol=RTOL, atol=RTOL * size)


def factors_with_drops(batch: int, g: Tensor, a: Tensor, dropped: list[bool]) -> Tensor:
    """Random factors; dropped samples get 0, and values that are not finite in both operands."""
    factors = torch.rand(batch) + 0.01
    for b, drop in zip(range(batch), dropped, strict=False):
        if drop:
            factors[b] = 0
            g[b], a[b] = float("nan"), float("inf")
    return factors


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_kernel_equals_loops(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.one_of(st.sampled_from([1, 16, 32, 33]), st.integers(1, 40))
    batch, length, p, d = draw(st.integers(1, 4)), draw(sizes), draw(sizes), draw(sizes)
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    g, a = (operand((batch, length, width), dtype, draw(st.sampled_from(FORMS))) for width in (p, d))
    one_for_all = not (g.stride(0) and a.stride(0))
    factors = factors_with_drops(batch, g, a, [False] * 4 if one_for_all else draw(st.lists(st.booleans(), min_size=4, max_size=4)))
    edge = st.sampled_from([16, 32])
    few = length <= FEW_POSITIONS or draw(st.booleans())
    tiles = Tiles(draw(edge), draw(edge), 16, 4, 2, SPLIT=draw(st.integers(1, 5)), ROWS=few)
    layouts = tuple(draw(st.sampled_from(sorted({POINTERS, layout_of(x, HOPPER)}))) for x in (g, a))
    whole = length <= 16 and draw(st.booleans())
    with interpreted_launches(seed):
        segments = module.launch(g, a, factors, tiles, layouts, "ieee", whole)
    assert segments.shape == (tiles.SPLIT, p, d)
    assert_equals_loops(segments.double().sum(0), g, a, factors)


@pytest.mark.parametrize("few", [False, True])
def test_order_of_programs_does_not_change_a_bit(few: bool) -> None:
    g, a, factors = torch.randn(3, 40, 33), torch.randn(3, 40, 20), torch.rand(3)
    results = []
    for seed in range(3):
        with interpreted_launches(seed):
            results.append(module.launch(g, a, factors, Tiles(16, 16, 16, 4, 2, SPLIT=3, ROWS=few), (POINTERS, POINTERS), "ieee"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("split", [1, 2])
def test_a_factor_of_zero_adds_exactly_zero(few: bool, split: int) -> None:
    g, a = torch.full((3, 20, 8), float("nan")), torch.full((3, 20, 8), float("inf"))
    with interpreted_launches():
        out = module.launch(g, a, torch.zeros(3), Tiles(16, 16, 16, 4, 2, SPLIT=split, ROWS=few), (POINTERS, POINTERS), "ieee")
    assert torch.equal(out, torch.zeros(split, 8, 8))
    assert torch.equal(clipped_sum(g, a, torch.zeros(3)), torch.zeros(8, 8))


def test_a_clipped_contribution_is_not_rounded_after_its_norm_was_taken() -> None:
    # c * g in bfloat16 would round every element up by nearly 2^-8: one sample would exceed the clip norm by 0.3 percent.
    g, a = torch.full((1, 16, 16), 1.0).bfloat16(), torch.full((1, 16, 16), 1.0).bfloat16()
    factor = (1 + 2.0**-8 * 1.01) / 256
    for few in (False, True):
        with interpreted_launches():
            tiles = Tiles(16, 16, 16, 4, 2, ROWS=few)
            out = module.launch(g, a, torch.tensor([factor]), tiles, (POINTERS, POINTERS), "ieee")
        assert float(out.norm()) == pytest.approx(1 + 2.0**-8 * 1.01, rel=1e-6)


@pytest.mark.parametrize("length", [10, 40])
def test_factors_of_any_size_meet(length: int) -> None:
    # The total changes its unit from sample to sample: neither a huge nor a tiny one may be lost, nor those around a dropped one.
    factors = torch.tensor([0.0, 1e-18, 1.0, 0.0, 1e12, 3e-7, 0.0])
    g, a = torch.randn(7, length, 20) / factors[:, None, None], torch.randn(7, length, 24)
    for split in (1, 3):
        with interpreted_launches():
            out = module.launch(g, a, factors, Tiles(16, 16, 16, 4, 2, SPLIT=split), (POINTERS, POINTERS), "ieee")
        assert_equals_loops(out.double().sum(0), g, a, factors)


def test_eager_launch_takes_the_tiles_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_for", lambda *operands: (HOPPER, [POINTERS, POINTERS]))
    monkeypatch.setattr(module, "allocate_descriptors", lambda: None)
    for shape in ((2, 40, 20, 24), (5, 1, 20, 24)):
        batch, length, p, d = shape
        g, a, factors = torch.randn(batch, length, p), torch.randn(batch, d, length).mT, torch.rand(2 * batch)[::2]
        with interpreted_launches():
            assert_equals_loops(module.clipped_sum_triton(g, a, factors), g, a, factors)
            assert module.clipped_sum_triton(g, a, factors, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [(3, 7, 5, 4), (1, 1, 1, 1), (0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_operator_takes_any_size(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, length, p, d = sizes
    g, a = torch.randn(batch, length, p, dtype=dtype), torch.randn(batch, d, length, dtype=dtype).mT
    factors = torch.rand(batch)
    out = clipped_sum(g, a, factors)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_equals_loops(out, g, a, factors)
    assert clipped_sum(g, a, factors, torch.bfloat16).dtype == torch.bfloat16
    torch.library.opcheck(clipped_sum.default, (g, a, factors), test_utils=("test_schema", "test_faketensor"))


def shares(result: Tensor, others: tuple[object, ...]) -> bool:
    """Whether ``result`` is a view of one of the tensors among ``others``."""
    own = result.untyped_storage().data_ptr()
    return any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == own for x in others)


@pytest.mark.parametrize("sizes", [(5, 3, 40, 30), (2, 70, 10, 30), (1, 70, 30, 10)])
def test_aten_form_copies_no_more_than_its_chunk(sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not shares(result, args):
                found.append(result.numel())
            return result

    batch, length, p, d = sizes
    g, a = torch.randn(batch, length, p).bfloat16(), torch.randn(batch, length, d).bfloat16()
    factors = factors_with_drops(batch, g, a, [True, False] if batch > 1 else [False])
    monkeypatch.setattr(module, "_CPU_CHUNK", 600)
    with Watch():
        out = module.clipped_sum_aten(g, a, factors)
    assert_equals_loops(out, g, a, factors)
    assert max(size for size in found if size != p * d) <= 600


def test_what_does_not_fit_is_refused() -> None:
    g, a = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    with pytest.raises(TypeError, match=r"cast one of them"):
        clipped_sum(g, a.bfloat16(), torch.ones(2))
    with pytest.raises(ValueError, match=r"the first 2 sizes \(samples, positions\) must agree"):
        clipped_sum(g[:, :2], a, torch.ones(2))
    with pytest.raises(ValueError, match=r"factors of dtype torch.float32 and shape \(3,\) for 2 samples; it needs float32 \[B\]"):
        clipped_sum(g, a, torch.ones(3))
    with pytest.raises(ValueError, match=r"factors of dtype torch.float64"):
        clipped_sum(g, a, torch.ones(2).double())


def test_split_fills_idle_multiprocessors_and_nothing_else() -> None:
    few_tiles = tile_choices((4, 2048, 512, 512), torch.bfloat16, HOPPER, "ieee")[0]
    assert few_tiles.tiles.SPLIT > 1
    assert tile_choices((8, 1024, 4096, 4096), torch.bfloat16, HOPPER, "ieee")[0].tiles.SPLIT == 1
    assert tile_choices((1, 1, 128, 128), torch.bfloat16, HOPPER, "ieee")[0].tiles.SPLIT == 1


@pytest.mark.parametrize("shape", [(4, 2048, 1024, 1024), (64, 197, 768, 3072), (64, 1, 1024, 1024), (4, 333, 100, 3000)])
def test_the_best_choice_minimizes_the_formula(shape: tuple[int, int, int, int]) -> None:
    choices = tile_choices(shape, torch.bfloat16, HOPPER, "ieee")
    best = choices[0].clocks(HOPPER)
    for choice in choices:
        assert (shape[1] <= FEW_POSITIONS) == choice.tiles.ROWS
        for split in range(1, 33):
            assert best <= replace(choice, tiles=replace(choice.tiles, SPLIT=split)).clocks(HOPPER)


@pytest.mark.parametrize("configuration", clipped_sum_configurations(), ids=str)
def test_code_fits_the_device(configuration: Configuration) -> None:
    assert not faults(configuration)
