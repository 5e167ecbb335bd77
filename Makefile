# `make demo` and `make test` need Python 3.10 or newer and nothing else; they create .venv themselves.
PYTHON ?= python3
TORCH ?= torch==2.13.*
# Where torch is installed from. Empty: whatever pip is configured with.
TORCH_INDEX_URL ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests work on small tensors: threads would only wait for each other, so the cores go to processes.
# One more than cores: many tests wait, for a server to start or for a signal to arrive.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(8, (os.cpu_count() or 1) + 1))")
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: help demo check test venv clean
help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(STAMP) ## create .venv and install the package with its test tools

$(STAMP): pyproject.toml setup.py Makefile $(wildcard csrc/*.cu)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP) ## let the sandbox agent evolve itself (about ten minutes on two cores)
	$(BIN)/genevolve-fast demo

check: $(STAMP) ## ruff, unit tests, one shape per kernel: three minutes at most
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) tests -m "not slow" --ignore=tests/kernels_interpreter --ignore=tests/kernels_compile --ignore=tests/gpu
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels_interpreter -m "not slow"
	$(PYTEST) tests/kernels_compile -m "not slow"

test: $(STAMP) ## everything: unit tests, kernels interpreted and compiled, csrc, a short demo
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# one interpreted test takes minutes on one core: beside the others, not after them
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kernels_interpreter > $(VENV)/interpreter.log 2>&1 & \
	$(PYTEST) tests -m "not alone" --ignore=tests/kernels_interpreter --ignore=tests/kernels_compile; units=$$?; \
	wait $$!; kernels=$$?; cat $(VENV)/interpreter.log; test $$units -eq 0 -a $$kernels -eq 0
	$(PYTEST) tests/kernels_compile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m alone $$(grep -rl --include='test_*.py' 'mark\.alone' tests)

clean: ## remove .venv, builds and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache genevolve_fast/_csrc
