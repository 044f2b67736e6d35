# Nothing is needed beforehand but make and Python 3.11 or newer with its venv module.
#
# `make demo` installs what runs, `make test`, `lint` and `bench` also what develops, each once: stamp files
# in the venv remember it until a lock changes. All that is installed is pinned by hash. Installation talks
# on standard error, for standard output belongs to the command (`make -C` speaks there: add -s).

.PHONY: help demo test lint bench venv venv-dev contract lock clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
# A benchmark calls `make demo` and reads its last line: no «Leaving directory» there.
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
PY := $(VENV)/bin/python
BENCH ?= pipeline line first_bar
PIP := $(PY) -m pip --disable-pip-version-check --no-input
UV_LOCK := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

help:
	@echo 'make demo              the whole line on this machine; Ctrl+C ends it'
	@echo 'make demo ARGS="--seconds 30 --json"   options of the demo: make demo ARGS=--help'
	@echo 'make test              all tests, or some: make test ARGS="-k bars"'
	@echo 'make lint              ruff, mypy, import rules'
	@echo 'make bench             all figures, or some: make bench BENCH=pipeline ARGS="--runs 3"'
	@echo 'make venv              only install, so that $(VENV)/bin/tapedeck runs'
	@echo 'make bench BENCH=processor ARGS="--quick"   the worker beside its peers, which it installs for itself, once'
	@echo 'make bench BENCH=sinks ARGS="--runs 5"   the sink beside executemany and bare COPY, latency, bytes a trade'
	@echo 'make bench BENCH=soak ARGS="--seed 7"   five minutes of random faults and kills, every event accounted for'
	@echo 'make bench BENCH=soak ARGS="--outage 600 --rate 5000"   Kafka is away for ten minutes'
	@echo 'make contract          write docs/settings.md and docs/asyncapi.json anew from the code'
	@echo 'make lock              resolve the locks anew; needs uv; newest of all: make lock ARGS=--upgrade'
	@echo 'make clean             remove what was installed and cached, but no data'

demo: venv
	@$(VENV)/bin/tapedeck demo $(ARGS)

# Two at a time, each with servers of its own, for most of them wait for something most of the time.
# The exit code is kept in a file too, for make itself knows only success and failure (.ci/run).
test: venv-dev
	@rm -f $(VENV)/test.exit
	@$(PY) -m pytest -n 2 --dist worksteal $(ARGS) || { code=$$?; echo $$code >$(VENV)/test.exit; exit $$code; }

lint: venv-dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports

bench: venv-dev
	@for name in $(BENCH); do $(PY) -m bench.$$name $(ARGS) || exit; done

contract: venv-dev
	@$(PY) tests/test_contract.py

lock:
	@command -v uv >/dev/null || { echo 'make lock needs uv on the PATH' >&2; exit 1; }
	@$(UV_LOCK) $(ARGS) --quiet --output-file requirements.lock
	@$(UV_LOCK) $(ARGS) --quiet --extra dev --constraint requirements.lock --output-file requirements-dev.lock

clean:
	@rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- installing ---------------------------------------------------------------------------------------

venv: $(VENV)/installed
venv-dev: $(VENV)/installed-dev

$(VENV)/made:
	@test -n '$(PYTHON)' || { echo 'tapedeck needs Python 3.11 or newer; none of python3.13 … python3 is (or set PYTHON=)' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'tapedeck needs Python 3.11 or newer, and $(PYTHON) is older' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo '$(PYTHON) lacks its venv module: on Debian and Ubuntu install the package python3-venv' >&2; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/made requirements.lock pyproject.toml
	@echo 'installing into $(VENV), once: a minute or so' >&2
	@$(PIP) install --quiet --require-hashes -r requirements.lock >&2
	@$(PIP) install --quiet --no-deps --no-build-isolation -e . >&2
	@touch $@

# It has all that runs as well, so a demo after it has nothing to install.
$(VENV)/installed-dev: $(VENV)/made requirements-dev.lock requirements.lock pyproject.toml
	@echo 'installing into $(VENV) for development, once: a minute or so' >&2
	@$(PIP) install --quiet --require-hashes -r requirements-dev.lock >&2
	@$(PIP) install --quiet --no-deps --no-build-isolation -e . >&2
	@touch $(VENV)/installed $@
