// The kernels of tests/test_emulator.py and tests/test_prims.py, by the name of what launches them. Pointers are to
// device memory, as in csrc/cuda/kernels.h.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace fastgpt::cuda::testing {

// Kernels that do something wrong where `planted`, in block (1, 1, 0) of four, and the like of it rightly otherwise.
// data: 1024 floats.
using Fault = void (*)(bool planted, float* data);
const std::map<std::string, Fault>& faults();

// Kernels that each use one primitive. They read `in` and write `out`; what they hold, and what `n` is, each says.
using Prim = void (*)(const void* in, void* out, int n);
const std::map<std::string, Prim>& prims();
const std::map<std::string, Prim>& prims_sm90();  // Hopper's

}  // namespace fastgpt::cuda::testing
