# Set-up and the commands of a day. `make quickstart` and `make test` need nothing but Python 3.11.4+.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed-dev
PYTORCH = -r requirements.txt
# Another version, as in `make test TORCH=2.14.1 TORCHVISION=0.29.1`, has an environment of its own.
ifdef TORCH
override VENV = .venv-torch$(TORCH)
PYTORCH = torch==$(TORCH) torchvision$(TORCHVISION:%===%)
else ifdef TORCHVISION
$(error TORCHVISION without TORCH; fix: add TORCH=VERSION)
endif
# `make test RUN=python` takes the active environment as it is, and installs nothing.
ifeq ($(origin RUN),command line)
INSTALLED =
endif
OUT ?= results
JPEG = "CIFAR-10 images re-encoded as JPEG"

.PHONY: quickstart test check gpu gpu-report soak exchange deploy report clean

quickstart: $(INSTALLED:%-dev=%)  ## train on handwritten digits: no download, ends with the test error
	$(RUN) main.py --config configs/quickstart.yaml --resume auto

# A file's tests in one process, so that what they share is made once.
test: $(INSTALLED)  ## the whole suite on two cores: no network, no GPU
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile

check: $(VENV)/.installed-dev  ## lint, format, imports that point down
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(RUN) -m pytest -q -m gpu

# On a machine where an environment with all that the tests need is active: RUN=python.
gpu-report: $(INSTALLED)  ## measure on a GPU what is claimed, in nine minutes; OUT=DIR is written
	$(RUN) -m tools.gpu_report --output "$(OUT)"

soak: $(INSTALLED)  ## the long fault tests, about half an hour; RECORD=FILE keeps figures
	$(RUN) -m pytest -q -m soak $(if $(RECORD),--record=$(RECORD))

# Each library is installed in an environment of its own, and removed before the next.
exchange: $(INSTALLED)  ## send weights through seven libraries and back, an hour; needs the network
	$(RUN) -m tests.exchange.square --output "$(OUT)/exchange_$(shell date +%Y%m).csv"

# So is each program that runs networks.
deploy: $(INSTALLED)  ## export a DenseNet-121 for six programs and run it there, half an hour; needs the network
	$(RUN) -m tests.deploy.table --output "$(OUT)/deploy_$(shell date +%Y%m).csv"

# Figure 5 is drawn from its numbers: the weights that they are of are too large to keep here.
report: $(INSTALLED)  ## draw the figures and write RESULTS.md from the runs in results/runs
	$(RUN) -m tools.figures results/runs --weights results/figures/figure5.csv --note $(JPEG)
	$(RUN) -m tools.report results/runs --output RESULTS.md

clean:  ## remove the environment and caches, never runs or data
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11, 4) and 'error: Python 3.11.4 or later is needed; fix: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt requirements-base.txt | $(VENV)/bin/python
	$(RUN) -m pip install -q $(PYTORCH) -r requirements-base.txt
	touch $@

$(VENV)/.installed-dev: $(wildcard requirements*.txt) | $(VENV)/bin/python
	$(RUN) -m pip install -q $(PYTORCH) -r requirements-dev.txt
	touch $@ $(VENV)/.installed
