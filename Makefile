# Everything on a fresh machine: `make demo` trains, `make test` tests. Both make the environment,
# the latter with the test extra.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

# One thread a process, in tests and benchmarks too.
export OMP_NUM_THREADS := 1

.PHONY: demo test test-all test-gpu soak bench coverage check gallery clean

# 4 clients and a server in parallel on the documentation that comes with Python; no network
# is needed once the environment stands.
demo: $(VENV)/.ready
	$(BIN)/python -m fedrun.torchrun --nproc-per-node 5 -m fedrun fed_avg --config tiny \
	    --dataset pydocs --tokenizer bpe:4096 --lr 4e-3 --rounds 150 --val_freq 15 \
	    --run_name demo --overwrite

# Two tests at a time: most of a test that starts ranks is waiting. Files stay whole, since tests of
# one file share runs.
TOGETHER := -n 2 --dist loadfile

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest $(TOGETHER)

# The tests that take longer: three at a time, since their ranks wait for each other more than half
# of the time.
test-all: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "slow and not soak" -n 3 --dist loadfile

# On a machine with GPUs: what it has to show, on one of them within ten minutes (tests/gpu/). It
# writes one file, GPU_RESULTS/gpu.json; without a GPU it does nothing. With the Python that has the
# GPU's packages: pip install '.[cuda,test]'.
GPUS ?= 1
GPU_RESULTS ?= results/gpu
test-gpu:
	$(PYTHON) -m tests.gpu.accept $(GPU_RESULTS) $(if $(filter 1,$(GPUS)),--quick) --gpus $(GPUS)

# 200 kills at random moments, faults at the first 100 calls that change files, and further cases of
# what the tests above show; hours.
soak: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m soak $(TOGETHER)
	KILLS=200 $(BIN)/python -m pytest -m slow tests/records/test_kills.py
	KILL_POINTS=100 $(BIN)/python -m pytest -m slow tests/records/test_kill_points.py

# Our training step against transformers', our rounds against Flower's and pfl's, and masked sums
# against plain ones and Flower's, in environments that are built for them; what an update shows; as
# tables; 40 minutes on a quiet machine.
bench: $(VENV)/.ready-test
	env -u OMP_NUM_THREADS $(BIN)/python -m tests.benchmarks.step
	$(BIN)/python -m tests.benchmarks.overhead --workers 4
	$(BIN)/python -m tests.benchmarks.overhead --workers 2 --peers
	$(BIN)/python -m tests.benchmarks.rounds
	$(BIN)/python -m tests.benchmarks.efficiency
	$(BIN)/python -m tests.benchmarks.clients
	$(BIN)/python -m tests.benchmarks.secure_sum --peer
	$(BIN)/python -m tests.benchmarks.leak
	$(BIN)/python -m tests.benchmarks.noise
	$(BIN)/python -m tests.benchmarks.private_step

# Which lines the tests of `make test` run, in processes that they start too.
coverage: $(VENV)/.ready-test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(TOGETHER)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch .ci/run

# Two stamps: the package, which is all that training needs, and what the tests need besides.
$(VENV)/.ready: setup.cfg pyproject.toml
	@echo "installing fedrun and the libraries it needs into $(VENV): a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "installing what the tests need into $(VENV): a few minutes"
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

# The figures of the README and of results/gallery, from the runs of curves.yaml: twenty minutes on
# one idle core (DATASET: a folder, where the hub is out of reach).
DATASET ?= wikitext-2
gallery: $(VENV)/.ready
	$(BIN)/python -m fedrun study configs/experiments/curves.yaml --dataset $(DATASET)
	$(BIN)/fedrun plot perplexities --data_dir results/curves/runs --out_dir results/gallery --config study \
	    --where client_moments=average
	$(BIN)/fedrun plot deltas --data_dir results/curves/runs --output_dir results/gallery
	$(BIN)/fedrun plot federated-deltas --data_dir results/curves/runs --output_dir results/gallery
	$(BIN)/fedrun report --data_dir results/curves/runs
	$(BIN)/fedrun partition --dataset pydocs --tokenizer bpe:4096 --num_clients 8 \
	    --partition dirichlet --alpha 1 --size_skew 0.5 --out results/figures
