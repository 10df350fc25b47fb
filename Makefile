# make demo: everything from nothing to a trained policy.   make test: the tests.   make help: all of it.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one test process per core (at most 4), one thread in each; a file's tests stay together
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadscope --durations 25

.PHONY: help setup demo test test-all lint format

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(STAMP)  ## make .venv and install the pinned dependencies (once)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup  ## the whole pipeline on the built-in tiny model and data, on CPU
	$(BIN)/python train.py

test: setup lint  ## lint and the quick tests
	$(PYTEST) -m "not full"

test-all: setup lint  ## every test, three seeds
	$(PYTEST)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
