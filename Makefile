# Everything below works on a fresh clone with Python 3.11 or later and a package index, and can be run again at any time.
#   make demo PYTHON=python3.12          another interpreter
#   make demo PIP_ARGS="--index-url URL" anything that pip should be told
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PIP_ARGS ?=
# Test processes: each has one thread; they take files in turn, as they are listed: those of a few long tests come first.
WORKERS ?= 2
# Options of the GPU check: GPU_ARGS="--dry-run" says what it would do, here too.
GPU_ARGS ?=
PROMPT ?= anchor, twitter style
export PROMPT
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test suite test-fast coverage lint style types format bench table plans bench-trt gpu-check clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-core ## build the embedded model's engines, draw PROMPT in full and with a plan, and compare
	$(BIN)/python -m exporter build --variant original --force
	$(BIN)/python -m runtime "$$PROMPT" --bundle bundles/emoji-original --plan deepcache:3 --compare full -o demo.png

test: style ## everything that must hold: lint, types, tests
	$(MAKE) --no-print-directory --jobs 2 types suite # mypy is one process: beside the tests it takes no time of its own

suite: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

test-fast: $(VENV)/.installed-test ## the tests that build nothing and take little: two minutes
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

coverage: $(VENV)/.installed-test ## which lines the tests run, in subprocesses too; takes longer
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report=term

lint: style types ## ruff and mypy

style: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-test
	$(BIN)/mypy

format: $(VENV)/.installed-test ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-train ## how often generated images show what their prompt says; fetches the emoji sets through npm
	$(BIN)/python -m tuning.emoji.fetch --icons-only
	$(BIN)/python -m benchmarks.quality.emoji

table: $(VENV)/.installed-train ## what every variant of the embedded model's UNet costs, and what its pictures are worth
	$(BIN)/python -m benchmarks.quality.variants

plans: $(VENV)/.installed-train ## what plans cost and what they do to pictures, on bundles that are partitioned for all of them
	for variant in original assembled; do \
	  $(BIN)/python -m exporter build --variant $$variant --out bundles/plans/$$variant --force \
	    --plan block:2 --plan layer:2 --plan deepcache:2 --plan unit:2 --plan encoder:2 --plan adaptive:0.2 --plan tgate:0.4; \
	done
	$(BIN)/python -m benchmarks.quality.plans \
	  --found $(foreach cost,0.250 0.417 0.535,benchmarks/results/front/found-$(cost).json)

bench-trt: $(VENV)/.installed-train ## this project and its peers, a picture from prompt to pixels
	$(BIN)/python benchmarks/run_trt.py

# TensorRT and TensorRT-RTX are of use where there is a GPU only; one that cannot be had (its libraries may come from an index of
# NVIDIA's own) is said, and left out by the check itself.
gpu-check: $(VENV)/.installed-test ## errors, memory and times of every engine on the NVIDIA GPU at hand, in ten minutes
	@if nvidia-smi > /dev/null 2>&1 && [[ "$(GPU_ARGS)" != *--dry-run* ]]; then \
	  for extra in tensorrt-rtx tensorrt; do \
	    $(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable ".[$$extra]" \
	      || echo "make: the extra $$extra could not be installed; the check leaves its engine out" >&2; \
	  done; \
	  $(BIN)/python -c 'import importlib.metadata as m; m.version("onnxruntime-gpu")' 2> /dev/null \
	    || echo "make: onnxruntime-gpu is not installed, for it overwrites onnxruntime; the check leaves ONNX Runtime out:" \
	      "docs/onnxruntime.md has how to include it" >&2; \
	fi
	$(BIN)/python -m benchmarks.gpu.gpu_check $(GPU_ARGS)

clean: ## remove bundles and tool caches; .venv, training runs and the committed model stay
	rm -rf bundles build dist htmlcov *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of dependencies: .installed-core, or .installed-EXTRA for an extra of pyproject.toml.
$(VENV)/.installed-%: pyproject.toml constraints.txt $(VENV)/.created
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable ".$(if $(filter-out core,$*),[$*])"
	@touch $@

# The stamp comes last, so an environment whose making was cut off is completed by the next run.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: got $(PYTHON) = $$($(PYTHON) --version 2>&1 || true); Python 3.11 or later is needed." \
	       "Name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
