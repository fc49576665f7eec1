# Targets make the virtual environment themselves; `make help` explains them.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
# Further key=value settings for the demo's training runs, such as: make demo ARGS="bridge=none seed=1"
ARGS ?=
# The runs that make app asks; each question goes to the first that can answer it.
RUN_DIR ?= runs/demo/vqa runs/demo/pretrain

.DEFAULT_GOAL := help
.PHONY: help ablation notebooks venv demo test smoke bench docs lint format baselines clean tasks-report soak slurm-local slurm-demo mlflow-server app doctor

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: $(VENV)/.installed  ## Make .venv with everything that the other targets need (about 7 GB, 3 to 6 minutes)

$(VENV)/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or give PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev,slurm,tracking,app,onnx,notebooks,docs]'
	@touch $@

demo: $(VENV)/.installed  ## Pre-train and fine-tune a small BridgeTower on easy-VQA, report against baselines (under 10 minutes on 2 cores)
	$(RUN) -m bt.demo $(ARGS)

test: $(VENV)/.installed  ## Run the tests (about 28 minutes on 2 cores)
	$(RUN) -m pytest

smoke: $(VENV)/.installed  ## Run every experiment end to end, with tiny encoders on a few samples (about 2 minutes on 2 cores)
	$(RUN) -m bt.smoke

soak: $(VENV)/.installed  ## Interrupt runs at random moments, again and again (about 25 minutes; SLURM's part needs root)
	$(RUN) -m pytest -m soak

slurm-local: $(VENV)/.installed  ## Start a real SLURM of two nodes on this machine (root, Debian's slurm-wlm and munge)
	@launchers/slurm_local.sh up
	@echo 'make it known:  eval "$$(launchers/slurm_local.sh env)"    end it:  launchers/slurm_local.sh down --purge'

slurm-demo: $(VENV)/.installed  ## Submit a sweep of bridges to that SLURM, pre-empt it, and show its table from MLflow
	$(RUN) -m launchers.demo

mlflow-server: $(VENV)/.installed  ## MLflow on a PostgreSQL of its own, until Ctrl-C (Debian's postgresql)
	PYTHON=$(RUN) launchers/mlflow_server.sh

app: $(VENV)/.installed  ## Ask a trained model about pictures in the browser: make app RUN_DIR=DIR (default: the demo's)
	$(RUN) -m bt.app --run-dir $(RUN_DIR)

doctor: $(VENV)/.installed  ## Say what this machine has for bt, and what is missing for what
	$(RUN) -m bt.doctor

bench: $(VENV)/.installed  ## Compare speed with transformers' BridgeTower on the same work, base size (about half an hour)
	$(RUN) -m bt.bench --out bench.json

ablation: $(VENV)/.installed  ## Compare bridges and cross-modal layers on easy-VQA, three seeds each (says first how long it takes; resumable)
	$(RUN) -m bt.ablation $(ARGS)

notebooks: $(VENV)/.installed  ## Run notebooks/ on the runs in mlflow.db (of make ablation) and render them to docs/notebooks
	$(RUN) -m bt.report.notebooks $(ARGS)

docs: $(VENV)/.installed  ## Build the site of README, docs/ and docstrings in site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

lint: $(VENV)/.installed  ## Check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed  ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

tasks-report: $(VENV)/.installed  ## Train every task with small encoders on icons and compare with baselines (about 2 hours on one busy core)
	$(RUN) -m bt.bench.tasks_report $(ARGS)

baselines: $(VENV)/.installed  ## Measure the demo's baselines again (majority, question only, the data set author's CNN; about 15 minutes)
	$(RUN) -m bt.bench.baselines

clean:  ## Remove the virtual environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
