#!/usr/bin/env bash
# Runs the tests of the C++ kernels with ASan and UBSan in the extension: torch allocates every tensor by itself, so that
# a byte read or written beyond one is reported with its line. `make sanitize` calls this; arguments go to pytest, which
# runs in tests/. CXX chooses the compiler, FASTGPT_CPU_ISA one instruction set.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${CXX:-}" ]; then CXX=$(command -v clang++ || command -v g++); fi # clang's sees masked loads and stores
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
if "$CXX" --version | grep -q clang; then
  runtime=$("$CXX" -print-file-name="libclang_rt.asan-$(uname -m).so")
  link="$flags -shared-libasan"
else
  runtime=$("$CXX" -print-file-name=libasan.so)
  link=$flags
fi
built=$PWD/build/sanitize/$(basename "$CXX")
CXX=$CXX FASTGPT_CPP=1 FASTGPT_CUDA=0 CFLAGS=$flags LDFLAGS=$link \
  "$BIN/python" setup.py --quiet build --debug --build-lib "$built/lib" --build-temp "$built/temp"

cd tests # not where Python would find the extension without sanitizers
export PYTHONPATH=$built/lib OMP_NUM_THREADS=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export ASAN_OPTIONS=detect_leaks=0 # Python leaves its own behind
for isa in ${FASTGPT_CPU_ISA:-baseline avx2 avx512 avx512_bf16}; do
  export FASTGPT_CPU_ISA=$isa
  # libstdc++ comes along for ASan to find its __cxa_throw.
  preload="$runtime $("$CXX" -print-file-name=libstdc++.so.6)"
  missing=$(LD_PRELOAD=$preload "$BIN/python" -c "
from fastgpt import extension
assert extension.__file__.startswith('$built'), extension.__file__
print(extension.cpp_missing() or '')")
  case $missing in
    "") ;;
    *FASTGPT_CPU_ISA*) echo "$isa: not on this machine"; continue ;;
    *) echo "$missing"; exit 1 ;;
  esac
  echo "$isa:"
  LD_PRELOAD=$preload "$BIN/pytest" -q -k cpp --capture=sys "$@"
done
