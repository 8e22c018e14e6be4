# One command a habit. Every target sets up what it needs; a second run reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt

.PHONY: help demo test test-gpu bench check format tensorboard clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.installed  ## train the quickstart model on Python's own source files (CPU, a few minutes)
	$(BIN)/nsa fit --config configs/quickstart.yaml

test: $(VENV)/.installed-dev  ## run the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-gpu: $(VENV)/.installed-dev  ## run the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu -n 8 --dist worksteal

bench: $(VENV)/.installed  ## check and time the kernels beside full attention (CUDA GPU, several minutes)
	$(BIN)/nsa bench kernels --overwrite true

check: $(VENV)/.installed-dev  ## formatting, lint, strict types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed-dev  ## format and apply the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

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
