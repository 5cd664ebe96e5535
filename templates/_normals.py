"""Normal random numbers in Triton kernels: the stream of noise.py and noise_cpu.cpp, for whole tensors and for parts of them.

Integer words equal the CPU kernel's bit for bit. Normals use the same polynomials (no slow path of sin, cos or log, and no local
memory), so that they agree to the rounding of float32 operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

PHILOX = tl.constexpr("philox4x32-10")


@triton.jit
def random_words(key: tl.tensor, stream: tl.tensor, counter: tl.tensor, GENERATOR: tl.constexpr) -> tuple:
    """Four blocks of uint32 words for each int64 ``counter`` under a 64-bit key and stream.

    ``tl.philox`` draws the same words, with two multiplications, a slow high half among them, where one of 64 bits does.
    """
    tl.static_assert(GENERATOR == PHILOX, "unknown generator")
    x0, x1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    x2, x3 = x0 * 0 + stream.to(tl.uint32), x0 * 0 + (stream >> 32).to(tl.uint32)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = x0.to(tl.uint64) * 0xD2511F53, x2.to(tl.uint64) * 0xCD9E8D57
        x0, x1 = (p1 >> 32).to(tl.uint32) ^ x1 ^ k0, p1.to(tl.uint32)
        x2, x3 = (p0 >> 32).to(tl.uint32) ^ x3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return x0, x1, x2, x3


@triton.jit
def box_muller(a: tl.tensor, b: tl.tensor) -> tuple:
    """Two float32 standard normals from each pair of uint32 words; the polynomials and their errors are noise_cpu.cpp's."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    # u = m * 2^e with m in [sqrt(1/2), sqrt(2))
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (shifted >> 23).to(tl.float32)
    t = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = -0.17444486916065216 * t + 0.28733575344085693
    p = p * t - 0.2990456521511078
    p = p * t + 0.33124804496765137
    p = p * t - 0.39913666248321533
    p = p * t + 0.5000414848327637
    p = p * t - 0.6666837334632874
    p = p * t + 0.9999997615814209
    p = p * t - 2.0
    radius = tl.sqrt(e * -1.3862943611198906 + p * t)
    # The top bit of b is half a turn, which turns both results round; the other 31 are w quarter turns, w in [-1, 1).
    radius = (radius.to(tl.uint32, bitcast=True) | (b & 0x80000000)).to(tl.float32, bitcast=True)
    w = (b << 1).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    s = w * w
    sine = 0.0001508226414443925 * s - 0.004672233015298843
    sine = sine * s + 0.07968848198652267
    sine = sine * s - 0.6459633708000183
    sine = sine * s + 1.570796251296997
    cosine = -0.0008566648466512561 * s + 0.01995125412940979
    cosine = cosine * s - 0.2336980253458023
    cosine = cosine * s + 0.9999999403953552
    return radius * (cosine * (1.0 - s)), radius * (sine * w)


@triton.jit
def _four(key: tl.tensor, stream: tl.tensor, counter: tl.tensor, GENERATOR: tl.constexpr) -> tuple:
    """z of the four elements of each counter."""
    a, b, c, d = random_words(key, stream, counter, GENERATOR)
    z0, z1 = box_muller(a, b)
    z2, z3 = box_muller(c, d)
    return z0, z1, z2, z3


@triton.jit
def _four_each(key: tl.tensor, stream: tl.tensor, counter: tl.tensor, GENERATOR: tl.constexpr) -> tl.tensor:
    """float32 [4 * counters]: a thread holds four neighbours, as many float32 as one load takes."""
    z0, z1, z2, z3 = _four(key, stream, counter, GENERATOR)
    # [counter, pair, half of the pair]
    return tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(4 * counter.shape[0])


@triton.jit
def _eight_each(key: tl.tensor, stream: tl.tensor, even: tl.tensor, odd: tl.tensor, GENERATOR: tl.constexpr) -> tl.tensor:
    """float32 [8 * counters]: a thread holds eight neighbours, so that loads of eight 16-bit values need no exchange of threads."""
    z0, z1, z2, z3 = _four(key, stream, even, GENERATOR)
    z4, z5, z6, z7 = _four(key, stream, odd, GENERATOR)
    # [two counters, counter, pair, half of the pair]
    first = tl.join(tl.join(z0, z4), tl.join(z2, z6))
    second = tl.join(tl.join(z1, z5), tl.join(z3, z7))
    return tl.join(first, second).reshape(8 * even.shape[0])


@triton.jit
def normals(
    key: tl.tensor,
    stream: tl.tensor,
    first_counter: tl.tensor,
    COUNTERS: tl.constexpr,
    EIGHT: tl.constexpr,
    GENERATOR: tl.constexpr,
) -> tl.tensor:
    """float32 [4 * COUNTERS]: z of elements 4 * first_counter and on, in their order. ``EIGHT``: of 16-bit values."""
    if EIGHT:
        even = first_counter + 2 * tl.arange(0, COUNTERS // 2)
        z = _eight_each(key, stream, even, even + 1, GENERATOR)
    else:
        z = _four_each(key, stream, first_counter + tl.arange(0, COUNTERS), GENERATOR)
    return z


@triton.jit
def _by_blocks(
    key: tl.tensor,
    stream: tl.tensor,
    start: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    pitch: tl.tensor,
    COUNTERS: tl.constexpr,
    GENERATOR: tl.constexpr,
) -> tl.tensor:
    """Rows of the part begin and end between blocks of four: a block serves four neighbours."""
    element = start + 4 * tl.arange(0, COUNTERS).to(tl.int64)
    at = first + element // width * pitch + element % width
    return _four_each(key, stream, at >> 2, GENERATOR)


@triton.jit
def _by_elements(
    key: tl.tensor,
    stream: tl.tensor,
    start: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    pitch: tl.tensor,
    COUNTERS: tl.constexpr,
    GENERATOR: tl.constexpr,
) -> tl.tensor:
    """Each element draws its own block."""
    element = start + tl.arange(0, 4 * COUNTERS).to(tl.int64)
    at = first + element // width * pitch + element % width
    a, b, c, d = random_words(key, stream, at >> 2, GENERATOR)
    later = (at & 2) != 0
    z0, z1 = box_muller(tl.where(later, c, a), tl.where(later, d, b))
    return tl.where((at & 1) != 0, z1, z0)


@triton.jit
def part_normals(
    words_ptr: tl.tensor,
    word_stride: tl.tensor,
    start: tl.tensor,
    COUNTERS: tl.constexpr,
    EIGHT: tl.constexpr,
    GENERATOR: tl.constexpr,
) -> tl.tensor:
    """float32 [4 * COUNTERS]: z of elements ``start`` and on of the part of a tensor that the five words describe."""
    key, stream = tl.load(words_ptr), tl.load(words_ptr + word_stride)
    first, width = tl.load(words_ptr + 2 * word_stride), tl.load(words_ptr + 3 * word_stride)
    pitch = tl.load(words_ptr + 4 * word_stride)
    row, column = start // width, start % width
    at = first + row * pitch + column
    if ((at & 3) == 0) & (column + 4 * COUNTERS <= width):
        # A stretch of the whole tensor, as of every shard along its first dimension.
        z = normals(key, stream, at >> 2, COUNTERS, EIGHT, GENERATOR)
    elif ((first | width | pitch) & 3) == 0:
        z = _by_blocks(key, stream, start, first, width, pitch, COUNTERS, GENERATOR)
    else:
        z = _by_elements(key, stream, start, first, width, pitch, COUNTERS, GENERATOR)
    return z


@triton.jit
def with_noise(value: tl.tensor, z: tl.tensor, std: tl.tensor) -> tl.tensor:
    """``value + std * z`` in the type of ``value`` (float32 or float64)."""
    return value + std.to(value.dtype) * z.to(value.dtype)


@triton.jit
def rounded(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """``value`` (float32 or float64) in DTYPE, to nearest even; 16-bit types by way of float32, as on the CPU."""
    return value.to(tl.float32).to(DTYPE) if DTYPE.primitive_bitwidth == 16 else value.to(DTYPE)
