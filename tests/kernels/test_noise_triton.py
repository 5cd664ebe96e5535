"""The noise kernel of GPUs, in Triton's interpreter: the same stream as on a CPU, strides, types, levels, and its code."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from eager import interpreted_launches
from flashnorm_compile.templates import noise
from flashnorm_compile.templates import noise_triton as module
from helpers import interpret
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sum_configurations import Configuration, compiled, faults, noise_configurations
from torch import Tensor
from triton import jit

ops = torch.ops.flashnorm
KEYS = torch.tensor([[0x0123456789ABCDEF, 7], [0x0123456789ABCDEF, 1 << 33], [-3, -(1 << 40)]])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = module.NoiseTile(counters=16)
# Two float32 Box-Muller transforms of the same words; test_noise_op.py holds each to 1e-6 of the exact one.
ATOL = 2e-6


@jit
def words_kernel(out_ptr: tl.tensor, keys_ptr: tl.tensor, first: tl.tensor, N: tl.constexpr) -> None:
    counter = first + tl.arange(0, N).to(tl.int64)
    key, stream = tl.load(keys_ptr), tl.load(keys_ptr + 1)
    x0, x1, x2, x3 = module.random_words(key, stream, counter, "philox4x32-10")
    at = out_ptr + tl.arange(0, N)
    tl.store(at, x0.to(tl.int64))
    tl.store(at + N, x1.to(tl.int64))
    tl.store(at + 2 * N, x2.to(tl.int64))
    tl.store(at + 3 * N, x3.to(tl.int64))


@pytest.mark.parametrize("row", range(len(KEYS)))
@pytest.mark.parametrize("first", [0, 5, (1 << 32) - 3, (1 << 61) + 1])
def test_words_are_the_same_bits(row: int, first: int) -> None:
    out = torch.zeros(4, 8, dtype=torch.int64)
    interpret(words_kernel, [0], out, KEYS[row].contiguous(), first, 8)
    expected = torch.stack(noise.philox(first + torch.arange(8), KEYS[row, 0], KEYS[row, 1]))
    assert torch.equal(out, expected)


def view_of(form: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    memory = torch.full((rows * columns * 4 + 64,), float("nan"), dtype=dtype)
    view = {
        "contiguous": lambda: memory[: rows * columns].view(rows, columns),
        "offset": lambda: memory[3 : rows * columns + 3].view(rows, columns),
        "transposed": lambda: memory[: rows * columns].view(columns, rows).t(),
        "columns": lambda: memory[: rows * columns * 2].view(rows, 2 * columns)[:, :columns],
        "every other": lambda: memory[: rows * columns * 2 : 2].view(rows, columns),
        "three dimensions": lambda: memory[: rows * columns * 2].view(columns, 2, rows).permute(2, 1, 0),
    }[form]()
    return view.copy_(torch.randn(view.shape))


FORMS = ("contiguous", "offset", "transposed", "columns", "every other", "three dimensions")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    rows=st.integers(0, 12), columns=st.integers(1, 23), form=st.sampled_from(FORMS), dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from((None, *DTYPES)), row=st.integers(0, 2), std=st.sampled_from([0.0, 0.5, 3.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_kernel_adds_the_noise_of_a_cpu(
    rows: int, columns: int, form: str, dtype: torch.dtype, out_dtype: torch.dtype | None, row: int, std: float, seed: int
) -> None:
    torch.manual_seed(seed)
    value = view_of(form, rows, columns, dtype)
    level = torch.tensor(std)
    expected = ops.add_noise(value, KEYS, level, row, torch.float64)
    with interpreted_launches(seed):
        out = module.add_noise_triton(value, KEYS, level, row, out_dtype, tile=SMALL)
        in_place = module.add_noise_triton_(value.clone(memory_format=torch.preserve_format), KEYS, level, row, tile=SMALL)
    assert out.is_contiguous()
    for result, wanted in ((out, out_dtype or dtype), (in_place, dtype)):
        assert result.dtype == wanted
        # The interpreter truncates to bfloat16, where a GPU rounds to nearest: one unit in the last place.
        rtol = torch.finfo(wanted).eps if wanted != torch.float64 else 0
        torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=ATOL * max(std, 1))


def test_in_place_writes_the_view_and_nothing_else() -> None:
    base = torch.arange(120.0).view(10, 12)
    touched = base.clone()
    with interpreted_launches():
        result = module.add_noise_triton_(touched[:, 2:7], KEYS, torch.tensor(0.5), 1, tile=SMALL)
    assert result.data_ptr() == touched[:, 2:7].data_ptr()
    torch.testing.assert_close(touched[:, 2:7], ops.add_noise(base[:, 2:7], KEYS, torch.tensor(0.5), 1), rtol=0, atol=ATOL)
    touched[:, 2:7] = base[:, 2:7]
    assert torch.equal(touched, base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_level_returns_the_value_bit_for_bit(dtype: torch.dtype) -> None:
    value = torch.tensor([-0.0, 0.0, float("inf"), 1 / 3, -1e-7, float("nan")], dtype=dtype)
    bits = value.view(torch.uint8).clone()
    with interpreted_launches():
        out = module.add_noise_triton(value, KEYS, torch.tensor(0.0), 0)
        module.add_noise_triton_(value, KEYS, torch.tensor(0.0), 0)
    assert torch.equal(out.view(torch.uint8), bits)
    assert torch.equal(value.view(torch.uint8), bits)


def test_zero_level_in_place_neither_reads_nor_writes_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the tiles were visited")

    monkeypatch.setitem(module.add_noise_kernel.fn.__globals__, "_tiles", fail)
    with interpreted_launches():
        module.add_noise_triton_(torch.zeros(40), KEYS, torch.tensor(0.0), 0)
        with pytest.raises(AssertionError, match="visited"):
            module.add_noise_triton_(torch.zeros(40), KEYS, torch.tensor(1.0), 0)


def test_nan_level_is_visible() -> None:
    with interpreted_launches():
        assert module.add_noise_triton(torch.zeros(9), KEYS, torch.tensor(float("nan")), 0).isnan().all()


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
def test_the_grid_does_not_change_the_noise(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "programs_of", lambda device: programs)
    with interpreted_launches(programs):
        out = module.add_noise_triton(torch.zeros(333), KEYS, torch.tensor(1.0), 2, tile=SMALL)
    torch.testing.assert_close(out, noise.reference_normals(KEYS[2], 0, 333), rtol=0, atol=ATOL)


def test_strided_keys() -> None:
    keys = KEYS.t().contiguous().t()
    assert keys.stride(1) != 1
    with interpreted_launches():
        out = module.add_noise_triton(torch.zeros(50), keys, torch.tensor(1.0), 2)
    torch.testing.assert_close(out, noise.reference_normals(KEYS[2], 0, 50), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ((slice(8, 20),), (8 * 24, 1 << 62, 0)),
        ((slice(0, 30), slice(8, 20)), (8, 12, 24)),
        ((slice(3, 30), slice(4, 24)), (3 * 24 + 4, 20, 24)),
        ((slice(5, 16), slice(5, 18)), (5 * 24 + 5, 13, 24)),
        ((slice(7, 7),), (7 * 24, 1 << 62, 0)),
    ],
)
def test_parts_get_the_noise_of_the_whole(index: tuple[slice, ...], words: tuple[int, ...]) -> None:
    """Rows, and columns that begin and end at a multiple of four or not."""
    value, level = torch.randn(30, 24), torch.tensor(0.5)
    keys = torch.cat([KEYS, torch.tensor([words]).expand(3, 3)], 1)
    whole = ops.add_noise(value, KEYS, level, 1)
    with interpreted_launches():
        part = module.add_noise_triton(value[index], keys, level, 1, tile=SMALL)
        summed = module.weighted_sum_noise_triton(value[index].unsqueeze(0), torch.ones(1), keys, level, 1, tile=SMALL)
    torch.testing.assert_close(part, whole[index], rtol=1e-6, atol=ATOL)
    torch.testing.assert_close(summed, whole[index], rtol=1e-6, atol=ATOL)


def test_only_known_generators_are_drawn_from() -> None:
    with interpreted_launches(), pytest.raises(AssertionError, match="unknown generator"):
        module.add_noise_triton(torch.zeros(4), KEYS, torch.tensor(1.0), 0, generator="counter")


def test_rows_of_collapses_dimensions() -> None:
    x = torch.zeros(4, 5, 6)
    assert module.rows_of(x) == (120, 0, 1)
    assert module.rows_of(x[:, :, :3]) == (3, 6, 1)
    assert module.rows_of(x.permute(2, 0, 1)) == (20, 1, 6)
    assert module.rows_of(x[:, :2, :3]) is None
    assert module.rows_of(x[0, 0, 0]) == (1, 0, 1)
    assert module.rows_of(torch.zeros(1, 7, 1)[:, ::2]) == (4, 0, 2)


@pytest.mark.parametrize("configuration", noise_configurations(), ids=str)
def test_code_spills_nothing_and_moves_vectors(configuration: Configuration) -> None:
    assert not faults(configuration)
    ptx = compiled(configuration).ptx
    assert "sin.approx" not in ptx
    if not configuration.constants.get("STRIDED"):
        assert "ld.global.v4.b32" in ptx or "ld.global.v2.b" in ptx
        assert "st.global.v4.b32" in ptx or "st.global.v2.b" in ptx
    if configuration.types["out_ptr"] == "*bf16":
        assert "cvt.rn.bf16" in ptx
