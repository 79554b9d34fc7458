// Kernels over lists of tensors of any sizes and dtypes, in one launch for many of them.
//
// Addresses and sizes travel as arguments of the kernel: a table on the device would have to be copied there, which a
// CUDA graph could only do again from host memory that has long been used for something else. Arguments are limited to
// 4096 bytes, and so a long list takes several launches. Tensors are cut into blocks of kListBlock elements, by their
// sizes alone; any mixture of dtypes goes through the same code, which asks for the dtype where it widens a number.

#pragma once

#include "kernels.h"
#include "prims.cuh"

namespace fastgpt::cuda {

constexpr int kListThreads = 256;
constexpr size_t kMaxArguments = 4096;  // bytes
constexpr int kQuad = 4;                // elements that a thread moves at a time: 16 bytes in fp32, 8 in half precision

// Four elements of a tensor as they are in memory. They are widened when all that a thread waits for has been asked
// for: a conversion in between would wait for its own load first.
class Quad {
 public:
  // Zeros from `left` on. `whole`: all four are there or none, at a multiple of their size.
  FASTGPT_PRIM void load(const ListedTensor& x, int64_t at, int64_t left, bool whole) {
    if (x.dtype == Dtype::fp32) {
      load(static_cast<const uint32_t*>(x.data) + at, left, whole);
    } else {
      load(static_cast<const uint16_t*>(x.data) + at, left, whole);
    }
  }

  FASTGPT_PRIM void get(float (&to)[kQuad], Dtype dtype) const {
    if (dtype == Dtype::fp32) {
      widen<float>(to);
    } else if (dtype == Dtype::bf16) {
      widen<bf16>(to);
    } else {
      widen<fp16>(to);
    }
  }

  static FASTGPT_PRIM void store(const ListedTensor& x, int64_t at, int64_t left, bool whole,
                                 const float (&from)[kQuad]) {
    if (x.dtype == Dtype::fp32) {
      put(static_cast<float*>(x.data) + at, left, whole, from);
    } else if (x.dtype == Dtype::bf16) {
      put(static_cast<bf16*>(x.data) + at, left, whole, from);
    } else {
      put(static_cast<fp16*>(x.data) + at, left, whole, from);
    }
  }

 private:
  template <class T>
  FASTGPT_PRIM void load(const T* p, int64_t left, bool whole) {
    constexpr int kWords = sizeof(T), kHalf = sizeof(T) == 2;
    if (whole && left > 0) {
      const auto words = ldg(reinterpret_cast<const Vec<uint32_t, kWords>*>(p));
#pragma unroll
      for (int i = 0; i < kWords; ++i) words_[i] = words[i];
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words_[i] = 0;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (j < left) words_[j >> kHalf] |= static_cast<uint32_t>(ldg(p + j)) << (kHalf * j % 2 * 16);
      }
    }
  }

  template <class T>
  FASTGPT_PRIM void widen(float (&to)[kQuad]) const {
    Vec<T, kQuad> v;
    memcpy(&v, &words_, sizeof(v));
#pragma unroll
    for (int j = 0; j < kQuad; ++j) to[j] = to_float(v[j]);
  }

  template <class T>
  static FASTGPT_PRIM void put(T* p, int64_t left, bool whole, const float (&from)[kQuad]) {
    Vec<T, kQuad> v;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) v[j] = from_float<T>(from[j]);
    if (whole && left > 0) {
      stg(reinterpret_cast<Vec<T, kQuad>*>(p), v);
      return;
    }
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (j < left) stg(p + j, v[j]);
    }
  }

  Vec<uint32_t, kQuad> words_;
};

// kLists tensors of one size, what belongs to one parameter.
template <int kLists>
struct Together {
  void* data[kLists];
  int64_t numel;
  int32_t first_block;  // how many blocks those before this one have in this launch
  uint8_t dtype[kLists];

  FASTGPT_PRIM ListedTensor tensor(int i) const { return {data[i], static_cast<Dtype>(dtype[i])}; }
};

// As much of a list as one launch takes.
template <int kLists>
struct Chunk {
  static constexpr int kRoom = static_cast<int>((kMaxArguments - 256) / sizeof(Together<kLists>));  // 256: the rest

  Together<kLists> items[kRoom];
  int32_t count;
  int32_t blocks;
};

// Calls f(item, first element, first element beyond, whether quads are whole) for a block of the chunk.
template <int kLists, class F>
FASTGPT_PRIM void with_list_block(const Chunk<kLists>& chunk, int32_t block, F f) {
  int begin = 0, end = chunk.count;
  while (end - begin > 1) {
    const int middle = (begin + end) / 2;
    (chunk.items[middle].first_block <= block ? begin : end) = middle;
  }
  const Together<kLists>& item = chunk.items[begin];
  const int64_t first = static_cast<int64_t>(block - item.first_block) * kListBlock;
  const int64_t last = min(first + kListBlock, item.numel);
  bool whole = (last - first) % kQuad == 0;
#pragma unroll
  for (int i = 0; i < kLists; ++i) whole = whole && reinterpret_cast<uintptr_t>(item.data[i]) % 16 == 0;
  f(item, first, last, whole);
}

// f(chunk) for a list cut into launches; once at least. `tensors(item)` gives an array of an item's kLists tensors.
template <int kLists, class Item, class Tensors, class F>
void for_each_chunk(const Item* items, int64_t count, Tensors tensors, F f) {
  Chunk<kLists> chunk;
  int64_t i = 0;
  do {
    chunk.count = chunk.blocks = 0;
    for (; i < count && chunk.count < chunk.kRoom; ++i) {
      if (items[i].numel == 0) continue;
      Together<kLists>& item = chunk.items[chunk.count++];
      const auto listed = tensors(items[i]);
      for (int j = 0; j < kLists; ++j) {
        item.data[j] = listed[j].data;
        item.dtype[j] = static_cast<uint8_t>(listed[j].dtype);
      }
      item.numel = items[i].numel;
      item.first_block = chunk.blocks;
      chunk.blocks += static_cast<int32_t>(list_blocks(item.numel));
    }
    f(chunk);
  } while (i < count);
}

}  // namespace fastgpt::cuda
