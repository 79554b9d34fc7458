// The emulator's bodies of what cuda/prims.cuh declares: each does what the instruction does, for one thread of a fiber
// or, in an operation of a warp, for all lanes at once. What they do is said there.

#pragma once

#include <algorithm>

#include "emulator.h"

#define SHARED(T, name, count)                                                     \
  const ::fastgpt::cuda::Shared<T> name(static_cast<T*>(::fastgpt::cuda::array_of( \
      [] {                                                                         \
        static const char tag = 0;                                                 \
        return static_cast<const void*>(&tag);                                     \
      }(),                                                                         \
      sizeof(T) * (count))))

#define DYNAMIC_SHARED(T, name) DYNAMIC_SHARED_ALIGNED(T, name, 128)
#define DYNAMIC_SHARED_ALIGNED(T, name, bytes) \
  const ::fastgpt::cuda::Shared<T> name(static_cast<T*>(::fastgpt::emulator::dynamic_shared(bytes)))

namespace fastgpt::cuda {

using emulator::Access;
using emulator::Lanes;

inline void* array_of(const void* tag, size_t bytes, FASTGPT_SITE) { return emulator::shared_array(tag, bytes, site); }

// Shared memory is none of ThreadSanitizer's business, which does not know when an array is another block's.
#define FASTGPT_UNSEEN __attribute__((no_sanitize("thread")))

template <class T>
T ldg(const T* p, FASTGPT_SITE) {
  emulator::check_global(p, sizeof(T), Access::read, "ldg", site);
  return *p;
}
template <class T>
void stg(T* p, std::remove_cv_t<T> value, FASTGPT_SITE) {
  emulator::check_global(p, sizeof(T), Access::write, "stg", site);
  *p = value;
}
template <class T>
FASTGPT_UNSEEN T lds(Shared<T> p, FASTGPT_SITE) {
  static_assert(sizeof(T) >= 2, "the emulator looks at shared memory two bytes at a time");
  emulator::check_shared(p.address(), sizeof(T), Access::read, "lds", site);
  return *p.address();
}
template <class T>
FASTGPT_UNSEEN void sts(Shared<T> p, std::remove_cv_t<T> value, FASTGPT_SITE) {
  static_assert(sizeof(T) >= 2, "the emulator looks at shared memory two bytes at a time");
  emulator::check_shared(p.address(), sizeof(T), Access::write, "sts", site);
  *p.address() = value;
}

struct MatrixRow {
  const void* address;
  uint16_t at[8];
};
struct MatrixWords {
  uint32_t at[4];
};

template <bool kTransposed, class T>
FASTGPT_UNSEEN void ldmatrix(uint32_t (&out)[4], Shared<T> row, const char* name, emulator::Site site) {
  static_assert(sizeof(T) == 2);
  emulator::check_matrix_row(row.address(), name, site);
  MatrixRow mine{row.address(), {}};
  memcpy(mine.at, row.address(), 16);
  const auto words = emulator::collective<MatrixWords>(
      kFullMask, mine,
      [](Lanes& lanes, unsigned) {
        const void* rows[32];
        for (int lane = 0; lane < 32; ++lane) rows[lane] = lanes.operand<MatrixRow>(lane).address;
        emulator::count_matrix_rows(rows);
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i) {
            auto element = [&](int r, int c) { return uint32_t{lanes.operand<MatrixRow>(8 * i + r).at[c]}; };
            lanes.result<MatrixWords>(lane).at[i] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                                                : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
          }
        }
      },
      name, site);
  for (int i = 0; i < 4; ++i) out[i] = words.at[i];
}
template <class T>
void ldmatrix_x4(uint32_t (&out)[4], Shared<T> row, FASTGPT_SITE) {
  ldmatrix<false>(out, row, "ldmatrix_x4", site);
}
template <class T>
void ldmatrix_x4_trans(uint32_t (&out)[4], Shared<T> row, FASTGPT_SITE) {
  ldmatrix<true>(out, row, "ldmatrix_x4_trans", site);
}

inline float half_of(uint32_t pair, int i, bf16) {
  const uint32_t bits = i == 0 ? pair << 16 : pair & 0xffff0000u;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float half_of(uint32_t pair, int i, fp16) {
  const uint32_t half = pair >> (16 * i);
  // The fraction and exponent of a half, moved to their places in a float, are off by a factor of 2^112; its infinities
  // and NaNs end up at 2^16 and beyond.
  uint32_t bits = (half & 0x7fffu) << 13;
  float x;
  memcpy(&x, &bits, sizeof(x));
  x *= 0x1p112f;
  if (x >= 0x1p16f) {
    bits |= 0x7f800000u;
    memcpy(&x, &bits, sizeof(x));
  }
  return half & 0x8000u ? -x : x;
}

struct MmaOperands {
  float c[4];
  uint32_t a[4], b[2];
};
struct MmaResult {
  float c[4];
};

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FASTGPT_SITE) {
  const MmaOperands mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto result = emulator::collective<MmaResult>(
      kFullMask, mine,
      [](Lanes& lanes, unsigned) {
        float A[16][16], B[16][8], C[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const auto& x = lanes.operand<MmaOperands>(lane);
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 2; ++j) A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + j] = half_of(x.a[i], j, T());
            C[g + 8 * (i / 2)][2 * t + i % 2] = x.c[i];
          }
          for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 2; ++j) B[2 * t + 8 * i + j][g] = half_of(x.b[i], j, T());
          }
        }
        for (int m = 0; m < 16; ++m) {
          for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) C[m][n] += A[m][k] * B[k][n];
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            lanes.result<MmaResult>(lane).c[i] = C[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
          }
        }
        emulator::count_mma();
      },
      "mma_m16n8k16", site);
  for (int i = 0; i < 4; ++i) c[i] = result.c[i];
}

template <class T>
void cp_async_16(Shared<T> to, const T* from, bool valid = true, FASTGPT_SITE) {
  emulator::copy_async(to.address(), from, valid, site);
}
inline void cp_async_commit() { emulator::commit_async(); }
template <int kPending>
void cp_async_wait(FASTGPT_SITE) {
  emulator::wait_async(kPending, site);
}

inline void bar_sync(int id, int count, FASTGPT_SITE) { emulator::named_barrier(id, count, "bar_sync", site); }

// Correctly rounded, which a GPU's is not.
inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

// There are no streams. This keeps the place of the launch, which a pack of arguments leaves no room for.
struct Stream {
  Stream(cudaStream_t, FASTGPT_SITE) : launched_at(site) {}
  emulator::Site launched_at;
};

template <auto kKernel, class... Args>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Args&... args) {
  auto body = [&] { kKernel(args...); };
  emulator::launch(
      __PRETTY_FUNCTION__, grid, block, shared_bytes, [](void* context) { (*static_cast<decltype(body)*>(context))(); },
      &body, stream.launched_at);
}

}  // namespace fastgpt::cuda
