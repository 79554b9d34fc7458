// Exercise 3: a bank conflict.
//
// Softmax with a thread for each row, and a warp for 32 rows. A thread that walked along its row in global memory would
// make every load touch 32 sectors. So the warp first copies a tile of 32 x 32 elements into shared memory, each load a
// piece of one row; then each thread walks along its own row of the tile. There the 32 threads stand in the same
// column: their addresses lie 32 words apart, all in one of the 32 banks, which serves one of them at a time.
//
// Asked: the same numbers, with every access to shared memory served at once.
//
// Hint: bank = word address % 32. The rows of the tile need not follow on each other without a gap.
//
// Goal: bank conflicts == 0
// Goal: sectors per load request <= 4
// Goal: sectors per store request <= 4

#include "tasks.h"

namespace {

using namespace fastgpt::cuda;

constexpr int kTile = 32;
constexpr int kStride = kTile;  // words from one row of the tile to the next
constexpr int kWords = kTile * kStride;

// Copies columns `first` and on of 32 rows into the tile, -inf where the matrix ends.
FASTGPT_PRIM void load_tile(Shared<float> tile, const float* x, int64_t m, int first, int M, int N) {
  const int n = first + lane_id();
  for (int i = 0; i < kTile; ++i) {
    sts(tile + i * kStride + lane_id(), m + i < M && n < N ? ldg(x + (m + i) * N + n) : -INFINITY);
  }
  __syncwarp();
}

__global__ void softmax_kernel(const float* x, float* y, int M, int N) {
  SHARED(float, tile, kWords);
  const int64_t m = static_cast<int64_t>(blockIdx.x) * kTile;
  const Shared<float> mine = tile + lane_id() * kStride;

  float most = -INFINITY, sum = 0.0f;
  for (int first = 0; first < N; first += kTile) {
    load_tile(tile, x, m, first, M, N);
    float larger = most, piece = 0.0f;
    for (int i = 0; i < kTile; ++i) larger = fmaxf(larger, lds(mine + i));
    for (int i = 0; i < kTile; ++i) piece += __expf(lds(mine + i) - larger);
    sum = sum * __expf(most - larger) + piece;
    most = larger;
    __syncwarp();
  }

  for (int first = 0; first < N; first += kTile) {
    load_tile(tile, x, m, first, M, N);
    for (int i = 0; i < kTile; ++i) sts(mine + i, __expf(lds(mine + i) - most) / sum);
    __syncwarp();
    const int n = first + lane_id();
    for (int i = 0; i < kTile; ++i) {
      if (m + i < M && n < N) stg(y + (m + i) * N + n, lds(tile + i * kStride + lane_id()));
    }
    __syncwarp();
  }
}

}  // namespace

extern "C" void softmax(const float* x, float* y, int M, int N, cudaStream_t stream) {
  launch<softmax_kernel>(grid_of((M + kTile - 1) / kTile), dim3(kWarpSize), 0, stream, x, y, M, N);
}
