// Drives every launcher of csrc/cuda/kernels.h in the emulator, for ThreadSanitizer: no Python and no torch, which it
// would know nothing about. Sizes are small, and enough to come to every kernel that is compiled. Prints the kernels
// that ran. `tsan NAME` plants the fault of that name in faults.cu instead, and `tsan` runs them all without.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>
#include <utility>

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/emulator/control.h"
#include "kernels.h"

namespace {

using namespace fastgpt;

constexpr Dtype kDtypes[] = {Dtype::fp32, Dtype::bf16, Dtype::fp16};

// Memory of exact size that lives until the end.
void* memory(int64_t bytes) {
  static std::deque<std::vector<unsigned char>> all;
  return all.emplace_back(static_cast<size_t>(bytes)).data();
}

template <class T>
T* array(int64_t n, T value = {}) {
  T* data = static_cast<T*>(memory(n * static_cast<int64_t>(sizeof(T))));
  for (int64_t i = 0; i < n; ++i) data[i] = value;
  return data;
}

// n numbers from 1 to 2; they only have to be numbers.
void* numbers(Dtype dtype, int64_t n) {
  static std::mt19937 random;
  if (dtype == Dtype::fp32) {
    float* x = array<float>(n);
    for (int64_t i = 0; i < n; ++i) x[i] = 1.0f + static_cast<float>(random() % 1024) / 1024.0f;
    return x;
  }
  uint16_t* x = array<uint16_t>(n);
  for (int64_t i = 0; i < n; ++i) {
    x[i] = static_cast<uint16_t>(dtype == Dtype::bf16 ? 0x3f80 | random() % 128 : 0x3c00 | random() % 1024);
  }
  return x;
}

float* floats(int64_t n) { return static_cast<float*>(numbers(Dtype::fp32, n)); }

const int64_t* const seed = array<int64_t>(1, 42);

cuda::Drop dropping(bool drop) { return {drop ? seed : nullptr, 1u << 30, 4.0f / 3.0f}; }

// f(dtype, dtype of parameters), both the same where rows are long: that takes its time.
template <class F>
void for_each_pair(int64_t N, F f) {
  for (const Dtype dtype : kDtypes) {
    f(dtype, dtype);
    if (dtype != Dtype::fp32 && N < 100) f(dtype, Dtype::fp32);
  }
}

void layer_norm(int64_t M, int64_t N) {
  for_each_pair(N, [&](Dtype dtype, Dtype weight_dtype) {
    const Rows x{numbers(dtype, M * N), N}, dy{numbers(dtype, M * N), N};
    const void *weight = numbers(weight_dtype, N), *bias = numbers(weight_dtype, N);
    float *mean = array<float>(M), *rstd = array<float>(M);
    cuda::layer_norm_fwd({x, weight, bias, numbers(dtype, M * N), mean, rstd, M, N, 1e-5f, dtype, weight_dtype}, {});
    cuda::layer_norm_bwd(
        {dy, x, weight, mean, rstd, numbers(dtype, M * N), numbers(weight_dtype, N), numbers(weight_dtype, N),
         array<float>(cuda::row_blocks(M) * 2 * N), M, N, dtype, weight_dtype},
        {});
  });
}

void add_layer_norm(int64_t M, int64_t N) {
  for_each_pair(N, [&](Dtype dtype, Dtype weight_dtype) {
    for_each_pair(1, [&](Dtype x_dtype, Dtype stream_dtype) {
      if (x_dtype != dtype) return;
      for (const bool drop : {false, true}) {
        if (drop && N > 100) continue;
        const Rows x{numbers(dtype, M * N), N}, residual{numbers(stream_dtype, M * N), N};
        const Rows dy{numbers(dtype, M * N), N}, dresidual_out{numbers(stream_dtype, M * N), N};
        const void *weight = numbers(weight_dtype, N), *bias = numbers(weight_dtype, N);
        void *y = numbers(dtype, M * N), *residual_out = numbers(stream_dtype, M * N);
        float *mean = array<float>(M), *rstd = array<float>(M);
        cuda::add_layer_norm_fwd({x, residual, weight, bias, y, residual_out, mean, rstd, M, N, 1e-5f, dropping(drop),
                                  dtype, stream_dtype, weight_dtype},
                                 {});
        void* dx = drop || dtype != stream_dtype ? numbers(dtype, M * N) : nullptr;
        cuda::add_layer_norm_bwd({dy,
                                  dresidual_out,
                                  {residual_out, N},
                                  weight,
                                  mean,
                                  rstd,
                                  dx,
                                  numbers(stream_dtype, M * N),
                                  numbers(weight_dtype, N),
                                  numbers(weight_dtype, N),
                                  array<float>(cuda::row_blocks(M) * 2 * N),
                                  M,
                                  N,
                                  dropping(drop),
                                  dtype,
                                  stream_dtype,
                                  weight_dtype},
                                 {});
      }
    });
  });
}

void softmax(int64_t M, int64_t N) {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t Tq : {int64_t{0}, M}) {
      void* y = numbers(dtype, M * N);
      cuda::softmax_fwd({{numbers(dtype, M * N), N}, y, M, N, Tq, 0.5f, dtype}, {});
      cuda::softmax_bwd({{numbers(dtype, M * N), N}, {y, N}, numbers(dtype, M * N), M, N, Tq, 0.5f, dtype}, {});
    }
  }
}

void gelu(int64_t M, int64_t N) {
  for_each_pair(N, [&](Dtype dtype, Dtype bias_dtype) {
    for (const bool tanh : {false, true}) {
      for (const bool with_bias : {false, true}) {
        const Rows x{numbers(dtype, M * N), N}, dy{numbers(dtype, M * N), N};
        const void* bias = with_bias ? numbers(bias_dtype, N) : nullptr;
        cuda::gelu_fwd({x, bias, numbers(dtype, M * N), M, N, dtype, bias_dtype, tanh}, {});
        cuda::gelu_bwd({dy, x, bias, numbers(dtype, M * N), numbers(bias_dtype, N),
                        array<float>(cuda::row_blocks(M) * N), M, N, dtype, bias_dtype, tanh},
                       {});
      }
    }
  });
}

void dropout(int64_t M, int64_t N) {
  for (const Dtype dtype : kDtypes) {
    cuda::dropout({numbers(dtype, M * N), numbers(dtype, M * N), M * N, dropping(true), dtype}, {});
  }
}

void cross_entropy(int64_t M, int64_t V) {
  int64_t* targets = array<int64_t>(M);
  for (int64_t m = 0; m < M; ++m) targets[m] = m % 5 == 3 ? -100 : m % V;
  float *inverse = array<float>(1), *loss = array<float>(1);
  cuda::inverse_count(targets, M, -100, inverse, {});
  for (const Dtype dtype : kDtypes) {
    void* logits = numbers(dtype, M * V);
    float *losses = array<float>(M), *stats = array<float>(2 * M);
    for (void* dlogits : {static_cast<void*>(nullptr), numbers(dtype, M * V), logits}) {
      cuda::cross_entropy_fwd({{logits, V}, targets, dlogits, losses, stats, M, V, -100, inverse, dtype}, {});
    }
    cuda::mean_loss(losses, M, inverse, loss, {});
    void* dlogits = numbers(dtype, M * V);
    cuda::cross_entropy_bwd({{logits, V}, targets, dlogits, stats, M, V, -100, floats(1), inverse, dtype}, {});
    cuda::scale_gradient({dlogits, M * V, floats(1), dtype}, {});
    for (const bool first : {true, false}) cuda::add_scaled({floats(M * V), dlogits, M * V, 0.5f, first, dtype}, {});
  }
}

// Rows that no block holds.
void long_rows() {
  const int64_t V = 120001;
  int64_t* target = array<int64_t>(1, 7);
  for (const Dtype dtype : kDtypes) {
    void* logits = numbers(dtype, V);
    cuda::cross_entropy_fwd({{logits, V}, target, logits, floats(1), floats(2), 1, V, -100, floats(1), dtype}, {});
  }
}

void attention(int64_t T, int64_t D, bool is_causal, bool drop, bool padded = true) {
  const AttentionShape shape{2, 1, T, T, D};
  const int32_t* seqlens_k = padded ? array<int32_t>(2, static_cast<int32_t>(T - 3)) : nullptr;
  for (const Dtype dtype : kDtypes) {
    const auto tensor = [&] { return Heads{numbers(dtype, 2 * T * D), T * D, T * D, D}; };
    const Heads q = tensor(), k = tensor(), v = tensor(), o = tensor();
    float* lse = array<float>(2 * T);
    cuda::attention_fwd({shape, q, k, v, o, lse, seqlens_k, dropping(drop), 0.1f, is_causal, dtype}, {});
    cuda::attention_bwd({shape, tensor(), q, k, v, o, tensor(), tensor(), tensor(), lse, array<float>(2 * T), seqlens_k,
                         dropping(drop), 0.1f, is_causal, dtype},
                        {});
  }
}

void lists() {
  std::vector<AdamwItem> adamw;
  std::vector<ClipItem> clip;
  int64_t blocks = 0;
  for (const int64_t n : {1, 33, 8192, 20000, 4096}) {
    for_each_pair(1, [&](Dtype grad, Dtype param) {
      const auto tensor = [&](Dtype dtype) { return ListedTensor{numbers(dtype, n), dtype}; };
      const ListedTensor gradient = tensor(grad);
      adamw.push_back({tensor(param), gradient, tensor(param), tensor(param), n, blocks});
      clip.push_back({gradient, n, blocks});
      blocks += list_blocks(n);
    });
  }
  const int64_t count = static_cast<int64_t>(adamw.size());
  cuda::adamw({adamw.data(), count, floats(1), floats(1), 0.9f, 0.99f, 0.1f, 0.01f, std::log(0.9f), std::log(0.99f),
               1e-8f, 0.1f},
              {});
  cuda::clip_grad_norm({clip.data(), count, blocks, array<float>(cuda::clip_programs(blocks)), floats(1), 1.0f}, {});
}

void run_all() {
  // Rows of a warp's size, aligned and not, and rows longer than what a block holds.
  for (const auto& [M, N] : {std::pair<int64_t, int64_t>{21, 65}, {17, 64}, {2, 9001}}) {
    layer_norm(M, N);
    add_layer_norm(M, N);
    softmax(M, N);
    gelu(M, N);
    dropout(M, N);
    cross_entropy(M, N);
  }
  long_rows();
  for (const int64_t D : {32, 64, 96, 128, 256}) attention(40, D, true, true);
  attention(130, 30, false, false);
  setenv("FASTGPT_HOPPER_ATTENTION", "1", 1);
  for (const int64_t D : {64, 128}) attention(200, D, D == 64, D == 64, false);
  lists();
  for (const auto& entry : cuda::testing::faults()) entry.second(false, floats(1024));
}

}  // namespace

int main(int argc, char** argv) {
  emulator::Settings settings;
  settings.workers = 2;  // blocks on one OS thread look ordered
  emulator::configure(settings);
  if (argc > 1) {
    cuda::testing::faults().at(argv[1])(true, floats(1024));
    return 0;
  }
  run_all();
  for (const auto& [kernel, counters] : emulator::counters()) std::printf("%s\n", kernel.c_str());
}
