# Every target works alone on a fresh clone: the environment is made, or remade when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
# uv when it is there (fast), else pip.
INSTALL := $(if $(shell command -v uv 2>/dev/null),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install)

.PHONY: setup train test bench demo lint

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

train: .venv/.stamp
	$(BIN)/python -m vision fit --config configs/vision/vig_nano_mnist5k.yaml

test: .venv/.stamp
	$(BIN)/python -m pytest

bench: .venv/.stamp
	$(BIN)/python -m kernels.benchmark
	$(BIN)/python -m vision benchmark
	$(BIN)/python -m generation benchmark lina
	$(BIN)/python -m generation benchmark spiking
	$(BIN)/python -m generation benchmark radiance-field
	$(BIN)/python -m multimodal benchmark

demo: .venv/.stamp
	$(INSTALL) --editable '.[demo,data]'
	$(BIN)/python -m demos.app

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
