# make run: set everything up, serve the bundled model.   make test: set everything up, check, test.
# Needs Python >= 3.11 with pip, nothing else. PYTHON=python3.12 picks one, MODEL= and PORT= go to the server, WORKERS= says
# how many processes share the tests.

PYTHON ?= $(firstword $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p"; done))
MODEL ?= nano
HOST ?= 127.0.0.1
PORT ?= 8000
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# A stamp carries the hash of what it installed, so a changed pin installs again and nothing else does.
RUN_READY := $(VENV)/ready-run-$(shell cat requirements.txt pyproject.toml | cksum | tr -d ' ')
TEST_READY := $(VENV)/ready-test-$(shell cat requirements.txt requirements-test.txt pyproject.toml | cksum | tr -d ' ')

.PHONY: run test check clean
.DELETE_ON_ERROR:

run: $(RUN_READY)
	@exec $(BIN)/pelagos serve --model $(MODEL) --host $(HOST) --port $(PORT)

test: check
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

check: $(TEST_READY)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; install one or give PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv --without-pip $(VENV)

$(RUN_READY): | $(BIN)/python
	$(call install,requirements.txt)

$(TEST_READY): | $(BIN)/python
	$(call install,requirements-test.txt)
	@touch $(RUN_READY)

# Wheels only: a missing wheel is an error at once instead of a compiler run.
define install
	@echo "make: installing $(1) into $(VENV) (the first time this downloads torch)" >&2
	$(PYTHON) -m pip --python $(BIN)/python install --disable-pip-version-check --only-binary :all: -r $(1)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
endef
