# Each target sets up its own virtual environment first, from pinned versions. PYTHON is the interpreter that it is made with.
PYTHON ?= python3
RUN := .venv/bin/python -m
PIP := $(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt
# pytest ends with 5 where a marker selects nothing.
OR_NONE := || [ $$? -eq 5 ]

.PHONY: demo test bench lint

demo: .venv/.stamp
	$(RUN) validation.demo --out demo_out

test: .venv/.stamp
	$(RUN) pytest -q
	$(RUN) pytest -q -m "slow and not gpu and not benchmark" $(OR_NONE)

bench: .venv/.stamp
	$(RUN) pytest -m "benchmark and not gpu" --benchmark-only -n 0 tests $(OR_NONE)

lint: .venv/.stamp
	$(RUN) ruff check .
	$(RUN) ruff format --check --quiet .
	$(RUN) mypy

.venv/.stamp: pyproject.toml constraints.txt tests/trainers.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'schedlab needs Python 3.11 or newer: make PYTHON=python3.12')"
	@echo "setting up .venv from constraints.txt (once, some minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e ".[dev]"
	@$(PIP) --no-deps -r tests/trainers.txt
	@touch $@
