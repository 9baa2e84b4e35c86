# Everything happens in .venv, made once: a second run installs nothing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-slow chromium lint clean

demo: .venv/demo
	$(BIN)/echolab demo $(DEMO)

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/slow chromium
	$(BIN)/python -m pytest -m slow

# The browser that reports are tested in. Where it cannot be installed, those tests say so and are skipped.
chromium:
	@command -v chromium > /dev/null || test "$$(id -u)" != 0 || ! command -v apt-get > /dev/null || \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; } || true

lint: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/core: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/demo: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[torch,report,view]"
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv/slow: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,ray,report-test,trl]"
	touch $@

clean:
	rm -rf .venv echolab-demo echolab-simulated
