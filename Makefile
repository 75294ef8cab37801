# Everything from a fresh machine with Python and make. The first call sets up .venv; PART=3 takes one part.
#
#   make demo [PART=3]     see a part at work (the newest, unless PART says which)
#   make test [PART=3]     all tests, or one part's     ARGS="-n 0" runs them in one process
#   make serve [PART=3]    start a part's server        ARGS="--port 8001" adds flags, here and below
#   make bench [PART=3]    measure a part, write results/ and its plots
#   make gpu               everything that needs a CUDA device, in eight minutes; before it, where there is a network:
#   make gpu-wheels        what the engine needs on a GPU machine without one, into build/wheels
#   make lint              ruff, mypy, and the check of step diffs and tables
#   make setup             only the set-up              PIP_ARGS="…" goes to pip

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
PARTS  := $(sort $(wildcard part[0-9][0-9]_*))

ifdef PART
  PART_DIR := $(wildcard part$(shell printf %02d $(PART))_*)
  ifeq ($(PART_DIR),)
    $(error there is no part $(PART); the parts so far: $(PARTS))
  endif
  TESTS ?= tests/part$(shell printf %02d $(PART)) tests/contract --part $(PART)
else
  PART_DIR := $(lastword $(PARTS))
  TESTS ?= tests
endif

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup demo test serve bench gpu gpu-wheels lint clean
help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	@HF_HUB_OFFLINE=1 $(PY) -m $(PART_DIR).demo $(ARGS)

test: $(READY)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(TESTS) $(ARGS)

serve: $(READY)
	@$(PY) -m $(PART_DIR) $(ARGS)

bench: $(READY)
	@$(PY) -m $(PART_DIR).bench $(ARGS)

gpu-wheels: $(READY)
	$(PY) -m tools.gpu.wheels

gpu:  # without the set-up: the machine may have no network, and brings its own torch
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tools.gpu $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m tools.snapshots --check

clean:
	rm -rf $(VENV) build
