# The commands of DESIGN: setup, demo, test, check. Everything is installed into .venv from the locked list.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := docker/requirements-cpu.lock
TORCH := torch==2.13.0+cpu
TORCH_CPU_WHEELS ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# The environment is current while the lock, the project file and the interpreter are what it was built from.
STAMP := $(VENV)/.built-$(shell cat $(LOCK) pyproject.toml | cksum | cut -d' ' -f1)
# What the benchmark compares with, kept apart from the environment: nothing else can import it.
RIVALS := liger-kernel==0.8.5 trl==1.16.0 datasets==5.2.0 pandas==3.1.1 multiprocess==0.70.19 python-dateutil==4.0.0
RIVALS_STAMP := $(VENV)/bench/.built-$(shell echo $(RIVALS) | cksum | cut -d' ' -f1)

.PHONY: help setup demo submit test slow long chaos check unit bench clean

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(STAMP)  ## make .venv with the locked CPU dependencies

$(STAMP):
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=..." >&2; exit 2; }
	@echo "setting up $(VENV) (a few minutes, about 4 GB)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@echo "  torch ..."
	@$(PIP) install --no-deps "$(TORCH)" 2>/dev/null || $(PIP) install --no-deps --index-url "$(TORCH_CPU_WHEELS)" "$(TORCH)"
	@echo "  the locked list ..."
	@$(PIP) install --no-deps -r $(LOCK)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: setup  ## run the main job on this machine with models it builds itself
	@$(BIN)/python -m opd_ray.train experiment=demo resume=overwrite $(ARGS)

submit: setup  ## run ARGS="experiment=X name=Y ..." as a job of the cluster at RAY_API_SERVER_ADDRESS
	@$(BIN)/python -m opd_ray.submit $(ARGS)

check: setup  ## ruff, mypy, import-linter, hadolint, shellcheck, size gate
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=. $(BIN)/lint-imports --config pyproject.toml
	@$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	@$(BIN)/shellcheck docker/slurm.sh .ci/run
	@$(BIN)/python -m pytest -q tests/unit/test_layout.py

unit: setup  ## unit tests only
	@$(BIN)/python -m pytest -q tests/unit

test: check  ## the checks and the tests that need no GPU, but for the slow ones
	@$(BIN)/python -m pytest -q -m "not gpu and not bench and not slow and not long" --durations=5 tests

slow: setup  ## the slow tests of the real stack: servers that die, resumed and longer runs
	@$(BIN)/python -m pytest -q -m slow --durations=5 tests

long: setup  ## whole trainings of the demo: several teachers, batches ahead (a quarter of an hour)
	@$(BIN)/python -m pytest -q -m long --durations=5 tests

chaos: setup  ## every fault in a run of its own, then 200 updates full of them (half an hour); ARGS="--only publish --no-soak"
	@$(BIN)/python tests/ray/chaos.py $(ARGS)

bench: $(RIVALS_STAMP)  ## measure all parts, or PART=loss, into runs/bench/bench.json
	@$(BIN)/python tests/bench/run.py $(PART)

$(RIVALS_STAMP): $(STAMP)
	@rm -rf $(VENV)/bench
	@$(PIP) install --no-deps --target $(VENV)/bench $(RIVALS)
	@touch $@

clean:  ## remove the environment and the caches, not the runs
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
