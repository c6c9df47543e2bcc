# covidseg: every command builds its own environment in .venv first; Python 3.11 or newer and make are enough.
# Versions come from requirements.lock, with hashes. `make help` explains the rest.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv book html serve lab pdf solutions colab bench faults fuzz mutants audit nets test weekly processors shuffle coverage lint strip lock clean distclean FORCE

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
# Set PYTHON to choose the interpreter; otherwise the first of these that is 3.11 or newer and can make environments.
PYTHON ?=
CANDIDATES := python3.12 python3.11 python3.13 python3 python
PYTEST_ARGS ?=
BOOK_ARGS ?=
# The scans that the chapters run on: phantom, medseg, or a training folder, with TEST for the test folder.
DATA ?= phantom
TEST ?=
BENCH_ARGS ?=
LAB_ARGS ?=

help:  ## Show this list
	@printf 'covidseg: what make can do. The first run makes %s, with about 5 GB of pinned packages.\n\n' '$(VENV)'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf '%-16s %s\n' "$$name" "$$text"; done
	@printf '\n  PYTHON=python3.12 make venv      choose the interpreter\n'
	@printf '  make test PYTEST_ARGS="-k lungs" pass options to pytest\n'
	@printf '  make book BOOK_ARGS="--only 02"  pass options to tools/build_book.py\n'
	@printf '  make bench BENCH_ARGS="--only lungs" measure only some things\n'

book: $(READY)  ## Run every chapter and build the book into _build/html (DATA=medseg: on real CT)
	$(BIN)/python tools/build_book.py --data "$(DATA)" --test "$(TEST)" $(BOOK_ARGS)

html: $(READY)  ## Build the pages again from chapters that have run already
	$(BIN)/python tools/build_book.py --no-execute $(BOOK_ARGS)

serve: $(READY)  ## Show the built book at http://localhost:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

lab: $(READY)  ## Open the chapters in JupyterLab, in the environment of the book
	cd chapters && COVIDSEG_RUNS=../_build/runs ../$(BIN)/jupyter lab $(LAB_ARGS)

pdf: $(READY)  ## Print the built book into _build/covidseg-book.pdf (needs Chromium)
	$(BIN)/python tools/book_pdf.py

solutions: $(READY)  ## Run the solutions of all exercises after their chapters
	$(BIN)/python tools/build_book.py --solutions $(BOOK_ARGS)

colab: $(READY)  ## Run every chapter on Colab's versions, outside the repository
	$(BIN)/python tools/colab_check.py

bench: $(READY)  ## Measure speed and memory side by side with other ways, into results/bench-*.json
	VIRTUAL_ENV="$$(pwd -P)/$(VENV)" $(BIN)/uv pip install --no-config --quiet --require-hashes -r requirements-bench.lock
	PYTHONPATH=tools $(BIN)/python -m bench $(BENCH_ARGS)

faults: $(READY)  ## Try every fault in the table of faults, and write what happened into results/faults.json
	PYTHONPATH=tools $(BIN)/python -m faults $(FAULTS_ARGS)

fuzz: $(READY) $(VENV)/.trust  ## Feed broken files to the readers for ten minutes, guided by what they run through
	PYTHONPATH=tools $(BIN)/python -m fuzz $(FUZZ_ARGS)

mutants: $(READY) $(VENV)/.trust  ## Change metrics, patches and lungs in every small way, and see whether the tests notice
	PYTHONPATH=tools $(BIN)/python -m mutants $(MUTANTS_ARGS)

audit: $(READY) $(VENV)/.trust  ## Look the pinned packages up in the database of known vulnerabilities
	$(BIN)/pip-audit --require-hashes --disable-pip -r requirements.lock

$(VENV)/.trust: $(READY) requirements-trust.lock
	VIRTUAL_ENV="$$(pwd -P)/$(VENV)" $(BIN)/uv pip install --no-config --quiet --require-hashes -r requirements-trust.lock
	touch $@

# One process a core, up to four: each imports everything and needs a gigabyte. A module's tests stay together, so that
# what they share is made once. PYTEST_ARGS="-n 0" runs all in one process.
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(READY)  ## Run the tests (those of the built book skip when there is none; `make weekly` has more)
	$(PYTEST) $(PYTEST_ARGS)

weekly: $(READY) $(VENV)/.trust  ## Run the tests of the tools themselves, of load and of killed programs, which `make test` leaves out
	$(PYTEST) -m weekly $(PYTEST_ARGS)

processors: $(READY)  ## Run the tests that compute with nets under older sets of instructions
	$(BIN)/python tools/processors.py -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

shuffle: $(READY)  ## Run the tests in another order each time: none may need another
	$(PYTEST) -p randomly $(PYTEST_ARGS)

coverage: $(READY)  ## Run the tests and list the lines that none of them runs; fails under 90 %
	$(PYTEST) -m 'not book' --cov --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

lint: $(READY)  ## Check style (ruff) and types (mypy)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

venv: $(READY)  ## Only make the environment

# The stamp holds the path of the checkout. If it is missing, names another place (the folder was moved or copied) or
# the interpreter is gone, the environment is half made or broken, and it is made afresh.
ifneq ($(shell [ "$$(cat $(READY) 2>/dev/null)" = "$$(pwd -P)" ] && $(BIN)/python -c '' 2>/dev/null && echo whole),whole)
$(READY): FORCE
REBUILD := yes
endif

$(READY): requirements-bootstrap.txt requirements.lock pyproject.toml
	@set -e; \
	rm -f $(READY); \
	if [ -n "$(REBUILD)" ]; then \
	  rm -rf $(VENV); \
	  found=''; \
	  for python in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      found="$$python"; \
	      if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then break; fi; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'make: no Python 3.11 or newer among: $(or $(PYTHON),$(CANDIDATES))' >&2; \
	    echo 'make: install one, or name it: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3' >&2; exit 1; \
	  fi; \
	  if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "make: $$found cannot make environments (its venv or ensurepip is missing)" >&2; \
	    echo 'make: on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; \
	  fi; \
	  echo "make: new environment in $(VENV) from $$("$$found" --version)"; \
	  "$$found" -m venv $(VENV); \
	fi; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-bootstrap.txt; \
	if [ "$$(uname -s)" = Linux ]; then \
	  echo 'make: installing the pinned packages (some minutes when they have to be downloaded)'; \
	  VIRTUAL_ENV="$$(pwd -P)/$(VENV)" $(BIN)/uv pip sync --quiet --require-hashes \
	    --build-constraints requirements.lock requirements.lock requirements-bootstrap.txt; \
	  VIRTUAL_ENV="$$(pwd -P)/$(VENV)" $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .; \
	else \
	  echo 'make: requirements.lock covers Linux only; installing what pyproject.toml asks for instead'; \
	  VIRTUAL_ENV="$$(pwd -P)/$(VENV)" $(BIN)/uv pip install --quiet --no-build-isolation -e '.[book,dev]'; \
	fi; \
	printf '%s' "$$(pwd -P)" > $(READY)

nets: $(READY)  ## Ship the nets that the last `make book` trained, from which a chapter starts
	$(BIN)/python tools/lesson_nets.py _build/runs
	$(BIN)/python tools/readme_picture.py

strip: $(READY)  ## Remove outputs and run-time metadata from the chapters, and put their pictures into them
	$(BIN)/python -m nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill" chapters/*.ipynb
	$(BIN)/python tools/notebooks.py

lock: $(READY)  ## Resolve pyproject.toml again into requirements.lock
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --quiet -o requirements.lock
	@{ echo '# What has to be in .venv before requirements.lock can be installed: uv itself, and the build backend of'; \
	   echo '# pyproject.toml with its editable hook. Written by `make lock`.'; \
	   printf 'uv\nhatchling>=1.27\neditables\n' | $(BIN)/uv pip compile - --constraints requirements.lock --universal \
	     --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet \
	     | sed "s/ ; sys_platform == 'linux'//"; } > requirements-bootstrap.new  # uv is needed off Linux too
	mv requirements-bootstrap.new requirements-bootstrap.txt
	$(BIN)/uv pip compile --group pyproject.toml:bench --constraints requirements.lock --universal \
	  --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet \
	  -o requirements-bench.lock
	$(BIN)/uv pip compile --group pyproject.toml:trust --constraints requirements.lock --universal \
	  --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet \
	  -o requirements-trust.lock

clean:  ## Remove what book and tests made (keeps the environment)
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find covidseg tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove the environment too
	rm -rf $(VENV)

FORCE:
