// The emulator's Python module; fastgpt/emulator.py builds and imports it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "control.h"
#include "emulator.h"

namespace py = pybind11;
using namespace fastgpt::emulator;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);
  py::enum_<Order>(m, "Order")
      .value("in_order", Order::in_order)
      .value("reversed", Order::reversed)
      .value("random", Order::random)
      .value("skewed", Order::skewed);
  py::class_<Settings>(m, "Settings")
      .def(py::init<>())
      .def_readwrite("order", &Settings::order)
      .def_readwrite("lazy_copies", &Settings::lazy_copies)
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("workers", &Settings::workers)
      .def_readwrite("count_banks", &Settings::count_banks)
      .def_readwrite("count_memory", &Settings::count_memory);
  m.def("settings", &settings);
  m.def("configure", &configure);
  py::class_<Traffic>(m, "Traffic")
      .def_readonly("requests", &Traffic::requests)
      .def_readonly("sectors", &Traffic::sectors)
      .def_readonly("bytes", &Traffic::bytes);
  py::class_<Counters>(m, "Counters")
      .def_readonly("launches", &Counters::launches)
      .def_readonly("blocks", &Counters::blocks)
      .def_readonly("barriers", &Counters::barriers)
      .def_readonly("mma", &Counters::mma)
      .def_readonly("ldmatrix", &Counters::ldmatrix)
      .def_readonly("copies", &Counters::copies)
      .def_readonly("shared_accesses", &Counters::shared_accesses)
      .def_readonly("bank_conflicts", &Counters::bank_conflicts)
      .def_readonly("loads", &Counters::loads)
      .def_readonly("stores", &Counters::stores);
  m.def("counters", &counters);
  m.def("reset_counters", &reset_counters);
  m.def("add_memory", [](uintptr_t begin, size_t bytes, const std::string& name) {
    add_memory(reinterpret_cast<const void*>(begin), bytes, name);
  });
  m.def("remove_memory", [](uintptr_t begin) { remove_memory(reinterpret_cast<const void*>(begin)); });
  py::class_<Wait>(m, "Wait")
      .def_readonly("name", &Wait::name)
      .def_readonly("file", &Wait::file)
      .def_readonly("line", &Wait::line)
      .def_readonly("off", &Wait::off);
  m.def("waits", &waits);
  m.def("switch_off", &switch_off);
  m.def("switch_all_on", &switch_all_on);
}
