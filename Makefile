# make demo    a real model answers, on this machine
# make test    lint, the floors, and every fast test
# Both build what they need into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow lint format asan amx clean

demo: $(STAMP)
	$(BIN)/python demo.py

test: lint
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal

slow: $(STAMP)
	$(BIN)/pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

asan: $(STAMP)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PYTHON=$(BIN)/python bash tests/asan.sh

amx: $(STAMP)
	SANITIZE= PAGODA_KERNELS=amx PIP_CONSTRAINT=$(CURDIR)/constraints.txt PYTHON=$(BIN)/python bash tests/asan.sh

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard pagoda/ops/cpu/*.cpp pagoda/ops/cpu/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info pagoda/ops/cpu/*.so
