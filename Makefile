# Every target sets up what it needs first; `make setup` by itself is idempotent.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test setup lint fix type bench bench-gpu clean

demo: setup
	$(BIN)/mergemix demo

test: setup
	$(BIN)/python -m pytest tests

setup:
	@$(PYTHON) scripts/setup.py --venv $(VENV)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.bench_kernel --out benchmarks/results/bench_kernel-cpu.json

bench-gpu: setup
	$(BIN)/python -m benchmarks.bench_kernel --device cuda --out benchmarks/results/bench_kernel-gpu.json

clean:
	rm -rf $(VENV) mergemix-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
