# Two commands on a fresh machine: `make last6_lora` trains and ends with its result, `make test` runs the tests.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXPERIMENT := stage_3_vision_comparison
ARGS ?=

# torch comes first and pinned: where a local build of it lies, pip must take that one and nothing may pull another.
TORCH := torch==2.13.0

STRATEGIES := last6_lora last6_full all_lora all_full frozen_vision last4_lora last8_lora progressive_lora last6_lora_noisy

.PHONY: help setup setup-dev test test-slow test-faults test-environment check format ui pocket_base $(STRATEGIES)

help:
	@echo "make last6_lora     train a strategy (also: $(filter-out last6_lora,$(STRATEGIES))); ARGS='-P seed=18' passes more"
	@echo "make setup          .venv with the project in it; make setup-dev: and what tests need"
	@echo "make ui             open the MLflow UI on what was trained"
	@echo "make test           set up and run the tests      make check   ruff, format, mypy (make format: mend)"
	@echo "make test-faults    kill runs, servers and disks; ARGS=--long as often as docs/reliability.md says (an hour)"
	@echo "make test-slow      tests that take minutes       make test-environment   build what conda.yaml describes, with uv"
	@echo "make pocket_base    train the built-in base model again (about 25 minutes on two cores)"

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

$(STRATEGIES) pocket_base: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" mlflow run . -e $@ --env-manager local --experiment-name $(EXPERIMENT) $(ARGS)

ui: setup
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

# Two files at a time; a thread each, since many tests start processes that are as busy.
test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup-dev
	$(BIN)/python -m pytest -m slow

test-faults: setup-dev
	$(BIN)/python -m pytest tests/faults -s -m "not environment" $(ARGS)

test-environment: setup-dev
	$(BIN)/python -m pytest -m environment

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
