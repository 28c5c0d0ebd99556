# make quickstart    install, then train, fine-tune, align and ask two small models, in minutes
# make check         lint, types and the quick tests, before every commit: 2 minutes on 2 cores
# make test          check and the default tests: 6 minutes
# make test-all      the slow tests too: 20 minutes
# make format        format the code
PYTHON ?= $(firstword $(foreach name,python3.12 python3.13 python3.11 python3,$(if $(shell $(name) -c "import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13)" 2>/dev/null && echo yes),$(name))))
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

SPREAD := -n 2 --dist loadfile --no-loadscope-reorder  # a file's tests share what takes long to make

.PHONY: help quickstart install install-dev lint check test test-all format clean

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/made:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; say which with PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml constraints.txt
	$(PIP) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/made pyproject.toml constraints.txt
	$(PIP) -e ".[dev]"
	touch $@

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

quickstart: $(VENV)/installed
	$(BIN)/tinsmith quickstart

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint
	$(BIN)/python -m pytest $(SPREAD) -m "check and not slow"

test: lint
	$(BIN)/python -m pytest $(SPREAD) -m "not slow"

test-all: lint
	$(BIN)/python -m pytest $(SPREAD)

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
