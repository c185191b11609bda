# make help lists what there is. Targets print the commands they run, so that these can be run by hand as well.
#   make PYTHON=python3 ...   uses that environment as it is; otherwise .venv is set up on first use.

# bash hands itself over to a command; dash would stay in between, and not pass on the signal that ends make
SHELL := $(shell command -v bash || command -v sh)

RECIPE ?= seed
FOLD ?= 0
STAGE ?= 1
GPUS ?= 1
JOBS ?= 1
WORKERS ?= 3
SET ?=
CONFIG ?=
FOLDS ?= all

GOALS := help setup demo test test-oldest test-slow faults soak bench lint format recipe verify pack folds phantom train cv oof tune submit score check-submission report clean
NO_GOAL := $(filter-out $(GOALS) .venv/% .oldest/%,$(MAKECMDGOALS))
ifneq (,$(NO_GOAL))
$(error no target $(firstword $(NO_GOAL)); there are $(GOALS))
endif
VARIABLES := RECIPE CONFIG FOLD STAGE GPUS JOBS WORKERS FOLDS SET PYTHON SUBMISSION TRUTH SAMPLE BESIDE BENCH
typed = $(foreach name,$(1),$(if $(findstring command line,$(origin $(name))),$(name)))
UNKNOWN := $(filter-out $(VARIABLES) CUDA_% HF_% MKL_% NCCL_% OMP_% PYTEST_% PYTHON% TORCH% TRITON_%,$(call typed,$(.VARIABLES)))
ifneq (,$(UNKNOWN))
$(error no variable $(UNKNOWN); there are $(VARIABLES); one for the commands themselves goes before make; several overrides are quoted, as SET="runs=DIR seed=1")
endif
# what each target takes, and PYTHON but for three; of several targets, one is enough to take it
OF_test := WORKERS
OF_test-slow := WORKERS
OF_test-oldest := WORKERS
OF_bench := BENCH
OF_demo := SET
OF_recipe := RECIPE CONFIG SET
OF_verify := RECIPE CONFIG SET
OF_pack := RECIPE CONFIG SET
OF_folds := RECIPE CONFIG SET
OF_phantom := RECIPE CONFIG SET
OF_tune := RECIPE CONFIG SET
OF_train := RECIPE CONFIG SET FOLD STAGE GPUS
OF_cv := RECIPE CONFIG SET FOLDS GPUS JOBS
OF_oof := RECIPE CONFIG SET GPUS
OF_submit := RECIPE CONFIG SET FOLDS GPUS
OF_score := RECIPE CONFIG SET SUBMISSION TRUTH
OF_check-submission := RECIPE CONFIG SET SUBMISSION TRUTH SAMPLE
OF_report := RECIPE CONFIG SET BESIDE
TAKEN := $(if $(filter-out help clean test-oldest,$(MAKECMDGOALS)),PYTHON) $(foreach goal,$(MAKECMDGOALS),$(OF_$(goal)))
UNUSED := $(filter-out $(TAKEN),$(call typed,$(VARIABLES)))
ifneq (,$(UNUSED))
$(error $(firstword $(UNUSED))= has no meaning for make $(MAKECMDGOALS), which takes $(TAKEN))
endif

# a launch of 0 processes, or of words, is refused by torchrun with a traceback
counted = $(shell printf %s '$($(1))' | grep -qxE '[1-9][0-9]{0,3}' || echo $(1))
NO_COUNT := $(strip $(foreach name,$(call typed,GPUS JOBS WORKERS),$(call counted,$(name))))
ifneq (,$(NO_COUNT))
$(error $(firstword $(NO_COUNT))= takes a number of processes, 1 or more, on a CPU as well)
endif

ifdef PYTHON
READY :=
RIVALS :=
else
PYTHON := .venv/bin/python
READY := .venv/installed
RIVALS := .venv/rivals
endif

OPTIONS = $(if $(CONFIG),--config $(CONFIG)) --recipe $(RECIPE) $(if $(SET),--set $(SET))
# pytest-benchmark, where it is installed, does not bear other processes
AT_ONCE = $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile -p no:benchmark)
LAUNCH = $(PYTHON) $(if $(filter-out 1,$(GPUS)),-m torch.distributed.run --standalone --nproc_per_node=$(GPUS))

.DEFAULT_GOAL := help
.PHONY: $(GOALS)

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20
	@echo; echo '  variables: RECIPE=seed CONFIG=mine.toml FOLD=0 STAGE=1 GPUS=1 JOBS=1 WORKERS=3 FOLDS=all SET="stage.2.epochs=1 data.root=/data/siim" PYTHON=python3'

setup: $(READY)  ## install everything into .venv

.venv/installed: pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet --editable '.[dicom,test]'
	touch $@

.venv/rivals: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[dicom,test,bench]'
	touch $@

demo: $(READY)  ## the whole recipe on synthetic X-rays, minutes on a CPU
	$(PYTHON) -m pneumo phantom --recipe demo $(if $(SET),--set $(SET))
	$(PYTHON) -m pneumo verify --recipe demo $(if $(SET),--set $(SET))
	$(PYTHON) -m pneumo cv --recipe demo $(if $(SET),--set $(SET))
	$(PYTHON) -m pneumo tune --recipe demo $(if $(SET),--set $(SET))
	$(PYTHON) predict.py --recipe demo $(if $(SET),--set $(SET))
	$(PYTHON) -m pneumo report --recipe demo $(if $(SET),--set $(SET))
	$(PYTHON) -m pneumo score --recipe demo $(if $(SET),--set $(SET))

test: $(READY)  ## the tests, but for the slow ones, WORKERS files at a time; 1 takes pytest alone
	$(PYTHON) -m pytest $(AT_ONCE)

.oldest/installed: pyproject.toml
	python3 -m venv .oldest
	.oldest/bin/python -m pip install --quiet --editable '.[dicom,test]' \
	  $$(sed -nE '/^dependencies/,/^]/s/^ *"(.*)>=([0-9.]+)".*/\1==\2/p' pyproject.toml)
	touch $@

test-oldest: .oldest/installed  ## the tests with the oldest packages that pyproject.toml allows, in a folder of their own
	.oldest/bin/python -m pytest $(AT_ONCE)

test-slow: $(READY)  ## the slow tests
	$(PYTHON) -m pytest -m slow $(AT_ONCE)

faults: $(READY)  ## every test of a fault, slow ones too -> tests/faults/RESULTS.md
	$(PYTHON) -m pytest -m "slow or not slow" --fault-table tests/faults/RESULTS.md

soak: $(READY)  ## kill and start again 50 times at random moments, compare every ending
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(PYTHON) tests/soak.py 50 0

bench: $(READY) $(RIVALS)  ## time everything against what people would use instead -> runs/bench.json [BENCH=quick]
	PYTHONPATH=tests $(PYTHON) -m bench.run

lint: $(READY)  ## ruff's checks and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(READY)  ## let ruff format the code
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

recipe: $(READY)  ## print every number of a recipe, base and SET included
	@$(PYTHON) -m pneumo recipe $(OPTIONS)

verify: $(READY)  ## read every image and annotation once, list every problem
	$(PYTHON) -m pneumo verify $(OPTIONS)

pack: $(READY)  ## decode the images once
	$(PYTHON) -m pneumo pack $(OPTIONS)

folds: $(READY)  ## split the training images
	$(PYTHON) -m pneumo folds $(OPTIONS)

phantom: $(READY)  ## write synthetic X-rays
	$(PYTHON) -m pneumo phantom $(OPTIONS)

train: $(READY)  ## one stage of one fold: FOLD=0 STAGE=2 [GPUS=2]
	$(LAUNCH) train.py --fold $(FOLD) --stage $(STAGE) $(OPTIONS)

cv: $(READY)  ## all folds, all stages; skips what is done [GPUS=2 | JOBS=5 folds side by side, a GPU each]
	$(LAUNCH) -m pneumo cv --folds $(FOLDS) --jobs $(JOBS) $(OPTIONS)

oof: $(READY)  ## predict each fold's held-out images; cv does it as well [GPUS=2]
	$(LAUNCH) -m pneumo oof $(OPTIONS)

tune: $(READY)  ## choose the decision rule on them, cross-fitted -> rule.toml
	$(PYTHON) -m pneumo tune $(OPTIONS)

submit: $(READY)  ## ensemble -> submission.csv [FOLDS=0,1] [GPUS=2]
	$(LAUNCH) predict.py --folds $(FOLDS) $(OPTIONS)

score: $(READY)  ## score any submission: SUBMISSION=a.csv TRUTH=train-rle.csv
	$(PYTHON) -m pneumo score $(SUBMISSION) $(TRUTH) $(OPTIONS)

check-submission: $(READY)  ## rows, ids and codes of a submission [SUBMISSION=a.csv TRUTH=train-rle.csv SAMPLE=a.csv]
	$(PYTHON) -m pneumo check-submission $(SUBMISSION) $(if $(TRUTH),--truth $(TRUTH)) $(if $(SAMPLE),--sample $(SAMPLE)) $(OPTIONS)

report: $(READY)  ## report.html and its figures [BESIDE=seed-image]
	$(PYTHON) -m pneumo report $(OPTIONS) $(if $(BESIDE),--beside $(BESIDE))

clean:  ## remove the environments and caches; runs/ and data/ stay
	rm -rf .venv .oldest .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
