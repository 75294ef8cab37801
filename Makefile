# Everything from a fresh machine with Python and make. The first call sets up .venv; PART=3 takes one part.
#
#   make demo [PART=3]     see a part at work (the newest, unless PART says which)
#   make test [PART=3]     all tests, or one part's     ARGS="-n 0" runs them in one process
#   make test-clients      lm-eval, guidellm and schemathesis against the newest part's server, a Ray cluster, and the files for
#                          Kubernetes, in a .venv-clients of their own
#   make serve [PART=3]    start a part's server        ARGS="--port 8001" adds flags, here and below
#   make bench [PART=3]    measure a part, write results/ and its plots
#   make bench-check       measure part 15's kernels, and compare with results/part15.json, which this kind of CPU must have made
#   make peers             set up .venv-peers: vLLM, OpenVINO GenAI, CTranslate2 and llama.cpp, which is compiled (5 GB, 20 minutes);
#                          then .venv/bin/python -m tools.peers measures part 15 beside them
#   make nvcc              compile part 15's CUDA kernels with nvcc, and compare what each needs with results/part15_nvcc.json;
#                          make setup-cuda installs nvcc where there is none
#   make workshop ARGS="start 1"      the exercises: list, start, check, hint, diff, catch-up; the same as .venv/bin/workshop
#   make doctor            what this machine has and what it lacks; needs no set-up
#   make gpu               everything that needs a CUDA device, in eight minutes; before it, where there is a network:
#   make gpu-wheels        what the engine needs on a GPU machine without one, into build/wheels
#   make lint              ruff, mypy, and the check of step diffs, tables and diagrams
#   make docs              the course as a website in build/site, with a .venv-docs of its own; it also checks links and spelling
#   make slides            slides for a workshop, from TEACHING.md and the lessons' diagrams: build/slides.html
#   make transcripts       run the commands that the lessons show, and compare their output
#   make setup             only the set-up              PIP_ARGS="…" goes to pip

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
CLIENTS := .venv-clients
CLIENTS_READY := $(CLIENTS)/.ready
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready
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
unexport PYTHONDONTWRITEBYTECODE  # else each of many processes compiles all that it imports

.PHONY: help setup demo test setup-clients test-clients serve bench bench-check peers nvcc setup-cuda workshop doctor gpu gpu-wheels \
	lint docs slides transcripts clean
help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=")'
	@echo "Setting up $(VENV), once. This downloads Python packages."
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	@HF_HUB_OFFLINE=1 $(PY) -m $(PART_DIR).demo $(ARGS)

test: $(READY)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS) $(ARGS)

setup-clients: $(CLIENTS_READY)

$(CLIENTS_READY): pyproject.toml constraints.txt
	@echo "Setting up $(CLIENTS), once. This downloads Python packages."
	rm -rf $(CLIENTS)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[clients,ray]'
	@touch $@

test-clients: $(CLIENTS_READY)
	HF_HUB_OFFLINE=1 $(CLIENTS)/bin/python -m pytest tests/clients $(ARGS)

serve: $(READY)
	@$(PY) -m $(PART_DIR) $(ARGS)

bench: $(READY)
	@$(PY) -m $(PART_DIR).bench $(ARGS)

bench-check: $(READY)
	@$(PY) -m part15_full_architecture.bench --check

peers: $(READY) $(PEERS_READY)

$(PEERS_READY): tools/peers/requirements-vllm.txt tools/peers/requirements-other.txt
	@echo "Setting up $(PEERS), once. This downloads Python packages, and compiles llama.cpp."
	rm -rf $(PEERS)
	$(PYTHON) -m venv $(PEERS)/vllm
	$(PEERS)/vllm/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps -r tools/peers/requirements-vllm.txt
	$(PYTHON) -m venv $(PEERS)/other
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(PEERS)/other/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps \
		-r tools/peers/requirements-other.txt
	@touch $@

nvcc: $(READY)
	@$(PY) -m part15_full_architecture.lab.kernel_resources $(ARGS)

setup-cuda: $(READY)
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[cuda]'

workshop: $(READY)  # status 1: an exercise is not solved yet, which is no error of make
	@$(VENV)/bin/workshop $(ARGS) || [ $$? -eq 1 ]

doctor:
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m workshop doctor

gpu-wheels: $(READY)
	$(PY) -m tools.gpu.wheels

gpu:  # without the set-up: the machine may have no network, and brings its own torch
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tools.gpu $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m tools.snapshots --check
	$(PY) -m tools.diagrams --check

docs: $(DOCS_READY)
	$(DOCS)/bin/codespell
	$(DOCS)/bin/python -m tools.book

$(DOCS_READY): pyproject.toml constraints.txt
	@echo "Setting up $(DOCS), once. This downloads Python packages."
	rm -rf $(DOCS)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt mkdocs-material mkdocstrings-python pygments \
		pyyaml codespell
	@touch $@

slides: $(READY)
	$(PY) -m tools.slides $(ARGS)

transcripts: $(READY)
	$(PY) -m tools.transcripts $(ARGS)

clean:
	rm -rf $(VENV) $(CLIENTS) $(PEERS) $(DOCS) build
