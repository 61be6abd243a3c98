# Every target installs what it needs into .venv: python3 (3.10 or later, with venv and pip) and make are enough.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
PIP := -m pip --disable-pip-version-check --no-input install -qq
CSRC = $(shell find csrc tests/sanitize -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
BENCHMARKS = $(wildcard benchmarks/test_*.py)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-full test-oldest test-san lint format package bench measured errors coverage compiled compiled-cuda api wheel clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter, ARGS='-k bn_act' goes to pytest (or to the demo),"
	@echo "  WORKERS=8 runs more tests at a time."

demo: $(VENV)/runtime.stamp  ## swap the blocks of a ResNet-50; compare results, time and memory with eager
	@$(BIN)/python examples/demo.py $(ARGS)
	@echo "next: $(BIN)/pytest benchmarks/ --benchmark-only --quick, or $(BIN)/python -m fusedres"

test: lint package $(VENV)/dev.stamp  ## linters, types, and every test but the slow ones
	$(PYTEST) -n $(WORKERS) --durations=20 --doctest-modules tests fusedres $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(BENCHMARKS) --benchmark-only --quick --benchmark-columns=median
	FUSEDRES_MIN_ELEMENTS=0 OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py --batch 2 --size 64 --rounds 3

test-full: $(VENV)/dev.stamp  ## every test, the slow ones too
	$(PYTEST) -n $(WORKERS) --durations=20 --doctest-modules -m "" tests fusedres $(ARGS)

test-oldest: $(OLDEST)/dev.stamp  ## the tests with the oldest supported torch (its CUDA build, 5 GB)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) --durations=20 --doctest-modules tests fusedres $(ARGS)

test-san: $(VENV)/runtime.stamp  ## every CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer (compiles for minutes)
	$(BIN)/python tests/sanitize/run.py $(ARGS)

venv: $(VENV)/dev.stamp  ## install everything that the other targets need

lint: $(VENV)/dev.stamp  ## ruff, clang-format and pyright, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CSRC),$(BIN)/clang-format --dry-run -Werror $(CSRC))
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/dev.stamp  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

package: $(VENV)/runtime.stamp  ## build the wheel as a machine without torch or a compiler would
	@rm -rf build dist
	FUSEDRES_BUILD=none $(BIN)/python -m pip --disable-pip-version-check wheel -qq --no-deps -w dist .
	@rm -rf build

bench: $(VENV)/dev.stamp  ## time ops, blocks and networks on the CPU (ARGS=--quick: two minutes); for a GPU see benchmarks/gpu.py
	$(BIN)/python -m pytest $(BENCHMARKS) --benchmark-only $(ARGS)

measured: $(VENV)/dev.stamp  ## regenerate docs/measured.md, its charts and the README's numbers from benchmarks/results
	$(BIN)/python benchmarks/measured.py

errors: $(VENV)/dev.stamp  ## regenerate docs/errors.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/errors.py docs/errors.md

coverage: $(VENV)/dev.stamp  ## regenerate docs/coverage.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py docs/coverage.md

compiled: $(VENV)/dev.stamp  ## regenerate docs/compiled.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compiled.py docs/compiled.md

compiled-cuda: $(VENV)/dev.stamp  ## regenerate docs/compiled_cuda.md; needs nvcc and cuobjdump, and no GPU
	$(BIN)/python benchmarks/compiled_cuda.py docs/compiled_cuda.md

api: $(VENV)/dev.stamp  ## regenerate docs/api.md
	$(BIN)/python docs/api.py docs/api.md

wheel: $(VENV)/dev.stamp  ## build the pure and the binary wheel, and try both (also with the oldest torch after make test-oldest)
	.ci/wheel $(BIN)/python $(wildcard $(OLDEST)/bin/python)

clean:  ## remove the environments and everything built
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so that an interrupted installation starts again; pip skips what is already there.
# torchvision, timm and transformers come without their dependencies: they'd bring another torch where pip finds a
# CPU-only one.
$(VENV)/runtime.stamp: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fusedres needs Python 3.10 or later: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@echo "installing torch and fusedres into $(VENV) (a torch with CUDA is several gigabytes)"
	@$(BIN)/python $(PIP) -c constraints.txt setuptools torch
	@$(BIN)/python $(PIP) -c constraints.txt --no-deps torchvision timm
	@$(BIN)/python $(PIP) -c constraints.txt --no-build-isolation -e '.[bench]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@echo "installing the test tools into $(VENV)"
	@$(BIN)/python $(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(BIN)/python $(PIP) -c constraints.txt --no-deps 'transformers ; python_version >= "3.11"'
	@touch $@

$(OLDEST)/dev.stamp: pyproject.toml setup.py constraints.txt constraints-oldest.txt
	@$(PYTHON) -m venv $(OLDEST)
	@awk -F '==' 'NR == FNR { oldest[$$1]; print; next } !($$1 in oldest)' constraints-oldest.txt constraints.txt > $(OLDEST)/constraints.txt
	@echo "installing the oldest supported torch into $(OLDEST) (about 5 GB)"
	@$(OLDEST)/bin/python $(PIP) -c $(OLDEST)/constraints.txt setuptools torch
	@$(OLDEST)/bin/python $(PIP) -c $(OLDEST)/constraints.txt --no-build-isolation -e '.[test]'
	@$(OLDEST)/bin/python $(PIP) -c $(OLDEST)/constraints.txt --no-deps torchvision timm
	@touch $@
