// How Python calls a rung: FASTGPT_RUNG is its file, FASTGPT_TASK the function that it defines.

#include <string>

#include FASTGPT_RUNG

namespace {

// The i-th of `arguments` is the address of the function's i-th argument; the stream is the last.
template <class... Args, size_t... kAt>
void call(void (*function)(Args...), void* const* arguments, std::index_sequence<kAt...>) {
  function(*static_cast<Args*>(arguments[kAt])...);
}
template <class... Args>
void call(void (*function)(Args...), void* const* arguments) {
  call(function, arguments, std::index_sequence_for<Args...>());
}

}  // namespace

// What went wrong, or null. No exception may reach Python.
extern "C" const char* fastgpt_rung(void* const* arguments) {
  static thread_local std::string error;
  try {
    call(&FASTGPT_TASK, arguments);
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}
