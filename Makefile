# make demo: the main job on packaged data. make test: lint, types, tests. make bench: side by side with the published
# libraries; make bench-gpu: on a CUDA device. All set themselves up in .venv, once.
PYTHON ?= python3
BIN := .venv/bin
# cores are shared between pytest's workers, so each computes with one thread
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg

.PHONY: demo test bench bench-gpu clean

demo: .venv/installed
	$(BIN)/hessian-tools js0 --model gpt-nano vgg-nano --out results/demo

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

bench: .venv/installed-bench
	$(BIN)/python benchmarks/side_by_side.py
	$(BIN)/python figures/benchmark.py

bench-gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/installed: setup.cfg pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv build *.egg-info results/demo
