# Two commands for everyone: `make quickstart` and `make test`. Both make .venv once, and install again only when what is installed changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: quickstart test lint clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/.installed
	@$(BIN)/streamcl run quickstart

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(BIN)/pip:
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(BIN)/pip
	@echo "installing streamcl and what it is built on into $(VENV): about 6 GB, mostly PyTorch and CUDA; a few minutes, once"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV)"
	@$(PIP) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
