# train, test and lint each set up what they need in .venv; `make test PYTHON=python3.12` chooses the interpreter for it.
# gpu-check takes $(PYTHON) as it is; `make gpu-check STAGE=bench` chooses the stage: test, sanitize or bench.
PYTHON ?= python3
STAGE ?= test
OUT ?= runs/bench
VENV := .venv
# The tests are single-threaded, so each of up to eight cores takes one file of them after another.
WORKERS := --numprocesses logical --maxprocesses 8 --dist loadfile
BIN := $(VENV)/bin
CPP := $(shell find csrc tests lessons -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: train test test-full wheel sanitize sanitize-cuda kernel-table cuda-table bench bench-cpu readme \
    lint format gpu-check clean

train: $(VENV)/built
	$(BIN)/fastgpt train $(ARGS)

test: $(VENV)/built
	$(BIN)/pytest $(WORKERS) $(ARGS)

test-full: $(VENV)/built
	$(BIN)/pytest --full $(WORKERS) $(ARGS)

# A wheel for this platform, any Python from 3.10 on and any torch from 2.10 on, in dist/.
wheel: $(VENV)/installed
	rm -rf build/lib.* build/bdist.*
	FASTGPT_CPP=1 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

# The C++ kernels with ASan and UBSan in them, held to all of their tests on each instruction set of this processor.
sanitize: $(VENV)/installed
	BIN=$(CURDIR)/$(BIN) tests/sanitize.sh $(ARGS)

# The CUDA kernels in the emulator: with ASan and UBSan held to all of their tests, and driven under ThreadSanitizer.
sanitize-cuda: $(VENV)/installed
	BIN=$(CURDIR)/$(BIN) tests/sanitize_cuda.sh $(ARGS)
	$(BIN)/python tests/tsan.py

# What the Triton kernels compile to, into docs/kernels.md: three chips, no GPU, a few minutes.
kernel-table: $(VENV)/installed
	$(BIN)/python tests/triton_matrix.py --doc docs/kernels.md

# What the CUDA kernels compile to, into docs/cuda.md: two chips, no GPU, a few minutes of nvcc.
cuda-table: $(VENV)/installed
	$(BIN)/python tests/cuda_compile.py --doc docs/cuda.md

# A round of minutes on this machine's CPU, and its report: `make bench OUT=here`. A run that is not valid (the machine did
# not stand still) is in the report, too, and says so.
bench: $(VENV)/built
	mkdir -p $(OUT)
	-$(BIN)/fastgpt bench kernels --device cpu --size small --dtype fp32 --limit 150 --out $(OUT)/kernels.json
	-$(BIN)/fastgpt bench scaling --device cpu --model shakespeare-cpu --model small --mode eager --dtype fp32 \
	    --sweep shakespeare-cpu --block-size 0 --batch-size 1 --tokens 768 --rounds 7 --limit 75 \
	    --out $(OUT)/scaling.json
	-$(BIN)/fastgpt bench generate --device cpu --model shakespeare-cpu --rounds 7 --limit 45 --out $(OUT)/generate.json
	$(BIN)/fastgpt bench report $(OUT)/kernels.json $(OUT)/scaling.json $(OUT)/generate.json --out $(OUT)/report.html

# Every op in full size, with the marks of the C++ kernels, in benchmarks/results: for an idle machine.
bench-cpu: $(VENV)/built
	$(BIN)/fastgpt bench kernels --device cpu --marks $(ARGS)

# The README's measured tables and figure: `make readme RESULTS='benchmarks/results/X.json benchmarks/results/Y.json'`, or
# without RESULTS from the files that it names.
readme: $(VENV)/installed
	$(BIN)/python -m fastgpt.benchmarks.readme $(RESULTS)

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastgpt
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Nothing is installed, and nothing downloaded: the extension is built in place, for this machine's GPUs, and links in a
# passing folder put the package together as setuptools would.
gpu-check:
	@archs="$(GPU_ARCHS)"; test -z "$$archs" || \
	FASTGPT_CUDA=1 TORCH_CUDA_ARCH_LIST="$$archs" $(PYTHON) setup.py --quiet build_ext --inplace
	@tree=$$(mktemp -d) && trap 'rm -rf "$$tree"' EXIT HUP INT TERM && \
	cp -rs "$(CURDIR)/fastgpt" "$$tree/" && \
	cp -rs "$(CURDIR)/benchmarks" "$(CURDIR)/triton_kernels" "$(CURDIR)/csrc" "$$tree/fastgpt/" && \
	PYTHONPATH="$$tree$${PYTHONPATH:+:$$PYTHONPATH}" \
	$(PYTHON) "$$tree/fastgpt/benchmarks/gpu_check.py" --stage $(STAGE) $(ARGS)

# Nothing is downloaded twice: the extension is built with the torch that is installed here, not in isolation.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools ninja
	FASTGPT_CPP=0 FASTGPT_CUDA=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
	    --editable '.[test]'
	touch $@

# Compute capabilities of this machine's GPUs.
GPU_ARCHS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+\.[0-9]$$' | sort -u)

# Only what changed is compiled. Where there is no extension to be had, fastgpt works without, and the next make tries
# again. The CUDA kernels take minutes: they are compiled for the GPUs of this machine, and where it has none, not at all.
$(VENV)/built: export TORCH_CUDA_ARCH_LIST ?= $(GPU_ARCHS)
$(VENV)/built: export FASTGPT_CUDA ?= $(if $(strip $(TORCH_CUDA_ARCH_LIST)),auto,0)
$(VENV)/built: $(VENV)/installed setup.py $(shell find csrc)
	$(BIN)/python setup.py --quiet build_ext --inplace
	test ! -e fastgpt/_cpu.abi3.so || touch $@

# The extra of what is already installed.
$(VENV)/installed-lint: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'fastgpt[lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache fastgpt/*.so fastgpt/_build.json
