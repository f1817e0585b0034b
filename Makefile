# Everything runs in .venv, which `make setup` makes; nothing but python3 (3.10 or newer) is needed beforehand.
#   PYTHON=python3.12   another interpreter for .venv
#   TASK=...            another task for `make demo`
#   ARGS="..."          more arguments for demo, test, test-slow and speed

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := prefenv agents oracles benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help setup demo bench test test-slow lint format speed wheel clean

help: ## Print this
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv and install everything, in the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "prefenv needs Python 3.10 or newer: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup ## Align the generator with an oracle and draw before and after, into runs/demo (runs/demo-TASK)
	$(BIN)/prefenv demo $(if $(TASK),--task $(TASK)) $(ARGS)

bench: setup ## Run what is missing of the committed benchmark (hours; it goes on where it was stopped)
	$(BIN)/prefenv bench --suite full --out benchmarks/results/bench --work runs/bench $(ARGS)

test: setup ## Run the tests (all but the slow ones)
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(ARGS)

test-slow: setup ## Run the slow tests
	$(BIN)/python -m pytest -q -m slow $(ARGS)

lint: setup ## Check formatting, style, types and spelling
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/ty check
	$(BIN)/codespell

format: setup ## Format the code and repair what can be repaired
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

speed: setup ## Measure the speed of the environment and of training
	$(BIN)/python -m benchmarks.speed $(ARGS)

.PHONY: report
report: setup ## Make tables and figures of the committed benchmark
	$(BIN)/prefenv report --results benchmarks/results/bench --out benchmarks/results/report $(ARGS)

wheel: setup ## Build the wheel and the source archive into dist/
	$(BIN)/python -m build

clean: ## Remove builds and caches (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
