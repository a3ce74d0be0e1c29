# `make demo` trains the XOR networks; `make test` runs ruff, mypy and the fast tests. Both make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: env demo test test-slow benchmark results results-saliency format clean

env: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[examples,analysis,structured,cli,dev]'
	touch $@

demo: env
	$(BIN)/python -m examples.xor

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

test-slow: env
	$(BIN)/pytest -m slow

benchmark: env
	$(BIN)/pytest -m benchmark -s tests/benchmarks

# The committed results: ten seeds of every method and problem, four of the paper's own score on 5-D, and Fig. 6.
METHODS := nn cpna_hidden cpna_all fsa_cpna
results: env
	for k in 3 4 5; do $(BIN)/python -m examples.xor --k $$k --seeds 10 --first-seed 3000 --methods $(METHODS) --out runs/results/$${k}d || exit 1; done
	$(BIN)/python -m examples.xor --k 5 --seeds 4 --first-seed 3000 --methods cpna_all_plain --out runs/results/5d_plain
	$(BIN)/python -m examples.xor --k 5 --p 15 --hidden 1024 --seeds 10 --first-seed 3000 --methods nn cpa_hidden cpna_hidden --out runs/results/5d_p15
	for name in 3d 4d 5d 5d_plain 5d_p15; do cp runs/results/$$name/results.json examples/xor/results/$$name.json; done
	cp runs/results/3d/3d_p60_training.png runs/results/3d/3d_p60_connections.png runs/results/3d/3d_p60_connectivity_cpna_all.png examples/xor/results/
	$(BIN)/python -m examples.xor.table examples/xor/results/*.json --readme README.md

# What the README says of saliencies: five seeds; MNIST is downloaded, or in the folder that LIGHTNING_CPNA_DATA names.
results-saliency: env
	$(BIN)/python -m examples.saliency --experiments removable curves smaller concentration --seeds 5 --out runs/saliency
	cp runs/saliency/*.json runs/saliency/*.png examples/saliency/results/
	$(BIN)/python -m examples.saliency.figures examples/saliency/results --readme README.md

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
