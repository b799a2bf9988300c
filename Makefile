# `make demo` and `make test` work as the first command on a fresh machine: each makes its own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The set that everything was measured with. SET=requirements.txt: full TensorRT, whose libraries NVIDIA's index serves.
SET := requirements-rtx.txt

FOLDER := build/versions

.PHONY: help setup demo test test-gpu test-versions faults lint docs bench play world clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## install into .venv

$(STAMP): pyproject.toml setup.py requirements.txt requirements-rtx.txt requirements-common.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(SET) into $(VENV) (a few GB with torch; minutes)."
	@$(BIN)/python -m pip install -q -r $(SET) && $(BIN)/python -m pip install -q --no-deps -e .
	@touch $@

demo: $(STAMP) ## render a game clip, encode it, decode it through the bridge; writes demo/
	$(BIN)/owl-wms demo

test: $(STAMP) ## everything that needs no GPU
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-gpu: $(STAMP) ## the tests that need one
	$(BIN)/python -m pytest -q -m gpu

test-versions: $(STAMP) ## every supported version set in a fresh environment; SETS="2.14 2.15" for some, FOLDER for where
	$(BIN)/python -m tests.versions.run $(FOLDER) $(SETS)

faults: $(STAMP) ## the fault suite at full counts; writes docs/faults.md
	$(BIN)/python -m pytest -q tests/faults --full-counts
	$(BIN)/python -m pytest -q tests/trt -m slow --full-counts
	$(BIN)/python -m tests.faults.ledger

bench: $(STAMP) ## the decoder benchmark, on a GPU
	$(BIN)/python -m benchmarks.decoder

play: $(STAMP) ## the shipped world model in the browser
	$(BIN)/owl-wms play

world: $(STAMP) ## train the world model of the game on one GPU, in 21 minutes, and measure it
	$(BIN)/python examples/world/by_clock.py --out build/world $(WORLD)

lint: $(STAMP) ## ruff and mypy --strict
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check . && $(BIN)/python -m mypy

docs: $(STAMP) ## the documentation site, into site/
	$(BIN)/python -m mkdocs build --strict

clean: ## remove .venv, demo and build
	rm -rf $(VENV) demo build site *.egg-info
