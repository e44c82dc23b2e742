# Everything on a fresh machine: `make demo` trains, `make test` tests. Both make the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

# torchrun would say it at length for every start.
export OMP_NUM_THREADS := 1

.PHONY: demo test test-all soak bench check figures clean

# 4 clients and a server in parallel on the documentation that comes with Python; no network
# is needed once the environment stands.
demo: $(VENV)/.ready
	$(BIN)/torchrun --standalone --nproc-per-node 5 -m fedrun fed_avg --config tiny \
	    --dataset pydocs --tokenizer bpe:4096 --lr 4e-3 --rounds 150 --val_freq 15 \
	    --run_name demo --overwrite

test: $(VENV)/.ready
	$(BIN)/python -m pytest

# The tests that take longer.
test-all: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

# 200 kills at random moments; hours.
soak: $(VENV)/.ready
	KILLS=200 $(BIN)/python -m pytest -m slow tests/test_kills.py

# Our training step against transformers', as a table; ten quiet minutes.
bench: $(VENV)/.ready
	env -u OMP_NUM_THREADS $(BIN)/python -m tests.benchmarks.step

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

# The README's figures, from short runs on the documentation that comes with Python.
TOUR := --config tiny --dataset pydocs --tokenizer bpe:4096 --lr 4e-3 --val_freq 15 --data_dir results/tour
figures: $(VENV)/.ready
	$(BIN)/python -m fedrun central $(TOUR) --rounds 150
	$(BIN)/python -m fedrun fed_avg $(TOUR) --rounds 150
	$(BIN)/python -m fedrun fed_avg $(TOUR) --rounds 19 --local_updates 8 --val_freq 2
	$(BIN)/python -m fedrun fed_entropy $(TOUR) --rounds 150
	$(BIN)/python -m fedrun fed_fisher $(TOUR) --rounds 150
	$(BIN)/python -m fedrun fed_momentum $(TOUR) --rounds 150
	$(BIN)/fedrun plot perplexities --data_dir results/tour --out_dir results/figures --config tiny
	$(BIN)/fedrun plot deltas --data_dir results/tour --output_dir results/figures
	$(BIN)/fedrun report --data_dir results/tour
	$(BIN)/fedrun partition --dataset pydocs --tokenizer bpe:4096 --num_clients 8 \
	    --partition dirichlet --alpha 1 --size_skew 0.5 --out results/figures
