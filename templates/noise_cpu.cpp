// Gaussian noise for flashnorm::add_noise and flashnorm::weighted_sum_noise on a CPU, one pass over memory:
// out[i] = in[i] + std * z[i], and out[i] = sum_b c[b] * w[b][i] + std * z[i].
//
// z[4b .. 4b+3] are the four normals of Philox4x32-10 at counter (b, stream) under `key`: words (0, 1) and (2, 3) are
// one Box-Muller pair each, computed in float32. z therefore depends on (key, stream, index), not on threads or sizes.
// A value that is a part of a larger tensor takes that tensor's elements of z (Part).
//
// Each loop over kLanes counters holds nothing but straight-line arithmetic, so that any compiler turns it into vector
// code (32 lanes hide the latency of ten dependent rounds). Only AVX-512's rounds are written out: from the loop, GCC makes
// 64-bit multiplications of three operations each, and noise costs 1.6 times as much. A tile of normals stays in the
// first-level cache until it is added. Accumulator: float32, double for double inputs.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 32;
constexpr int kGroup = 4 * kLanes;  // normals from one group of counters
constexpr int64_t kTile = 4096;     // normals generated before they are added: 16 KiB
constexpr int64_t kGrain = 16384;   // elements that are worth one more thread

// Element i of the value is element first + i / width * pitch + i % width of the whole tensor.
struct Part {
  int64_t first, width, pitch;
};

struct bfloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// The two normals of one pair of random words.
inline void box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
  // u in [2^-33, 1]: the smallest gives |z| = 6.76. Split as u = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  const float u = static_cast<float>(a) * 0x1p-32f + 0x1p-33f;
  const int32_t shifted = bit_cast<int32_t>(u) - 0x3f3504f3;
  const float e = static_cast<float>(shifted >> 23);
  const float t = bit_cast<float>((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  // -2 log(1 + t) / t, relative error 3e-8.
  float p = -0.17444486916065216f;
  p = p * t + 0.28733575344085693f;
  p = p * t - 0.2990456521511078f;
  p = p * t + 0.33124804496765137f;
  p = p * t - 0.39913666248321533f;
  p = p * t + 0.5000414848327637f;
  p = p * t - 0.6666837334632874f;
  p = p * t + 0.9999997615814209f;
  p = p * t - 2.0f;
  const float square = e * -1.3862943611198906f + p * t;
  // The top bit of b is half a turn; the other 31 are an angle of w quarter turns, w in [-1, 1).
  const float r = bit_cast<float>(bit_cast<uint32_t>(std::sqrt(square)) | (b & 0x80000000u));
  const float w = static_cast<float>(static_cast<int32_t>(b << 1)) * 0x1p-31f;
  const float s = w * w;
  // sin(pi/2 w) / w and cos(pi/2 w) / (1 - w^2), absolute errors 4e-9 and 6e-8.
  float sine = 0.0001508226414443925f;
  sine = sine * s - 0.004672233015298843f;
  sine = sine * s + 0.07968848198652267f;
  sine = sine * s - 0.6459633708000183f;
  sine = sine * s + 1.570796251296997f;
  float cosine = -0.0008566648466512561f;
  cosine = cosine * s + 0.01995125412940979f;
  cosine = cosine * s - 0.2336980253458023f;
  cosine = cosine * s + 0.9999999403953552f;
  z0 = r * (cosine * (1.0f - s));
  z1 = r * (sine * w);
}

// The four words of the counters block .. block + kLanes - 1.
struct Words {
  alignas(64) uint32_t x0[kLanes], x1[kLanes], x2[kLanes], x3[kLanes];
};

#if !defined(__AVX512F__)

inline void draw(Words& words, uint64_t block, uint64_t key, uint64_t stream) {
  auto& [x0, x1, x2, x3] = words;
  for (int l = 0; l < kLanes; ++l) {
    x0[l] = static_cast<uint32_t>(block + l);
    x1[l] = static_cast<uint32_t>((block + l) >> 32);
    x2[l] = static_cast<uint32_t>(stream);
    x3[l] = static_cast<uint32_t>(stream >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t p0 = static_cast<uint64_t>(x0[l]) * 0xD2511F53u;
      const uint64_t p1 = static_cast<uint64_t>(x2[l]) * 0xCD9E8D57u;
      x0[l] = static_cast<uint32_t>(p1 >> 32) ^ x1[l] ^ k0;
      x1[l] = static_cast<uint32_t>(p1);
      x2[l] = static_cast<uint32_t>(p0 >> 32) ^ x3[l] ^ k1;
      x3[l] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

#else

// The same with 64 bits for each word: one instruction multiplies lower halves into whole products, and what stands in
// upper halves is never read. Even and odd counters have vectors of their own, which are interleaved at the end.
inline void draw(Words& words, uint64_t block, uint64_t key, uint64_t stream) {
  constexpr int kVectors = kLanes / 8;
  __m512i x0[kVectors], x1[kVectors], x2[kVectors], x3[kVectors];
  const __m512i twice = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  for (int v = 0; v < kVectors; ++v) {
    x0[v] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(block + v / 2 * 16 + v % 2)), twice);
    x1[v] = _mm512_srli_epi64(x0[v], 32);
    x2[v] = _mm512_set1_epi64(static_cast<int64_t>(stream));
    x3[v] = _mm512_srli_epi64(x2[v], 32);
  }
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i p0 = _mm512_mul_epu32(x0[v], m0), p1 = _mm512_mul_epu32(x2[v], m1);
      x0[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), x1[v], key0, 0x96);  // exclusive or of all three
      x1[v] = p1;
      x2[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), x3[v], key1, 0x96);
      x3[v] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int v = 0; v < kVectors; v += 2) {
    const auto store = [v](uint32_t* to, const __m512i* x) {
      _mm512_store_si512(to + 8 * v, _mm512_mask_blend_epi32(0xAAAA, x[v], _mm512_slli_epi64(x[v + 1], 32)));
    };
    store(words.x0, x0);
    store(words.x1, x1);
    store(words.x2, x2);
    store(words.x3, x3);
  }
}

#endif

// z: kGroup normals of the counters block .. block + kLanes - 1.
inline void normals(float* __restrict z, uint64_t block, uint64_t key, uint64_t stream) {
  Words words;
  draw(words, block, key, stream);
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    float z0, z1, z2, z3;
    box_muller(words.x0[l], words.x1[l], z0, z1);
    box_muller(words.x2[l], words.x3[l], z2, z3);
    z[4 * l] = z0;
    z[4 * l + 1] = z1;
    z[4 * l + 2] = z2;
    z[4 * l + 3] = z3;
  }
}

// z: the `count` <= kTile normals of a tile that begins at element `start` of the value.
inline void tile_normals(float* z, int64_t start, int64_t count, const Part& part, uint64_t key, uint64_t stream) {
  alignas(64) float group[kGroup];
  for (int64_t done = 0; done < count;) {
    const int64_t row = (start + done) / part.width, column = (start + done) % part.width;
    const int64_t run = count - done < part.width - column ? count - done : part.width - column;
    uint64_t at = static_cast<uint64_t>(part.first + row * part.pitch + column);
    for (const int64_t end = done + run; done < end;) {
      const int64_t skip = static_cast<int64_t>(at % 4);
      int64_t taken = kGroup - skip < end - done ? kGroup - skip : end - done;
      if (skip == 0 && done + kGroup <= kTile) {
        normals(z + done, at / 4, key, stream);  // what it writes behind the run is overwritten or not read
      } else {
        normals(group, at / 4, key, stream);
        std::memcpy(z + done, group + skip, static_cast<size_t>(taken) * sizeof(float));
      }
      done += taken;
      at += static_cast<uint64_t>(taken);
    }
  }
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

template <class T, class Acc>
inline T store(Acc x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    // Round to nearest even; a NaN must not be rounded into an infinity.
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(x));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  } else {
    return static_cast<T>(x);
  }
}

template <class In, class Out>
void add_noise(void* out_ptr, const void* in_ptr, int64_t n, uint64_t key, uint64_t stream, const Part& part, float std,
               int threads) {
  using Acc = decltype(load(In{}));
  Out* out = static_cast<Out*>(out_ptr);
  const In* in = static_cast<const In*>(in_ptr);
  const Acc scale = std;
  const int64_t useful = (n + kGrain - 1) / kGrain;
  const int team = static_cast<int>(useful < threads ? useful : threads);
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t start = 0; start < n; start += kTile) {
    alignas(64) float z[kTile];
    const int64_t count = n - start < kTile ? n - start : kTile;
    tile_normals(z, start, count, part, key, stream);
    // `out` may be `in`: every element is read before it is written.
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      out[start + j] = store<Out>(load(in[start + j]) + scale * static_cast<Acc>(z[j]));
    }
  }
}

// A sample that counts, and its factor.
struct Sample {
  int64_t index;
  float factor;
};

// total[j] = sum over `live` of factor * w[index * stride + j]. Samples are added in their order; four of them at a time, so
// that as many streams are read at once and the total is passed over less often.
template <class Acc, class In>
inline void add_samples(Acc* __restrict total, const In* w, const std::vector<Sample>& live, int64_t stride, int64_t count) {
  for (int64_t j = 0; j < count; ++j) total[j] = 0;
  size_t s = 0;
  for (; s + 4 <= live.size(); s += 4) {
    const In *w0 = w + live[s].index * stride, *w1 = w + live[s + 1].index * stride;
    const In *w2 = w + live[s + 2].index * stride, *w3 = w + live[s + 3].index * stride;
    const Acc c0 = live[s].factor, c1 = live[s + 1].factor, c2 = live[s + 2].factor, c3 = live[s + 3].factor;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      total[j] = (((total[j] + c0 * load(w0[j])) + c1 * load(w1[j])) + c2 * load(w2[j])) + c3 * load(w3[j]);
    }
  }
  for (; s < live.size(); ++s) {
    const In* own = w + live[s].index * stride;
    const Acc factor = live[s].factor;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) total[j] += factor * load(own[j]);
  }
}

// A sample whose factor is 0 is not read.
template <class In, class Out>
void weighted_sum_noise(void* out_ptr, const void* w_ptr, int64_t batch, int64_t stride, const float* factors, int64_t n,
                        uint64_t key, uint64_t stream, const Part& part, float level, int threads) {
  using Acc = decltype(load(In{}));
  Out* out = static_cast<Out*>(out_ptr);
  const In* w = static_cast<const In*>(w_ptr);
  const Acc scale = level;
  std::vector<Sample> live;
  for (int64_t b = 0; b < batch; ++b) {
    if (factors[b] != 0) live.push_back({b, factors[b]});
  }
  const int64_t useful = (n * (batch + 1) + kGrain - 1) / kGrain;
  const int team = static_cast<int>(useful < threads ? useful : threads);
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t start = 0; start < n; start += kTile) {
    alignas(64) float z[kTile];
    alignas(64) Acc total[kTile];
    const int64_t count = n - start < kTile ? n - start : kTile;
    add_samples(total, w + start, live, stride, count);
    if (level != 0) {
      tile_normals(z, start, count, part, key, stream);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) total[j] += scale * static_cast<Acc>(z[j]);
    }
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) out[start + j] = store<Out>(total[j]);
  }
}

using SumKernel = void (*)(void*, const void*, int64_t, int64_t, const float*, int64_t, uint64_t, uint64_t, const Part&, float,
                           int);

constexpr SumKernel kSumKernels[3][3] = {
    {weighted_sum_noise<float, float>, weighted_sum_noise<float, bfloat16>, weighted_sum_noise<float, double>},
    {weighted_sum_noise<bfloat16, float>, weighted_sum_noise<bfloat16, bfloat16>, weighted_sum_noise<bfloat16, double>},
    {weighted_sum_noise<double, float>, weighted_sum_noise<double, bfloat16>, weighted_sum_noise<double, double>},
};

using Kernel = void (*)(void*, const void*, int64_t, uint64_t, uint64_t, const Part&, float, int);

// Rows: type of the input; columns: type of the output; both in the order of TYPE_CODES in _cpu.py.
constexpr Kernel kKernels[3][3] = {
    {add_noise<float, float>, add_noise<float, bfloat16>, add_noise<float, double>},
    {add_noise<bfloat16, float>, add_noise<bfloat16, bfloat16>, add_noise<bfloat16, double>},
    {add_noise<double, float>, add_noise<double, bfloat16>, add_noise<double, double>},
};

}  // namespace

// out, in: n contiguous elements each, the same buffer or disjoint ones; words: 64-bit key and stream, and then, if there are
// five, where the value lies in the whole tensor.
extern "C" void flashnorm_add_noise(void* out, const void* in, int64_t n, const uint64_t* words, int count, float std,
                                    int in_type, int out_type, int threads) {
  Part part = {0, INT64_MAX, 0};
  if (count == 5) std::memcpy(&part, words + 2, sizeof(part));
  kKernels[in_type][out_type](out, in, n, words[0], words[1], part, std, threads);
}

// w: `batch` blocks of n contiguous elements, `stride` elements from one to the next; factors: one for each; the rest as above.
extern "C" void flashnorm_weighted_sum_noise(void* out, const void* w, int64_t batch, int64_t stride, const float* factors,
                                             int64_t n, const uint64_t* words, int count, float std, int in_type,
                                             int out_type, int threads) {
  Part part = {0, INT64_MAX, 0};
  if (count == 5) std::memcpy(&part, words + 2, sizeof(part));
  kSumKernels[in_type][out_type](out, w, batch, stride, factors, n, words[0], words[1], part, std, threads);
}
