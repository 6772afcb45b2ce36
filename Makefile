# Everything but `gpu` runs in .venv, which is made on first use from the pins in requirements/.

PYTHON ?= python3
VENV   := .venv
STAMPS := $(VENV)/stamps
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test check bench gpu clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/demo ## fine-tune and prune a small encoder on movie reviews, into runs/demo
	$(PY) -m apt train examples/demo.yaml --overwrite

test check gpu: export HF_HUB_OFFLINE = 1

test: $(STAMPS)/dev $(STAMPS)/demo ## the default tests: CPU, no network
	$(PY) -m pytest

check: $(STAMPS)/dev $(STAMPS)/demo ## lint, format, types, then the default tests: what CI runs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy apt apt_kernels
	$(PY) -m pytest

bench: $(STAMPS)/dev $(STAMPS)/demo ## compare with PEFT LoRA and full fine-tuning; resumes; ARGS="..." is passed on
	$(PY) -m bench.finetune $(ARGS)

gpu: ## the GPU tests too, with the PYTHON of this machine, no .venv; a report goes to OUT where it is set
	$(PYTHON) -m pytest -m "gpu or not slow" -q $(if $(OUT),--junitxml=$(OUT)/gpu-tests.xml)

clean: ## remove caches and build output; .venv, runs/ and bench/results/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/train: requirements/train.txt requirements/runtime.txt $(STAMPS)/venv
	$(PIP) -r requirements/train.txt
	@touch $@

$(STAMPS)/demo: requirements/demo.txt $(STAMPS)/train
	$(PIP) --no-deps -r requirements/demo.txt
	@touch $@

$(STAMPS)/dev: requirements/dev.txt $(STAMPS)/train
	$(PIP) -r requirements/dev.txt
	@touch $@
