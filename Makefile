# Phoenix. `make` prints the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# uv is used where it is installed; else it is put into a cache folder with venv and pip, which every Python has.
UV_VERSION := 0.13.9
UV_HOME := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/phoenix/uv-$(UV_VERSION)
UV := $(or $(shell command -v uv 2>/dev/null),$(UV_HOME)/bin/uv)
PYTHON ?= python3
export UV
export UV_PROJECT_ENVIRONMENT := $(CURDIR)/.venv
# Which part of the lock is installed: each target asks for the least it needs.
SYNC = $(UV) sync --frozen --quiet --inexact
DEV := .venv/.synced-dev
RUN := .venv/.synced-run
BIN := .venv/bin

.PHONY: help
help: ## Print this help
	@awk 'BEGIN {FS = ":.*##"} /^##@/ {printf "\n\033[1m%s\033[0m\n", substr($$0, 5)} \
	  /^[a-z-]+:.*?##/ {printf "  \033[36m%-16s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The model store of examples/filetype is the models folder of the package magika, found without importing it.
MAGIKA_MODELS = $(BIN)/python -c 'import importlib.util, pathlib; \
  print(pathlib.Path(importlib.util.find_spec("magika").origin).parent / "models")'

##@ Use
.PHONY: run
run: $(RUN) ## Serve the examples on this machine (REST on 8000, gRPC on 8001)
	@echo "Serving examples/ on http://127.0.0.1:$${PHOENIX_HTTP_PORT:-8000}; try in another terminal:"
	@echo "  curl -s http://127.0.0.1:$${PHOENIX_HTTP_PORT:-8000}/v2/models/iris/infer -d @examples/iris/request.json"
	@store=$$($(MAGIKA_MODELS)); \
	  PHOENIX_MODEL_STORE="$${PHOENIX_MODEL_STORE:-$$store}" exec $(BIN)/phoenix-server serve examples

.PHONY: check
check: $(RUN) ## Check the examples: manifest, digest, signature, provider, capacity
	@store=$$($(MAGIKA_MODELS)); \
	  PHOENIX_MODEL_STORE="$${PHOENIX_MODEL_STORE:-$$store}" $(BIN)/phoenix-server check examples

.PHONY: cluster
cluster: ## A real Kubernetes with operator and example on it (root on Debian, or PHOENIX_TEST_KUBECONFIG); BINDINGS=1: services too
	@$(PYTHON) tools/cluster.py $(if $(BINDINGS),--bindings)

.PHONY: cluster-down
cluster-down: ## Take it away
	@PYTHONPATH=tools $(PYTHON) -m lab services down
	@PYTHONPATH=tools $(PYTHON) -m lab prometheus down
	@PYTHONPATH=tools $(PYTHON) -m lab down

##@ Develop
.PHONY: test
test: $(DEV) ## Run every test
	$(BIN)/pytest

.PHONY: test-fast
test-fast: $(DEV) ## Run the tests that take no more than seconds
	$(BIN)/pytest -m "not slow and not cluster and not images and not services"

.PHONY: test-services
test-services: $(DEV) ## Run the tests on a real Redis, PostgreSQL and Kafka
	PHOENIX_REQUIRE=services $(BIN)/pytest -m services

.PHONY: test-cluster
test-cluster: $(DEV) ## Run the tests on a real Kubernetes
	PHOENIX_REQUIRE=cluster $(BIN)/pytest -m "cluster or images"

KILLS ?= 50
.PHONY: zero-loss
zero-loss: $(DEV) ## Kill servers, broker and relays at random under load (KILLS=50), then count everything
	$(BIN)/python tests/faults/zero_loss.py --kills $(KILLS) $(if $(SEED),--seed $(SEED))

.PHONY: lint
lint: $(DEV) ## Style, types, import rules, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) generate-check

.PHONY: format
format: $(DEV) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: generate
generate: $(DEV) ## Write every generated file again
	$(BIN)/python tools/generate.py

.PHONY: manifests
manifests: $(DEV) ## Write the operator's own manifests again (operator/manifests)
	$(BIN)/phoenix-operator manifests operator/manifests/cluster

.PHONY: golden
golden: $(DEV) ## Write what models become again, for the tests to hold
	$(BIN)/python tests/operator/model_scenarios.py

.PHONY: generate-check
generate-check: $(DEV) ## Fail if a generated file is not current
	$(BIN)/python tools/generate.py --check
	$(UV) lock --check --quiet

.PHONY: ci
ci: lint ## What CI runs: everything above, from nothing, with nothing skipped
	@code=0; PHOENIX_REQUIRE=cluster $(MAKE) test || code=$$?; \
	  $(MAKE) cluster-down; $(PYTHON) tools/images.py down; exit $$code

##@ Measure
.PHONY: bench
bench: $(DEV) ## Measure speed and memory against a naive endpoint and raw onnxruntime, in one run
	$(SYNC) --extra server --extra operator --group dev --group bench
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

.PHONY: bench-peers
bench-peers: $(DEV) ## The same with MLServer and KServe, each in its own environment
	$(SYNC) --extra server --extra operator --group dev --group bench
	$(BIN)/python benchmarks/peers.py $(BENCH_ARGS)

.PHONY: bench-operator
bench-operator: $(DEV) ## Measure what 1,000 models cost the operator, on a real API server without nodes
	$(SYNC) --extra server --extra operator --group dev --group bench
	$(BIN)/python benchmarks/operator_bench.py $(BENCH_ARGS)

.PHONY: bench-rules
bench-rules: $(DEV) ## Measure how long the recording rules of 1,000 models take on a real Prometheus
	$(SYNC) --extra server --extra operator --group dev --group bench
	$(BIN)/python benchmarks/rules_bench.py $(BENCH_ARGS)

.PHONY: bench-metrics
bench-metrics: $(DEV) ## Measure what an autoscaler costs that polls 200 models every 15 s
	$(BIN)/python benchmarks/metrics_api_bench.py $(BENCH_ARGS)

##@ Lab
LAB = PYTHONPATH=tools $(PYTHON) -m lab

.PHONY: lab-up
lab-up: ## Start a real Kubernetes on this machine (tools/lab); the last line is its kubeconfig
	@$(LAB) up

.PHONY: lab-down
lab-down: ## Stop it and remove what its pods left
	@$(LAB) down

.PHONY: lab-status
lab-status: ## Show what of it runs
	@$(LAB) status

##@ Deliver
.PHONY: images
images: ## Build the container images of server and operator
	@$(PYTHON) tools/images.py

##@ Housekeeping
.PHONY: clean
clean: ## Remove what was built here
	rm -rf .venv .cache .phoenix .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist

$(UV_HOME)/bin/uv:
	@echo "uv $(UV_VERSION) is installed into $(UV_HOME)" >&2
	@$(PYTHON) -m venv $(UV_HOME) && $(UV_HOME)/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(RUN): pyproject.toml uv.lock | $(UV)
	@echo "installing the server into .venv" >&2
	@$(SYNC) --extra server --group examples
	@touch $@

$(DEV): pyproject.toml uv.lock | $(UV)
	@echo "installing server, operator and the development tools into .venv" >&2
	@$(SYNC) --extra server --extra operator --group dev
	@touch $(RUN) $@
