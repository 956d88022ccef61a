# Every target does all its own set-up on a machine that has Python >= 3.11 and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first of these that runs and is new enough; `make PYTHON=...` names another one.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
UV ?= $(shell command -v uv || echo .tools/bin/uv)
BIN := .venv/bin
# Threads beyond the cores cost time, and two on a busy machine are slower than one.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

.PHONY: help demo test test-slow check install docs bench reliability pins clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: install  ## train on shipped photographs, about a minute; results in runs/demo
	rm -rf runs/demo
	$(BIN)/nnclr demo --out runs/demo

test: check  ## lint, types and the test suite
	$(TEST) -m "not slow and not gpu"

test-slow: install  ## the tests that take minutes
	$(TEST) -m "slow"

reliability: install  ## the fault suite; writes docs/reliability.md
	$(TEST) -m "not slow and not gpu" $$($(BIN)/python -m tests.reliability.record)
	$(BIN)/python -m tests.reliability.page

check: install  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -d site

bench: install .peers/.installed  ## speed beside other libraries on one thread; writes docs/benchmarks.md
	PYTHONPATH=.peers OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

# Without what the peers depend on: only their functions are used, beside the same torch.
.peers/.installed: benchmarks/requirements.txt
	"$(UV)" pip install -q --python $(BIN)/python --target .peers --no-deps --require-hashes -r benchmarks/requirements.txt
	touch $@

install: .venv/.installed  ## the pinned environment in .venv

.venv/.installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "nnclr needs Python 3.11 or newer on the PATH, or: make PYTHON=/path/to/python"; exit 2; }
	test -x "$(UV)" || { "$(PYTHON)" -m venv .tools && .tools/bin/python -m pip install -q uv==0.13.9; }
	"$(UV)" venv -q --clear --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
	"$(UV)" pip install -q --python $(BIN)/python --require-hashes -r requirements.txt
	"$(UV)" pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

pins: ## write requirements.txt anew from pyproject.toml
	printf 'hatchling>=1.26\neditables>=0.5\n' | "$(UV)" pip compile -q --universal --generate-hashes --no-header \
		--no-annotate --python-version 3.11 --extra dev pyproject.toml - -o requirements.txt

clean:  ## remove the environment and caches
	rm -rf .venv .tools .peers .pytest_cache .mypy_cache .ruff_cache
