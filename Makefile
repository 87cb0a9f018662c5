# Each target is one line of the README. Everything lands in .venv; nothing is installed on the system.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv
# Numeric libraries must not each take all cores: every engine replica is a process of its own.
export OMP_NUM_THREADS ?= 1

.PHONY: demo serve setup test check bench docs clean

demo: .venv/demo.stamp  ## Clone a voice on this machine and write demo.wav and demo.png
	$(BIN)/python -m benchmarks.demo

serve: .venv/demo.stamp  ## Serve on http://127.0.0.1:8000
	$(BIN)/voice-clone serve

setup: .venv/setup.stamp  ## Everything tests and benchmarks need

test: setup check  ## The whole suite, from nothing
	# Two files at a time as long as nothing of Ray runs; a cluster needs the machine for itself.
	$(BIN)/pytest -n 2 --dist loadfile tests/unit
	$(BIN)/pytest tests/graph
	$(BIN)/pytest tests/cluster

check: setup  ## Format, lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## Every benchmark in its quick form
	$(BIN)/python benchmarks/default_engine.py --quick
	$(BIN)/python benchmarks/graph_overhead.py --quick
	$(BIN)/python benchmarks/router.py --quick
	$(BIN)/python benchmarks/xtts.py --quick
	$(BIN)/python benchmarks/openvoice.py --quick
	$(BIN)/python benchmarks/gpt_sovits.py --quick

docs: setup  ## Run every snippet of README and docs
	$(BIN)/pytest tests/graph/test_docs.py

clean:
	rm -rf .venv .cache demo.wav demo.png

# uv installs in seconds what pip takes minutes for; it comes from PyPI like everything else.
.venv/bin/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

.venv/demo.stamp: pyproject.toml | .venv/bin/uv
	$(UV) pip install --quiet --python $(BIN)/python --editable . --group demo
	touch $@

.venv/setup.stamp: pyproject.toml | .venv/bin/uv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --group torch
	$(UV) pip install --quiet --python $(BIN)/python --editable . --group dev --group coqui --group gpt-sovits
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --group judges --group torch-audio
	# pysbd (of coqui-tts) installs a package of this name, which would be found before ours.
	rm -rf .venv/lib/python3*/site-packages/benchmarks
	touch $@ .venv/demo.stamp
