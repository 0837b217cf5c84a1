# Two commands do everything on a machine that has Python >= 3.10, make and a package index:
#
#     make demo      train, measure and picture a first model
#     make test      run the tests
#
# Each creates the virtual environment when it is missing and installs with the tested versions;
# a second call installs nothing. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# Given to every `pip install`. On Linux a CPU build of torch is enough and much smaller:
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# The tested versions. To use a torch that is already chosen (a GPU machine's): make test CONSTRAINTS=
CONSTRAINTS ?= constraints.txt
# Given to every pytest run: make test PYTEST_FLAGS="-k psis -x"
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
  $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
NATIVE := $(wildcard lvppl/mixtures/native/*)
CONFIGURATION := setup.cfg setup.py pyproject.toml $(CONSTRAINTS) $(NATIVE)

# One thread a worker: more only compete for the same cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# A folder of data sets beside the repository is used where there is one and none is named.
ifndef LVPPL_DATA
ifneq ($(wildcard ../shared/data),)
export LVPPL_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench docs install clean distclean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 - \2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-test ## train on digits, measure ln p(y), fit Old Faithful; pictures in runs/demo/
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/old_faithful.py --out runs/demo

test: $(VENV)/.installed-test ## every fast test, in parallel
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-all: $(VENV)/.installed-test ## every test, the slow ones too
	$(PYTEST) --timeout 1800 $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev ## formatting, lint and types, changing nothing
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy lvppl

format: $(VENV)/.installed-dev ## format the code and sort the imports
	$(BIN)/python -m ruff check --quiet --select I --fix .
	$(BIN)/python -m ruff format .

bench: $(VENV)/.installed-bench ## run every program in benchmarks/
	@for program in $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)); do \
	  echo "== $$program"; $(BIN)/python $$program || exit 1; done

docs: $(VENV)/.installed-docs ## write the reference of the public API to build/docs/
	$(BIN)/python -m pdoc --math --docformat restructuredtext -o build/docs lvppl

install: $(VENV)/.installed-dev ## the environment for development, and nothing else

clean: ## remove caches and builds; keeps the environment and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean ## remove the environment as well
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "lvppl needs Python 3.10 or newer; $(PYTHON) is older or missing: make PYTHON=python3.11 ..."; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

# Compat mode puts the tree on the path by a .pth file. The default finder would lose to the clone's
# own folder, which python takes for a package when it is started beside it.
# A stamp for each set of extras. It is older than the configuration after an edit, and only then
# is anything installed again. The interpreter comes first, and only has to exist.
$(VENV)/.installed-%: $(CONFIGURATION) | $(BIN)/python
	$(INSTALL) --config-settings editable_mode=compat -e ".[$*]"
	@touch $@
