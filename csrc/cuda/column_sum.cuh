// Sums over rows, in two stages and without atomics, so that they come out the same each time: every block leaves a
// line of what its rows add up to, and a second kernel adds up the lines.

#pragma once

#include "rows.cuh"

namespace fastgpt::cuda {

// This thread's share of the block's line: in registers, or, where rows are too long for that (kItems = 0), in the line
// itself, which no other block touches.
template <int kItems, int kCount>
class ColumnSums {
 public:
  // Adds an item of for_each_item. `line` is where its first column is; `first` says that nothing is in it yet.
  FASTGPT_PRIM void add(const float (&values)[kCount], int i, float* line, int64_t left, bool first, bool vectors) {
    if constexpr (kItems > 0) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums_[i][j] += values[j];
    } else {
      float sum[kCount] = {};
      if (!first) load_floats(sum, line, left, vectors);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j] += values[j];
      store_floats(line, sum, left, vectors);
    }
  }

  // Writes the line of a block that has had `rows` rows, once the sums of its rows side by side are one. All threads of
  // the block come here.
  FASTGPT_PRIM void finish(float* line, int64_t N, bool any_row, bool vectors) {
    if constexpr (kItems > 0) {
      DYNAMIC_SHARED(float, total);  // column_sums_bytes
      for (unsigned y = 1; y < blockDim.y; ++y) {
        if (threadIdx.y == y) {
          for_each_item<kItems, kCount>(N, [&](int i, int64_t, int64_t) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) sts(total + slot(i, j), sums_[i][j]);
          });
        }
        __syncthreads();
        if (threadIdx.y == 0) {
          for_each_item<kItems, kCount>(N, [&](int i, int64_t, int64_t) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) sums_[i][j] += lds(total + slot(i, j));
          });
        }
        __syncthreads();
      }
      if (threadIdx.y != 0) return;
      for_each_item<kItems, kCount>(
          N, [&](int i, int64_t c, int64_t left) { store_floats(line + c, sums_[i], left, vectors); });
    } else if (!any_row) {
      for_each_item<kItems, kCount>(N, [&](int, int64_t c, int64_t left) {
        const float zero[kCount] = {};
        store_floats(line + c, zero, left, vectors);
      });
    }
  }

 private:
  // Lanes lie side by side: no two of a warp in one bank.
  static FASTGPT_PRIM int slot(int i, int j) { return (i * kCount + j) * static_cast<int>(blockDim.x) + threadIdx.x; }

  float sums_[kItems > 0 ? kItems : 1][kCount] = {};
};

// The shared memory that ColumnSums::finish needs.
template <class T>
size_t column_sums_bytes(const RowBlocks& blocks) {
  return blocks.block.y > 1 ? blocks.block.x * kHeldItems * kVecSize<T> * sizeof(float) : 0;
}

constexpr int kColumnLines = 16;  // lines that a block adds side by side

// partial: (lines, columns), fp32. The sums of the first N columns go to out, of the next N to out2.
template <class T>
__global__ void __launch_bounds__(kWarpSize* kColumnLines)
    column_sum_kernel(const float* partial, int64_t lines, int64_t columns, T* out, T* out2, int64_t N) {
  SHARED(float, sums, kColumnLines* kWarpSize);
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + tx;
  float sum = 0.0f;
  if (column < columns) {
    for (int64_t line = ty; line < lines; line += kColumnLines) sum += ldg(partial + line * columns + column);
  }
  sts(sums + ty * kWarpSize + tx, sum);
  __syncthreads();
  if (ty != 0 || column >= columns) return;
  for (int i = 1; i < kColumnLines; ++i) sum += lds(sums + i * kWarpSize + tx);
  stg(column < N ? out + column : out2 + (column - N), from_float<T>(sum));
}

// partial: (lines, N), or (lines, 2, N) where there is an out2.
template <class T>
void column_sum(const float* partial, int64_t lines, int64_t N, T* out, T* out2, cudaStream_t stream) {
  const int64_t columns = out2 == nullptr ? N : 2 * N;
  launch<column_sum_kernel<T>>(grid_of((columns + kWarpSize - 1) / kWarpSize), dim3(kWarpSize, kColumnLines), 0, stream,
                               partial, lines, columns, out, out2, N);
}

}  // namespace fastgpt::cuda
