# Set-up and the commands of a day. `make quickstart` and `make test` need nothing but Python 3.11.4+.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
JPEG = "CIFAR-10 images re-encoded as JPEG"

.PHONY: quickstart test check gpu soak report clean

quickstart: $(VENV)/.installed  ## train on handwritten digits: no download, ends with the test error
	$(RUN) main.py --config configs/quickstart.yaml --resume auto

# A file's tests in one process, so that what they share is made once.
test: $(VENV)/.installed-dev  ## the whole suite on two cores: no network, no GPU
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile

check: $(VENV)/.installed-dev  ## lint, format, imports that point down
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

gpu: $(VENV)/.installed-dev  ## the tests that need a CUDA device
	$(RUN) -m pytest -q -m gpu

soak: $(VENV)/.installed-dev  ## the long fault tests, about half an hour; RECORD=FILE keeps figures
	$(RUN) -m pytest -q -m soak $(if $(RECORD),--record=$(RECORD))

# Figure 5 is drawn from its numbers: the weights that they are of are too large to keep here.
report: $(VENV)/.installed-dev  ## draw the figures and write RESULTS.md from the runs in results/runs
	$(RUN) -m tools.figures results/runs --weights results/figures/figure5.csv --note $(JPEG)
	$(RUN) -m tools.report results/runs --output RESULTS.md

clean:  ## remove the environment and caches, never runs or data
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11, 4) and 'error: Python 3.11.4 or later is needed; fix: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-tools.txt requirements-dev.txt | $(VENV)/bin/python
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@ $(VENV)/.installed
