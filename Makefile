# `make quickstart` and `make test` set up what they need, on a fresh machine too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch's own index of CPU builds, asked for torch alone, where pip does not know a CPU build by itself.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Installs all but torch where it is there; `make setup UV=` takes pip.
UV ?= $(shell command -v uv)

.PHONY: setup quickstart smollm2 test test-slow test-pythons check format lock clean

setup: $(VENV)/installed

$(VENV)/installed: requirements/cpu.txt pyproject.toml
	@TORCH_CPU_INDEX=$(TORCH_CPU_INDEX) UV=$(UV) $(PYTHON) requirements/install.py $(VENV) requirements/cpu.txt .
	@touch $@

quickstart: setup
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/maspo train examples/quickstart/run.yaml --run_dir runs/quickstart-$$(date +%Y%m%d-%H%M%S) $(ARGS)

smollm2: setup
	$(BIN)/python examples/smollm2/prepare.py
	$(BIN)/maspo train examples/smollm2/run.yaml --run_dir runs/smollm2-$$(date +%Y%m%d-%H%M%S) $(ARGS)

# Test files run side by side: most of their time actors start, on one core each. Threads that wait give their core to the others.
JOBS ?= 2
PYTEST := OMP_WAIT_POLICY=PASSIVE KMP_BLOCKTIME=0 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: setup check
	$(PYTEST) $(ARGS)

# What `make test` leaves out, so that it stays within minutes.
test-slow: setup
	$(PYTEST) -m slow $(ARGS)

# The unit part on each Python that the locks are for and that is here, in an environment of its own.
test-pythons:
	@for version in 3.11 3.12 3.13; do \
	  if ! python$$version -c "" 2> /dev/null; then echo "python$$version is not here"; continue; fi; \
	  $(MAKE) setup VENV=.venv-$$version PYTHON=python$$version \
	    && .venv-$$version/bin/python -m pytest tests/unit -m "not engine and not ray and not slow" $(ARGS) || exit 1; \
	done

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs uv. The CPU lock takes torch's CPU build; the GPU lock is resolved, not installed. Each is resolved for the newest Python first and
# then for the older ones, which keep what they can, and holds for all of them, or the last lines fail.
PYTHONS := 3.13 3.12 3.11
COMPILE := uv pip compile pyproject.toml --python-platform x86_64-unknown-linux-gnu --quiet --no-emit-index-url --no-header --no-annotate
# Of PyTorch's index, torch alone; `TORCH_BUILDS='--find-links DIR'` takes wheels of a folder.
TORCH_BUILDS ?= --torch-backend cpu
CPU_LOCK := $(COMPILE) --extra cpu --extra dev --override requirements/overrides.txt $(TORCH_BUILDS) $(UV_ARGS)
GPU_LOCK := $(COMPILE) --extra gpu --extra dev

lock:
	for version in $(PYTHONS); do $(CPU_LOCK) --python-version $$version --output-file requirements/cpu.txt || exit 1; done
	for version in $(PYTHONS); do $(GPU_LOCK) --python-version $$version --output-file requirements/gpu.txt || exit 1; done
	for version in $(PYTHONS); do cp requirements/cpu.txt requirements/gpu.txt /tmp/; \
	  $(CPU_LOCK) --python-version $$version --output-file /tmp/cpu.txt && cmp requirements/cpu.txt /tmp/cpu.txt || exit 1; \
	  $(GPU_LOCK) --python-version $$version --output-file /tmp/gpu.txt && cmp requirements/gpu.txt /tmp/gpu.txt || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis examples/*/model examples/*/data
