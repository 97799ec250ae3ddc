# Every target installs what it needs: .venv is created if it is missing, and updated when the pinned versions change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo

.PHONY: help demo results test test-slow test-faults fuzz test-zoo coverage mutation baselines check notebooks docs bench gpu-wheels lock clean

help:
	@echo "make demo       train, analyse and report on handwritten digits (about three minutes)"
	@echo "make results    write RESULTS.md from the cells in results/cpu"
	@echo "make test       run the tests, except the slow ones"
	@echo "make test-slow  run all tests but those of faults"
	@echo "make test-faults  kill, interrupt and starve everything that saves, and write docs/reliability.md"
	@echo "make fuzz       give damaged and made-up input to every reader (FUZZ=2000: so many of each kind)"
	@echo "make test-zoo   run every analysis on networks of transformers, timm and others, and list them in the docs"
	@echo "make coverage   run the tests and say which lines and branches they reach"
	@echo "make mutation   put small faults into the code, and list those that no test notices (long)"
	@echo "make check      lint and type-check"
	@echo "make docs       build the documentation in docs/_build/html"
	@echo "make notebooks  execute the notebooks into notebooks/executed"
	@echo "make bench      run the benchmarks, side by side with other packages"
	@echo "make gpu-wheels  collect in wheels/ what benchmarks/gpu.py needs on a machine without network"
	@echo "make baselines  redraw the images that tests compare figures with"
	@echo "make lock       pin versions in constraints.txt (UPGRADE=--upgrade: the newest ones)"
	@echo "make clean      remove everything that make created"

# Python compiles modules when they are first imported: to compile all that is installed would take more than a minute.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch takes a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[test,dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/pnanalysis demo --out $(OUT)

# Trains nothing: `pnanalysis reproduce --scale cpu --data imagefolder:PATH` makes the cells that are missing.
results: $(STAMP)
	@$(BIN)/pnanalysis reproduce all --scale cpu --out results/cpu --tables --page RESULTS.md

# One thread per worker, and sweeps (joblib) see one core: two busy thread pools on two cores are slower than two single
# threads. A worker that has run out of tests takes over some of another's (worksteal); until then each runs whole files,
# and makes their fixtures once.
test: $(STAMP)
	OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not zoo and not faults"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "not faults"

# Writes benchmarks/results/faults.json and docs/reliability.md. TRIES=5: as many of each kind, instead of 10 to 50
# (about half an hour on two cores).
test-faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m faults -n 2 --dist worksteal

# Writes benchmarks/results/fuzz.json and docs/reliability.md. Stops at the first input of a kind that ends in another error
# than ours, and prints it.
fuzz: FUZZ ?= 2000
fuzz: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[fuzz]"
	FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz
	FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.guided
	$(BIN)/python -m tests.faults.counts

# Writes docs/reference/networks.md.
test-zoo: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[zoo,sinks]"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.page -n auto --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/monitoring/test_sinks.py

# Subprocesses are measured too. Which tests reach a line, and how long they take, is kept for `make mutation`. Takes about
# half an hour. What fails is shown and does not end it: measuring adds warnings and files of its own, and those of killed
# processes are damaged.
coverage: $(STAMP)
	@rm -f .coverage .coverage.*
	-OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 $(BIN)/coverage run -m pytest -n auto --dist worksteal \
		--junitxml=.test-times.xml -m "not slow and not zoo and not faults"
	-@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --skip-covered --sort cover

.coverage:
	@$(MAKE) coverage

# Writes benchmarks/results/mutation.md and .json, and goes on where it was interrupted. MUTATION="--again": survivors that
# nothing explains.
mutation: $(STAMP) .coverage
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutation $(MUTATION)

# Redraws the images that tests compare figures with, and which depend on the matplotlib version named in
# tests/plots/test_images.py. Review the changed images before you commit them.
baselines: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/plots/test_images.py --mpl-generate-path=tests/plots/baseline

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py

# Pages show figures that their own code blocks draw; a page's figures are redrawn only if the page or the package changed.
docs: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[docs]"
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "documentation in docs/_build/html/index.html"

bench: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[bench]"
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# For Python 3.12 on Linux x86_64, whatever runs here. About 50 MB. No needs of needs: gpu_requirements.txt names them.
gpu-wheels: $(STAMP)
	@rm -rf wheels
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir wheels .
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --dest wheels --no-deps --only-binary=:all: \
		--python-version 3.12 --implementation cp $(addprefix --platform=manylinux,2014_x86_64 _2_24_x86_64 _2_27_x86_64 _2_28_x86_64) \
		--constraint constraints.txt --requirement benchmarks/gpu_requirements.txt
	@du -sh wheels

# One set of versions for every supported Python. Present versions stay as they are unless UPGRADE=--upgrade is given.
lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --all-extras --no-annotate --no-emit-index-url \
		--custom-compile-command "make lock" $(UPGRADE) --output-file constraints.txt

clean:
	rm -rf $(VENV) $(OUT) build dist wheels docs/_build docs/_figures .coverage .coverage.* .test-times.xml .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis *.egg-info notebooks/executed
