# Two commands for a newcomer: `make demo` and `make test`. Both set the environment up on first use. While you work: `make check`.
SHELL := /bin/bash
PYTHON ?= python3.11
PY := .venv/bin/python
STAMP := .venv/.installed
EXTRAS := cpu,dev,examples,ray,serve

# uv does not read pip's configuration: a folder of wheels named there is handed over. Without one, uv's own CPU index serves torch.
TORCH_SOURCE := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend=cpu)

# A run starts many processes: where this is set, each of them would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

# Tests that start no engine and no run: with lint and types, under two minutes.
QUICK := architecture config curate data plan record run transport verifiers/kernels verifiers/kinds weights

.PHONY: setup demo ablations check test test-long lint types clean

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "vtriune needs Python 3.11 as '$(PYTHON)'; name another with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet "uv>=0.8"
	$(PY) -m uv pip install --quiet --compile-bytecode --python $(PY) $(TORCH_SOURCE) -e ".[$(EXTRAS)]"
	@touch $@

# The digits run: builds its data from scikit-learn's handwritten digits on first use, trains, and draws held-out boxes before and after;
# an earlier demo is moved aside. Off-policy keeps both cores busy; for the other mode:
# make demo ARGS="policy.mode=on_policy policy.max_staleness=0"
demo: setup
	$(PY) -m examples.digits.build
	$(PY) -m vtriune.launch examples/digits.yaml --fresh policy.mode=off_policy policy.max_staleness=2 $(ARGS)
	$(PY) -m examples.digits.before_after runs/digits

# The paper's comparisons in small, as far as they are not in docs/claims yet: about 40 runs of six minutes, two at a time.
# Stop and go on as you like.
ablations: setup
	$(PY) -m examples.digits.build
	$(PY) -m examples.digits.ablations dynamic_iou tasks policy modules learning_rate prompt_pool kl --jobs 2 --report

# Two at a time keep two cores busy: tests of whole runs wait for processes to start, others for deadlines to pass.
test: setup
	$(PY) -m examples.digits.build
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Fifty kills of a run, soaks, sequences by the ten thousand.
test-long: setup
	$(PY) -m pytest -m long $(ARGS)

check: lint types
	$(PY) -m pytest -n 2 --dist loadfile --durations=5 $(addprefix tests/,$(QUICK))

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	$(PY) -m mypy

clean:
	rm -rf runs build .mypy_cache .pytest_cache .ruff_cache .hypothesis examples/digits/data
