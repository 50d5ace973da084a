# Everything from nothing: Python 3.11+ and make are all that has to be here first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
HOST   ?= 127.0.0.1
PORT   ?= 8080
ARGS   ?=
# Line coverage by default where Python can measure it without doubling the time (3.12 and newer, sys.monitoring).
COVERAGE ?= $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info >= (3, 12)))')
# The tests start hundreds of processes. Where Python may not write bytecode, each of them would compile the package again.
# A test process that crashes ends the run and is named. pytest-xdist 3.8 would start another one, and wait for ever at the end.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile \
	--no-loadscope-reorder

.PHONY: help serve check test lint format bench bench-training parity docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "  make %-16s %s\n", $$1, $$2}'

serve: $(VENV)/.serve  ## fetch the default model once, answer on http://127.0.0.1:8080/v1
	$(BIN)/unmask serve --host $(HOST) --port $(PORT) $(ARGS)

# The types of tests and benchmarks are a third of pyright's time: `make lint` checks them, and so does the CI.
check: $(VENV)/.dev  ## lint, types of the package, fast tests, doctests and examples: for while you work
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright unmask examples & types=$$!; \
	$(PYTEST) -m 'not (service or browser or weights or slow)' $(ARGS); tests=$$?; \
	wait $$types && exit $$tests

test: $(VENV)/.dev  ## all tests; those in a browser are skipped where no Chromium is installed
	COVERAGE_CORE=sysmon $(PYTEST) $(if $(filter 1,$(COVERAGE)),--cov --cov-report=term) $(ARGS)

lint: $(VENV)/.dev  ## style, and the types of everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev  ## mend the style where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench  ## measure against the peers, interleaved in one run
	$(BIN)/python benchmarks/encode.py $(ARGS)

bench-training: $(VENV)/.dev  ## measure a training step against sentence-transformers' trainer
	$(BIN)/python benchmarks/training.py $(ARGS)

# Needs Node.js. pip and npm install the runtimes and clients into folders of their own on first use, about 2 GB.
parity: $(VENV)/.dev  ## compare exports in every runtime, write the table of docs/export.md, test the clients of others
	$(BIN)/python -m pytest -m parity tests/export
	$(BIN)/python tools/parity.py $(ARGS)

docs: $(VENV)/.docs  ## build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("unmask needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

# A stamp per set of packages: the second run starts at once.
$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[evaluate,oidc,postgres,ray,redis,train]' --group dev
	touch $@

$(VENV)/.docs: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $@

# llama-cpp-python compiles for minutes, infinity-emb cannot live with the transformers that the others use, and LiteLLM
# pins what others have newer. Where one of them does not install, its row of the table says so.
$(VENV)/.bench: benchmarks/infinity.txt benchmarks/litellm.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt llama-cpp-python
	-$(PYTHON) -m venv $(VENV)/peers/infinity && \
		$(VENV)/peers/infinity/bin/python -m pip install --quiet --requirement benchmarks/infinity.txt
	-$(PYTHON) -m venv $(VENV)/peers/litellm && \
		$(VENV)/peers/litellm/bin/python -m pip install --quiet --requirement benchmarks/litellm.txt
	touch $@

clean:  ## remove everything that is not in the repository
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist build
