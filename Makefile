# Two commands for a newcomer: `make demo` and `make test`. Both set the environment up on first use.
SHELL := /bin/bash
PYTHON ?= python3.11
PY := .venv/bin/python
STAMP := .venv/.installed
EXTRAS := cpu,dev,examples,ray,serve

# uv does not read pip's configuration: a folder of wheels named there is handed over. Without one, uv's own CPU index serves torch.
TORCH_SOURCE := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend=cpu)

# A run starts many processes: where this is set, each of them would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test lint types clean

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "vtriune needs Python 3.11 as '$(PYTHON)'; name another with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet "uv>=0.8"
	$(PY) -m uv pip install --quiet --compile-bytecode --python $(PY) $(TORCH_SOURCE) -e ".[$(EXTRAS)]"
	@touch $@

# The digits run: builds its data from scikit-learn's handwritten digits on first use, then trains.
demo: setup
	$(PY) -m examples.digits.build
	$(PY) -m vtriune.launch examples/digits.yaml $(ARGS)

# Two at a time keep two cores busy: tests of whole runs wait for processes to start, others for deadlines to pass.
test: setup
	$(PY) -m examples.digits.build
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	$(PY) -m mypy

clean:
	rm -rf runs build .mypy_cache .pytest_cache .ruff_cache .hypothesis examples/digits/data
