// The emulator's bodies of what cuda/prims_sm90.cuh declares, as prims.h has those of prims.cuh.

#pragma once

#include "emulator.h"

namespace fastgpt::cuda {

struct TensorMap {
  TensorMapShape shape;
};

// Refuses what cuTensorMapEncodeTiled does.
inline TensorMap make_tensor_map(const TensorMapShape& x) {
  const auto require = [](bool fine, const char* what) {
    if (!fine) throw std::runtime_error(std::string("fastgpt: a tensor map needs ") + what);
  };
  require(reinterpret_cast<uintptr_t>(x.data) % 16 == 0, "data that is aligned to 16 bytes");
  for (const int64_t size : x.size) require(size >= 1 && size <= int64_t{1} << 32, "sizes of 1 to 2^32");
  for (const int64_t stride : x.strides) {
    require(stride % 8 == 0, "strides that are multiples of 16 bytes");
    require(stride >= 0 && stride < int64_t{1} << 39, "strides below 2^40 bytes");
  }
  require(x.box_rows >= 1 && x.box_rows <= 256, "boxes of 1 to 256 rows");
  return {x};
}

// The emulator is every GPU.
inline int compute_capability() { return 90; }

// Here a product in flight has NaN in d, or what it will be.
template <int kN>
void wgmma_landed(float (&)[kN][4]) {}

// Of registers there are as many as the C++ compiler finds.
template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void take_registers() {
  give_registers<kRegisters>();
}

template <class T>
uint32_t shared_address(Shared<T> p, FASTGPT_SITE) {
  return emulator::shared_address(p.address(), site);
}

inline void mbar_init(Shared<uint64_t> bar, int arrivals, FASTGPT_SITE) {
  emulator::init_mbarrier(bar.address(), arrivals, site);
}
inline void mbar_fence_init() { emulator::fence_mbarriers(); }
inline void mbar_arrive(Shared<uint64_t> bar, FASTGPT_SITE) {
  emulator::arrive_at_mbarrier(bar.address(), 0, "mbar_arrive", site);
}
inline void mbar_arrive_expect(Shared<uint64_t> bar, int bytes, FASTGPT_SITE) {
  emulator::arrive_at_mbarrier(bar.address(), bytes, "mbar_arrive_expect", site);
}
inline void mbar_wait(Shared<uint64_t> bar, int parity, FASTGPT_SITE) {
  emulator::wait_for_mbarrier(bar.address(), parity, site);
}

template <class T>
void tma_load(Shared<T> to, const TensorMap& from, Shared<uint64_t> bar, int at0, int at1, int at2, int at3,
              FASTGPT_SITE) {
  const TensorMapShape& x = from.shape;
  emulator::load_box(to.address(),
                     {x.data,
                      {x.size[0], x.size[1], x.size[2], x.size[3]},
                      {x.strides[0], x.strides[1], x.strides[2]},
                      x.box_rows,
                      {at0, at1, at2, at3}},
                     bar.address(), site);
}

inline void wgmma_fence(FASTGPT_SITE) { emulator::fence_products(site); }
inline void wgmma_commit(FASTGPT_SITE) { emulator::commit_products(site); }
template <int kPending>
void wgmma_wait(FASTGPT_SITE) {
  emulator::wait_for_products(kPending, site);
}

template <class T>
FASTGPT_UNSEEN void widen(const uint16_t* from, float* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = half_of(from[i], 0, T());
}

template <class T>
void wgmma_m64n128k16(float (&d)[16][4], uint64_t a, uint64_t b, bool add, FASTGPT_SITE) {
  emulator::start_product({d, a, b, {}, 128, false, add, widen<T>}, "wgmma_m64n128k16", site);
}
template <class T, int kN>
void wgmma_m64k16(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b, FASTGPT_SITE) {
  static_assert(kN == 8 || kN == 16);
  emulator::start_product({d, 0, b, {a[0], a[1], a[2], a[3]}, 8 * kN, true, true, widen<T>}, "wgmma_m64k16", site);
}

}  // namespace fastgpt::cuda
