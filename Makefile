# One entry to everything. The first call makes .venv and installs what is pinned in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check
RUNS = $(VENV)/.runs
DEVELOPS = $(VENV)/.develops
PEERS = build/peers
OPEN_CLIP = $(PEERS)/open-clip/.installed

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test quick lint bench docs tables model shards lowest newest clean

# What mmfilter runs with.
$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[cpu]'
	touch $@

# What tests, checks and benchmarks need beside it.
$(DEVELOPS): $(RUNS)
	$(PIP) --constraint constraints.txt --editable '.[cpu,dev]'
	# a test compares with its classes; what it depends on brings a torchvision that does not fit beside a CPU torch
	$(PIP) --no-deps dictionary-learning==0.1.0
	touch $@

# open_clip's data loader, which a test reads shards with in a process of its own: its torchvision breaks transformers beside
# a CPU torch, and its webdataset is an older one. torchvision is the version for the torch of constraints.txt.
$(OPEN_CLIP): $(DEVELOPS)
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) \
		torchvision==0.28.0 open_clip_torch==3.3.0 webdataset==0.2.86 timm==1.0.31 ftfy==6.3.1 wcwidth==0.9.4
	touch $@

# Score two example shards with the embedded model and stream the best 20 % into a training loop.
demo: $(RUNS)
	$(BIN)/python examples/demo.py

test: $(DEVELOPS) $(OPEN_CLIP)
	$(BIN)/python -m pytest

# The tests that take seconds.
quick: $(DEVELOPS)
	$(BIN)/python -m pytest -m "not slow"

lint: $(DEVELOPS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/deptry .
	$(BIN)/python docs/make_reference.py --check

bench: $(DEVELOPS)
	$(BIN)/python benchmarks/run.py

# Write the command reference from the code.
docs: $(RUNS)
	$(BIN)/python docs/make_reference.py

# Write the tables of model families and SAE layouts from the tests' results.
tables: $(DEVELOPS)
	$(BIN)/python docs/make_tables.py

# Rebuild the embedded model from the icon sets (about an hour and a half on two cores).
model: $(DEVELOPS)
	$(BIN)/python models/recipe/rebuild.py

# Rebuild the example shards.
shards: $(DEVELOPS)
	$(BIN)/python examples/make_shards.py

# The quick tests and a small training with the lowest versions that pyproject.toml allows, and with the newest.
lowest newest: $(DEVELOPS)
	$(BIN)/python tests/versions.py $@ --python $(PYTHON)

clean:
	rm -rf demo mmfilter-run .pytest_cache .ruff_cache .mypy_cache build/lowest build/newest
