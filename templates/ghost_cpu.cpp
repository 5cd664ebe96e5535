// Squared norms of per-sample weight gradients from inner products of positions ("ghost norms"), for float32 on a CPU.
//
//   ||G_b^T A_b||^2 = sum_{t,s} (g_t . g_s) (a_t . a_s),   G_b [T, p], A_b [T, d], each row contiguous
//
// One item is a block of kColumns positions s of one sample, with all positions t from the block's first on; what lies below the
// block counts twice, since both matrices of inner products are symmetric. They are never whole in memory, and half of them is
// never computed.
//
// Inner products run along the rows, kWidth elements at a time, into kTileRows x kTileColumns vectors of partial sums, which a tree
// of shuffles adds up. Rows are cut into pieces of kPiece elements, so that a block's columns stay in the nearest cache while
// the rows stream past them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileColumns = 4;
#elif defined(__AVX__)
constexpr int kWidth = 8, kTileColumns = 2;  // 16 registers: 8 partial sums and their operands
#else
constexpr int kWidth = 4, kTileColumns = 4;
#endif
constexpr int kTileRows = 4;
constexpr int kColumns = 8;
constexpr int kPiece = 512;
constexpr int kRows = 512;  // rows whose inner products are held at a time: 16 KiB of each matrix

// Squared lengths below this may have lost terms that float32 cannot hold.
constexpr float kTiny = 1e-25f;

typedef float Vector __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }

// x's runs of Run lanes added in pairs, where the first of a pair lies; y's, where the second does.
template <int Run, size_t... Lane>
inline Vector folded(Vector x, Vector y, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(x, y, (Lane & Run ? kWidth + Lane : Lane)...) +
         __builtin_shufflevector(x, y, (Lane & Run ? kWidth + Lane - Run : Lane + Run)...);
}

// The sums of kWidth vectors, in their order.
template <int Count = kWidth>
inline Vector totals(const Vector* x) {
  if constexpr (Count == 1) {
    return x[0];
  } else {
    constexpr int kHalf = Count / 2;
    Vector half[kHalf];
    for (int i = 0; i < kHalf; ++i) half[i] = folded<kHalf>(x[i], x[i + kHalf], std::make_index_sequence<kWidth>());
    return totals<kHalf>(half);
  }
}

// out[r * kColumns + c] += x_r . y_c, for Rows rows of x and Columns rows of y with `count` elements each.
template <int Rows, int Columns>
inline void add_tile(const float* x, const float* y, int64_t x_stride, int64_t y_stride, int64_t count, float* out) {
  constexpr int kVectors = (Rows * Columns + kWidth - 1) / kWidth * kWidth;
  Vector partial[kVectors] = {};
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    Vector right[Columns];
    for (int c = 0; c < Columns; ++c) right[c] = load(y + c * y_stride + k);
    for (int r = 0; r < Rows; ++r) {
      const Vector left = load(x + r * x_stride + k);
      __builtin_prefetch(x + (r + Rows) * x_stride + k);  // the next tile's
      for (int c = 0; c < Columns; ++c) partial[r * Columns + c] += left * right[c];
    }
  }
  float products[kVectors];
  for (int i = 0; i < kVectors; i += kWidth) {
    const Vector part = totals(partial + i);
    std::memcpy(products + i, &part, sizeof part);
  }
  for (; k < count; ++k)
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Columns; ++c) products[r * Columns + c] += x[r * x_stride + k] * y[c * y_stride + k];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) out[r * kColumns + c] += products[r * Columns + c];
}

template <int Rows>
void add_rows(const float* x, const float* y, int columns, int64_t stride, int64_t count, float* out) {
  int c = 0;
  for (; c + kTileColumns <= columns; c += kTileColumns)
    add_tile<Rows, kTileColumns>(x, y + c * stride, stride, stride, count, out + c);
  for (; c < columns; ++c) add_tile<Rows, 1>(x, y + c * stride, stride, stride, count, out + c);
}

// gram[r * kColumns + c] = x_r . y_c
void inner_products(const float* x, const float* y, int64_t rows, int columns, int64_t stride, int64_t width, float* gram) {
  std::fill(gram, gram + rows * kColumns, 0.0f);
  for (int64_t k = 0; k < width; k += kPiece) {
    const int64_t count = std::min<int64_t>(kPiece, width - k);
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) add_rows<kTileRows>(x + r * stride + k, y + k, columns, stride, count, gram + r * kColumns);
    for (; r < rows; ++r) add_rows<1>(x + r * stride + k, y + k, columns, stride, count, gram + r * kColumns);
  }
}

// What a row's squared length may lack: the squares that are flushed to zero; nothing to speak of if it is large, or the row is zero.
double lost(float squared_length, const float* row, int64_t width) {
  if (squared_length >= kTiny) return 0;
  const bool zero = std::all_of(row, row + width, [](float x) { return x == 0; });
  return zero ? 0 : static_cast<double>(std::numeric_limits<float>::min()) * width;
}

}  // namespace

// out [batch, 3]: the sum above; the reach sum_t |g_t| |a_t|; and by how much the norm may exceed the sum's root because short rows
// lost terms. Strides in elements. The result does not depend on the number of threads.
extern "C" void flashnorm_ghost_norm(const float* g, const float* a, double* out, int64_t batch, int64_t length, int64_t p, int64_t d,
                                     int64_t g_batch, int64_t g_row, int64_t a_batch, int64_t a_row, int threads) {
  const int64_t blocks = (length + kColumns - 1) / kColumns, items = batch * blocks;
  std::vector<double> parts(3 * items);
  const int team = static_cast<int>(std::min<int64_t>(threads, items));
  const int64_t turn = std::max<int64_t>(1, items / (4 * std::max(team, 1)));
#pragma omp parallel for schedule(dynamic, turn) num_threads(team) if (team > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t b = item / blocks, first = item % blocks * kColumns;
    const int columns = static_cast<int>(std::min<int64_t>(kColumns, length - first));
    const float *g_b = g + b * g_batch, *a_b = a + b * a_batch;
    alignas(64) float g_gram[kRows * kColumns], a_gram[kRows * kColumns];
    double sum = 0, reach = 0, missing = 0;
    for (int64_t row = first; row < length; row += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, length - row);
      inner_products(g_b + row * g_row, g_b + first * g_row, rows, columns, g_row, p, g_gram);
      inner_products(a_b + row * a_row, a_b + first * a_row, rows, columns, a_row, d, a_gram);
      for (int64_t r = 0; r < rows; ++r) {
        const float *gg = g_gram + r * kColumns, *aa = a_gram + r * kColumns;
        const int64_t t = row + r, own = t - first;
        double line = 0;
#pragma omp simd reduction(+ : line)
        for (int c = 0; c < columns; ++c) line += static_cast<double>(gg[c]) * aa[c];
        sum += own < columns ? line : 2 * line;
        if (own >= columns) continue;
        const double g_lost = lost(gg[own], g_b + t * g_row, p), a_lost = lost(aa[own], a_b + t * a_row, d);
        reach += std::sqrt(static_cast<double>(gg[own]) * aa[own]);
        missing += std::sqrt(g_lost * (aa[own] + a_lost)) + std::sqrt(a_lost * (gg[own] + g_lost));
      }
    }
    parts[3 * item] = sum;
    parts[3 * item + 1] = reach;
    parts[3 * item + 2] = missing;
  }
  std::fill(out, out + 3 * batch, 0.0);
  for (int64_t i = 0; i < 3 * items; ++i) out[i / (3 * blocks) * 3 + i % 3] += parts[i];
}
