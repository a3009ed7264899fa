# From a fresh clone: `make train` pre-trains a small GPT, `make test` runs every test. Both set up .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/tiny
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal --durations=30
# `make test ROOM=optim` runs the tests of one room.
ROOM ?=

# Compiled kernels outlive a run: the second run starts in seconds.
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor

.PHONY: train test lint types docs pictures wheel clean

train: $(VENV)/.installed-cli
	$(BIN)/functrain train tiny --run $(RUN) $(ARGS)

# One thread per worker: two workers on two cores, and sums come out the same on every machine.
test: $(VENV)/.installed-all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/$(ROOM)

lint: $(VENV)/.installed-all
	$(BIN)/ruff check .

types: $(VENV)/.installed-all
	$(BIN)/mypy

# The documentation site, in docs/_build/html; a warning is an error.
docs: $(VENV)/.installed-all
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# The pictures of the gallery, which are committed: each example runs, for minutes in all, and is drawn.
pictures: $(VENV)/.installed-all
	$(BIN)/python docs/pictures.py

# A wheel in dist/, installed with its own dependencies alone, in an environment of its own, and tried there.
wheel: $(VENV)/.installed-all
	rm -rf dist build .cache/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv .cache/wheel
	.cache/wheel/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd .cache/wheel && bin/python $(CURDIR)/tests/house/in_a_wheel.py && bin/functrain --version

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# -c constraints.txt: the versions that were tested; torch above all must not be resolved to another build.
$(VENV)/.installed-cli: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[cli]'
	touch $@

$(VENV)/.installed-all: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[cli,test,peers,privacy,docs,tables,wandb,mlflow]'
	touch $@ $(VENV)/.installed-cli

clean:
	rm -rf $(VENV) .cache
