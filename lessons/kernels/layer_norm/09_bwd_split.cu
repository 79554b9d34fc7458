// layer_norm's backward 3: everything in one pass, and column sums in two stages.
//
// A warp takes eight rows, one after the other. It reads a row of dy and of x into registers, makes dx from there, and
// adds the row's part of dweight and dbias to sums that stay in registers, too: each lane keeps those of the columns
// that it reads. What its rows add up to it writes as one line of partial sums, and a second kernel adds up the lines.
// No two warps add to the same number, so that no atomics are needed, and the sums have the same bits each time.
//
// Moves: dy and x once and dx once, 12 bytes an element, and weight, 4, from the cache; a line, 8 bytes a column for
// each eight rows, out and in again: 2 bytes an element more.
//
// Last rung: x and dy were read three times; and there were only as many threads as columns, each with a sum as long as
// the matrix is high: with 768 columns 24 warps, where a large GPU has room for thousands, walk down all rows.
//
// Gains: less than half of the sectors; a quarter of the requests for them; and as many warps as there are rows / 8.
//
// Promise: load sectors <= 0.5 x 08_bwd_columns
// Promise: load requests <= 0.2 x 08_bwd_columns

#include "long_sum.cuh"

namespace {

using namespace fastgpt::cuda;

constexpr int kWarps = 4;
constexpr int kRows = 8;  // of a warp
constexpr int kLongest = 1024;

template <int kCount>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    layer_norm_bwd_kernel(const float* dy, const float* x, const float* weight, const float* mean, const float* rstd,
                          float* dx, float* lines, int M, int N) {
  using Vector = Vec<float, kCount>;
  constexpr int kItems = kLongest / kWarpSize / kCount;
  const auto load = [](const float* p) { return ldg(reinterpret_cast<const Vector*>(p)); };
  const auto store = [](float* p, const Vector& v) { stg(reinterpret_cast<Vector*>(p), v); };
  const auto column = [](int item) { return (item * kWarpSize + lane_id()) * kCount; };
  const int line = static_cast<int>(blockIdx.x) * kWarps + warp_id(), first = line * kRows;
  if (first >= M) return;

  Vector sum_weight[kItems] = {}, sum_bias[kItems] = {};
  for (int m = first; m < min(first + kRows, M); ++m) {
    const int64_t start = static_cast<int64_t>(m) * N;
    const float its_mean = ldg(mean + m), its_rstd = ldg(rstd + m);
    Vector g[kItems], xhat[kItems];  // dy * weight, and x normalised
    float sum_g = 0.0f, sum_gx = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (column(i) >= N) continue;
      xhat[i] = load(x + start + column(i));
      const Vector its_dy = load(dy + start + column(i)), w = load(weight + column(i));
      for (int j = 0; j < kCount; ++j) {
        xhat[i][j] = (xhat[i][j] - its_mean) * its_rstd;
        g[i][j] = __fmul_rn(its_dy[j], w[j]);
        sum_g += g[i][j];
        sum_gx += g[i][j] * xhat[i][j];
        sum_weight[i][j] += its_dy[j] * xhat[i][j];
        sum_bias[i][j] += its_dy[j];
      }
    }
    const float mean_g = warp_sum(sum_g) / N, mean_gx = warp_sum(sum_gx) / N;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (column(i) >= N) continue;
      for (int j = 0; j < kCount; ++j) g[i][j] = its_rstd * (g[i][j] - mean_g - xhat[i][j] * mean_gx);
      store(dx + start + column(i), g[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (column(i) >= N) continue;
    store(lines + static_cast<int64_t>(2 * line) * N + column(i), sum_weight[i]);
    store(lines + static_cast<int64_t>(2 * line + 1) * N + column(i), sum_bias[i]);
  }
}

// A thread for each column of the (count, 2, N) lines.
__global__ void __launch_bounds__(kWarpSize)
    layer_norm_lines_kernel(const float* lines, int count, float* dweight, float* dbias, int N) {
  const int column = static_cast<int>(blockIdx.x) * kWarpSize + lane_id();
  if (column >= 2 * N) return;
  lessons::LongSum sum;
  for (int i = 0; i < count; ++i) sum.add(ldg(lines + static_cast<int64_t>(i) * 2 * N + column));
  stg(column < N ? dweight + column : dbias + (column - N), sum.total());
}

}  // namespace

extern "C" void layer_norm_bwd(const float* dy, const float* x, const float* weight, const float* mean,
                               const float* rstd, float* dx, float* dweight, float* dbias, int M, int N,
                               cudaStream_t stream) {
  if (N > kLongest) throw std::runtime_error("this rung holds rows of at most 1024 elements in registers");
  const int count = (M + kRows - 1) / kRows;
  lessons::Scratch<float> lines(static_cast<size_t>(count) * 2 * N, stream);
  const dim3 grid = grid_of((count + kWarps - 1) / kWarps), block(kWarps * kWarpSize);
  if (N % 4 == 0) {
    launch<layer_norm_bwd_kernel<4>>(grid, block, 0, stream, dy, x, weight, mean, rstd, dx, lines.data(), M, N);
  } else {
    launch<layer_norm_bwd_kernel<1>>(grid, block, 0, stream, dy, x, weight, mean, rstd, dx, lines.data(), M, N);
  }
  launch<layer_norm_lines_kernel>(grid_of((2 * N + kWarpSize - 1) / kWarpSize), dim3(kWarpSize), 0, stream,
                                  lines.data(), count, dweight, dbias, N);
}
