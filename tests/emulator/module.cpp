// Python's way to the kernels of this folder: their numbers are addresses, those of tensors.

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;
using namespace fastgpt::cuda::testing;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
#ifdef FASTGPT_EMULATE
  m.def("fault", [](const std::string& name, bool planted, uintptr_t data) {
    faults().at(name)(planted, reinterpret_cast<float*>(data));
  });
  m.def("fault_names", [] {
    py::list names;
    for (const auto& entry : faults()) names.append(entry.first);
    return names;
  });
#endif
  m.def("prim", [](const std::string& name, uintptr_t in, uintptr_t out, int n) {
    prims().at(name)(reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), n);
  });
#if defined(FASTGPT_EMULATE) || defined(FASTGPT_SM90)
  m.def("prim_sm90", [](const std::string& name, uintptr_t in, uintptr_t out, int n) {
    prims_sm90().at(name)(reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), n);
  });
#endif
}
