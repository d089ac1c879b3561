# make demo  shows the idea: the small shipped model, its lookup table streamed from flash
# make test  checks everything: format, lint, types, tests, documents
#
# Both work in a fresh clone: they make .venv and install into it first, once.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= 2

BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCE := edge_memllm runtimes export tests docs benchmarks examples

.DEFAULT_GOAL := help
.PHONY: help setup demo test check pytest gpu format docs clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## make .venv and install everything needed to develop (once)

# torch goes first and pinned: left to the resolver, a newer one may come with gigabytes of CUDA.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "setup: $(PYTHON) is too old, Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "setup: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing $(TORCH) (a large download, once)"
	@$(PIP) '$(TORCH)'
	@echo "setup: installing edge-memllm and its development tools"
	@$(PIP) --editable '.[dev]'
	@touch $(READY)
	@echo "setup: done, everything is in $(VENV)"

demo: setup  ## export the shipped model, run it from its table, show the figures
	@$(BIN)/edge-memllm demo --out build/tiny-english --overwrite

test: check pytest  ## everything continuous integration checks
	@echo "test: all green"

check: setup  ## format, lint, types, generated documents
	$(BIN)/ruff format --check $(SOURCE)
	$(BIN)/ruff check $(SOURCE)
	$(BIN)/mypy
	$(BIN)/python docs/cli_reference.py --check
	$(BIN)/python docs/roofline.py --check
	$(BIN)/python -m benchmarks.paper page --check

# One arithmetic thread per worker: several pools on few cores only wait for each other.
pytest: setup  ## the tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

gpu: setup  ## on a machine with CUDA: the tests that need it and the benchmark, one report
	$(BIN)/python benchmarks/gpu.py

format: setup  ## rewrite the files in the house format
	$(BIN)/ruff format $(SOURCE)
	$(BIN)/ruff check --fix $(SOURCE)

docs: setup  ## write docs/cli.md again from --help
	$(BIN)/python docs/cli_reference.py

clean:  ## remove caches and build output, keep .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
