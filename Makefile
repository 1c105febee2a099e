# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint bench gpu clean

# The environment is made once, and again when what it is made from changes.
$(VENV)/.ready: pyproject.toml constraints.txt $(wildcard timm_softpool/kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py --output demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

test-all: $(VENV)/.ready
	$(BIN)/python -m pytest -m all_models

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

# Half an hour on two cores; the README's table and the plot come from it.
bench: $(VENV)/.ready
	$(BIN)/python benchmarks/pooling.py --output benchmarks/results/cpu.json
	$(BIN)/python benchmarks/models.py --output benchmarks/results/cpu_models.json
	$(BIN)/python benchmarks/class_regularization.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/explainers.py
	$(BIN)/python benchmarks/evidence.py
	$(BIN)/python benchmarks/report.py --readme README.md --plot benchmarks/results/cpu.png

# On a machine with a GPU, with the Python that has its PyTorch: make gpu PYTHON=python3. Nothing is installed.
gpu:
	PYTHONPATH=. $(PYTHON) -m pytest tests/test_cuda.py
	PYTHONPATH=. $(PYTHON) benchmarks/pooling.py --device cuda --output benchmarks/results/cuda.json
	PYTHONPATH=. $(PYTHON) benchmarks/models.py --device cuda --output benchmarks/results/cuda_models.json
	PYTHONPATH=. $(PYTHON) benchmarks/class_regularization.py --device cuda

clean:
	rm -rf $(VENV) demo build *.egg-info timm_softpool/kernels/_cpu*.so
