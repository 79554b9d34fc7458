// layer_norm 5: the row is read once, and stays in registers.
//
// A lane keeps its share of the row in an array whose size the compiler knows and whose indices it can unroll, so that
// the array is registers and not memory. Both passes that follow the first read it from there. That bounds a row: 32
// lanes with 8 vectors of 4 floats hold 1024 elements.
//
// With the row at hand there is no reason for the tempting "one pass" of textbooks, variance = mean(x^2) - mean(x)^2.
// It subtracts two numbers that agree in most of their digits where the mean is large beside the spread: with a mean of
// 1000 and a variance of 1 both are a million, where fp32's neighbours are 0.06 apart. Taking the mean first and the
// squares about it keeps all digits, and costs arithmetic alone. (Welford's formula keeps them as well, in one pass,
// with a division for each element: it is for data that cannot be had twice.)
//
// Moves: x once and y once, 8 bytes an element; weight and bias, another 8, come from the cache, where all rows find
// them.
//
// Last rung: x was read three times.
//
// Gains: two of five loads of an element are gone.
//
// Promise: load sectors <= 0.61 x 04_vector_loads
// Promise: store sectors == 1 x 04_vector_loads
// Promise: barriers == 0

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kWarps = 4;
constexpr int kLongest = 1024;  // elements of a row

template <int kCount>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    layer_norm_registers_kernel(const float* x, const float* weight, const float* bias, float* y, float* mean,
                                float* rstd, int M, int N, float eps) {
  using Vector = Vec<float, kCount>;
  constexpr int kItems = kLongest / kWarpSize / kCount;  // vectors of a lane
  const auto load = [](const float* p) { return ldg(reinterpret_cast<const Vector*>(p)); };
  const int m = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  if (m >= M) return;
  const int64_t start = static_cast<int64_t>(m) * N;
  const auto column = [](int item) { return (item * kWarpSize + lane_id()) * kCount; };

  Vector row[kItems];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (column(i) >= N) continue;
    row[i] = load(x + start + column(i));
    for (int j = 0; j < kCount; ++j) sum += row[i][j];
  }
  const float its_mean = warp_sum(sum) / N;

  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (column(i) >= N) continue;
    for (int j = 0; j < kCount; ++j) squares += (row[i][j] - its_mean) * (row[i][j] - its_mean);
  }
  const float its_rstd = 1.0f / sqrtf(warp_sum(squares) / N + eps);
  if (lane_id() == 0) {
    stg(mean + m, its_mean);
    stg(rstd + m, its_rstd);
  }

#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (column(i) >= N) continue;
    const Vector w = load(weight + column(i)), b = load(bias + column(i));
    for (int j = 0; j < kCount; ++j) row[i][j] = (row[i][j] - its_mean) * its_rstd * w[j] + b[j];
    stg(reinterpret_cast<Vector*>(y + start + column(i)), row[i]);
  }
}

}  // namespace

extern "C" void layer_norm(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd,
                           int M, int N, float eps, cudaStream_t stream) {
  if (N > kLongest) throw std::runtime_error("this rung holds rows of at most 1024 elements in registers");
  const dim3 grid = grid_of((M + kWarps - 1) / kWarps), block(kWarps * kWarpSize);
  if (N % 4 == 0) {
    launch<layer_norm_registers_kernel<4>>(grid, block, 0, stream, x, weight, bias, y, mean, rstd, M, N, eps);
  } else {
    launch<layer_norm_registers_kernel<1>>(grid, block, 0, stream, x, weight, bias, y, mean, rstd, M, N, eps);
  }
}
