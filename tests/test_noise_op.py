"""``flashnorm::add_noise``: generator against published vectors, C++ kernel against plain PyTorch, distribution."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from flashnorm_compile.templates import _cpu, noise
from torch import Tensor
from torch._inductor.utils import run_and_get_code

ops = torch.ops.flashnorm
KEYS = torch.tensor([[0x0123456789ABCDEF, 7], [0x0123456789ABCDEF, 8], [0x0123456789ABCDEE, 7], [-3, -(1 << 40)]])
ONE = torch.tensor(1.0)


def draw(n: int, row: int = 0, keys: Tensor = KEYS) -> Tensor:
    return ops.add_noise(torch.zeros(n), keys, ONE, row)


def signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


# Counter, key and result as printed for `philox4x32 10` in Random123's kat_vectors.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    block, stream, key64 = (torch.tensor(signed(low | high << 32)) for low, high in (counter[:2], counter[2:], (key[0], key[1])))
    words = noise.philox(block[None], key64, stream)
    assert tuple(int(word) for word in words) == expected


def exact_normals(key_stream: Tensor, n: int) -> Tensor:
    """float64 Box-Muller of the same words; the uniform's rounding to float32 is part of the definition."""
    words = noise.philox(torch.arange((n + 3) // 4), key_stream[0], key_stream[1])
    normals = []
    for a, b in (words[:2], words[2:]):
        radius = torch.sqrt(-2 * torch.log((a.float() * 2.0**-32 + 2.0**-33).double()))
        half, rest = b >> 31, b % (1 << 31)
        turn = half.double() / 2 + ((rest + (1 << 30)) % (1 << 31) - (1 << 30)).double() * 2.0**-32
        normals += [radius * torch.cos(2 * math.pi * turn), radius * torch.sin(2 * math.pi * turn)]
    return torch.stack(normals, dim=-1).flatten()[:n]


def test_kernel_is_as_accurate_as_pytorch_in_float32() -> None:
    n = 1 << 20
    for row in range(len(KEYS)):
        exact = exact_normals(KEYS[row], n)
        plain = (noise.reference_normals(KEYS[row], 0, n) - exact).abs().max()
        assert plain < 1e-6
        assert (draw(n, row) - exact).abs().max() <= 2 * plain


def test_kernel_is_available_here() -> None:
    if _cpu.noise_kernels() is None:
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 127, 128, 129, 1023, 1024, 1025, 70001])
def test_an_element_does_not_depend_on_the_size(n: int) -> None:
    longest = draw(70001)
    assert torch.equal(draw(n), longest[:n])
    middle = n // 3
    torch.testing.assert_close(noise.reference_normals(KEYS[0], middle, n), longest[middle:n], atol=2e-6, rtol=0)


def test_threads_do_not_change_the_noise() -> None:
    threads = torch.get_num_threads()
    try:
        draws = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            draws.append(draw(200_003))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    value = torch.linspace(-3, 3, 2500).to(dtype)
    out = ops.add_noise(value, KEYS, torch.tensor(0.5), 1, out_dtype)
    exact = value.double() + 0.5 * exact_normals(KEYS[1], 2500)
    assert out.dtype == (out_dtype or dtype)
    # One rounding to the result's type, on top of the generator's own 1e-6 and one float32 rounding.
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(out.dtype).eps / 2, atol=1e-6)
    if out_dtype is None:
        assert torch.equal(ops.add_noise_(value, KEYS, torch.tensor(0.5), 1), out)
        assert torch.equal(value, out)


def test_bfloat16_rounds_to_nearest_even_and_keeps_special_values() -> None:
    value = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38, 1e-40, 0.0])
    tiny = torch.tensor(1e-45)
    out = ops.add_noise(value, KEYS, tiny, 0, torch.bfloat16)
    torch.testing.assert_close(out, value.bfloat16(), equal_nan=True, rtol=0, atol=1e-42)
    wide = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.add_noise(wide, KEYS, ONE, 0, torch.bfloat16), ops.add_noise(wide, KEYS, ONE, 0).bfloat16())


def test_float64_values_keep_their_precision() -> None:
    value = torch.full((64,), 1 / 3, dtype=torch.float64)
    out = ops.add_noise(value, KEYS, torch.tensor(2.0**-20), 0)
    torch.testing.assert_close(out, value + 2.0**-20 * draw(64).double(), rtol=0, atol=1e-16)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.view(30, 7, 11).permute(2, 0, 1),
        lambda x: x[::3],
        lambda x: x[1:],
        lambda x: x.view(30, 77)[:, :50],
        lambda x: x[0].view(()),
    ],
    ids=["permuted", "strided", "offset", "columns", "scalar"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_do_not_matter(make, dtype: torch.dtype) -> None:
    base = torch.arange(2310, dtype=dtype) / 100
    view = make(base.clone())
    expected = ops.add_noise(view.contiguous().clone(), KEYS, ONE, 2)
    out = ops.add_noise(view, KEYS, ONE, 2)
    assert out.is_contiguous()
    assert torch.equal(out, expected)
    touched = base.clone()
    assert torch.equal(ops.add_noise_(make(touched), KEYS, ONE, 2), expected)
    # Nothing outside the view was written.
    make(touched).copy_(view)
    assert torch.equal(touched, base)


def test_strided_keys() -> None:
    keys = KEYS.t().contiguous().t()
    assert keys.stride(1) != 1
    assert torch.equal(draw(100, 3, keys), draw(100, 3))
    assert torch.equal(ops.add_noise_(torch.zeros(100), keys, ONE, 3), draw(100, 3))
    assert torch.equal(draw(100, 1, KEYS[2:]), draw(100, 3))


def boxes() -> Iterator[tuple[tuple[slice, ...], list[int]]]:
    """Parts of a tensor of shape [37, 10, 6], and the words that say where they lie."""
    for rows in (slice(0, 37), slice(0, 12), slice(12, 24), slice(24, 37), slice(5, 6), slice(7, 7)):
        yield (rows,), [rows.start * 60, 1 << 62, 0]
        for columns in (slice(0, 5), slice(5, 10), slice(3, 7)):
            yield (rows, columns), [rows.start * 60 + columns.start * 6, (columns.stop - columns.start) * 6, 60]
        yield (rows, slice(None), slice(2, 5)), [rows.start * 60 + 2, 3, 6]


@pytest.mark.parametrize("by_kernel", [True, False], ids=["C++", "PyTorch"])
def test_parts_get_the_noise_of_the_whole(by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_kernel:
        monkeypatch.setattr(noise, "noise_kernels", lambda: None)
    value = torch.linspace(-1, 1, 37 * 60).view(37, 10, 6)
    whole = ops.add_noise(value, KEYS, torch.tensor(0.5), 1)
    for index, words in boxes():
        keys = torch.cat([KEYS, torch.tensor([words]).expand(4, 3)], 1)
        part = ops.add_noise(value[index], keys, torch.tensor(0.5), 1)
        assert torch.equal(part, whole[index]), words
        assert torch.equal(noise.part_normals(keys[1], 0, part.numel()), noise.reference_normals(KEYS[1], 0, 2220).view(37, 10, 6)[
            index].flatten())  # fmt: skip
    keys = torch.cat([KEYS, torch.tensor([noise.WHOLE]).expand(4, 3)], 1)
    assert torch.equal(draw(70001, 3, keys), draw(70001, 3))
    assert torch.equal(ops.add_noise_(value.clone(), keys, torch.tensor(0.5), 1), whole)


def test_a_part_far_inside_a_large_tensor() -> None:
    """Element numbers have 64 bits: the part need not be near the beginning, nor at a multiple of four."""
    first = (1 << 40) + 3
    keys = torch.cat([KEYS, torch.tensor([[first, 1 << 62, 0]]).expand(4, 3)], 1)
    block = torch.arange((first - 3) // 4, (first - 3) // 4 + 500)
    words = noise.philox(block, KEYS[2, 0], KEYS[2, 1])
    z = torch.stack((*noise.box_muller(*words[:2]), *noise.box_muller(*words[2:])), dim=-1).flatten()[3:1999]
    torch.testing.assert_close(draw(1996, 2, keys), z, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zero_std_returns_the_value_bit_for_bit(dtype: torch.dtype) -> None:
    value = torch.tensor([-0.0, 0.0, math.inf, 1 / 3, -1e-8], dtype=dtype)
    zero = torch.tensor(0.0)
    out = ops.add_noise(value, KEYS, zero, 0)
    assert out.data_ptr() != value.data_ptr()
    as_bytes = value.view(torch.uint8).clone()
    assert torch.equal(out.view(torch.uint8), as_bytes)
    assert ops.add_noise_(value, KEYS, zero, 0) is value
    assert torch.equal(value.view(torch.uint8), as_bytes)
    assert torch.equal(noise.reference_add_noise(value, KEYS, zero, 0).view(torch.uint8), as_bytes)
    assert ops.add_noise(value, KEYS, zero, 0, torch.float64).dtype is torch.float64


def test_nan_std_is_visible() -> None:
    assert ops.add_noise(torch.zeros(9), KEYS, torch.tensor(math.nan), 0).isnan().all()


def test_empty_tensors() -> None:
    assert ops.add_noise(torch.zeros(3, 0, 2), KEYS, ONE, 0).shape == (3, 0, 2)
    assert ops.add_noise_(torch.zeros(0), KEYS, ONE, 0).numel() == 0
    assert noise.reference_add_noise(torch.zeros(0, 2), KEYS, ONE, 0).shape == (0, 2)


def test_reference_spans_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise.reference_add_noise(torch.ones(5, 7), KEYS, ONE, 3)
    monkeypatch.setattr(noise, "_REFERENCE_CHUNK", 8)
    assert torch.equal(noise.reference_add_noise(torch.ones(5, 7), KEYS, ONE, 3), whole)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="view_as_real"):
        ops.add_noise(torch.zeros(2, dtype=torch.complex64), KEYS, ONE, 0)
    with pytest.raises(ValueError, match=r"row 4.*0 <= row < P"):
        draw(4, len(KEYS))
    with pytest.raises(ValueError, match=r"\(4, 3\) with row 0; it needs int64 \[P, 2\], or \[P, 5\] for parts of tensors"):
        draw(4, 0, KEYS[:, [0, 1, 1]])
    with pytest.raises(ValueError, match="row -1"):
        ops.add_noise_(torch.zeros(4), KEYS, ONE, -1)
    with pytest.raises(ValueError, match=r"dtype torch.int32"):
        draw(4, 0, KEYS.int())
    with pytest.raises(ValueError, match=r"0-d float32"):
        ops.add_noise(torch.zeros(4), KEYS, torch.ones(1), 0)


def test_without_a_compiler_pytorch_draws_the_same_noise(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    value = torch.ones(3000)
    expected = ops.add_noise(value, KEYS, ONE, 0)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no working compiler")

    monkeypatch.setattr(_cpu.CppCodeCache, "load", fail)
    with caplog.at_level(logging.WARNING):
        assert _cpu.noise_kernels.__wrapped__() is None
    assert "no working compiler" in caplog.text
    assert "Install a C++ compiler" in caplog.text
    monkeypatch.setattr(noise, "noise_kernels", lambda: None)
    torch.testing.assert_close(ops.add_noise(value, KEYS, ONE, 0), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(ops.add_noise_(value.clone(), KEYS, ONE, 0), expected, rtol=0, atol=2e-6)


# Statistics. Keys are fixed, so these cannot fail by chance from one run to the next.


def kolmogorov_smirnov(z: Tensor, std: float = 1.0) -> float:
    """sqrt(n) times the largest gap between the distributions of z and N(0, std^2); > 2.2 in one case of 10,000."""
    n = z.numel()
    theory = 0.5 * torch.erfc(-z.double().sort().values / (std * math.sqrt(2)))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(steps[1:] - theory, theory - steps[:-1]).max())


@pytest.mark.parametrize("row", range(len(KEYS)))
def test_distribution_is_standard_normal(row: int) -> None:
    n = 1 << 20
    z = draw(n, row).double()
    assert kolmogorov_smirnov(z) < 2.2
    for part in range(4):
        assert kolmogorov_smirnov(z[part::4]) < 2.2
    # Standard errors of the first four moments of a normal sample: sqrt((E z^2k - (E z^k)^2) / n).
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - expected) < 4 * math.sqrt(variance / n)


def test_tail_has_the_right_weight() -> None:
    n = 1 << 24
    z = draw(n, 3).abs_()
    for threshold in (4.0, 4.5, 5.0):
        expected = n * math.erfc(threshold / math.sqrt(2))
        assert abs(int((z > threshold).sum()) - expected) < 4 * math.sqrt(expected)


def test_extreme_words_stay_finite() -> None:
    words = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    a, b = (grid.flatten() for grid in torch.meshgrid(words, words, indexing="ij"))
    z = torch.stack(noise.box_muller(a, b))
    assert z.isfinite().all()
    assert math.sqrt(66 * math.log(2)) == pytest.approx(float(z.abs().max()), abs=1e-5)


def correlation(x: Tensor, y: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([x, y]).double())[0, 1])) * math.sqrt(x.numel())


def test_elements_are_uncorrelated() -> None:
    z = draw(1 << 19, 3)
    for lag in (1, 2, 3, 4, 5, 8, 128, 1024):
        for transform in (torch.clone, torch.square, torch.abs):
            moved = transform(z)
            assert correlation(moved[lag:], moved[:-lag]) < 4


def test_rows_streams_and_keys_are_uncorrelated() -> None:
    draws = [draw(1 << 18, row) for row in range(len(KEYS))]
    for i, x in enumerate(draws):
        for y in draws[:i]:
            assert correlation(x, y) < 4
            assert correlation(x.square(), y.square()) < 4
            assert not torch.isclose(x, y, atol=1e-7, rtol=0).float().mean() > 1e-4


def test_noise_has_the_scale_that_was_asked_for() -> None:
    noisy = ops.add_noise(torch.full((1 << 20,), 2.0), KEYS, torch.tensor(0.7), 0) - 2
    assert kolmogorov_smirnov(noisy, 0.7) < 2.2
    assert kolmogorov_smirnov(noisy, 0.69) > 2.2
    assert kolmogorov_smirnov(noisy, 0.71) > 2.2


# Under torch.compile.


def test_operators_are_declared_correctly() -> None:
    std = torch.tensor(0.5)
    for value in (torch.randn(6, 5), torch.randn(6, 5).t()):
        torch.library.opcheck(ops.add_noise.default, (value, KEYS, std, 1))
        torch.library.opcheck(ops.add_noise.default, (value, KEYS, std, 1, torch.bfloat16))
        torch.library.opcheck(ops._add_noise_into.default, (value, KEYS, std, 1))
        torch.library.opcheck(ops.add_noise_.default, (value, KEYS, std, 1), test_utils=("test_schema", "test_faketensor"))


def test_inductor_works_in_place_where_the_value_dies() -> None:
    def step(x: Tensor, g: Tensor, keys: Tensor, std: Tensor) -> tuple[Tensor, ...]:
        dies_as_output = ops.add_noise(torch.mm(g.t(), x) * 0.5, keys, std, 0)
        dies_in_sum = ops.add_noise(g.sum(0), keys, std, 1) * 2
        return dies_as_output, dies_in_sum

    inputs = torch.randn(16, 24), torch.randn(16, 40), KEYS, torch.tensor(0.3)
    with torch._inductor.config.patch(force_disable_caches=True):
        results, (code,) = run_and_get_code(torch.compile(step), *inputs)
    assert code.count("flashnorm._add_noise_into.default(") == 2
    assert "torch.ops.flashnorm.add_noise.default(" not in code
    assert "aten.clone" not in code
    torch.testing.assert_close(results, step(*inputs))


def test_inductor_returns_the_copy_if_it_has_to_noise_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    ir = noise.ir
    copying = SimpleNamespace(
        ExternKernel=SimpleNamespace(realize_input=ir.ExternKernel.copy_input),
        FallbackKernel=ir.FallbackKernel,
        TensorBox=ir.TensorBox,
    )
    monkeypatch.setattr(noise, "ir", copying)

    def step(x: Tensor, keys: Tensor, std: Tensor) -> Tensor:
        return ops.add_noise(x.sum(0), keys, std, 0) * 2

    inputs = torch.randn(16, 24), KEYS, torch.tensor(0.3)
    with torch._inductor.config.patch(force_disable_caches=True):
        result, (code,) = run_and_get_code(torch.compile(step), *inputs)
    assert code.count("flashnorm._add_noise_into.default(") == 1
    torch.testing.assert_close(result, step(*inputs))


def test_inductor_keeps_a_value_that_lives_on() -> None:
    def step(x: Tensor, keys: Tensor, std: Tensor) -> tuple[Tensor, ...]:
        used_again = x.sum(0)
        return (
            ops.add_noise(x, keys, std, 0),
            ops.add_noise(used_again, keys, std, 1),
            used_again,
            ops.add_noise(used_again * 2, keys, std, 2, torch.bfloat16),
            ops.add_noise((x * 3).t(), keys, std, 3),
        )

    inputs = torch.randn(33, 18), KEYS, torch.tensor(0.3)
    before = inputs[0].clone()
    with torch._inductor.config.patch(force_disable_caches=True):
        results, (code,) = run_and_get_code(torch.compile(step, dynamic=True), *inputs)
    assert "flashnorm._add_noise_into.default(" not in code
    assert code.count("= torch.ops.flashnorm.add_noise.default(") == 4
    torch.testing.assert_close(results, step(*inputs))
    assert torch.equal(inputs[0], before)
