# Everything happens in .venv of this checkout. Paths are relative, so the checkout may lie anywhere.
SHELL := /bin/bash
# Any Python from 3.10 on, and any torch from 2.6 on: make PYTHON=python3.12 TORCH=2.11.0
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
TORCH ?= 2.13.0
SOURCES := $(wildcard pyg_attnpool/csrc/*)

# Wheels built ahead spare compiling where they lie beside the checkout.
export PIP_FIND_LINKS := $(strip $(PIP_FIND_LINKS) $(wildcard ../shared/wheels))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MAX_JOBS ?= 2
# Threads that spin while they wait slow down everything on a machine that has other work.
export OMP_WAIT_POLICY ?= passive
# ninja and cmake of the virtual environment, for packages that compile.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: setup-demo setup demo test test-all lint docs clean

# What the demo needs comes within minutes; the rest, of which some compiles, for tests and tools.
setup-demo: $(VENV)/.demo
setup: $(VENV)/.complete

# A comma that does not separate arguments.
, := ,

# $(call step,what,command,what to do if it fails)
define step
	@echo "== $(1)"
	@$(2) || { echo "Set-up failed at: $(1). $(3) Then run the same again." >&2; exit 1; }
endef
INSTALL := $(RUN) -m pip install --progress-bar on
# `make TORCH=` takes the newest.
PINNED := torch$(if $(TORCH),==$(TORCH))
CPU := $(if $(TORCH),$(PINNED)+cpu,torch)

$(VENV)/.demo: setup.py pyproject.toml Makefile $(SOURCES)
	$(call step,virtual environment in $(VENV),\
	  $(PYTHON) -c 'import sys; assert sys.version_info[:2] >= (3$(,) 10)' \
	  && $(PYTHON) -m venv --without-pip $(VENV) \
	  && $(PYTHON) -m pip --python $(RUN) install --quiet pip,\
	  Python 3.10 or newer with pip is needed; name another with PYTHON=....)
	$(call step,torch $(TORCH),\
	  if nvidia-smi -L >/dev/null 2>&1; then $(INSTALL) $(PINNED); \
	  else $(INSTALL) $(CPU) 2>/dev/null || $(INSTALL) $(PINNED); fi,\
	  Check the network and free disk space.)
	$(call step,pyg_attnpool and what the demo needs,\
	  $(INSTALL) -e ".[train$(,)data$(,)viz$(,)cli]",\
	  Check the network.)
	@touch $@

# openmesh needs a CMake of before 4 and a setuptools of before 81.
$(VENV)/.complete: $(VENV)/.demo
	$(call step,build helpers,\
	  $(INSTALL) "setuptools>=77$(,)<81" wheel setuptools_scm vcs_versioning "cmake<4" ninja numpy,\
	  Check the network.)
	$(call step,torch_scatter torch_sparse openmesh (without wheels they compile: some 15 minutes),\
	  $(INSTALL) --no-build-isolation torch_scatter torch_sparse openmesh,\
	  A C++ compiler and the headers of Python are needed.)
	$(call step,all extras,\
	  $(INSTALL) --no-build-isolation -e ".[sparse$(,)mesh$(,)train$(,)data$(,)viz$(,)cli$(,)export$(,)tgp$(,)hub$(,)dev]",\
	  Check the network.)
	@touch $@

demo: setup-demo
	$(RUN) examples/coma.py --output runs/demo --resume

# A process for each core, with one thread each.
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadscope

test: setup
	$(TEST) -m "not slow" --cov=pyg_attnpool --cov-report=term

test-all: setup
	$(TEST)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib

# With npm the pages bring what draws their formulas; without, readers fetch it.
docs: setup
	$(INSTALL) --quiet --no-build-isolation -e ".[docs]"
	npm install --silent --no-save --prefix build/node mathjax@3.2.2 || true
	$(RUN) -m sphinx -W -q -b html docs docs/build

clean:
	rm -rf $(VENV) build *.egg-info
