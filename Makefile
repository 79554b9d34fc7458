# train, test and lint each set up what they need in .venv; `make test PYTHON=python3.12` chooses the interpreter for it.
# gpu-check takes $(PYTHON) as it is; `make gpu-check STAGE=bench` chooses the stage: test, sanitize or bench.
PYTHON ?= python3
STAGE ?= test
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test test-full kernel-table bench-cpu lint format gpu-check clean

train: $(VENV)/installed
	$(BIN)/fastgpt train $(ARGS)

test: $(VENV)/installed
	$(BIN)/pytest $(ARGS)

test-full: $(VENV)/installed
	$(BIN)/pytest --full $(ARGS)

# What the Triton kernels compile to, into docs/kernels.md: three chips, no GPU, a few minutes.
kernel-table: $(VENV)/installed
	$(BIN)/python tests/triton_matrix.py --doc docs/kernels.md

# Every mark of the CPU kernels, in some minutes on an idle machine: `make bench-cpu ARGS='--only attention --json'`.
bench-cpu: $(VENV)/installed
	$(BIN)/python -m fastgpt.benchmarks.cpu $(ARGS)

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastgpt

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Nothing is installed, and nothing downloaded: links in a passing folder put the package together as setuptools would.
gpu-check:
	@tree=$$(mktemp -d) && trap 'rm -rf "$$tree"' EXIT HUP INT TERM && \
	cp -rs "$(CURDIR)/fastgpt" "$$tree/" && \
	cp -rs "$(CURDIR)/benchmarks" "$(CURDIR)/triton_kernels" "$$tree/fastgpt/" && \
	PYTHONPATH="$$tree$${PYTHONPATH:+:$$PYTHONPATH}" \
	$(PYTHON) "$$tree/fastgpt/benchmarks/gpu_check.py" --stage $(STAGE) $(ARGS)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/installed-lint: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
