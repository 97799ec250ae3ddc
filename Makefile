# Every target sets itself up: .venv is made when it is missing and brought up to date when the lock changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo

.PHONY: help demo test test-slow baselines check notebooks docs bench lock clean

help:
	@echo "make demo       train, analyse and report on handwritten digits (about two minutes)"
	@echo "make test       run the tests        make test-slow  the long ones too"
	@echo "make baselines  draw anew the pictures that tests compare figures with"
	@echo "make check      lint and type-check  make notebooks  execute them into notebooks/executed"
	@echo "make bench      benchmarks beside peers              make docs   the documentation, in docs/_build/html"
	@echo "make clean      remove what make made"

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch takes a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/pnanalysis demo --out $(OUT)

# One thread a worker: two busy thread pools on two cores are slower than two single threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest

# Anew what tests compare figures with; their matplotlib is named in tests/plots/test_images.py. Look at what git says has changed.
baselines: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/plots/test_images.py --mpl-generate-path=tests/plots/baseline

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py

# Pages show figures that their own code makes, once for each state of the code.
docs: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "documentation in docs/_build/html/index.html"

bench: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# One set of versions for every supported Python. Present versions stay as they are unless UPGRADE=--upgrade is given.
lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --all-extras --no-annotate --no-emit-index-url \
		--custom-compile-command "make lock" $(UPGRADE) --output-file constraints.txt

clean:
	rm -rf $(VENV) $(OUT) build dist docs/_build docs/_figures .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info \
		notebooks/executed
