# One command a habit. Every target sets up what it needs; a second run reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

ARMS := full nsa nsa_paper third_dense sliding

.PHONY: help demo study test test-fast test-gpu bench check format tensorboard clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.installed  ## train the quickstart model on Python's own source files (CPU, a few minutes)
	$(BIN)/nsa fit --config configs/quickstart.yaml

test-fast: $(VENV)/.installed-dev  ## run the tests that are not slow: what to run while working
	$(PYTEST) -m "not slow"

test: $(VENV)/.installed-dev  ## run the test suite
	$(PYTEST)

test-gpu: $(VENV)/.installed-dev  ## run the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu -n 8 --dist worksteal

bench: $(VENV)/.installed  ## check and time the kernels beside full attention (CUDA GPU, several minutes)
	$(BIN)/nsa bench kernels --overwrite true

check: $(VENV)/.installed-dev  ## formatting, lint, strict types, import contracts, the commands in the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest tests/test_documentation.py tests/test_imports.py

format: $(VENV)/.installed-dev  ## format and apply the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

study: $(VENV)/.installed  ## a small copy of the from-scratch study on a CPU: docs/quality.md has the full one
	test -e runs/study-cpu/set/manifest.json || $(BIN)/nsa prepare --sources '["{stdlib}/**/*.py"]' \
		--exclude '["**/site-packages/**", "**/test/**", "**/tests/**"]' --tokenizer.vocab_size 4096 \
		--val_fraction 0.03 --test_fraction 0 --output_dir runs/study-cpu/set
	for arm in $(ARMS); do \
		$(BIN)/nsa fit --config configs/study/base.yaml --config configs/study/$$arm.yaml --config configs/study/cpu.yaml \
			--data.prepared runs/study-cpu/set --trainer.logger.init_args.save_dir runs/study-cpu || exit; \
	done
	$(BIN)/nsa bench study --runs_dir runs/study-cpu

tensorboard: $(VENV)/.installed  ## open the runs on localhost
	$(BIN)/tensorboard --logdir runs

clean:  ## remove the environment and the caches of the tools
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@ $(VENV)/.installed
