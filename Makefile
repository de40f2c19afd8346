# `make help` lists the targets. PYTHON chooses the interpreter that makes .venv (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test slow zoo lint types all

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/\1\t\2/' | expand -t 8

demo: $(VENV)/.examples ## train a small model in four stages (seconds, CPU)
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev ## all tests but the slow ones
	$(BIN)/python -m pytest -q -n 2

slow: $(VENV)/.dev ## the slow tests, the zoo aside
	$(BIN)/python -m pytest -q -m "slow and not zoo" -n 2

zoo: $(VENV)/.dev ## all models of the zoo (half an hour of one core)
	$(BIN)/python -m pytest -q -m zoo -n 2

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy --strict on the library
	$(BIN)/mypy

all: lint types test slow zoo ## everything

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamps: installed once, and again when the project's needs change. The environment's python is an order-only need,
# since a link to the system's interpreter changes its time whenever that is updated.
$(VENV)/.examples: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[examples]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	@touch $@
