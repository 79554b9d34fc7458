// The functions of math.h over an array, for their tests.

#include "math.h"

#include "parallel.h"

namespace fastgpt::FASTGPT_ISA {

void math(const Pool& pool, const Math& a) {
  auto map = [&](auto f) {
    parallel_for(pool, a.n, 16384, [&](int64_t begin, int64_t end) {
      for_each_vec(end - begin, [&](int64_t i, int n) { store_n(a.y + begin + i, f(load_n(a.x + begin + i, n)), n); });
    });
  };
  switch (a.function) {
    case MathFunction::exp:
      return map(vexp);
    case MathFunction::log:
      return map(vlog);
    case MathFunction::tanh:
      return map(vtanh);
    case MathFunction::erf:
      return map(verf);
  }
}

}  // namespace fastgpt::FASTGPT_ISA
