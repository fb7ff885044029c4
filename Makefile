# Every target works in a fresh clone with a Python from 3.11 to 3.13 and nothing else installed.
SUITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c '$(SUITS)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo stability bench test test-slow test-hostile format clean

# Train the embedded model, export it, and show what came out: three minutes, installation included.
demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/dppo train run_dir=$(DEMO)
	$(BIN)/dppo export run=$(DEMO) format=adapter
	$(BIN)/dppo export run=$(DEMO) format=merged

# Nine methods under stress, three seeds each: recipes/stability/README.md.
stability: $(VENV)/installed
	$(BIN)/dppo train recipe=stability run_dir=runs/stability
	$(BIN)/python recipes/stability/plot.py runs/stability

# Time and memory against public peers: benchmarks/README.md. Two to three hours on two cores; the peer gets its own venv.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/step.py 64
	$(BIN)/python benchmarks/step.py 64 topk
	$(BIN)/python benchmarks/step.py 64 binary bfloat16
	$(BIN)/python benchmarks/step.py 64 binary float32 all_differ
	$(BIN)/python benchmarks/step.py 256
	$(BIN)/python benchmarks/approx.py
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/rollout.py 64
	$(BIN)/python benchmarks/rollout.py 256
	$(BIN)/python benchmarks/commands.py
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/table.py

# Format check, lint, strict types, tests.
test: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

# The tests that take minutes: the accuracy of the default run over three seeds.
test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

# Broken command lines, data files and run folders: HOSTILE_CASES of them (10000: hours), from HOSTILE_SEED (0) on.
test-hostile: $(VENV)/installed
	$(BIN)/pytest -s -m hostile tests/hostile

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "dppo needs Python 3.11, 3.12 or 3.13, and none is on the PATH;" \
		"install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
