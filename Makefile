# Every target sets up what it needs first; `make setup` by itself is idempotent.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test setup lint fix type bench bench-gpu reproduce clean

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

# MERGEKIT: the command mergekit-yaml of an environment of its own. DISK_BENCH: --quick where disk or time is short.
# REGMIX: a folder with the mixtures and losses of RegMix's runs (github.com/sail-sg/regmix).
MERGEKIT ?=
REGMIX ?=
DISK_BENCH ?=
RESULTS := benchmarks/results

bench: setup
	$(BIN)/python -m benchmarks.bench_kernel --out $(RESULTS)/bench_kernel-cpu.json
	$(BIN)/python -m benchmarks.bench_merge_disk $(DISK_BENCH) $(if $(MERGEKIT),--mergekit $(MERGEKIT)) \
		--out $(RESULTS)/bench_merge_disk.json
	$(BIN)/python -m benchmarks.bench_memory $(DISK_BENCH) --out $(RESULTS)/bench_memory.json
	$(BIN)/python -m benchmarks.bench_lora $(DISK_BENCH) --out $(RESULTS)/bench_lora.json
	$(BIN)/python -m benchmarks.bench_swap $(DISK_BENCH) $(if $(MERGEKIT),--mergekit $(MERGEKIT)) \
		--out $(RESULTS)/bench_swap.json
	$(BIN)/python -m benchmarks.bench_racing --out $(RESULTS)/bench_racing.json
	$(BIN)/python -m benchmarks.bench_eval --out $(RESULTS)/bench_eval.json
	$(BIN)/python -m benchmarks.bench_train --out $(RESULTS)/bench_train.json
	$(BIN)/python -m benchmarks.bench_surrogate $(if $(REGMIX),--data $(REGMIX)) --out $(RESULTS)/bench_surrogate.json
	$(BIN)/python -m benchmarks.bench_search $(if $(REGMIX),--data $(REGMIX)) --out $(RESULTS)/bench_search.json

bench-gpu: setup
	$(BIN)/python -m benchmarks.bench_kernel --device cuda --out $(RESULTS)/bench_kernel-gpu.json
	$(BIN)/python -m benchmarks.bench_swap --device cuda --sparse --shape 16gb --device-cache 70 --host-cache 0 \
		--out $(RESULTS)/bench_swap-gpu-resident.json
	$(BIN)/python -m benchmarks.bench_swap --device cuda --sparse --shape 16gb --experts 6 --host-cache 100 \
		--out $(RESULTS)/bench_swap-gpu-host.json
	$(BIN)/python -m benchmarks.bench_swap --device cuda --sparse --shape moe-16b --experts 2 --device-cache 66 \
		--host-cache 0 --out $(RESULTS)/bench_swap-gpu-moe.json

# The paper in miniature. SCALE=gpu: larger models, for a GPU. What is done is kept in mergemix-reproduce, and goes on there.
SCALE ?= cpu
reproduce: setup
	$(BIN)/python -W ignore -m benchmarks.reproduce --scale $(SCALE) --work mergemix-reproduce/$(SCALE) \
		--out $(RESULTS)/reproduce$(if $(filter gpu,$(SCALE)),-gpu)

clean:
	rm -rf $(VENV) mergemix-demo mergemix-reproduce .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
