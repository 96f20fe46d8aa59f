# Two commands from a bare clone: `make demo` and `make test`. They need Python 3.11+, make and a network for packages.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-system faults lint types layers format docs clean

demo: $(READY)
	$(BIN)/vitrail demo --out .build/demo $(DEMO)

# One worker a core. The tests of a file stay on one worker, since they share what is expensive to make.
SYSTEM := tests/browser tests/test_notebooks.py tests/test_docs.py
TESTS ?= tests $(SYSTEM:%=--ignore=%)
WORKERS ?= --numprocesses logical --maxprocesses 8 --dist loadfile

test: $(READY)
	$(BIN)/python -m pytest $(WORKERS) $(TESTS)

# The page in a real browser, notebooks and guides from beginning to end.
test-system: $(READY)
	$(BIN)/python -m pytest $(WORKERS) $(SYSTEM)

# About an hour: broken images, hostile requests, kills, full disks, two processes at once, memory, every family.
faults: $(READY)
	mkdir -p .build/faults && rm -rf .build/faults/*
	$(BIN)/python tests/faults/image_trial.py
	$(BIN)/python tests/faults/hostile_server.py
	$(BIN)/python tests/faults/kills.py .build/faults/study
	$(BIN)/python tests/faults/kills.py .build/faults/training --work training
	$(BIN)/python tests/faults/full_disk.py
	$(BIN)/python tests/faults/two_at_once.py
	$(BIN)/python -m pip install --quiet --editable '.[ray,s3]' 'moto[server]'
	$(BIN)/python tests/faults/kill_workers.py .build/faults/workers
	$(BIN)/python tests/faults/kill_workers.py .build/faults/workers_s3 --on s3
	$(BIN)/python tests/faults/kill_workers.py .build/faults/workers_ray --on ray
	$(BIN)/python tests/faults/study_memory.py
	$(BIN)/python tests/end_to_end.py

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

$(READY): pyproject.toml web/package.json web/hatch_build.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Vitrail needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo 'open .build/site/index.html'

clean:
	rm -rf .build src/vitrail/app/static web/node_modules
