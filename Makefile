# make quickstart | make test | make gpu-test | make kernel-budget | make setup | make lint | make format | make clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.specdec-installed
DEV_STAMP := $(VENV)/.specdec-dev-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup dev quickstart test gpu-test kernel-budget lint format clean

setup: $(STAMP)

dev: $(DEV_STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "specdec needs Python >= 3.11; point PYTHON at one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot make $(VENV): install your system's venv package (e.g. apt install python3-venv)"; exit 1; }
	@echo "installing into $(VENV): a few minutes the first time"
	@$(PIP) install -qq --editable '.[test]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	@$(PIP) install -qq --editable '.[test,dev]'
	@touch $@

quickstart: setup
	$(BIN)/python -m specdec.run +experiment=quickstart

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

# On a machine with a GPU: the kernels and the engine compiled for it instead of interpreted.
gpu-test: setup
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/kernels/triton tests/kernels/test_compile.py tests/engine -m gpu

# What the kernels take on GPUs that need not be here; fails on spills and on too much shared memory.
kernel-budget: setup
	$(BIN)/python -W ignore -m specdec_kernels.aot --write kernels/BUDGET.md

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
