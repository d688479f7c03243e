# JMQL's commands. Each sets up .venv on first use; `make` alone lists them.
PYTHON ?= python3
DEVICE ?= cpu
VENV := .venv
JMQL := $(VENV)/bin/jmql
EXTRA := $(filter-out cpu,$(DEVICE))
STAMP := $(if $(filter-out cuda tpu,$(EXTRA)),no-such-device,$(VENV)/.installed$(if $(EXTRA),-$(EXTRA)))

# `flag,NAME,VARIABLE` is `--NAME 'VALUE'`, the value as it was given, or nothing where it is empty.
flag = $(if $(strip $(value $(2))),--$(1) '$(subst ','\'',$(value $(2)))')
# Else make expands them for the environment of what it runs.
unexport TASK ALGO PROFILE SEED SEEDS RESUME RUN RUNS WANDB OUT SWEEP WHERE JOBS BUCKET

.DEFAULT_GOAL := help
.PHONY: help train evaluate export report compare workspace sweep sweep-status sweep-stop bench bench-anchor check test figures lint format lock no-such-device

help: ## list the commands
	@echo 'JMQL: meta-train on a family of physics tasks, adapt to tasks never seen'
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

train: $(STAMP) ## TASK=ant_dir [ALGO=p3o PROFILE=quick SEED=0 SEEDS=1 ARGS="--collect.rows 64"], or RESUME=runs/ant_dir/ID
	@$(JMQL) train $(call flag,task,TASK) $(call flag,algorithm,ALGO) $(call flag,profile,PROFILE) $(call flag,seed,SEED) $(call flag,seeds,SEEDS) $(call flag,resume,RESUME) $(ARGS)

evaluate: $(STAMP) ## RUN=runs/ant_dir/ID [ARGS="--num-tasks 256 --shots 0 1 5 --ablations"]
	@$(JMQL) evaluate $(call flag,run,RUN) $(ARGS)

export: $(STAMP) ## RUN=runs/ant_dir/ID OUT=ant.jmql
	@$(JMQL) export $(call flag,run,RUN) $(call flag,out,OUT) $(ARGS)

report: $(STAMP) ## RUN=runs/ant_dir/ID; a run on one page, report.html
	@$(JMQL) report $(call flag,run,RUN) $(ARGS)

compare: $(STAMP) ## RUNS="runs/ant_dir/a* runs/ant_dir/b*", or WANDB=entity/project/group; groups of seeds in a table and a page
	@$(JMQL) compare $(if $(strip $(RUNS)),--runs $(RUNS)) $(call flag,wandb,WANDB) $(ARGS)

workspace: $(STAMP) ## [ARGS="--project jmql --entity NAME"]; a W&B view that compares groups of seeds
	@$(JMQL) workspace $(ARGS)

sweep: $(STAMP) ## SWEEP=experiments/sweeps/lr.yaml [WHERE=local JOBS=2, or WHERE=tpu BUCKET=gs://...]; prints the jobs, or runs them
	@$(JMQL) sweep $(call flag,file,SWEEP) $(call flag,where,WHERE) $(call flag,jobs,JOBS) $(call flag,bucket,BUCKET) $(ARGS)

sweep-status: $(STAMP) ## SWEEP=experiments/sweeps/lr.yaml [BUCKET=gs://...]; how far the runs are, here or on Cloud TPU
	@$(JMQL) sweep-status $(call flag,file,SWEEP) $(call flag,bucket,BUCKET) $(ARGS)

sweep-stop: $(STAMP) ## SWEEP=experiments/sweeps/lr.yaml; cancels its jobs on Cloud TPU
	@$(JMQL) sweep-stop $(call flag,file,SWEEP) $(ARGS)

bench: $(STAMP) ## measure speed; a JSON file in experiments/results
	@$(JMQL) bench $(ARGS)

bench-anchor: $(VENV)/.installed-dev .venv-torch/.installed ## measure ours beside PyTorch
	@$(VENV)/bin/python -m experiments.anchors .venv-torch/bin/python $(ARGS)

check: $(VENV)/.installed-dev ## run the fast tests
	@$(VENV)/bin/python -m pytest -m 'not slow' $(ARGS)

test: $(VENV)/.installed-dev ## run all tests
	@$(VENV)/bin/python -m pytest $(ARGS)

figures: $(VENV)/.installed-dev ## draw the pictures of the documents
	@$(VENV)/bin/python -m experiments.figures $(ARGS)

.venv-torch/.installed: experiments/anchors/requirements.txt
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --requirement $<
	@touch $@

lint: $(VENV)/.installed-dev ## check format, style and types
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

format: $(VENV)/.installed-dev ## format the code
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

lock: $(VENV)/.installed-dev ## renew requirements.lock
	@$(VENV)/bin/python -m pip install --quiet uv
	@$(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
	  --no-header --no-annotate pyproject.toml --output-file requirements.lock

no-such-device:
	$(error DEVICE is $(DEVICE); $(if $(filter gpu GPU nvidia CUDA cuda%,$(DEVICE)),did you mean cuda? )valid: cpu, cuda (NVIDIA GPUs), tpu)

# A stamp, for the interpreter is also there where this failed half-way. Nor does `venv` replace the
# links to another Python of such a try.
$(VENV)/.created:
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { \
	  echo 'setting up $(VENV) (once, a minute or two)' && \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "JMQL needs Python 3.11 or newer: make PYTHON=python3.12 ...")' && \
	  rm -f $(VENV)/bin/python* && $(PYTHON) -m venv $(VENV) && \
	  $(VENV)/bin/python -m pip install --quiet --upgrade pip; }
	@touch $@

# The lock constrains every version; extras choose what is installed.
$(VENV)/.installed: pyproject.toml requirements.lock | $(VENV)/.created
	@$(VENV)/bin/python -m pip install --quiet --constraint requirements.lock --editable '.[report]'
	@touch $@

$(VENV)/.installed-%: pyproject.toml requirements.lock | $(VENV)/.created
	@$(VENV)/bin/python -m pip install --quiet --constraint requirements.lock --editable '.[report,$*]'
	@touch $@
