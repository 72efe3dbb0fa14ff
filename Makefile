# Everyone's five commands. `make setup` runs by itself where it is needed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

# Every pip, also those that build packages, keeps to the tested versions: otherwise a dependency
# may replace the machine's torch by another build.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Ranks share the machine's cores; one thread each keeps them from fighting.
export OMP_NUM_THREADS ?= 1

PYTEST := $(BIN)/python -m pytest
# Files side by side, since their tests share fixtures. nproc would take OMP_NUM_THREADS for the
# number of cores.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc); echo $$((n < 8 ? n : 8)))
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-all lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install everything, once

$(STAMP): setup.py pyproject.toml constraints.txt
	@python=; without_venv=; \
	for candidate in python3.11 python3.12 python3; do \
	  if $$candidate -c 'import sys; sys.exit((3, 11) > sys.version_info[:2] or sys.version_info[:2] > (3, 12))' 2>/dev/null; then \
	    if $$candidate -c 'import ensurepip, venv' 2>/dev/null; then python=$$candidate; break; fi; \
	    without_venv="$$without_venv $$candidate"; \
	  fi; \
	done; \
	if [ -z "$$python" ] && [ -n "$$without_venv" ]; then \
	  echo "make setup: no venv module in$$without_venv; install it (Debian: apt-get install python3-venv)" >&2; exit 1; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "make setup: no Python 3.11 or 3.12 on PATH; install one (Debian 12: apt-get install python3 python3-venv)" >&2; exit 1; \
	fi; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: setup ## train and check a tiny model on this machine
	$(BIN)/mvlm demo

test: lint ## lint and the tests for every commit
	$(PYTEST) $(PARALLEL) -m "not slow and not cluster"

test-cluster: setup ## faults on a real Slurm cluster of namespaces; needs root and Slurm
	$(PYTEST) -m cluster

test-all: lint ## lint and every test
	$(PYTEST) $(PARALLEL) -m "not cluster"
	$(PYTEST) -m cluster

lint: setup ## check style, types and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the code in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
