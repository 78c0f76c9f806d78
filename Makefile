# `make quickstart` and `make test` set up what they need, on a fresh machine too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyTorch's own index of CPU builds. Tried second: where pip already knows a CPU build, nothing else is asked.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: setup quickstart smollm2 test test-slow check format lock clean

setup: $(VENV)/installed

$(VENV)/installed: requirements/cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maspo_ray needs Python 3.11 or newer; set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing from requirements/cpu.txt (about 2 minutes)"
	@$(PIP) --no-deps -r requirements/cpu.txt 2> $(VENV)/pip.log \
	  || $(PIP) --no-deps -r requirements/cpu.txt --extra-index-url $(TORCH_CPU_INDEX) 2> $(VENV)/pip.log \
	  || { cat $(VENV)/pip.log; exit 1; }
	@$(PIP) --no-deps --no-build-isolation --editable . 2>> $(VENV)/pip.log || { cat $(VENV)/pip.log; exit 1; }
	touch $@

quickstart: setup
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/maspo train examples/quickstart/run.yaml --run_dir runs/quickstart-$$(date +%Y%m%d-%H%M%S) $(ARGS)

smollm2: setup
	$(BIN)/python examples/smollm2/prepare.py
	$(BIN)/maspo train examples/smollm2/run.yaml --run_dir runs/smollm2-$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: setup check
	$(BIN)/python -m pytest $(ARGS)

# What `make test` leaves out, so that it stays within minutes.
test-slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs uv. The CPU lock takes torch's CPU build; the GPU lock is resolved, not installed.
lock:
	uv pip compile pyproject.toml --extra cpu --extra dev --python-version 3.11 --override requirements/overrides.txt \
	  --no-emit-index-url --no-header --no-annotate $(UV_ARGS) --output-file requirements/cpu.txt
	uv pip compile pyproject.toml --extra gpu --extra dev --python-version 3.11 --python-platform x86_64-unknown-linux-gnu \
	  --no-emit-index-url --no-header --no-annotate --output-file requirements/gpu.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis examples/*/model examples/*/data
