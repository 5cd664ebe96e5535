"""``flashnorm::clipped_sums``: the kernel in Triton's interpreter and compiled, the ATen form, and when products go one by one."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from eager import interpreted_launches
from flashnorm_compile.templates import clipped_sum, clipped_sums
from flashnorm_compile.templates._clipped_tiles import Tiles, tile_choices
from flashnorm_compile.templates._triton import HOPPER, POINTERS, ROWS
from helpers import TRITON_NAMES, compile_source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.compiler import ASTSource

operator = torch.ops.flashnorm.clipped_sums
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RTOL = 1e-5


def problem(
    count: int, sizes: tuple[int, int, int, int], dtype: torch.dtype, drop: bool
) -> tuple[list[Tensor], list[Tensor], Tensor, list[int]]:
    """Operands, factors [3, B] and rows; a dropped sample holds NaN and Inf and has factor 0."""
    batch, length, p, d = sizes
    gs = [torch.randn(batch, length, p).to(dtype) for _ in range(count)]
    a_s = [torch.randn(batch, length, d).to(dtype) for _ in range(count)]
    factors = torch.rand(3, batch) + 0.01
    if drop:
        factors[:, 0] = 0
        for g, a in zip(gs, a_s, strict=True):
            g[0], a[0] = float("nan"), float("inf")
    return gs, a_s, factors, [(2 * k + 1) % 3 for k in range(count)]


def assert_equals_each(out: Tensor, gs: list[Tensor], a_s: list[Tensor], factors: Tensor, rows: list[int]) -> None:
    for found, g, a, row in zip(out, gs, a_s, rows, strict=True):
        expected = clipped_sum.reference(g, a, factors[row])
        torch.testing.assert_close(found.double(), expected, rtol=RTOL, atol=RTOL * float(expected.abs().max()))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    count=st.integers(1, 4), batch=st.integers(1, 3), length=st.integers(1, 40), p=st.integers(1, 9), d=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES), split=st.integers(1, 3), layout=st.sampled_from([POINTERS, ROWS]), drop=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_kernel_equals_loops(
    count: int, batch: int, length: int, p: int, d: int, dtype: torch.dtype, split: int, layout: int, drop: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    sizes = (batch, length, 8 * p, 8 * d) if layout == ROWS else (batch, length, 5 * p, 4 * d)  # ROWS: of whole 16 bytes
    gs, a_s, factors, rows = problem(count, sizes, dtype, drop)
    tiles = Tiles(32, 16, 16, 4, 2, SPLIT=split)
    with interpreted_launches(seed):
        segments = clipped_sums.launch(gs, a_s, factors, rows, tiles, (layout, layout), "ieee")
    assert segments.shape == (count, split, *sizes[2:])
    assert_equals_each(segments.double().sum(1), gs, a_s, factors, rows)


def launches(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[Tensor, int]:
    """What the operator gives on a device with TMA, and how many launches of the grouped kernel it takes."""
    calls = []
    launch = clipped_sums.launch

    def counted(*args: object) -> Tensor:
        calls.append(args)
        return launch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(clipped_sums, "launch", counted)
    for module in (clipped_sums, clipped_sum):
        monkeypatch.setattr(module, "device_for", lambda *operands: (HOPPER, [_layout(x) for x in operands]))
        monkeypatch.setattr(module, "allocate_descriptors", lambda: None)
    with interpreted_launches():
        return clipped_sums.clipped_sums_triton(*arguments), len(calls)  # type: ignore[arg-type]


def _layout(operand: Tensor) -> int:
    aligned = operand.stride(2) == 1 and operand.stride(1) % 8 == 0 and operand.data_ptr() % 16 == 0
    return ROWS if aligned else POINTERS


def test_products_of_one_form_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(clipped_sums.AT_ONCE + 1, (2, 20, 16, 8), torch.float32, drop=True)
    out, calls = launches(monkeypatch, *arguments)
    assert calls == 2
    assert_equals_each(out, *arguments)


@pytest.mark.parametrize("kind", ["strides", "no descriptor", "few positions", "address"])
def test_others_are_summed_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gs, a_s, factors, rows = problem(3, (2, 2 if kind == "few positions" else 20, 16, 8), torch.float32, drop=True)
    if kind == "strides":
        gs[1] = gs[1].mT.contiguous().mT
    elif kind == "no descriptor":
        gs = [torch.nn.functional.pad(g, (0, 1))[..., :16] for g in gs]
    elif kind == "address":
        memory = torch.empty(gs[2].numel() + 1)[1:].view(gs[2].shape)
        gs[2] = memory.copy_(gs[2])
    out, calls = launches(monkeypatch, gs, a_s, factors, rows)
    assert calls == 0
    assert_equals_each(out, gs, a_s, factors, rows)


def test_several_products_fill_a_device_without_segments() -> None:
    shape = (64, 197, 768, 3072)
    alone, together = (tile_choices(shape, torch.bfloat16, HOPPER, "ieee", count)[0] for count in (1, 7))
    assert alone.tiles.SPLIT > 1 == together.tiles.SPLIT
    assert together.clocks(HOPPER) < 0.85 * 7 * alone.clocks(HOPPER)


@pytest.mark.parametrize("sizes", [(3, 7, 5, 4), (1, 1, 1, 1), (0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_operator_takes_any_size(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    arguments = problem(3, sizes, dtype, drop=False)
    out = operator(*arguments)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.shape == (3, *sizes[2:])
    if out.numel():
        assert_equals_each(out, *arguments)
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    gs, a_s, factors, rows = problem(2, (2, 3, 4, 5), torch.float32, drop=False)
    for wrong in (
        (gs, a_s[:1], factors, rows),
        (gs, a_s, factors, [0]),
        ([gs[0], gs[1][..., :2]], a_s, factors, rows),
        ([], [], factors, []),
    ):
        with pytest.raises(ValueError, match="it needs as many of each, at least one, all of the same shape"):
            operator(*wrong)
    with pytest.raises(TypeError, match="cast one of them"):
        operator(gs, [a.bfloat16() for a in a_s], factors, rows)
    with pytest.raises(ValueError, match=r"it needs float32 \[P, B\]"):
        operator(gs, a_s, factors[0], rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_code_fits_the_device(dtype: torch.dtype) -> None:
    count = clipped_sums.AT_ONCE
    precision = "ieee" if dtype.itemsize == 2 else "tf32"
    best = [tile_choices(shape, dtype, HOPPER, precision, count) for shape in ((8, 1024, 4096, 4096), (64, 32, 4096, 4096))]
    for choice in dict.fromkeys(choice for choices in best for choice in choices):
        tiles = replace(choice.tiles, SPLIT=2)
        constants = {
            "NUMBERS": tuple(range(count)), "COUNT": count, "g_stride_w": 1, "a_stride_w": 1, **tiles.constants,
            **clipped_sum.settings(tiles, choice.length <= tiles.BLOCK_T, dtype, (ROWS, ROWS), precision),
        }  # fmt: skip
        pointer = "*" + TRITON_NAMES[dtype]
        types = {"gs": (pointer,) * count, "a_s": (pointer,) * count, "factors_ptr": "*fp32", "out_ptr": "*fp32"}
        names = [parameter.name for parameter in clipped_sums.clipped_sums_kernel.params]
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        made = compile_source(
            ASTSource(clipped_sums.clipped_sums_kernel, signature, constants, {}), 90, tiles.num_warps, tiles.num_stages
        )
        assert made.stack == 0, asdict(tiles)
        assert made.shared <= HOPPER.shared_bytes
        assert made.registers * 32 * tiles.num_warps <= 65536
        assert made.bulk_copies
        assert made.wgmma > 0 or tiles.BLOCK_P < 64
