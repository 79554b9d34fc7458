#!/usr/bin/env bash
# Runs the tests of the CUDA kernels in the emulator with ASan and UBSan in it: torch allocates every tensor by itself, so
# that a byte read or written beyond one is reported with its line. `make sanitize-cuda` calls this, and then the
# program that tests/tsan.py builds; arguments go to pytest, which runs in tests/.
set -euo pipefail
cd "$(dirname "$0")"
CXX=${CXX:-g++}
export CXX OMP_NUM_THREADS=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# Python leaves its own behind. The other would give each CUDA thread, which lives for a moment, megabytes to fill.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
export FASTGPT_EMULATE_CFLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
if "$CXX" --version | grep -q clang; then
  FASTGPT_EMULATE_CFLAGS+=" -shared-libasan"
  runtime=$("$CXX" -print-file-name="libclang_rt.asan-$(uname -m).so")
else
  runtime=$("$CXX" -print-file-name=libasan.so)
fi
# libstdc++ comes along for ASan to find its __cxa_throw.
export LD_PRELOAD="$runtime $("$CXX" -print-file-name=libstdc++.so.6)"
exec "$BIN/python" -m pytest -q -k "cuda or emulator or prims" --capture=sys "$@"
