// Picks the instruction set, once, when the library is loaded. Compiled for the baseline.

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastgpt {

// Which of these exist is the build's to say: it defines FASTGPT_HAS_... for each one that the compiler can make.
namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}

namespace {

#if defined(FASTGPT_HAS_AVX2)
// Conversions from and to fp16, which clang's __builtin_cpu_supports does not know by name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

struct Choice {
  const Kernels* kernels;
  const char* error;
};

// From the best to the plainest. __builtin_cpu_supports also asks whether the operating system saves the registers.
Choice choose() {
  const char* wanted = std::getenv("FASTGPT_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  [[maybe_unused]] auto fits = [&](const Kernels& table) { return any || std::strcmp(wanted, table.isa) == 0; };
  bool known = any || std::strcmp(wanted, "baseline") == 0;
#if defined(FASTGPT_HAS_AVX2)  // what the compiler has beyond it, it has too
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                       __builtin_cpu_supports("avx512vl");
#endif
#if defined(FASTGPT_HAS_AVX512_BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16") && fits(avx512_bf16::table)) return {&avx512_bf16::table, nullptr};
#endif
#if defined(FASTGPT_HAS_AVX512)
  if (avx512 && fits(avx512::table)) return {&avx512::table, nullptr};
#endif
#if defined(FASTGPT_HAS_AVX2)
  if (avx2 && fits(avx2::table)) return {&avx2::table, nullptr};
#endif
  if (known) return {&baseline::table, nullptr};
  return {&baseline::table,
          "FASTGPT_CPU_ISA names no instruction set that this build and this processor have (the names are baseline, "
          "avx2, avx512 and avx512_bf16)"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().kernels; }

const char* isa_error() { return choice().error; }

}  // namespace fastgpt

extern "C" __attribute__((visibility("default"))) const char* fastgpt_isa() { return fastgpt::kernels().isa; }

extern "C" __attribute__((visibility("default"))) const char* fastgpt_isa_error() { return fastgpt::isa_error(); }
