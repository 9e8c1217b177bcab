# `make embed` and `make test` each work first on a fresh clone with only Python >= 3.11 and make.
JOB ?= jobs/demo.yaml
SEED ?= 0
MINUTES ?= 60
ROWS ?= 500000
DIM ?= 768
OUT ?= output/bench-search
VECTORS ?=
DATA ?=
QUICK ?=
SHARDS ?= 1000 10000 100000
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: embed train submit test setup lint schemas faults bench-search bench-embed bench-scale clean help

help:            ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /	/'

embed: $(READY)  ## run a job: make embed JOB=jobs/demo.yaml
	$(BIN)/matryoshka run $(JOB)

submit: $(READY) ## send a job to a Ray cluster: make submit JOB=jobs/squad.yaml ARGS="--address http://HEAD:8265"
	$(BIN)/matryoshka submit $(JOB) $(ARGS)

train: JOB = jobs/train-demo.yaml
train: $(READY)  ## train a Matryoshka model: make train JOB=jobs/train-demo.yaml
	$(BIN)/matryoshka train $(JOB)

test: $(READY)   ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

setup: $(READY)  ## make .venv and install everything into it

lint: $(READY)   ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

schemas: $(READY) ## write schemas/*.schema.json from the models
	$(BIN)/matryoshka schema > schemas/job.schema.json
	$(BIN)/matryoshka schema --train > schemas/train.schema.json

faults: $(READY) ## kills, lost power, full disks, races, damage: make faults SEED=0 MINUTES=60
	$(BIN)/python -m tests.faults --seed $(SEED) --minutes $(MINUTES)

bench-search: $(READY) ## beside LanceDB, faiss, usearch: make bench-search ROWS=500000 DIM=768 OUT=… or VECTORS=folder
	$(BIN)/python -m pip install -q -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m tests.bench --rows $(ROWS) --dim $(DIM) --out $(OUT) $(if $(VECTORS),--vectors $(VECTORS)) $(ARGS)

bench-embed: ROWS = 200
bench-embed: OUT = output/bench-embed
bench-embed: $(READY) ## beside sentence-transformers, model2vec: make bench-embed DATA=folder ROWS=200 OUT=… QUICK=1
	$(BIN)/python -m pip install -q -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m tests.bench.embed --rows $(ROWS) --out $(OUT) $(if $(DATA),--data $(DATA)) $(if $(QUICK),--quick) $(ARGS)

bench-scale: OUT = output/bench-scale
bench-scale: $(READY) ## what so many shards cost the driver: make bench-scale SHARDS="1000 10000 100000" OUT=…
	$(BIN)/python -m tests.bench.scale --shards $(SHARDS) --out $(OUT) $(ARGS)

clean:           ## remove .venv and caches; output/ is kept
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Anew whenever what is to be installed has changed.
$(READY): pyproject.toml constraints.txt
	@set -e; for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
		if command -v $$python >/dev/null && $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "make: no Python >= 3.11 found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; fi; \
	echo "setting up $(VENV) with $$found"; \
	$$found -m venv $(VENV); \
	$(BIN)/python -m pip install -q -q --disable-pip-version-check -c constraints.txt -e '.[cloud,demo,dev,nanotoken,resident]'; \
	touch $(READY)
