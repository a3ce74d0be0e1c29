# `make demo` trains the XOR networks; `make test` runs ruff, mypy and the fast tests, and builds the site. Both make the
# environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: env demo test test-slow docs benchmark results results-figures results-saliency results-asu results-tickets results-uci results-landscape results-features results-compare format clean

env: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[compare,analysis,structured,cli,docs,dev]'
	touch $@

demo: env
	$(BIN)/python -m examples.xor

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 20
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

test-slow: env
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray]'
	RECORD_MATRIX=docs/compatibility.json $(BIN)/pytest tests/compatibility -m "slow or not slow" -k cell
	$(BIN)/pytest -m slow --ignore tests/compatibility

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "the site: runs/site/index.html"

benchmark: env
	$(BIN)/pytest -m benchmark -s tests/benchmarks

# The committed results: ten seeds of every method and problem, four of the paper's own score on 5-D, and Fig. 6.
METHODS := nn cpna_hidden cpna_all fsa_cpna
results: env
	for k in 3 4 5; do $(BIN)/python -m examples.xor --k $$k --seeds 10 --first-seed 3000 --methods $(METHODS) --out runs/results/$${k}d || exit 1; done
	$(BIN)/python -m examples.xor --k 5 --seeds 4 --first-seed 3000 --methods cpna_all_plain --out runs/results/5d_plain
	$(BIN)/python -m examples.xor --k 5 --p 15 --hidden 1024 --seeds 10 --first-seed 3000 --methods nn cpa_hidden cpna_hidden --out runs/results/5d_p15
	for name in 3d 4d 5d 5d_plain 5d_p15; do cp runs/results/$$name/results.json examples/xor/results/$$name.json; done
	cp runs/results/3d/3d_p60_training.csv runs/results/3d/3d_p60_training.png runs/results/3d/3d_p60_connections.png runs/results/3d/3d_p60_connectivity_cpna_all.png examples/xor/results/
	$(BIN)/python -m examples.xor.table examples/xor/results/*.json --page README.md

# The paper's other figures of the XOR problem, from fewer repeats (all of them: --full), and networks with more layers.
results-figures: env
	for name in minima threshold width deep; do $(BIN)/python -m examples.xor.$$name --out runs/figures/$$name --page RESULTS.md || exit 1; done
	cp runs/figures/*/*.csv runs/figures/*/*.png examples/xor/results/

# What RESULTS.md says of saliencies: five seeds; MNIST is downloaded, or in the folder that LIGHTNING_CPNA_DATA names.
results-saliency: env
	$(BIN)/python -m examples.saliency --experiments removable curves smaller concentration --seeds 5 --out runs/saliency
	cp runs/saliency/*.json runs/saliency/*.png examples/saliency/results/
	$(BIN)/python -m examples.saliency.figures examples/saliency/results --page RESULTS.md

# What RESULTS.md says of SET and NPSET: five seeds of six methods, three in the figures; the data sets as above, those that are there.
results-asu: env
	$(BIN)/python -m examples.asu --table2 --table3 --seeds 5 --out runs/asu
	$(BIN)/python -m examples.asu --figure1 --figure2 --seeds 3 --out runs/asu
	for epsilon in 5 10 20; do $(BIN)/python -m examples.asu.million --epsilon $$epsilon --out runs/asu || exit 1; done
	cp runs/asu/*.json runs/asu/*.png examples/asu/results/
	$(BIN)/python -m examples.asu.tables examples/asu/results --page RESULTS.md

# What RESULTS.md says of tickets and of retraining: three seeds on MNIST; ten of the 3-D and 4-D XOR, five of the 5-D.
results-tickets: env
	$(BIN)/python -m examples.tickets --experiments iterative rewinding keeping one-shot objection transfer --seeds 3 --out runs/tickets
	cp runs/tickets/*.json runs/tickets/*.png examples/tickets/results/
	$(BIN)/python -m examples.tickets.figures examples/tickets/results --page RESULTS.md
	$(BIN)/python -m examples.xor.retrain --k 3 4 --seeds 10 --first-seed 3000 --out runs/retrain/34
	$(BIN)/python -m examples.xor.retrain --k 5 --seeds 5 --first-seed 3000 --out runs/retrain/5
	$(BIN)/python -m examples.xor.retrain --from-results runs/retrain/34 runs/retrain/5 --out examples/xor/results/retrain --page RESULTS.md

# What RESULTS.md says of the UCI sets: the search on the training part of split 0, then twenty other splits, of ISOLET ten.
results-uci: env
	$(BIN)/python -m examples.uci.search all --out runs/uci
	cp runs/uci/search_*.csv runs/uci/chosen.json examples/uci/results/
	$(BIN)/python -m examples.uci all --methods "NN (best)" "NN (equivalent)" CPNA CPA "score only" nodes --out runs/uci
	cp runs/uci/table3.csv examples/uci/results/
	$(BIN)/python -m examples.uci.tables examples/uci/results/table3.csv --page RESULTS.md

# What RESULTS.md says of loss landscapes; MNIST as above.
results-landscape: env
	for name in evci level_sets sagun xord filters cpna; do \
	  $(BIN)/python -m examples.landscape.$$name --out runs/landscape/$$name --page RESULTS.md || exit 1; done
	cp runs/landscape/*/*.csv runs/landscape/*/*.png examples/landscape/results/

# What RESULTS.md says of features found by restarts; the data sets as above.
results-features: env
	$(BIN)/python -m examples.xor.frontier --out runs/frontier --page RESULTS.md
	cp runs/frontier/frontier.csv runs/frontier/frontier.png examples/xor/results/
	for name in noise asu; do $(BIN)/python -m examples.features.$$name --out runs/features/$$name --page RESULTS.md || exit 1; done
	cp runs/features/*/*.csv runs/features/*/*.png examples/features/results/

# Other methods beside ours: a search and five splits for each method and data set (hours); the data sets as above.
results-compare: env
	$(BIN)/python -m examples.compare --out runs/compare --page RESULTS.md
	cp runs/compare/*.csv runs/compare/compare.png examples/compare/results/

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
