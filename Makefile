# Each target works alone on a fresh clone. Set-up happens once, and again when a lock changes.
#
#   make run    the whole pipeline on the params.yaml that is here, and a table at the end
#   make test   all tests, in a process for each core, of at most four
#               (make test ARGS="-m 'not slow'" for the quick ones, ARGS="-n 0" in one process)
#   make lint   format, lint and types
#   make lock   the locks again, from pyproject.toml   (make lock UPGRADE=1 for newer versions)
#   make deps   the library files that each stage depends on, again, from its imports
#   make docs   docs/params.md again, from the models
#
# PYTHON is the interpreter to make the environment with, VENV where it goes.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
UPGRADE ?=

SHELL := /bin/sh
BIN := $(abspath $(VENV))/bin
# dvc starts `python`, and that must be the environment's
WITH_VENV := PATH="$(BIN):$$PATH"
# Idle threads of a CPU run sleep instead of spinning: beside other work spinning costs tenfold.
export OMP_WAIT_POLICY ?= passive
PIP := $(BIN)/python -m pip --disable-pip-version-check
UV_VERSION := 0.13.9

.PHONY: run test lint lock deps docs setup setup-dev
.DELETE_ON_ERROR:

run: setup
	$(WITH_VENV) dvc repro $(ARGS)
	@$(WITH_VENV) fitlora summary

test: setup-dev
	$(WITH_VENV) python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: setup-dev
	$(WITH_VENV) ruff format --check .
	$(WITH_VENV) ruff check .
	$(WITH_VENV) mypy

deps: setup-dev
	$(WITH_VENV) python -m scripts.stage_deps

docs: setup
	$(WITH_VENV) python -m scripts.make_docs

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "FitLoRA needs Python 3.10 or newer, and there is no $(PYTHON) here." \
	       "Install one, or name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
	  "FitLoRA needs Python 3.10 or newer, and $(PYTHON) is %d.%d. " % v[:2] + \
	  "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "Installing the locked versions into $(VENV); the first time takes minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq -r requirements.lock
	@# setuptools is in the lock, so the project itself is built without a download
	@$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock
	@echo "Installing what tests and linters need."
	@$(PIP) install -qq -r requirements-dev.lock
	@touch $@

# Resolved for every Python from 3.10 on, preferring the versions that the locks hold already.
# torch pins its CUDA packages itself and differs by build, so they stay out of the locks.
COMPILE := $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.10 --quiet \
  --no-header --annotation-style line $(if $(UPGRADE),--upgrade)
WITHOUT_CUDA := grep -Ev '^(nvidia-(cu|nccl|nvjitlink|nvshmem|nvtx)|cuda-)'
# The tests want Triton beside a CPU build too. It is resolved with torch, so the version in the dev lock
# is the one that the CUDA build of that torch pins, and nothing is replaced where torch brought it.
WITHOUT_TRITON := grep -v '^triton='

define LOCK_HEAD
# Exact versions for `make`, from pyproject.toml. Made by `make lock`; not edited by hand.
# Markers choose by Python version: some packages have left 3.10 behind.
# What torch needs for CUDA is not here: torch pins it itself, and its CPU build needs none of it.
endef
export LOCK_HEAD

lock: setup
	@$(PIP) install -qq uv==$(UV_VERSION)
	@set -e; new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	cp requirements.lock "$$new/run"; cp requirements-dev.lock "$$new/dev"; \
	$(COMPILE) --output-file "$$new/run" >/dev/null; \
	$(COMPILE) --extra dev --constraint "$$new/run" --output-file "$$new/dev" >/dev/null; \
	{ echo "$$LOCK_HEAD"; $(WITHOUT_CUDA) "$$new/run" | $(WITHOUT_TRITON); } > "$$new/run.lock"; \
	{ echo "$$LOCK_HEAD"; $(WITHOUT_CUDA) "$$new/dev" | sed "s|-c $$new/run, ||; s|, -c $$new/run||"; } \
	  > "$$new/dev.lock"; \
	mv "$$new/run.lock" requirements.lock; mv "$$new/dev.lock" requirements-dev.lock
