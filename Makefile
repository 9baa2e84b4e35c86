# Everything happens in .venv, made once: a second run installs nothing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

demo: .venv/core
	$(BIN)/echolab demo

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/slow
	$(BIN)/python -m pytest -m slow

lint: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/core: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv/slow: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,ray,trl]"
	touch $@

clean:
	rm -rf .venv echolab-demo
