# Every target works as the first command on a machine that has Python (>= 3.11) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEV := $(VENV)/.setup
DEMO := $(VENV)/.demo
DOCS := $(VENV)/.docs
LOCKS := pyproject.toml requirements/install requirements/build.txt requirements/demo.txt

# Tests of one file share what its fixtures made, so a file stays with one worker. Four of them take up to 10 GB.
PYTEST := $(BIN)/python -m pytest -v -rfEs --durations=15 --numprocesses=logical --maxprocesses=4 --dist=loadfile
# `make test TESTS=tests/passes` runs a part.
TESTS ?= tests

export PYTHON

.PHONY: setup demo test test-exporters lint docs lock clean

setup: $(DEV)

$(DEV): $(LOCKS) requirements/dev.txt
	requirements/install $(VENV) dev
	touch $(DEV) $(DEMO)

$(DEMO): $(LOCKS)
	requirements/install $(VENV) demo
	touch $(DEMO)

# Without torch and the like, which only the tests need.
demo: $(DEMO)
	$(BIN)/python fixtures/demo.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

$(DOCS): requirements/docs.txt requirements/build.txt pyproject.toml
	requirements/install $(VENV) docs
	touch $(DOCS)

# Pages into site/, without a network; a broken link or a name that is not in the sources is an error.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint
	$(PYTEST) $(TESTS)

# Graphs that optimum and ONNX Runtime GenAI write today, instead of the stored ones (fixtures/exporters).
test-exporters: $(DEV)
	$(PYTHON) -m venv .venv-exporters/optimum && $(PYTHON) -m venv .venv-exporters/genai
	.venv-exporters/optimum/bin/pip install -q torch==2.13.0
	.venv-exporters/optimum/bin/pip install -q optimum-onnx==0.1.0 transformers==4.57.6 onnxruntime torch==2.13.0
	.venv-exporters/genai/bin/pip install -q torch==2.13.0
	.venv-exporters/genai/bin/pip install -q onnxruntime-genai==0.18.0 transformers==5.24.0 onnx-ir torch==2.13.0
	rm -rf .venv-exporters/graphs && mkdir .venv-exporters/graphs
	.venv-exporters/optimum/bin/python fixtures/exporters/make.py optimum .venv-exporters/graphs
	.venv-exporters/genai/bin/python fixtures/exporters/make.py genai .venv-exporters/graphs
	ONNXTOOLS_EXPORTED=.venv-exporters/graphs $(PYTEST) tests/foreign

# The newest versions, after a change of pyproject.toml or from time to time; what CI calls the newest is then the lock.
lock:
	requirements/lock .venv-lock

clean:
	rm -rf $(VENV) .venv-lock .venv-newest .venv-exporters build site *.egg-info demo-out .mypy_cache .ruff_cache .pytest_cache
